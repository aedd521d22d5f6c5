"""A file from outside, read a piece at a time: the readers of model files stand on it, and nothing of the file is mapped into memory."""

from typing import Protocol

from fallow.model.errors import BadModelFile

PIECE_BYTES = 64 * 1024


class File(Protocol):
    """What is read: an open file, a BytesIO or a mapping."""

    def read(self, size: int, /) -> bytes | None: ...

    def seek(self, offset: int, /) -> object: ...


class Window:
    """The bytes of a file around where its reader stands. A file that shrinks meanwhile is a refusal, not a crash."""

    def __init__(self, file: File, size_bytes: int) -> None:
        self._file = file
        self.size_bytes = size_bytes
        self._first = 0
        self._held = b""

    def hold(self, at: int, count: int) -> tuple[bytes, int]:
        """Some bytes of the file, and where in them byte `at` is; at least `count` of them stand from there on."""
        start = at - self._first
        if start >= 0 and start + count <= len(self._held):
            return self._held, start
        if at + count > self.size_bytes:
            raise BadModelFile(f"the file ends at byte {self.size_bytes}, in the middle of its header: it is cut off; fetch it again")
        self._file.seek(at)
        self._held, self._first = self._read(min(max(count, PIECE_BYTES), self.size_bytes - at)), at
        if len(self._held) < count:
            raise BadModelFile(f"the file became shorter than its {self.size_bytes} bytes while it was read; fetch it again")
        return self._held, 0

    def copy(self, at: int, count: int) -> bytes:
        """A copy of a few bytes."""
        held, start = self.hold(at, count)
        return held[start : start + count]

    def _read(self, count: int) -> bytes:
        pieces: list[bytes] = []
        while count > 0:
            piece = self._file.read(count)
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

"""What of a call's answer went out to its caller, so that another node can go on where one broke off."""

from fallow.wire.delivered import CONTINUED, pieces

KEPT_BYTES_MAX = 4 * 1024 * 1024
"""Of a streamed answer; a longer one can't be continued. What is kept are the messages that came, not copies."""
MOVED = b": fallow-moved to %s\n\n"
"""A comment in the stream, which clients skip: the rest comes from another node."""


class Delivery:
    """The bytes of one streamed answer, over all attempts."""

    def __init__(self, path: str, *, stream: bool) -> None:
        self._path = path
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_kept = stream and path in CONTINUED
        self.has_begun = False
        """The caller has the answer's head."""

    def add(self, data: bytes) -> None:
        """These bytes go out."""
        self._size += len(data)
        if self._is_kept:
            self._is_kept = self._size <= KEPT_BYTES_MAX
            self._chunks.append(data)
            if not self._is_kept:
                self._chunks.clear()

    def pieces(self) -> tuple[str, ...] | None:
        """The text so far; None if the answer can't be continued."""
        return pieces(self._path, self._chunks) if self._is_kept else None

"""How the hub remembers prices: the index as it is, and a line for each price of the past, in two small files."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from fallow.adapters.files import make_folder, write_private
from fallow.core.price_index import PriceIndex
from fallow.model.errors import StartFailed
from fallow.model.messages import IndexPrice

FOLDER = "prices"
KEPT_MS = 30 * 24 * 60 * 60_000
ROWS_MAX = 50_000
"""About 350 bytes each in memory: 30 days of five models, or fewer days of more."""
SPARE_PERCENT = 25
SPARE_ROWS = 1_000
"""The file may hold so many rows more than are remembered before it is written anew."""


class PriceRecord:
    """Past prices in memory, oldest first, and on disk. A full disk costs what is on disk, never the running index.

    `rows_max` is how many are remembered.
    """

    def __init__(self, data: Path, *, rows_max: int = ROWS_MAX) -> None:
        folder = make_folder(data / FOLDER)
        self._index_path = folder / "index.json"
        self._rows_path = folder / "history.jsonl"
        self._lines_there = 0
        self._rows: deque[IndexPrice] = deque(self._lines(), maxlen=rows_max)

    def index(self) -> PriceIndex:
        """What was kept last; empty if nothing was, or if it can't be read."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._index_path.read_bytes(), type=PriceIndex)
        return PriceIndex()

    def rows(self, model: str = "") -> list[IndexPrice]:
        """The past of a model, or of all, oldest first."""
        return [row for row in self._rows if not model or row.model == model]

    def keep(self, index: PriceIndex, rows: Sequence[IndexPrice], *, now_ms: int) -> None:
        """The index as it is now, and what is to be remembered of it. The row that a crash cuts off is skipped when it is read."""
        self._rows.extend(rows)
        while self._rows and self._rows[0].at_ms < now_ms - KEPT_MS:
            self._rows.popleft()
        with contextlib.suppress(OSError, StartFailed):
            write_private(self._index_path, msgspec.json.encode(index).decode())
            if self._lines_there + len(rows) > len(self._rows) * (100 + SPARE_PERCENT) // 100 + SPARE_ROWS:
                self._lines_there = len(self._rows)
                write_private(self._rows_path, b"".join(map(_line, self._rows)).decode())
            else:
                self._lines_there += len(rows)
                self._append(b"".join(map(_line, rows)))

    def _append(self, lines: bytes) -> None:
        descriptor = os.open(self._rows_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            if file.tell() and os.pread(descriptor, 1, file.tell() - 1) != b"\n":
                lines = b"\n" + lines  # after a line that a crash or a full disk cut off
            file.write(lines)

    def _lines(self) -> Iterator[IndexPrice]:
        if not self._rows_path.exists():
            return
        with contextlib.suppress(OSError), self._rows_path.open("rb") as file:
            for line in file:
                self._lines_there += 1
                with contextlib.suppress(msgspec.DecodeError):
                    yield msgspec.json.decode(line, type=IndexPrice)


def _line(row: IndexPrice) -> bytes:
    return msgspec.json.encode(row) + b"\n"

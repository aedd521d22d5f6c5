"""What the owner is told of their machine, and told it: their pause, each day's work, and the log of why it paused."""

import contextlib
import datetime
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters.files import make_folder, write_private
from fallow.model.errors import StartFailed
from fallow.model.owner import Entry, Work

FOLDER = "owner"
LOG_BYTES_MAX = 1024 * 1024
"""Then the log's older half goes."""
ENTRIES_MAX = 10_000
FOREVER_MS = 2**62


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's own pause, in UTC milliseconds; it outlives the node's process."""

    until_wall_ms: int


class OwnerRecord:
    """Small files in the data folder. A full disk costs the record, never the owner's pause of a node that runs."""

    def __init__(self, data: Path) -> None:
        self._folder = make_folder(data / FOLDER)
        self.paused_until_wall_ms: int | None = None
        """Until when the owner paused; None if they didn't. In force as soon as it is set."""
        self.read_pause()

    def read_pause(self) -> None:
        """What was kept."""
        pause = self._read("pause.json", Pause)
        self.paused_until_wall_ms = None if pause is None else pause.until_wall_ms

    def keep_pause(self) -> None:
        """Write down what is in force; raises StartFailed or OSError."""
        until = self.paused_until_wall_ms
        if until is None:
            (self._folder / "pause.json").unlink(missing_ok=True)
        else:
            write_private(self._folder / "pause.json", msgspec.json.encode(Pause(until_wall_ms=until)).decode())

    def pause(self, until_wall_ms: int) -> None:
        """Raises StartFailed or OSError if it can't be written down."""
        self.paused_until_wall_ms = until_wall_ms
        self.keep_pause()

    def resume(self) -> None:
        """The owner's pause is over."""
        self.paused_until_wall_ms = None
        self.keep_pause()

    def work(self, day: str) -> Work:
        """What was done on this day so far."""
        found = self._read("work.json", Work)
        return found if found is not None and found.day == day else Work(day=day)

    def keep_work(self, work: Work) -> None:
        with contextlib.suppress(StartFailed):
            write_private(self._folder / "work.json", msgspec.json.encode(work).decode())

    def note(self, entry: Entry) -> None:
        """One more line of the log."""
        path = self._folder / "log.jsonl"
        with contextlib.suppress(OSError, StartFailed):
            if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
                lines = path.read_text().splitlines(keepends=True)
                write_private(path, "".join(lines[len(lines) // 2 :]))
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")

    def entries(self, count: int) -> list[Entry]:
        """The last lines of the log, oldest first."""
        return list(deque(self._lines(), maxlen=min(count, ENTRIES_MAX)))

    def _lines(self) -> Iterator[Entry]:
        path = self._folder / "log.jsonl"
        if not path.exists():
            return
        with contextlib.suppress(OSError), path.open("rb") as file:
            for line in file:
                with contextlib.suppress(msgspec.DecodeError):  # a line that a crash cut off
                    yield msgspec.json.decode(line, type=Entry)

    def _read(self, name: str, kind: type[Any]) -> Any:
        try:
            return msgspec.json.decode((self._folder / name).read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError):
            return None


def stamp(wall_ms: int) -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.datetime.fromtimestamp(wall_ms / 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

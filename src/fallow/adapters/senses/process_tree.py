"""How much processor time our own processes used: the trees under given roots, followed as engines appear and die."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fallow.adapters.senses.kernel_files import read_bytes

FULL_SCAN_NS = 1_000_000_000
"""How often children of all threads, not only of main threads, are looked for."""
STAT_BYTES_MAX = 4_096
TICKS_MAX = 2**64
FIRST_TIME_FIELD = 11
"""Where utime, stime, cutime, cstime begin, counted from the field after the name: see proc_pid_stat(5), fields 14–17."""


class _Member(msgspec.Struct):
    """A process of ours. Its open file stands for this very process, even after its number is given to another."""

    file: int
    own_ticks: int
    reaped_ticks: int


class ProcessTree:
    """All processes under the roots, each with its /proc file kept open, so that one look costs some microseconds."""

    def __init__(self, roots: Sequence[int], *, proc: Path) -> None:
        self._roots = tuple(roots)
        self._proc = str(proc)
        self._members: dict[int, _Member] = {}
        self._has_lists = False
        """Whether this kernel lists children (CONFIG_PROC_CHILDREN): set once one list was read."""
        self._seen: set[int] = set()
        self._forks: int | None = None
        self._scanned_ns: int | None = None

    def spent_ticks(self, *, forks: int | None, now_ns: int) -> int:
        """Ticks that the trees used since the last look, of processes that have ended since, too.

        `forks` counts all process and thread starts of the machine: while it stands still there is nobody new to find.
        When a process of the tree is reaped, its whole time moves to its parent's `cutime` and `cstime`; what we counted of
        it before is taken off. The time of one that lived and died between two looks is found there as well.
        """
        self._scan(forks=forks, now_ns=now_ns)
        own = reaped = gone = 0
        for pid, member in list(self._members.items()):
            times = _read_times(member.file)
            if times is None:
                gone += member.own_ticks + member.reaped_ticks
                self._drop(pid)
                continue
            own += max(0, times[0] - member.own_ticks)
            reaped += max(0, times[1] - member.reaped_ticks)
            member.own_ticks, member.reaped_ticks = times
        return own + max(0, reaped - gone)

    def close(self) -> None:
        for pid in list(self._members):
            self._drop(pid)

    def _scan(self, *, forks: int | None, now_ns: int) -> None:
        """Look for new processes. What one used before it was found counts from its start, but not at the very first scan."""
        first = self._scanned_ns is None
        full = self._scanned_ns is None or now_ns - self._scanned_ns >= FULL_SCAN_NS
        if not full and forks is not None and forks == self._forks:
            return
        self._forks = forks
        if full:
            self._scanned_ns = now_ns
        for root in self._roots:
            self._add(root, first=first)
        waiting = list(self._members)
        while waiting:
            waiting += [child for child in self._children(waiting.pop(), full=full) if self._add(child, first=first)]
        if full and not self._has_lists:
            self._walk(first=first)

    def _children(self, pid: int, *, full: bool) -> list[int]:
        """A process's children: those that its main thread started, or `full`, all."""
        folder = f"{self._proc}/{pid}/task"
        try:
            threads = os.listdir(folder) if full else [str(pid)]
        except OSError:
            return []
        lists = [text for thread in threads if (text := read_bytes(f"{folder}/{thread}/children")) is not None]
        self._has_lists |= bool(lists)
        return [int(word) for text in lists for word in text.split() if word.isdigit()]

    def _walk(self, *, first: bool) -> None:
        """Find children by everybody's parent. Only numbers that weren't there at the last walk are opened."""
        try:
            present = {int(name) for name in os.listdir(self._proc) if name.isdecimal()}
        except OSError:
            return
        parents = {pid: _parent(read_bytes(f"{self._proc}/{pid}/stat")) for pid in present - self._seen}
        self._seen = present
        found = True
        while found:  # until no parent among the new ones is new to us
            found = any(self._add(pid, first=first) for pid, parent in parents.items() if parent in self._members)

    def _add(self, pid: int, *, first: bool) -> bool:
        if pid in self._members:
            return False
        try:
            file = os.open(f"{self._proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        times = _read_times(file) if first else (0, 0)
        if times is None:
            os.close(file)
            return False
        self._members[pid] = _Member(file=file, own_ticks=times[0], reaped_ticks=times[1])
        return True

    def _drop(self, pid: int) -> None:
        os.close(self._members.pop(pid).file)


def _read_times(file: int) -> tuple[int, int] | None:
    """Ticks of the process itself, and of its children that ended; None if it has ended."""
    try:
        text = os.pread(file, STAT_BYTES_MAX, 0)
        fields = text[text.rindex(b")") + 1 :].split()  # the name before it may hold blanks and brackets
        user, system, reaped_user, reaped_system = map(int, fields[FIRST_TIME_FIELD : FIRST_TIME_FIELD + 4])
    except (OSError, ValueError):
        return None
    times = user + system, reaped_user + reaped_system
    return times if min(times) >= 0 and max(times) < TICKS_MAX else None


def _parent(stat: bytes | None) -> int | None:
    try:
        return int((stat or b"").rpartition(b")")[2].split()[1])
    except (IndexError, ValueError):
        return None

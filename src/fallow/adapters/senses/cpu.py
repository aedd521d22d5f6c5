"""How many cores others keep busy, which is what the owner gate looks at ten times a second."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from fallow.adapters.senses.kernel_files import PROC
from fallow.adapters.senses.process_tree import FULL_SCAN_NS, TICKS_MAX, ProcessTree
from fallow.model.owner import Unknown

SHORTEST_S = 0.02
"""The shortest time that is measured: in less, one tick of the kernel's clock would look like half a core."""
ROUNDING_TICKS = 2
"""By how much our own use may seem to pass all use in one sample, from rounding, and be settled in the next."""
STAT_BYTES_MAX = 65_536
NO_SAMPLE = Unknown("the processor has not been watched for long enough yet")


class _Spent(NamedTuple):
    """Processor seconds since the last look: all of the machine's, and ours."""

    all_s: float
    own_s: float


class OthersCpu:
    """Cores' worth of work that isn't ours: all busy time minus that of the process trees under `roots`, by the wall clock.

    With `cpus`, only work on these processors counts; ours is expected to stay on them.
    """

    def __init__(
        self,
        roots: Sequence[int],
        *,
        proc: Path = PROC,
        cpus: frozenset[int] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._now_ns = now_ns
        self._source: _KernelTimes | _PortableTimes
        if (proc / "stat").exists():
            self._source = _KernelTimes(roots, proc=proc, cpus=cpus)
        else:
            self._source = _PortableTimes(roots)
        self._at_ns = now_ns()
        self._source.spent(now_ns=self._at_ns)
        self._last: float | Unknown = NO_SAMPLE
        self._owed_s = 0.0
        self.own_s = 0.0
        """Core-seconds that we used since we began to look."""

    def sample(self) -> float | Unknown:
        """Cores that others used since the last sample. Asked again within 20 ms, it repeats its answer."""
        now_ns = self._now_ns()
        wall_s = (now_ns - self._at_ns) / 1e9
        if wall_s < SHORTEST_S:
            return self._last
        spent = self._source.spent(now_ns=now_ns)
        if isinstance(spent, Unknown):
            self._last = spent
            return spent
        others_s = spent.all_s - spent.own_s - self._owed_s
        self._owed_s = min(max(0.0, -others_s), ROUNDING_TICKS * self._source.tick_s)
        self._at_ns = now_ns
        self.own_s += spent.own_s
        self._last = max(0.0, others_s) / wall_s
        return self._last

    def close(self) -> None:
        self._source.close()


class _KernelTimes:
    """Linux: /proc/stat, kept open, and the process tree."""

    def __init__(self, roots: Sequence[int], *, proc: Path, cpus: frozenset[int] | None) -> None:
        self.tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
        self._path = proc / "stat"
        self._heads = None if cpus is None else frozenset(b"cpu%d" % cpu for cpu in cpus)
        self._file: int | None = None
        self._tree = ProcessTree(roots, proc=proc)
        self._busy_ticks: int | None = None
        self._own_ticks = 0

    def spent(self, *, now_ns: int) -> _Spent | Unknown:
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            text = os.pread(self._file, STAT_BYTES_MAX, 0)
            busy_ticks = _busy_ticks(text, self._heads)
        except OSError as error:
            return Unknown(f"the processor's use can't be read: {error.strerror}")
        except ValueError:
            return Unknown("the processor's use can't be read: its table is damaged")
        self._own_ticks += self._tree.spent_ticks(forks=_forks(text), now_ns=now_ns)
        before, self._busy_ticks = self._busy_ticks, busy_ticks
        own_ticks, self._own_ticks = self._own_ticks, 0
        if before is None:
            return NO_SAMPLE
        return _Spent(max(0, busy_ticks - before) * self.tick_s, own_ticks * self.tick_s)

    def close(self) -> None:
        self._tree.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _busy_ticks(text: bytes, heads: frozenset[bytes] | None) -> int:
    """user + nice + system + irq + softirq; `user` and `nice` hold the guests' time already. See proc_stat(5)."""
    if heads is None:
        lines = [text[: text.index(b"\n")].split()]
        if not lines[0] or lines[0][0] != b"cpu":
            raise ValueError("the first line isn't that of all processors")
    else:
        lines = [words for line in text.split(b"\nintr", 1)[0].split(b"\n") if (words := line.split()) and words[0] in heads]
        if not lines:
            raise ValueError("none of our processors is in the table")
    busy = 0
    for words in lines:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])
        busy += user + nice + system + irq + softirq
    if not 0 <= busy < TICKS_MAX:
        raise ValueError("more ticks than can be")
    return busy


def _forks(text: bytes) -> int | None:
    """How many processes and threads were ever started; None if it isn't told."""
    _, found, rest = text.rpartition(b"\nprocesses ")
    word = rest.split(b"\n", 1)[0].strip()
    return int(word) if found and word.isdigit() else None


class _PortableTimes:
    """Elsewhere: what psutil tells of all processors, and of each of our processes."""

    tick_s = 0.01

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = tuple(roots)
        self._own_s: dict[psutil.Process, float] = {}
        self._busy_s: float | None = None
        self._scanned_ns: int | None = None

    def spent(self, *, now_ns: int) -> _Spent | Unknown:
        try:
            times = psutil.cpu_times()
        except (OSError, RuntimeError, psutil.Error) as error:
            return Unknown(f"the processor's use can't be read: {type(error).__name__}")
        busy_s = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        first = self._busy_s is None
        if self._scanned_ns is None or now_ns - self._scanned_ns >= FULL_SCAN_NS:
            self._scanned_ns = now_ns
            self._scan(first=first)
        own_s = 0.0
        for process, before_s in list(self._own_s.items()):
            used_s = _used_s(process)
            if used_s is None:
                del self._own_s[process]
                continue
            own_s += max(0.0, used_s - before_s)
            self._own_s[process] = used_s
        before_all_s, self._busy_s = self._busy_s, busy_s
        return NO_SAMPLE if before_all_s is None else _Spent(max(0.0, busy_s - before_all_s), own_s)

    def close(self) -> None:
        self._own_s.clear()

    def _scan(self, *, first: bool) -> None:
        for pid in self._roots:
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except (OSError, psutil.Error):
                continue
            for process in family:
                self._own_s.setdefault(process, (_used_s(process) or 0.0) if first else 0.0)


def _used_s(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except (OSError, psutil.Error):
        return None
    return float(times.user + times.system)

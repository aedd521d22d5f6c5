"""Which CPUs others leave alone, so that engines can be kept to those."""

import os
from pathlib import Path

STAT = Path("/proc/stat")


class QuietCpus:
    """Compares two readings of /proc/stat. Engines run at nice 19, so their time is in another column than others'."""

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._before: dict[int, int] = {}

    def choose(self, count: int) -> frozenset[int] | None:
        """The CPUs that did the least for others since the last question, of those that we may use; None if that can't be told."""
        if not hasattr(os, "sched_getaffinity"):
            return None
        try:
            now = _busy(self._stat.read_text())
        except (OSError, ValueError, IndexError):
            return None
        allowed = sorted(os.sched_getaffinity(0))
        used = {cpu: now.get(cpu, 0) - self._before.get(cpu, 0) for cpu in allowed}
        self._before = now
        return frozenset(sorted(allowed, key=lambda cpu: (used[cpu], cpu))[: max(1, count)])


def _busy(text: str) -> dict[int, int]:
    """Ticks of each CPU in user, system and interrupts; not nice, idle or waiting."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, _, system, _, _, irq, softirq, *_ = map(int, fields)
            found[int(name[3:])] = user + system + irq + softirq
    return found

"""An engine's processes in the owner's hand: stopped, going on, or kept to some of the cores."""

import contextlib
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil

from fallow.ports import Clock

PROC = Path("/proc")
CAN_PIN = hasattr(os, "sched_setaffinity")
TASKS_MAX = 4_096
"""Threads that one engine may have before we stop counting; it is jailed to far fewer."""


class Reins:
    """One engine's process group, whichever process it is at the moment. A stopped one keeps its memory.

    `resumed(stopped_ms)` hears of it when it goes on.
    """

    def __init__(self, clock: Clock, resumed: Callable[[int], None]) -> None:
        self.is_stopped = False
        self._clock = clock
        self._resumed = resumed
        self._stopped_at_ms = 0
        self._process: Process | None = None
        self._cpus: frozenset[int] | None = None

    def take(self, process: Process) -> None:
        """The engine was started anew; what was asked of it before holds."""
        self._process = process
        if self.is_stopped:
            self._signal(signal.SIGSTOP)
        if self._cpus is not None:
            self._pin(self._cpus)

    def drop(self) -> None:
        """The engine ended."""
        self._process = None

    def stop(self) -> None:
        """Stop it at once."""
        if not self.is_stopped:
            self._stopped_at_ms = self._clock.now_ms()
        self.is_stopped = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        if self.is_stopped:
            self.is_stopped = False
            self._signal(signal.SIGCONT)
            self._resumed(self._clock.now_ms() - self._stopped_at_ms)

    def keep_to(self, cpus: Collection[int] | None) -> None:
        """Let its threads run on these CPUs only; None: on all that we may use."""
        wanted = None if cpus is None else frozenset(cpus)
        if wanted != self._cpus and CAN_PIN:
            self._cpus = wanted
            self._pin(wanted if wanted is not None else os.sched_getaffinity(0))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group: under bubblewrap the engine is a grandchild."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _pin(self, cpus: Collection[int]) -> None:
        """New threads inherit it; one that appears or ends meanwhile changes nothing that matters."""
        for thread in self._threads():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, cpus)

    def _threads(self) -> Iterator[int]:
        for process in self._processes():
            with contextlib.suppress(OSError):
                yield from [int(name) for name in os.listdir(PROC / str(process.pid) / "task")][:TASKS_MAX]

    def _processes(self) -> list[psutil.Process]:
        if self._process is None or self._process.returncode is not None:
            return []
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        return []

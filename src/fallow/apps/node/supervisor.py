"""Keeps one engine alive: carries out what core/watch decides."""

import asyncio
import contextlib
import logging
from asyncio.subprocess import Process
from pathlib import Path
from typing import Protocol

from fallow.adapters import children
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.reins import Reins
from fallow.core import watch
from fallow.model.errors import BadChecksum
from fallow.model.offer import Readiness
from fallow.ports import Clock

TICK_S = 0.1
HEALTH_S = 2.0
HEALTH_POLL_S = 0.05
HOPELESS_FAULTS = 3

log = logging.getLogger("fallow.node")


class Launcher(Protocol):
    """How an engine's process is started."""

    socket: Path

    async def start(self) -> Process: ...

    def clean_up(self) -> None: ...


class Supervisor:
    """One engine's process. `moved()` is to be called whenever a call in it made progress."""

    def __init__(self, launch: Launcher, engine: HttpEngine, clock: Clock, *, weights_bytes: int, stall_ms: int) -> None:
        self._launch = launch
        self._engine = engine
        self._clock = clock
        self._watch = watch.Watch(weights_bytes=weights_bytes, stall_ms=stall_ms)
        self._process: Process | None = None
        self.reins = Reins(clock, self._resumed)
        self._group: asyncio.TaskGroup | None = None
        self._ready = asyncio.Event()
        self.running = 0
        self._moved_at_ms = 0
        self.has_stalled = False

    async def run(self) -> None:
        """Until cancelled; then the engine is killed."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                while True:
                    if not self.reins.is_stopped:
                        self._step(watch.Tick(running=self.running, progress_at_ms=self._moved_at_ms))
                    await asyncio.sleep(TICK_S)
        finally:
            self._group = None
            if self._process is not None:
                await asyncio.shield(children.kill(self._process))
            self._engine.close()
            self._launch.clean_up()

    def _resumed(self, stopped_ms: int) -> None:
        """The owner lets the engine go on: while it was stopped it had no time to stall or to load too long."""
        self.moved()
        self._step(watch.Resumed(stopped_ms))

    def want(self) -> None:
        """Start the engine if it isn't there."""
        self._step(watch.Wanted())

    def leave(self) -> None:
        """End the engine: its memory is needed."""
        self._step(watch.Unwanted())

    @property
    def phase(self) -> watch.Phase:
        """Where the engine is in its life; unless "cold", it holds memory, or will at any moment."""
        return self._watch.phase

    def moved(self) -> None:
        """A call in the engine made progress."""
        self._moved_at_ms = self._clock.now_ms()

    async def ready(self, within_s: float) -> bool:
        """Wait for the engine."""
        self.want()
        if self._ready.is_set():
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._ready.wait()
        return self._ready.is_set()

    def readiness(self) -> Readiness:
        if watch.is_failed(self._watch):
            return "failed"
        phase = self.phase
        return "ready" if phase == "ready" else "cold" if phase in ("cold", "leaving") else "loading"

    def is_hopeless(self) -> bool:
        """Whether the engine never loaded, though it was tried a few times."""
        return self._watch.loaded_in_ms is None and self._watch.faults >= HOPELESS_FAULTS

    def ready_in_ms(self) -> int:
        return watch.ready_in_ms(self._watch, now_ms=self._clock.now_ms())

    def progress(self) -> float | None:
        return watch.progress(self._watch, now_ms=self._clock.now_ms())

    def _step(self, event: watch.Event) -> None:
        before = self._watch.phase
        self._watch, effects = watch.step(self._watch, event, now_ms=self._clock.now_ms())
        if self._watch.phase != before:
            log.info("engine is %s", self._watch.phase)
        if self._watch.phase == "ready":
            self._ready.set()
        else:
            self._ready.clear()
        for effect in effects:
            assert self._group is not None, "the supervisor runs before anybody wants the engine"
            match effect:
                case watch.Launch():
                    self._group.create_task(self._start(), name="engine start")
                case watch.Kill(why=why):
                    log.warning("engine killed: %s", why)
                    self.has_stalled |= why == "stalled"
                    if self._process is not None:
                        self._group.create_task(children.kill(self._process), name="engine kill")

    async def _start(self) -> None:
        try:
            self._process = process = await self._launch.start()
            self.reins.take(process)
            self.has_stalled = False
        except (OSError, BadChecksum) as error:
            log.error("engine could not be started: %s", error)
            self._step(watch.Exited())
            return
        if self._watch.phase in ("stopping", "leaving"):  # it was to end before there was a process to kill
            await children.kill(process)
        assert self._group is not None
        self._group.create_task(self._until_loaded(process), name="engine load")
        code = await process.wait()
        self.reins.drop()
        log.warning("engine ended with code %d", code)
        self._engine.close()
        self._step(watch.Exited())

    async def _until_loaded(self, process: Process) -> None:
        while process.returncode is None:
            if self._launch.socket.exists() and await self._engine.is_healthy(HEALTH_S):
                self.moved()
                self._step(watch.Loaded())
                return
            await asyncio.sleep(HEALTH_POLL_S)

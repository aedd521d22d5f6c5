"""Carries out what the owner gate says: looks ten times a second, and stops or frees the engines before the owner notices."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec.structs import replace

from fallow.adapters.clock import local_minute
from fallow.adapters.owner_record import OwnerRecord, stamp
from fallow.adapters.quiet_cpus import QuietCpus
from fallow.adapters.reins import Reins
from fallow.apps.node.workbook import WorkBook
from fallow.core import owner_gate
from fallow.model.owner import WORKING, Entry, Limits, Senses, Unknown, Verdict
from fallow.ports import Clock

LOOK_S = 0.1
LOOK_IDLE_S = 0.3
"""While no call runs there is nothing that could disturb anybody."""
SAMPLE_MS_MIN = 50
"""A shorter one is a handful of the kernel's ticks, and says nothing."""
PIN_MS = 2_000
"""How often the quietest cores are chosen anew."""
REFRESH_S = 2.0
"""What changes slowly or costs more to read: memory, battery, temperature, the desktop."""

log = logging.getLogger("fallow.owner")


class Sensing(Protocol):
    """What the machine tells."""

    async def refresh(self) -> None: ...

    def others_cores(self) -> float | Unknown: ...

    @property
    def own_cpu_s(self) -> float: ...

    def senses(self, *, others_cores: float | Unknown, minute: int, uploaded_today_bytes: int, paused_until_ms: int | None) -> Senses: ...


class Engines(Protocol):
    """The engines in the gatekeeper's hand; `threads` is how many the largest of them has."""

    @property
    def threads(self) -> int: ...

    def reins(self) -> Iterable[Reins]: ...

    def free(self) -> None:
        """End them: their memory is needed."""

    def fetch_back(self) -> bool:
        """Load what was there before; False if that must wait until the old one has ended."""

    @property
    def are_loading(self) -> bool: ...


class Gatekeeper:
    """`tell(verdict, drops)` hears of every new state, after the engines obeyed it; `is_idle` says whether no call runs.

    `looked` is set once the gate knows more than nothing.
    """

    def __init__(self, sensing: Sensing, limits: Limits, engines: Engines, record: OwnerRecord, work: WorkBook, clock: Clock) -> None:
        self.limits = limits
        self._sensing = sensing
        self._engines = engines
        self._record = record
        self._work = work
        self._clock = clock
        self._quiet_cpus = QuietCpus()
        self._gate = owner_gate.start(clock.now_ms())
        self._is_held = False
        self._is_freed = False
        self._is_owed = False
        self._pinned_at_ms = 0
        self._episode: Entry | None = None
        self._episode_at_ms = clock.now_ms()
        self.looked = asyncio.Event()
        self.closed = asyncio.Event()
        """Set while the machine may not work."""
        self._used_cpu_s = 0.0
        self._sampled_at_ms = 0
        self._others_cores: float | Unknown = 0.0
        self._cores = 1
        self._metered_at_ms = clock.now_ms()
        self._usd_per_kwh = limits.usd_per_kwh
        self.power_costs: Callable[[float], None] = lambda usd_per_kwh: None
        self.tell: Callable[[Verdict, bool], None] = lambda verdict, drops: None
        self.is_idle: Callable[[], bool] = lambda: True

    @property
    def verdict(self) -> Verdict:
        return self._gate.verdict

    def fetch_back_later(self) -> None:
        """There is something to be loaded as soon as the machine may work."""
        self._is_owed = True

    async def run(self) -> None:
        """Until cancelled; engines that were stopped go on then, so that they can end."""
        refreshed_at = -REFRESH_S
        loop = asyncio.get_running_loop()
        refreshing: asyncio.Task[None] | None = None
        try:
            await self._slowly()
            while True:
                if loop.time() - refreshed_at >= REFRESH_S and (refreshing is None or refreshing.done()):
                    refreshed_at = loop.time()
                    self._meter()
                    refreshing = asyncio.create_task(self._slowly(), name="senses")
                self.look()
                await asyncio.sleep(LOOK_IDLE_S if self.is_idle() and not self._is_held else LOOK_S)
        finally:
            if refreshing is not None:
                refreshing.cancel()
            for reins in self._engines.reins():
                reins.go_on()
            self._meter()
            self._work.keep()

    async def _slowly(self) -> None:
        """What takes time, or may hang: it must never keep a look waiting."""
        await self._sensing.refresh()
        if self._work.is_due():
            await asyncio.to_thread(self._work.keep)

    def look(self) -> None:
        """One look, and what follows from it."""
        now, wall = self._clock.now_ms(), self._clock.wall_ms()
        senses = self._sensing.senses(
            others_cores=self._others(now),
            minute=local_minute(wall),
            uploaded_today_bytes=self._work.today().uploaded_bytes,
            paused_until_ms=self._paused_until(now, wall),
        )
        self._cores = senses.cores
        if self._engines.are_loading:
            senses = replace(senses, io_pressure=None)  # that is we ourselves, reading weights
        before = self.verdict
        self._gate = owner_gate.step(self._gate, senses, self.limits, now_ms=now)
        if self.verdict.state in WORKING:
            self._let_work(before)
        else:
            self._hold_back(before)
        self._note(before, now, wall)
        self.looked.set()

    def _let_work(self, before: Verdict) -> None:
        after = self.verdict
        self.closed.clear()
        if self._is_held:
            for reins in self._engines.reins():
                reins.go_on()
        self._is_owed |= self._is_freed
        self._is_held = self._is_freed = False
        if self._is_owed:
            self._is_owed = not self._engines.fetch_back()
        self._pin(before, after)
        if after.state != before.state:
            self.tell(after, False)

    def _hold_back(self, before: Verdict) -> None:
        """First the engines, then the word: the owner shouldn't wait for a network."""
        after = self.verdict
        self.closed.set()
        may_end = after.grace_ms > 0 and not self.is_idle()
        stops = not self._is_held and not may_end
        if stops:
            self._is_held = True
            for reins in self._engines.reins():
                reins.stop()
        if after.state == "leave" and not self._is_freed:
            self._is_freed = True
            self._engines.free()
        if stops or after.state != before.state:
            self.tell(after, stops)
        if before.state in WORKING:
            self._work.pause_began()

    def _note(self, before: Verdict, now: int, wall: int) -> None:
        """What is over goes into the owner's log: all the time that it worked, or did not for one reason, is one entry.

        The quiet period belongs to what came before it: work that comes and goes would fill the log otherwise.
        """
        after, known = self.verdict, self._episode
        if (before.state, before.reason) != (after.state, after.reason):
            log.info("%s: %s (%s)", after.state, after.reason, after.detail)
        works = after.state in WORKING
        if known is not None and (known.state == "run" if works else known.reason == after.reason or after.reason == "settling"):
            return
        if known is not None:
            self._record.note(replace(known, lasted_ms=now - self._episode_at_ms))
        self._episode_at_ms = now
        self._episode = Entry(
            at=stamp(wall),
            state="run" if works else after.state,
            reason="clear" if works else after.reason,
            detail="all limits are kept" if works else after.detail,
            lasted_ms=0,
        )

    def _others(self, now: int) -> float | Unknown:
        """A new sample; but what a look between two samples sees must not count as a second one over the limit."""
        if now - self._sampled_at_ms >= SAMPLE_MS_MIN:
            self._sampled_at_ms = now
            self._others_cores = self._sensing.others_cores()
            return self._others_cores
        share = self.limits.others_share_max
        if share is None or isinstance(self._others_cores, Unknown):
            return self._others_cores
        return min(self._others_cores, share * self._cores)

    def _meter(self) -> None:
        """What we used since the last time."""
        used = self._sensing.own_cpu_s
        usd_per_kwh = owner_gate.usd_per_kwh_now(self.limits, local_minute(self._clock.wall_ms()))
        if usd_per_kwh != self._usd_per_kwh:
            self._usd_per_kwh = usd_per_kwh
            self.power_costs(usd_per_kwh)
        self._work.burned(max(0.0, used - self._used_cpu_s), usd_per_kwh)
        self._used_cpu_s = used
        now = self._clock.now_ms()
        if self.verdict.state not in WORKING:
            self._work.stayed_paused(now - self._metered_at_ms)
        self._metered_at_ms = now

    def _pin(self, before: Verdict, after: Verdict) -> None:
        """Under SCHED_IDLE a team with one starved thread crawls: keep it off the cores that others use."""
        now = self._clock.now_ms()
        if after.cores == before.cores and (after.cores >= self._engines.threads or now - self._pinned_at_ms < PIN_MS):
            return
        self._pinned_at_ms = now
        cpus = self._quiet_cpus.choose(after.cores) if after.cores < self._engines.threads else None
        for reins in self._engines.reins():
            reins.keep_to(cpus)

    def _paused_until(self, now: int, wall: int) -> int | None:
        until = self._record.paused_until_wall_ms
        return None if until is None else now + (until - wall)

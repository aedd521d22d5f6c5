"""What this machine did today, for its owner: calls, tokens, bytes sent, and the electricity of it."""

from collections.abc import Callable

from msgspec.structs import replace

from fallow.adapters.clock import local_day
from fallow.adapters.owner_record import OwnerRecord
from fallow.core.power import JOULES_PER_KWH
from fallow.model.owner import Work
from fallow.model.receipt import Usage
from fallow.ports import Clock

KEEP_MS = 30_000


class WorkBook:
    """Counts in memory, and writes now and then. `watts(cores)` is what that many busy cores draw beyond idling."""

    def __init__(self, record: OwnerRecord, clock: Clock, watts: Callable[[float], float]) -> None:
        self._record = record
        self._clock = clock
        self._watts = watts
        self._work = record.work(local_day(clock.wall_ms()))
        self._kept_at_ms = clock.now_ms()

    def today(self) -> Work:
        """A new day begins at local midnight."""
        day = local_day(self._clock.wall_ms())
        if self._work.day != day:
            self._work = Work(day=day)
        return self._work

    def did(self, usage: Usage | None, uploaded_bytes: int) -> None:
        """One call, whole or not."""
        work, usage = self.today(), usage or Usage()
        self._work = replace(
            work,
            calls=work.calls + 1,
            prompt_tokens=work.prompt_tokens + usage.prompt_tokens,
            output_tokens=work.output_tokens + usage.output_tokens,
            uploaded_bytes=work.uploaded_bytes + uploaded_bytes,
        )

    def pause_began(self) -> None:
        work = self.today()
        self._work = replace(work, pauses=work.pauses + 1)

    def stayed_paused(self, lasted_ms: int) -> None:
        """So much longer."""
        work = self.today()
        self._work = replace(work, paused_ms=work.paused_ms + lasted_ms)

    def burned(self, cpu_s: float, usd_per_kwh: float) -> None:
        """The engines used so many core-seconds more."""
        work = self.today()
        watt_s = self._watts(1.0) * cpu_s
        self._work = replace(
            work, cpu_s=work.cpu_s + cpu_s, watt_s=work.watt_s + watt_s, usd=work.usd + watt_s / JOULES_PER_KWH * usd_per_kwh
        )

    def is_due(self) -> bool:
        """Whether it is time to write it down."""
        return self._clock.now_ms() - self._kept_at_ms >= KEEP_MS

    def keep(self) -> None:
        """Write it down, which may take as long as the disk does."""
        self._kept_at_ms = self._clock.now_ms()
        self._record.keep_work(self.today())

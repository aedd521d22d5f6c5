"""All senses of the machine together, as the owner gate wants them: one fast reading, the rest every few seconds."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from fallow.adapters.senses.cpu import OthersCpu
from fallow.adapters.senses.desktop import Desktop, DesktopSenses
from fallow.adapters.senses.heat import temperature_c
from fallow.adapters.senses.kernel_files import PROC, SYS
from fallow.adapters.senses.power import battery
from fallow.adapters.senses.room import ProgramWatch, disk_free_bytes, memory_free_share, pressure
from fallow.model.errors import leaf
from fallow.model.owner import Battery, Senses, Unknown

READ_TIMEOUT_S = 2.0
"""How long the slow readings may take together; a disk that is gone, or firmware, may hold them up."""
_UNREAD = Unknown("not read yet")


class _Slow(msgspec.Struct, frozen=True, kw_only=True):
    """What is read from files that may block."""

    memory_free_share: float | Unknown
    memory_pressure: float | Unknown | None
    io_pressure: float | Unknown | None
    battery: Battery | Unknown | None
    temperature_c: float | Unknown | None
    disk_free_bytes: int | Unknown
    programs: frozenset[str] = frozenset()


def _none_read(why: Unknown) -> _Slow:
    return _Slow(memory_free_share=why, memory_pressure=why, io_pressure=why, battery=why, temperature_c=why, disk_free_bytes=why)


class MachineSenses:
    """Senses the owner's machine. `roots` are the processes whose trees are our own work.

    `disk_folder` is where we write, `programs` gives the owner's list as it stands. The buses' addresses come from the
    environment, an empty one means that there is none; `has_display` is set if the environment names a display.
    """

    def __init__(
        self,
        *,
        roots: Sequence[int],
        disk_folder: Path,
        programs: Callable[[], tuple[str, ...]],
        session_bus: str,
        system_bus: str,
        has_display: bool,
        proc: Path = PROC,
        sysfs: Path = SYS,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        allowed = frozenset(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
        every = psutil.cpu_count() or 1
        self._cores = every if allowed is None else len(allowed)
        self._cpu = OthersCpu(roots, proc=proc, cpus=None if self._cores == every else allowed)
        self._disk_folder = disk_folder
        self._programs = programs
        self._proc = proc
        self._sysfs = sysfs
        self._read_timeout_s = read_timeout_s
        self._watch = ProgramWatch(proc)
        self._desktop = Desktop(session_bus=session_bus, system_bus=system_bus, has_display=has_display)
        self._reading: asyncio.Future[_Slow] | None = None
        self._slow = _none_read(_UNREAD)
        self._told = DesktopSenses(input_idle_s=_UNREAD, fullscreen=_UNREAD, metered=_UNREAD)

    def others_cores(self) -> float | Unknown:
        """The fast reading: see OthersCpu."""
        return self._cpu.sample()

    @property
    def own_cpu_s(self) -> float:
        """Core-seconds that our processes used since we began to look."""
        return self._cpu.own_s

    async def refresh(self) -> None:
        """Read everything else, in some milliseconds unless something hangs. Not to be called twice at a time."""
        try:
            async with asyncio.TaskGroup() as group:
                desktop = group.create_task(self._desktop.read())
                slow = group.create_task(self._refresh_slow())
        except Exception as error:  # noqa: BLE001  (old readings must not stay in force because a new one broke)
            why = Unknown(f"reading it broke: {type(leaf(error)).__name__}")
            self._slow, self._told = _none_read(why), DesktopSenses(input_idle_s=why, fullscreen=why, metered=why)
            return
        self._told, self._slow = desktop.result(), slow.result()

    def senses(self, *, others_cores: float | Unknown, minute: int, uploaded_today_bytes: int, paused_until_ms: int | None) -> Senses:
        """What is known now: the given, and what the last refresh found."""
        return Senses(
            cores=self._cores,
            others_cores=others_cores,
            memory_free_share=self._slow.memory_free_share,
            memory_pressure=self._slow.memory_pressure,
            io_pressure=self._slow.io_pressure,
            battery=self._slow.battery,
            temperature_c=self._slow.temperature_c,
            disk_free_bytes=self._slow.disk_free_bytes,
            input_idle_s=self._told.input_idle_s,
            fullscreen=self._told.fullscreen,
            metered=self._told.metered,
            programs=self._slow.programs,
            uploaded_today_bytes=uploaded_today_bytes,
            minute=minute,
            paused_until_ms=paused_until_ms,
        )

    async def close(self) -> None:
        self._cpu.close()
        await self._desktop.close()

    async def _refresh_slow(self) -> _Slow:
        """Read in a thread. One that hangs is waited for again next time; no second is started beside it."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read_slow, self._programs())
        done, _ = await asyncio.wait({self._reading}, timeout=self._read_timeout_s)
        if not done:
            return _none_read(Unknown(f"the machine didn't answer within {self._read_timeout_s:g} s"))
        reading, self._reading = self._reading, None
        return reading.result()

    def _read_slow(self, programs: tuple[str, ...]) -> _Slow:
        return _Slow(
            memory_free_share=memory_free_share(self._proc),
            memory_pressure=pressure("memory", self._proc),
            io_pressure=pressure("io", self._proc),
            battery=battery(self._sysfs),
            temperature_c=temperature_c(self._sysfs),
            disk_free_bytes=disk_free_bytes(self._disk_folder),
            programs=self._watch.find(programs),
        )

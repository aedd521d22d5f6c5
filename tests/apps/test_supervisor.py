"""An engine's life, with a small program in llama.cpp's place and a clock that moves when told."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from clocks import FakeClock

from fallow.adapters import children
from fallow.adapters.http_engine import HttpEngine
from fallow.apps.node import supervisor as module
from fallow.apps.node.supervisor import Supervisor
from fallow.core import watch
from fallow.model.errors import BadChecksum

pytestmark = pytest.mark.anyio

WITHIN_S = 5.0
STALL_MS = 10_000
ENGINE = """
import os, socket, sys, time
path, how, flag = sys.argv[1:]
if how == "dies":
    sys.exit(3)
if how == "hangs":
    time.sleep(60)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    status = b"200 OK" if how != "loads" or os.path.exists(flag) else b"503 Service Unavailable"
    connection.sendall(b"HTTP/1.1 " + status + b"\\r\\ncontent-length: 2\\r\\n\\r\\n{}")
    connection.close()
"""


class Launcher:
    """Starts the small program. `how` says what it does; `raises` what its start does."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self.socket = folder / "e.sock"
        self.flag = folder / "loaded"
        self.how = "works"
        self.raises: Exception | None = None
        self.processes: list[Process] = []
        self.tried_at_ms: list[int] = []
        self._clock = clock

    def clean_up(self) -> None:
        self.socket.unlink(missing_ok=True)

    async def start(self) -> Process:
        self.tried_at_ms.append(self._clock.now_ms())
        if self.raises is not None:
            raise self.raises
        self.socket.unlink(missing_ok=True)
        command = [sys.executable, "-I", "-S", "-c", ENGINE, str(self.socket), self.how, str(self.flag)]
        self.processes.append(await children.spawn(command, death_signal=signal.SIGKILL))
        return self.processes[-1]


class Watched:
    """A supervisor that runs, and what it looks after."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.launch = Launcher(folder, self.clock)
        self.engine = HttpEngine(str(self.launch.socket))
        self.supervisor = Supervisor(self.launch, self.engine, self.clock, weights_bytes=2**30, stall_ms=STALL_MS)
        self.task = asyncio.ensure_future(self.supervisor.run())

    async def until(self, said: Callable[[], object], *, what: str = "it") -> None:
        """Poll until `said()` is true; the bound is only there so that a broken build ends."""
        deadline = time.monotonic() + WITHIN_S
        while not said():
            assert not self.task.done(), "the supervisor ended"
            assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
            await asyncio.sleep(0.002)

    async def ready(self) -> None:
        assert await self.supervisor.ready(WITHIN_S)

    async def ticks(self) -> None:
        """Long enough for several looks at the engine."""
        await asyncio.sleep(0.03)
        assert not self.task.done()

    async def died(self, count: int) -> None:
        """So many engines have ended, and the supervisor knows."""
        await self.until(lambda: sum(p.returncode is not None for p in self.launch.processes) == count, what=f"{count} ends")
        await self.ticks()

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(module, "TICK_S", 0.003)
    monkeypatch.setattr(module, "HEALTH_POLL_S", 0.003)
    one = Watched(tmp_path)
    await asyncio.sleep(0)
    yield one
    await one.end()
    for process in one.launch.processes:
        await children.kill(process)


# starting
async def test_nothing_is_started_before_somebody_wants_it(watched: Watched) -> None:
    await watched.ticks()
    assert watched.launch.tried_at_ms == []
    assert watched.supervisor.readiness() == "cold"
    assert watched.supervisor.progress() is None
    assert watched.supervisor.ready_in_ms() == watch.load_guess_ms(2**30)


async def test_an_engine_that_is_wanted_is_started_once(watched: Watched) -> None:
    assert await asyncio.gather(*(watched.supervisor.ready(WITHIN_S) for _ in range(5))) == [True] * 5
    watched.supervisor.want()
    await watched.ticks()
    assert len(watched.launch.processes) == 1
    assert watched.supervisor.readiness() == "ready"
    assert watched.supervisor.ready_in_ms() == 0


async def test_an_engine_that_loads_is_waited_for_only_so_long(watched: Watched) -> None:
    watched.launch.how = "loads"
    assert not await watched.supervisor.ready(0.02)
    await watched.until(watched.launch.socket.exists)
    await watched.ticks()
    assert watched.supervisor.readiness() == "loading", "it answers, but that it isn't ready"
    before = watched.supervisor.progress()
    watched.clock.advance(2_000)
    after = watched.supervisor.progress()
    assert before is not None
    assert after is not None
    assert 0 <= before < after < 1
    watched.launch.flag.touch()
    await watched.ready()
    assert watched.supervisor.progress() is None


async def test_loading_is_predicted_by_how_long_it_took(watched: Watched) -> None:
    watched.launch.how = "loads"
    watched.supervisor.want()
    await watched.until(lambda: watched.launch.processes)
    watched.clock.advance(7_000)
    watched.launch.flag.touch()
    await watched.ready()
    watched.launch.processes[0].kill()
    await watched.until(lambda: watched.supervisor.readiness() != "ready")
    assert watched.supervisor.ready_in_ms() == watch.BACK_OFF_MS_MIN + 7_000


async def test_an_engine_that_never_loads_is_killed_and_tried_again(watched: Watched) -> None:
    watched.launch.how = "hangs"
    watched.supervisor.want()
    await watched.until(lambda: watched.launch.processes)
    watched.clock.advance(watch.LOAD_MS_BASE + watch.LOAD_MS_PER_GIB)
    await watched.ticks()
    assert watched.launch.processes[0].returncode is None, "it has that long"
    watched.clock.advance(1)
    await watched.died(1)
    watched.launch.how = "works"
    watched.clock.advance(watch.BACK_OFF_MS_MIN)
    await watched.ready()
    assert not watched.supervisor.has_stalled, "it wasn't a call that stalled"


# dying
async def test_an_engine_that_is_killed_comes_back_after_a_moment(watched: Watched) -> None:
    await watched.ready()
    os.kill(watched.launch.processes[0].pid, signal.SIGKILL)
    await watched.died(1)
    assert watched.supervisor.readiness() == "loading"
    watched.clock.advance(watch.BACK_OFF_MS_MIN - 1)
    await watched.ticks()
    assert len(watched.launch.tried_at_ms) == 1, "not before its time"
    watched.clock.advance(1)
    await watched.ready()
    assert len(watched.launch.processes) == 2


async def test_an_engine_that_keeps_dying_is_tried_less_and_less(watched: Watched) -> None:
    watched.launch.how = "dies"
    watched.supervisor.want()
    for count in range(1, watch.GIVE_UP_FAULTS + 1):
        await watched.died(count)
        assert len(watched.launch.tried_at_ms) == count
        expected = "failed" if count >= watch.GIVE_UP_FAULTS else "loading"
        assert watched.supervisor.readiness() == expected
        watched.clock.advance(min(watch.BACK_OFF_MS_MAX, watch.BACK_OFF_MS_MIN * 2 ** (count - 1)))
    await watched.until(lambda: len(watched.launch.tried_at_ms) == watch.GIVE_UP_FAULTS + 1)
    waits = [after - before for before, after in zip(watched.launch.tried_at_ms, watched.launch.tried_at_ms[1:], strict=False)]
    assert waits == [500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000]
    watched.launch.how = "works"
    await watched.died(watch.GIVE_UP_FAULTS + 1)
    watched.clock.advance(watch.BACK_OFF_MS_MAX)
    await watched.ready()


@pytest.mark.parametrize("error", [OSError("no memory"), BadChecksum("changed on disk")])
async def test_a_start_that_fails_is_tried_again(watched: Watched, error: Exception) -> None:
    watched.launch.raises = error
    assert not await watched.supervisor.ready(0.02)
    assert watched.supervisor.readiness() == "loading"
    watched.launch.raises = None
    watched.clock.advance(watch.BACK_OFF_MS_MIN)
    await watched.ready()


# stalling
async def test_an_engine_that_makes_no_progress_is_killed_and_comes_back(watched: Watched) -> None:
    await watched.ready()
    watched.supervisor.running = 1
    watched.supervisor.moved()
    watched.clock.advance(STALL_MS)
    await watched.ticks()
    assert watched.supervisor.readiness() == "ready"
    watched.clock.advance(1)
    await watched.died(1)
    assert watched.supervisor.has_stalled
    watched.supervisor.running = 0
    watched.clock.advance(watch.BACK_OFF_MS_MIN)
    await watched.ready()
    assert not watched.supervisor.has_stalled
    assert len(watched.launch.processes) == 2


async def test_an_engine_that_hears_no_signal_is_killed_when_it_stalls(watched: Watched) -> None:
    await watched.ready()
    os.kill(watched.launch.processes[0].pid, signal.SIGSTOP)
    watched.supervisor.running = 1
    watched.supervisor.moved()
    watched.clock.advance(STALL_MS + 1)
    await watched.until(lambda: watched.launch.processes[0].returncode == -signal.SIGKILL)


async def test_an_engine_that_moves_or_rests_is_left_alone(watched: Watched) -> None:
    await watched.ready()
    watched.supervisor.running = 2
    for _ in range(4):
        watched.supervisor.moved()
        watched.clock.advance(STALL_MS - 1)
        await watched.ticks()
    watched.supervisor.running = 0
    watched.clock.advance(10 * STALL_MS)
    await watched.ticks()
    watched.supervisor.running = 1
    watched.supervisor.moved()
    await watched.ticks()
    assert watched.supervisor.readiness() == "ready"
    assert len(watched.launch.processes) == 1


# held by the owner
async def test_an_engine_that_the_owner_stopped_neither_stalls_nor_is_killed(watched: Watched) -> None:
    await watched.ready()
    watched.supervisor.running = 1
    watched.supervisor.moved()
    watched.supervisor.reins.stop()
    await watched.ticks()
    watched.clock.advance(10 * STALL_MS)
    await watched.ticks()
    watched.supervisor.reins.go_on()
    await watched.ticks()
    assert watched.supervisor.readiness() == "ready"
    watched.clock.advance(STALL_MS + 1)
    await watched.died(1)  # from then on its time counts again


async def test_an_engine_that_was_stopped_while_it_loaded_gets_its_time(watched: Watched) -> None:
    watched.launch.how = "loads"
    watched.supervisor.want()
    await watched.until(lambda: watched.launch.processes)
    watched.supervisor.reins.stop()
    await watched.ticks()
    watched.clock.advance(10 * watch.LOAD_MS_BASE)
    await watched.ticks()
    watched.launch.flag.touch()
    watched.supervisor.reins.go_on()
    await watched.ready()
    assert len(watched.launch.processes) == 1


async def test_the_end_of_an_engine_that_the_owner_stopped(watched: Watched) -> None:
    await watched.ready()
    watched.supervisor.reins.stop()
    await watched.ticks()
    await watched.end()
    assert all(process.returncode is not None for process in watched.launch.processes)


# ending
@pytest.mark.parametrize("how", ["works", "hangs", "dies"])
async def test_the_end_leaves_neither_process_nor_socket(watched: Watched, how: str) -> None:
    watched.launch.how = how
    watched.supervisor.want()
    if how == "works":
        await watched.ready()
        assert watched.launch.socket.exists()
    await watched.until(lambda: watched.launch.processes)
    if how == "dies":
        await watched.died(1)
    await watched.end()
    assert watched.task.cancelled()
    assert all(process.returncode is not None for process in watched.launch.processes)
    assert not watched.launch.socket.exists()

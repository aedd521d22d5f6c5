"""Real processes held, let go and kept to some cores, with a child of their own as bubblewrap has."""

import asyncio
import os
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from clocks import FakeClock

from fallow.adapters import children
from fallow.adapters.quiet_cpus import QuietCpus
from fallow.adapters.reins import Reins

pytestmark = pytest.mark.anyio

WITHIN_S = 20.0
FAMILY = """
import subprocess, sys, threading, time
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", sys.argv[1]])
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
time.sleep(60)
"""


async def until(said: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.01)


def family(process: Process) -> list[psutil.Process]:
    me = psutil.Process(process.pid)
    return [me, *me.children(recursive=True)]


def states(process: Process) -> set[str]:
    return {one.status() for one in family(process)}


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    started = await children.spawn([sys.executable, "-I", "-S", "-c", FAMILY, FAMILY])
    await until(lambda: len(family(started)) == 2 and all(one.num_threads() == 2 for one in family(started)), "the child")
    try:
        yield started
    finally:
        await children.kill(started)


async def test_the_whole_group_stops_and_goes_on(process: Process) -> None:
    reins = Reins(FakeClock(), lambda stopped_ms: None)
    reins.take(process)
    reins.stop()
    await until(lambda: states(process) == {psutil.STATUS_STOPPED}, "the stop")
    reins.go_on()
    await until(lambda: psutil.STATUS_STOPPED not in states(process), "going on")


async def test_it_says_for_how_long_it_was_stopped() -> None:
    told: list[int] = []
    clock = FakeClock()
    reins = Reins(clock, told.append)
    reins.go_on()
    assert told == []
    reins.stop()
    clock.ms += 400
    reins.stop()
    clock.ms += 100
    reins.go_on()
    assert told == [500]


async def test_an_engine_that_starts_while_held_is_held(process: Process) -> None:
    reins = Reins(FakeClock(), lambda stopped_ms: None)
    reins.stop()
    reins.take(process)
    await until(lambda: states(process) == {psutil.STATUS_STOPPED}, "the stop")


async def test_a_held_engine_can_be_killed(process: Process) -> None:
    reins = Reins(FakeClock(), lambda stopped_ms: None)
    reins.take(process)
    reins.stop()
    members = family(process)
    await children.kill(process)
    await until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in members), "the end")
    reins.go_on()
    reins.keep_to({0})
    reins.stop()  # nothing is there any more, and that is no fault


async def test_every_thread_is_kept_to_the_cores(process: Process) -> None:
    reins = Reins(FakeClock(), lambda stopped_ms: None)
    reins.take(process)
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    reins.keep_to(one)
    threads = [int(name) for member in family(process) for name in os.listdir(f"/proc/{member.pid}/task")]
    assert len(threads) == 4
    assert all(os.sched_getaffinity(thread) == one for thread in threads)
    reins.keep_to(None)
    assert all(os.sched_getaffinity(thread) == allowed for thread in threads)


async def test_an_engine_that_starts_while_others_are_busy_is_kept_too(process: Process) -> None:
    reins = Reins(FakeClock(), lambda stopped_ms: None)
    one = {min(os.sched_getaffinity(0))}
    reins.keep_to(one)
    reins.take(process)
    assert all(os.sched_getaffinity(member.pid) == one for member in family(process))


STAT = """cpu  0 0 0 0 0 0 0 0 0 0
cpu0 {0} 900 10 5 0 0 0 0 0 0
cpu1 {1} 0 10 5 0 0 0 0 0 0
intr 1
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one CPU to choose from")
def test_the_quiet_cpus_are_those_that_others_leave_alone(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    first, second = sorted(os.sched_getaffinity(0))[:2]
    names = {"cpu0": f"cpu{first}", "cpu1": f"cpu{second}"}

    def write(*busy: int) -> None:
        text = STAT.format(*busy)
        stat.write_text(text.replace("cpu0 ", names["cpu0"] + " ").replace("cpu1 ", names["cpu1"] + " "))

    quiet = QuietCpus(stat)
    write(100, 100)
    quiet.choose(1)
    write(150, 101)
    chosen = quiet.choose(1)
    assert chosen is not None
    assert first not in chosen
    write(151, 201)
    assert second not in (quiet.choose(1) or {second})
    stat.write_text("damaged")
    assert quiet.choose(1) is None or quiet.choose(1), "a damaged file is no fault"

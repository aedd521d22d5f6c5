"""Child processes: they end when told, are killed when they don't, and never outlive us, whichever way the system has for that."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fallow.adapters import children, tether

pytestmark = pytest.mark.anyio

WITHIN_S = 20.0
TETHER = str(Path(tether.__file__))
PARENT = """
import asyncio, signal, sys
from fallow.adapters import children, tether

async def main():
    tether.__file__ = sys.argv[3] or tether.__file__
    process = await children.spawn(["sh", "-c", sys.argv[1]], death_signal=signal.Signals(int(sys.argv[2])))
    await process.wait()

asyncio.run(main())
"""
ELSEWHERE = f"""
import ctypes, runpy, subprocess, sys
sys.platform = "elsewhere"
sys.argv[0] = {TETHER!r}
runpy.run_path({TETHER!r}, run_name="__main__")
"""
"""The tether on a system that has no prctl."""


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_sync(said: Callable[[], object], *, what: str = "it") -> None:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
        time.sleep(0.005)


async def until(said: Callable[[], object], *, what: str = "it") -> None:
    """The same without holding up the loop."""
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
        await asyncio.sleep(0.005)


class Child:
    """A shell command that writes its pid when it is set up, and sleeps."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "pid"
        self.sleeper = f"echo $$ > {self._file}.new; mv {self._file}.new {self._file}; exec sleep 60"
        self.deaf = f"trap '' TERM; {self.sleeper}"

    def is_up(self) -> bool:
        return self._file.exists()

    @property
    def pid(self) -> int:
        return int(self._file.read_text())


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    one = Child(tmp_path)
    yield one
    if one.is_up() and not is_gone(one.pid):
        os.kill(one.pid, signal.SIGKILL)


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    """A file that is the tether as other systems run it."""
    path = tmp_path / "elsewhere.py"
    path.write_text(ELSEWHERE)
    return str(path)


# our end is theirs
def kill_parent(child: Child, command: str, number: signal.Signals, tether_file: str) -> None:
    """Start a parent with a child, and kill the parent without a word."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, command, str(int(number)), tether_file])
    try:
        until_sync(child.is_up, what="the child's start")
        assert not is_gone(child.pid)
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_dies_with_a_parent_that_is_killed(child: Child) -> None:
    kill_parent(child, child.sleeper, signal.SIGTERM, "")
    until_sync(lambda: is_gone(child.pid), what="the child's end")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_deaf_child_dies_with_its_parent_if_the_signal_is_a_kill(child: Child) -> None:
    kill_parent(child, child.deaf, signal.SIGKILL, "")
    until_sync(lambda: is_gone(child.pid), what="the child's end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_dies_with_its_parent_elsewhere_too(child: Child, elsewhere: str, number: signal.Signals) -> None:
    kill_parent(child, child.sleeper if number == signal.SIGTERM else child.deaf, number, elsewhere)
    until_sync(lambda: is_gone(child.pid), what="the child's end")


def test_nothing_is_started_for_a_parent_that_is_dead_already(tmp_path: Path) -> None:
    stranger = str(os.getpid() + 1)
    ended = subprocess.run([sys.executable, "-I", "-S", TETHER, stranger, "15", "--", "touch", str(tmp_path / "ran")], timeout=WITHIN_S)
    assert ended.returncode == 1
    assert not (tmp_path / "ran").exists()


# starting
@pytest.fixture(params=["here", "elsewhere"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> str:
    """With prctl and without."""
    if request.param == "elsewhere":
        monkeypatch.setattr(tether, "__file__", elsewhere)
    return str(request.param)


async def test_a_child_gets_its_arguments_and_environment_and_says_how_it_ended(either: str) -> None:
    process = await children.spawn(
        ["sh", "-c", 'echo "$1 $WORD"; exit 7', "sh", "a b"], environment={"WORD": "w", "PATH": "/usr/bin:/bin"}, stdout=PIPE
    )
    said, _ = await process.communicate()
    assert said == b"a b w\n"
    assert process.returncode == 7


async def test_a_child_has_a_session_of_its_own(child: Child, either: str) -> None:
    """Ctrl-C at the terminal reaches only us; we end our children in order."""
    process = await children.spawn(["sh", "-c", child.sleeper])
    await until(child.is_up)
    assert os.getsid(child.pid) == process.pid != os.getsid(0)
    await children.end(process)


async def test_open_files_can_be_passed_on(either: str) -> None:
    """`fallow up` hears of its parts through a pipe."""
    reader, writer = os.pipe()
    try:
        process = await children.spawn([sys.executable, "-c", f"import os; os.write({writer}, b'hello')"], pass_fds=[writer])
        os.close(writer)
        assert await process.wait() == 0
        assert os.read(reader, 100) == b"hello"
    finally:
        os.close(reader)


async def test_a_control_group_that_can_not_be_entered_stops_nobody(either: str, tmp_path: Path) -> None:
    """Its bounds are a second line. That one which can be is entered is tried in test_cgroup."""
    process = await children.spawn(["sh", "-c", "exit 7"], cgroup=tmp_path / "absent" / "cgroup.procs")
    assert await process.wait() == 7


async def test_a_command_that_is_not_there_ends_at_once(either: str) -> None:
    process = await children.spawn(["/no/such/command"])
    assert await asyncio.wait_for(process.wait(), WITHIN_S) != 0


# ending
async def test_a_child_that_is_asked_to_end_does(child: Child, either: str) -> None:
    process = await children.spawn(["sh", "-c", child.sleeper])
    await until(child.is_up)
    began = time.monotonic()
    await children.end(process)
    assert time.monotonic() - began < children.TERM_S, "it wasn't waited for until the kill"
    assert process.returncode is not None
    assert is_gone(child.pid)


async def test_a_child_that_does_not_listen_is_killed(child: Child) -> None:
    process = await children.spawn(["sh", "-c", child.deaf])
    await until(child.is_up)
    began = time.monotonic()
    await children.end(process, within_s=0.1)
    assert 0.1 <= time.monotonic() - began < WITHIN_S
    assert process.returncode == -signal.SIGKILL
    assert is_gone(child.pid)


async def test_a_child_that_is_stopped_ends_too(child: Child) -> None:
    process = await children.spawn(["sh", "-c", child.sleeper])
    await until(child.is_up)
    os.kill(child.pid, signal.SIGSTOP)
    await until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    await children.end(process)
    assert process.returncode == -signal.SIGTERM
    assert is_gone(child.pid)


async def test_a_child_that_has_ended_can_be_ended_again() -> None:
    process = await children.spawn(["true"])
    await process.wait()
    await children.end(process)
    await children.kill(process)
    assert process.returncode == 0


async def test_a_kill_is_at_once(child: Child) -> None:
    process = await children.spawn(["sh", "-c", child.deaf])
    await until(child.is_up)
    await children.kill(process)
    assert process.returncode == -signal.SIGKILL
    assert is_gone(child.pid)


@pytest.mark.parametrize("how", ["kill", "end"])
async def test_a_deaf_child_is_killed_elsewhere_too(child: Child, elsewhere: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(tether, "__file__", elsewhere)
    process = await children.spawn(["sh", "-c", child.deaf], death_signal=signal.SIGKILL)
    await until(child.is_up)
    if how == "kill":
        await children.kill(process)
    else:
        await children.end(process, within_s=0.1)
    deadline = time.monotonic() + 2 * tether.POLL_S
    while not is_gone(child.pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)

"""The broker as a child process: which nats-server is taken, and how it starts, fails and ends."""

import asyncio
import os
import signal
import socket
import stat
import time
from pathlib import Path

import psutil
import pytest
from trusted import OpenGround

from fallow.adapters import broker, children
from fallow.adapters.broker import find_server, start_broker, version_of
from fallow.adapters.nats_bus import NatsBus
from fallow.model.errors import MissingExtra, StartFailed

pytestmark = pytest.mark.anyio

HERE = "127.0.0.1"
GROUND = OpenGround()


def fake_server(folder: Path, says: str) -> Path:
    """A program called nats-server that only tells its version."""
    folder.mkdir(exist_ok=True)
    path = folder / "nats-server"
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the package's own nats-server is looked for."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    monkeypatch.setattr("fallow.adapters.broker.sysconfig.get_path", lambda name: str(folder))
    return folder


def pid_of(folder: Path) -> int:
    """The broker that runs on this folder."""
    return next(p.pid for p in psutil.Process().children() if str(folder) in " ".join(p.cmdline()))


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


# which one
@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("echo 'nats-server: v2.15.1'", (2, 15, 1)),
        ("echo 'nats-server: v10.0.3-beta.2'", (10, 0, 3)),
        ("echo nothing of the kind", None),
        ("echo 'nats-server: v2.15.1'; exit 3", None),
        ("kill -9 $$", None),
    ],
)
def test_versions_are_read(tmp_path: Path, says: str, version: tuple[int, ...] | None) -> None:
    assert version_of(fake_server(tmp_path / "bin", says)) == version


def test_a_program_that_is_not_there_or_can_not_run_has_no_version(tmp_path: Path) -> None:
    assert version_of(tmp_path / "nothing") is None
    (tmp_path / "text").write_text("nats-server: v2.15.1")
    assert version_of(tmp_path / "text") is None


def test_a_program_that_does_not_answer_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "VERSION_S", 0.1)
    assert version_of(fake_server(tmp_path / "bin", "exec sleep 30")) is None


def test_the_one_on_the_path_comes_first(tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(packaged, "echo 'nats-server: v2.15.1'")
    found = fake_server(tmp_path / "bin", "echo 'nats-server: v2.16.0'")
    put_on_path(monkeypatch, tmp_path / "bin")
    assert find_server() == found


@pytest.mark.parametrize("says", ["echo 'nats-server: v2.10.29'", "echo hello", "exit 1"])
def test_one_on_the_path_that_is_too_old_or_broken_is_passed_over(
    tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    ours = fake_server(packaged, "echo 'nats-server: v2.15.1'")
    fake_server(tmp_path / "bin", says)
    put_on_path(monkeypatch, tmp_path / "bin")
    assert find_server() == ours


def test_the_packaged_one_is_found_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: what `pip install 'fallow[hub]'` brings."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    version = version_of(find_server())
    assert version is not None
    assert version >= broker.VERSION_MIN


def test_none_at_all_names_the_extra(tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(monkeypatch, tmp_path / "empty")
    with pytest.raises(MissingExtra) as caught:
        find_server()
    assert "fallow[hub]" in caught.value.message
    assert "\n" not in caught.value.message


def test_only_an_old_one_says_which_and_names_the_extra(tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_server(tmp_path / "bin", "echo 'nats-server: v2.10.29'")
    put_on_path(monkeypatch, tmp_path / "bin")
    with pytest.raises(MissingExtra) as caught:
        find_server()
    assert f"{old} is 2.10.29" in caught.value.message
    assert "fallow[hub]" in caught.value.message
    assert "2.15.1" in caught.value.message


# starting
async def test_a_broker_listens_where_it_says_and_keeps_its_files_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "broker"
    running = await start_broker(folder, host=HERE, port=0, trust=GROUND.trust)
    try:
        host, _, port = running.address.removeprefix("nats://").rpartition(":")
        assert host == HERE
        assert int(port) > 0
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = [folder / "broker.conf", folder / "broker.log", *(folder / "accounts").iterdir()]
        assert len(files) == 2 + len(GROUND.trust.accounts)
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        pid = pid_of(folder)
        bus = NatsBus(running.address, GROUND.member(), "test")
        await bus.connect()
        await bus.close()
    finally:
        await running.stop()
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("name", ["with space, comma # and {brace}", 'quo"te', "back\\slash", "$HOME"])
async def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    """Its path stands in the broker's configuration, and is what the user chose."""
    running = await start_broker(tmp_path / name, host=HERE, port=0, trust=GROUND.trust)
    try:
        bus = NatsBus(running.address, GROUND.member(), "test")
        await bus.connect(within_s=1)
        await bus.close()
    finally:
        await running.stop()


async def test_a_broker_starts_again_on_the_same_folder_and_port(tmp_path: Path) -> None:
    """What the one before left behind is no sign of life."""
    first = await start_broker(tmp_path / "broker", host=HERE, port=0, trust=GROUND.trust)
    port = int(first.address.rpartition(":")[2])
    os.kill(pid_of(tmp_path), signal.SIGKILL)
    await first.wait()
    assert list((tmp_path / "broker").glob("*.ports")), "a killed broker leaves its file"
    second = await start_broker(tmp_path / "broker", host=HERE, port=port, trust=GROUND.trust)
    try:
        assert second.address == first.address
        with socket.create_connection((HERE, port)):
            pass
    finally:
        await second.stop()


async def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(StartFailed) as caught:
            await start_broker(tmp_path / "broker", host=HERE, port=port, trust=GROUND.trust)
    assert time.monotonic() - began < broker.START_S / 2, "it isn't waited for"
    assert str(port) in caught.value.message
    assert "in use" in caught.value.message
    assert "\n" not in caught.value.message


async def test_one_that_never_listens_is_given_up_and_killed(tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "START_S", 0.2)
    pid_file = tmp_path / "pid"
    fake_server(packaged, f"if [ $1 = --version ]; then echo v9.0.0; else echo $$ > {pid_file}; exec sleep 60; fi")
    put_on_path(monkeypatch, tmp_path / "empty")
    with pytest.raises(StartFailed, match=r"did not start within 0\.2 s"):
        await start_broker(tmp_path / "broker", host=HERE, port=0, trust=GROUND.trust)
    assert not pid_file.exists() or not psutil.pid_exists(int(pid_file.read_text()))


async def test_a_start_that_is_cancelled_leaves_no_broker(tmp_path: Path, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    fake_server(packaged, f"if [ $1 = --version ]; then echo v9.0.0; else echo $$ > {pid_file}; exec sleep 60; fi")
    put_on_path(monkeypatch, tmp_path / "empty")
    started: list[asyncio.subprocess.Process] = []

    async def spawn(*arguments: object, **options: object) -> asyncio.subprocess.Process:
        started.append(await real(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    real = children.spawn
    monkeypatch.setattr("fallow.adapters.broker.children.spawn", spawn)
    starting = asyncio.ensure_future(start_broker(tmp_path / "broker", host=HERE, port=0, trust=GROUND.trust))
    deadline = time.monotonic() + 5
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    still_there = started[0].returncode is None
    await children.kill(started[0])
    assert not still_there


# ending
async def test_waiting_ends_with_the_broker(tmp_path: Path) -> None:
    running = await start_broker(tmp_path / "broker", host=HERE, port=0, trust=GROUND.trust)
    waiting = asyncio.ensure_future(running.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    os.kill(pid_of(tmp_path), signal.SIGKILL)
    assert await asyncio.wait_for(waiting, 5) == -signal.SIGKILL
    await running.stop()  # of one that is gone already: nothing happens


async def test_stopping_is_quick(tmp_path: Path) -> None:
    running = await start_broker(tmp_path / "broker", host=HERE, port=0, trust=GROUND.trust)
    bus = NatsBus(running.address, GROUND.member(), "test")
    await bus.connect()
    began = time.monotonic()
    await running.stop()
    assert time.monotonic() - began < 1.0, "it ended by itself, before it would be killed"
    await bus.close()

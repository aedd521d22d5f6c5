"""The desktop's senses, over a real D-Bus daemon: each desktop in its own way, and any of them silent, wrong, gone and back."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_desktop import DAEMON, REFUSE, SILENT, Answers, Daemon, daemon, desktop

from fallow.adapters.senses import bus_link
from fallow.adapters.senses.bus_link import BusLink
from fallow.adapters.senses.desktop import Desktop, DesktopSenses
from fallow.model.owner import Unknown

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not DAEMON.exists(), reason=f"NO D-BUS DAEMON: {DAEMON} is missing, so no desktop's sense is tested here"),
]

NEVER_S = 1e6
SHORT_S = 0.05
NOW_S = 1_000.0
MUTTER, MUFFIN = "org.gnome.Mutter.IdleMonitor", "org.cinnamon.Muffin.IdleMonitor"
SAVER, MATE, XFCE, PLASMA = "org.freedesktop.ScreenSaver", "org.mate.ScreenSaver", "org.xfce.ScreenSaver", "org.kde.screensaver"
POLICY = "org.kde.Solid.PowerManagement.PolicyAgent"
GNOME = "org.gnome.SessionManager"
POWER = "org.freedesktop.PowerManagement"
LOGIND = "org.freedesktop.login1"
NETWORK = "org.freedesktop.NetworkManager"

Answer = tuple[str, list[Any]] | str


def monitor(name: str, answer: Answer) -> Answers:
    return {(f"/{name.replace('.', '/')}/Core", name, "GetIdletime"): answer}


def saver(name: str, answer: Answer) -> Answers:
    return {(f"/{name.replace('.', '/')}", name, "GetSessionIdleTime"): answer}


def policy(answer: Answer) -> Answers:
    return {("/org/kde/Solid/PowerManagement/PolicyAgent", POLICY, "HasInhibition"): answer}


def inhibited(answer: Answer) -> Answers:
    return {("/org/gnome/SessionManager", GNOME, "IsInhibited"): answer}


def power(answer: Answer) -> Answers:
    return {("/org/freedesktop/PowerManagement/Inhibit", f"{POWER}.Inhibit", "HasInhibit"): answer}


def metered(answer: Answer) -> Answers:
    return {("/org/freedesktop/NetworkManager", NETWORK, "Metered"): answer}


def logind(*sessions: tuple[str, bool, int]) -> Answers:
    """Sessions by type, idle hint, and since when in microseconds."""
    paths = [f"/org/freedesktop/login1/session/_{number}" for number in range(len(sessions))]
    told: Answers = {
        ("/org/freedesktop/login1", f"{LOGIND}.Manager", "ListSessions"): ("a(susso)", [[["1", 0, "me", "seat0", path] for path in paths]])
    }
    for path, (kind, idle, since_us) in zip(paths, sessions, strict=True):
        told[path, f"{LOGIND}.Session", "Type"] = ("s", [kind])
        told[path, f"{LOGIND}.Session", "IdleHint"] = ("b", [idle])
        told[path, f"{LOGIND}.Session", "IdleSinceHintMonotonic"] = ("t", [since_us])
    return told


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path) as started:
        yield started


def make_desktop(session_bus: str, system_bus: str = "", *, display: bool = True, **more: float) -> Desktop:
    return Desktop(session_bus=session_bus, system_bus=system_bus, has_display=display, monotonic_s=lambda: NOW_S, **more)


async def read_once(session_bus: str, system_bus: str = "", *, display: bool = True, **more: float) -> DesktopSenses:
    asked = make_desktop(session_bus, system_bus, display=display, **more)
    try:
        return await asked.read()
    finally:
        await asked.close()


@pytest.mark.parametrize(
    ("names", "answers", "idle_s", "fullscreen"),
    [
        pytest.param([MUTTER, GNOME], monitor(MUTTER, ("t", [90_500])) | inhibited(("b", [True])), 90.5, True, id="gnome"),
        pytest.param([MUFFIN, GNOME], monitor(MUFFIN, ("t", [0])) | inhibited(("b", [False])), 0.0, False, id="cinnamon"),
        pytest.param([MATE, GNOME], saver(MATE, ("u", [70])) | inhibited(("b", [False])), 70.0, False, id="mate"),
        pytest.param([XFCE, POWER], saver(XFCE, ("u", [70])) | power(("b", [True])), 70.0, True, id="xfce"),
        pytest.param([SAVER, PLASMA, POLICY], saver(SAVER, ("u", [70_000])) | policy(("b", [True])), 70.0, True, id="plasma"),
        pytest.param([SAVER], saver(SAVER, ("u", [70])), 70.0, Unknown, id="the specification's seconds"),
        pytest.param([SAVER, PLASMA], saver(SAVER, REFUSE), Unknown, Unknown, id="plasma on wayland"),
        pytest.param([MUTTER, SAVER], monitor(MUTTER, REFUSE) | saver(SAVER, ("u", [5])), 5.0, Unknown, id="the next one is asked"),
        pytest.param([MUTTER, GNOME], monitor(MUTTER, ("s", ["long"])) | inhibited(("u", [1])), Unknown, Unknown, id="wrong types"),
        pytest.param([MUTTER, GNOME], monitor(MUTTER, ("b", [True])) | inhibited(("s", ["no"])), Unknown, Unknown, id="true is no number"),
        pytest.param([MUTTER, GNOME], monitor(MUTTER, ("", [])) | inhibited(("", [])), Unknown, Unknown, id="empty answers"),
        pytest.param([SAVER], saver(SAVER, ("i", [-1])), Unknown, Unknown, id="less than nothing"),
        pytest.param([], {}, Unknown, Unknown, id="nobody there"),
    ],
)
async def test_each_desktop_in_its_own_way(bus: Daemon, names: list[str], answers: Answers, idle_s: object, fullscreen: object) -> None:
    async with desktop(bus.address, names, answers):
        told = await read_once(bus.address)
    for value, expected in [(told.input_idle_s, idle_s), (told.fullscreen, fullscreen)]:
        assert isinstance(value, Unknown) if expected is Unknown else value == expected and type(value) is type(expected)


async def test_what_is_asked_for(bus: Daemon) -> None:
    async with desktop(bus.address, [POLICY, GNOME], {}) as fake:
        await read_once(bus.address)
    assert ("HasInhibition", [4]) in fake.asked
    assert ("IsInhibited", [8]) in fake.asked


@pytest.mark.parametrize(
    ("sessions", "display", "idle_s"),
    [
        ([("wayland", True, 400_000_000)], False, 600.0),
        ([("x11", False, 400_000_000)], False, 0.0),
        ([("x11", True, 400_000_000), ("wayland", False, 900_000_000), ("tty", True, 1)], False, 0.0),
        ([("x11", True, 2_000_000_000)], False, 0.0),  # a hint from the future
        ([("x11", False, 0)], False, Unknown),  # a desktop that never set its hint
        ([("x11", False, 0), ("x11", True, 400_000_000)], False, Unknown),
        ([("tty", True, 400_000_000)], True, Unknown),
        ([("tty", True, 400_000_000)], False, None),
        ([], False, None),
        ([], True, Unknown),
    ],
)
async def test_logind_where_the_desktop_is_silent(
    bus: Daemon, sessions: list[tuple[str, bool, int]], display: bool, idle_s: object
) -> None:
    async with desktop(bus.address, [LOGIND], logind(*sessions)):
        for session_bus in ("", bus.address):
            told = await read_once(session_bus, bus.address, display=display)
            assert isinstance(told.input_idle_s, Unknown) if idle_s is Unknown else told.input_idle_s == idle_s
            assert told.fullscreen is None if idle_s is None else isinstance(told.fullscreen, Unknown)


@pytest.mark.parametrize("answer", [("s", ["none"]), ("as", [["me"]]), ("a(ss)", [[["a", "b"]]]), REFUSE, SILENT])
async def test_a_logind_that_talks_nonsense(bus: Daemon, answer: Answer) -> None:
    asked: Answers = {("/org/freedesktop/login1", f"{LOGIND}.Manager", "ListSessions"): answer}
    async with desktop(bus.address, [LOGIND], asked):
        told = await read_once("", bus.address, display=False, timeout_s=SHORT_S)
    assert isinstance(told.input_idle_s, Unknown)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (("u", [1]), True),
        (("u", [3]), True),
        (("u", [2]), False),
        (("u", [4]), False),
        (("u", [0]), Unknown),
        (("u", [77]), Unknown),
        (("s", ["yes"]), Unknown),
        (("au", [[1]]), Unknown),
        (REFUSE, Unknown),
    ],
)
async def test_metered(bus: Daemon, answer: Answer, expected: object) -> None:
    async with desktop(bus.address, [NETWORK], metered(answer)):
        told = (await read_once("", bus.address)).metered
    assert isinstance(told, Unknown) if expected is Unknown else told is expected


async def test_nothing_tells_of_a_metered_network_without_network_manager(bus: Daemon) -> None:
    assert (await read_once("", bus.address)).metered is None


@pytest.mark.parametrize("address", ["", "unix:path=/nowhere/at/all"])
async def test_a_machine_without_a_desktop(address: str) -> None:
    nothing = DesktopSenses(input_idle_s=None, fullscreen=None, metered=None)
    assert await read_once(address, address, display=False) == nothing


async def test_a_session_bus_on_which_nobody_tells_and_no_logind_to_ask(bus: Daemon) -> None:
    told = await read_once(bus.address, display=False)
    assert isinstance(told.input_idle_s, Unknown)
    assert isinstance(told.fullscreen, Unknown)


@pytest.mark.parametrize("address", ["nonsense", "unix:", "unix:path", "autolaunch:", "tcp:host=a,port=b", ";", "unix:path=/dev/null"])
async def test_an_address_that_leads_nowhere(address: str) -> None:
    told = await read_once(address, address, display=False)
    for value in (told.input_idle_s, told.fullscreen, told.metered):
        assert isinstance(value, Unknown)


@pytest.mark.parametrize("says", [b"", b"garbage\r\n" * 9, b"REJECTED EXTERNAL\r\n", b"OK 12\r\n\x00\xff\x07", None])
async def test_a_bus_that_is_none(tmp_path: Path, says: bytes | None) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if says is None:
            await reader.read()  # silent until the other gives up
        else:
            writer.write(says)
        writer.close()

    async with await asyncio.start_unix_server(talk, tmp_path / "bus"):
        told = await read_once(f"unix:path={tmp_path / 'bus'}", display=False, timeout_s=SHORT_S)
    assert isinstance(told.input_idle_s, Unknown)


async def test_no_service_is_started(bus: Daemon, tmp_path: Path) -> None:
    """Each name could be started by the bus, and would leave a file."""
    names = (MUTTER, MUFFIN, SAVER, MATE, XFCE, PLASMA, POLICY, GNOME, POWER, LOGIND, NETWORK)
    for name in names:
        (bus.services / f"{name}.service").write_text(f"[D-BUS Service]\nName={name}\nExec=/usr/bin/touch {tmp_path / 'started'}\n")
    bus.stop()
    bus.start()
    told = await read_once(bus.address, bus.address)
    assert isinstance(told.input_idle_s, Unknown)
    assert not (tmp_path / "started").exists()


async def test_a_service_that_hangs_is_left_alone_and_the_others_are_heard(bus: Daemon) -> None:
    answers = monitor(MUTTER, SILENT) | inhibited(("b", [True]))
    async with desktop(bus.address, [MUTTER], answers) as hung, desktop(bus.address, [GNOME], answers):
        asked = make_desktop(bus.address, timeout_s=SHORT_S, retry_s=NEVER_S)
        for _ in range(3):
            told = await asked.read()
            assert isinstance(told.input_idle_s, Unknown)
            assert told.fullscreen is True
        await asked.close()
    assert len(hung.asked) == 1


async def test_questions_without_an_answer_do_not_pile_up(bus: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_link, "UNANSWERED_MAX", 3)
    async with desktop(bus.address, [MUTTER], monitor(MUTTER, SILENT)) as hung:
        link = BusLink(bus.address, timeout_s=0.01, retry_s=0.0)
        for _ in range(7):
            said = await link.call(MUTTER, f"/{MUTTER.replace('.', '/')}/Core", MUTTER, "GetIdletime")
            assert isinstance(said, Unknown)
        await link.close()
    assert len(hung.asked) == 7
    assert len(hung.askers) == 3


async def test_a_desktop_that_leaves_and_comes_back(bus: Daemon) -> None:
    asked = make_desktop(bus.address, retry_s=NEVER_S)
    for idle_ms in (1_000, 2_000):
        async with desktop(bus.address, [MUTTER], monitor(MUTTER, ("t", [idle_ms]))):
            assert (await asked.read()).input_idle_s == idle_ms / 1000
        assert isinstance((await asked.read()).input_idle_s, Unknown)
    await asked.close()


@pytest.mark.parametrize(("retry_s", "back"), [(0.0, True), (NEVER_S, False)])
async def test_a_bus_that_dies_and_comes_back(bus: Daemon, retry_s: float, back: bool) -> None:
    asked = make_desktop(bus.address, bus.address, retry_s=retry_s)
    answers = monitor(MUTTER, ("t", [1_000])) | metered(("u", [4]))
    async with desktop(bus.address, [MUTTER, NETWORK], answers):
        assert (await asked.read()).metered is False
        bus.stop()
        lost = await asked.read()
        assert isinstance(lost.input_idle_s, Unknown)
        assert lost.metered is None or isinstance(lost.metered, Unknown)
    bus.start()
    async with desktop(bus.address, [MUTTER, NETWORK], answers) as again:
        told = await asked.read()
        assert (told.input_idle_s == 1.0) is back
        assert (told.metered is False) is back
        assert bool(again.asked) is back
    await asked.close()


async def test_the_loop_goes_on_while_a_bus_hangs(tmp_path: Path) -> None:
    """A socket that takes the connection and never says a word."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "bus"))
        listener.listen()
        beats = 0
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(read_once(f"unix:path={tmp_path / 'bus'}", timeout_s=SHORT_S))
            while not reading.done():
                beats += 1
                await asyncio.sleep(0)
    assert beats > 1
    assert isinstance(reading.result().input_idle_s, Unknown)

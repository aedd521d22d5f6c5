"""The owner's desk: what it makes of visitors, good and bad."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from fallow.adapters.owner_record import FOREVER_MS, OwnerRecord
from fallow.apps.node import desk as module
from fallow.apps.node.desk import ADDRESS_FILE, LINE_BYTES_MAX, Desk
from fallow.model.owner import DeskAddress, DeskAnswer, OwnerStatus, Work

pytestmark = pytest.mark.anyio

STATUS = OwnerStatus(
    node_id="node-a",
    profile="invisible",
    state="run",
    reason="clear",
    detail="all limits are kept",
    since="2026-11-23T10:00:00Z",
    until=None,
    cores=1,
    unread=(),
    absent=(),
    isolation="bwrap",
    isolation_missing=(),
    models=("tiny",),
    running=0,
    today=Work(),
    watts=8.0,
    watts_method="modelled",
    usd_per_kwh=0.3,
)


class FakeClock:
    def now_ms(self) -> int:
        return 5_000

    def wall_ms(self) -> int:
        return 1_790_000_000_000


class Office:
    """A desk that is open, and what happened at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks = 0
        self.record = OwnerRecord(folder)
        self.desk = Desk(self.record, FakeClock(), lambda: STATUS, self._look)

    def _look(self) -> None:
        self.looks += 1

    async def say(self, line: bytes) -> DeskAnswer | None:
        """None if the desk said nothing."""
        address = msgspec.json.decode((self.folder / ADDRESS_FILE).read_bytes(), type=DeskAddress)
        reader, writer = await asyncio.open_unix_connection(address.socket)
        writer.write(line)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return msgspec.json.decode(answer, type=DeskAnswer) if answer else None


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    office = Office(tmp_path)
    serving = asyncio.ensure_future(office.desk.serve(tmp_path, tmp_path, 123))
    async with asyncio.timeout(5):
        while not (tmp_path / ADDRESS_FILE).exists():
            await asyncio.sleep(0.002)
    try:
        yield office
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        assert not (tmp_path / ADDRESS_FILE).exists(), "nobody is sent to a desk that is closed"
        assert not list(tmp_path.glob("*.sock"))


async def test_status_changes_nothing(office: Office) -> None:
    assert await office.say(b'{"ask":"status"}\n') == DeskAnswer(status=STATUS)
    assert office.looks == 0


async def test_a_pause_with_and_without_an_end(office: Office) -> None:
    await office.say(b'{"ask":"pause","for_s":60}\n')
    assert office.record.paused_until_wall_ms == 1_790_000_060_000
    await office.say(b'{"ask":"pause"}\n')
    assert office.record.paused_until_wall_ms == FOREVER_MS
    await office.say(b'{"ask":"resume"}\n')
    assert office.record.paused_until_wall_ms is None
    assert office.looks == 3, "each is in force before it is answered"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b'{"ask":"sing"}\n',
        b'{"ask":"pause","for_s":0}\n',
        b'{"ask":"pause","for_s":-1}\n',
        b'{"ask":"pause","for_s":1e300}\n',
        b"\xff\n",
    ],
)
async def test_what_it_does_not_understand_it_says(office: Office, line: bytes) -> None:
    answer = await office.say(line)
    assert answer is not None
    assert "doesn't understand" in answer.error
    assert (office.looks, office.record.paused_until_wall_ms) == (0, None)


async def test_a_visitor_who_talks_too_long_or_not_at_all(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_S_MAX", 0.05)
    assert await office.say(b"x" * (2 * LINE_BYTES_MAX)) is None
    assert await office.say(b'{"ask":"sta') is None
    assert await office.say(b'{"ask":"status"}\n') is not None, "and the next one is served"


async def test_only_the_owner_may_knock(office: Office) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in (office.folder / ADDRESS_FILE, office.folder / module.SOCKET)} == {0o600}

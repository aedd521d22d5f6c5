"""A whole hub with its own broker: bans while the operator's key is elsewhere, and that everything it refuses is counted."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from trusted import Tap, until

from fallow.adapters.clock import SystemClock
from fallow.adapters.nats_bus import NatsBus, push_accounts
from fallow.adapters.nkey import Credentials, key_from_seed, make_key
from fallow.adapters.operator import Operator
from fallow.adapters.sql.registry import open_registry
from fallow.apps.hub import enrolling, main, refusals, registrar
from fallow.apps.hub.founding import operator_folder
from fallow.apps.hub.main import Hub, run_hub
from fallow.apps.hub.refusals import REFUSALS_FILE, read_refusals
from fallow.apps.joining import Joined, join
from fallow.apps.settings import INVITATION_FILE, Settings, load
from fallow.model import messages as m
from fallow.model.errors import BadSetting, StartFailed
from fallow.wire import codec, invitation, sign, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import beat_of, card_of
else:
    from one_loop import beat_of, card_of

pytestmark = pytest.mark.anyio

OFFLINE = ("operator.seed", *(f"account-{name}.seed" for name in ("GATEWAYS", "NODES", "HUB", "GUESTS", "SYSTEM")))
REFUSED = Exception
"""nats-py raises one of several."""
SAID = r"(?i)authorization"


class Ground:
    """A hub's data folder, and what the hub did: whether bans were in force each time, and how often accounts were pushed."""

    def __init__(self, folder: Path) -> None:
        self.settings: Settings = load(folder, {"hub.listen": "127.0.0.1:0"})
        self.keys = operator_folder(self.settings.data)
        self.in_force: list[bool] = []
        self.pushes = 0

    @contextlib.asynccontextmanager
    async def hub(self) -> AsyncIterator[None]:
        asked = asyncio.Event()
        before = len(self.in_force)
        running = asyncio.create_task(run_hub(self.settings, asked, None))
        try:
            await until(lambda: running.done() or len(self.in_force) > before, what="the hub's first word on bans")
            if not running.done():
                yield
        finally:
            asked.set()
            await running

    async def joined(self, name: str) -> Joined:
        """A node of this machine."""
        return await join(self.settings.data / name, "node", self.token(), "", "", SystemClock())

    def token(self) -> invitation.Invitation:
        return invitation.read((self.settings.data / INVITATION_FILE).read_text().strip())

    async def connected(self, joined: Joined) -> Tap:
        """A member at the port that the hub has now."""
        return await Tap.open(self.token().addresses[0], joined.credentials.jwt, joined.credentials.key)

    async def renewal_of(self, joined: Joined) -> str:
        """What a member is told that asks for its next credential; empty if it gets one."""
        bus = NatsBus(self.token().addresses[0], joined.credentials, "node")
        await bus.connect()
        subject = subjects.renewal("node", joined.credentials.key.public)
        answer = codec.enrolled.read(await bus.request(subject, codec.encode(m.Renew()), within_s=5))
        await bus.close()
        return "" if answer.failure is None else answer.failure.message

    async def guest(self) -> NatsBus:
        token = self.token()
        bus = NatsBus(token.addresses[0], Credentials(token.door_jwt, key_from_seed(token.door_seed)), "guest")
        await bus.connect()
        return bus

    def ban(self, public_key: str) -> None:
        registry = open_registry(self.settings.database)
        registrar.ban(registry, public_key, why="a test", now_ms=SystemClock().wall_ms())
        registry.close()

    def take_away(self, safe: Path) -> None:
        safe.mkdir()
        for name in OFFLINE:
            shutil.move(self.keys / name, safe / name)

    def refused(self) -> dict[tuple[str, str], int]:
        return {(one.what, one.reason): one.count for one in read_refusals(self.settings.data / REFUSALS_FILE)}


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    found = Ground(tmp_path / "data")
    monkeypatch.setattr(enrolling, "BANS_S", 0.01)
    monkeypatch.setattr(refusals, "WRITE_S", 0.01)
    put_out = Hub.put_out

    async def noted(self: Hub, banned: Any) -> bool:
        said = await put_out(self, banned)
        found.in_force.append(said)
        return said

    async def pushed(bus: NatsBus, jwts: Iterable[str]) -> None:
        found.pushes += 1
        await push_accounts(bus, jwts)

    monkeypatch.setattr(Hub, "put_out", noted)
    monkeypatch.setattr(main, "push_accounts", pushed)
    return found


async def enrolled(guest: NatsBus, key: Any, word: str) -> m.Enrolled:
    asked = m.Enrol(role="node", public_key=key.public, invite=word, at_s=0)
    asked = msgspec.structs.replace(asked, proof=key.sign(sign.enrol_bytes(asked)))
    return codec.enrolled.read(await guest.request(subjects.ENROL.pattern, codec.encode(asked), within_s=5))


def waiting_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "operator.seed" in record.getMessage()]


# bans
async def test_the_broker_is_told_of_bans_once_and_not_of_what_it_knows(ground: Ground) -> None:
    async with ground.hub():
        bad = await ground.joined("bad")
        tap = await ground.connected(bad)
        assert ground.in_force == [True]
        assert ground.pushes == 0, "the broker was started with it"
        ground.ban(bad.credentials.key.public)
        await until(lambda: tap.client.is_closed, what="the end of its connection")
        await until(lambda: len(ground.in_force) == 2)
        assert ground.pushes == 1
        await tap.close()
    async with ground.hub():
        assert (ground.in_force, ground.pushes) == ([True, True, True], 1)
        with pytest.raises(REFUSED, match=SAID):
            await ground.connected(bad)


async def test_a_hub_starts_while_a_ban_waits_for_the_operators_key(
    ground: Ground, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The banned get nothing new meanwhile, and are out as soon as the key is back."""
    caplog.set_level(logging.WARNING)
    async with ground.hub():
        bad, good = await ground.joined("bad"), await ground.joined("good")
    ground.take_away(tmp_path / "safe")
    ground.ban(bad.credentials.key.public)
    async with ground.hub():
        taps = [await ground.connected(bad), await ground.connected(good)]
        assert await ground.renewal_of(bad) == "this key was put out; only who runs the hub can take it in again (`fallow hub unban`)"
        assert await ground.renewal_of(good) == ""
        guest = await ground.guest()
        word = ground.token().word
        assert (await enrolled(guest, bad.credentials.key, word)).failure is not None
        assert (await enrolled(guest, make_key("user"), word)).failure is None, "others come in without the operator's key"
        await guest.close()
        await until(lambda: len(ground.in_force) >= 10, what="some tries")
        assert not any(ground.in_force[1:])
        assert ground.pushes == 0
        [line] = waiting_lines(caplog)
        assert str(ground.keys / "operator.seed") in line
        assert "\n" not in line
        assert not taps[0].client.is_closed

        (tmp_path / "safe" / "operator.seed").rename(ground.keys / "operator.seed")
        await until(lambda: taps[0].client.is_closed, what="the end of its connection")
        await until(lambda: ground.in_force[-1])
        assert ground.pushes == 1
        with pytest.raises(REFUSED, match=SAID):
            await ground.connected(bad)
        await (await ground.connected(good)).close()
        for tap in taps:
            await tap.close()
    assert len(waiting_lines(caplog)) == 1


async def test_a_ban_that_waited_is_in_force_when_a_hub_starts_with_its_keys(ground: Ground, tmp_path: Path) -> None:
    async with ground.hub():
        bad = await ground.joined("bad")
    ground.take_away(tmp_path / "safe")
    ground.ban(bad.credentials.key.public)
    async with ground.hub():
        assert ground.in_force[-1] is False
    shutil.copytree(tmp_path / "safe", ground.keys, dirs_exist_ok=True)
    async with ground.hub():
        assert (ground.in_force[-1], ground.pushes) == (True, 0)
        with pytest.raises(REFUSED, match=SAID):
            await ground.connected(bad)


async def test_another_change_of_accounts_still_needs_the_key(ground: Ground, tmp_path: Path) -> None:
    async with ground.hub():
        pass
    ground.take_away(tmp_path / "safe")
    (ground.keys / "account-NODES.jwt").write_text((ground.keys / "account-HUB.jwt").read_text())
    with pytest.raises((StartFailed, ExceptionGroup)):
        async with ground.hub():
            pass


async def test_credentials_can_not_outlive_what_the_broker_knows_of_bans(ground: Ground) -> None:
    with pytest.raises(BadSetting, match="86400 s at most"):
        await run_hub(ground.settings, asyncio.Event(), None, life_s=86_401)


# refusals
async def test_what_is_refused_is_counted_with_its_reason(ground: Ground, tmp_path: Path) -> None:
    async with ground.hub():
        node = await ground.joined("node")
        mine = node.credentials
        foreign = Operator.open(tmp_path / "other").credential("node", mine.key.public, now_s=10**9, life_s=10**9)
        own = Operator.open(ground.keys).credential("node", mine.key.public, now_s=10**9, life_s=10)
        for jwt, key in ((mine.jwt, make_key("user")), (foreign, mine.key), (own, mine.key), ("", mine.key), ("nonsense", mine.key)):
            with pytest.raises(REFUSED, match=SAID):
                await Tap.open(node.address, jwt, key)
        guest = await ground.guest()
        for _ in range(2):
            assert (await enrolled(guest, make_key("user"), "a guess")).failure is not None
        await guest.close()
        bus = NatsBus(node.address, mine, "node")
        await bus.connect()
        forged = card_of(mine.key.public)
        beat = msgspec.structs.replace(beat_of(mine.key.public), card=forged)
        await bus.publish(f"hb.{mine.key.public}", codec.encode(beat))
        await bus.publish(f"hb.{mine.key.public}", b"nonsense")
        expected = {
            ("login", "bad_proof"): 1,
            ("login", "foreign"): 1,
            ("login", "expired"): 1,
            ("login", "no_credential"): 1,
            ("login", "unreadable"): 1,
            ("joining", "not_invited"): 2,
            ("card", "signature"): 1,
            ("heartbeat", "malformed"): 1,
        }
        await until(lambda: ground.refused() == expected, what="all of it in the file")
        await bus.close()
        ground.ban(mine.key.public)
        await until(lambda: len(ground.in_force) == 2)
        with pytest.raises(REFUSED, match=SAID):
            await Tap.open(node.address, mine.jwt, mine.key)
        await until(lambda: ground.refused().get(("login", "banned")) == 1, what="the login of the banned")
    text = (ground.settings.data / REFUSALS_FILE).read_text()
    for secret in (mine.jwt, mine.jwt.split(".")[1], mine.key.public, "a guess"):
        assert secret not in text
    async with ground.hub():
        assert ground.refused() == {**expected, ("login", "banned"): 1}, "a restart forgets nothing"

"""The hub's desk for joining: who gets in and who doesn't, how often one may try, and what bans do."""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.adapters.nkey import KeyPair, make_key
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.apps.hub import enrolling, registrar
from fallow.apps.hub.enrolling import EnrolDesk, watch_bans
from fallow.apps.hub.refusals import TEXTS, What
from fallow.apps.hub.turnstile import JoinLimits, Turnstile
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, StartFailed, StoreFailed
from fallow.model.identity import MemberRole
from fallow.model.ids import OrgId
from fallow.ports import Delivery, Hear
from fallow.wire import codec, sign, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import FakeClock, until
else:
    from one_loop import FakeClock, until

pytestmark = pytest.mark.anyio

HOME = OrgId("home")
MINUTE_MS = 60_000


def vouched(public_key: str, org_id: OrgId, until_s: int) -> bytes:
    """What stands for the hub's signature."""
    return hashlib.sha256(f"{public_key} is of {org_id} until {until_s}".encode()).digest()


class TellingBroker(MemoryBroker):
    """A broker that says where messages come from, as a real one does of guests."""

    host = "10.0.0.1"

    def _later(self, hear: Hear, delivery: Delivery) -> None:
        super()._later(hear, delivery._replace(host=self.host))


class Hub:
    """The desk on a real registry, and a guest's bus."""

    def __init__(self, folder: Path, *, open_to: OrgId | None = None, limits: JoinLimits | None = None) -> None:
        self.registry: SqlRegistry = open_registry(f"sqlite:///{folder / 'hub.db'}")
        self.clock = FakeClock()
        self.broker = TellingBroker()
        self.bus = MemoryBus(self.broker)
        self.issued: list[tuple[MemberRole, str, int]] = []
        self.cannot_issue = False
        self.counted: list[tuple[What, str]] = []
        self.desk = EnrolDesk(
            MemoryBus(self.broker),
            self.registry,
            self.issue,
            self.clock,
            open_to=open_to,
            vouch=vouched,
            authority="the hub's key",
            hub_org_id=OrgId("hub"),
            limits=limits or JoinLimits(),
            life_s=3_600,
            count=lambda what, reason: self.counted.append((what, reason)),
        )
        registrar.add_organisation(self.registry, HOME, now_ms=1)

    def issue(self, role: MemberRole, public_key: str, life_s: int) -> str:
        if self.cannot_issue:
            raise StartFailed("the signing key is gone")
        self.issued.append((role, public_key, life_s))
        return f"credential of {public_key}"

    def invite(self, *, roles: frozenset[MemberRole] = frozenset({"node"}), uses: int | None = 1, lasts_ms: int | None = None) -> str:
        return registrar.invite(self.registry, org_id=HOME, roles=roles, uses=uses, lasts_ms=lasts_ms, now_ms=self.clock.wall_ms())[1]

    async def enrol(self, pair: KeyPair, word: str = "", *, role: MemberRole = "node", at_s: int = 0) -> m.Enrolled:
        return await self.ask(codec.encode(enrol_of(pair, word, role=role, at_s=at_s)))

    async def ask(self, data: bytes) -> m.Enrolled:
        return codec.enrolled.read(await self.bus.request(subjects.ENROL.pattern, data, within_s=5))

    async def renew(self, name: str, *, role: MemberRole = "node") -> m.Enrolled:
        return codec.enrolled.read(await self.bus.request(subjects.renewal(role, name), codec.encode(m.Renew()), within_s=5))


@contextlib.asynccontextmanager
async def running(folder: Path, *, open_to: OrgId | None = None, limits: JoinLimits | None = None) -> AsyncIterator[Hub]:
    hub = Hub(folder, open_to=open_to, limits=limits)
    try:
        async with asyncio.TaskGroup() as group:
            await hub.desk.start(group)
            yield hub
    finally:
        hub.registry.close()


def enrol_of(pair: KeyPair, word: str = "", *, role: MemberRole = "node", at_s: int = 0) -> m.Enrol:
    asked = m.Enrol(role=role, public_key=pair.public, invite=word, at_s=at_s)
    return msgspec.structs.replace(asked, proof=pair.sign(sign.enrol_bytes(asked)))


def refused(answer: m.Enrolled, hub: Hub, reason: str) -> None:
    """The answer is a refusal for this reason, counted, and carries nothing else."""
    assert answer.failure is not None
    assert answer.failure.code == "not_admitted"
    assert answer.failure.message == enrolling._TEXTS[reason]
    assert (answer.credential, answer.org_id, answer.membership) == ("", "", b"")
    assert hub.desk.refused[reason] >= 1
    assert hub.counted[-1][1] == reason


def test_every_reason_has_its_words() -> None:
    for what in ("joining", "renewal"):
        assert TEXTS[what].keys() == enrolling._TEXTS.keys() | {"no_reply", "no_room"}


# who gets in
@pytest.mark.parametrize("role", ["node", "gateway"])
async def test_a_guest_with_an_invitation_gets_a_credential(tmp_path: Path, role: MemberRole) -> None:
    async with running(tmp_path) as hub:
        pair = make_key("user")
        answer = await hub.enrol(pair, hub.invite(roles=frozenset({role})), role=role)
        assert answer.failure is None
        assert (answer.credential, answer.org_id) == (f"credential of {pair.public}", HOME)
        assert answer.expires_at_s == hub.clock.wall_ms() // 1000 + 3_600
        assert answer.membership == vouched(pair.public, HOME, answer.expires_at_s)
        assert (answer.authority, answer.hub_org_id) == ("the hub's key", "hub")
        assert hub.issued == [(role, pair.public, 3_600)]
        member = hub.registry.members.named(pair.public)
        assert member is not None
        assert (member.role, member.org_id, member.joined_at_ms) == (role, HOME, hub.clock.wall_ms())
        assert hub.desk.admitted[role] == 1


@pytest.mark.parametrize("at_s", [0, 1, 2**40])
async def test_a_guests_clock_does_not_matter(tmp_path: Path, at_s: int) -> None:
    async with running(tmp_path) as hub:
        assert (await hub.enrol(make_key("user"), hub.invite(), at_s=at_s)).failure is None


async def test_who_is_known_comes_again_without_an_invitation(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pair, word = make_key("user"), hub.invite()
        for said in (word, word, "", "nonsense"):
            assert (await hub.enrol(pair, said)).failure is None
        assert [one.uses_left for one in hub.registry.members.invites()] == [0]
        refused(await hub.enrol(make_key("user"), word), hub, "not_invited")


async def test_open_enrolment_lets_anybody_in_as_what_it_says(tmp_path: Path) -> None:
    async with running(tmp_path, open_to=OrgId("anyone")) as hub:
        pair = make_key("user")
        answer = await hub.enrol(pair)
        assert (answer.failure, answer.org_id) == (None, "anyone")
        assert (await hub.enrol(make_key("user"), hub.invite())).org_id == HOME
        refused(await hub.enrol(pair, role="gateway"), hub, "closed")


# who doesn't
async def test_words_that_let_nobody_in_are_refused_alike(tmp_path: Path) -> None:
    """Nothing tells a word that there is from one that there isn't."""
    async with running(tmp_path) as hub:
        ended = hub.invite()
        hub.registry.members.end_invite(hub.registry.members.invites()[0].id, at_ms=1)
        expired, other, used = hub.invite(lasts_ms=1), hub.invite(roles=frozenset({"gateway"})), hub.invite()
        hub.clock.advance(10)
        assert (await hub.enrol(make_key("user"), used)).failure is None
        answers = [await hub.enrol(make_key("user"), word) for word in (ended, expired, other, used, "wrong")]
        for answer in answers:
            refused(answer, hub, "not_invited")
        assert len(set(map(repr, answers))) == 1
        assert hub.desk.refused["not_invited"] == 5


async def test_without_an_invitation_a_closed_hub_takes_nobody(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        refused(await hub.enrol(make_key("user")), hub, "closed")
        assert hub.issued == []
        assert hub.registry.members.all() == []


@pytest.mark.parametrize("field", ["role", "public_key", "invite", "at_s", "proof"])
async def test_a_proof_of_something_else_is_refused(tmp_path: Path, field: str) -> None:
    async with running(tmp_path) as hub:
        word = hub.invite(roles=frozenset({"node", "gateway"}), uses=None)
        pair, other = make_key("user"), make_key("user")
        changed = {"role": "gateway", "public_key": other.public, "invite": hub.invite(), "at_s": 5, "proof": other.sign(b"anything")}
        asked = msgspec.structs.replace(enrol_of(pair, word), **{field: changed[field]})
        refused(await hub.ask(codec.encode(asked)), hub, "bad_proof")
        assert hub.registry.members.all() == []


async def test_an_organisations_key_is_no_nodes(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        refused(await hub.enrol(make_key("account"), hub.invite()), hub, "bad_proof")


@pytest.mark.parametrize("data", [b"", b"\x02", b"\x03\x90", b"\x02" + b"\xff" * 20, b"\x02" + b"a" * 9_000])
async def test_nonsense_is_refused_and_counted(tmp_path: Path, data: bytes) -> None:
    async with running(tmp_path) as hub:
        refused(await hub.ask(data), hub, "malformed")


async def test_who_is_banned_stays_out_until_taken_back(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pair = make_key("user")
        await hub.enrol(pair, hub.invite())
        registrar.ban(hub.registry, pair.public, why="wrong answers", now_ms=5)
        refused(await hub.enrol(pair, hub.invite()), hub, "banned")
        refused(await hub.renew(pair.public), hub, "banned")
        registrar.unban(hub.registry, pair.public)
        assert (await hub.enrol(pair)).failure is None


async def test_a_question_without_a_way_back_is_counted_and_dropped(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        await hub.bus.publish(subjects.ENROL.pattern, b"")
        await until(lambda: hub.desk.refused["no_reply"] == 1)


# renewing
async def test_a_member_gets_its_next_credential(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pair = make_key("user")
        await hub.enrol(pair, hub.invite())
        hub.clock.advance(1_000_000)
        answer = await hub.renew(pair.public)
        assert (answer.failure, answer.org_id, answer.credential) == (None, HOME, f"credential of {pair.public}")
        assert answer.expires_at_s == hub.clock.wall_ms() // 1000 + 3_600
        assert hub.desk.renewed["node"] == 1


async def test_who_is_not_known_in_this_role_gets_none(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pair = make_key("user")
        await hub.enrol(pair, hub.invite())
        refused(await hub.renew(pair.public, role="gateway"), hub, "unknown")
        refused(await hub.renew(make_key("user").public), hub, "unknown")
        assert len(hub.issued) == 1


async def test_a_member_that_renews_all_the_time_waits_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pair, other = make_key("user"), make_key("user")
        for one in (pair, other):
            await hub.enrol(one, hub.invite())
        for _ in range(enrolling.RENEWALS.tries_per_minute):
            assert (await hub.renew(pair.public)).failure is None
        refused(await hub.renew(pair.public), hub, "too_many_tries")
        assert (await hub.renew(other.public)).failure is None


# how often
async def test_ten_failures_close_the_desk_to_a_host_for_a_minute(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        word = hub.invite()
        for at in range(10):
            refused(await hub.enrol(make_key("user"), f"guess {at}"), hub, "not_invited")
            hub.clock.advance(1_000)
        answer = await hub.enrol(make_key("user"), word)
        refused(answer, hub, "too_many_failures")
        assert answer.failure is not None
        assert answer.failure.retry_after_ms == MINUTE_MS - 10_000
        hub.broker.host = "10.0.0.2"
        assert (await hub.enrol(make_key("user"), hub.invite())).failure is None, "others aren't held up"
        hub.broker.host = "10.0.0.1"
        hub.clock.advance(answer.failure.retry_after_ms)
        assert (await hub.enrol(make_key("user"), word)).failure is None, "who waits as told gets through"


async def test_thirty_tries_of_one_host_are_enough_for_a_minute(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        word = hub.invite(uses=None)
        for _ in range(30):
            assert (await hub.enrol(make_key("user"), word)).failure is None
        refused(await hub.enrol(make_key("user"), word), hub, "too_many_tries")


async def test_what_the_hub_can_not_do_is_not_held_against_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as hub:
        word = hub.invite(uses=None)
        hub.cannot_issue = True
        for _ in range(12):
            refused(await hub.enrol(make_key("user"), word), hub, "no_issue")
        hub.cannot_issue = False

        def fail(*_: object) -> None:
            raise StoreFailed("the disk of 10.9.8.7 is full")

        with monkeypatch.context() as patch:
            patch.setattr(hub.registry.members, "named", fail)
            for _ in range(12):
                answer = await hub.enrol(make_key("user"), word)
                refused(answer, hub, "store_failed")
                assert "10.9.8.7" not in repr(answer)
        assert (await hub.enrol(make_key("user"), word)).failure is None


async def test_too_many_at_once_are_told_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolling, "WAITING_MAX", 2)
    async with running(tmp_path, limits=JoinLimits(tries_per_minute=100)) as hub:
        word = hub.invite(uses=None)
        answers = await asyncio.gather(*(hub.enrol(make_key("user"), word) for _ in range(20)))
        assert sum(one.failure is None for one in answers) >= 2
        assert sum(one.failure is not None for one in answers) == hub.desk.refused["busy"] >= 1


@pytest.mark.parametrize(
    ("host", "other", "are_one"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("", "", True),
        ("not an address", "10.0.0.1", False),
    ],
)
def test_a_site_of_ipv6_counts_as_one_host(host: str, other: str, are_one: bool) -> None:
    turnstile = Turnstile(JoinLimits(tries_per_minute=1))
    assert turnstile.enter(host, now_ms=5) is None
    assert (turnstile.enter(other, now_ms=5) is not None) == are_one


def test_all_hosts_together_have_a_limit_and_hosts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallow.apps.hub.turnstile.HOSTS_MAX", 50)
    turnstile = Turnstile(JoinLimits())
    for at in range(200):
        assert turnstile.enter(f"10.0.0.{at}", now_ms=5) is None
    wait = turnstile.enter("10.0.1.1", now_ms=5)
    assert wait is not None
    assert (wait.reason, wait.ms) == ("too_many_guests", 1_000)
    assert len(turnstile._hosts) <= 50
    assert turnstile.enter("10.0.1.1", now_ms=1_005) is None


async def test_the_log_tells_reasons_and_no_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(tmp_path) as hub:
        word = hub.invite()
        await hub.enrol(make_key("user"), "a-secret-guess")
        await hub.enrol(make_key("user"), word)
        assert "not_invited" in caplog.text
        assert "10.0.0.1" in caplog.text
        assert "a-secret-guess" not in caplog.text
        assert word not in caplog.text


# bans
async def test_bans_are_told_as_they_come_and_go_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolling, "BANS_S", 0.005)
    async with running(tmp_path) as hub:
        pair = make_key("user")
        await hub.enrol(pair, hub.invite())
        told: list[Mapping[str, int]] = []
        fails = [True]

        async def on_bans(bans: Mapping[str, int]) -> bool:
            if fails[0]:
                fails[0] = False
                raise BrokerLost("the broker is away")
            told.append(bans)
            return True

        watching = asyncio.create_task(watch_bans(hub.registry, on_bans))
        await until(lambda: told == [{}], what="the bans in force at first")
        registrar.ban(hub.registry, pair.public, why="", now_ms=77)
        await until(lambda: told[-1] == {pair.public: 77}, what="the ban")
        whole = hub.registry.members

        class Broken:
            def banned(self) -> None:
                raise StoreFailed("no database")

        hub.registry.members = Broken()  # type: ignore[assignment]
        await asyncio.sleep(0.03)
        hub.registry.members = whole
        registrar.unban(hub.registry, pair.public)
        await until(lambda: told[-1] == {}, what="the end of the ban")
        assert len(told) == 3, "nothing is told twice"
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_ban_that_can_not_be_in_force_yet_is_told_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolling, "BANS_S", 0.005)
    async with running(tmp_path) as hub:
        told: list[Mapping[str, int]] = []

        async def on_bans(bans: Mapping[str, int]) -> bool:
            told.append(bans)
            return len(told) >= 3

        watching = asyncio.create_task(watch_bans(hub.registry, on_bans))
        await until(lambda: len(told) == 3, what="the third time")
        await asyncio.sleep(0.03)
        assert told == [{}, {}, {}]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

"""The hub's desk for API keys, on a real registry: what it answers, and that gateways hear of every change."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.adapters.nkey import KeyPair, make_key
from fallow.adapters.sql.registry import SqlRegistry, open_registry
from fallow.apps.gateway.keys import Keys
from fallow.apps.hub import key_desk, registrar
from fallow.apps.hub.key_desk import KeyDesk
from fallow.apps.hub.key_limits import Limits
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, InvalidApiKey, StoreFailed
from fallow.model.identity import Agreement, ApiKey, Member
from fallow.model.ids import GatewayId, KeyId, OrgId
from fallow.model.needs import Policy
from fallow.ports import Changes
from fallow.wire import agreement_line, codec, subjects
from fallow.wire.agreement_line import Line

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import FakeClock, until
else:
    from one_loop import FakeClock, until

pytestmark = pytest.mark.anyio

HOME, ACME, OTHER = OrgId("home"), OrgId("acme"), OrgId("other")
GATEWAY, GATEWAY_OF_ACME = GatewayId("gw-1"), GatewayId("gw-2")


class Flaky:
    """A registry whose database can be gone."""

    def __init__(self, registry: SqlRegistry) -> None:
        self._registry = registry
        self.gone = False

    def changes_after(self, number: int) -> Changes:
        if self.gone:
            raise StoreFailed("the database is gone")
        return self._registry.changes_after(number)

    def __getattr__(self, name: str) -> object:
        if self.gone:
            raise StoreFailed("the database is gone")
        return getattr(self._registry, name)


@contextlib.contextmanager
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For questions to which no answer comes. Those that are answered take as long as this machine does."""
    with monkeypatch.context() as patch:
        patch.setattr("fallow.apps.gateway.keys.LOOKUP_S", 0.05)
        yield


class Hub:
    """The desk on a registry of three organisations, and a gateway's keys on the same bus."""

    def __init__(self, folder: Path) -> None:
        self.registry = open_registry(f"sqlite:///{folder / 'hub.db'}")
        self.flaky = Flaky(self.registry)
        self.clock = FakeClock()
        self.broker = MemoryBroker()
        self.bus = MemoryBus(self.broker)
        self.desk = KeyDesk(self.bus, self.flaky, self.clock, HOME)  # type: ignore[arg-type]
        self.keys = Keys(GATEWAY, MemoryBus(self.broker), self.clock)
        self.heard: list[m.KeysChanged] = []
        self.pairs = {name: make_key("account") for name in (HOME, ACME, OTHER)}
        for name, pair in self.pairs.items():
            registrar.add_organisation(self.registry, name, public_key=pair.public, now_ms=1)
        for gateway, org_id in ((GATEWAY, HOME), (GATEWAY_OF_ACME, ACME)):
            self.registry.members.admit_open(Member(public_key=gateway, role="gateway", org_id=org_id, joined_at_ms=1))

    @property
    def now_ms(self) -> int:
        return self.clock.wall_ms()

    def make(self, limits: Limits | None = None, *, org: OrgId = HOME) -> tuple[bytes, KeyId]:
        """The Authorization header of a new key, and its id."""
        key, secret = registrar.make_key(self.registry, org_id=org, now_ms=self.now_ms, limits=limits or Limits())
        return f"Bearer {secret}".encode(), key.id

    async def told_of(self, header: bytes) -> None:
        """Until the news of a key are out, which make gateways forget what they knew of it."""
        digest = registrar.digest_of(header.decode().removeprefix("Bearer "))
        await until(lambda: any(digest in one.key_digests for one in self.heard), what="news of the key")

    def line(self, one: OrgId = HOME, other: OrgId = ACME, *, begins_at_ms: int | None = None) -> Line:
        """An agreement that both sides signed."""
        line = agreement_line.proposed(one, other, begins_at_ms=self.now_ms if begins_at_ms is None else begins_at_ms)
        for name in (one, other):
            line = agreement_line.signed(line, name, self.pairs[name].public, self.pairs[name].sign)
        return line

    def agree(self, one: OrgId = HOME, other: OrgId = ACME, *, begins_at_ms: int | None = None) -> None:
        registrar.store_agreement(self.registry, self.line(one, other, begins_at_ms=begins_at_ms), now_ms=self.now_ms)

    async def grant(self, digest: bytes) -> Grant | None:
        """What the desk says, past every cache."""
        answer = await self.bus.request(subjects.key(GATEWAY), codec.encode(m.KeyQuery(key_digest=digest)), within_s=5)
        return codec.key_answer.read(answer).grant

    async def becomes(self, header: bytes, **fields: object) -> Grant:
        """Wait until a gateway that has the key in its memory sees it so, with its clock standing still."""
        for _ in range(1_000):
            found = await self.keys.check(header)
            if all(getattr(found, name) == value for name, value in fields.items()):
                return found
            await asyncio.sleep(0.002)
        raise AssertionError(f"{found} never had {fields}")

    async def is_refused(self, header: bytes) -> None:
        for _ in range(1_000):
            try:
                await self.keys.check(header)
            except InvalidApiKey:
                return
            await asyncio.sleep(0.002)
        raise AssertionError("it is let in for ever")


@contextlib.asynccontextmanager
async def running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setattr(key_desk, "CHANGES_S", 0.005)
    hub = Hub(folder)
    try:
        async with asyncio.TaskGroup() as group:
            await hub.desk.start(group)
            await hub.keys.start()
            await MemoryBus(hub.broker).subscribe(
                subjects.CHANGED.pattern, lambda delivery: hub.heard.append(codec.keys_changed.read(delivery.data))
            )
            watching = group.create_task(hub.desk.run())
            await until(lambda: hub.heard, what="the first word of the hub")
            yield hub
            watching.cancel()
    finally:
        hub.registry.close()


def partners(grant: Grant | None) -> frozenset[OrgId]:
    assert grant is not None
    return grant.policy.partners


# what it answers
@pytest.mark.parametrize(
    ("gateway", "org", "speaks"),
    [
        (GATEWAY, HOME, True),
        (GATEWAY, ACME, True),
        (GATEWAY_OF_ACME, ACME, True),
        (GATEWAY_OF_ACME, HOME, False),
        (GATEWAY_OF_ACME, OTHER, False),
        (GatewayId("gw-unknown"), HOME, False),
    ],
)
async def test_a_gateway_hears_of_its_own_organisations_keys_and_the_hubs_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: GatewayId, org: OrgId, speaks: bool
) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, key_id = hub.make(org=org)
        keys = Keys(gateway, MemoryBus(hub.broker), hub.clock)
        if speaks:
            assert (await keys.check(header)).key_id == key_id
        else:
            with pytest.raises(InvalidApiKey, match="another organisation than this gateway"):
                await keys.check(header)


async def test_a_key_is_told_with_all_that_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        limits = Limits(policy=Policy(rings=frozenset({"own"})), models=frozenset({"tiny"}), budget_micro=5, expires_at_ms=hub.now_ms + 10)
        header, id = hub.make(limits)
        hub.registry.spending.tell(GatewayId("gw-1"), 1, {id: 3})
        hub.registry.spending.tell(GatewayId("gw-2"), 1, {id: 4})
        grant = await hub.grant(registrar.digest_of(header.decode().removeprefix("Bearer ")))
        assert grant == Grant(
            key_id=hub.registry.keys.all()[0].id,
            org_id=HOME,
            policy=limits.policy,
            models=limits.models,
            budget_micro=5,
            spent_micro=7,
            expires_at_ms=hub.now_ms + 10,
        )
        assert grant.key_id == id
        assert await hub.grant(registrar.digest_of("fk-unknown")) is None


async def test_only_agreements_that_both_signed_and_that_are_in_force_make_partners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, _ = hub.make()
        digest = registrar.digest_of(header.decode().removeprefix("Bearer "))
        line = hub.line(HOME, ACME).agreement
        forged = msgspec.structs.replace(hub.line(HOME, OTHER).agreement, left_signature=make_key("account").sign(b"x"))
        hub.registry.organisations.agree(forged)
        assert partners(await hub.grant(digest)) == set()
        hub.registry.organisations.agree(line)
        assert partners(await hub.grant(digest)) == {ACME}
        registrar.end_agreement(hub.registry, HOME, ACME, now_ms=hub.now_ms)
        assert partners(await hub.grant(digest)) == set()


@pytest.mark.parametrize("field", ["left_signature", "right_signature", "begins_at_ms", "right"])
def test_an_agreement_that_was_changed_is_signed_by_nobody(field: str, tmp_path: Path) -> None:
    pairs: dict[OrgId, KeyPair] = {ACME: make_key("account"), HOME: make_key("account")}
    line = agreement_line.proposed(HOME, ACME, begins_at_ms=5)
    for name, pair in pairs.items():
        line = agreement_line.signed(line, name, pair.public, pair.sign)
    agreement = line.agreement
    left, right = pairs[ACME].public, pairs[HOME].public
    assert key_desk.is_signed(agreement, left, right)
    assert not key_desk.is_signed(agreement, right, left)
    assert not key_desk.is_signed(agreement, left, "")
    wrong = {"left_signature": b"", "right_signature": agreement.left_signature, "begins_at_ms": 6, "right": OTHER}
    changed: Agreement = msgspec.structs.replace(agreement, **{field: wrong[field]})
    assert not key_desk.is_signed(changed, left, right)


async def test_a_key_too_large_to_be_told_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, id = hub.make()
        good, _ = hub.make()
        names = frozenset(f"model-{number}" * 30 for number in range(200))
        hub.registry.keys.change(msgspec.structs.replace(hub.registry.keys.named(id), models=names))  # past the registrar, which refuses it
        with brief(monkeypatch), pytest.raises(BrokerLost):
            await hub.keys.check(header)
        await until(lambda: "doesn't fit into a message" in caplog.text, what="the hub's word")
        assert (await hub.keys.check(good)).org_id == HOME


# what gateways hear
async def test_every_change_is_in_force_on_a_gateway_that_knew_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, id = hub.make()
        other, _ = hub.make()
        assert (await hub.keys.check(header)).models == set()
        assert (await hub.keys.check(other)).models == set()
        limits = Limits(models=frozenset({"tiny"}))
        registrar.limit_key(hub.registry, id, limits)
        await hub.becomes(header, models=limits.models)
        hub.agree()
        await hub.becomes(header, policy=Policy(partners=frozenset({ACME})))
        await hub.becomes(other, policy=Policy(partners=frozenset({ACME})))
        registrar.end_agreement(hub.registry, ACME, HOME, now_ms=hub.now_ms)
        await hub.becomes(header, policy=Policy())
        registrar.revoke_key(hub.registry, id, now_ms=hub.now_ms)
        await hub.is_refused(header)
        assert (await hub.keys.check(other)).org_id == HOME


async def test_a_key_that_nobody_knew_works_as_soon_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header = b"Bearer fk-made-later"
        await hub.is_refused(header)
        hub.registry.keys.add(ApiKey(id=KeyId("key-1"), digest=registrar.digest_of("fk-made-later"), org_id=HOME))
        for _ in range(1_000):
            with contextlib.suppress(InvalidApiKey):
                await hub.keys.check(header)
                return
            await asyncio.sleep(0.002)
        raise AssertionError("it never works")


async def test_a_rotated_key_and_its_successor_both_work_for_the_grace_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, id = hub.make(Limits(models=frozenset({"tiny"})))
        await hub.keys.check(header)
        key, secret = registrar.rotate_key(hub.registry, id, grace_ms=1_000, now_ms=hub.now_ms)
        await hub.becomes(header, expires_at_ms=hub.now_ms + 1_000)
        assert (await hub.keys.check(f"Bearer {secret}".encode())).models == {"tiny"}
        hub.clock.advance(1_000)
        await hub.is_refused(header)
        assert (await hub.keys.check(f"Bearer {secret}".encode())).key_id == key.id


async def test_an_agreement_that_begins_later_is_told_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        header, _ = hub.make()
        before = len(hub.heard)
        hub.agree(begins_at_ms=hub.now_ms + 50)
        await until(lambda: len(hub.heard) > before + 1 or hub.heard[-1].all_of_them, what="the agreement")
        assert partners(await hub.keys.check(header)) == set()
        hub.clock.advance(50)
        await hub.becomes(header, policy=Policy(partners=frozenset({ACME})))


async def test_many_changes_at_once_are_told_in_messages_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "KEYS_CHANGED_MAX", 3)
    async with running(tmp_path, monkeypatch) as hub:
        hub.flaky.gone = True
        headers = [hub.make()[0] for _ in range(8)]
        digests = {registrar.digest_of(header.decode()[7:]) for header in headers}
        del hub.heard[:]
        hub.flaky.gone = False
        await until(lambda: digests <= {digest for one in hub.heard for digest in one.key_digests}, what="all changes")
        assert {len(one.key_digests) for one in hub.heard} == {2, 3}
        assert not any(one.all_of_them for one in hub.heard)
        assert hub.heard[-1].sequence == hub.registry.changes_after(0).number


async def test_a_hub_that_comes_back_makes_gateways_ask_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said last may not have left before the connection broke."""
    async with running(tmp_path, monkeypatch) as hub:
        assert hub.heard[0].all_of_them, "so it is at the start"
        header, id = hub.make()
        await hub.told_of(header)
        await hub.keys.check(header)
        del hub.heard[:]
        hub.broker.stop()
        registrar.revoke_key(hub.registry, id, now_ms=hub.now_ms)
        assert (await hub.keys.check(header)).org_id == HOME, "known keys go on while the broker is away"
        hub.broker.up = True
        await until(lambda: any(one.all_of_them for one in hub.heard), what="the word that all may have changed")
        await hub.is_refused(header)


async def test_a_database_that_is_gone_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path, monkeypatch) as hub:
        header, _ = hub.make()
        await hub.told_of(header)
        await hub.keys.check(header)
        hub.flaky.gone = True
        hub.keys.doubt_all()
        with brief(monkeypatch):
            assert (await hub.keys.check(header)).org_id == HOME
        await until(lambda: "can't be looked up now" in caplog.text, what="the hub's word")
        await asyncio.sleep(0.05)
        assert caplog.text.count("can't be looked up now") == 1, "it is logged once"
        hub.flaky.gone = False
        new, _ = hub.make()
        assert (await hub.keys.check(new)).org_id == HOME
        await until(lambda: "can be looked up again" in caplog.text)


@pytest.mark.parametrize("data", [b"", b"\x02nonsense", b"\x03\x90"])
async def test_nonsense_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    async with running(tmp_path, monkeypatch) as hub:
        await hub.bus.publish(subjects.KEY.pattern, data, "_I.nobody")
        header, _ = hub.make()
        assert (await hub.keys.check(header)).org_id == HOME

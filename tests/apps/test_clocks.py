"""Hub, node and gateway whose clocks are ten minutes apart: credentials, memberships and cards are good everywhere all the same."""

import asyncio
import itertools
import logging
import time
from pathlib import Path

import msgspec
import pytest
from clocks import FakeClock
from trusted import Site, Tap

from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.adapters.nkey import KeyPair, make_key
from fallow.adapters.operator import Operator
from fallow.adapters.sql.registry import open_registry
from fallow.apps.card_check import CardCheck, vouched_by
from fallow.apps.hub import registrar
from fallow.apps.hub.enrolling import LIFE_S, EnrolDesk
from fallow.core import cards
from fallow.core.roster import Member
from fallow.model import messages as m
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.wire import codec, sign, subjects
from fallow.wire.jwt import claims_of, expiry_of
from fallow.wire.sign import card_verifies, signed_card

pytestmark = pytest.mark.anyio

OFF_MS = 600_000
OFFS = (-OFF_MS, 0, OFF_MS)
HOME = OrgId("home")
KEM = m.KemKey(suite="x25519", public_key=bytes(32), expires_at_s=2**40)
HARDWARE = Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33)


class WrongClock(FakeClock):
    """A clock whose time of day is off by so much."""

    def __init__(self, off_ms: int, wall_ms: int | None = None) -> None:
        super().__init__()
        self.off_ms = off_ms + (0 if wall_ms is None else wall_ms - super().wall_ms())

    def wall_ms(self) -> int:
        return super().wall_ms() + self.off_ms


async def let_in(folder: Path, hub: WrongClock, member: WrongClock, pair: KeyPair) -> m.Enrolled:
    """What a hub with such a clock says to a node with such another, which shows an invitation."""
    operator = Operator.open(folder / "keys")
    registry = open_registry(f"sqlite:///{folder / 'hub.db'}")
    broker = MemoryBroker()
    desk = EnrolDesk(
        MemoryBus(broker),
        registry,
        lambda role, public_key, life_s: operator.credential(role, public_key, now_s=hub.wall_ms() // 1000, life_s=life_s),
        hub,
        open_to=None,
        vouch=operator.vouch,
        authority=operator.authority,
    )
    registrar.add_organisation(registry, HOME, now_ms=hub.wall_ms())
    _, word = registrar.invite(registry, org_id=HOME, roles=frozenset({"node"}), uses=1, lasts_ms=2 * OFF_MS, now_ms=hub.wall_ms() - OFF_MS)
    asked = m.Enrol(role="node", public_key=pair.public, invite=word, at_s=member.wall_ms() // 1000)
    asked = msgspec.structs.replace(asked, proof=pair.sign(sign.enrol_bytes(asked)))
    try:
        async with asyncio.TaskGroup() as group:
            await desk.start(group)
            return codec.enrolled.read(await MemoryBus(broker).request(subjects.ENROL.pattern, codec.encode(asked), within_s=5))
    finally:
        registry.close()


def card_of(pair: KeyPair, enrolled: m.Enrolled, clock: WrongClock) -> Card:
    """A node's card as it signs it when it starts."""
    now_ms = clock.wall_ms()
    card = Card(
        node_id=NodeId(pair.public),
        org_id=enrolled.org_id,
        membership=enrolled.membership,
        member_until_s=enrolled.expires_at_s,
        sequence=now_ms,
        expires_at_ms=now_ms + cards.CARD_LIFE_MS,
        hardware=HARDWARE,
        isolation="none",
        region="unknown",
        serves=frozenset({"own"}),
    )
    return signed_card(card, pair.sign)


class Door:
    """A gateway's look at cards, with its reasons for refusing them."""

    def __init__(self, authority: str, clock: WrongClock) -> None:
        self.refused: list[str] = []
        self._check = CardCheck(clock, logging.getLogger("test"), card_verifies, vouched_by(authority, clock), self.refused.append)

    def believes(self, card: Card, known: Member | None = None, sequence: int = 1) -> bool:
        beat = m.Heartbeat(
            node_id=card.node_id, sequence=sequence, state="run", card_sequence=card.sequence, loads=(), card=card, offers=(), kem=KEM
        )
        return self._check.screened(known, beat).card == card


@pytest.mark.parametrize(("hub_ms", "node_ms", "gateway_ms"), list(itertools.product(OFFS, OFFS, OFFS)))
async def test_clocks_ten_minutes_apart_keep_nobody_out(tmp_path: Path, hub_ms: int, node_ms: int, gateway_ms: int) -> None:
    """Right after joining, and when a credential is about to end by the hub's clock."""
    hub, node, gateway, pair = WrongClock(hub_ms), WrongClock(node_ms), WrongClock(gateway_ms), make_key("user")
    enrolled = await let_in(tmp_path, hub, node, pair)
    assert enrolled.failure is None
    assert expiry_of(enrolled.credential) == enrolled.expires_at_s == hub.wall_ms() // 1000 + LIFE_S
    for later_ms in (0, LIFE_S * 1000 - 1):
        for clock in (node, gateway):
            clock.ms = hub.ms + later_ms
        door = Door(enrolled.authority, gateway)
        assert door.believes(card_of(pair, enrolled, node))
        assert door.refused == []


@pytest.mark.parametrize("gateway_ms", OFFS)
async def test_a_card_that_was_said_once_is_not_believed_again(tmp_path: Path, gateway_ms: int) -> None:
    """The number decides which of two cards is newer, also where a clock was set back."""
    node, gateway, pair = WrongClock(OFF_MS), WrongClock(gateway_ms), make_key("user")
    enrolled = await let_in(tmp_path, WrongClock(0), node, pair)
    door = Door(enrolled.authority, gateway)
    first = card_of(pair, enrolled, node)
    node.off_ms -= 2 * OFF_MS
    second = signed_card(cards.renewed(first, after=first.sequence, now_ms=node.wall_ms()), pair.sign)
    assert second.expires_at_ms < first.expires_at_ms
    assert door.believes(first)
    known = Member(sequence=1, heard_at_ms=gateway.now_ms(), state="run", card=first)
    assert door.believes(second, known, 2)
    known = msgspec.structs.replace(known, sequence=2, card=second)
    assert not door.believes(first, known, 3)
    assert door.refused == ["replayed"]


async def test_a_membership_ends_a_while_after_its_time(tmp_path: Path) -> None:
    """The tolerance has an end: a node that the hub vouches for no more is nobody's."""
    clock, pair = WrongClock(0), make_key("user")
    enrolled = await let_in(tmp_path, clock, clock, pair)
    for after_s, is_believed in ((sign.CLOCKS_S, True), (sign.CLOCKS_S + 1, False)):
        clock.ms += enrolled.expires_at_s * 1000 + after_s * 1000 - clock.wall_ms()
        door = Door(enrolled.authority, clock)
        assert door.believes(card_of(pair, enrolled, clock)) is is_believed
        assert door.refused == ([] if is_believed else ["organisation"])


@pytest.mark.parametrize("hub_ms", [-OFF_MS, OFF_MS])
async def test_a_real_broker_takes_the_credential(tmp_path: Path, hub_ms: int) -> None:
    """A broker looks at a credential's end, and at a beginning if it has one (`nbf`); when it was made is nothing to it."""
    site, pair = await Site.start(tmp_path), make_key("user")
    try:
        hub = WrongClock(hub_ms, wall_ms=time.time_ns() // 1_000_000)
        credential = site.operator.credential("node", pair.public, now_s=hub.wall_ms() // 1000, life_s=LIFE_S)
        assert abs(claims_of(credential).iat - time.time() - hub_ms / 1000) < OFF_MS / 2000
        tap = await Tap.open(site.broker.address, credential, pair)
        await tap.close()
    finally:
        await site.broker.stop()

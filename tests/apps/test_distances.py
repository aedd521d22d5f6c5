"""Gateways and hubs time echoes, and put out who answers sooner than light could from where it says it is; who is slow never."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.price_record import PriceRecord
from fallow.apps import distances
from fallow.apps.distances import (
    CLOCK_STEP_MS,
    ECHO_EVERY_MS,
    ECHO_WITHIN_MS,
    FIRST_ECHOES,
    FIRST_EVERY_MS,
    KEEP_MS,
    MOVES_IN_MS,
    QUICK_ECHOES_MIN,
    Distances,
)
from fallow.apps.gateway import sessions
from fallow.apps.gateway.distances import distances_of
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.roster import Roster
from fallow.apps.hub.distances import DistanceDesk
from fallow.apps.hub.listening import HubRoster
from fallow.apps.hub.placing import Placing
from fallow.apps.hub.price_desk import PriceDesk
from fallow.apps.node.node import Node
from fallow.core import cards
from fallow.core.geography import distance_km_least, rtt_ms_least
from fallow.core.price_index import supplies_of as prices_of
from fallow.core.supply import supplies_of
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.ids import NodeId
from fallow.model.owner import Refusals
from fallow.wire import codec, subjects

if TYPE_CHECKING:
    from tests.apps.one_loop import (
        GATEWAY,
        ORG,
        SIGN,
        FakeClock,
        FakeServed,
        Network,
        Overheard,
        anybody,
        beat_of,
        believed,
        card_of,
        kem_believed,
        turns,
        until,
    )
else:
    from one_loop import (
        GATEWAY,
        ORG,
        SIGN,
        FakeClock,
        FakeServed,
        Network,
        Overheard,
        anybody,
        beat_of,
        believed,
        card_of,
        kem_believed,
        turns,
        until,
    )

pytestmark = pytest.mark.anyio
NODE = NodeId("node-a")
AWAY = "na-us"
"""More than 3,500 km from here: light takes more than 23 ms there and back."""
SOON_MS = 5
LATE_MS = 90


Asker = Literal["gateway", "hub"]
ASKERS: tuple[Asker, ...] = ("gateway", "hub")


class Site:
    """A gateway's or a hub's roster and distances in one country, and a node that a test plays. Messages take as long as is said."""

    def __init__(self, asker: Asker, country: str = "de") -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        self.hand = MemoryBus(self.broker)
        self.asker = asker
        self.refused: list[cards.Reason] = []
        self.logged: list[Card] = []
        self.bus = bus = MemoryBus(self.broker)
        self.roster: Roster | HubRoster
        self.distances: Distances
        if asker == "gateway":
            me = sessions.Asker(m.Hello(gateway_id=GATEWAY, org_id=ORG), SIGN)
            self.exchange = Exchange(bus, self.clock, sessions.Sessions(me, bus, self.clock, lambda _: None, kem_believed))
            self.roster = Roster(GATEWAY, bus, self.clock, verify=believed, refused=self.refused.append)
            self.distances = distances_of(self.exchange, self.roster, bus, self.clock, country)
        else:
            self.roster = HubRoster(bus, self.clock, verify=believed, on_card=self.logged.append)
            self.desk = DistanceDesk(bus, self.roster, self.clock, country)
            self.distances = self.desk.distances
        self.pings: list[m.Ping] = []
        self.sequence = self.card_sequence = self.expires_at_ms = 0
        self.region = ""

    async def start(self) -> None:
        await (self.exchange if self.asker == "gateway" else self.desk).start()
        await self.roster.start()
        await self.hand.subscribe(subjects.control(NODE), lambda d: self._hear(codec.to_node.read(d.data)))
        await self.hand.subscribe(subjects.hold(NODE), lambda d: self._hear(codec.from_hub.read(d.data)))

    def _hear(self, message: m.Message) -> None:
        if isinstance(message, m.Ping):
            self.pings.append(message)

    def subject(self, attempt_id: str, node_id: NodeId = NODE) -> str:
        """Where an echo of this node belongs."""
        return f"rsp.{GATEWAY}.{node_id}.{attempt_id}" if self.asker == "gateway" else f"hub.echo.{node_id}.{attempt_id}"

    async def say(self, attempt_id: str, node_id: NodeId = NODE, message: m.Message | None = None) -> None:
        await self.hand.publish(self.subject(attempt_id, node_id), codec.encode(message or m.Alive()))
        await turns()

    def reasons(self) -> list[cards.Reason]:
        """Why cards were refused so far."""
        return list(self.roster.cards_refused.elements()) if isinstance(self.roster, HubRoster) else self.refused

    async def beat(self, region: str = AWAY) -> None:
        """The node says that it is there; with a new card if the region is another one."""
        self.sequence += 1
        same = region == self.region
        card_sequence = self.card_sequence if same else self.sequence
        self.card_sequence, self.region = card_sequence, region
        expires = self.clock.wall_ms() + cards.CARD_LIFE_MS
        card = replace(card_of(NODE, sequence=card_sequence), region=region, expires_at_ms=self.expires_at_ms if same else expires)
        self.expires_at_ms = card.expires_at_ms
        await self.hand.publish(f"hb.{NODE}", codec.encode(replace(beat_of(NODE, self.sequence), card=card, card_sequence=card_sequence)))
        await turns()

    async def look(self) -> int:
        """Have it ask; returns how many questions came."""
        before = len(self.pings)
        await self.distances.look()
        await turns()
        return len(self.pings) - before

    async def echo(self, after_ms: int, *, message: m.Message | None = None) -> None:
        """Answer the last question."""
        self.clock.advance(after_ms)
        await self.say(self.pings[-1].attempt_id, message=message)

    async def measure(self, *rtts_ms: int) -> None:
        for rtt_ms in rtts_ms:
            assert await self.look() == 1
            await self.echo(rtt_ms)
            self.clock.advance(FIRST_EVERY_MS)

    @property
    def is_believed(self) -> bool:
        known = self.roster.card(NODE) is not None
        assert known == bool(self.roster.members()[NODE].offers)
        if isinstance(self.roster, Roster):
            assert known == bool(self.roster.offers())
        return known


@pytest.fixture(params=ASKERS)
async def site(request: pytest.FixtureRequest) -> Site:
    site = Site(request.param)
    await site.start()
    return site


async def test_a_node_that_answers_too_soon_for_its_region_is_put_out(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    await site.beat()
    await site.measure(SOON_MS)
    assert site.is_believed, "one echo could be a slip of the clock"
    with caplog.at_level(logging.WARNING):
        await site.measure(SOON_MS)
    assert not site.is_believed
    assert site.reasons() == ["region"]
    assert len(caplog.records) == 1
    assert f"{AWAY} is 4" in caplog.text
    assert f"organisation.country in this {site.asker}'s settings" in caplog.text


async def test_it_does_not_come_back_with_the_same_claim(site: Site) -> None:
    await site.beat()
    await site.measure(SOON_MS, SOON_MS)
    for _ in range(3):
        await site.beat()
        assert not site.is_believed
    await site.hand.publish(f"hb.{NODE}", codec.encode(replace(beat_of(NODE, 50, state="leave"), card=None, offers=None)))
    await turns()
    await site.beat()
    site.region = ""  # a new card
    site.sequence = 60
    await site.beat()
    assert not site.is_believed
    assert set(site.reasons()) == {"region"}


@pytest.mark.parametrize("region", ["eu-de", "eu-fr", "unknown"])
async def test_it_may_say_where_it_really_is(site: Site, region: str) -> None:
    await site.beat()
    await site.measure(SOON_MS, SOON_MS)
    await site.beat(region)
    assert site.is_believed
    assert await site.look() == 0, "what is near can't be caught from here"


async def test_who_names_one_region_after_the_other_is_judged_by_the_same_echoes(site: Site) -> None:
    await site.beat()
    await site.measure(SOON_MS, SOON_MS)
    await site.beat("as-jp")
    assert not site.is_believed
    site.clock.advance(MOVES_IN_MS)
    await site.beat("as-kr")
    assert site.is_believed, "by now it may be there"
    await site.measure(LATE_MS, LATE_MS, LATE_MS)
    assert site.is_believed


async def test_what_was_measured_is_forgotten_after_a_day(site: Site) -> None:
    await site.beat()
    await site.measure(SOON_MS, SOON_MS)
    site.clock.advance(KEEP_MS)
    await site.look()
    site.region = ""  # a new card
    await site.beat()
    assert site.is_believed


LIGHT_MS = math.floor(rtt_ms_least(distance_km_least(AWAY, "eu-de")))
"""What a clock that counts whole milliseconds shows at least, when light takes the shortest way."""


@pytest.mark.parametrize("rtts_ms", [[LATE_MS] * 4, [LATE_MS, SOON_MS, LATE_MS, 5_000], [9_000] * 4, [LIGHT_MS] * 4])
async def test_a_slow_node_is_never_refused(site: Site, rtts_ms: list[int]) -> None:
    await site.beat()
    for rtt_ms in rtts_ms:
        await site.look()
        await site.echo(rtt_ms)
        await site.beat()
        site.clock.advance(FIRST_EVERY_MS)
    assert site.is_believed
    assert site.reasons() == []


@pytest.mark.parametrize("region", ["eu-de", "eu-at", "eu-nl-utrecht", "unknown", "here", "us", "xx-qq"])
async def test_who_can_not_be_caught_is_not_asked(site: Site, region: str) -> None:
    await site.beat(region)
    assert await site.look() == 0


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("country", ["unknown", "qq"])
async def test_who_does_not_know_where_it_is_asks_nobody(asker: Asker, country: str) -> None:
    site = Site(asker, country)
    await site.start()
    await site.beat()
    assert await site.look() == 0
    await site.distances.run()  # returns


async def test_questions_are_few(site: Site) -> None:
    await site.beat()
    for _ in range(3_600):  # an hour
        await site.beat()
        await site.distances.look()
        site.clock.advance(1_000)
    await turns()
    assert len(site.pings) == FIRST_ECHOES + 3_600_000 // ECHO_EVERY_MS - 1
    assert len({ping.attempt_id for ping in site.pings}) == len(site.pings), "an echo answers one question"


async def test_no_more_are_asked_at_a_time_than_are_allowed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ASKED_PER_LOOK_MAX", 2)
    for name in ("node-a", "node-b", "node-c"):
        card = replace(card_of(name), region=AWAY)
        await site.hand.publish(f"hb.{name}", codec.encode(replace(beat_of(name), card=card)))
    await turns()
    for expected in (2, 1, 0):
        site.broker.sent.clear()
        await site.distances.look()
        assert len(site.broker.sent_to("n.")) == expected


async def test_an_echo_counts_once(site: Site) -> None:
    await site.beat()
    await site.look()
    await site.echo(SOON_MS)
    await site.echo(0)
    assert site.is_believed


async def test_a_claim_stays_refused_for_a_day(site: Site) -> None:
    await site.beat()
    await site.measure(SOON_MS, SOON_MS)
    site.clock.advance(KEEP_MS - 10_000)
    site.sequence += 100
    site.region = ""  # a new card
    await site.beat()
    assert not site.is_believed


async def test_questions_are_forgotten(site: Site) -> None:
    await site.beat()
    await site.look()
    [first] = site.pings
    site.clock.advance(ECHO_WITHIN_MS - 1)
    await site.beat()
    await site.look()
    assert site.distances.awaits(NODE, first.attempt_id)
    site.clock.advance(1)
    await site.look()
    assert not site.distances.awaits(NODE, first.attempt_id)
    assert not site.distances.awaits("node-b", site.pings[-1].attempt_id)
    assert site.distances.awaits(NODE, site.pings[-1].attempt_id)


async def says_too_late(site: Site) -> None:
    await site.echo(ECHO_WITHIN_MS)


async def says_it_for_another(site: Site) -> None:
    site.clock.advance(SOON_MS)
    await site.say(site.pings[-1].attempt_id, NodeId("node-b"))


async def says_it_twice(site: Site) -> None:
    await site.echo(LATE_MS)
    await site.echo(0)


async def says_what_nobody_asked(site: Site) -> None:
    for id in ("rtt-0", "x", ""):
        await site.say(id)


async def is_gone(site: Site) -> None:
    site.clock.advance(SOON_MS)
    await site.hand.publish("n.gone.ctl", b"", site.subject(site.pings[-1].attempt_id))  # the broker says that nobody is there
    await turns()


async def says_it_elsewhere(site: Site) -> None:
    site.clock.advance(SOON_MS)
    id = site.pings[-1].attempt_id
    for subject in (
        f"rsp.gw-2.{NODE}.{id}",
        f"rsp.hub.{NODE}.{id}",
        f"hub.echo.{NODE}",
        f"hub.echo.{NODE}.{id}.more",
        f"hub.echo.x.{NODE}.{id}",
    ):
        await site.hand.publish(subject, codec.encode(m.Alive()))
    await turns()


@pytest.mark.parametrize("does", [says_too_late, says_it_for_another, says_it_twice, says_what_nobody_asked, is_gone, says_it_elsewhere])
async def test_what_is_no_echo_counts_for_nothing(site: Site, does: Callable[[Site], Awaitable[None]]) -> None:
    await site.beat()
    for _ in range(3):
        assert await site.look() == 1
        await does(site)
        await site.beat()
        site.clock.advance(FIRST_EVERY_MS)
    assert site.is_believed
    assert site.reasons() == []


async def test_a_broker_that_is_away_is_asked_later(site: Site) -> None:
    await site.beat()
    site.broker.up = False
    assert await site.look() == 0
    site.broker.up = True
    site.clock.advance(FIRST_EVERY_MS)
    assert await site.look() == 1


@pytest.mark.parametrize(("asker", "message"), [("gateway", m.Final(index=0)), ("gateway", m.Alive()), ("hub", m.Alive())])
async def test_what_a_node_may_answer_is_an_echo(asker: Asker, message: m.Message) -> None:
    site = Site(asker)
    await site.start()
    await site.beat()
    for _ in range(2):
        await site.look()
        await site.echo(SOON_MS, message=message)
        site.clock.advance(FIRST_EVERY_MS)
    assert not site.is_believed


@pytest.mark.parametrize("data", [b"", b"\x02nonsense", b"\x03", codec.encode(m.Renew()), bytes(2_000)], ids=len)
async def test_the_hub_takes_no_nonsense_for_an_echo(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    site = Site("hub")
    await site.start()
    await site.beat()
    for _ in range(3):
        await site.look()
        await site.hand.publish(site.subject(site.pings[-1].attempt_id), data)
        await turns()
        site.clock.advance(FIRST_EVERY_MS)
    assert site.is_believed
    assert len(caplog.records) == 3, "and none of what nobody asked for"
    await site.hand.publish(site.subject("rtt-0"), data)
    await turns()
    assert len(caplog.records) == 3


def possible(region: str, rtts_ms: list[int]) -> bool:
    """What physics says of the second-quickest round trip, reckoned from the rule's own words."""
    quick = sorted(rtts_ms)[:QUICK_ECHOES_MIN]
    return len(quick) < QUICK_ECHOES_MIN or quick[-1] + CLOCK_STEP_MS >= rtt_ms_least(distance_km_least(region, "eu-de"))


@settings(max_examples=60)
@given(
    asker=st.sampled_from(ASKERS),
    region=st.sampled_from([AWAY, "as-jp", "oc-au", "sa-br", "eu-fr", "unknown"]),
    rtts_ms=st.lists(st.integers(0, 120), max_size=FIRST_ECHOES),
)
async def test_who_is_put_out_follows_from_physics_alone(asker: Asker, region: str, rtts_ms: list[int]) -> None:
    """Gateway and hub find the same from the same echoes, and neither puts out who could be where it says."""
    site = Site(asker)
    await site.start()
    await site.beat(region)
    taken: list[int] = []
    for rtt_ms in rtts_ms:
        if await site.look() == 0:
            break
        await site.echo(rtt_ms)
        taken.append(rtt_ms)
        await site.beat(region)
        site.clock.advance(FIRST_EVERY_MS)
    assert site.is_believed is possible(region, taken)
    assert set(site.reasons()) == (set() if site.is_believed else {"region"})


# what follows, with real nodes
async def test_a_real_node_gives_an_echo_and_the_refusal_is_shown() -> None:
    async with Network(country="de") as network:
        card = replace(card_of(NODE), region=AWAY)
        network._start(Node(card, [FakeServed()], MemoryBus(network.broker), network.clock, SIGN, anybody).run)
        await network.knows(NODE)
        assert b'fallow_cards_refused_total{reason="region"} 0.0' in (await network.get("/metrics")).body
        for _ in range(2):
            await network.gateway.distances.look()
            await turns()
            network.clock.advance(FIRST_EVERY_MS)
        assert network.gateway.roster.offers() == []
        assert b'fallow_cards_refused_total{reason="region"} 1.0' in (await network.get("/metrics")).body
        assert (await network.get("/fallow/nodes")).json["nodes"] == []
        assert (await network.ask().done()).code == "no_node"


async def test_a_real_node_gives_the_hub_an_echo_and_is_planned_with_no_more(tmp_path: Path) -> None:
    site = Site("hub")
    assert isinstance(site.roster, HubRoster)
    await site.start()
    prices, placing = PriceDesk(site.bus, site.roster, PriceRecord(tmp_path), site.clock), Placing(site.bus, site.roster, site.clock)
    stop = asyncio.Event()
    node = Node(replace(card_of(NODE), region=AWAY), [FakeServed()], MemoryBus(site.broker), site.clock, SIGN, anybody)
    running = asyncio.ensure_future(node.run(stop))
    try:
        await until(lambda: site.roster.card(NODE) is not None, what="the node")
        first = site.logged[-1]
        assert list(supplies_of(site.roster.members()))
        assert list(prices_of(site.roster.members().values()))
        for _ in range(2):
            assert await site.look() == 1
            await until(lambda: not site.distances.awaits(NODE, site.pings[-1].attempt_id), what="the echo")
            site.clock.advance(FIRST_EVERY_MS)
        assert site.reasons() == ["region"]
        assert not list(supplies_of(site.roster.members()))
        assert not list(prices_of(site.roster.members().values()))
        await prices.look()
        await placing.place()
        assert prices.index.entries == ()
        assert site.logged == [first], "what it said before stays in the log"
        node.refuse(Refusals())  # a new card with the old claim
        await until(lambda: site.reasons() == ["region"] * 2, what="the next refusal")
        assert site.logged == [first]
        assert node.card.region == AWAY
    finally:
        stop.set()
        await running

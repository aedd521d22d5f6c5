"""Echoes are timed, and a node that answers sooner than light could from where it says it is is put out; a slow one never."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.gateway import distances
from fallow.apps.gateway.distances import ECHO_EVERY_MS, ECHO_WITHIN_MS, FIRST_ECHOES, FIRST_EVERY_MS, KEEP_MS, MOVES_IN_MS, Distances
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.roster import Roster
from fallow.apps.node.node import Node
from fallow.core import cards
from fallow.core.geography import distance_km_least, rtt_ms_least
from fallow.model import messages as m
from fallow.model.ids import NodeId
from fallow.wire import codec, subjects

if TYPE_CHECKING:
    from tests.apps.one_loop import GATEWAY, SIGN, FakeClock, FakeServed, Network, Overheard, beat_of, believed, card_of, turns
else:
    from one_loop import GATEWAY, SIGN, FakeClock, FakeServed, Network, Overheard, beat_of, believed, card_of, turns

pytestmark = pytest.mark.anyio
NODE = NodeId("node-a")
AWAY = "na-us"
"""More than 3,500 km from here: light takes more than 23 ms there and back."""
SOON_MS = 5
LATE_MS = 90


class Site:
    """A gateway's roster and distances in one country, and a node that a test plays. Every message takes as long as is said."""

    def __init__(self, country: str = "de") -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        self.hand = MemoryBus(self.broker)
        self.refused: list[cards.Reason] = []
        bus = MemoryBus(self.broker)
        self.exchange = Exchange(GATEWAY, bus, self.clock)
        self.roster = Roster(GATEWAY, bus, self.clock, verify=believed, refused=self.refused.append)
        self.distances = Distances(self.exchange, self.roster, bus, self.clock, country)
        self.pings: list[tuple[m.Ping, str]] = []
        self.sequence = self.card_sequence = self.expires_at_ms = 0
        self.region = ""

    async def start(self) -> None:
        await self.exchange.start()
        await self.roster.start()
        await self.hand.subscribe(subjects.control(NODE), lambda d: self._hear(codec.to_node.read(d.data), d.reply))

    def _hear(self, message: m.ToNode, reply: str) -> None:
        if isinstance(message, m.Ping):
            self.pings.append((message, reply))

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
        """Have the gateway ask; returns how many questions came."""
        before = len(self.pings)
        await self.distances.look()
        await turns()
        return len(self.pings) - before

    async def echo(self, after_ms: int, *, message: m.Message | None = None) -> None:
        """Answer the last question."""
        self.clock.advance(after_ms)
        lost = m.Final(index=0)
        await self.hand.publish(self.pings[-1][1], codec.encode(message or lost))
        await turns()

    async def measure(self, *rtts_ms: int) -> None:
        for rtt_ms in rtts_ms:
            assert await self.look() == 1
            await self.echo(rtt_ms)
            self.clock.advance(FIRST_EVERY_MS)

    @property
    def is_believed(self) -> bool:
        known = self.roster.card(NODE) is not None
        assert known == bool(self.roster.offers())
        return known


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.start()
    return site


async def test_a_node_that_answers_too_soon_for_its_region_is_put_out(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    await site.beat()
    await site.measure(SOON_MS)
    assert site.is_believed, "one echo could be a slip of the clock"
    with caplog.at_level(logging.WARNING):
        await site.measure(SOON_MS)
    assert not site.is_believed
    assert site.refused == ["region"]
    assert len(caplog.records) == 1
    assert f"{AWAY} is 4" in caplog.text
    assert "organisation.country" in caplog.text


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
    assert set(site.refused) == {"region"}


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
    assert site.refused == []


@pytest.mark.parametrize("region", ["eu-de", "eu-at", "eu-nl-utrecht", "unknown", "here", "us", "xx-qq"])
async def test_who_can_not_be_caught_is_not_asked(site: Site, region: str) -> None:
    await site.beat(region)
    assert await site.look() == 0


@pytest.mark.parametrize("country", ["unknown", "qq"])
async def test_a_gateway_that_does_not_know_where_it_is_asks_nobody(country: str) -> None:
    site = Site(country)
    await site.start()
    await site.beat()
    assert await site.look() == 0
    await site.distances.run()  # returns


async def test_questions_are_few(site: Site) -> None:
    await site.beat()
    for _ in range(3_600):  # an hour
        await site.distances.look()
        site.clock.advance(1_000)
    await turns()
    assert len(site.pings) == FIRST_ECHOES + 3_600_000 // ECHO_EVERY_MS - 1
    assert len({ping.attempt_id for ping, _ in site.pings}) == len(site.pings), "an echo answers one question"


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


async def says_too_late(site: Site) -> None:
    await site.echo(ECHO_WITHIN_MS)


async def says_it_for_another(site: Site) -> None:
    reply = site.pings[-1][1].replace(NODE, "node-b")
    site.clock.advance(SOON_MS)
    await site.hand.publish(reply, codec.encode(m.Alive()))
    await turns()


async def says_it_twice(site: Site) -> None:
    await site.echo(LATE_MS)
    await site.echo(0)


async def says_what_nobody_asked(site: Site) -> None:
    for id in ("rtt-0", "x", ""):
        await site.hand.publish(f"rsp.{GATEWAY}.{NODE}.{id}", codec.encode(m.Alive()))
    await turns()


async def hears_no_more(site: Site) -> None:
    site.clock.advance(SOON_MS)
    await site.hand.publish("n.gone.ctl", b"", site.pings[-1][1])  # the broker says that nobody is there
    await turns()


@pytest.mark.parametrize("does", [says_too_late, says_it_for_another, says_it_twice, says_what_nobody_asked, hears_no_more])
async def test_what_is_no_echo_counts_for_nothing(site: Site, does: Callable[[Site], Awaitable[None]]) -> None:
    await site.beat()
    for _ in range(3):
        assert await site.look() == 1
        await does(site)
        await site.beat()
        site.clock.advance(FIRST_EVERY_MS)
    assert site.is_believed
    assert site.refused == []


async def test_a_broker_that_is_away_is_asked_later(site: Site) -> None:
    await site.beat()
    site.broker.up = False
    assert await site.look() == 0
    site.broker.up = True
    site.clock.advance(FIRST_EVERY_MS)
    assert await site.look() == 1


@pytest.mark.parametrize("message", [m.Final(index=0), m.Alive()])
async def test_whatever_a_node_answers_is_an_echo(site: Site, message: m.Message) -> None:
    await site.beat()
    for _ in range(2):
        await site.look()
        await site.echo(SOON_MS, message=message)
        site.clock.advance(FIRST_EVERY_MS)
    assert not site.is_believed


async def test_a_real_node_gives_an_echo_and_the_refusal_is_shown() -> None:
    async with Network(country="de") as network:
        card = replace(card_of(NODE), region=AWAY)
        network._start(Node(card, [FakeServed()], MemoryBus(network.broker), network.clock, SIGN).run)
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

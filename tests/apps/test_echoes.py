"""Echoes for the hub over a real broker: each node gives its own, and what else comes is no echo."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace
from trusted import Site, Tap, until

from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.nkey import Credentials, make_key
from fallow.apps.distances import ECHO_WITHIN_MS, FIRST_ECHOES, FIRST_EVERY_MS
from fallow.apps.hub.distances import DistanceDesk
from fallow.apps.hub.listening import HubRoster
from fallow.apps.node.node import Node
from fallow.core.cards import CARD_LIFE_MS
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.ids import NodeId
from fallow.wire import codec
from fallow.wire.sign import signed_card

if TYPE_CHECKING:
    from tests.apps.one_loop import FakeClock, FakeServed, anybody, beat_of, card_of
else:
    from one_loop import FakeClock, FakeServed, anybody, beat_of, card_of

pytestmark = pytest.mark.anyio
AWAY = "na-us"
ALIVE = codec.encode(m.Alive())


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    site = await Site.start(tmp_path_factory.mktemp("site"))
    yield site
    await site.broker.stop()


class Hub:
    """A hub's roster and its desk for distances, in Germany, on a real broker. Its clock stands until it is told to go on."""

    def __init__(self, site: Site) -> None:
        self.clock = FakeClock()
        self.bus = NatsBus(site.broker.address, site.operator.hub_user(), "hub")
        self.heard: list[str] = []
        self.roster = HubRoster(self.bus, self.clock)
        self.desk = DistanceDesk(self.bus, self.roster, self.clock, "de")

    async def start(self) -> None:
        await self.bus.connect()
        await self.roster.start()
        await self.desk.start()
        await self.bus.subscribe("hub.echo.*.*", lambda delivery: self.heard.append(delivery.subject))

    async def hears(self, *subjects: str) -> None:
        """Until these echoes came, whatever they are taken for."""
        await until(lambda: self.heard[-len(subjects) :] == list(subjects), what="the echoes")

    @property
    def refused(self) -> dict[str, int]:
        return {str(reason): count for reason, count in self.roster.cards_refused.items()}


@pytest.fixture
async def hub(site: Site) -> AsyncIterator[Hub]:
    hub = Hub(site)
    await hub.start()
    yield hub
    await hub.bus.close()


class Liar:
    """A plain connection that says that it is far away, and answers as a test tells it to."""

    def __init__(self, login: Credentials, tap: Tap) -> None:
        self.login = login
        self.tap = tap
        self.node_id = NodeId(login.key.public)

    @classmethod
    async def open(cls, site: Site) -> "Liar":
        login = site.member("node")
        return cls(login, await Tap.open(site.broker.address, login.jwt, login.key))

    async def beat(self, hub: Hub) -> None:
        await self.tap.listen(f"n.{self.node_id}.hub")
        await self.tap.flush()
        card = signed(card_of(self.node_id), hub.clock, self.login)
        await self.tap.client.publish(f"hb.{self.node_id}", codec.encode(replace(beat_of(self.node_id), card=card)))
        await until(lambda: hub.roster.card(self.node_id) == card, what="the card")

    async def lives(self, hub: Hub) -> None:
        """Say so now, without the card."""
        now = hub.clock.now_ms()
        await self.tap.client.publish(f"hb.{self.node_id}", codec.encode(replace(beat_of(self.node_id, now), card=None, offers=None)))
        await until(lambda: any(one.heard_at_ms == now for one in hub.roster.members().values()), what="the heartbeat")

    async def asked(self, hub: Hub) -> str:
        """The id of the echo that the hub asks for now."""
        before = len(self.tap.heard)
        await hub.desk.distances.look()
        await until(lambda: len(self.tap.heard) > before, what="the question")
        message = codec.from_hub.read(self.tap.heard[-1].data)
        assert isinstance(message, m.Ping)
        return message.attempt_id

    async def says(self, id: str, node_id: str = "") -> str:
        subject = f"hub.echo.{node_id or self.node_id}.{id}"
        await self.tap.client.publish(subject, ALIVE)
        await self.tap.flush()
        return subject


def signed(card: Card, clock: FakeClock, login: Credentials) -> Card:
    return signed_card(replace(card, region=AWAY, expires_at_ms=clock.wall_ms() + CARD_LIFE_MS), login.key.sign)


@pytest.fixture
async def liar(site: Site) -> AsyncIterator[Liar]:
    liar = await Liar.open(site)
    yield liar
    await liar.tap.close()


async def test_a_real_node_is_asked_answers_and_is_put_out(site: Site, hub: Hub) -> None:
    login = site.member("node")
    bus = NatsBus(site.broker.address, login, "node")
    await bus.connect()
    node_id = NodeId(login.key.public)
    node = Node(replace(card_of(node_id), region=AWAY), [FakeServed()], bus, hub.clock, login.key.sign, anybody)
    stop = asyncio.Event()
    running = asyncio.ensure_future(node.run(stop))
    try:
        await until(lambda: hub.roster.card(node_id) is not None, what="the node")
        for count in (1, 2):
            assert hub.roster.card(node_id) is not None
            await hub.desk.distances.look()
            await until(lambda: len(hub.heard) == count, what="the echo")  # noqa: B023
            hub.clock.advance(FIRST_EVERY_MS)
        assert hub.roster.card(node_id) is None
        assert hub.roster.members()[node_id].offers == ()
        assert hub.refused == {"region": 1}
        assert all(subject.startswith(f"hub.echo.{node_id}.rtt-") for subject in hub.heard)
    finally:
        stop.set()
        await running
        await bus.close()


async def test_late_and_unasked_echoes_count_for_nothing(hub: Hub, liar: Liar) -> None:
    await liar.beat(hub)
    for _ in range(FIRST_ECHOES // 2):
        id = await liar.asked(hub)
        await hub.hears(await liar.says("rtt-0"), await liar.says(make_key("user").public))
        hub.clock.advance(ECHO_WITHIN_MS)
        await liar.lives(hub)
        assert await liar.asked(hub) != id
        await hub.hears(await liar.says(id))
        hub.clock.advance(FIRST_EVERY_MS)
        await liar.lives(hub)
    assert hub.refused == {}
    assert hub.roster.card(liar.node_id) is not None


async def test_nobody_gives_an_echo_for_another(site: Site, hub: Hub, liar: Liar) -> None:
    """Who stands near the hub could make a machine that is far away look near, and have it put out."""
    await liar.beat(hub)
    helper = await Liar.open(site)
    gateway = site.member("gateway")
    caller = await Tap.open(site.broker.address, gateway.jwt, gateway.key)
    for _ in range(3):
        id = await liar.asked(hub)
        await helper.says(id, liar.node_id)
        await caller.client.publish(f"hub.echo.{liar.node_id}.{id}", ALIVE)
        await caller.flush()
        await hub.hears(await helper.says(id))
        hub.clock.advance(FIRST_EVERY_MS)
        await liar.lives(hub)
    assert hub.refused == {}
    assert hub.roster.card(liar.node_id) is not None
    for tap in (helper.tap, caller):
        assert sum("permissions violation for publish" in text.lower() for text in tap.refused) == 3
        await tap.close()
    assert {subject.split(".")[2] for subject in hub.heard} == {helper.node_id}


async def test_two_hubs_take_their_own_echoes(site: Site, hub: Hub, liar: Liar) -> None:
    """Both hear all of them. The other hub stands elsewhere, and believes the card."""
    other = Hub(site)
    other.desk = DistanceDesk(other.bus, other.roster, other.clock, "us")
    await other.start()
    await liar.beat(hub)
    await until(lambda: other.roster.card(liar.node_id) is not None, what="the card at the other hub")
    for _ in range(2):
        id = await liar.asked(hub)
        await other.desk.distances.look()
        subject = await liar.says(id)
        await hub.hears(subject)
        await other.hears(subject)
        hub.clock.advance(FIRST_EVERY_MS)
    assert (hub.refused, other.refused) == ({"region": 1}, {})
    assert other.roster.card(liar.node_id) is not None
    await other.bus.close()

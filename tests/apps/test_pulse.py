"""A node's card: signed with its own key before anybody sees it, again when it changes and before it expires; and its echoes."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.nkey import make_key
from fallow.apps.node import pulse as node_pulse
from fallow.apps.node.pulse import ECHOES_WAITING_MAX, PRICE_MS, Pulse
from fallow.apps.node.seals import KEM_MS, Seals
from fallow.core.cards import CARD_LIFE_MS, why_card_refused
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.ids import AttemptId, GatewayId
from fallow.model.messages import KemKey
from fallow.model.offer import Price
from fallow.model.owner import Refusals
from fallow.ports import Delivery
from fallow.wire import codec, subjects
from fallow.wire.sign import card_verifies, kem_verifies

if TYPE_CHECKING:
    from tests.apps.one_loop import MODEL, FakeClock, FakeServed, Overheard, anybody, card_of, offer_of, turns, until
else:
    from one_loop import MODEL, FakeClock, FakeServed, Overheard, anybody, card_of, offer_of, turns, until

pytestmark = pytest.mark.anyio
KEY = make_key("user")


class Heart:
    """A pulse, and all cards that were heard of it."""

    def __init__(self) -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        self.card = card_of(KEY.public)
        self.served = FakeServed()
        self.seals = Seals(self.card.node_id, KEY.sign, anybody, self.clock, "x25519")
        self.pulse = Pulse(self.card, [self.served], lambda served: 0, MemoryBus(self.broker), self.clock, KEY.sign, self.seals)

    def kems(self) -> list[KemKey]:
        beats = [codec.read_heartbeat(data, f"hb.{KEY.public}") for data in self.broker.sent_to("hb.")]
        return [beat.kem for beat in beats if beat.kem is not None]

    def cards(self) -> list[Card]:
        beats = [codec.read_heartbeat(data, f"hb.{KEY.public}") for data in self.broker.sent_to("hb.")]
        assert all((beat.card is None) == (beat.kem is None) for beat in beats), "a card comes with the key to seal to"
        cards = [beat.card for beat in beats if beat.card is not None]
        assert all(beat.card_sequence == beat.card.sequence for beat in beats if beat.card is not None)
        return [card for at, card in enumerate(cards) if at == 0 or card != cards[at - 1]]


@pytest.fixture
async def heart() -> AsyncIterator[Heart]:
    heart = Heart()
    running = [asyncio.ensure_future(heart.pulse.run()), asyncio.ensure_future(heart.pulse.echo())]
    await turns()
    yield heart
    for one in running:
        one.cancel()
    await asyncio.wait(running)
    assert all(one.cancelled() for one in running)


async def test_the_first_heartbeat_brings_a_signed_card(heart: Heart) -> None:
    [card] = heart.cards()
    assert card_verifies(card)
    assert replace(card, signature=b"", expires_at_ms=heart.card.expires_at_ms) == heart.card
    assert why_card_refused(card, None, verifies=True, now_ms=heart.clock.wall_ms()) is None


async def test_a_new_key_to_seal_to_is_told_at_once_and_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_pulse, "FIRST_BEAT_S", 0.001)
    heart = Heart()
    running = asyncio.ensure_future(heart.pulse.run())
    await until(lambda: len(heart.broker.sent_to("hb.")) > 5)
    first = heart.seals.kem
    assert heart.kems() == [first], "the short beats come without"
    heart.clock.advance(KEM_MS)
    await until(lambda: len(heart.kems()) == 2)
    running.cancel()
    await asyncio.wait([running])
    assert heart.kems() == [first, heart.seals.kem]
    assert first.public_key != heart.seals.kem.public_key
    assert all(kem_verifies(heart.card.node_id, kem, now_s=heart.clock.wall_ms() // 1000) for kem in heart.kems())


async def test_prices_count_for_a_minute_after_they_rose(monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heart()
    prices = [Price(output_micro_per_munit=number) for number in range(3)]

    async def asks(price: Price) -> None:
        monkeypatch.setattr(heart.served, "offer", lambda node_id, _: replace(offer_of(node_id), price=price))
        await heart.pulse.beat(full=True)

    assert heart.pulse.prices(MODEL) == [], "nothing was offered yet"
    await asks(prices[0])
    heart.clock.advance(10 * PRICE_MS)
    assert heart.pulse.prices(MODEL) == prices[:1], "what is asked now"
    await asks(prices[1])
    heart.clock.advance(PRICE_MS // 2)
    await asks(prices[2])
    assert set(heart.pulse.prices(MODEL)) == set(prices)
    heart.clock.advance(PRICE_MS // 2)
    assert set(heart.pulse.prices(MODEL)) == set(prices)
    heart.clock.advance(1)
    assert set(heart.pulse.prices(MODEL)) == {prices[1], prices[2]}
    await asks(prices[1])  # it falls back
    heart.clock.advance(PRICE_MS + 1)
    assert heart.pulse.prices(MODEL) == [prices[1]]
    assert heart.pulse.prices("other") == []


async def test_a_changed_card_is_signed_anew(heart: Heart) -> None:
    changed = replace(heart.card, refuses_countries=frozenset({"xx"}))
    heart.pulse.change(changed, Refusals(countries=frozenset({"xx"})))
    await until(lambda: len(heart.cards()) == 2)
    first, second = heart.cards()
    assert second.refuses_countries == {"xx"}
    assert second.sequence > first.sequence
    assert card_verifies(second)


@pytest.mark.parametrize(("after_ms", "cards"), [(CARD_LIFE_MS // 2 - 1, 1), (CARD_LIFE_MS // 2, 2), (CARD_LIFE_MS * 3, 2), (-60_000, 2)])
async def test_a_card_is_renewed_when_half_its_life_is_over_or_the_clock_was_set_back(heart: Heart, after_ms: int, cards: int) -> None:
    heart.clock.advance(after_ms)
    heart.pulse.introduce()  # the next beat, now
    await turns()
    heard = heart.cards()
    assert len(heard) == cards
    assert all(map(card_verifies, heard))
    assert sorted(card.sequence for card in heard) == list(dict.fromkeys(card.sequence for card in heard))
    assert heard[-1].expires_at_ms == heart.clock.wall_ms() + CARD_LIFE_MS or cards == 1
    assert why_card_refused(heard[-1], heard[0], verifies=True, now_ms=heart.clock.wall_ms()) is None


async def test_a_card_that_the_owner_changed_after_a_renewal_is_newer_than_that(heart: Heart) -> None:
    heart.clock.advance(CARD_LIFE_MS)
    heart.pulse.introduce()
    await turns()
    heart.pulse.change(heart.card, Refusals())  # numbered by the node, which doesn't know of the renewal
    await until(lambda: len(heart.cards()) == 3)
    sequences = [card.sequence for card in heart.cards()]
    assert sequences == sorted(set(sequences))


# what the hub says
def says(heart: Heart, message: m.Message, reply: str = "") -> None:
    heart.pulse.on_hub(Delivery(subjects.hold(heart.card.node_id), reply, codec.encode(message), False))


@pytest.mark.parametrize("reply", ["", "hub.echo.another.rtt-1", "keys", "rsp.gw.node.rtt-1"])
async def test_the_hub_gets_its_echo_where_the_table_says_and_nowhere_else(heart: Heart, reply: str) -> None:
    before = len(heart.broker.sent)
    says(heart, m.Ping(attempt_id=AttemptId("rtt-0af3")), reply)
    await turns()
    assert heart.broker.sent[before:] == [(f"hub.echo.{KEY.public}.rtt-0af3", codec.encode(m.Alive()))]


NO_ECHO = ["", "rtt", "0af3", "xrtt-1", "RTT-1", "rtt-a.b", "rtt-*", "rtt->", "rtt- ", "rtt-ü", "rtt-" + "a" * 200]


@pytest.mark.parametrize("id", NO_ECHO, ids=ascii)
async def test_nothing_else_is_answered(heart: Heart, id: str) -> None:
    """The hub can't have a node speak on other subjects, and learns nothing of attempts."""
    before = len(heart.broker.sent)
    says(heart, m.Ping(attempt_id=AttemptId(id)))
    says(heart, m.Hold(sequence=1, models=()))
    await turns()
    assert heart.broker.sent[before:] == []
    says(heart, m.Ping(attempt_id=AttemptId("rtt-1")))
    await turns()
    assert len(heart.broker.sent_to("hub.echo.")) == 1, "it goes on"


async def test_echoes_that_wait_are_bounded_and_a_lost_broker_ends_nothing(heart: Heart) -> None:
    for number in range(2 * ECHOES_WAITING_MAX):
        says(heart, m.Ping(attempt_id=AttemptId(f"rtt-{number}")))
    await turns()
    assert len(heart.broker.sent_to("hub.echo.")) == ECHOES_WAITING_MAX
    heart.broker.up = False
    says(heart, m.Ping(attempt_id=AttemptId("rtt-lost")))
    await turns()
    heart.broker.up = True
    says(heart, m.Ping(attempt_id=AttemptId("rtt-last")))
    await turns()
    assert [subject for subject, _ in heart.broker.sent if "hub.echo" in subject][-1].endswith("rtt-last")
    assert heart.broker.sent_to("hub.echo.")[ECHOES_WAITING_MAX:] == [codec.encode(m.Alive())]


async def test_a_hub_that_does_not_know_us_is_told(heart: Heart) -> None:
    before = len(heart.broker.sent_to("hb."))
    says(heart, m.Introduce(gateway_id=GatewayId("hub")))
    await turns()
    beat = codec.read_heartbeat(heart.broker.sent_to("hb.")[before], f"hb.{KEY.public}")
    assert beat.card is not None
    assert heart.broker.sent_to("hub.echo.") == []

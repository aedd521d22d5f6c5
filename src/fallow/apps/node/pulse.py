"""A node's heartbeat: that it lives, how busy it is, who it is when somebody needs to know; and its echo when the hub asks for one."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

import msgspec

from fallow.apps.node.seals import Seals
from fallow.apps.node.served import Served
from fallow.core import cards, roster
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import AttemptId
from fallow.model.offer import Offer, Price
from fallow.model.owner import Refusals
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects
from fallow.wire.sign import Sign, signed_card

OFFER_LIFE_MS = 24 * 3_600_000
PRICE_MS = 60_000
"""For so long after a price rose, calls that were made for the old one are still taken."""
FIRST_BEATS_MS = 3_000
FIRST_BEAT_S = 0.2
"""A newcomer beats faster for a moment: gateways that start at the same time hear of it at once."""

ECHOES_WAITING_MAX = 16
"""Echoes for the hub that aren't sent yet; what is asked beyond that is dropped. A hub asks once a second at most."""

log = logging.getLogger("fallow.node")


class Pulse:
    """Beats until cancelled. `sign` is of the node's own key; the card is signed anew when it changes and when half its life is over."""

    def __init__(
        self, card: Card, served: Sequence[Served], running: Callable[[Served], int], bus: Bus, clock: Clock, sign: Sign, seals: Seals
    ) -> None:
        self._sign = sign
        self._seals = seals
        self._card = signed_card(cards.renewed(card, after=card.sequence - 1, now_ms=clock.wall_ms()), sign)
        self._served = served
        self._running = running
        self._bus = bus
        self._clock = clock
        self._sequence = clock.wall_ms()
        self._asked = asyncio.Event()
        self._refusals = Refusals()
        self._echoes: asyncio.Queue[AttemptId] = asyncio.Queue(ECHOES_WAITING_MAX)
        self.state: m.NodeState = "run"
        self._prices: dict[str, dict[Price, int | None]] = {}
        """By model, what is asked, and what was asked with the time until when that still counts."""

    def introduce(self) -> None:
        """Somebody doesn't know us yet."""
        self._asked.set()

    def on_hub(self, delivery: Delivery) -> None:
        """The hub doesn't know us yet, or asks how far we are. Its plans are another's to follow."""
        try:
            message = codec.from_hub.read(delivery.data)
        except WireError as error:
            log.warning("a message of the hub was dropped: %s", error)
            return
        if isinstance(message, m.Introduce):
            self.introduce()
        elif isinstance(message, m.Ping) and message.attempt_id.startswith(subjects.ECHO_PREFIX) and not self._echoes.full():
            self._echoes.put_nowait(message.attempt_id)

    async def echo(self) -> None:
        """Give the hub its echoes until cancelled, each where the subject table says, and nowhere else."""
        while True:
            attempt_id = await self._echoes.get()
            try:
                await self._bus.publish(subjects.echo(self._card.node_id, attempt_id), codec.encode(m.Alive()))
            except (BrokerLost, WireError) as error:
                log.debug("no echo for the hub: %s", error.message)

    def change(self, card: Card, refusals: Refusals) -> None:
        """The owner allows something else: everyone gets the card and the offers anew, at once."""
        self._renew(card)
        self._refusals = refusals
        self._asked.set()

    async def run(self) -> None:
        full = True
        started = renewed = self._clock.now_ms()
        while True:
            full = full or self._clock.now_ms() - renewed > OFFER_LIFE_MS // 2
            if cards.is_due(self._card, now_ms=self._clock.wall_ms()):
                self._renew(self._card)
                full = True
            full = self._seals.rotate() or full
            try:
                await self.beat(full=full)
                renewed = self._clock.now_ms() if full else renewed
                full = False
            except BrokerLost:
                full = True
            is_new = self._clock.now_ms() - started < FIRST_BEATS_MS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_BEAT_S if is_new or full else roster.BEAT_MS / 1000):
                    await self._asked.wait()
                full = True
            self._asked.clear()

    async def beat(self, *, full: bool) -> None:
        """One heartbeat, with card and offers if `full`; raises BrokerLost."""
        self._sequence += 1
        node_id = self._card.node_id
        expires = self._clock.wall_ms() + OFFER_LIFE_MS
        beat = m.Heartbeat(
            node_id=node_id,
            sequence=self._sequence,
            state=self.state,
            card_sequence=self._card.sequence,
            loads=tuple(one.load(running=self._running(one)) for one in self._offered()),
            card=self._card if full else None,
            offers=tuple(self._offer(one, expires) for one in self._offered()) if full else None,
            kem=self._seals.kem if full else None,
        )
        await self._bus.publish(subjects.heartbeat(node_id), codec.encode(beat))

    def prices(self, model: str) -> list[Price]:
        """What the model's offers asked within the last minute, and what they ask."""
        now = self._clock.now_ms()
        return [price for price, until_ms in self._prices.get(model, {}).items() if until_ms is None or now <= until_ms]

    def _renew(self, card: Card) -> None:
        self._card = signed_card(cards.renewed(card, after=self._card.sequence, now_ms=self._clock.wall_ms()), self._sign)

    def _offered(self) -> list[Served]:
        refused = self._refusals
        return [one for one in self._served if one.model not in refused.models and one.paths - refused.paths]

    def _offer(self, one: Served, expires_at_ms: int) -> Offer:
        offer = one.offer(self._card.node_id, expires_at_ms)
        now, before = self._clock.now_ms(), self._prices.get(offer.model, {})
        ended = {price: now + PRICE_MS if until_ms is None else until_ms for price, until_ms in before.items()}
        self._prices[offer.model] = {price: until_ms for price, until_ms in ended.items() if now <= until_ms} | {offer.price: None}
        return msgspec.structs.replace(offer, paths=offer.paths - self._refusals.paths) if self._refusals.paths else offer

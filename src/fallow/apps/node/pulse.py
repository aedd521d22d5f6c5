"""A node's heartbeat: that it lives, how busy it is, and who it is when somebody needs to know."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import msgspec

from fallow.apps.node.served import Served
from fallow.core import roster
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost
from fallow.model.offer import Offer
from fallow.model.owner import Refusals
from fallow.ports import Bus, Clock
from fallow.wire import codec, subjects

OFFER_LIFE_MS = 24 * 3_600_000
FIRST_BEATS_MS = 3_000
FIRST_BEAT_S = 0.2
"""A newcomer beats faster for a moment: gateways that start at the same time hear of it at once."""


class Pulse:
    """Beats until cancelled."""

    def __init__(self, card: Card, served: Sequence[Served], running: Callable[[Served], int], bus: Bus, clock: Clock) -> None:
        self._card = card
        self._served = served
        self._running = running
        self._bus = bus
        self._clock = clock
        self._sequence = clock.wall_ms()
        self._asked = asyncio.Event()
        self._refusals = Refusals()
        self.state: m.NodeState = "run"

    def introduce(self) -> None:
        """Somebody doesn't know us yet."""
        self._asked.set()

    def change(self, card: Card, refusals: Refusals) -> None:
        """The owner allows something else: everyone gets the card and the offers anew, at once."""
        self._card = card
        self._refusals = refusals
        self._asked.set()

    async def run(self) -> None:
        full = True
        started = renewed = self._clock.now_ms()
        while True:
            full = full or self._clock.now_ms() - renewed > OFFER_LIFE_MS // 2
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
        )
        await self._bus.publish(subjects.heartbeat(node_id), codec.encode(beat))

    def _offered(self) -> list[Served]:
        refused = self._refusals
        return [one for one in self._served if one.model not in refused.models and one.paths - refused.paths]

    def _offer(self, one: Served, expires_at_ms: int) -> Offer:
        offer = one.offer(self._card.node_id, expires_at_ms)
        return msgspec.structs.replace(offer, paths=offer.paths - self._refusals.paths) if self._refusals.paths else offer

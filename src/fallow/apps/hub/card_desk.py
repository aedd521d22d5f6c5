"""The hub's desk for the public log of cards: what nodes said of themselves, in the order in which the hub heard it."""

import asyncio
import logging
from collections import deque

from fallow.model.card import Card
from fallow.model.errors import StoreFailed
from fallow.ports import CardLog, Clock
from fallow.wire.sign import whole_card

WAITING_MAX = 20_000
"""Cards that wait to be written; beyond that the oldest are left out, which is logged."""
AGAIN_S = 1.0

log = logging.getLogger("fallow.hub")


class CardDesk:
    """Writes cards down as they come, without keeping the hub's loop waiting."""

    def __init__(self, cards: CardLog, clock: Clock) -> None:
        self._cards = cards
        self._clock = clock
        self._waiting: deque[Card] = deque()
        self._came = asyncio.Event()

    def take(self, card: Card) -> None:
        """A card that is believed."""
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            log.warning("a card isn't in the log: %d wait to be written", WAITING_MAX)
        self._waiting.append(card)
        self._came.set()

    async def run(self) -> None:
        """Until cancelled. A database that fails is tried again."""
        while True:
            await self._came.wait()
            self._came.clear()
            while self._waiting:
                card = self._waiting[0]
                try:
                    await asyncio.to_thread(self._cards.append, card.node_id, whole_card(card), at_ms=self._clock.wall_ms())
                except StoreFailed as error:
                    log.warning("a card isn't in the log yet: %s", error.message)
                    await asyncio.sleep(AGAIN_S)
                else:
                    if self._waiting and self._waiting[0] is card:
                        self._waiting.popleft()

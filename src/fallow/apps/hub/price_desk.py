"""The hub's price desk: looks at what is offered, moves the price index, tells everyone, and answers how it went."""

import asyncio
import logging
from collections.abc import Sequence

from fallow.adapters.price_record import PriceRecord
from fallow.apps.hub.listening import GROUP, HubRoster
from fallow.core.price_index import Entry, PriceIndex, shown, step, supplies_of, thinned
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, WireError
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

LOOK_S = 5.0
PUBLISH_MS = 30_000
"""A newcomer hears of the index no later than that."""
ANSWERS_MAX = 16
"""Questions that are being answered at the same time; who asks beyond that is not heard."""

log = logging.getLogger("fallow.hub")


class PriceDesk:
    """Holds the index. Times in it are UTC, so that it goes on after a restart."""

    def __init__(self, bus: Bus, roster: HubRoster, record: PriceRecord, clock: Clock) -> None:
        self._bus = bus
        self._roster = roster
        self._record = record
        self._clock = clock
        self._index = record.index()
        self._sequence = clock.wall_ms()
        self._published_ms: int | None = None
        self._answers: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @property
    def index(self) -> PriceIndex:
        return self._index

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Answer questions from now on; raises BrokerLost."""
        self._group = group
        await self._bus.subscribe(subjects.HISTORY.pattern, self._on_query, group=GROUP)

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Take in what is offered now. What moved is remembered and told at once, the rest is told now and then."""
        before = {entry.key: entry.moved_at_ms for entry in self._index.entries}
        wall = self._clock.wall_ms()
        self._index = step(self._index, supplies_of(self._roster.members().values()), now_ms=wall)
        moved = [entry for entry in self._index.entries if before.get(entry.key) != entry.moved_at_ms]
        if moved:
            self._record.keep(self._index, [shown(entry) for entry in moved], now_ms=wall)
        now = self._clock.now_ms()
        if moved or self._published_ms is None or now - self._published_ms >= PUBLISH_MS:
            await self._publish(self._index.entries, now)

    async def _publish(self, entries: Sequence[Entry], now_ms: int) -> None:
        self._sequence += 1
        try:
            index = m.Index(sequence=self._sequence, prices=tuple(shown(entry) for entry in entries))
            await self._bus.publish(subjects.INDEX.pattern, codec.encode(index))
        except BrokerLost:
            self._published_ms = None  # it is tried again with the next look
        else:
            self._published_ms = now_ms

    def _on_query(self, delivery: Delivery) -> None:
        try:
            query = codec.history_query.read(delivery.data)
        except WireError as error:
            log.warning("a question about prices was dropped: %s", error)
            return
        if len(self._answers) >= ANSWERS_MAX:
            log.warning("a question about prices was dropped: %d are being answered", ANSWERS_MAX)
            return
        assert self._group is not None, "questions come only while the hub runs"
        task = self._group.create_task(self._answer(delivery.reply, query.model))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, subject: str, model: str) -> None:
        try:
            await self._bus.publish(subject, encode_history(self._record.rows(model)))
        except BrokerLost:
            log.debug("not answered: the broker is away")


def encode_history(rows: Sequence[m.IndexPrice]) -> bytes:
    """The past as it is sent: thinned until one message carries it."""
    rows_max = m.HISTORY_PRICES_MAX
    while True:
        try:
            return codec.encode(m.HistoryAnswer(prices=thinned(rows, rows_max)))
        except WireError:
            rows_max //= 2  # long names

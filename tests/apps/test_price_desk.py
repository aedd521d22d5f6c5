"""The hub's price desk: what it tells, when, what it remembers over a restart, and what it answers."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.price_record import KEPT_MS, SPARE_ROWS, PriceRecord
from fallow.apps.hub.listening import HubRoster
from fallow.apps.hub.price_desk import PUBLISH_MS, PriceDesk, encode_history
from fallow.apps.node.served import load_of
from fallow.core.price_index import INTERVAL_MS, PriceIndex, thinned
from fallow.core.roster import BEAT_MS
from fallow.model import messages as m
from fallow.model.offer import Price
from fallow.wire import codec, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import MODEL, FakeClock, Overheard, beat_of, believed, offer_of, turns
else:
    from one_loop import MODEL, FakeClock, Overheard, beat_of, believed, offer_of, turns

pytestmark = pytest.mark.anyio

ASK = Price(prompt_micro_per_munit=800, output_micro_per_munit=80_000)


class Hub:
    """The desk and its roster; a hand plays one node that is busy or not."""

    def __init__(self, data: Path, clock: FakeClock) -> None:
        self.data = data
        self.clock = clock
        self.broker = Overheard()
        self.hand = MemoryBus(self.broker)
        bus = MemoryBus(self.broker)
        self.roster = HubRoster(bus, clock, verify=believed)
        self.desk = PriceDesk(bus, self.roster, PriceRecord(data), clock)
        self.sequence = 0

    async def beat(self, *, running: int = 0) -> None:
        self.sequence += 1
        offer = msgspec.structs.replace(offer_of("node-a"), price=ASK)
        beat = msgspec.structs.replace(beat_of("node-a", self.sequence, offers=(offer,)), loads=(load_of(MODEL, 2, 2, running),))
        await self.hand.publish("hb.node-a", codec.encode(beat))
        await turns()

    async def passes(self, ms: int, *, running: int = 0) -> None:
        """Time passes, and the node beats."""
        for _ in range(0, ms, BEAT_MS * 5):
            self.clock.advance(min(ms, BEAT_MS * 5))
            await self.beat(running=running)
            await self.desk.look()

    def told(self) -> list[m.Index]:
        return [codec.index.read(data) for data in self.broker.sent_to(subjects.INDEX.pattern)]

    async def ask(self, model: str) -> tuple[m.IndexPrice, ...]:
        question = codec.encode(m.HistoryQuery(model=model))
        return codec.history_answer.read(await self.hand.request(subjects.HISTORY.pattern, question, within_s=5)).prices


@pytest.fixture
async def group() -> AsyncIterator[asyncio.TaskGroup]:
    async with asyncio.TaskGroup() as found:
        yield found


async def start(data: Path, group: asyncio.TaskGroup, clock: FakeClock | None = None) -> Hub:
    hub = Hub(data, clock or FakeClock())
    await hub.roster.start()
    await hub.desk.start(group)
    return hub


async def test_the_first_offer_makes_a_price_that_is_told_at_once(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    await hub.desk.look()
    await hub.beat()
    await hub.desk.look()
    [entry] = hub.told()[-1].prices
    assert (entry.model, entry.hardware, entry.utilisation) == (MODEL, "cpu", 0.0)
    assert entry.price == Price(prompt_micro_per_munit=1_000, output_micro_per_munit=100_000)


async def test_the_index_is_told_when_it_moves_and_now_and_then(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    await hub.beat()
    await hub.desk.look()
    await hub.desk.look()
    assert len(hub.told()) == 1
    await hub.passes(INTERVAL_MS, running=2)
    told = hub.told()
    assert len(told) == 1 + INTERVAL_MS // PUBLISH_MS
    assert [index.sequence for index in told] == sorted({index.sequence for index in told})
    assert told[-1].prices[0].price.output_micro_per_munit < 100_000, "it was idle at first"
    await hub.passes(4 * INTERVAL_MS, running=2)
    assert hub.told()[-1].prices[0].price.output_micro_per_munit > told[-1].prices[0].price.output_micro_per_munit
    assert hub.told()[-1].prices[0].utilisation > 0.9


async def test_a_broker_that_is_away_costs_a_word_and_no_move(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    await hub.beat()
    hub.broker.stop()
    await hub.desk.look()
    assert hub.told() == []
    assert len(hub.desk.index.entries) == 1
    hub.broker.up = True
    await hub.desk.look()
    assert len(hub.told()) == 1


async def test_a_restart_forgets_nothing(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    await hub.beat()
    await hub.desk.look()
    await hub.passes(3 * INTERVAL_MS, running=2)
    before, past = hub.desk.index, await hub.ask(MODEL)
    again = await start(tmp_path, group, hub.clock)
    assert [(entry.key, entry.price) for entry in again.desk.index.entries] == [(entry.key, entry.price) for entry in before.entries]
    assert await again.ask(MODEL) == past
    await again.desk.look()
    assert [one.price for one in again.told()[0].prices] == [entry.price for entry in before.entries], "before any node was heard"


async def test_the_past_has_a_row_for_each_interval(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    assert await hub.ask(MODEL) == ()
    await hub.beat()
    await hub.desk.look()
    await hub.passes(4 * INTERVAL_MS)
    rows = await hub.ask(MODEL)
    assert [row.at_ms - rows[0].at_ms for row in rows] == [n * INTERVAL_MS for n in range(5)]
    assert [row.price.output_micro_per_munit for row in rows] == [100_000, 95_000, 90_250, 85_737, 81_450]
    assert await hub.ask("") == rows
    assert await hub.ask("other") == ()


async def test_a_question_that_can_not_be_read_is_not_answered(tmp_path: Path, group: asyncio.TaskGroup) -> None:
    hub = await start(tmp_path, group)
    await hub.hand.publish(subjects.HISTORY.pattern, b"\x02nonsense", reply="rsp.x.y.z")
    await turns()
    assert hub.broker.sent_to("rsp.") == []


# what is kept
def row(at_ms: int, model: str = MODEL, output: int = 7) -> m.IndexPrice:
    return m.IndexPrice(model=model, hardware="cpu", price=Price(output_micro_per_munit=output), utilisation=0.5, at_ms=at_ms)


def test_the_record_keeps_a_month_and_a_bounded_file(tmp_path: Path) -> None:
    record = PriceRecord(tmp_path, rows_max=100)
    for n in range(0, 3_000, 50):
        record.keep(PriceIndex(), [row(n + more) for more in range(50)], now_ms=n)
    assert [one.at_ms for one in record.rows()] == list(range(2_900, 3_000))
    file = tmp_path / "prices" / "history.jsonl"
    assert len(file.read_bytes().splitlines()) <= 125 + SPARE_ROWS
    assert file.stat().st_mode & 0o077 == 0
    assert PriceRecord(tmp_path, rows_max=100).rows() == record.rows()
    record.keep(PriceIndex(), [], now_ms=2_950 + KEPT_MS)
    assert [one.at_ms for one in record.rows()] == list(range(2_950, 3_000))


def test_a_line_that_a_crash_cut_off_costs_that_line(tmp_path: Path) -> None:
    PriceRecord(tmp_path).keep(PriceIndex(), [row(1), row(2)], now_ms=2)
    file = tmp_path / "prices" / "history.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    again = PriceRecord(tmp_path)
    assert again.rows() == [row(1)]
    again.keep(PriceIndex(), [row(3)], now_ms=3)
    assert PriceRecord(tmp_path).rows() == [row(1), row(3)]


def test_an_index_that_can_not_be_read_is_none(tmp_path: Path) -> None:
    PriceRecord(tmp_path)
    (tmp_path / "prices" / "index.json").write_text('[["half')
    assert PriceRecord(tmp_path).index() == PriceIndex()


# what is sent of it
@pytest.mark.parametrize(("count", "rows_max", "sent"), [(5, 10, 5), (10, 10, 10), (11, 10, 6), (100, 10, 10), (0, 10, 0)])
def test_a_long_past_is_thinned_from_its_end(count: int, rows_max: int, sent: int) -> None:
    rows = [row(n) for n in range(count)]
    kept = thinned(rows, rows_max)
    assert len(kept) == sent
    assert kept[-1:] == tuple(rows[-1:])
    gaps = {after.at_ms - before.at_ms for before, after in itertools.pairwise(kept)}
    assert len(gaps) <= 1


def test_thinning_is_fair_to_models_with_little_past() -> None:
    rows = sorted([row(n) for n in range(1_000)] + [row(990, "young")], key=lambda one: one.at_ms)
    assert row(990, "young") in thinned(rows, 100)


def test_a_past_of_long_names_still_fits_into_a_message() -> None:
    rows = [row(n, "é" * 100, 2**40) for n in range(2_000)]
    answer = codec.history_answer.read(encode_history(rows))
    assert answer.prices[-1] == rows[-1]
    assert 200 < len(answer.prices) <= m.HISTORY_PRICES_MAX

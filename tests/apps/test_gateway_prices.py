"""`/v1/prices`: the index as the gateway heard it, its past as the hub remembers it, and neither without a key."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.price_record import PriceRecord
from fallow.apps.gateway import prices
from fallow.apps.hub.listening import HubRoster
from fallow.apps.hub.price_desk import PriceDesk
from fallow.core.price_index import PriceIndex
from fallow.model import messages as m
from fallow.model.needs import HardwareKind
from fallow.model.offer import Price
from fallow.wire import codec, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import Network, believed, turns
else:
    from one_loop import Network, believed, turns

pytestmark = pytest.mark.anyio

AT_MS = 1_790_000_000_000


def one(model: str = "tiny", hardware: HardwareKind = "cpu", *, output: int = 800_001, at_ms: int = AT_MS) -> m.IndexPrice:
    price = Price(prompt_micro_per_munit=80_000, cached_prompt_micro_per_munit=1, output_micro_per_munit=output)
    return m.IndexPrice(model=model, hardware=hardware, price=price, utilisation=0.71239, at_ms=at_ms)


def view(model: str = "tiny", hardware: str = "cpu", *, output: float = 0.800001, at: str = "2026-09-21T14:13:20Z") -> dict[str, Any]:
    return {
        "model": model,
        "hardware": hardware,
        "prompt": 0.08,
        "cached_prompt": 0.000001,
        "output": output,
        "utilisation": 0.712,
        "at": at,
    }


async def tell(network: Network, *known: m.IndexPrice) -> None:
    await network.hand.publish(subjects.INDEX.pattern, codec.encode(m.Index(sequence=1, prices=known)))
    await turns()


async def desk(network: Network, data: Path, *past: m.IndexPrice) -> None:
    """A hub that remembers this."""
    record = PriceRecord(data)
    record.keep(PriceIndex(), past, now_ms=AT_MS)
    roster = HubRoster(network.hub_bus, network.clock, verify=believed)
    await PriceDesk(network.hub_bus, roster, record, network.clock).start(network._desk_group)


async def test_prices_are_told_in_credits_per_million_tokens() -> None:
    async with Network() as network:
        await tell(network, one(), one(hardware="gpu", output=0))
        call = await network.get("/v1/prices")
        assert call.status == 200
        assert call.json == {
            "object": "list",
            "unit": "credits per million tokens",
            "data": [view(), view(hardware="gpu", output=0.0)],
        }


async def test_one_model_comes_with_its_past(tmp_path: Path) -> None:
    async with Network() as network:
        await desk(network, tmp_path, one(at_ms=AT_MS - 60_000, output=1_000_000), one("other"), one())
        await tell(network, one(), one("other"))
        call = await network.get("/v1/prices/tiny")
        assert call.status == 200
        assert call.json["data"] == [view()]
        assert call.json["history"] == [view(output=1.0, at="2026-09-21T14:12:20Z"), view()]


async def test_what_is_not_offered_any_more_has_a_past_only(tmp_path: Path) -> None:
    async with Network() as network:
        await desk(network, tmp_path, one("org/gone"))
        await tell(network, one())
        assert (await network.get("/v1/prices/org/gone")).json["data"] == []
        assert (await network.get("/v1/prices/org/gone")).json["history"] == [view("org/gone")]


async def test_while_the_hub_is_away_the_prices_are_told_and_their_past_is_not() -> None:
    async with Network() as network:
        await tell(network, one())
        call = await network.get("/v1/prices/tiny")
        assert (call.status, call.json["data"], call.json["history"]) == (200, [view()], None)


async def test_a_gateway_that_starts_late_asks_the_hub(tmp_path: Path) -> None:
    async with Network() as network:
        await desk(network, tmp_path, one(output=5), one())
        assert (await network.get("/v1/prices")).json["data"] == [view()]
        assert (await network.get("/v1/prices/tiny")).json["data"] == [view()]


async def test_before_anything_is_known_the_list_is_empty() -> None:
    async with Network() as network:
        assert (await network.get("/v1/prices")).json["data"] == []


@pytest.mark.parametrize("name", ["nobody", "", "x" * 201, "é" * 101])
async def test_a_model_without_a_price_is_named_as_such(tmp_path: Path, name: str) -> None:
    async with Network() as network:
        await desk(network, tmp_path, one())
        await tell(network, one())
        call = await network.get(f"/v1/prices/{name}")
        assert (call.status, call.code, call.json["error"]["param"]) == (404, "model_not_found", "model")


async def test_a_key_is_needed_and_nothing_can_be_posted() -> None:
    async with Network() as network:
        assert (await network.get("/v1/prices", key="fk-wrong")).status == 401
        call = await network.ask(path="/v1/prices").done()
        assert (call.status, call.code) == (405, "method_not_allowed")
        assert (await network.get("/v1/pricess")).status == 404


async def test_an_index_that_can_not_be_read_changes_nothing() -> None:
    async with Network() as network:
        await tell(network, one())
        await network.hand.publish(subjects.INDEX.pattern, b"\x02nonsense")
        await turns()
        assert (await network.get("/v1/prices")).json["data"] == [view()]


async def test_few_questions_wait_for_the_hub_at_a_time() -> None:
    async with Network() as network:
        asked: list[str] = []
        hub = MemoryBus(network.broker)
        await hub.subscribe(subjects.HISTORY.pattern, lambda delivery: asked.append(delivery.reply))
        await tell(network, one())
        calls = [network.ask(path="/v1/prices/tiny", body=b"", method="GET") for _ in range(prices.QUESTIONS_MAX + 5)]
        await turns()
        assert len(asked) == prices.QUESTIONS_MAX
        answer = codec.encode(m.HistoryAnswer(prices=(one(),)))
        for reply in asked:
            await hub.publish(reply, answer)
        ended = await asyncio.gather(*(call.done() for call in calls))
        assert [call.json["history"] for call in ended].count(None) == 5

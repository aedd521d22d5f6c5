"""What things go for: the hub's price index as this gateway heard it, and the past as the hub remembers it, for `/v1/prices`."""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from fallow.core.power import MICRO_PER_USD
from fallow.core.price_index import NAME_BYTES_MAX
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, Failure, WireError, shortened
from fallow.model.needs import HardwareKind
from fallow.ports import Bus, Delivery
from fallow.wire import codec, subjects

PATH = "/v1/prices"
HISTORY_S = 2.0
"""How long the hub may take to answer; without its answer the prices are told and their past isn't."""
QUESTIONS_MAX = 16
"""Questions to the hub at the same time; who asks beyond that is told the prices without their past."""

log = logging.getLogger("fallow.gateway")
_json = msgspec.json.Encoder()


class PriceView(msgspec.Struct, frozen=True, kw_only=True):
    """What a million tokens of a model go for on one kind of hardware. `utilisation` is the share of busy slots, `at` is UTC."""

    model: str
    hardware: HardwareKind
    prompt: float
    cached_prompt: float
    output: float
    utilisation: float
    at: str


class PriceList(msgspec.Struct, frozen=True, kw_only=True):
    """All prices now."""

    object: Literal["list"] = "list"
    unit: Literal["credits per million tokens"] = "credits per million tokens"
    data: list[PriceView]


class ModelPrices(msgspec.Struct, frozen=True, kw_only=True):
    """One model's prices, and how they went, oldest first; `history` is null when the hub can't be asked."""

    object: Literal["list"] = "list"
    unit: Literal["credits per million tokens"] = "credits per million tokens"
    data: list[PriceView]
    history: list[PriceView] | None


class Prices:
    """The index, in memory: it can be told while the hub is away."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._now: dict[tuple[str, str], m.IndexPrice] | None = None
        self._questions = 0

    async def start(self) -> None:
        """Hear the index from now on; raises BrokerLost."""
        await self._bus.subscribe(subjects.INDEX.pattern, self._on_index)

    async def answer(self, path: str) -> bytes | Failure:
        """The document at a path of `/v1/prices`, or why there is none."""
        if path == PATH:
            now = self._now if self._now is not None else _latest(await self._past("") or ())
            return _json.encode(PriceList(data=_views(now.values())))
        model = path.removeprefix(PATH + "/")
        past = await self._past(model) if 0 < len(model.encode()) <= NAME_BYTES_MAX else ()
        now = self._now if self._now is not None else _latest(past or ())
        here = _views(one for one in now.values() if one.model == model)
        if not here and not past:
            text = f"no price is known of the model {shortened(model)!r}; {PATH} lists those that have one"
            return Failure(code="model_not_found", message=text, param="model")
        return _json.encode(ModelPrices(data=here, history=None if past is None else _views(past)))

    def _on_index(self, delivery: Delivery) -> None:
        try:
            index = codec.index.read(delivery.data)
        except WireError as error:
            log.warning("a price index was dropped: %s", error)
            return
        self._now = {(one.model, one.hardware): one for one in index.prices}

    async def _past(self, model: str) -> tuple[m.IndexPrice, ...] | None:
        """What the hub remembers, oldest first; None if it can't be asked."""
        if self._questions >= QUESTIONS_MAX:
            return None
        self._questions += 1
        try:
            question = codec.encode(m.HistoryQuery(model=model))
            answer = await self._bus.request(subjects.HISTORY.pattern, question, within_s=HISTORY_S)
            return codec.history_answer.read(answer).prices
        except (BrokerLost, WireError):
            return None
        finally:
            self._questions -= 1


def _latest(rows: Iterable[m.IndexPrice]) -> dict[tuple[str, str], m.IndexPrice]:
    """The last of each model and kind of hardware: what a gateway tells that started a moment ago and hasn't heard the index."""
    return {(row.model, row.hardware): row for row in rows}


def _views(prices: Iterable[m.IndexPrice]) -> list[PriceView]:
    return [
        PriceView(
            model=one.model,
            hardware=one.hardware,
            prompt=one.price.prompt_micro_per_munit / MICRO_PER_USD,
            cached_prompt=one.price.cached_prompt_micro_per_munit / MICRO_PER_USD,
            output=one.price.output_micro_per_munit / MICRO_PER_USD,
            utilisation=round(one.utilisation, 3),
            at=datetime.fromtimestamp(one.at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        for one in prices
    ]

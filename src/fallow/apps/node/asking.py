"""What this node's offers ask: the lender's choice, the network's price index as it is heard, and never less than the floor."""

import logging
from collections.abc import Callable

from fallow.apps.settings import Settings
from fallow.core.power import MICRO_PER_USD
from fallow.core.price_index import INTERVAL_MS, Choice, follow
from fallow.model.errors import WireError
from fallow.model.needs import HardwareKind
from fallow.model.offer import Price
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

log = logging.getLogger("fallow.node")


def choice_of(settings: Settings) -> Choice:
    """How the lender's settings want to ask. A cached prompt costs what others do, where prices are fixed."""
    lend = settings.lend
    prompt = round(lend.usd_per_million_prompt * MICRO_PER_USD)
    fixed = Price(
        prompt_micro_per_munit=prompt,
        cached_prompt_micro_per_munit=prompt,
        output_micro_per_munit=round(lend.usd_per_million_output * MICRO_PER_USD),
    )
    return Choice(way=lend.price, fixed=fixed)


class Asking:
    """Hears the index, and lets `reprice` ask by it; that says whether anything is asked differently now.

    Once it did, the next index is taken no sooner than an interval later: the hub says it again. While the hub is away, the last
    one that was taken holds.
    """

    def __init__(self, choice: Choice, clock: Clock, reprice: Callable[[], bool]) -> None:
        self.choice = choice
        self._clock = clock
        self._reprice = reprice
        self._kind: HardwareKind = "cpu"
        self._prices: dict[str, Price] = {}
        self._changed_ms: int | None = None

    async def start(self, bus: Bus, kind: HardwareKind) -> None:
        """Hear the index from now on; `kind` is the hardware that this node lends. Raises BrokerLost."""
        self._kind = kind
        await bus.subscribe(subjects.INDEX.pattern, self._on_index)

    def ask(self, model: str, floor: Price) -> Price:
        """What an offer of the model asks now."""
        return follow(self._prices.get(model), floor, self.choice)

    def _on_index(self, delivery: Delivery) -> None:
        try:
            index = codec.index.read(delivery.data)
        except WireError as error:
            log.warning("a price index was dropped: %s", error)
            return
        now = self._clock.now_ms()
        if self._changed_ms is not None and now - self._changed_ms < INTERVAL_MS:
            return
        self._prices = {one.model: one.price for one in index.prices if one.hardware == self._kind}
        if self._reprice():
            self._changed_ms = now

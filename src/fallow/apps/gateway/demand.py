"""What callers ask of this gateway: counted per model and told to the hub, so that supply can follow."""

import asyncio

import msgspec

from fallow.apps.gateway.attempts import Outcome
from fallow.apps.gateway.history import Story
from fallow.core.demand import is_missed
from fallow.model import messages as m
from fallow.model.call import Call
from fallow.model.errors import BrokerLost
from fallow.model.ids import GatewayId
from fallow.model.receipt import Usage
from fallow.ports import Bus, Clock
from fallow.wire import codec, subjects

DEMAND_EVERY_S = 10.0
SPAN_MS_MAX = 3_600_000
NAME_BYTES_MAX = 200
MODELS_PER_MESSAGE = 256
"""Each takes less than 240 bytes, so that they fit into a message of the subject."""
NO_TOKENS = Usage()


class DemandCount:
    """Counts since the last report. `dropped` is how many calls weren't counted because too many models were named."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock) -> None:
        self._gateway_id = gateway_id
        self._bus = bus
        self._clock = clock
        self._counts: dict[str, m.ModelDemand] = {}
        self._since_ms = clock.now_ms()
        self._sequence = clock.wall_ms()
        self.dropped = 0

    def asked(self, call: Call) -> None:
        """A call has come."""
        self._add(call.needs.model, calls=1)

    def ended(self, call: Call, outcome: Outcome, story: Story | None) -> None:
        """It is over, well or not. The first byte is the first token only where the answer is streamed."""
        first_us = story.first_byte_us if story is not None and call.stream else None
        now = self._clock.wall_ms()
        usage = outcome.usage or NO_TOKENS
        missed = not outcome.left and is_missed(
            call.needs,
            failure_code=None if outcome.failure is None else outcome.failure.code,
            first_token_ms=None if first_us is None else first_us / 1000,
            end_ms=now - call.arrived_at_ms,
            ended_at_ms=now,
            usage=usage,
        )
        self._add(call.needs.model, missed=int(missed), prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens)

    def _add(self, model: str, *, calls: int = 0, missed: int = 0, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        known = self._counts.get(model)
        if known is None:
            if len(self._counts) >= m.DEMAND_MODELS_MAX or not model.isprintable() or not 0 < len(model.encode()) <= NAME_BYTES_MAX:
                self.dropped += calls
                return
            known = m.ModelDemand(model=model)
        self._counts[model] = msgspec.structs.replace(
            known,
            calls=known.calls + calls,
            missed=known.missed + missed,
            prompt_tokens=known.prompt_tokens + prompt_tokens,
            output_tokens=known.output_tokens + output_tokens,
        )

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(DEMAND_EVERY_S)
            await self.report()

    async def report(self) -> None:
        """Tell the hub what was asked; nothing if nothing was. What can't be told now is told with the next report."""
        now = self._clock.now_ms()
        span_ms = min(SPAN_MS_MAX, max(1, now - self._since_ms))
        counted, self._counts = list(self._counts.values()), {}
        told = 0
        try:
            while told < len(counted):
                some = tuple(counted[told : told + MODELS_PER_MESSAGE])
                self._sequence += 1
                demand = m.Demand(gateway_id=self._gateway_id, sequence=self._sequence, span_ms=span_ms, models=some)
                await self._bus.publish(subjects.DEMAND.pattern, codec.encode(demand))
                told += len(some)
            self._since_ms = now
        except BrokerLost:
            for one in counted[told:]:
                self._add(**msgspec.structs.asdict(one))

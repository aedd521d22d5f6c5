"""Tells the hub what keys with a budget have cost at this gateway, and hears what they have cost elsewhere."""

import asyncio
import logging

from fallow.core.budget import Purses
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import GatewayId
from fallow.ports import Bus, Clock
from fallow.wire import codec, subjects

TELL_EVERY_S = 2.0
ANSWER_S = 2.0
"""How long the hub has to answer; what it doesn't take note of is said again with the next report."""
LAST_S = 3.0
"""The same for all of the last report, when the gateway stops."""

log = logging.getLogger("fallow.gateway")


class SpendingReports:
    """Says what was spent since this process began, as often as calls of such keys come. Nothing waits here but the purses' sums."""

    def __init__(self, gateway_id: GatewayId, purses: Purses, bus: Bus, clock: Clock) -> None:
        self._gateway_id = gateway_id
        self._purses = purses
        self._bus = bus
        self._clock = clock
        self._since_ms = clock.wall_ms()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            await self.report()

    async def report(self) -> None:
        """Tell the hub, as far as it answers."""
        for keys in self._purses.to_say(now_ms=self._clock.now_ms()):
            said = m.Spent(gateway_id=self._gateway_id, since_ms=self._since_ms, keys=keys)
            try:
                data = await self._bus.request(subjects.spent(self._gateway_id), codec.encode(said), within_s=ANSWER_S)
                answer = codec.spent_answer.read(data)
            except (BrokerLost, WireError) as error:
                log.debug("the hub didn't hear what keys have cost: %s", error)
                return
            self._purses.answered(keys, answer.keys)

    async def report_last(self) -> None:
        """Once more before the end, when nothing is spent any more."""
        try:
            async with asyncio.timeout(LAST_S):
                await self.report()
        except TimeoutError:
            pass
        unsaid = self._purses.unsaid()
        if unsaid:
            log.warning("the hub doesn't know all that %d API keys have cost here: it could not be reached at the end", unsaid)

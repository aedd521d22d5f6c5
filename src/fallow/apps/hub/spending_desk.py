"""The hub's desk for budgets: keeps what API keys have cost on each gateway, and tells what they have cost on all of them."""

import asyncio
import logging

from fallow.apps.hub.listening import GROUP
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, StoreFailed, WireError
from fallow.ports import Bus, Delivery, Registry
from fallow.wire import codec, subjects

AT_ONCE_MAX = 2
"""Reports that are written at the same time: the other desks need threads too."""
WAITING_MAX = 256
"""Reports under way. One beyond that is dropped, and said again by its gateway."""

log = logging.getLogger("fallow.hub")


class SpendingDesk:
    """Takes gateways' reports. A gateway speaks for itself only, of whichever keys it says were used there."""

    def __init__(self, bus: Bus, registry: Registry) -> None:
        self._bus = bus
        self._registry = registry
        self._turn = asyncio.Semaphore(AT_ONCE_MAX)
        self._waiting = 0
        self._troubled = False
        self._group: asyncio.TaskGroup | None = None

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Answer from now on; raises BrokerLost."""
        self._group = group
        await self._bus.subscribe(subjects.SPENT.pattern, self._on_report, group=GROUP)

    def _on_report(self, delivery: Delivery) -> None:
        try:
            told = codec.read_spent(delivery.data, delivery.subject)
        except WireError as error:
            log.warning("a report of what API keys cost was dropped: %s", error)
            return
        if self._waiting >= WAITING_MAX or not delivery.reply:
            log.info("a report of what API keys cost was dropped: %d are under way", self._waiting)
            return
        assert self._group is not None, "reports come only while the hub runs"
        self._waiting += 1
        self._group.create_task(self._answer(delivery.reply, told))

    async def _answer(self, subject: str, told: m.Spent) -> None:
        try:
            async with self._turn:
                answer = codec.encode(await asyncio.to_thread(self._keep, told))
            self._troubled = False
            await self._bus.publish(subject, answer)
        except StoreFailed as error:  # no answer: the gateway says it again
            if not self._troubled:
                log.warning("what API keys cost can't be kept now: %s; gateways go on counting", error)
            self._troubled = True
        except BrokerLost:
            log.debug("not answered: the broker is away")
        finally:
            self._waiting -= 1

    def _keep(self, told: m.Spent) -> m.SpentAnswer:
        """In a thread."""
        micro = {one.key_id: one.micro for one in sorted(told.keys, key=lambda one: one.micro)}
        totals = self._registry.spending.tell(told.gateway_id, told.since_ms, micro)
        keys = tuple(m.KeySpent(key_id=id, micro=min(total, m.SPENT_MICRO_MAX)) for id, total in totals.items())
        return m.SpentAnswer(keys=keys)

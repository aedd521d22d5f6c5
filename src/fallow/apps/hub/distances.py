"""The hub's desk for distances: asks nodes for echoes, so that the hub too believes no region that physics forbids."""

import logging

from fallow.apps.distances import Distances
from fallow.apps.hub.listening import HubRoster
from fallow.model import messages as m
from fallow.model.errors import WireError
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

log = logging.getLogger("fallow.hub")


class DistanceDesk:
    """Measures from the hub's country. Each hub hears all echoes, and takes those that it asked for."""

    def __init__(self, bus: Bus, roster: HubRoster, clock: Clock, country: str) -> None:
        self._bus = bus
        self.distances = Distances(roster, self._ask, clock, country, "hub")

    async def start(self) -> None:
        """Hear echoes from now on; raises BrokerLost."""
        await self._bus.subscribe(subjects.ECHO.pattern, self._on_echo)

    async def run(self) -> None:
        """Ask until cancelled; returns at once where the hub's country isn't known."""
        await self.distances.run()

    async def _ask(self, node_id: NodeId, attempt_id: AttemptId) -> None:
        await self._bus.publish(subjects.hold(node_id), codec.encode(m.Ping(attempt_id=attempt_id)))

    def _on_echo(self, delivery: Delivery) -> None:
        node_id, attempt_id = subjects.answering_node(delivery.subject), subjects.last_token(delivery.subject)
        if not self.distances.awaits(node_id, attempt_id):
            return  # late, made up, or for another hub
        try:
            codec.echo.read(delivery.data)
        except WireError as error:
            log.warning("an echo was dropped: %s", error)
            return
        self.distances.take(node_id, attempt_id)

"""The hub's placement desk: hears what callers ask for, plans which node should hold which models, and tells the nodes."""

import asyncio
import logging

from fallow.apps.hub.listening import HubRoster
from fallow.core.placement import PlacementState, models_for, plan
from fallow.core.supply import supplies_of, told_of
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, WireError, shortened
from fallow.model.ids import NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

PLACE_EVERY_S = 15.0
REPEAT_MS = 60_000
"""How often a node is told again what it should hold: a message may have been lost."""
REPORTS_MAX = 4_096
"""Reports of gateways between two plans; what comes beyond is dropped."""

log = logging.getLogger("fallow.hub")


class Placing:
    """Holds the plan, in memory only: after a restart it starts from what nodes have in memory, and from new reports."""

    def __init__(self, bus: Bus, roster: HubRoster, clock: Clock) -> None:
        self._bus = bus
        self._roster = roster
        self._clock = clock
        self._state = PlacementState()
        self._reports: list[m.Demand] = []
        self._planned_at_ms = clock.now_ms()
        self._told_at_ms: dict[NodeId, int] = {}
        self._sequence = clock.wall_ms()

    async def start(self) -> None:
        """Hear gateways from now on; raises BrokerLost."""
        await self._bus.subscribe(subjects.DEMAND.pattern, self._on_demand)

    async def run(self) -> None:
        """Plan until cancelled."""
        while True:
            await asyncio.sleep(PLACE_EVERY_S)
            await self.place()

    def _on_demand(self, delivery: Delivery) -> None:
        try:
            report = codec.demand.read(delivery.data)
        except WireError as error:
            log.warning("a report of demand was dropped: %s", error)
            return
        if len(self._reports) >= REPORTS_MAX:
            log.warning("a report of demand was dropped: %d came since the last plan", REPORTS_MAX)
            return
        self._reports.append(report)

    async def place(self) -> None:
        """Plan anew, and tell the nodes whose plan changed, and some of the others again."""
        now = self._clock.now_ms()
        members = self._roster.members()
        reports, self._reports = self._reports, []
        span_ms = max(1, now - self._planned_at_ms)
        self._planned_at_ms = now
        # Beside the event loop: with thousands of nodes this takes longer than a heartbeat should wait.
        reports = await asyncio.to_thread(told_of, reports, list(members.values()))
        supplies = await asyncio.to_thread(supplies_of, members)
        self._state, moves = await asyncio.to_thread(plan, self._state, supplies, reports, span_ms=span_ms, now_ms=now)
        for move in moves:
            log.debug("%s: %s %s (%s)", move.node_id, move.kind, shortened(move.model), shortened(move.why))
        changed = {move.node_id for move in moves}
        due = {node_id for node_id in self._state.held if now - self._told_at_ms.get(node_id, -REPEAT_MS) >= REPEAT_MS}
        self._told_at_ms = {node_id: at_ms for node_id, at_ms in self._told_at_ms.items() if node_id in self._state.held}
        for node_id in sorted(changed | due):
            await self._tell(node_id, now)

    async def _tell(self, node_id: NodeId, now_ms: int) -> None:
        self._sequence += 1
        hold = m.Hold(sequence=self._sequence, models=models_for(self._state, node_id))
        try:
            await self._bus.publish(subjects.hold(node_id), codec.encode(hold))
        except BrokerLost:
            self._told_at_ms.pop(node_id, None)
            return  # with the next plan
        self._told_at_ms[node_id] = now_ms

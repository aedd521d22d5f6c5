"""The node's side of placement: loads what the hub's plan wants here, within the owner's limits, and lets idle models go."""

import asyncio
import logging
from collections.abc import Callable, Collection

from fallow.apps.node.room import Room
from fallow.core.residency import IDLE_LEAVES_MS
from fallow.model import messages as m
from fallow.model.errors import WireError, shortened
from fallow.model.ids import NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

LOOK_S = 1.0
HOLD_LIFE_MS = 5 * 60_000
"""A plan that the hub doesn't repeat in this time is in force no longer: the hub is gone."""

log = logging.getLogger("fallow.node")


class Holding:
    """Follows the plan while `may_follow()`: the owner lets the machine work, and wants demand followed.

    `offered()` are the models of this room that the owner lets callers have now, `first` is the one that stays unless its memory
    is needed.
    """

    def __init__(
        self,
        node_id: NodeId,
        room: Room,
        bus: Bus,
        clock: Clock,
        *,
        offered: Callable[[], Collection[str]],
        may_follow: Callable[[], bool],
        first: str,
    ) -> None:
        self._node_id = node_id
        self._room = room
        self._bus = bus
        self._clock = clock
        self._offered = offered
        self._may_follow = may_follow
        self._first = first
        self._hold = m.Hold(sequence=-1, models=())
        self._heard_at_ms = clock.now_ms()

    async def run(self) -> None:
        """Until cancelled; raises BrokerLost if there is no broker to begin with."""
        await self._bus.subscribe(subjects.hold(self._node_id), self._on_hold)
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Load what is planned and isn't there, the most wanted first; end what is idle."""
        now = self._clock.now_ms()
        if not self._may_follow():
            self._room.held = frozenset()
            return
        offered = self._offered()
        planned = [model for model in self._hold.models if model in offered]
        self._room.held = frozenset(planned if self._is_in_force(now) else ())
        for model in planned if self._is_in_force(now) else ():
            if not self._room.invite(model, now):
                break
        stay = planned if now - self._heard_at_ms < HOLD_LIFE_MS + IDLE_LEAVES_MS else []
        left = self._room.clear_idle(frozenset({*stay, self._first}), now)
        if left:
            log.info("nobody asks for %s; its memory is free again", ", ".join(left))

    def _is_in_force(self, now_ms: int) -> bool:
        return now_ms - self._heard_at_ms < HOLD_LIFE_MS

    def _on_hold(self, delivery: Delivery) -> None:
        try:
            hold = codec.from_hub.read(delivery.data)
        except WireError as error:
            log.warning("a plan was dropped: %s", error)
            return
        if not isinstance(hold, m.Hold):
            return
        now = self._clock.now_ms()
        if hold.sequence < self._hold.sequence and self._is_in_force(now):
            return  # an older one, late
        if hold.models != self._hold.models:
            log.info("callers want here: %s", shortened(", ".join(hold.models)) or "nothing")
        self._hold, self._heard_at_ms = hold, now

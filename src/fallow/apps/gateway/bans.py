"""Nodes that the hub has put out: a gateway forgets them at once. Waiting for their heartbeats to be missed would take seconds."""

import logging
from collections.abc import Callable

from fallow.model.errors import WireError
from fallow.model.ids import NodeId
from fallow.ports import Bus, Delivery
from fallow.wire import codec, subjects

log = logging.getLogger("fallow.gateway")


async def hear_bans(bus: Bus, forget: Callable[[NodeId], None]) -> None:
    """Tell of each banned node from now on; raises BrokerLost."""

    def on_banned(delivery: Delivery) -> None:
        try:
            node_ids = codec.put_out.read(delivery.data).node_ids
        except WireError as error:
            log.warning("news of bans were dropped: %s", error)
            return
        for node_id in node_ids:
            forget(node_id)

    await bus.subscribe(subjects.BANNED.pattern, on_banned)

"""How far nodes are from a gateway: it asks where it also says everything else to them, and echoes come among the answers."""

from fallow.apps.distances import Distances
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.roster import Roster
from fallow.model import messages as m
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects


def distances_of(exchange: Exchange, roster: Roster, bus: Bus, clock: Clock, country: str) -> Distances:
    """What the gateway in this country measures. Whatever a node answers is an echo: that it knows the attempt no more, as a rule."""

    async def ask(node_id: NodeId, attempt_id: AttemptId) -> None:
        reply = subjects.answer(exchange.gateway_id, node_id, attempt_id)
        await bus.publish(subjects.control(node_id), codec.encode(m.Ping(attempt_id=attempt_id)), reply)

    def hear(delivery: Delivery) -> None:
        if not delivery.unheard:
            distances.take(subjects.answering_node(delivery.subject), subjects.last_token(delivery.subject))

    distances = Distances(roster, ask, clock, country, "gateway")
    exchange.on_other = hear
    return distances

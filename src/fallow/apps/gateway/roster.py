"""The gateway's view of the network: nodes and their live offers, in memory only."""

import logging
from typing import NamedTuple

from fallow.core import roster as core
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import GatewayId, NodeId
from fallow.model.offer import Load, Offer
from fallow.model.owner import State
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

NODES_MAX = 10_000

log = logging.getLogger("fallow.gateway")


class Told(NamedTuple):
    """What of an offer the market was told last."""

    offer: Offer
    card_sequence: int
    state: State
    readiness: str
    ready_in_ms: int | None
    waiting_max: int


class Roster:
    """Who is there. `market` is what matching looks at."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock) -> None:
        self._gateway_id = gateway_id
        self._bus = bus
        self._clock = clock
        self._members: dict[NodeId, core.Member] = {}
        self.market = Market()
        self._told: dict[NodeId, dict[str, Told]] = {}
        self._strangers: set[NodeId] = set()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.HEARTBEATS, self._on_heartbeat)

    def _on_heartbeat(self, delivery: Delivery) -> None:
        try:
            beat = codec.read_heartbeat(delivery.data, delivery.subject)
        except WireError as error:
            log.warning("a heartbeat was dropped: %s", error)
            return
        if beat.node_id not in self._members and len(self._members) >= NODES_MAX:
            log.warning("a heartbeat was dropped: the roster is full (%d nodes)", NODES_MAX)
            return
        now = self._clock.now_ms()
        member = core.hear(self._members.get(beat.node_id), beat, now_ms=now)
        if core.is_gone(member, now_ms=now):
            self.forget(beat.node_id)
            return
        self._members[beat.node_id] = member
        self._tell_market(beat.node_id, member, now)
        if core.is_stranger(member):
            self._strangers.add(beat.node_id)

    def _tell_market(self, node_id: NodeId, member: core.Member, now_ms: int) -> None:
        """What changed of a node's offers, and how much they run."""
        card, told = member.card, self._told.setdefault(node_id, {})
        loads = {load.model: load for load in member.loads}
        there = {offer.model: offer for offer in member.offers if offer.model in loads} if card is not None else {}
        if told.keys() - there.keys():
            self.market.drop(node_id, keep=there)
            self._told[node_id] = told = {model: told[model] for model in told if model in there}
        for model, offer in there.items():
            load = loads[model]
            assert card is not None, "a stranger has no offers"
            news = Told(offer, card.sequence, member.state, load.readiness, load.ready_in_ms, load.waiting_max)
            if told.get(model) != news:
                told[model] = news
                expires_s = (now_ms + offer.expires_at_ms - self._clock.wall_ms()) / 1000
                self.market.put(card, offer, load, member.state, expires_s=expires_s, now_s=now_ms / 1000)
            self.market.heard(node_id, model, running=_running(offer, load), now_s=now_ms / 1000)

    async def refresh(self) -> None:
        """Drop who is gone, look after the market, and ask strangers for their cards."""
        now = self._clock.now_ms()
        self.market.refresh(now_s=now / 1000)
        for node_id in [n for n, member in self._members.items() if core.is_gone(member, now_ms=now)]:
            self.forget(node_id)
        while self._strangers:
            node_id = self._strangers.pop()
            try:
                await self._bus.publish(subjects.control(node_id), codec.encode(m.Introduce(gateway_id=self._gateway_id)))
            except BrokerLost:
                return

    def forget(self, node_id: NodeId) -> None:
        """The node is gone; its next heartbeat brings it back."""
        if self._members.pop(node_id, None) is not None:
            self._told.pop(node_id, None)
            self.market.drop(node_id)

    def forget_all(self) -> None:
        """The broker went away, and with it all that we knew."""
        for node_id in list(self._members):
            self.forget(node_id)

    def moment(self) -> Moment:
        """Now, for matching."""
        return Moment(self._clock.wall_ms(), self._clock.now_ms() / 1000)

    def offers(self) -> list[Offer]:
        """All offers of nodes that are there."""
        return [told.offer for mine in self._told.values() for told in mine.values()]

    def card(self, node_id: NodeId) -> Card | None:
        member = self._members.get(node_id)
        return member.card if member else None

    def members(self) -> dict[NodeId, core.Member]:
        return dict(self._members)


def _running(offer: Offer, load: Load) -> int:
    """What an offer runs and keeps waiting."""
    return max(0, offer.slots - load.slots_free) + load.waiting

"""The gateway's view of the network: nodes and their live offers, in memory only."""

import logging
from collections import Counter

from fallow.core import roster as core
from fallow.core.match.candidate import Candidate
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import GatewayId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

NODES_MAX = 10_000

log = logging.getLogger("fallow.gateway")


class Roster:
    """Who is there. `candidates` is what matching looks at."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock) -> None:
        self._gateway_id = gateway_id
        self._bus = bus
        self._clock = clock
        self._members: dict[NodeId, core.Member] = {}
        self._in_flight: Counter[tuple[NodeId, str]] = Counter()
        self._at_beat: dict[tuple[NodeId, str], int] = {}
        self._strangers: set[NodeId] = set()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.HEARTBEATS, self._on_heartbeat)

    def _on_heartbeat(self, delivery: Delivery) -> None:
        try:
            beat = codec.heartbeat.read(delivery.data)
            subjects.token(beat.node_id)
        except WireError as error:
            log.warning("a heartbeat was dropped: %s", error)
            return
        if beat.node_id != subjects.last_token(delivery.subject) or not core.is_consistent(beat):
            log.warning("a heartbeat was dropped: it names another node than its subject")
            return
        if beat.node_id not in self._members and len(self._members) >= NODES_MAX:
            log.warning("a heartbeat was dropped: the roster is full (%d nodes)", NODES_MAX)
            return
        now = self._clock.now_ms()
        known = self._members.get(beat.node_id)
        member = core.hear(known, beat, now_ms=now)
        if known is not None:
            self._drop_counts(known)
        if core.is_gone(member, now_ms=now):
            self.forget(beat.node_id)
            return
        self._members[beat.node_id] = member
        for offer in member.offers:
            self._at_beat[offer.node_id, offer.model] = self._in_flight[offer.node_id, offer.model]
        if core.is_stranger(member):
            self._strangers.add(beat.node_id)

    async def refresh(self) -> None:
        """Drop who is gone, and ask strangers for their cards."""
        now = self._clock.now_ms()
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
        member = self._members.pop(node_id, None)
        if member is not None:
            self._drop_counts(member)

    def _drop_counts(self, member: core.Member) -> None:
        for offer in member.offers:
            self._at_beat.pop((offer.node_id, offer.model), None)

    def forget_all(self) -> None:
        """The broker went away, and with it all that we knew."""
        self._members.clear()
        self._at_beat.clear()

    def candidates(self) -> list[Candidate]:
        """All offers of nodes that are there."""
        found = []
        for node_id, member in self._members.items():
            if member.card is None:
                continue
            for offer in member.offers:
                load = core.load_of(member, offer.model)
                if load is None:
                    continue
                key = (node_id, offer.model)
                elsewhere = core.elsewhere(offer, load, ours_at_beat=self._at_beat.get(key, 0))
                found.append(
                    Candidate(
                        offer=offer,
                        card=member.card,
                        load=load,
                        state=member.state,
                        elsewhere=elsewhere,
                        in_flight=self._in_flight[key],
                    )
                )
        return found

    def began(self, node_id: NodeId, model: str) -> None:
        """A call was sent there."""
        self._in_flight[node_id, model] += 1

    def ended(self, node_id: NodeId, model: str) -> None:
        """It came back, well or not."""
        self._in_flight[node_id, model] -= 1
        if self._in_flight[node_id, model] <= 0:
            del self._in_flight[node_id, model]

    def card(self, node_id: NodeId) -> Card | None:
        member = self._members.get(node_id)
        return member.card if member else None

    def members(self) -> dict[NodeId, core.Member]:
        return dict(self._members)

"""The hub's view of the network: it hears heartbeats once, for all its desks that look at nodes and offers."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from fallow.apps.card_check import CardCheck, OrgOf, Verify, anyones
from fallow.apps.hub.refusals import Count, uncounted
from fallow.core import cards
from fallow.core import roster as core
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import GatewayId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects
from fallow.wire.sign import card_verifies

GROUP = "hub"
"""Hubs share questions: one of them answers."""
NODES_MAX = 10_000
REFRESH_S = 1.0
INTRODUCED_AS = GatewayId("hub")
"""Whom a node is asked to introduce itself to. Its answer is a heartbeat, which goes to everyone."""

log = logging.getLogger("fallow.hub")


def nothing(card: Card) -> None:
    """For who keeps no log of cards."""


class HubRoster:
    """Who is there, in memory only. `members` is what the hub's desks look at, `check` whose cards are believed.

    `org_of` says whose a card's node is, and is asked for every new card: it must not block. `on_card` is told each card that is
    believed and that the roster doesn't hold yet, on the event loop; it must return at once and must not raise. `count` is told of
    refused cards, and of heartbeats that are dropped.
    """

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        *,
        verify: Verify = card_verifies,
        org_of: OrgOf = anyones,
        on_card: Callable[[Card], None] = nothing,
        count: Count = uncounted,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self.cards_refused: Counter[cards.Reason] = Counter()
        self.check = CardCheck(clock, log, verify, org_of, self._count)
        self._on_card = on_card
        self._told = count
        self._members: dict[NodeId, core.Member] = {}
        self._strangers: set[NodeId] = set()

    async def start(self) -> None:
        """Hear heartbeats from now on; raises BrokerLost."""
        await self._bus.subscribe(subjects.HEARTBEATS, self._on_heartbeat)

    async def run(self) -> None:
        """Keep the list true until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Drop who is gone, and ask strangers for their cards."""
        now = self._clock.now_ms()
        for node_id in [n for n, member in self._members.items() if core.is_gone(member, now_ms=now)]:
            del self._members[node_id]
        while self._strangers:
            node_id = self._strangers.pop()
            try:
                await self._bus.publish(subjects.hold(node_id), codec.encode(m.Introduce(gateway_id=INTRODUCED_AS)))
            except BrokerLost:
                return  # the node's next heartbeat makes it a stranger again

    def members(self) -> dict[NodeId, core.Member]:
        """The nodes that are there now. Those without a card are known to exist, and offer nothing yet."""
        now = self._clock.now_ms()
        return {node_id: member for node_id, member in self._members.items() if not core.is_gone(member, now_ms=now)}

    def card(self, node_id: NodeId) -> Card | None:
        """What is believed of a node."""
        member = self._members.get(node_id)
        return member.card if member else None

    def put_out(self, node_id: NodeId, reason: cards.Reason, why: str) -> None:
        """The node's card isn't believed any more: the hub's desks see nothing that it offers until it brings one that is."""
        member = self._members.get(node_id)
        if member is not None and member.card is not None:
            self.check.refuse(member.card, reason, why)
            self._members[node_id] = cards.cardless(member)

    def _count(self, reason: cards.Reason) -> None:
        self.cards_refused[reason] += 1
        self._told("card", reason)

    def _on_heartbeat(self, delivery: Delivery) -> None:
        try:
            beat = codec.read_heartbeat(delivery.data, delivery.subject)
        except WireError as error:
            self._told("heartbeat", "malformed")
            log.warning("a heartbeat was dropped: %s", error)
            return
        known = self._members.get(beat.node_id)
        if known is None and len(self._members) >= NODES_MAX:
            self._told("heartbeat", "no_room")
            log.warning("a heartbeat was dropped: the hub follows %d nodes at most", NODES_MAX)
            return
        now = self._clock.now_ms()
        member = core.hear(known, self.check.screened(known, beat), now_ms=now)
        if core.is_gone(member, now_ms=now):
            self._members.pop(beat.node_id, None)
            return
        self._members[beat.node_id] = member = cards.lapsed(member, now_ms=self._clock.wall_ms())
        card = member.card
        if card is None:
            if self.check.may_ask(beat.node_id):
                self._strangers.add(beat.node_id)
        elif known is None or card != known.card:
            self._on_card(card)

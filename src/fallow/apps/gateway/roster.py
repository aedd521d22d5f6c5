"""The gateway's view of the network: nodes and their live offers, in memory only."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from fallow.apps.card_check import CardCheck, OrgOf, Verify, anyones
from fallow.core import cards
from fallow.core import roster as core
from fallow.core import standing as standings
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, Failure, WireError
from fallow.model.ids import GatewayId, NodeId
from fallow.model.offer import Load, Offer
from fallow.model.owner import State
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects
from fallow.wire.sign import card_verifies

NODES_MAX = 10_000
AWAY = frozenset({"node_unreachable", "node_silent", "not_opened"})
"""Failures that say that the node may be gone. Whether it is, its heartbeats tell."""

log = logging.getLogger("fallow.gateway")


class Told(NamedTuple):
    """What of an offer the market was told last."""

    offer: Offer
    card_sequence: int
    state: State
    readiness: str
    ready_in_ms: int | None
    waiting_max: int


class Stall:
    """What the market is told of offers: each change once."""

    def __init__(self, market: Market, clock: Clock) -> None:
        self._market = market
        self._clock = clock
        self._told: dict[NodeId, dict[str, Told]] = {}

    def show(self, node_id: NodeId, member: core.Member, now_ms: int) -> None:
        """What changed of a node's offers, and how much they run."""
        card, told = member.card, self._told.setdefault(node_id, {})
        loads = {load.model: load for load in member.loads}
        there = {offer.model: offer for offer in member.offers if offer.model in loads} if card is not None else {}
        if told.keys() - there.keys():
            self._market.drop(node_id, keep=there)
            self._told[node_id] = told = {model: told[model] for model in told if model in there}
        for model, offer in there.items():
            load = loads[model]
            assert card is not None, "a stranger has no offers"
            news = Told(offer, card.sequence, member.state, load.readiness, load.ready_in_ms, load.waiting_max)
            if told.get(model) != news:
                told[model] = news
                expires_s = (now_ms + offer.expires_at_ms - self._clock.wall_ms()) / 1000
                self._market.put(card, offer, load, member.state, expires_s=expires_s, now_s=now_ms / 1000)
            self._market.heard(node_id, model, running=_running(offer, load), now_s=now_ms / 1000)

    def clear(self, node_id: NodeId) -> None:
        """The node is gone."""
        self._told.pop(node_id, None)
        self._market.drop(node_id)

    def offers(self) -> list[Offer]:
        """All that is shown."""
        return [told.offer for mine in self._told.values() for told in mine.values()]


def uncounted(reason: cards.Reason) -> None:
    """For who keeps no figures."""


class Roster:
    """Who is there. `market` is what matching looks at, `check` whose cards are believed.

    `org_of` says whose a node is, where that is known; `refused` counts the cards that aren't believed.
    """

    def __init__(
        self,
        gateway_id: GatewayId,
        bus: Bus,
        clock: Clock,
        *,
        verify: Verify = card_verifies,
        org_of: OrgOf = anyones,
        refused: Callable[[cards.Reason], None] = uncounted,
    ) -> None:
        self._gateway_id = gateway_id
        self._bus = bus
        self._clock = clock
        self._members: dict[NodeId, core.Member] = {}
        self.check = CardCheck(clock, log, verify, org_of, refused)
        self.market = Market()
        self._stall = Stall(self.market, clock)
        self._strangers: set[NodeId] = set()
        self._suspected: set[NodeId] = set()
        """Those that the market was told are suspected."""

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
        known = self._members.get(beat.node_id)
        member = core.hear(known, self.check.screened(known, beat), now_ms=now)
        if core.is_gone(member, now_ms=now):
            self.forget(beat.node_id)
            return
        self._members[beat.node_id] = member = cards.lapsed(member, now_ms=self._clock.wall_ms())
        if core.stage(member, now_ms=now) == "here":
            self._suspect(beat.node_id, False)
        self._stall.show(beat.node_id, member, now)
        if core.is_stranger(member) and self.check.may_ask(beat.node_id):
            self._strangers.add(beat.node_id)

    def put_out(self, node_id: NodeId, reason: cards.Reason, why: str) -> None:
        """The node's card isn't believed any more: it gets no more calls until it brings one that is."""
        member = self._members.get(node_id)
        if member is not None and member.card is not None:
            self.check.refuse(member.card, reason, why)
            self._members[node_id] = member = cards.cardless(member)
            self._stall.show(node_id, member, self._clock.now_ms())

    async def refresh(self) -> None:
        """Drop who is gone, leave aside who may be, look after the market, and ask strangers for their cards."""
        now = self._clock.now_ms()
        self.market.refresh(now_s=now / 1000)
        for node_id in [n for n, member in self._members.items() if core.is_gone(member, now_ms=now)]:
            self.forget(node_id)
        suspects = core.suspects(self._members, now_ms=now)
        for node_id in self._suspected - suspects:
            self._suspect(node_id, False)
        for node_id in suspects - self._suspected:
            self._suspect(node_id, True)
        while self._strangers:
            node_id = self._strangers.pop()
            try:
                await self._bus.publish(subjects.control(node_id), codec.encode(m.Introduce(gateway_id=self._gateway_id)))
            except BrokerLost:
                return

    def forget(self, node_id: NodeId) -> None:
        """The node is gone; its next heartbeat brings it back."""
        if self._members.pop(node_id, None) is not None:
            self._suspect(node_id, False)
            self._stall.clear(node_id)

    def forget_all(self) -> None:
        """The broker went away, and with it all that we knew."""
        for node_id in list(self._members):
            self.forget(node_id)

    def heard(
        self,
        node_id: NodeId,
        failure: Failure | None,
        *,
        left: bool = False,
        promised_s: float = 0.0,
        took_s: float | None = None,
        kept: bool | None = None,
    ) -> None:
        """How an attempt ended. `left`: the caller went, and nothing is known of it.

        `promised_s` and `took_s` are the first token's, from the asking on, or the end's where only that can be told; `took_s` None:
        nobody looked. `kept` None: the promise is kept if the answer came about as soon as was promised.
        """
        if left:
            self.told(node_id, standings.Yielded())
        elif failure is None:
            if kept is None:
                kept = took_s is None or standings.keeps(promised_s=promised_s, took_s=took_s)
            self.told(node_id, standings.Succeeded(promised_s=promised_s, took_s=took_s, kept=kept))
        else:
            self.told(node_id, standings.Failed(code=failure.code))
            if failure.code == "leaving":
                self.forget(node_id)
            elif failure.code in AWAY and node_id in self._members:
                self._members[node_id] = core.doubt(self._members[node_id])
                self._suspect(node_id, True)

    def told(self, node_id: NodeId, event: standings.Event) -> None:
        """Something that a node's standing follows from."""
        self.market.told(node_id, event, now_s=self._clock.now_ms() / 1000)

    def _suspect(self, node_id: NodeId, suspected: bool) -> None:
        if suspected == (node_id in self._suspected):
            return
        (self._suspected.add if suspected else self._suspected.discard)(node_id)
        self.told(node_id, standings.Suspected() if suspected else standings.Heard())

    def moment(self) -> Moment:
        """Now, for matching."""
        return Moment(self._clock.wall_ms(), self._clock.now_ms() / 1000)

    def offers(self) -> list[Offer]:
        """All offers of nodes that are there."""
        return self._stall.offers()

    def card(self, node_id: NodeId) -> Card | None:
        member = self._members.get(node_id)
        return member.card if member else None

    def kem(self, node_id: NodeId) -> m.KemKey | None:
        """The key to which a session with the node is sealed, as it said last; whether the node signed it isn't checked here."""
        member = self._members.get(node_id)
        return member.kem if member else None

    def members(self) -> dict[NodeId, core.Member]:
        return dict(self._members)


def _running(offer: Offer, load: Load) -> int:
    """What an offer runs and keeps waiting."""
    return max(0, offer.slots - load.slots_free) + load.waiting

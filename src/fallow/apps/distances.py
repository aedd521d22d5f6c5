"""How far nodes are at most: gateways and hubs time echoes of those whose region could be a lie, and put the impossible ones out.

A node is asked over the broker, which only makes the way longer: what light couldn't do on the shorter way, it can't do on the longer one.
Nothing is believed of a late echo, and a node that gives none is left alone.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from fallow.apps.card_check import CardCheck
from fallow.core import cards
from fallow.core.geography import distance_km_least, is_known, region_in, why_region_impossible
from fallow.core.roster import Member
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Clock
from fallow.wire import subjects

LOOK_S = 1.0
WATCHED_MAX = 10_000
"""Nodes whose echoes are remembered: as many as a roster holds."""
FIRST_ECHOES = 4
"""So many echoes are asked for one after the other when a region is new."""
FIRST_EVERY_MS = 1_000
ECHO_EVERY_MS = 15 * 60_000
"""Then one in such a time: four an hour."""
ECHO_WITHIN_MS = 10_000
"""Questions are remembered for so long; an echo that comes later says nothing anyhow."""
ASKED_PER_LOOK_MAX = 200
"""Echoes asked for at a time; who is left is asked at the next look."""
QUICK_ECHOES_MIN = 2
"""One echo could be a slip of the clock, as when a machine sleeps while it waits: the second-quickest one counts."""
KEEP_MS = 24 * 3_600_000
"""For how long what was measured holds against a node whose region stays the same. It may have moved."""
MOVES_IN_MS = 10 * 60_000
"""Nobody is somewhere else so soon: who names another region is judged by these echoes as well."""
CLOCK_STEP_MS = 1.0
"""What is lost when two times are rounded down to milliseconds."""

Ask = Callable[[NodeId, AttemptId], Awaitable[None]]
"""Asks a node for an echo, which must bring this id back; raises BrokerLost, or WireError where no subject can be made for the node."""

log = logging.getLogger("fallow.distances")


class Roster(Protocol):
    """What is asked of a gateway's or a hub's roster."""

    check: CardCheck

    def members(self) -> Mapping[NodeId, Member]:
        """The nodes that are there."""

    def card(self, node_id: NodeId) -> Card | None:
        """The card of a node that is believed."""

    def put_out(self, node_id: NodeId, reason: cards.Reason, why: str) -> None:
        """Believe the node's card no more."""


class Echo(NamedTuple):
    """How long it took, and when it came, in milliseconds."""

    rtt_ms: float
    at_ms: int


class Watched:
    """A node and the region that it claims, with the quickest echoes that it gave from there."""

    def __init__(self, region: str, now_ms: int, echoes: Sequence[Echo] = ()) -> None:
        self.region = region
        self.since_ms = now_ms
        self.asked = 0
        self.ask_at_ms = now_ms
        self.quickest = list(echoes)

    def take(self, echo: Echo) -> None:
        self.quickest = sorted([*self.quickest, echo])[:QUICK_ECHOES_MIN]

    def counting(self, region: str, now_ms: int) -> list[Echo]:
        """The echoes that say something of the node in a region: of the last minutes if it has only just said that it moved."""
        return [echo for echo in self.quickest if region == self.region or now_ms - echo.at_ms < MOVES_IN_MS]


class Distances:
    """Measures beside the roster of a gateway or a hub. `country` is its own; without it nothing is measured."""

    def __init__(self, roster: Roster, ask: Ask, clock: Clock, country: str, asker: Literal["gateway", "hub"]) -> None:
        self._roster = roster
        self._send = ask
        self._clock = clock
        self._asker = asker
        self._here = region_in(country)
        self._watched: dict[NodeId, Watched] = {}
        self._asked: dict[str, tuple[NodeId, Watched, int]] = {}
        roster.check.impossible = self.why_impossible

    async def run(self) -> None:
        """Ask for echoes as they are due until cancelled; returns at once where our own country isn't known."""
        while is_known(self._here):
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Forget what is old, watch who is new, and ask whoever is due."""
        now = self._clock.now_ms()
        self._asked = {id: asked for id, asked in self._asked.items() if now - asked[2] < ECHO_WITHIN_MS}
        self._watched = {id: one for id, one in self._watched.items() if now - one.since_ms < KEEP_MS}
        due = [found for node_id, member in self._roster.members().items() if (found := self._due(node_id, member.card, now)) is not None]
        due.sort(key=lambda found: (found[1].ask_at_ms, found[0]))
        for node_id, watched in due[:ASKED_PER_LOOK_MAX]:
            try:
                await self._ask(node_id, watched)
            except BrokerLost:
                return
            except WireError as error:
                log.debug("no echo is asked for: %s", error)

    def why_impossible(self, card: Card) -> str | None:
        """Why the node can't be in the region of its card, as far as is known from its echoes."""
        watched = self._watched.get(card.node_id)
        echoes = watched.counting(card.region, self._clock.now_ms()) if watched is not None else []
        if len(echoes) < QUICK_ECHOES_MIN:
            return None
        why = why_region_impossible(card.region, [(self._here, echoes[-1].rtt_ms)])
        return f"{why}; or organisation.country in this {self._asker}'s settings isn't where it runs" if why else None

    def _due(self, node_id: NodeId, card: Card | None, now_ms: int) -> tuple[NodeId, Watched] | None:
        """A node that is to be asked now. Who says it is near can't be caught from here, and isn't asked."""
        if card is None or distance_km_least(card.region, self._here) <= 0:
            return None
        watched = self._watched.get(node_id)
        if watched is None or watched.region != card.region:
            if watched is None and len(self._watched) >= WATCHED_MAX:
                return None
            echoes = watched.counting(card.region, now_ms) if watched is not None else ()
            watched = self._watched[node_id] = Watched(card.region, now_ms, echoes)
        return (node_id, watched) if watched.ask_at_ms <= now_ms else None

    async def _ask(self, node_id: NodeId, watched: Watched) -> None:
        """Ask for one echo; raises BrokerLost. The clock is read first, so that what we take ourselves only adds to the time."""
        attempt_id = AttemptId(f"{subjects.ECHO_PREFIX}{secrets.token_hex(8)}")
        now = self._clock.now_ms()
        self._asked[attempt_id] = (node_id, watched, now)
        watched.asked += 1
        watched.ask_at_ms = now + (FIRST_EVERY_MS if watched.asked < FIRST_ECHOES else ECHO_EVERY_MS)
        await self._send(node_id, attempt_id)

    def awaits(self, node_id: str, attempt_id: str) -> bool:
        """Whether the node was asked for this echo, and it hasn't come yet."""
        asked = self._asked.get(attempt_id)
        return asked is not None and asked[0] == node_id

    def take(self, node_id: str, attempt_id: str) -> None:
        """An echo came; whoever else's, or nobody's, is passed over."""
        if not self.awaits(node_id, attempt_id):
            return
        now = self._clock.now_ms()
        known_id, watched, sent_ms = self._asked.pop(attempt_id)
        watched.take(Echo(now - sent_ms + CLOCK_STEP_MS, now))
        card = self._roster.card(known_id)
        why = self.why_impossible(card) if card is not None else None
        if why is not None:
            self._roster.put_out(known_id, "region", why)

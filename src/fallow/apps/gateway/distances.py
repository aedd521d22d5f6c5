"""How far nodes are at most: the gateway times echoes of those whose region could be a lie, and has the impossible ones put out.

A node is asked over the broker, which only makes the way longer: what light couldn't do on the shorter way, it can't do on the longer one.
Nothing is believed of a late echo, and a node that gives none is left alone.
"""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.roster import NODES_MAX, Roster
from fallow.core.geography import distance_km_least, is_known, region_in, why_region_impossible
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

LOOK_S = 1.0
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

log = logging.getLogger("fallow.gateway")


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
    """Measures beside the roster. `country` is the gateway's own; without it nothing is measured."""

    def __init__(self, exchange: Exchange, roster: Roster, bus: Bus, clock: Clock, country: str) -> None:
        self._gateway_id = exchange.gateway_id
        self._bus = bus
        self._roster = roster
        self._clock = clock
        self._here = region_in(country)
        self._watched: dict[NodeId, Watched] = {}
        self._asked: dict[str, tuple[NodeId, Watched, int]] = {}
        exchange.on_other = self._on_echo
        roster.check.impossible = self.why_impossible

    async def run(self) -> None:
        """Ask for echoes as they are due until cancelled; returns at once where the gateway doesn't know its own country."""
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
        return f"{why}; or organisation.country in this gateway's settings isn't where it runs" if why else None

    def _due(self, node_id: NodeId, card: Card | None, now_ms: int) -> tuple[NodeId, Watched] | None:
        """A node that is to be asked now. Who says it is near can't be caught from here, and isn't asked."""
        if card is None or distance_km_least(card.region, self._here) <= 0:
            return None
        watched = self._watched.get(node_id)
        if watched is None or watched.region != card.region:
            if watched is None and len(self._watched) >= NODES_MAX:
                return None
            echoes = watched.counting(card.region, now_ms) if watched is not None else ()
            watched = self._watched[node_id] = Watched(card.region, now_ms, echoes)
        return (node_id, watched) if watched.ask_at_ms <= now_ms else None

    async def _ask(self, node_id: NodeId, watched: Watched) -> None:
        """Ask for one echo; raises BrokerLost. The clock is read first, so that what we take ourselves only adds to the time."""
        attempt_id = AttemptId(f"rtt-{secrets.token_hex(8)}")
        now = self._clock.now_ms()
        self._asked[attempt_id] = (node_id, watched, now)
        watched.asked += 1
        watched.ask_at_ms = now + (FIRST_EVERY_MS if watched.asked < FIRST_ECHOES else ECHO_EVERY_MS)
        subject = subjects.answer(self._gateway_id, node_id, attempt_id)
        await self._bus.publish(subjects.control(node_id), codec.encode(m.Ping(attempt_id=attempt_id)), subject)

    def _on_echo(self, delivery: Delivery) -> None:
        attempt_id, now = subjects.last_token(delivery.subject), self._clock.now_ms()
        asked = self._asked.get(attempt_id)
        if asked is None or delivery.unheard or subjects.answering_node(delivery.subject) != asked[0]:
            return
        del self._asked[attempt_id]
        node_id, watched, sent_ms = asked
        watched.take(Echo(now - sent_ms + CLOCK_STEP_MS, now))
        card = self._roster.card(node_id)
        why = self.why_impossible(card) if card is not None else None
        if why is not None:
            self._roster.put_out(node_id, "region", why)

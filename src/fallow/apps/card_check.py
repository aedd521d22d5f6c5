"""The door of a roster, at the gateway and at the hub: cards that aren't believed don't come in, and are counted and logged once."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from fallow.core import cards
from fallow.core.roster import Member
from fallow.model.card import Card
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Heartbeat
from fallow.ports import Clock
from fallow.wire.sign import vouched_org

REFUSED_MAX = 10_000
"""Refused cards that are remembered, one for each node; the oldest are forgotten first."""
ASK_AGAIN_MS = 60_000
"""A node whose card was refused isn't asked for it again so soon. A new one that it sends by itself is looked at."""

Verify = Callable[[Card], bool]
OrgOf = Callable[[Card], OrgId | None]
Impossible = Callable[[Card], str | None]


class Refused(NamedTuple):
    """The last card of a node that wasn't believed, and for what its cards weren't so far: that has been logged."""

    sequence: int
    at_ms: int
    reasons: frozenset[cards.Reason]


def anywhere(card: Card) -> str | None:
    """For who doesn't know where nodes are."""
    return None


def anyones(card: Card) -> OrgId | None:
    """For who doesn't know whose nodes are."""
    return None


def vouched_by(authority: str, clock: Clock) -> OrgOf:
    """For members of a hub with this key: what it vouches for in the card, and else nobody's."""
    return lambda card: vouched_org(card, authority, now_s=clock.wall_ms() // 1000)


class CardCheck:
    """Looks at the cards that heartbeats bring. `impossible` says why a node can't be in the region of its card."""

    def __init__(self, clock: Clock, log: logging.Logger, verify: Verify, org_of: OrgOf, count: Callable[[cards.Reason], None]) -> None:
        self._clock = clock
        self._log = log
        self._verify = verify
        self._org_of = org_of
        self._count = count
        self.impossible: Impossible = anywhere
        self._refused: dict[NodeId, Refused] = {}

    def screened(self, known: Member | None, beat: Heartbeat) -> Heartbeat:
        """The heartbeat, without its card if that isn't believed, and then as if the node still had the card that is known."""
        mine = known.card if known is not None else None
        card = beat.card
        if known is not None and beat.sequence <= known.sequence:
            return beat  # too late to change anything
        if card is None:
            refused = self._refused.get(beat.node_id)
            if mine is None or refused is None or refused.sequence != beat.card_sequence:
                return beat
            return cards.without_card(beat, mine)
        if card == mine:
            return beat
        where = self.impossible(card)
        reason = cards.why_card_refused(
            card,
            mine,
            verifies=self._verify(card),
            now_ms=self._clock.wall_ms(),
            org_id=self._org_of(card),
            possible=where is None,
            seals=beat.kem is not None,
        )
        if reason is None:
            self._refused.pop(card.node_id, None)
            return beat
        self.refuse(card, reason, where or "" if reason == "region" else "")
        return cards.without_card(beat, mine)

    def may_ask(self, node_id: NodeId) -> bool:
        """Whether a node without a card that is believed may be asked for its card."""
        refused = self._refused.get(node_id)
        return refused is None or self._clock.now_ms() - refused.at_ms >= ASK_AGAIN_MS

    def refuse(self, card: Card, reason: cards.Reason, more: str = "") -> None:
        """Count, remember, and say it once for each node and reason; `more` is what is known of this case.

        That many nodes don't fill the log is up to the log (`log_limit`).
        """
        before = self._refused.pop(card.node_id, None)
        if len(self._refused) >= REFUSED_MAX:
            del self._refused[next(iter(self._refused))]
        said = before.reasons if before is not None else frozenset()
        self._refused[card.node_id] = Refused(card.sequence, self._clock.now_ms(), said | {reason})
        self._count(reason)
        if reason not in said:
            text = f"{cards.TEXTS[reason]}: {more}" if more else cards.TEXTS[reason]
            self._log.warning("the card of %s is refused: %s", card.node_id, text)

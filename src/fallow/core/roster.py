"""Who is there: what a gateway or hub believes of one node, from its heartbeats."""

import msgspec

from fallow.model.card import Card
from fallow.model.messages import Heartbeat, NodeState
from fallow.model.offer import Load, Offer

BEAT_MS = 2_000
BEATS_MISSED_MAX = 3
GONE_AFTER_MS = BEAT_MS * BEATS_MISSED_MAX + BEAT_MS // 2
"""Three beats missed; the half beat is for the one that was only late."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node as last heard. Without a card it is known to exist, but can't be given work."""

    sequence: int
    heard_at_ms: int
    state: NodeState
    card: Card | None = None
    offers: tuple[Offer, ...] = ()
    loads: tuple[Load, ...] = ()


def hear(member: Member | None, beat: Heartbeat, *, now_ms: int) -> Member:
    """Take a heartbeat in. One that is older than what we know changes nothing."""
    if member is not None and beat.sequence <= member.sequence:
        return member
    known = member or Member(sequence=beat.sequence, heard_at_ms=now_ms, state=beat.state)
    card, offers = (beat.card, beat.offers or ()) if beat.card is not None else (known.card, known.offers)
    if card is not None and card.sequence != beat.card_sequence:
        card, offers = None, ()  # it changed while we weren't listening
    return Member(sequence=beat.sequence, heard_at_ms=now_ms, state=beat.state, card=card, offers=offers, loads=beat.loads)


def is_consistent(beat: Heartbeat) -> bool:
    """Whether card and offers name the node that sends them."""
    named = [offer.node_id for offer in beat.offers or ()] + ([beat.card.node_id] if beat.card is not None else [])
    return all(node_id == beat.node_id for node_id in named)


def is_stranger(member: Member) -> bool:
    """Whether we must ask the node for its card before it can get work."""
    return member.card is None


def is_gone(member: Member, *, now_ms: int) -> bool:
    """Whether the node left or missed three heartbeats."""
    return member.state == "leave" or now_ms - member.heard_at_ms > GONE_AFTER_MS


def load_of(member: Member, model: str) -> Load | None:
    """The load that the node reported for a model."""
    return next((load for load in member.loads if load.model == model), None)

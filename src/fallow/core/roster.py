"""Who is there: what a gateway or hub believes of one node, from its heartbeats."""

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.model.card import Card
from fallow.model.ids import NodeId
from fallow.model.messages import Heartbeat, KemKey, NodeState
from fallow.model.offer import Load, Offer

BEAT_MS = 2_000
BEATS_MISSED_MAX = 3
GONE_AFTER_MS = BEAT_MS * BEATS_MISSED_MAX + BEAT_MS // 2
"""Three beats missed; the half beat is for the one that was only late."""
SUSPECTED_AFTER_MS = BEAT_MS + BEAT_MS // 2
"""One beat missed, and half a beat more."""
SILENT_SHARE_MAX = 0.5
"""If more than this share of all nodes falls silent at once, it is us who don't hear: nobody is suspected for it."""

Stage = Literal["here", "suspected", "gone"]
"""Suspected: calls that run there go on, new ones go elsewhere if they can."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node as last heard. Without a card it is known to exist, but can't be given work.

    `doubted`: somebody found it silent or away since; only a newer heartbeat says otherwise.
    """

    sequence: int
    heard_at_ms: int
    state: NodeState
    card: Card | None = None
    offers: tuple[Offer, ...] = ()
    loads: tuple[Load, ...] = ()
    doubted: bool = False
    kem: KemKey | None = None


def hear(member: Member | None, beat: Heartbeat, *, now_ms: int) -> Member:
    """Take a heartbeat in. One that is older than what we know changes nothing."""
    if member is not None and beat.sequence <= member.sequence:
        return member
    known = member or Member(sequence=beat.sequence, heard_at_ms=now_ms, state=beat.state)
    card, offers = (beat.card, beat.offers or ()) if beat.card is not None else (known.card, known.offers)
    if card is not None and card.sequence != beat.card_sequence:
        card, offers = None, ()  # it changed while we weren't listening
    return Member(
        sequence=beat.sequence, heard_at_ms=now_ms, state=beat.state, card=card, offers=offers, loads=beat.loads, kem=beat.kem or known.kem
    )


def is_consistent(beat: Heartbeat) -> bool:
    """Whether card and offers name the node that sends them."""
    named = [offer.node_id for offer in beat.offers or ()] + ([beat.card.node_id] if beat.card is not None else [])
    return all(node_id == beat.node_id for node_id in named)


def is_stranger(member: Member) -> bool:
    """Whether we must ask the node for its card before it can get work."""
    return member.card is None


def doubt(member: Member) -> Member:
    """An attempt found nobody there, or was met with silence. The heartbeats decide whether it is gone."""
    return replace(member, doubted=True)


def stage(member: Member, *, now_ms: int) -> Stage:
    """What to believe of a node: a missed heartbeat or a lost message isn't a death."""
    if is_gone(member, now_ms=now_ms):
        return "gone"
    return "suspected" if member.doubted or now_ms - member.heard_at_ms > SUSPECTED_AFTER_MS else "here"


def suspects(members: Mapping[NodeId, Member], *, now_ms: int) -> set[NodeId]:
    """The nodes that are suspected, of all that are known."""
    silent_before_ms = now_ms - SUSPECTED_AFTER_MS
    silent = {node_id for node_id, member in members.items() if member.heard_at_ms < silent_before_ms}
    doubted = {node_id for node_id, member in members.items() if member.doubted}
    found = doubted if len(silent) > SILENT_SHARE_MAX * len(members) else doubted | silent
    return {node_id for node_id in found if not is_gone(members[node_id], now_ms=now_ms)}


def is_gone(member: Member, *, now_ms: int) -> bool:
    """Whether the node left or missed three heartbeats."""
    return member.state == "leave" or now_ms - member.heard_at_ms > GONE_AFTER_MS


def load_of(member: Member, model: str) -> Load | None:
    """The load that the node reported for a model."""
    return next((load for load in member.loads if load.model == model), None)

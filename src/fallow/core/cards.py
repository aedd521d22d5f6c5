"""Whether a node's card is believed: signed, in time, newer than what is known, and where it can be."""

from typing import Literal, get_args

from msgspec.structs import replace

from fallow.core.roster import Member
from fallow.model.card import Card
from fallow.model.ids import OrgId
from fallow.model.messages import Heartbeat

CARD_LIFE_MS = 24 * 3_600_000
"""For how long a node says that its card is good; it signs a new one in time."""
CARD_LIFE_MAX_MS = CARD_LIFE_MS + 3_600_000
"""No card is believed that lives longer. The hour is for clocks that disagree."""

Reason = Literal["signature", "expired", "life", "replayed", "organisation", "region", "unsealed"]
"""Why a card is refused, as it is counted."""
REASONS: tuple[Reason, ...] = get_args(Reason)

TEXTS: dict[Reason, str] = {
    "signature": "its signature isn't that of the key that it names; the node must sign it with its own key",
    "expired": "it has expired; if the node runs, its clock or ours is wrong",
    "life": f"it is to live for longer than {CARD_LIFE_MAX_MS // 3_600_000} h; if the node's version is ours, its clock or ours is wrong",
    "replayed": "it is older than the one that is known, or says something else under the same number",
    "organisation": "it names another organisation than the one that the node was let in for",
    "region": "the node can't be where it says",
    "unsealed": "it brings no key to which calls could be sealed; update the node",
}


def why_card_refused(
    card: Card, known: Card | None, *, verifies: bool, now_ms: int, org_id: OrgId | None = None, possible: bool = True, seals: bool = True
) -> Reason | None:
    """Why a card isn't believed, or None. `now_ms` is UTC.

    `known` is the card that is believed now, `org_id` whom the hub let the node in for (None: not known here), `possible` whether the
    node can be in the card's region, and `seals` whether it brought a KEM key. The signature comes first: without it, nothing else is the
    node's word.
    """
    if not verifies:
        return "signature"
    if is_expired(card, now_ms=now_ms):
        return "expired"
    if card.expires_at_ms - now_ms > CARD_LIFE_MAX_MS:
        return "life"
    if known is not None and (card.sequence < known.sequence or (card.sequence == known.sequence and card != known)):
        return "replayed"
    if org_id is not None and card.org_id != org_id:
        return "organisation"
    if not possible:
        return "region"
    return None if seals else "unsealed"


def is_expired(card: Card, *, now_ms: int) -> bool:
    """Whether a card isn't good any more. `now_ms` is UTC."""
    return card.expires_at_ms <= now_ms


def is_due(card: Card, *, now_ms: int) -> bool:
    """Whether its node must sign the card anew: half its life is over, or the clock was set back. `now_ms` is UTC."""
    return not CARD_LIFE_MS // 2 < card.expires_at_ms - now_ms <= CARD_LIFE_MS


def renewed(card: Card, *, after: int, now_ms: int) -> Card:
    """The card for its next life, unsigned, with a sequence above `after`. `now_ms` is UTC."""
    return replace(card, sequence=max(card.sequence, after + 1), expires_at_ms=now_ms + CARD_LIFE_MS, signature=b"")


def without_card(beat: Heartbeat, known: Card | None) -> Heartbeat:
    """The heartbeat as if it hadn't brought a card: the known one stays, and with it the known offers."""
    return replace(beat, card=None, offers=None, card_sequence=beat.card_sequence if known is None else known.sequence)


def lapsed(member: Member, *, now_ms: int) -> Member:
    """The node as it is believed once its card has expired: it is known to exist, and must bring a new one. `now_ms` is UTC."""
    return cardless(member) if member.card is not None and is_expired(member.card, now_ms=now_ms) else member


def cardless(member: Member) -> Member:
    """The node without its card and what it offers."""
    return replace(member, card=None, offers=())

"""The exact bytes that keys sign: cards and KEM keys by nodes, memberships by the hub, requests to enrol by who asks, agreements by both.

What is signed is a domain, so that no signature of one kind is good for another, and MessagePack of the value's fields by name, in the
order of their names, with sets sorted, without signatures and without optional fields that are at their defaults. Cards travel as plain
values and are brought into this form again to be checked: however a card was packed or stored, its fields decide. A field that a later
version adds changes nothing for cards that leave it at its default. A card that uses it doesn't verify where it isn't known, and that is
wanted: such a field may say whom its owner refuses, and a gateway that can't read it can't keep to it.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from fallow.model.card import Card
from fallow.model.identity import Agreement
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Enrol, KemKey
from fallow.wire.nkey_text import verifies

CARD = b"fallow/card/v1\0"
MEMBER = b"fallow/member/v1\0"
KEM = b"fallow/kem/v1\0"
ENROL = b"fallow/enrol/v1\0"
AGREEMENT = b"fallow/agreement/v1\0"
CLOCKS_S = 1_500
"""A membership counts so long after its end: two clocks of which each is ten minutes wrong are up to twenty apart."""
KEM_S_MAX = 20 * 60
"""The longest that a KEM key may be good for."""
NODE_KIND = "U"
"""The first letter of a node's key. An organisation's or an operator's key signs no cards."""

Sign = Callable[[bytes], bytes]
"""What makes an Ed25519 signature, 64 bytes, with a key that stays where it is."""

_encoder = msgspec.msgpack.Encoder(order="deterministic")


def card_bytes(card: Card) -> bytes:
    """What a node signs of its card: all but the signature."""
    return CARD + _packed(card, without={"signature"})


def whole_card(card: Card) -> bytes:
    """A card as the public log keeps it: what was signed, and the signature."""
    return _encoder.encode([card_bytes(card), card.signature])


def signed_card(card: Card, sign: Sign) -> Card:
    """The card with a signature by `sign`, which must be of the key that the card names."""
    return msgspec.structs.replace(card, signature=sign(card_bytes(card)))


def card_verifies(card: Card) -> bool:
    """Whether the node that the card names has signed it: its id is its public key."""
    return card.node_id.startswith(NODE_KIND) and verifies(card.node_id, card_bytes(card), card.signature)


def member_bytes(public_key: str, org_id: OrgId, until_s: int) -> bytes:
    """What a hub signs of a member: whose it is, and until when (UTC seconds)."""
    return MEMBER + _encoder.encode([public_key, org_id, until_s])


def vouched_org(card: Card, authority: str, *, now_s: int) -> OrgId:
    """The organisation that the node belongs to as its hub says, whose key is `authority`; empty if it says nothing that holds now."""
    holds = is_vouched(card.node_id, card.org_id, card.member_until_s, card.membership, authority, now_s=now_s)
    return card.org_id if holds else OrgId("")


def is_vouched(public_key: str, org_id: OrgId, until_s: int, membership: bytes, authority: str, *, now_s: int) -> bool:
    """Whether the hub whose key is `authority` says that this key is of the organisation now."""
    return now_s <= until_s + CLOCKS_S and verifies(authority, member_bytes(public_key, org_id, until_s), membership)


def kem_bytes(node_id: NodeId, kem: KemKey) -> bytes:
    """What a node signs of its KEM key."""
    return KEM + _encoder.encode([node_id, kem.suite, kem.public_key, kem.expires_at_s])


def kem_verifies(node_id: NodeId, kem: KemKey, *, now_s: int) -> bool:
    """Whether the node has signed this KEM key, and it is still good: who had a node's key for a moment can't speak for it for years."""
    lasts = -CLOCKS_S <= kem.expires_at_s - now_s <= KEM_S_MAX + CLOCKS_S
    return lasts and node_id.startswith(NODE_KIND) and verifies(node_id, kem_bytes(node_id, kem), kem.signature)


def enrol_bytes(enrol: Enrol) -> bytes:
    """What proves that who asks has the key that is to be let in: all but the proof."""
    return ENROL + _packed(enrol, without={"proof"})


def agreement_bytes(agreement: Agreement) -> bytes:
    """What both organisations sign. When it ends isn't part of it: either may end it alone."""
    return AGREEMENT + _packed(agreement, without={"left_signature", "right_signature", "ends_at_ms"})


def _packed(value: msgspec.Struct, *, without: set[str]) -> bytes:
    return _encoder.encode({name: one for name, one in _named(value).items() if name not in without})


def _named(value: msgspec.Struct) -> dict[str, Any]:
    """A value's fields by name, those within it as well, less what is at its default."""
    named = {}
    for field in msgspec.structs.fields(value):
        one = getattr(value, field.name)
        if one != field.default:
            named[field.encode_name] = _named(one) if isinstance(one, msgspec.Struct) else one
    return named

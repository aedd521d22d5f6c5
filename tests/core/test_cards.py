"""Whose card is believed: one that is signed, in time, newer than what is known, of the right organisation, and from a possible place."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.cards import (
    CARD_LIFE_MAX_MS,
    CARD_LIFE_MS,
    REASONS,
    TEXTS,
    cardless,
    is_due,
    is_expired,
    lapsed,
    renewed,
    why_card_refused,
    without_card,
)
from fallow.core.roster import Member, hear
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Heartbeat

PROMISE = settings(max_examples=100)
NOW = 1_700_000_000_000
CARD = Card(
    node_id=NodeId("U1"),
    org_id=OrgId("home"),
    sequence=10,
    expires_at_ms=NOW + CARD_LIFE_MS,
    hardware=Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33),
    isolation="none",
    region="eu-de",
    serves=frozenset({"own"}),
)
TEN_MINUTES_MS = 600_000


def why(card: Card = CARD, known: Card | None = None, **more: Any) -> str | None:
    return why_card_refused(card, known, **{"verifies": True, "now_ms": NOW, **more})


@pytest.mark.parametrize(
    ("card", "known", "more", "reason"),
    [
        (CARD, None, {}, None),
        (CARD, CARD, {}, None),
        (CARD, replace(CARD, sequence=9, region="eu-fr"), {}, None),
        (CARD, None, {"org_id": "home"}, None),
        (CARD, None, {"verifies": False}, "signature"),
        (CARD, CARD, {"verifies": False}, "signature"),
        (replace(CARD, expires_at_ms=NOW), None, {}, "expired"),
        (replace(CARD, expires_at_ms=NOW + 1), None, {}, None),
        (replace(CARD, expires_at_ms=-1), None, {}, "expired"),
        (replace(CARD, expires_at_ms=NOW + CARD_LIFE_MAX_MS), None, {}, None),
        (replace(CARD, expires_at_ms=NOW + CARD_LIFE_MAX_MS + 1), None, {}, "life"),
        (replace(CARD, expires_at_ms=2**63), None, {}, "life"),
        (CARD, replace(CARD, sequence=11), {}, "replayed"),
        (replace(CARD, region="eu-fr"), CARD, {}, "replayed"),
        (CARD, None, {"org_id": "other"}, "organisation"),
        (CARD, None, {"possible": False}, "region"),
        (CARD, None, {"seals": False}, "unsealed"),
        (CARD, CARD, {"seals": False}, "unsealed"),
        (CARD, None, {"seals": False, "possible": False}, "region"),
        (replace(CARD, expires_at_ms=0), None, {"verifies": False, "possible": False, "org_id": "other"}, "signature"),
    ],
)
def test_why_a_card_is_refused(card: Card, known: Card | None, more: dict[str, Any], reason: str | None) -> None:
    assert why(card, known, **more) == reason


def test_every_reason_has_its_text() -> None:
    assert set(TEXTS) == set(REASONS)


@PROMISE
@given(
    node=st.integers(-TEN_MINUTES_MS, TEN_MINUTES_MS),
    gateway=st.integers(-TEN_MINUTES_MS, TEN_MINUTES_MS),
    age=st.integers(0, 3 * CARD_LIFE_MS),
)
def test_clocks_that_are_ten_minutes_wrong_cost_no_node_its_card(node: int, gateway: int, age: int) -> None:
    """A node renews its card by its own clock; a gateway looks at it at any time by its own."""
    card = renewed(CARD, after=0, now_ms=NOW + node)
    while is_due(card, now_ms=NOW + age + node):
        card = renewed(card, after=card.sequence, now_ms=card.expires_at_ms - CARD_LIFE_MS // 2)
    assert why(card, now_ms=NOW + age + gateway) is None
    assert not is_expired(card, now_ms=NOW + age + gateway)


@PROMISE
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**50))
def test_a_renewed_card_follows_on_the_one_before(sequence: int, after: int, now_ms: int) -> None:
    card = renewed(replace(CARD, sequence=sequence, signature=b"old"), after=after, now_ms=now_ms)
    assert card.sequence > after
    assert card.sequence >= sequence
    assert card.signature == b""
    assert card.expires_at_ms == now_ms + CARD_LIFE_MS
    assert not is_due(card, now_ms=now_ms)
    assert is_due(card, now_ms=now_ms + CARD_LIFE_MS // 2)
    assert is_due(card, now_ms=now_ms - 1), "the clock was set back: gateways would say that it lives too long"


def test_a_heartbeat_without_its_card_leaves_the_known_one() -> None:
    beat = Heartbeat(
        node_id=CARD.node_id, sequence=5, state="throttle", card_sequence=11, loads=(), card=replace(CARD, sequence=11), offers=()
    )
    known = Member(sequence=4, heard_at_ms=0, state="run", card=CARD)
    member = hear(known, without_card(beat, CARD), now_ms=1)
    assert (member.card, member.state) == (CARD, "throttle")
    assert hear(None, without_card(beat, None), now_ms=1).card is None


def test_a_card_that_expires_is_gone() -> None:
    member = Member(sequence=4, heard_at_ms=0, state="run", card=CARD)
    assert lapsed(member, now_ms=CARD.expires_at_ms - 1) is member
    assert lapsed(member, now_ms=CARD.expires_at_ms) == cardless(member) == replace(member, card=None)
    assert lapsed(cardless(member), now_ms=2**60) == cardless(member)

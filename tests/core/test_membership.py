"""Who may join, who is whose partner, what a key grants, and how a log shows that it was changed."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.membership import CHAIN_START, chained, first_break, grant_of, is_in_force, partners_of, why_not_admitted
from fallow.model.call import Allowance
from fallow.model.identity import Agreement, ApiKey, Invite, LogEntry, Member, MemberRole
from fallow.model.ids import KeyId, OrgId
from fallow.model.needs import Policy

NOW = 1_000_000
INVITE = Invite(id="i", word_digest=b"w" * 32, org_id=OrgId("acme"), roles=frozenset[MemberRole]({"node"}), uses_left=1)
NODE = Member(public_key="U1", role="node", org_id=OrgId("acme"))
KEY = ApiKey(id=KeyId("k"), digest=b"d" * 32, org_id=OrgId("acme"))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        ({"uses_left": None}, None),
        ({"uses_left": 0}, "used up"),
        ({"expires_at_ms": NOW + 1}, None),
        ({"expires_at_ms": NOW}, "expired"),
        ({"ended_at_ms": NOW - 1}, "ended"),
        ({"ended_at_ms": NOW + 600_000}, "ended"),  # by a hub whose clock is ahead
        ({"roles": frozenset({"gateway"})}, "node"),
        ({"roles": frozenset({"gateway", "node"})}, None),
    ],
)
def test_who_is_new_needs_a_good_invitation(changed: dict[str, Any], word: str | None) -> None:
    why = why_not_admitted(msgspec.structs.replace(INVITE, **changed), None, "node", NOW)
    assert (why is None) == (word is None)
    assert word is None or (why is not None and word in why and "ask the hub's operator" in why)


def test_an_unknown_word_is_said() -> None:
    why = why_not_admitted(None, None, "node", NOW)
    assert why is not None
    assert "no invitation" in why


@pytest.mark.parametrize("invite", [None, INVITE, msgspec.structs.replace(INVITE, uses_left=0, ended_at_ms=1)])
def test_who_is_known_needs_none(invite: Invite | None) -> None:
    assert why_not_admitted(invite, NODE, "node", NOW) is None
    banned = msgspec.structs.replace(NODE, banned_at_ms=NOW + 600_000, banned_why="lied about its\nspeed")
    why = why_not_admitted(invite, banned, "node", NOW)
    assert why is not None
    assert "lied about its" in why
    assert "\n" not in why
    assert "operator" in why
    why = why_not_admitted(invite, NODE, "gateway", NOW)
    assert why is not None
    assert "joined as a node" in why


@pytest.mark.parametrize(
    ("begins", "ends", "holds"),
    [(NOW, None, True), (NOW + 1, None, False), (0, NOW + 1, True), (0, NOW, False), (0, NOW - 1, False), (NOW, NOW, False)],
)
def test_when_an_agreement_holds(begins: int, ends: int | None, holds: bool) -> None:
    assert is_in_force(Agreement(left=OrgId("a"), right=OrgId("b"), begins_at_ms=begins, ends_at_ms=ends), NOW) is holds


def test_partners_stand_on_either_side() -> None:
    agreements = [
        Agreement(left=OrgId("a"), right=OrgId("b"), begins_at_ms=0),
        Agreement(left=OrgId("b"), right=OrgId("c"), begins_at_ms=0),
        Agreement(left=OrgId("b"), right=OrgId("d"), begins_at_ms=0, ends_at_ms=NOW),
        Agreement(left=OrgId("b"), right=OrgId("e"), begins_at_ms=NOW + 1),
        Agreement(left=OrgId("x"), right=OrgId("y"), begins_at_ms=0),
    ]
    assert partners_of(OrgId("b"), agreements, NOW) == {"a", "c"}
    assert partners_of(OrgId("a"), agreements, NOW) == {"b"}, "a partner's partner is none"
    assert partners_of(OrgId("z"), agreements, NOW) == frozenset()


names = st.sampled_from([OrgId(c) for c in "abcde"])
some_agreements = st.builds(
    Agreement,
    left=names,
    right=names,
    begins_at_ms=st.integers(0, 20),
    ends_at_ms=st.none() | st.integers(0, 20),
)


@settings(max_examples=100)
@given(st.lists(some_agreements, max_size=12), names, names, st.integers(0, 20))
def test_partners_are_so_of_each_other(agreements: list[Agreement], one: OrgId, other: OrgId, now: int) -> None:
    assert (other in partners_of(one, agreements, now)) == (one in partners_of(other, agreements, now))
    assert one not in partners_of(one, agreements, now)


@pytest.mark.parametrize(
    ("changed", "allowed"),
    [
        ({}, True),
        ({"role": "operator"}, True),
        ({"role": "lender"}, False),
        ({"expires_at_ms": NOW + 1}, True),
        ({"expires_at_ms": NOW}, False),
        ({"revoked_at_ms": NOW}, False),
        ({"revoked_at_ms": NOW + 600_000}, False),
    ],
)
def test_which_keys_make_calls(changed: dict[str, Any], allowed: bool) -> None:
    assert (grant_of(msgspec.structs.replace(KEY, **changed), frozenset(), NOW) is not None) is allowed


def test_a_grant_says_all_that_the_key_allows() -> None:
    key = msgspec.structs.replace(
        KEY,
        policy=Policy(regions=frozenset({"eu"})),
        allowance=Allowance(calls_per_minute=7),
        models=frozenset({"m"}),
        budget_micro=5,
        expires_at_ms=NOW + 9,
    )
    grant = grant_of(key, frozenset({OrgId("b")}), NOW, spent_micro=3)
    assert grant is not None
    assert (grant.key_id, grant.org_id, grant.allowance, grant.models) == (key.id, key.org_id, key.allowance, key.models)
    assert (grant.budget_micro, grant.spent_micro, grant.expires_at_ms) == (5, 3, NOW + 9)
    assert grant.policy == Policy(regions=frozenset({"eu"}), partners=frozenset({OrgId("b")}))


def test_a_key_can_name_fewer_partners_but_none_that_arent() -> None:
    key = msgspec.structs.replace(KEY, policy=Policy(partners=frozenset({OrgId("b"), OrgId("stranger")})))
    grant = grant_of(key, frozenset({OrgId("b"), OrgId("c")}), NOW)
    assert grant is not None
    assert grant.policy.partners == {"b"}


def chain(cards: list[bytes]) -> list[LogEntry]:
    entries: list[LogEntry] = []
    before = CHAIN_START
    for number, card in enumerate(cards, start=1):
        before = chained(before, number=number, at_ms=number * 10, card=card)
        entries.append(LogEntry(number=number, node_id="n", card=card, at_ms=number * 10, hash=before))
    return entries


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=9), min_size=1, max_size=8), st.data())
def test_a_changed_log_shows_it(cards: list[bytes], data: st.DataObject) -> None:
    entries = chain(cards)
    assert first_break(entries) is None
    at = data.draw(st.integers(0, len(entries) - 1))
    assert first_break(entries[at:], after_number=at, before=entries[at - 1].hash if at else CHAIN_START) is None
    field: dict[str, Any] = data.draw(
        st.sampled_from([{"card": entries[at].card + b"!"}, {"at_ms": 1}, {"number": 99}, {"hash": bytes(32)}])
    )
    changed = [*entries[:at], msgspec.structs.replace(entries[at], **field), *entries[at + 1 :]]
    assert first_break(changed) == at + 1
    if at + 1 < len(entries):
        assert first_break(entries[:at] + entries[at + 1 :]) == at + 1, "one is missing"

"""What keys sign: every field counts, nothing else does, and no signature is good for another purpose."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.adapters.nkey import KeyPair, make_key
from fallow.model.card import Card, Hardware
from fallow.model.identity import Agreement
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Enrol, Heartbeat, KemKey
from fallow.wire import codec
from fallow.wire.sign import (
    CLOCKS_S,
    agreement_bytes,
    card_bytes,
    card_verifies,
    enrol_bytes,
    is_vouched,
    kem_bytes,
    kem_verifies,
    member_bytes,
    signed_card,
    vouched_org,
)

PROMISE = settings(max_examples=60)
KEY = make_key("user")
HARDWARE = Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33)
CARD = Card(
    node_id=NodeId(KEY.public),
    org_id=OrgId("home"),
    sequence=7,
    expires_at_ms=10**12,
    hardware=HARDWARE,
    isolation="none",
    region="eu-de",
    serves=frozenset({"own", "partner"}),
)
SIGNED = signed_card(CARD, KEY.sign)
ENROL = Enrol(role="node", public_key=KEY.public, invite="word", at_s=1_700_000_000)
AGREEMENT = Agreement(left=OrgId("a"), right=OrgId("b"), begins_at_ms=5)


def test_a_card_that_its_node_signed_verifies() -> None:
    assert card_verifies(SIGNED)
    assert replace(SIGNED, signature=b"") == CARD


@pytest.mark.parametrize(
    "change",
    [
        {"org_id": "other"},
        {"sequence": 8},
        {"expires_at_ms": 10**12 + 1},
        {"hardware": replace(HARDWARE, cores=5)},
        {"hardware": replace(HARDWARE, memory_bytes_per_s=0)},
        {"hardware": replace(HARDWARE, gpu="L4")},
        {"isolation": "bwrap"},
        {"region": "eu-fr"},
        {"serves": frozenset({"own", "partner", "market"})},
        {"refuses_organisations": frozenset({"x"})},
        {"refuses_countries": frozenset({"x"})},
        {"member_until_s": 9},
        {"membership": bytes(64)},
        {"signature": b""},
        {"signature": SIGNED.signature[:-1]},
        {"signature": SIGNED.signature + b"\0"},
        {"signature": bytes(64)},
        {"node_id": make_key("user").public},
        {"node_id": "node-a"},
        {"node_id": ""},
    ],
)
def test_a_card_in_which_anything_is_changed_does_not_verify(change: dict[str, Any]) -> None:
    assert not card_verifies(replace(SIGNED, **change))


def test_every_field_of_a_card_is_changed_above() -> None:
    """A field that comes later needs a row there."""
    assert set(Card.__struct_fields__) == {
        "node_id", "org_id", "sequence", "expires_at_ms", "hardware", "isolation", "region", "serves", "signature",
        "refuses_organisations", "refuses_countries", "member_until_s", "membership",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["account", "operator"])
def test_only_a_nodes_key_signs_cards(kind: Any) -> None:
    key: KeyPair = make_key(kind)
    assert not card_verifies(signed_card(replace(CARD, node_id=NodeId(key.public)), key.sign))


def test_a_card_verifies_after_its_travel() -> None:
    beat = Heartbeat(node_id=CARD.node_id, sequence=1, state="run", card_sequence=7, loads=(), card=SIGNED)
    come = codec.read_heartbeat(codec.encode(beat), f"hb.{CARD.node_id}").card
    assert come == SIGNED
    assert card_verifies(come)


# KEM keys
UNSIGNED_KEM = KemKey(suite="mlkem768-x25519", public_key=bytes(range(32)) * 38, expires_at_s=1_000)
KEM = replace(UNSIGNED_KEM, signature=KEY.sign(kem_bytes(NodeId(KEY.public), UNSIGNED_KEM)))


@pytest.mark.parametrize(
    ("now_s", "holds"), [(0, True), (1_000, True), (1_000 + CLOCKS_S, True), (1_001 + CLOCKS_S, False), (2**40, False)]
)
def test_a_kem_key_that_its_node_signed_verifies_until_its_end(now_s: int, holds: bool) -> None:
    assert kem_verifies(NodeId(KEY.public), KEM, now_s=now_s) is holds


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "x25519"},
        {"public_key": KEM.public_key[:-1]},
        {"public_key": bytes(1_216)},
        {"expires_at_s": 1_001},
        {"signature": b""},
        {"signature": bytes(64)},
        {"signature": KEM.signature[:-1]},
        {"signature": make_key("user").sign(kem_bytes(NodeId(KEY.public), KEM))},
        {"signature": KEY.sign(card_bytes(CARD))},
    ],
    ids=["suite", "shorter", "another", "later", "unsigned", "zeros", "cut", "a stranger's", "of something else"],
)
def test_a_kem_key_in_which_anything_is_changed_does_not_verify(change: dict[str, Any]) -> None:
    assert not kem_verifies(NodeId(KEY.public), replace(KEM, **change), now_s=0)


def test_every_field_of_a_kem_key_is_changed_above() -> None:
    assert set(KemKey.__struct_fields__) == {"suite", "public_key", "expires_at_s", "signature"}


@pytest.mark.parametrize("kind", ["account", "operator"])
def test_only_a_nodes_key_signs_kem_keys(kind: Any) -> None:
    key: KeyPair = make_key(kind)
    node_id = NodeId(key.public)
    assert not kem_verifies(node_id, replace(KEM, signature=key.sign(kem_bytes(node_id, KEM))), now_s=0)


@pytest.mark.parametrize("node_id", [make_key("user").public, "node-a", ""], ids=["another's", "no key", "nobody's"])
def test_a_kem_key_is_nobody_elses(node_id: str) -> None:
    assert not kem_verifies(NodeId(node_id), KEM, now_s=0)


# memberships
HUB = make_key("account")
WORD = HUB.sign(member_bytes(KEY.public, OrgId("home"), 1_000))


@pytest.mark.parametrize(("now_s", "holds"), [(0, True), (1_000 + CLOCKS_S, True), (1_001 + CLOCKS_S, False)])
def test_the_hubs_word_holds_for_a_time(now_s: int, holds: bool) -> None:
    assert is_vouched(KEY.public, OrgId("home"), 1_000, WORD, HUB.public, now_s=now_s) is holds
    card = replace(CARD, member_until_s=1_000, membership=WORD)
    assert vouched_org(card, HUB.public, now_s=now_s) == ("home" if holds else "")


@pytest.mark.parametrize(
    ("public_key", "org", "until_s", "word", "authority"),
    [
        (make_key("user").public, "home", 1_000, WORD, HUB.public),
        (KEY.public, "other", 1_000, WORD, HUB.public),
        (KEY.public, "", 1_000, WORD, HUB.public),
        (KEY.public, "home", 1_001, WORD, HUB.public),
        (KEY.public, "home", 1_000, b"", HUB.public),
        (KEY.public, "home", 1_000, bytes(64), HUB.public),
        (KEY.public, "home", 1_000, KEY.sign(member_bytes(KEY.public, OrgId("home"), 1_000)), HUB.public),
        (KEY.public, "home", 1_000, WORD, make_key("account").public),
        (KEY.public, "home", 1_000, WORD, ""),
    ],
    ids=["another's", "organisation", "no organisation", "longer", "none", "zeros", "one's own word", "another hub", "no hub"],
)
def test_what_the_hub_did_not_say_is_not_believed(public_key: str, org: str, until_s: int, word: bytes, authority: str) -> None:
    assert not is_vouched(public_key, OrgId(org), until_s, word, authority, now_s=0)


NAMES = st.frozensets(st.text(st.characters(codec="ascii"), max_size=5), max_size=8)


@PROMISE
@given(names=NAMES, countries=NAMES, chance=st.randoms(use_true_random=False))
def test_neither_the_order_of_a_set_nor_that_of_the_fields_matters(names: frozenset[str], countries: frozenset[str], chance: Any) -> None:
    card = replace(CARD, refuses_organisations=names, refuses_countries=countries)
    packed = list(msgspec.to_builtins(card, builtin_types=(bytes,)).items())
    chance.shuffle(packed)
    for name, value in packed:
        if isinstance(value, list | tuple):
            packed[packed.index((name, value))] = (name, chance.sample(list(value), len(value)))
    assert card_bytes(msgspec.msgpack.decode(msgspec.msgpack.encode(dict(packed)), type=Card)) == card_bytes(card)


def test_a_field_that_is_not_known_here_changes_nothing_while_it_is_at_its_default() -> None:
    class Later(Card, frozen=True, kw_only=True):
        refuses_models: frozenset[str] = frozenset()

    later = Later(**msgspec.structs.asdict(CARD))
    read = msgspec.convert(msgspec.to_builtins(signed_card(later, KEY.sign), builtin_types=(bytes,)), Card, builtin_types=(bytes,))
    assert card_verifies(read)
    picky = signed_card(replace(later, refuses_models=frozenset({"big"})), KEY.sign)
    assert card_verifies(picky)
    read = msgspec.convert(msgspec.to_builtins(picky, builtin_types=(bytes,)), Card, builtin_types=(bytes,))
    assert not card_verifies(read), "its owner's refusal can't be kept here"


def test_the_bytes_are_these() -> None:
    """Whoever changes them makes a new version: old signatures must not be lost."""
    fields = {
        "expires_at_ms": 10**12,
        "hardware": {"cores": 4, "isa": "x86_64-avx2", "kind": "cpu", "memory_bytes": 2**33},
        "isolation": "none",
        "node_id": KEY.public,
        "org_id": "home",
        "region": "eu-de",
        "sequence": 7,
        "serves": ["own", "partner"],
    }
    assert card_bytes(SIGNED) == b"fallow/card/v1\0" + msgspec.msgpack.encode(fields)
    assert enrol_bytes(ENROL) == b"fallow/enrol/v1\0" + msgspec.msgpack.encode(
        {"at_s": 1_700_000_000, "invite": "word", "public_key": KEY.public, "role": "node"}
    )
    assert kem_bytes(NodeId(KEY.public), KEM) == b"fallow/kem/v1\0" + msgspec.msgpack.encode(
        [KEY.public, "mlkem768-x25519", KEM.public_key, 1_000]
    )
    assert agreement_bytes(AGREEMENT) == b"fallow/agreement/v1\0" + msgspec.msgpack.encode({"begins_at_ms": 5, "left": "a", "right": "b"})


@pytest.mark.parametrize(
    "change", [{"role": "gateway"}, {"public_key": make_key("user").public}, {"invite": "other"}, {"invite": ""}, {"at_s": 1_700_000_001}]
)
def test_a_proof_covers_all_of_a_request_to_enrol(change: dict[str, Any]) -> None:
    assert enrol_bytes(replace(ENROL, **change)) != enrol_bytes(ENROL)
    assert enrol_bytes(replace(ENROL, proof=bytes(64))) == enrol_bytes(ENROL)


@pytest.mark.parametrize("change", [{"left": "x"}, {"right": "x"}, {"left": "b", "right": "a"}, {"begins_at_ms": 6}])
def test_both_sides_sign_the_same_bytes_of_an_agreement(change: dict[str, Any]) -> None:
    assert agreement_bytes(replace(AGREEMENT, **change)) != agreement_bytes(AGREEMENT)
    signed = replace(AGREEMENT, left_signature=b"x", right_signature=b"y", ends_at_ms=9)
    assert agreement_bytes(signed) == agreement_bytes(AGREEMENT)

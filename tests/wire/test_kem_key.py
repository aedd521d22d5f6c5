"""A node's KEM key: signed by the node, for a while, and not for longer."""

from typing import Any

import pytest
from msgspec.structs import replace

from fallow.adapters.nkey import make_key
from fallow.apps.node.seals import KEM_LIFE_S
from fallow.model.ids import NodeId
from fallow.model.messages import KemKey
from fallow.wire.sign import CLOCKS_S, KEM_S_MAX, kem_bytes, kem_verifies

KEY, OTHER = make_key("user"), make_key("user")
ID = NodeId(KEY.public)
NOW_S = 1_800_000_000


def signed(**changes: Any) -> KemKey:
    kem = replace(KemKey(suite="x25519", public_key=b"k" * 32, expires_at_s=NOW_S + KEM_S_MAX), **changes)
    return replace(kem, signature=KEY.sign(kem_bytes(ID, kem)))


def test_one_that_its_node_signed() -> None:
    assert kem_verifies(ID, signed(), now_s=NOW_S)
    assert KEM_LIFE_S <= KEM_S_MAX


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "mlkem768-x25519"},
        {"public_key": b"k" * 31 + b"l"},
        {"public_key": b"k" * 33},
        {"expires_at_s": NOW_S + KEM_S_MAX - 1},
        {"signature": b""},
        {"signature": bytes(64)},
        {"signature": OTHER.sign(kem_bytes(ID, signed()))},
    ],
    ids=range(7),
)
def test_any_change_is_noticed(change: dict[str, Any]) -> None:
    assert not kem_verifies(ID, replace(signed(), **change), now_s=NOW_S)


def test_of_another_node() -> None:
    assert not kem_verifies(NodeId(OTHER.public), signed(), now_s=NOW_S)
    for node_id in ("", "U", "A" + KEY.public[1:], KEY.public[:-1]):
        assert not kem_verifies(NodeId(node_id), signed(), now_s=NOW_S)


@pytest.mark.parametrize(
    ("expires_in_s", "good"),
    [
        (-CLOCKS_S - 1, False),
        (-CLOCKS_S, True),
        (0, True),
        (KEM_S_MAX, True),
        (KEM_S_MAX + CLOCKS_S, True),
        (KEM_S_MAX + CLOCKS_S + 1, False),
        (10**9, False),
    ],
)
def test_it_is_good_for_a_while(expires_in_s: int, good: bool) -> None:
    assert kem_verifies(ID, signed(expires_at_s=NOW_S + expires_in_s), now_s=NOW_S) == good


def test_an_organisation_s_key_signs_none() -> None:
    key = make_key("account")
    kem = signed()
    kem = replace(kem, signature=key.sign(kem_bytes(NodeId(key.public), kem)))
    assert not kem_verifies(NodeId(key.public), kem, now_s=NOW_S)

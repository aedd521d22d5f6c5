"""Public keys as text, and signatures: against the NATS library's own keys, and against whatever somebody may send."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.adapters.nkey import Kind, make_key
from fallow.model.errors import WireError
from fallow.wire.nkey_text import PREFIXES, raw_public, verifies

PROMISE = settings(max_examples=100)
KINDS: tuple[Kind, ...] = ("operator", "account", "user")
KEY = make_key("user")
SIGNATURE = KEY.sign(b"data")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_key_signs_verifies(kind: Kind) -> None:
    key = make_key(kind)
    assert key.public[0] == PREFIXES[kind]
    assert len(raw_public(key.public, PREFIXES[kind])) == 32
    assert verifies(key.public, b"data", key.sign(b"data"))
    assert not verifies(key.public, b"data ", key.sign(b"data"))
    assert not verifies(make_key(kind).public, b"data", key.sign(b"data"))


def test_the_key_is_what_the_letters_say() -> None:
    assert raw_public(KEY.public, "U") == base64.b32decode(KEY.public)[1:33]


BAD = ["", "U", KEY.public[:-1], KEY.public + "A", KEY.public.lower(), KEY.public[:-1] + "1", KEY.public[:-1] + "=", KEY.public[:-1] + "ü",
       " " + KEY.public[1:], "S" + KEY.public[1:], KEY.public[:30] + " " + KEY.public[31:], "=" * 56, "A" * 56, "U" * 56]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(WireError) as caught:
        raw_public(text, "U")
    assert "\n" not in caught.value.message
    assert not verifies(text, b"data", SIGNATURE)


@pytest.mark.parametrize("prefix", ["A", "O", "S", "N", "", "UU", "u"])
def test_a_key_of_another_kind_is_refused(prefix: str) -> None:
    with pytest.raises(WireError):
        raw_public(KEY.public, prefix)


@pytest.mark.parametrize("at", range(0, 56, 5))
def test_a_letter_that_was_mistyped_is_noticed(at: int) -> None:
    other = "A" if KEY.public[at] != "A" else "B"
    with pytest.raises(WireError):
        raw_public(KEY.public[:at] + other + KEY.public[at + 1 :], "U")


@PROMISE
@given(st.text(max_size=60), st.binary(max_size=70))
def test_nothing_raises(public: str, signature: bytes) -> None:
    assert not verifies(public, b"data", signature)
    assert not verifies(KEY.public, b"data", signature)


@PROMISE
@given(st.integers(0, 511))
def test_any_bit_of_a_signature_counts(bit: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[bit // 8] ^= 1 << bit % 8
    assert not verifies(KEY.public, b"data", bytes(changed))

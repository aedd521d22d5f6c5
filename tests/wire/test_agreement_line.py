"""The lines that two organisations pass to each other: who signed, and nothing that doesn't fit."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.adapters.nkey import make_key
from fallow.model.errors import WireError
from fallow.model.ids import OrgId
from fallow.wire import token_text
from fallow.wire.agreement_line import PREFIX, Line, proposed, read, signed, write

ACME, HOME = OrgId("acme"), OrgId("home")
PAIRS = {ACME: make_key("account"), HOME: make_key("account")}


def line_of(*signers: OrgId) -> Line:
    line = proposed(HOME, ACME, begins_at_ms=5)
    for name in signers:
        line = signed(line, name, PAIRS[name].public, PAIRS[name].sign)
    return line


def text_of(line: Line) -> str:
    """Whatever it says."""
    return token_text.wrap(PREFIX, msgspec.msgpack.encode(line))


@pytest.mark.parametrize("signers", [(), (ACME,), (HOME,), (ACME, HOME), (HOME, ACME)])
def test_a_line_says_who_signed(signers: tuple[OrgId, ...]) -> None:
    line = read(write(line_of(*signers)))
    assert line == line_of(*signers)
    assert line.keys == {name: PAIRS[name].public for name in signers}
    assert (line.left, line.right) == (ACME, HOME), "whoever begins"


@pytest.mark.parametrize(
    "changes",
    [
        {"begins_at_ms": 6},
        {"right": "other"},
        {"left_key": PAIRS[HOME].public},
        {"left_signature": b""},
        {"left_signature": line_of(HOME).right_signature},
        {"left_key": make_key("user").public},
        {"left": "zebra"},
        {"left": "home"},
        {"left": "a b"},
        {"left_key": "A123"},
        {"left_signature": b"x" * 65},
    ],
)
def test_what_was_changed_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(WireError):
        read(text_of(msgspec.structs.replace(line_of(ACME, HOME), **changes)))


def test_the_key_of_a_node_is_no_organisations() -> None:
    node = make_key("user")
    line = signed(proposed(HOME, ACME, begins_at_ms=5), HOME, node.public, node.sign)
    assert line.keys == {}
    with pytest.raises(WireError):
        read(text_of(line))


@pytest.mark.parametrize(("one", "other"), [("home", "home"), ("", "home"), ("a.b", "home"), ("x" * 64, "home")])
def test_an_agreement_is_between_two_organisations(one: str, other: str) -> None:
    with pytest.raises(WireError):
        proposed(OrgId(one), OrgId(other), begins_at_ms=0)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        read(token_text.wrap(PREFIX, data))


def test_an_invitation_is_no_line() -> None:
    with pytest.raises(WireError, match="no line of an agreement"):
        read("fallow1-abc")

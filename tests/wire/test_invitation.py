"""The token of an invitation: what was written is read again, and nothing else is taken."""

import base64
import hashlib
import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.errors import WireError
from fallow.wire import invitation as module
from fallow.wire import token_text
from fallow.wire.invitation import PREFIX, Invitation, read, write

CA = "-----BEGIN CERTIFICATE-----\n" + "MIIBszCCAVmgAwIBAgIUabcdefgh\n" * 20 + "-----END CERTIFICATE-----\n"
FULL = Invitation(
    addresses=("tls://hub.example:8422", "wss://hub.example/broker"),
    ca_pem=CA,
    door_jwt="e.y.J" * 100,
    door_seed="SU" + "A" * 56,
    word="w" * 40,
)

texts = st.text(max_size=128)
invitations = st.builds(
    Invitation,
    addresses=st.lists(st.from_regex(r"(nats|tls|wss)://[a-z0-9.]{1,40}:[0-9]{1,5}", fullmatch=True), min_size=1, max_size=8).map(tuple),
    ca_pem=st.text(max_size=2_000),
    door_jwt=texts,
    door_seed=texts,
    word=texts,
)


def token_of(packed: bytes) -> str:
    """A token around any bytes, with the right checksum."""
    return around(zlib.compress(packed))


def around(squeezed: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(squeezed + hashlib.sha256(squeezed).digest()[:4]).rstrip(b"=").decode()


@settings(max_examples=100)
@given(invitations)
def test_what_was_written_is_read_again(invitation: Invitation) -> None:
    token = write(invitation)
    assert read(token) == invitation
    assert token.startswith("fallow1-")
    assert token.isascii()
    assert not set(token) & set(" \n\"'$\\/+="), "it is one word in any shell"


def test_certificates_are_made_small() -> None:
    assert len(write(FULL)) < len(CA)


def test_line_breaks_of_a_terminal_do_not_matter() -> None:
    token = write(FULL)
    assert read("  " + "\n".join(token[at : at + 70] for at in range(0, len(token), 70)) + " \n") == FULL


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.sampled_from("abcXYZ09-_"))
def test_a_mistyped_letter_is_noticed(at: int, letter: str) -> None:
    token = write(FULL)
    at = len(PREFIX) + at % (len(token) - len(PREFIX))
    wrong = token[:at] + letter + token[at + 1 :]
    # The last character may carry bits that say nothing.
    if wrong != token and at < len(token) - 1:
        with pytest.raises(WireError, match="cut off or mistyped"):
            read(wrong)


@settings(max_examples=100)
@given(st.integers(0, 10_000))
def test_a_token_that_is_cut_off_is_noticed(length: int) -> None:
    token = write(FULL)
    with pytest.raises(WireError) as caught:
        read(token[: length % len(token)])
    assert "\n" not in caught.value.message


@settings(max_examples=100)
@given(st.text(max_size=300), st.booleans())
def test_any_text_is_read_or_refused(text: str, begins_well: bool) -> None:
    with pytest.raises(WireError):
        read((PREFIX if begins_well else "") + text)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_with_a_right_checksum_are_refused(data: bytes) -> None:
    for token in (token_of(data), around(data)):
        with pytest.raises(WireError):
            read(token)


def test_more_than_can_be_unpacked_is_not() -> None:
    with pytest.raises(WireError, match="unpacks to more than"):
        read(token_of(b"\x00" * 10_000_000))


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(WireError, match="damaged"):
        read(around(zlib.compress(msgspec.msgpack.encode(FULL)) + b"more"))


@pytest.mark.parametrize(
    "field",
    [
        {"addresses": ()},
        {"addresses": ("nats://a",) * 9},
        {"addresses": ("http://a",)},
        {"addresses": ("nats://user:secret@a",)},
        {"addresses": ("nats://a b",)},
        {"addresses": ("nats://" + "a" * 257,)},
        {"ca_pem": "a" * (module.CA_CHARS_MAX + 1)},
        {"door_jwt": "a" * 4_097},
        {"door_seed": "a" * 129},
        {"word": "a" * 129},
    ],
)
def test_what_is_too_long_or_no_address_is_neither_written_nor_read(field: dict[str, object]) -> None:
    wrong = msgspec.structs.replace(FULL, **field)
    with pytest.raises(WireError):
        write(wrong)
    with pytest.raises(WireError, match="doesn't understand"):
        read(token_of(msgspec.msgpack.encode(wrong)))


def test_a_word_that_is_far_too_long_is_refused_unread() -> None:
    for length in (token_text.TOKEN_CHARS_MAX + 1, 3 * token_text.TOKEN_CHARS_MAX):
        with pytest.raises(WireError, match="longer than any invitation"):
            read(PREFIX + "A" * length)


def test_a_later_version_may_add_fields() -> None:
    more = msgspec.to_builtins(FULL) | {"colour": "green"}
    assert read(token_of(msgspec.msgpack.encode(more))) == FULL


def test_secrets_are_in_no_text_of_it() -> None:
    for text in (repr(FULL), str(FULL), str(FULL.__rich_repr__())):
        assert FULL.word not in text
        assert FULL.door_seed not in text
        assert "hub.example" in text


def test_a_refusal_never_repeats_the_token() -> None:
    token = write(FULL)
    with pytest.raises(WireError) as caught:
        read(token[:-9])
    assert token[8:40] not in caught.value.message

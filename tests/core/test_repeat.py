"""What a request under a known `Idempotency-Key` means, which keys there are, and which answers are kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.apps.gateway.errors import TABLE
from fallow.core.repeat import (
    HEADER,
    KEPT_MS,
    KEY_CHARS_MAX,
    RECORDING_BYTES_MAX,
    RECORDINGS_BYTES_MAX,
    RECORDINGS_MAX,
    TRY_AGAIN,
    AnswerLost,
    Fresh,
    Full,
    Known,
    OtherBody,
    Same,
    digest_of,
    fits,
    is_kept,
    is_old,
    meaning,
    read_key,
    refusal,
)
from fallow.model.errors import Failure

PROMISE = settings(max_examples=100)
DIGEST = digest_of("/v1/chat/completions", b"{}")
KNOWN = Known(digest=DIGEST, call_id="call_1", is_lost=False)
UUID = "8e03978e-40d5-43dd-bc93-6894a57f9324"


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ([], None),
        ([UUID.encode()], UUID),
        ([f'"{UUID}"'.encode()], UUID),
        ([f' \t"{UUID}" '.encode()], UUID),
        ([f'"{UUID}";a=1;b'.encode()], UUID),
        ([f'"{UUID}" ;a'.encode()], UUID),
        ([b"a"], "a"),
        ([b'a"b'], 'a"b'),
        ([b"a\\b"], "a\\b"),
        ([b"two words, and more;a=1"], "two words, and more;a=1"),
        ([b'"a\\"b\\\\c"'], 'a"b\\c'),
        ([b'" a "'], " a "),
        ([b"!" + b"~" * (KEY_CHARS_MAX - 1)], "!" + "~" * (KEY_CHARS_MAX - 1)),
        ([b'"' + b'\\"' * KEY_CHARS_MAX + b'"'], '"' * KEY_CHARS_MAX),
    ],
)
def test_keys(lines: list[bytes], key: str | None) -> None:
    assert read_key(lines) == key


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([b""], "is empty"),
        ([b" \t "], "is empty"),
        ([b'""'], "is empty"),
        ([b"a" * (KEY_CHARS_MAX + 1)], "is over 255 characters"),
        ([b'"' + b"a" * (KEY_CHARS_MAX + 1) + b'"'], "is over 255 characters"),
        ([b'"'], "no quoted string"),
        ([b'"a'], "no quoted string"),
        ([b'"a"b"'], "no quoted string"),
        ([b'"a\\'], "no quoted string"),
        ([b'"a\\b"'], "no quoted string"),
        ([b'"a", "b"'], "no quoted string"),
        ([b"a\tb"], "printable"),
        ([b"a\x00"], "printable"),
        ([b"a\x7f"], "printable"),
        (["schlüssel".encode()], "printable"),
        ([b'"\xff"'], "printable"),
        ([b"a", b"a"], "more than once"),
        ([b"", b"a"], "more than once"),
    ],
)
def test_what_is_no_key(lines: list[bytes], why: str) -> None:
    failure = read_key(lines)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.param) == ("invalid_request", HEADER)
    assert why in failure.message
    assert "schl" not in failure.message, "what callers send is never told"


@PROMISE
@given(st.lists(st.binary(max_size=300), max_size=2))
def test_any_header_is_a_key_within_the_limits_or_a_refusal(lines: list[bytes]) -> None:
    key = read_key(lines)
    if isinstance(key, str):
        assert 0 < len(key) <= KEY_CHARS_MAX
        assert key.isascii()
        assert key.isprintable()
    else:
        assert (key is None) == (not lines)


@PROMISE
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=KEY_CHARS_MAX))
def test_every_key_can_be_quoted(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert read_key([quoted.encode()]) == key
    if key == key.strip() and not key.startswith('"'):
        assert read_key([key.encode()]) == key, "with and without quotes it is the same key"


@pytest.mark.parametrize(
    ("known", "is_full", "expected"),
    [
        (None, False, Fresh()),
        (None, True, Full()),
        (KNOWN, False, Same()),
        (KNOWN, True, Same()),
        (replace(KNOWN, digest=b"other"), False, OtherBody()),
        (replace(KNOWN, digest=b"other"), True, OtherBody()),
        (replace(KNOWN, digest=b"other", is_lost=True), False, OtherBody()),
        (replace(KNOWN, is_lost=True), False, AnswerLost(call_id="call_1")),
        (replace(KNOWN, is_lost=True), True, AnswerLost(call_id="call_1")),
    ],
)
def test_what_a_request_means(known: Known | None, is_full: bool, expected: object) -> None:
    assert meaning(known, DIGEST, is_full=is_full) == expected


@PROMISE
@given(st.sampled_from(["/v1/a", "/v1/ab", "/v1/chat"]), st.binary(max_size=9), st.sampled_from(["/v1/a", "/v1/ab"]), st.binary(max_size=9))
def test_a_digest_tells_path_and_body(path: str, body: bytes, other_path: str, other_body: bytes) -> None:
    same = (path, body) == (other_path, other_body)
    assert (digest_of(path, body) == digest_of(other_path, other_body)) == same


@pytest.mark.parametrize(
    ("why", "code", "words"),
    [
        (OtherBody(), "idempotency_conflict", "key of its own"),
        (AnswerLost(call_id="call_7"), "idempotency_answer_too_long", "/v1/calls/call_7"),
        (Full(), "too_many_calls", str(RECORDINGS_MAX)),
    ],
)
def test_refusals_say_what_lifts_them(why: OtherBody | AnswerLost | Full, code: str, words: str) -> None:
    failure = refusal(why)
    assert failure.code == code
    assert words in failure.message
    assert (failure.retry_after_ms is not None) == isinstance(why, Full)


@pytest.mark.parametrize(
    ("status", "node_asked", "kept"),
    [
        (200, True, True),
        (200, False, True),  # a quote
        (204, True, True),
        (400, False, False),
        (400, True, True),
        (404, False, False),
        (409, False, False),
        (422, True, True),
        (401, True, False),
        (408, True, False),
        (429, False, False),
        (429, True, False),
        (500, False, False),
        (500, True, True),
        (502, True, True),
        (503, False, False),
        (503, True, False),
        (504, True, True),
        (0, False, False),
        (0, True, True),  # it broke off without an answer: who knows how far it came
    ],
)
def test_which_answers_are_kept(status: int, node_asked: bool, kept: bool) -> None:
    assert is_kept(status, node_asked=node_asked) is kept


@pytest.mark.parametrize("code", sorted(TABLE))
def test_an_error_is_kept_only_if_a_node_was_asked_and_nobody_said_try_again(code: str) -> None:
    status = TABLE[code].http
    assert not is_kept(status, node_asked=False)
    assert is_kept(status, node_asked=True) == (status not in TRY_AGAIN)


@pytest.mark.parametrize(
    ("size", "more", "does"),
    [(0, 0, True), (0, RECORDING_BYTES_MAX, True), (0, RECORDING_BYTES_MAX + 1, False), (1, RECORDING_BYTES_MAX, False)],
)
def test_what_fits(size: int, more: int, does: bool) -> None:
    assert fits(size, more) is does


@pytest.mark.parametrize(("age_ms", "old"), [(0, False), (KEPT_MS, False), (KEPT_MS + 1, True)])
def test_what_is_old(age_ms: int, old: bool) -> None:
    assert is_old(5, now_ms=5 + age_ms) is old


def test_one_recording_fits_into_all() -> None:
    assert RECORDING_BYTES_MAX <= RECORDINGS_BYTES_MAX

"""How long a caller is willing to wait, out of a header that may say anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.errors import InvalidRequest
from fallow.wire.prefer import HEADER_BYTES_MAX, WAIT_S_MAX, wait_s

PROMISE = settings(max_examples=100)


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([], None),
        ([b""], None),
        ([b"wait=60"], 60),
        ([b"wait=0"], 0),
        ([b"wait=007"], 7),
        ([b"WAIT = 60 "], 60),
        ([b'wait="60"'], 60),
        ([b"wait=600"], 600),
        ([b"wait=601"], WAIT_S_MAX),
        ([b"wait=" + b"9" * 4_000], WAIT_S_MAX),
        ([b"wait=60;why=x"], 60),
        ([b"respond-async, wait=60"], 60),
        ([b"respond-async", b"wait=60"], 60),
        ([b"wait=5, wait=60"], 5),
        ([b"wait=5, wait=soon"], 5),
        ([b",, ,wait=5,"], 5),
        ([b'return=minimal; foo="some parameter"'], None),
        ([b'note="a, wait=9", wait=5'], 5),
        ([b'note="a \\", wait=9", wait=5'], 5),
        ([b"awaiting=soon, handling=lenient"], None),
        ([b'note="never closed, wait=5'], None),
        ([b"\xff\xfe"], None),
    ],
)
def test_wait(lines: list[bytes], seconds: int | None) -> None:
    assert wait_s(lines) == seconds


@pytest.mark.parametrize("value", ["", "=", "=soon", "=-1", "=1.5", "=+5", "=1e2", '="', '="5', "=5 s", "=\xb2"])
def test_a_wait_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(InvalidRequest, match="wait=60") as caught:
        wait_s([f"wait{value}".encode("latin-1")])
    assert caught.value.param == "Prefer"


def test_a_header_that_is_too_long() -> None:
    with pytest.raises(InvalidRequest, match=str(HEADER_BYTES_MAX)) as caught:
        wait_s([b"x" * HEADER_BYTES_MAX, b""])
    assert caught.value.param == "Prefer"


@PROMISE
@given(st.lists(st.binary(max_size=60) | st.text(' wait=",;\\0123', max_size=30).map(str.encode), max_size=3))
def test_any_header_is_read_or_refused(lines: list[bytes]) -> None:
    named: str | None = "Prefer"
    seconds = None
    try:
        seconds = wait_s(lines)
    except InvalidRequest as error:
        named = error.param
    assert named == "Prefer"
    assert seconds is None or 0 <= seconds <= WAIT_S_MAX

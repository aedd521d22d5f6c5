"""What a node commits to: the whole answer, however it was cut, to what was asked, in which attempt, of which model."""

import hashlib
import hmac
import itertools
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.ids import AttemptId
from fallow.model.messages import TOKENS_MAX, TokenId
from fallow.model.receipt import Usage
from fallow.wire.commitment import Commitment

PROMISE = settings(max_examples=100)
USAGE = Usage(prompt_tokens=1, cached_tokens=2, output_tokens=3)


def digest_of(
    *pieces: bytes,
    attempt: str = "attempt",
    body: bytes | bytearray = b"body",
    model: str = "sha256:model",
    usage: Usage | None = USAGE,
    tokens: Sequence[TokenId] = (4, 5),
) -> bytes:
    commitment = Commitment(AttemptId(attempt), body, model)
    for piece in pieces:
        commitment.add(piece)
    return commitment.digest(usage, tokens)


def test_as_it_is_written_down() -> None:
    def prefixed(*parts: bytes) -> bytes:
        return b"".join(struct.pack(">I", len(part)) + part for part in parts)

    def sha256(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    begun = sha256(prefixed(b"fallow/answer/v1", b"attempt", sha256(b"body"), b"sha256:model"))
    whole = sha256(prefixed(begun, sha256(b"an answer"), struct.pack(">QQQ", 1, 2, 3), struct.pack(">II", 4, 5)))
    assert hmac.compare_digest(digest_of(b"an ", b"answer"), whole)


@PROMISE
@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_how_it_is_cut_changes_nothing(data: bytes, places: list[int]) -> None:
    cuts = sorted({0, len(data), *(place for place in places if place < len(data))})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(cuts)]
    assert digest_of(*pieces) == digest_of(data) == digest_of(b"", data, b"")
    assert digest_of(data, body=bytearray(b"body")) == digest_of(data)


@pytest.mark.parametrize(
    "other",
    [
        digest_of(b"answer "),
        digest_of(b"answe"),
        digest_of(),
        digest_of(b"rewsna"),
        digest_of(b"answer", attempt="attemp"),
        digest_of(b"answer", attempt="attempt "),
        digest_of(b"answer", body=b"bod"),
        digest_of(b"answer", body=b""),
        digest_of(b"answer", model="sha256:other"),
        digest_of(b"answer", model=""),
        digest_of(b"answer", usage=None),
        digest_of(b"answer", usage=Usage()),
        digest_of(b"answer", usage=Usage(prompt_tokens=2, cached_tokens=1, output_tokens=3)),
        digest_of(b"answer", usage=Usage(prompt_tokens=1, cached_tokens=2, output_tokens=4)),
        digest_of(b"answer", tokens=()),
        digest_of(b"answer", tokens=(4,)),
        digest_of(b"answer", tokens=(5, 4)),
        digest_of(b"answer", tokens=(4, 5, 0)),
    ],
    ids=range(18),
)
def test_all_else_does(other: bytes) -> None:
    assert other != digest_of(b"answer")
    assert len(other) == 32


facts = st.tuples(
    st.binary(max_size=3),
    st.sampled_from(["a", "ab", "b"]),
    st.binary(max_size=2),
    st.sampled_from(["", "b", "ab"]),
    st.none() | st.builds(Usage, prompt_tokens=st.integers(0, 2), cached_tokens=st.integers(0, 1), output_tokens=st.integers(0, 2**40)),
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
)


@PROMISE
@given(facts, facts)
def test_two_answers_are_alike_only_if_they_are_the_same(left: tuple[object, ...], right: tuple[object, ...]) -> None:
    def digest(data: bytes, attempt: str, body: bytes, model: str, usage: Usage | None, tokens: list[int]) -> bytes:
        return digest_of(data, attempt=attempt, body=body, model=model, usage=usage, tokens=tokens)

    assert (digest(*left) == digest(*right)) == (left == right)  # type: ignore[arg-type]


def test_its_ends() -> None:
    """The most that the messages' types let through."""
    assert digest_of(usage=Usage(prompt_tokens=2**40, cached_tokens=2**40, output_tokens=2**40), tokens=(2**32 - 1,) * TOKENS_MAX)

"""The judge of what callers saw: it finds each violation, and nothing where there is none."""

import pytest
from histories import Cut, Damage, Done, Event, Failed, Left, Seen, Text, damage, judge, judge_all
from hypothesis import given, settings
from hypothesis import strategies as st

WORDS = [f"word{number:04d} " for number in range(20)]
RIGHT = "".join(WORDS)
HEADERS = {"fallow-call": "call_1"}


def seen(*events: Event | str, status: int = 200, headers: dict[str, str] | None = None, name: str = "a") -> Seen:
    """A call; a plain text is a piece that came."""
    timed: tuple[Event, ...] = tuple(Text(one, at / 10) if isinstance(one, str) else one for at, one in enumerate(events))
    return Seen(name=name, right=RIGHT, status=status, headers=HEADERS if headers is None else headers, events=timed)


def rules(call: Seen) -> list[str]:
    return [fault.rule for fault in judge(call)]


DONE, INTERRUPTED = Done(9.0), Failed("stream_interrupted", 9.0)


@pytest.mark.parametrize(
    "call",
    [
        seen(*WORDS, DONE),
        seen(RIGHT, DONE),
        seen(*WORDS[:7], INTERRUPTED),
        seen(INTERRUPTED),
        seen(*WORDS[:7], Left(9.0)),
        seen(Left(9.0), status=0, headers={}),
        seen(Failed("no_capacity", 1.0), status=503, headers={"retry-after": "2"}),
        seen(Failed("rate_limited", 1.0), status=429, headers={"retry-after": "30"}),
        seen(Failed("engine_failed", 1.0), status=502),
    ],
)
def test_what_is_right(call: Seen) -> None:
    assert judge(call) == []


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (seen(*WORDS), ["no_end"]),
        (seen(status=0), ["no_end"]),
        (seen(*WORDS[:3], Cut(1.0)), ["cut"]),
        (seen(*WORDS, DONE, DONE), ["many_ends"]),
        (seen(*WORDS[:3], INTERRUPTED, DONE), ["many_ends", "incomplete"]),
        (seen(*WORDS[:19], DONE, WORDS[19]), ["text_after_end"]),
        (seen(*WORDS[:19], DONE), ["incomplete"]),
        (seen(DONE), ["incomplete"]),
        (seen(*WORDS[:5], *WORDS[4:], DONE), ["repeated"]),
        (seen(*WORDS[:5], *WORDS[6:], DONE), ["missing"]),
        (seen(*WORDS[:5], "another!!", *WORDS[5:], DONE), ["strange"]),
        (seen(*WORDS, "another!!", DONE), ["strange"]),
        (seen(*WORDS[:5], *WORDS[6:9], INTERRUPTED), ["missing"]),
        (seen(*WORDS[:5], *WORDS[3:7], Left(1.0)), ["repeated"]),
        (seen(*WORDS[:5], Failed("node_silent", 1.0)), ["other_code"]),
        (seen(*WORDS[:5], Failed("", 1.0)), ["untyped"]),
        (seen(Failed("no_capacity", 1.0), status=503), ["no_retry_after"]),
        (seen(Failed("no_capacity", 1.0), status=503, headers={"retry-after": "0"}), ["no_retry_after"]),
        (seen(Failed("rate_limited", 1.0), status=429, headers={"retry-after": "soon"}), ["no_retry_after"]),
        (seen(Failed("", 1.0), status=502), ["untyped"]),
        (seen(*WORDS, DONE, status=502), ["text_of_error", "done_of_error"]),
    ],
)
def test_what_is_wrong(call: Seen, found: list[str]) -> None:
    assert rules(call) == found


def test_other_ends_may_be_allowed() -> None:
    call = seen(*WORDS[:5], Failed("gateway_stopping", 1.0))
    assert rules(call) == ["other_code"]
    assert judge(call, interruptions=frozenset({"gateway_stopping"})) == []


def test_calls_have_ids_of_their_own() -> None:
    one, two = seen(*WORDS, DONE, name="a"), seen(*WORDS, DONE, name="b")
    assert [fault.rule for fault in judge_all([one, two])] == ["shared_id"]
    other = seen(*WORDS, DONE, name="b", headers={"fallow-call": "call_2"})
    assert judge_all([one, other]) == []
    assert judge_all([one, seen(Left(1.0), status=0, headers={}, name="b"), seen(Left(1.0), status=0, headers={}, name="c")]) == []
    assert [fault.name for fault in judge_all([one, seen(*WORDS, name="c", headers={"fallow-call": "call_3"})])] == ["c"]


def test_what_a_call_says_of_itself() -> None:
    call = seen(*WORDS, DONE)
    assert call.is_complete
    assert (call.first_s, call.ended_s, call.code) == (0.0, 9.0, None)
    assert not seen(*WORDS[:19], DONE).is_complete
    assert not seen(*WORDS, INTERRUPTED).is_complete
    assert not seen(DONE, status=502).is_complete
    assert (seen(INTERRUPTED).first_s, seen(INTERRUPTED).code) == (None, "stream_interrupted")


@settings(max_examples=100)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_damage_is_counted_in_characters(cut: int, back: int, end: int) -> None:
    """A text up to `cut` that goes on at `back`."""
    text = "".join(WORDS[:cut] + WORDS[back:end])
    harm = damage(text, RIGHT)
    if back >= end:
        assert harm == Damage(0, 0, 0)
    else:
        assert harm == Damage(repeated=9 * max(0, cut - back), missing=9 * max(0, back - cut), strange=0)
    assert bool(harm.total) is not RIGHT.startswith(text)


@settings(max_examples=100)
@given(st.text("ab ", max_size=40), st.text("ab ", max_size=40))
def test_damage_ends_for_any_texts(delivered: str, right: str) -> None:
    harm = damage(delivered, right)
    assert min(harm) >= 0
    assert bool(harm.total) is not right.startswith(delivered)


def test_damage_counts_what_was_never_in_the_answer() -> None:
    assert damage("".join(WORDS[:3]) + "nonsense!" + "".join(WORDS[3:]), RIGHT) == Damage(0, 0, 9)

"""Stop sequences that the engine isn't trusted with: the text ends at the first of them, and it is named."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.wire.generation import Ended, Event, Reasoning, Text, Token
from fallow.wire.stop import StopCutter

PROMISE = settings(max_examples=400)
TOKEN = Token("a", [97], -0.5)

some_text = st.text(alphabet="abc", max_size=14)
some_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)
some_places = st.lists(st.integers(0, 14), max_size=8)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """The slow way: read character by character until the text ends with a stop sequence; the longest of several is the one."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return None


def run(stops: list[str], pieces: list[str]) -> tuple[list[Event], StopCutter]:
    cutter = StopCutter(stops)
    out: list[Event] = []
    for piece in pieces:
        out += cutter.feed([Text(3, piece)])
    return out + cutter.feed([Ended(3, "length")]), cutter


@PROMISE
@given(some_text, some_stops, some_places)
def test_the_text_ends_before_its_first_stop_however_it_is_cut(text: str, stops: list[str], places: list[int]) -> None:
    out, cutter = run(stops, cut(text, places))
    *texts, ended = out
    expected = first_stop(text, stops)
    assert "".join(one.text for one in texts if isinstance(one, Text)) == (text if expected is None else expected[0])
    assert ended == (Ended(3, "length") if expected is None else Ended(3, "stop", expected[1]))
    assert all(isinstance(one, Text) and one.choice == 3 and one.text for one in texts)
    assert cutter.has_met == (expected is not None)


@PROMISE
@given(some_text, some_stops, some_places)
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str], places: list[int]) -> None:
    cutter = StopCutter(stops)
    seen = told = ""
    for piece in cut(text, places):
        seen += piece
        told += "".join(one.text for one in cutter.feed([Text(0, piece)]) if isinstance(one, Text))
        if cutter.has_met:
            return
        held = seen.removeprefix(told)
        assert seen == told + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stop"),
    [
        ([], ["a", "b"], "ab", None),
        (["END"], ["one E", "N", "D two"], "one ", "END"),
        (["END"], ["one E", "N", "d two"], "one ENd two", None),
        (["END"], ["one EN"], "one EN", None),  # what was held comes out at the end
        (["END"], ["END"], "", "END"),
        (["\n\n"], ["a\n", "\nb"], "a", "\n\n"),
        (["aab"], ["aaaab"], "aa", "aab"),
        (["aab"], ["aa", "a", "ab"], "aa", "aab"),
        (["ab", "abc"], ["abc"], "", "ab"),  # whole first
        (["abc", "b"], ["abc"], "a", "b"),
        (["bc", "abc"], ["abc"], "", "abc"),  # whole at once: the longer one
        (["é😀"], ["xé", "😀y"], "x", "é😀"),
    ],
)
def test_stops(stops: list[str], pieces: list[str], text: str, stop: str | None) -> None:
    out, _ = run(stops, pieces)
    assert "".join(one.text for one in out if isinstance(one, Text)) == text
    assert out[-1] == (Ended(3, "length") if stop is None else Ended(3, "stop", stop))


def test_nothing_follows_a_stop() -> None:
    cutter = StopCutter(["."])
    first = cutter.feed([Text(0, "a.b"), Text(0, "c"), Ended(0, "length")])
    assert first == [Text(0, "a"), Ended(0, "stop", ".")]
    assert cutter.feed([Text(0, "d"), Ended(0, "stop")]) == []


def test_thoughts_are_no_text() -> None:
    cutter = StopCutter(["."])
    assert cutter.feed([Reasoning(0, "Hm. Well."), Text(0, "Yes")]) == [Reasoning(0, "Hm. Well."), Text(0, "Yes")]
    assert not cutter.has_met


def test_the_log_probabilities_stay_with_the_text() -> None:
    cutter = StopCutter(["ab"])
    out = cutter.feed([Text(0, "x", (TOKEN,)), Text(0, "a", (TOKEN,)), Text(0, "c", (TOKEN,)), Text(0, "ab", (TOKEN,))])
    assert [one.text for one in out if isinstance(one, Text)] == ["x", "", "ac"]
    assert sum(len(one.tokens) for one in out if isinstance(one, Text)) == 3, "the stop's own tokens are not told"

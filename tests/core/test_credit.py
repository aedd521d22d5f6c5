"""Credit between two sides: all bytes go out once and in order, never more than allowed, and it never jams."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.credit import ANSWER_WINDOW_BYTES, BODY_WINDOW_BYTES, more, parts
from fallow.wire.subjects import PART_BYTES_MAX

PROMISE = settings(max_examples=60)


@pytest.mark.parametrize(
    ("granted", "taken", "window", "then"),
    [
        (100, 0, 100, None),
        (100, 49, 100, None),
        (100, 50, 100, 150),  # half of the window is free again
        (100, 100, 100, 200),
        (150, 99, 100, None),
        (150, 100, 100, 200),
        (1, 0, 1, None),
        (1, 1, 1, 2),
    ],
)
def test_more(granted: int, taken: int, window: int, then: int | None) -> None:
    assert more(granted, taken, window=window) == then


@pytest.mark.parametrize(
    ("size", "start", "until", "part_max", "then"),
    [
        (0, 0, 100, 10, []),
        (25, 0, 100, 10, [(0, 10), (10, 20), (20, 25)]),
        (25, 20, 100, 10, [(20, 25)]),
        (25, 25, 100, 10, []),
        (25, 0, 12, 10, [(0, 10), (10, 12)]),
        (25, 12, 12, 10, []),
        (25, 15, 12, 10, []),  # the credit is older than what went out
        (10, 0, 10, 10, [(0, 10)]),
        (11, 0, 11, 10, [(0, 10), (10, 11)]),
    ],
)
def test_parts(size: int, start: int, until: int, part_max: int, then: list[tuple[int, int]]) -> None:
    assert parts(size, start=start, until=until, part_max=part_max) == then


@PROMISE
@given(size=st.integers(0, 500), start=st.integers(0, 500), until=st.integers(0, 500), part_max=st.integers(1, 60))
def test_parts_cover_what_the_credit_allows(size: int, start: int, until: int, part_max: int) -> None:
    spans = parts(size, start=start, until=until, part_max=part_max)
    sent = [byte for begin, end in spans for byte in range(begin, end)]
    assert sent == list(range(start, min(size, until)))
    assert all(0 < end - begin <= part_max for begin, end in spans)


@PROMISE
@given(window=st.integers(1, 300), steps=st.lists(st.integers(0, 80), max_size=40))
def test_grants_only_grow_and_stay_within_the_window(window: int, steps: list[int]) -> None:
    granted, taken = window, 0
    for step in steps:
        taken = min(taken + step, granted)  # nobody can take what wasn't granted
        until = more(granted, taken, window=window)
        if until is not None:
            assert granted < until <= taken + window
            granted = until
        assert granted > taken, "the sender always has room once all was taken"


class Stream:
    """A sender and a receiver with messages under way between them, stepped in any order."""

    def __init__(self, size: int, window: int, part_max: int, first: int) -> None:
        self.size, self.window, self.part_max = size, window, part_max
        self.start = min(first, size, window)  # what went out with the request itself
        self.until = self.granted = window
        self.taken = 0
        self.parts: list[tuple[int, int]] = [(0, self.start)] if self.start else []
        self.grants: list[int] = []
        self.got: list[int] = []

    def possible(self) -> list[str]:
        able = {"send": self.start < min(self.size, self.until), "take": bool(self.parts), "credit": bool(self.grants)}
        return [name for name, can in able.items() if can]

    def do(self, what: str) -> None:
        if what == "send":
            spans = parts(self.size, start=self.start, until=self.until, part_max=self.part_max)
            assert spans
            for begin, end in spans:
                assert end <= self.granted, "beyond the credit"
                self.parts.append((begin, end))
                self.start = end
        elif what == "take":
            begin, end = self.parts.pop(0)
            self.got += range(begin, end)
            self.taken = end
            until = more(self.granted, self.taken, window=self.window)
            if until is not None:
                self.granted = until
                self.grants.append(until)
        else:
            self.until = max(self.until, self.grants.pop(0))
        assert sum(end - begin for begin, end in self.parts) <= self.window, "the receiver would have to hold more than its window"


@PROMISE
@given(
    size=st.integers(0, 400),
    window=st.integers(1, 120),
    part_max=st.integers(1, 90),
    first=st.integers(0, 90),
    seed=st.integers(0, 2**32),
)
def test_a_stream_arrives_whole_and_never_jams(size: int, window: int, part_max: int, first: int, seed: int) -> None:
    stream, chance = Stream(size, window, part_max, first), random.Random(seed)
    while able := stream.possible():
        stream.do(chance.choice(able))
    assert stream.got == list(range(size))


@pytest.mark.parametrize("window", [BODY_WINDOW_BYTES, ANSWER_WINDOW_BYTES])
def test_a_window_holds_a_whole_part(window: int) -> None:
    assert window >= PART_BYTES_MAX

"""Which of the offers is taken: the least score, of the near-best one of two by the call's own luck, ties by id."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.match.pick import EXPLORE, NAMED_MAX, NEAR, draw, pick
from fallow.model.ids import CallId, GatewayId

PROMISE = settings(max_examples=200)
GATEWAY = GatewayId("gw")
LUCK = [at / 64 for at in range(64)]


def picked(scores: list[float], sooner: list[float] | None = None, names: str = "", *, luck: float = 0.0) -> int:
    array = np.array(scores)
    names = names or "".join(chr(ord("a") + at) for at in range(len(scores)))
    return pick(array, np.array(sooner or [0.0] * len(scores)), names.__getitem__, best=int(array.argmin()), luck=luck)


@pytest.mark.parametrize(
    ("scores", "sooner", "names", "taken"),
    [
        ([5.0], [9.0], "a", {0}),
        ([6.0, 5.0, 7.0], [0.0, 9.0, 0.0], "abc", {1}),
        ([5.0, 5.05], [9.0, 1.0], "ab", {1}),  # as good, and it begins sooner
        ([5.0, 5.05], [1.0, 1.0], "ba", {0}),  # equally soon: the cheaper
        ([5.0, 5.0], [1.0, 1.0], "ba", {1}),  # ties by id
        ([5.0, 5.2], [9.0, 1.0], "ab", {0}),  # not as good
        ([0.0, 0.0, 1e-9], [2.0, 1.0, 0.0], "abc", {1}),  # nothing is near to nothing but nothing
        ([math.inf, 3.0, math.inf], [0.0, 9.0, 0.0], "abc", {1}),  # who isn't able
        ([-5.0, -4.95, -4.0], [2.0, 1.0, 0.0], "abc", {1}),
        ([1.0, 1.0, 1.0], [3.0, 2.0, 1.0], "abc", {1, 2}),  # the busiest of three is never taken
    ],
)
def test_pick(scores: list[float], sooner: list[float], names: str, taken: set[int]) -> None:
    assert {picked(scores, sooner, names, luck=luck) for luck in LUCK} == taken


@PROMISE
@given(st.lists(st.sampled_from([1.0, 1.01, 1.02, 1.5, math.inf]), min_size=1, max_size=90), st.floats(0.0, 1.0, exclude_max=True))
def test_what_is_taken_is_near_the_best(scores: list[float], luck: float) -> None:
    scores = [*scores, 1.01]
    names = "".join(chr(200 + at) for at in range(len(scores)))
    assert scores[picked(scores, names=names, luck=luck)] <= min(scores) * (1.0 + NEAR)


@PROMISE
@given(st.permutations([(1.0, 3.0, "a"), (1.0, 3.0, "b"), (1.01, 1.0, "c"), (1.015, 3.0, "d"), (2.0, 0.0, "e")]), st.sampled_from(LUCK))
def test_no_order_of_rows_matters(rows: list[tuple[float, float, str]], luck: float) -> None:
    def name(rows: list[tuple[float, float, str]]) -> str:
        at = picked([row[0] for row in rows], [row[1] for row in rows], "".join(row[2] for row in rows), luck=luck)
        return rows[at][2]

    assert name(rows) == name(sorted(rows))


@pytest.mark.parametrize("count", [2, 3, 10, NAMED_MAX + 1, 1_000])
def test_calls_spread_over_equals(count: int) -> None:
    """Many gateways that see the same offers don't all choose the same one."""
    taken = Counter(picked([1.0] * count, [float(at) for at in range(count)], "x" * count, luck=at / 4_000) for at in range(4_000))
    assert max(taken) <= count - 2 or count == 2  # two are drawn, the sooner is taken
    assert all(taken[at] > 0 for at in range(count - 2))
    assert taken[0] < 4_000 * 2.5 / count or count == 2


@pytest.mark.parametrize("attempt", [1, 2])
def test_luck_is_even_and_explores_one_call_in_a_hundred(attempt: int) -> None:
    drawn = np.array([draw(GATEWAY, CallId(f"call-{number}"), attempt) for number in range(20_000)])
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert np.histogram(drawn, 10, (0.0, 1.0))[0] == pytest.approx(2_000, rel=0.1)
    assert (drawn < EXPLORE).mean() == pytest.approx(0.01, rel=0.2)


def test_luck_depends_on_call_attempt_and_gateway_alone() -> None:
    one = draw(GATEWAY, CallId("call"), 1)
    assert draw(GATEWAY, CallId("call"), 1) == one
    assert len({one, draw(GATEWAY, CallId("call"), 2), draw(GATEWAY, CallId("other"), 1), draw(GatewayId("gw2"), CallId("call"), 1)}) == 4

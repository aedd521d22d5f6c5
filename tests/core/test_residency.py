"""Which models stay in memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.core.residency import (
    FRESH_MS,
    IDLE_LEAVES_MS,
    Enter,
    Evict,
    Never,
    Resident,
    Verdict,
    Wait,
    idle,
    make_planned_room,
    make_room,
)


def resident(model: str, size: int, *, present: bool = False, calls: int = 0, used: int = 0, leaving: bool = False) -> Resident:
    return Resident(model=model, needs_bytes=size, is_present=present, calls=calls, used_at_ms=used, is_leaving=leaving)


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([], Enter()),
        ([resident("a", 6, present=True)], Enter()),
        ([resident("a", 7, present=True)], Evict(("a",))),
        ([resident("a", 7, present=False)], Enter()),
        ([resident("a", 4, present=True, used=2), resident("b", 4, present=True, used=1)], Evict(("b",))),
        ([resident("a", 4, present=True, used=1), resident("b", 4, present=True, used=1)], Evict(("a",))),
        ([resident("a", 3, present=True, used=2), resident("b", 5, present=True, used=1, calls=1)], Evict(("a",))),
        ([resident("a", 5, present=True, used=2), resident("b", 5, present=True, used=1)], Evict(("b",))),
        ([resident("a", 9, present=True, calls=1)], Wait(("a",), "in_use")),
        ([resident("a", 9, present=True, leaving=True)], Wait(("a",), "leaving")),
        ([resident("a", 5, present=True, leaving=True), resident("b", 4, present=True)], Wait(("a",), "leaving")),
        ([resident("a", 1, present=True, leaving=True), resident("b", 8, present=True)], Evict(("b",))),
    ],
)
def test_room_for_four_of_ten(others: list[Resident], verdict: Verdict) -> None:
    assert make_room("new", [*others, resident("new", 4)], limit_bytes=10) == verdict


def test_a_model_that_is_there_needs_no_room() -> None:
    assert make_room("new", [resident("a", 9, present=True), resident("new", 4, present=True)], limit_bytes=10) == Enter()


def test_a_model_that_leaves_must_be_gone_before_it_comes_back() -> None:
    assert make_room("new", [resident("new", 4, present=True, leaving=True)], limit_bytes=10) == Wait(("new",), "leaving")


def test_a_model_over_the_limit_never_fits() -> None:
    assert make_room("new", [resident("new", 11)], limit_bytes=10) == Never()


@given(
    st.lists(st.tuples(st.integers(1, 10), st.booleans(), st.integers(0, 2), st.integers(0, 5), st.booleans()), max_size=6),
    st.integers(1, 10),
)
def test_after_an_eviction_the_newcomer_fits_and_nobody_lost_a_call(rows: list[tuple[int, bool, int, int, bool]], size: int) -> None:
    others = [
        resident(f"m{i}", need, present=present, calls=calls, used=used, leaving=present and leaving)
        for i, (need, present, calls, used, leaving) in enumerate(rows)
    ]
    verdict = make_room("new", [*others, resident("new", size)], limit_bytes=10)
    by_name = {one.model: one for one in others}
    held = sum(one.needs_bytes for one in others if one.is_present)
    match verdict:
        case Enter():
            assert size <= 10 - held
        case Evict(models):
            assert all(by_name[name].calls == 0 and by_name[name].is_present for name in models)
            leaving = sum(one.needs_bytes for one in others if one.is_present and one.is_leaving)
            assert size <= 10 - held + leaving + sum(by_name[name].needs_bytes for name in models)
        case Wait():
            assert size > 10 - held
        case Never():
            raise AssertionError("nothing here is over the limit")


NOW_MS = 10 * IDLE_LEAVES_MS
LONG_AGO = NOW_MS - FRESH_MS


def test_for_a_call_what_is_planned_leaves_last() -> None:
    there = [resident("a", 5, present=True, used=1), resident("b", 5, present=True, used=2), resident("new", 4)]
    assert make_room("new", there, limit_bytes=10, held={"a"}) == Evict(("b",))
    assert make_room("new", there, limit_bytes=10, held={"a", "b"}) == Evict(("a",))


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([resident("a", 6, present=True, used=NOW_MS)], Enter()),
        ([resident("a", 7, present=True, used=LONG_AGO)], Evict(("a",))),
        ([resident("a", 7, present=True, used=LONG_AGO + 1)], Wait(("a",), "in_use")),  # somebody may call it again
        ([resident("a", 7, present=True, used=LONG_AGO, calls=1)], Wait(("a",), "in_use")),
        ([resident("held", 7, present=True)], Wait(("held",), "in_use")),
        ([resident("held", 4, present=True), resident("a", 4, present=True, used=LONG_AGO)], Evict(("a",))),
        ([resident("a", 7, present=True, leaving=True)], Wait(("a",), "leaving")),
    ],
)
def test_planned_room_for_four_of_ten(others: list[Resident], verdict: Verdict) -> None:
    found = make_planned_room("new", [*others, resident("new", 4)], limit_bytes=10, held={"new", "held"}, now_ms=NOW_MS)
    assert found == verdict


@pytest.mark.parametrize(
    ("one", "leaves"),
    [
        (resident("a", 1, present=True, used=NOW_MS - IDLE_LEAVES_MS), True),
        (resident("a", 1, present=True, used=NOW_MS - IDLE_LEAVES_MS + 1), False),
        (resident("a", 1, present=True, calls=1), False),
        (resident("a", 1, present=True, leaving=True), False),
        (resident("a", 1), False),
        (resident("stays", 1, present=True), False),
    ],
)
def test_idle(one: Resident, leaves: bool) -> None:
    assert idle([one, resident("b", 1, present=True, used=NOW_MS)], stay={"stays"}, now_ms=NOW_MS) == (("a",) if leaves else ())

"""What a machine's time is worth to the calls to come: nothing where there is no lack, something where more is wanted than there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match.decide import match
from fallow.core.match.market import Market
from fallow.core.match.rent import CALLS_MIN
from fallow.core.match.survey import wanted
from fallow.model.ids import NodeId
from fallow.model.needs import Needs
from offers import AT_S, CREDIT, PLAIN, Lent, call_id, call_of, later, market_of, node_of, put, some_lent

PROMISE = settings(max_examples=40)
TIGHT = replace(PLAIN, first_token_within_ms=500, per_token_within_ms=30)
RELAXED = replace(PLAIN, first_token_within_ms=5_000, per_token_within_ms=300)
GPU = Lent(node="gpu", kind="gpu", prefill=2_000.0, decode=50.0, output_price=CREDIT // 10, slots=2, by_streams=((2, 90.0),))
CPU = Lent(node="cpu", prefill=200.0, decode=10.0, output_price=CREDIT // 10 + 5_000)
MANY_CPUS = [replace(CPU, node=f"cpu-{at}") for at in range(20)]


def asked(market: Market, needs: Needs, *, per_s: float, seconds: int, from_s: float = 0.0) -> None:
    """Calls come so often, and the market is looked after each second. Nothing is run."""
    due = 0.0
    for second in range(seconds):
        at = later(from_s + second)
        due += per_s
        while due >= 1.0:
            due -= 1.0
            call = call_of(needs, at=at)
            demand = wanted(call, market, at)
            assert demand is not None
            market.asked(call, demand, now_s=at.at_s + 0.5)
        market.refresh(now_s=at.at_s + 1.0)


def rent(market: Market, node: str) -> float:
    """Micro-credits for a second."""
    shelf = market.shelves("tiny")[0]
    return float(shelf.columns.rent[shelf.row_of[NodeId(node)]])


def rents(market: Market) -> list[float]:
    shelf = market.shelves("tiny")[0]
    return [float(one) for one in shelf.columns.rent[: len(shelf.nodes)]]


@pytest.mark.parametrize(("per_s", "seconds"), [(0.05, 600), (0.0, 20), (5.0, (CALLS_MIN - 1) // 5)])
def test_where_there_is_no_lack_nothing_has_a_rent(per_s: float, seconds: int) -> None:
    market = market_of([GPU, CPU])
    asked(market, TIGHT, per_s=per_s, seconds=seconds)
    assert rents(market) == [0.0, 0.0]


def test_a_machine_that_more_calls_want_than_it_can_take_has_a_rent() -> None:
    market = market_of([GPU, *MANY_CPUS])
    asked(market, TIGHT, per_s=6.0, seconds=40)
    assert rent(market, "gpu") > 0.0
    assert max(rent(market, lent.node) for lent in MANY_CPUS) < 0.1 * rent(market, "gpu")


def test_more_demand_never_means_less_rent() -> None:
    found = []
    for per_s in (0.2, 1.0, 4.0, 8.0):
        market = market_of([GPU, *MANY_CPUS])
        asked(market, TIGHT, per_s=per_s, seconds=60)
        found.append(rent(market, "gpu"))
    assert found == sorted(found)
    assert found[-1] > 0.0


def test_a_rent_goes_when_the_demand_is_gone() -> None:
    market = market_of([GPU, *MANY_CPUS])
    asked(market, TIGHT, per_s=6.0, seconds=40)
    asked(market, TIGHT, per_s=0.0, seconds=2_000, from_s=40.0)
    assert rents(market) == [0.0] * len(rents(market))


def test_who_can_go_elsewhere_leaves_a_scarce_machine() -> None:
    """A rent is in nobody's quote; it decides who goes where."""
    market, at = market_of([GPU, *MANY_CPUS]), later(60.0)
    assert node_of(match(call_of(RELAXED), market, now=later(0.0))) == "gpu"
    asked(market, TIGHT, per_s=6.0, seconds=60)
    relaxed, tight = (match(call_of(needs, call_id("late"), at=at), market, now=at) for needs in (RELAXED, TIGHT))
    assert node_of(relaxed).startswith("cpu")
    assert node_of(tight) == "gpu"
    fresh = match(call_of(TIGHT), market_of([GPU, *MANY_CPUS]), now=later(0.0))
    assert getattr(tight, "node_id", None) == getattr(fresh, "node_id", ())


def test_a_machine_that_is_not_there_has_no_rent() -> None:
    market = market_of([replace(GPU, state="pause"), replace(CPU, readiness="failed")])
    asked(market, TIGHT, per_s=8.0, seconds=20)
    assert rents(market) == [0.0, 0.0]


some_demand = st.tuples(st.sampled_from([PLAIN, TIGHT, RELAXED]), st.sampled_from([0.5, 3.0, 20.0]), st.integers(1, 15))


@PROMISE
@given(st.lists(some_lent, unique_by=lambda one: one.node, min_size=1, max_size=6), st.lists(some_demand, max_size=4))
def test_rents_are_finite_never_negative_and_the_same_again(lents: list[Lent], demands: list[tuple[Needs, float, int]]) -> None:
    lents = [replace(lent, model="tiny", family="") for lent in lents]
    found = []
    for _ in range(2):
        market, passed = market_of(lents), 0.0
        for needs, per_s, seconds in demands:
            asked(market, needs, per_s=per_s, seconds=seconds, from_s=passed)
            passed += seconds
            put(market, replace(lents[0], output_price=77), at_s=AT_S + passed)
        found.append(rents(market))
    assert np.isfinite(found[0]).all()
    assert min(found[0]) >= 0.0
    assert found[0] == found[1]

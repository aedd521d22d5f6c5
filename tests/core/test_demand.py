"""Demand, smoothed, and which calls count as missed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.demand import IDLE_AFTER_MS, MODELS_MAX, SPARE_MAX, Wanted, hear, is_missed
from fallow.model.ids import GatewayId
from fallow.model.messages import Demand, ModelDemand
from fallow.model.needs import Needs
from fallow.model.receipt import Usage

SPAN_MS = 15_000
START_MS = 1_000_000


def said(*models: ModelDemand, gateway: str = "g1", sequence: int = 1, span_ms: int = SPAN_MS) -> Demand:
    return Demand(gateway_id=GatewayId(gateway), sequence=sequence, span_ms=span_ms, models=models)


def steadily(asked: list[ModelDemand], spans: int, wanted: dict[str, Wanted] | None = None, now_ms: int = START_MS) -> dict[str, Wanted]:
    wanted = wanted or {}
    for _ in range(spans):
        now_ms += SPAN_MS
        wanted = hear(wanted, [said(*asked)], span_ms=SPAN_MS, now_ms=now_ms)
    return wanted


def test_a_steady_demand_is_known_after_a_while() -> None:
    asked = [ModelDemand(model="a", calls=30, prompt_tokens=3000, output_tokens=600)]
    found = steadily(asked, 20)["a"]
    assert found.calls_per_s == pytest.approx(2, rel=0.01)
    assert found.prompt_tokens_per_s == pytest.approx(200, rel=0.01)
    assert found.output_tokens_per_s == pytest.approx(40, rel=0.01)
    assert found.spare == 1


def test_several_gateways_are_added_up() -> None:
    one, both = ModelDemand(model="a", calls=10, missed=1), ModelDemand(model="a", calls=20, missed=2)
    apart = [said(one), said(one, gateway="g2")]
    assert hear({}, apart, span_ms=SPAN_MS, now_ms=1) == hear({}, [said(both)], span_ms=SPAN_MS, now_ms=1)


def test_a_gateway_that_reports_at_its_own_pace_says_the_same() -> None:
    """What counts is the time that a report is about: one or two of them in our span are no difference."""
    ten, twenty = ModelDemand(model="a", calls=10), ModelDemand(model="a", calls=20)
    once = [said(ten, span_ms=10_000)]
    twice = [said(ten, span_ms=10_000), said(ten, sequence=2, span_ms=10_000)]
    long = [said(twenty, span_ms=20_000)]
    assert (
        hear({}, once, span_ms=SPAN_MS, now_ms=1) == hear({}, twice, span_ms=SPAN_MS, now_ms=1) == hear({}, long, span_ms=SPAN_MS, now_ms=1)
    )


def test_demand_rises_faster_than_it_falls() -> None:
    up = steadily([ModelDemand(model="a", calls=30)], 2)
    down = steadily([], 2, up, START_MS + 2 * SPAN_MS)
    assert down["a"].calls_per_s > 0.8 * up["a"].calls_per_s > 0.8


@given(st.integers(1, 600_000), st.integers(1, 600_000))
def test_uneven_spans_come_to_the_same(one_ms: int, other_ms: int) -> None:
    start = {"a": Wanted(asked_at_ms=0, calls_per_s=3.0)}
    twice = hear(hear(start, [], span_ms=one_ms, now_ms=0), [], span_ms=other_ms, now_ms=0)
    once = hear(start, [], span_ms=one_ms + other_ms, now_ms=0)
    assert twice["a"].calls_per_s == pytest.approx(once["a"].calls_per_s)


def test_a_model_that_nobody_asks_for_is_forgotten() -> None:
    wanted = {"a": Wanted(asked_at_ms=START_MS, calls_per_s=1.0)}
    assert hear(wanted, [], span_ms=1, now_ms=START_MS + IDLE_AFTER_MS - 1).keys() == {"a"}
    assert hear(wanted, [], span_ms=1, now_ms=START_MS + IDLE_AFTER_MS) == {}


def test_missed_calls_ask_for_more_and_then_for_less_again() -> None:
    asked = ModelDemand(model="a", calls=30, missed=15)
    grown = steadily([asked], 2)
    assert 1 < grown["a"].spare < SPARE_MAX
    assert steadily([asked], 50)["a"].spare == SPARE_MAX
    calm = replace(asked, missed=0)
    assert 1 < steadily([calm], 2, grown)["a"].spare < grown["a"].spare
    assert steadily([calm], 400, grown)["a"].spare == pytest.approx(1, abs=0.01)


def test_the_few_that_are_always_missed_ask_for_nothing() -> None:
    assert steadily([ModelDemand(model="a", calls=100, missed=2)], 50)["a"].spare == 1


def test_the_least_wanted_are_forgotten_first() -> None:
    asked = [ModelDemand(model=f"m{i:05}", calls=i + 1) for i in range(MODELS_MAX + 2)]
    assert set(hear({}, [said(*asked)], span_ms=SPAN_MS, now_ms=1)) == {one.model for one in asked[2:]}


NEEDS = Needs(model="a")
ON_TIME = Usage(output_tokens=11)


@pytest.mark.parametrize(
    ("needs", "failure", "first_ms", "end_ms", "ended_at_ms", "missed"),
    [
        (NEEDS, None, 10_000.0, 90_000.0, 0, False),
        (NEEDS, "no_capacity", None, 1.0, 0, True),
        (NEEDS, "model_loading", None, 1.0, 0, True),
        (NEEDS, "invalid_request", None, 1.0, 0, False),
        (NEEDS, "over_limits", None, 1.0, 0, False),
        (NEEDS, "caller_too_slow", None, 1.0, 0, False),
        (replace(NEEDS, first_token_within_ms=100), None, 100.0, 5000.0, 0, False),
        (replace(NEEDS, first_token_within_ms=100), None, 101.0, 5000.0, 0, True),
        (replace(NEEDS, first_token_within_ms=100), None, None, 5000.0, 0, False),
        (replace(NEEDS, deadline_at_ms=1_000), None, 1.0, 2.0, 1_000, False),
        (replace(NEEDS, deadline_at_ms=1_000), None, 1.0, 2.0, 1_001, True),
        (replace(NEEDS, per_token_within_ms=50), None, 100.0, 600.0, 0, False),
        (replace(NEEDS, per_token_within_ms=50), None, 100.0, 611.0, 0, True),
        (replace(NEEDS, per_token_within_ms=50), None, None, 9000.0, 0, False),
    ],
)
def test_missed(needs: Needs, failure: str | None, first_ms: float | None, end_ms: float, ended_at_ms: int, missed: bool) -> None:
    found = is_missed(needs, failure_code=failure, first_token_ms=first_ms, end_ms=end_ms, ended_at_ms=ended_at_ms, usage=ON_TIME)
    assert found is missed


def test_one_token_has_no_pace() -> None:
    needs = replace(NEEDS, per_token_within_ms=1)
    found = is_missed(needs, failure_code=None, first_token_ms=1.0, end_ms=9e9, ended_at_ms=0, usage=Usage(output_tokens=1))
    assert not found

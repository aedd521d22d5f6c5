"""How often a call may be sent twice, and when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core import hedge
from fallow.model.needs import ServiceTier
from offers import PLAIN, Lent, call_of, market_of, quote_at

PROMISE = settings(max_examples=60)


@PROMISE
@given(st.lists(st.booleans(), max_size=2_000))
def test_no_more_than_two_calls_in_a_hundred(wants: list[bool]) -> None:
    ration, hedges = hedge.Ration(), 0
    for number, wanted in enumerate(wants, 1):
        ration = hedge.earn(ration)
        spent = hedge.spend(ration) if wanted else None
        if spent is not None:
            ration, hedges = spent, hedges + 1
        assert hedges <= hedge.SHARE_MAX * number + 1e-9


def test_what_is_saved_for_a_bad_moment_is_bounded() -> None:
    ration = hedge.Ration()
    for _ in range(10_000):
        ration = hedge.earn(ration)
    hedges = 0
    while (spent := hedge.spend(ration)) is not None:
        ration, hedges = spent, hedges + 1
    assert hedges == hedge.SAVED_MAX


@pytest.mark.parametrize(
    ("tier", "prefill", "late_ms"), [("default", 10.0, None), ("flex", 10.0, None), ("priority", 10.0, 15_000), ("priority", 10_000.0, 200)]
)
def test_only_priority_calls_and_only_when_they_are_late(tier: ServiceTier, prefill: float, late_ms: float | None) -> None:
    call = call_of(replace(PLAIN, service_tier=tier))
    quote = quote_at(market_of([Lent(prefill=prefill)]), call, "node-a")
    assert hedge.after_ms(call, quote) == (None if late_ms is None else pytest.approx(late_ms, rel=0.01))

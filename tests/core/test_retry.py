"""Which failures send a call to another node, and when that ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.retry import ATTEMPTS_MAX, ENGINE_FAULTS, ENGINE_FAULTS_MAX, NODE_FAULTS, try_elsewhere
from fallow.model.errors import Failure

PROMISE = settings(max_examples=60)
CALLERS_OWN = ("invalid_request", "context_length_exceeded", "body_too_large", "invalid_api_key")
PASSING = (
    "node_unreachable",
    "node_silent",
    "node_too_slow",
    "answer_gap",
    "answer_malformed",
    "body_lost",
    "busy",
    "leaving",
    "model_loading",
    "model_not_here",
    "yielding",
    "lender_refuses",
    "broker_lost",
    "attempt_lost",
    "cannot_continue",
    "not_opened",
    "price_changed",
    "engine_failed",
    "engine_stalled",
)


def failures(*codes: str) -> tuple[Failure, ...]:
    return tuple(Failure(code=code, message="") for code in codes)


@pytest.mark.parametrize(
    ("codes", "started", "again"),
    [
        *((code, False, True) for code in PASSING),
        *((code, True, False) for code in PASSING),
        *((code, False, False) for code in CALLERS_OWN),
        ("gateway_stopping", False, False),
        ("internal_error", False, False),
        ("a_code_of_a_later_version", False, False),
        ("", False, False),  # nothing failed
        ("busy leaving", False, True),
        ("busy leaving busy", False, False),  # three were tried
        ("engine_failed busy", False, True),
        ("busy engine_failed", False, True),
        ("engine_failed engine_failed", False, False),
        ("engine_failed engine_stalled", False, False),
        ("busy invalid_request", False, False),  # the last one counts
        ("invalid_request busy", False, True),
    ],
)
def test_try_elsewhere(codes: str, started: bool, again: bool) -> None:
    assert try_elsewhere(failures(*codes.split()), started=started) is again


@pytest.mark.parametrize(
    ("codes", "again"),
    [
        *((code, True) for code in PASSING),
        *((code, False) for code in CALLERS_OWN),
        ("yielding yielding yielding node_silent", True),
        ("yielding yielding yielding yielding node_silent", False),
        ("engine_failed engine_failed", False),
    ],
)
def test_go_on_elsewhere(codes: str, again: bool) -> None:
    assert try_elsewhere(failures(*codes.split()), started=True, can_continue=True) is again
    assert not try_elsewhere(failures(*codes.split()), started=True)


def test_the_table_above_knows_every_code() -> None:
    assert set(PASSING) == NODE_FAULTS | ENGINE_FAULTS


@PROMISE
@given(st.lists(st.sampled_from([*PASSING, *CALLERS_OWN, "gateway_stopping"]), min_size=10, max_size=10))
def test_a_call_visits_few_nodes_and_kills_fewer_engines(fates: list[str]) -> None:
    met: tuple[Failure, ...] = ()
    for code in fates:
        met = (*met, *failures(code))
        assert not try_elsewhere(met, started=True)
        if not try_elsewhere(met, started=False):
            break
    assert len(met) <= ATTEMPTS_MAX
    assert sum(f.code in ENGINE_FAULTS for f in met) <= ENGINE_FAULTS_MAX
    assert all(f.code in PASSING for f in met[:-1])

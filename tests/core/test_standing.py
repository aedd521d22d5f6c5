"""What is thought of a node: which failures count, how long it is left alone, that what is old fades, and that nobody is left forever."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core import standing as module
from fallow.core.retry import ENGINE_FAULTS, NODE_FAULTS
from fallow.core.standing import (
    BACK_OFF_S_MAX,
    BACK_OFF_S_MIN,
    CHANCE_LEAST,
    FAULTS,
    HALF_LIFE_S,
    LOOK_S,
    MISSED,
    NEWCOMER,
    PROBE_S_MAX,
    RATIO_LOG_MAX,
    Access,
    Event,
    Failed,
    Heard,
    Probed,
    Standing,
    Standings,
    Succeeded,
    Suspected,
    Yielded,
    access,
    chance,
    faded,
    fold,
    honesty,
    keeps,
    trust,
)
from fallow.model.ids import NodeId

PROMISE = settings(max_examples=100)
AT_S = 1_000.0
FAULT = Failed(code="node_silent")
NODE = NodeId("node-a")
TOGETHER: list[Event] = [FAULT, Succeeded()]


def after(*events: Event, at_s: float = AT_S, known: Standing = NEWCOMER) -> Standing:
    """What is thought after these, all at once."""
    for event in events:
        known = fold(known, event, at_s)
    return known


def in_a_row(faults: int) -> Standing:
    """A node that failed each probe at once; the first fault was at AT_S."""
    known, at_s = NEWCOMER, AT_S
    for _ in range(faults):
        known = fold(known, FAULT, at_s)
        at_s = known.backs_off_until_s
    return known


# What counts.
@pytest.mark.parametrize("code", sorted(FAULTS))
def test_infrastructure_errors_count(code: str) -> None:
    known = after(Failed(code=code))
    assert (known.faults, access(known, AT_S)) == (1.0, "open" if code == "node_unreachable" else "closed")
    assert chance(known) < chance(NEWCOMER)


def test_a_node_that_went_with_all_that_it_ran_has_gone_once_and_is_back_when_it_is_heard() -> None:
    known = NEWCOMER
    for event in (Failed(code="node_unreachable"), Suspected(), Failed(code="node_unreachable"), Failed(code="node_unreachable")):
        known = fold(known, event, AT_S)
    assert (known.faults, access(known, AT_S)) == (1.0, "closed")
    assert access(fold(known, Heard(), AT_S + 1.0), AT_S + 1.0) == "open"


INNOCENT = (
    "yielding",
    "busy",
    "model_loading",
    "model_not_here",
    "lender_refuses",
    "leaving",
    "broker_lost",
    "gateway_stopping",
    "caller_too_slow",
    "answer_too_long",
    "invalid_request",
    "context_length_exceeded",
    "body_too_large",
    "schema_not_met",
    "unknown_path",
    "a_code_of_a_later_version",
)


@pytest.mark.parametrize("event", [Yielded(), *(Failed(code=code) for code in INNOCENT)])
@pytest.mark.parametrize("before", [(), (Succeeded(),), (FAULT,), (FAULT, FAULT, Succeeded())])
def test_nothing_else_does(event: Event, before: tuple[Event, ...]) -> None:
    """An owner who comes back, a caller's bad input, a full node: none of that is a node's fault."""
    known = after(*before)
    assert fold(known, event, AT_S) == faded(known, AT_S)


def test_every_fault_sends_a_call_elsewhere() -> None:
    assert FAULTS <= NODE_FAULTS | ENGINE_FAULTS
    assert not FAULTS & set(INNOCENT)


def test_slow_is_not_wrong() -> None:
    late = Succeeded(promised_s=1.0, took_s=30.0, kept=False)
    assert chance(after(*20 * [late])) == chance(after(*20 * [Succeeded()]))
    assert access(after(late), AT_S) == "open"


# The chance.
def test_a_newcomer_is_trusted_like_a_good_node() -> None:
    assert trust(NEWCOMER) == 1.0 == trust(after(*500 * [Succeeded()]))
    assert chance(after(*500 * [Succeeded()])) > chance(NEWCOMER) > 0.98


def test_one_fault_is_forgiven_sooner_where_much_went_well() -> None:
    good = after(*100 * [Succeeded()])
    assert trust(after(FAULT)) < trust(after(FAULT, known=good)) == 1.0
    assert trust(after(*50 * TOGETHER, known=good)) < 0.9


def test_a_fault_costs_less_than_a_miss_since_calls_go_on_elsewhere() -> None:
    known = after(*4 * TOGETHER)
    lost = 1.0 - chance(known) / chance(NEWCOMER)
    assert lost > 0.05
    assert trust(known) == pytest.approx(1.0 - MISSED * lost)


def test_of_what_happened_long_ago_little_is_left() -> None:
    known = after(*8 * TOGETHER)
    assert faded(known, AT_S + HALF_LIFE_S).faults == pytest.approx(4.0)
    assert faded(known, AT_S + 3 * HALF_LIFE_S).ends == pytest.approx(1.0)
    assert chance(faded(known, AT_S + 30 * HALF_LIFE_S)) == pytest.approx(chance(NEWCOMER))


# Honesty.
def test_honesty() -> None:
    assert honesty(NEWCOMER) is None
    assert honesty(after(FAULT, Succeeded())) is None
    twice, half = Succeeded(promised_s=1.0, took_s=2.0, kept=False), Succeeded(promised_s=1.0, took_s=0.5)
    assert honesty(after(twice)) == pytest.approx((2.0, 0.0))
    assert honesty(after(twice, half)) == pytest.approx((1.0, 0.5))
    assert honesty(faded(after(twice, half, half), AT_S + 3 * HALF_LIFE_S)) == pytest.approx((2 ** (-1 / 3), 2 / 3))
    assert honesty(after(Succeeded(promised_s=0.0, took_s=1e9, kept=False))) == pytest.approx((math.exp(RATIO_LOG_MAX), 0.0))


def test_newer_answers_say_more_about_honesty() -> None:
    old, new = Succeeded(promised_s=1.0, took_s=4.0, kept=False), Succeeded(promised_s=1.0, took_s=1.0)
    told = honesty(fold(after(old), new, AT_S + HALF_LIFE_S))
    assert told == pytest.approx((4 ** (1 / 3), 2 / 3))


@pytest.mark.parametrize(
    ("promised_s", "took_s", "kept"),
    [(1.0, 1.0, True), (1.0, 2.0, True), (1.0, 2.1, False), (0.1, 0.6, True), (0.1, 0.7, False), (30.0, 59.0, True), (1.0, 0.0, True)],
)
def test_a_promise_is_about(promised_s: float, took_s: float, kept: bool) -> None:
    assert keeps(promised_s=promised_s, took_s=took_s) is kept


# The back-off.
@pytest.mark.parametrize(("faults", "seconds"), [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (8, 60.0), (2_000, 60.0)])
def test_each_fault_in_a_row_doubles_the_back_off(faults: int, seconds: float) -> None:
    known = in_a_row(faults)
    at_s = known.backs_off_until_s - seconds
    assert known.in_a_row == faults
    assert fold(in_a_row(faults - 1), FAULT, at_s).backs_off_until_s == pytest.approx(at_s + seconds)
    assert BACK_OFF_S_MIN <= seconds <= BACK_OFF_S_MAX


def test_calls_that_die_together_are_one_trouble() -> None:
    assert after(*10 * [FAULT]) == after(FAULT)
    once_more = fold(after(FAULT), FAULT, AT_S + BACK_OFF_S_MIN)
    assert (once_more.in_a_row, once_more.backs_off_until_s) == (2, AT_S + BACK_OFF_S_MIN + 2 * BACK_OFF_S_MIN)


def test_a_probe_that_fails_counts_even_while_the_node_backs_off() -> None:
    """As when it is sent there since there is nobody else."""
    assert after(FAULT, Probed(), FAULT).in_a_row == 2


def test_trouble_is_forgotten_even_if_nobody_tries() -> None:
    known = in_a_row(9)
    assert access(known, known.backs_off_until_s + HALF_LIFE_S) == "probe"
    long_after_s = known.backs_off_until_s + HALF_LIFE_S + 1
    assert access(known, long_after_s) == "open"
    assert fold(known, FAULT, long_after_s).in_a_row == 1


WAYS: list[tuple[tuple[Event, ...], float, Access]] = [
    ((), 0.0, "open"),
    ((Succeeded(),), 0.0, "open"),
    ((FAULT,), 0.0, "closed"),
    ((FAULT,), 0.99, "closed"),
    ((FAULT,), 1.0, "probe"),
    ((FAULT, Probed()), 1.0, "closed"),
    ((FAULT, Probed()), PROBE_S_MAX, "probe"),  # nothing was heard of it
    ((FAULT, Probed(), Probed()), PROBE_S_MAX, "probe"),
    ((FAULT, Probed(), Yielded()), 1.0, "probe"),
    ((FAULT, Probed(), Failed(code="invalid_request")), 1.0, "probe"),
    ((FAULT, Probed(), FAULT), 1.0, "closed"),
    ((FAULT, Probed(), FAULT), 2.0, "probe"),
    ((FAULT, Probed(), Succeeded()), 0.0, "open"),
    ((FAULT, Succeeded()), 0.0, "open"),
    ((Probed(),), 0.0, "open"),
    ((Suspected(),), 1e9, "closed"),
    ((Suspected(), Succeeded()), 0.0, "closed"),
    ((Suspected(), Heard()), 0.0, "open"),
    ((FAULT, Suspected(), Heard()), 0.5, "closed"),
]


@pytest.mark.parametrize(("events", "later_s", "who"), WAYS)
def test_who_may_go_there(events: tuple[Event, ...], later_s: float, who: Access) -> None:
    assert access(after(*events), AT_S + later_s) == who


# Whatever happens.
some_event: st.SearchStrategy[Event] = st.one_of(
    st.builds(Succeeded, promised_s=st.floats(0, 100), took_s=st.none() | st.floats(0, 1e6), kept=st.booleans()),
    st.sampled_from([*(Failed(code=code) for code in sorted(FAULTS)), Failed(code="busy"), Yielded(), Probed(), Suspected(), Heard()]),
)
some_history = st.lists(st.tuples(some_event, st.sampled_from([0.0, 0.01, 1.0, 1.5, 61.0, 1_000.0]) | st.floats(0, 1e5)), max_size=40)
"""Events, and the seconds that pass before each."""


def lived(history: list[tuple[Event, float]], known: Standing = NEWCOMER, at_s: float = AT_S) -> tuple[Standing, float]:
    for event, passed_s in history:
        at_s += passed_s
        known = fold(known, event, at_s)
    return known, at_s


@PROMISE
@given(some_history)
def test_no_history_exiles_a_node(history: list[tuple[Event, float]]) -> None:
    """Once it is heard, a probe may go there a back-off later; and a success ends the matter."""
    known, at_s = lived([*history, (Heard(), 0.0)])
    assert access(known, at_s + BACK_OFF_S_MAX) in ("open", "probe")
    assert access(fold(known, Succeeded(), at_s), at_s) == "open"


@PROMISE
@given(some_history)
def test_the_chance_is_a_chance(history: list[tuple[Event, float]]) -> None:
    known, at_s = lived(history)
    assert CHANCE_LEAST <= chance(known) < 1.0
    assert 0.0 < trust(known) <= 1.0
    assert chance(fold(known, Succeeded(), at_s)) >= chance(known) >= chance(fold(known, FAULT, at_s))
    told = honesty(known)
    assert told is None or (0.0 < told[0] < math.inf and 0.0 <= told[1] <= 1.0)


@PROMISE
@given(some_history, some_history)
def test_what_is_old_fades_whatever_it_was(old: list[tuple[Event, float]], newer: list[tuple[Event, float]]) -> None:
    """Two pasts in any order, a long quiet time, and then the same events: the node is thought of alike."""
    quiet_s = 60 * HALF_LIFE_S
    ends = []
    for past in (old, old[::-1], []):
        known, at_s = lived([*past, (Heard(), 0.0)])
        known, at_s = lived([*newer, (Heard(), 0.0)], known, at_s + quiet_s)
        ends.append((round(chance(known), 9), access(known, at_s), access(known, at_s + 2.0), round(known.faults, 9)))
    assert ends[0] == ends[1] == ends[2]


@PROMISE
@given(some_history, st.lists(st.floats(0, 1e4), max_size=5))
def test_looking_changes_nothing(history: list[tuple[Event, float]], looks: list[float]) -> None:
    known, at_s = lived(history)
    looked = known
    for more_s in sorted(looks):
        looked = faded(looked, at_s + more_s)
    straight = faded(known, at_s + max(looks, default=0.0))
    assert chance(looked) == pytest.approx(chance(straight))
    assert looked.in_a_row == straight.in_a_row


# All of them.
def test_a_stranger_has_a_newcomers_standing() -> None:
    standings = Standings()
    assert chance(standings.of(NODE, AT_S)) == chance(NEWCOMER)
    assert (NODE in standings, len(standings)) == (False, 0)


def test_who_was_heard_of_last_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STANDINGS_MAX", 3)
    standings = Standings()
    a, b, c, d = (NodeId(name) for name in "abcd")
    for node_id in (a, b, c):
        assert standings.told(node_id, FAULT, AT_S) == (node_id,)
    standings.told(a, Succeeded(), AT_S)
    assert standings.told(d, FAULT, AT_S) == (d, b)  # matching must hear that b is a newcomer again
    assert [node_id in standings for node_id in (a, b, c, d)] == [True, False, True, True]
    assert standings.of(b, AT_S).faults == 0.0
    assert b not in standings.due(AT_S + 1e3)


def test_time_alone_changes_standings_and_says_when() -> None:
    standings = Standings()
    standings.told(NODE, FAULT, AT_S)
    standings.told(NodeId("node-good"), Succeeded(), AT_S)
    assert standings.due(AT_S + 0.99) == []
    assert standings.due(AT_S + BACK_OFF_S_MIN) == [NODE]
    assert standings.due(AT_S + BACK_OFF_S_MIN) == []
    assert standings.due(AT_S + BACK_OFF_S_MIN + LOOK_S) == [NODE]
    quiet_s = AT_S + 20 * HALF_LIFE_S
    assert standings.due(quiet_s) == [NODE]
    assert access(standings.of(NODE, quiet_s), quiet_s) == "open"


@PROMISE
@given(some_history)
def test_between_two_times_that_are_due_access_stays_as_it_was(history: list[tuple[Event, float]]) -> None:
    standings, at_s = Standings(), AT_S
    for event, passed_s in history:
        at_s += passed_s
        standings.told(NODE, event, at_s)
    was = access(standings.of(NODE, at_s), at_s)
    for tenths in range(1, 700):
        now_s = at_s + tenths / 10
        if standings.due(now_s):
            was = access(standings.of(NODE, now_s), now_s)
        assert access(standings.of(NODE, now_s), now_s) == was

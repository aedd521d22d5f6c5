"""One attempt as the gateway sees it: each phase under each event, every timer, and what a caller may ever be given."""

from collections.abc import Callable, Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core import relay
from fallow.core.relay import (
    Again,
    Ask,
    Asked,
    Broken,
    BusLost,
    CallerLeft,
    Deliver,
    Effect,
    Event,
    Fail,
    Finish,
    Phase,
    Relay,
    Stop,
    Tick,
    Unheard,
    ask,
    step,
)
from fallow.model.errors import Failure, UnopenedReason
from fallow.model.messages import Accepted, Alive, Final, Head, Lost, Part, Unopened
from fallow.model.receipt import Usage

PROMISE = settings(max_examples=60)
HEAD = Head(status=200, content_type="text/event-stream", engine_us=5)
USAGE = Usage(prompt_tokens=3, output_tokens=4)
REFUSED = Failure(code="busy", message="full")
HEARD, NOW = 1_500, 1_900
"""The node was last heard at HEARD; at NOW no timer has run out."""

STATES: dict[Phase, Relay] = {
    "asked": Relay(phase="asked", heard_at_ms=HEARD, first_by_ms=40_000),
    "accepted": Relay(phase="accepted", heard_at_ms=HEARD, first_by_ms=40_000),
    "answering": Relay(phase="answering", heard_at_ms=HEARD, first_by_ms=40_000, next_index=2),
    "done": Relay(phase="done", heard_at_ms=HEARD, first_by_ms=40_000, next_index=2),
}


def part(index: int) -> Part:
    return Part(index=index, data=b"part %d" % index, head=HEAD if index == 0 else None)


def final(index: int) -> Final:
    return Final(index=index, data=b"part %d" % index, head=HEAD if index == 0 else None, usage=USAGE)


EVENTS: dict[str, Callable[[Relay], Event]] = {
    "accepted": lambda _: Accepted(),
    "alive": lambda _: Alive(),
    "next part": lambda r: part(r.next_index),
    "part again": lambda r: part(r.next_index - 1),
    "part too far": lambda r: part(r.next_index + 1),
    "next final": lambda r: final(r.next_index),
    "final again": lambda r: final(r.next_index - 1),
    "final too far": lambda r: final(r.next_index + 1),
    "final failure": lambda r: Final(index=r.next_index, failure=REFUSED),
    "failure again": lambda _: Final(index=-1, failure=REFUSED),
    "unheard": lambda _: Unheard(),
    "unreadable": lambda _: Broken(),
    "body lost": lambda _: Broken(code="body_lost", message=""),
    "broker lost": lambda _: BusLost(),
    "gateway stops": lambda _: BusLost(code="gateway_stopping", message=""),
    "caller left": lambda _: CallerLeft(),
    "quiet tick": lambda _: Tick(),
    "asked only now": lambda _: Asked(),
    "unopened": lambda _: Unopened(reason="no_session"),
    "not vouched for": lambda _: Unopened(reason="not_vouched"),
    "lost": lambda _: Lost(),
}

# event -> (phase after it from asked, accepted, answering), and the effects by name
TABLE: dict[str, tuple[tuple[Phase, Phase, Phase], str]] = {
    "accepted": (("accepted", "accepted", "answering"), ""),
    "alive": (("accepted", "accepted", "answering"), ""),
    "next part": (("answering", "answering", "answering"), "Deliver"),
    "part again": (("asked", "accepted", "answering"), ""),
    "part too far": (("done", "done", "done"), "Stop Fail:answer_gap"),
    "next final": (("done", "done", "done"), "Deliver Finish"),
    "final again": (("asked", "accepted", "answering"), ""),
    "final too far": (("done", "done", "done"), "Stop Fail:answer_gap"),
    "final failure": (("done", "done", "done"), "Fail:busy"),
    "failure again": (("done", "done", "done"), "Fail:busy"),
    "unheard": (("done", "done", "done"), "Stop Fail:node_unreachable"),
    "unreadable": (("done", "done", "done"), "Stop Fail:answer_malformed"),
    "body lost": (("done", "done", "done"), "Stop Fail:body_lost"),
    "broker lost": (("done", "done", "done"), "Stop Fail:broker_lost"),
    "gateway stops": (("done", "done", "done"), "Stop Fail:gateway_stopping"),
    "caller left": (("done", "done", "done"), "Stop"),
    "quiet tick": (("asked", "accepted", "answering"), ""),
    "lost": (("done", "done", "done"), "Stop Fail:attempt_lost"),
}
SPEAKS = {"accepted", "alive", "next part", "next final"}
"""What sets the silence back to nothing."""


def named(effects: tuple[Effect, ...]) -> str:
    return " ".join(type(e).__name__ + (f":{e.failure.code}" if isinstance(e, Fail) else "") for e in effects)


@pytest.mark.parametrize("event", TABLE)
@pytest.mark.parametrize(("column", "phase"), list(enumerate(("asked", "accepted", "answering"))))
def test_step(column: int, phase: Phase, event: str) -> None:
    before = STATES[phase]
    after, effects = step(before, EVENTS[event](before), now_ms=NOW)
    phases, wanted = TABLE[event]
    assert (after.phase, named(effects)) == (phases[column], wanted)
    assert after.heard_at_ms == (NOW if event in SPEAKS else HEARD)
    assert after.next_index == before.next_index + (event in {"next part", "next final"})


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_wakes_an_attempt_that_is_done(event: str) -> None:
    done = STATES["done"]
    assert step(done, EVENTS[event](done), now_ms=10**9) == (done, ())


OF_SESSIONS: dict[str, str] = {"asked only now": "", "unopened": "Again", "not vouched for": "Stop Fail:not_opened"}
"""What these do while nothing was heard of the node; later, they do nothing."""


@pytest.mark.parametrize("event", OF_SESSIONS)
def test_a_session_that_had_to_be_opened_first_or_anew(event: str) -> None:
    before = STATES["asked"]
    after, effects = step(before, EVENTS[event](before), now_ms=NOW)
    assert named(effects) == OF_SESSIONS[event]
    assert after.phase == ("done" if event == "not vouched for" else "asked")
    if after.phase == "asked":
        assert after == replace(before, heard_at_ms=NOW, asked_again=event == "unopened"), "the node has its time once more"


@pytest.mark.parametrize("event", OF_SESSIONS)
@pytest.mark.parametrize("phase", ["accepted", "answering"])
def test_who_says_late_that_a_call_was_not_opened_changes_nothing(phase: Phase, event: str) -> None:
    """It is said in the open: anybody on the way could say it."""
    before = STATES[phase]
    assert step(before, EVENTS[event](before), now_ms=NOW) == (before, ())


@pytest.mark.parametrize("reason", get_args(UnopenedReason))
def test_a_call_is_sent_once_more_and_not_twice(reason: UnopenedReason) -> None:
    before = STATES["asked"]
    state, effects = step(before, Unopened(reason=reason), now_ms=NOW)
    if reason != "not_vouched":
        assert effects == (Again(),)
        state, effects = step(state, Asked(), now_ms=NOW)
        assert effects == ()
        state, effects = step(state, Unopened(reason=reason), now_ms=NOW)
    assert (state.phase, named(effects)) == ("done", "Stop Fail:not_opened")
    assert isinstance(fail := effects[1], Fail)
    assert reason in fail.failure.message


def test_the_table_is_complete() -> None:
    assert TABLE.keys() | OF_SESSIONS.keys() == EVENTS.keys()
    assert {type(make(STATES["asked"])) for make in EVENTS.values()} == set(get_args(Event))
    assert tuple(STATES) == get_args(Phase)


def test_what_is_delivered_and_said_at_the_end() -> None:
    state, effects = step(STATES["asked"], part(0), now_ms=NOW)
    assert effects == (Deliver(b"part 0", HEAD),)
    _, effects = step(state, final(1), now_ms=NOW)
    assert effects == (Deliver(b"part 1", None), Finish(USAGE))


@pytest.mark.parametrize(
    ("phase", "next_index", "silent_ms", "first_by_in_ms", "code"),
    [
        ("asked", 0, relay.ACCEPT_MS, 1, None),
        ("asked", 0, relay.ACCEPT_MS + 1, 10**6, "node_silent"),
        ("accepted", 0, relay.ACCEPT_MS + 1, 1, None),
        ("accepted", 0, relay.SILENCE_MS, 0, None),
        ("accepted", 0, relay.SILENCE_MS + 1, 10**6, "node_silent"),
        ("answering", 3, relay.SILENCE_MS, 0, None),
        ("answering", 3, relay.SILENCE_MS + 1, 0, "node_silent"),
        ("asked", 0, 0, -1, "node_too_slow"),
        ("accepted", 0, 0, -1, "node_too_slow"),
        ("answering", 1, 0, -(10**6), None),  # once it began, only silence counts
        ("accepted", 0, relay.SILENCE_MS + 1, -1, "node_silent"),  # both: the graver one is said
    ],
)
def test_timers(phase: Phase, next_index: int, silent_ms: int, first_by_in_ms: int, code: str | None) -> None:
    state = Relay(phase=phase, heard_at_ms=NOW - silent_ms, first_by_ms=NOW + first_by_in_ms, next_index=next_index)
    after, effects = step(state, Tick(), now_ms=NOW)
    assert named(tuple(effect for effect in effects if not isinstance(effect, Ask))) == (f"Stop Fail:{code}" if code else "")
    assert after.phase == ("done" if code else phase)


@pytest.mark.parametrize(
    ("phase", "silent_ms", "asked_ms", "asks"),
    [
        ("asked", relay.ACCEPT_MS, None, False),  # the request itself finds out
        ("accepted", relay.PING_EARLY_MS, None, False),
        ("accepted", relay.PING_EARLY_MS + 1, None, True),
        ("answering", relay.PING_MS, None, False),
        ("answering", relay.PING_MS + 1, None, True),
        ("answering", 2 * relay.PING_MS, relay.PING_MS, False),  # it was asked a moment ago
        ("answering", 3 * relay.PING_MS, relay.PING_MS + 1, True),
    ],
)
def test_a_pause_is_asked_about(phase: Phase, silent_ms: int, asked_ms: int | None, asks: bool) -> None:
    pinged = 0 if asked_ms is None else NOW - asked_ms
    state = Relay(phase=phase, heard_at_ms=NOW - silent_ms, first_by_ms=10**9, next_index=1, pinged_at_ms=pinged)
    after, effects = step(state, Tick(), now_ms=NOW)
    assert effects == ((Ask(),) if asks else ())
    assert after.pinged_at_ms == (NOW if asks else pinged)


@pytest.mark.parametrize(
    ("predicted_ms", "patience_ms"),
    [
        (0, relay.FIRST_MS_MIN),
        (relay.FIRST_MS_MIN // 3, relay.FIRST_MS_MIN),
        (relay.FIRST_MS_MIN // 3 + 1, relay.FIRST_MS_MIN + 3),
        (60_000, 180_000),
    ],
)
def test_the_first_token_is_awaited_for_three_times_what_was_predicted(predicted_ms: int, patience_ms: int) -> None:
    state = ask(now_ms=500, first_token_in_ms=predicted_ms, keeps=False)
    assert state == Relay(phase="asked", heard_at_ms=500, first_by_ms=500 + patience_ms)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_caller_who_waits_for_a_model_leaves_the_node_that_much_longer(keeps: bool) -> None:
    at_once = ask(now_ms=500, first_token_in_ms=0, keeps=keeps)
    later = ask(now_ms=500, first_token_in_ms=0, keeps=keeps, load_wait_ms=60_000)
    assert later == replace(at_once, first_by_ms=at_once.first_by_ms + 60_000)


@pytest.mark.parametrize(("next_index", "keeps", "started"), [(0, False, False), (1, False, True), (0, True, False), (5, True, False)])
def test_started(next_index: int, keeps: bool, started: bool) -> None:
    assert Relay(heard_at_ms=0, first_by_ms=0, next_index=next_index, keeps=keeps).started is started


# Properties: any events, at any times that don't run backwards.
an_event: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from([Accepted(), Alive(), Tick(), Tick(), Unheard(), Broken(), CallerLeft(), BusLost(), Asked(), Lost()]),
    st.sampled_from(get_args(UnopenedReason)).map(lambda reason: Unopened(reason=reason)),
    st.integers(-1, 5).map(part),
    st.integers(-1, 5).map(final),
    st.integers(0, 5).map(lambda index: Final(index=index, failure=REFUSED)),
)
an_orderly_event: st.SearchStrategy[Event] = st.one_of(st.sampled_from([Accepted(), Alive(), Tick()]), st.integers(0, 9).map(part))
a_pause = st.sampled_from([0, 1, 100, relay.ACCEPT_MS, relay.SILENCE_MS, relay.SILENCE_MS + 1])
a_story = st.lists(st.tuples(a_pause, an_event), max_size=15) | st.tuples(
    st.lists(st.tuples(st.integers(0, 900), an_orderly_event), max_size=8), st.lists(st.tuples(a_pause, an_event), max_size=8)
).map(lambda both: both[0] + both[1])


def tell(story: Sequence[tuple[int, Event]], *, keeps: bool = False) -> tuple[Relay, list[tuple[Event, Relay, tuple[Effect, ...]]]]:
    """Play a story; returns the end, and for each event the state that it met and what it did."""
    now = 0
    state = ask(now_ms=now, first_token_in_ms=0, keeps=keeps)
    told = []
    for pause, event in story:
        now += pause
        met = state
        state, effects = step(state, event, now_ms=now)
        told.append((event, met, effects))
    return state, told


@PROMISE
@given(a_story)
def test_after_done_nothing_is_ever_delivered(story: list[tuple[int, Event]]) -> None:
    _, told = tell(story)
    assert all(effects == () for _, met, effects in told if met.phase == "done")


@PROMISE
@given(a_story, st.booleans())
def test_the_caller_gets_a_prefix_without_gaps_or_repeats(story: list[tuple[int, Event]], keeps: bool) -> None:
    state, told = tell(story, keeps=keeps)
    delivered = [e for _, _, effects in told for e in effects if isinstance(e, Deliver)]
    assert [e.data for e in delivered] == [b"part %d" % index for index in range(len(delivered))]
    assert [e.head for e in delivered] == [HEAD if at == 0 else None for at in range(len(delivered))]
    assert state.next_index == len(delivered)
    assert state.started == (bool(delivered) and not keeps)


@PROMISE
@given(a_story)
def test_exactly_one_thing_ends_an_attempt(story: list[tuple[int, Event]]) -> None:
    state, told = tell(story)
    ended = sum(isinstance(e, Finish | Fail) for _, _, effects in told for e in effects)
    left = sum(isinstance(event, CallerLeft) and met.phase != "done" for event, met, _ in told)
    assert ended + left == (state.phase == "done")


@PROMISE
@given(a_story)
def test_the_node_is_stopped_once_unless_it_ended_the_attempt_itself(story: list[tuple[int, Event]]) -> None:
    state, told = tell(story)
    stops = sum(isinstance(e, Stop) for _, _, effects in told for e in effects)
    said = [effects for event, _, effects in told if isinstance(event, Final) and named(effects) in ("Deliver Finish", "Fail:busy")]
    assert stops == (state.phase == "done" and not said)


@PROMISE
@given(a_story)
def test_nothing_is_sent_a_third_time(story: list[tuple[int, Event]]) -> None:
    _, told = tell(story)
    again = [met.phase for _, met, effects in told for e in effects if isinstance(e, Again)]
    assert again in ([], ["asked"])


@PROMISE
@given(a_story)
def test_only_a_final_finishes(story: list[tuple[int, Event]]) -> None:
    _, told = tell(story)
    for event, met, effects in told:
        if any(isinstance(e, Finish) for e in effects):
            assert isinstance(event, Final)
            assert event.failure is None
            assert event.index == met.next_index


@PROMISE
@given(a_story)
def test_silence_ends_every_attempt(story: list[tuple[int, Event]]) -> None:
    state, _ = tell([*story, (relay.SILENCE_MS + 1, Tick())])
    assert state.phase == "done"


@PROMISE
@given(st.lists(st.integers(1, relay.SILENCE_MS), max_size=60))
def test_a_node_that_speaks_is_not_called_silent(pauses: list[int]) -> None:
    spoken = [(0, Accepted()), (0, part(0)), *(event for pause in pauses for event in ((pause, Tick()), (0, Alive())))]
    state, told = tell(spoken)
    assert state.phase == "answering"
    assert [named(effects) for _, _, effects in told if effects and effects != (Ask(),)] == ["Deliver"]


def test_a_held_answer_may_take_longer_than_a_first_token() -> None:
    """It has no first token to wait for; only silence and the longest that any answer may take end it."""
    beats: list[tuple[int, Event]] = [(1_000, event) for _ in range(relay.WHOLE_MS_MAX // 2_000) for event in (Alive(), Tick())]
    patient, _ = tell([(0, Accepted()), *beats], keeps=True)
    assert patient.phase == "accepted"
    _, told = tell([(0, Accepted()), *beats, (0, Alive()), (1, Tick())], keeps=True)
    assert named(told[-1][2]) == "Stop Fail:node_too_slow"
    _, told = tell([(0, Accepted()), (relay.SILENCE_MS + 1, Tick())], keeps=True)
    assert named(told[-1][2]) == "Stop Fail:node_silent"


@pytest.mark.parametrize("event", [Part(index=0, data=b"x"), Final(index=0, data=b"x"), Final(index=0)])
@pytest.mark.parametrize("phase", ["asked", "accepted"])
def test_an_answer_without_a_head_is_a_fault_of_the_node(phase: Phase, event: Event) -> None:
    after, effects = step(STATES[phase], event, now_ms=NOW)
    assert (after.phase, named(effects)) == ("done", "Stop Fail:answer_malformed")

"""An engine's life: each phase under each event, and that it never runs twice, never hangs and is never given up."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core import watch
from fallow.core.watch import (
    Effect,
    Event,
    Exited,
    Kill,
    Launch,
    Loaded,
    Phase,
    Resumed,
    Tick,
    Unwanted,
    Wanted,
    Watch,
    is_failed,
    progress,
    ready_in_ms,
    step,
)

PROMISE = settings(max_examples=60)
UNTIL, NOW = 50_000, 40_000
IDLE = Tick(running=0, progress_at_ms=0)
BUSY = Tick(running=1, progress_at_ms=NOW - 1)
STUCK = Tick(running=1, progress_at_ms=NOW - watch.STALL_MS - 1)


def state(phase: Phase, *, faults: int = 0, since_ms: int | None = None, until_ms: int = UNTIL) -> Watch:
    """An engine that is in this phase for a moment, or if it is ready, for so long that it could have stalled."""
    since = since_ms if since_ms is not None else 1_000 if phase == "ready" else NOW - watch.STOP_MS
    return Watch(weights_bytes=2**30, phase=phase, since_ms=since, until_ms=until_ms, faults=faults)


LOAD_MS = watch.LOAD_MS_BASE + watch.LOAD_MS_PER_GIB  # for the one GiB above

# (event, now) -> phase and effect from: cold, loading, ready, stopping, leaving, backing_off
PHASES: tuple[Phase, ...] = ("cold", "loading", "ready", "stopping", "leaving", "backing_off")
TABLE: list[tuple[str, Event, int, tuple[str, str, str, str, str, str]]] = [
    ("wanted", Wanted(), NOW, ("loading Launch", "loading", "ready", "stopping", "leaving", "backing_off")),
    ("unwanted", Unwanted(), NOW, ("cold", "leaving Kill:unwanted", "leaving Kill:unwanted", "leaving", "leaving", "cold")),
    ("loaded", Loaded(), NOW, ("cold", "ready", "ready", "stopping", "leaving", "backing_off")),
    ("exited", Exited(), NOW, ("cold", "backing_off", "backing_off", "backing_off", "cold", "backing_off")),
    ("resumed", Resumed(0), NOW, ("cold", "loading", "ready", "stopping", "leaving", "backing_off")),
    ("idle", IDLE, NOW, ("cold", "loading", "ready", "stopping", "leaving", "backing_off")),
    ("busy", BUSY, NOW, ("cold", "loading", "ready", "stopping", "leaving", "backing_off")),
    ("stuck", STUCK, NOW, ("cold", "loading", "stopping Kill:stalled", "stopping", "leaving", "backing_off")),
    ("time is up", IDLE, UNTIL, ("cold", "loading", "ready", "stopping Kill:not_stopped", "leaving Kill:not_stopped", "loading Launch")),
    (
        "time is over",
        IDLE,
        UNTIL + 1,
        ("cold", "stopping Kill:load_too_long", "ready", "stopping Kill:not_stopped", "leaving Kill:not_stopped", "loading Launch"),
    ),
]


def shown(after: Watch, effects: tuple[Effect, ...]) -> str:
    return " ".join([after.phase, *(f"Kill:{e.why}" if isinstance(e, Kill) else type(e).__name__ for e in effects)])


@pytest.mark.parametrize(("event", "now_ms", "row"), [pytest.param(*rest, id=name) for name, *rest in TABLE])
@pytest.mark.parametrize(("column", "phase"), list(enumerate(PHASES)))
def test_step(column: int, phase: Phase, event: Event, now_ms: int, row: tuple[str, ...]) -> None:
    after, effects = step(state(phase), event, now_ms=now_ms)
    assert shown(after, effects) == row[column]
    if effects or after.phase != phase:
        assert after.since_ms == now_ms
    else:
        assert after == state(phase)


def test_the_table_is_complete() -> None:
    assert get_args(Phase) == PHASES
    assert {type(event) for _, event, _, _ in TABLE} == set(get_args(Event))


def test_a_stopped_engine_has_no_time() -> None:
    for phase in ("loading", "backing_off"):
        after, effects = step(state(phase), Resumed(3_000), now_ms=NOW)
        assert (after.since_ms, after.until_ms, effects) == (state(phase).since_ms + 3_000, UNTIL + 3_000, ())
        began_meanwhile, _ = step(state(phase, since_ms=NOW - 100), Resumed(8 * 3_600_000), now_ms=NOW)
        assert began_meanwhile.until_ms == UNTIL + 100, "an engine that ended during a night's pause isn't put off for a night"
        assert began_meanwhile.since_ms == NOW
    still = UNTIL + 5_000
    resumed, _ = step(state("loading"), Resumed(7_000), now_ms=still)
    assert step(resumed, IDLE, now_ms=still)[0].phase == "loading", "it would have loaded too long without"


def test_loading_is_measured_and_bounded() -> None:
    loading, _ = step(state("cold"), Wanted(), now_ms=NOW)
    assert loading.until_ms == NOW + LOAD_MS
    ready, _ = step(loading, Loaded(), now_ms=NOW + 700)
    assert ready.loaded_in_ms == 700


@pytest.mark.parametrize(
    ("running", "moved_at_ms", "ready_since_ms", "now_ms", "killed"),
    [
        (1, 5_000, 0, 35_000, False),
        (1, 5_000, 0, 35_001, True),
        (3, 5_000, 0, 35_001, True),
        (0, 5_000, 0, 900_000, False),  # nobody waits for it
        (1, 0, 5_000, 35_000, False),  # what moved before a restart says nothing
        (1, 0, 5_000, 35_001, True),
    ],
)
def test_stalls(running: int, moved_at_ms: int, ready_since_ms: int, now_ms: int, killed: bool) -> None:
    ready = replace(state("ready", since_ms=ready_since_ms), stall_ms=30_000)
    after, effects = step(ready, Tick(running=running, progress_at_ms=moved_at_ms), now_ms=now_ms)
    assert (effects == (Kill("stalled"),)) is killed
    assert (after.phase == "stopping") is killed


@pytest.mark.parametrize(
    ("phase", "ran_ms", "faults", "then", "wait_ms"),
    [
        ("loading", 0, 0, 1, watch.BACK_OFF_MS_MIN),
        ("loading", 0, 1, 2, 2 * watch.BACK_OFF_MS_MIN),
        ("ready", watch.HEALTHY_MS - 1, 3, 4, 8 * watch.BACK_OFF_MS_MIN),
        ("ready", watch.HEALTHY_MS, 3, 1, watch.BACK_OFF_MS_MIN),
        ("loading", watch.HEALTHY_MS, 3, 4, 8 * watch.BACK_OFF_MS_MIN),  # loading long is no merit
        ("stopping", 10, 6, 7, 64 * watch.BACK_OFF_MS_MIN),
        ("loading", 0, watch.GIVE_UP_FAULTS - 1, watch.GIVE_UP_FAULTS, watch.BACK_OFF_MS_MAX),
        ("loading", 0, 1_000, 1_001, watch.BACK_OFF_MS_MAX),
    ],
)
def test_back_off(phase: Phase, ran_ms: int, faults: int, then: int, wait_ms: int) -> None:
    after, effects = step(state(phase, faults=faults, since_ms=NOW - ran_ms), Exited(), now_ms=NOW)
    assert (after.phase, after.faults, after.until_ms - NOW, effects) == ("backing_off", then, wait_ms, ())


def test_an_engine_that_ran_long_is_forgiven_even_if_it_stalls_in_the_end() -> None:
    ready = state("ready", faults=5, since_ms=0)
    at = watch.HEALTHY_MS + watch.STALL_MS + 1
    stopping, effects = step(ready, Tick(running=1, progress_at_ms=watch.HEALTHY_MS), now_ms=at)
    assert effects == (Kill("stalled"),)
    after, _ = step(stopping, Exited(), now_ms=at + 50)
    assert after.faults == 1


@pytest.mark.parametrize(
    ("watched", "ready_ms", "loaded"),
    [
        (state("cold"), 1_000 + 2**30 // 200_000, None),
        (replace(state("cold"), loaded_in_ms=900), 900, None),
        (replace(state("stopping"), loaded_in_ms=900), 900, None),
        (state("ready"), 0, None),
        (replace(state("backing_off"), loaded_in_ms=900), UNTIL - NOW + 900, None),
        (replace(state("backing_off", until_ms=NOW - 5), loaded_in_ms=900), 900, None),
        (replace(state("loading", since_ms=NOW), loaded_in_ms=900), 900, 0.0),
        (replace(state("loading", since_ms=NOW - 300), loaded_in_ms=900), 600, 0.33),
        (replace(state("loading", since_ms=NOW - 5_000), loaded_in_ms=900), 100, 0.98),
        (replace(state("loading", since_ms=NOW - 500_000), loaded_in_ms=900), 100, 0.99),
    ],
)
def test_what_is_said_of_it(watched: Watch, ready_ms: int, loaded: float | None) -> None:
    assert ready_in_ms(watched, now_ms=NOW) == ready_ms
    assert progress(watched, now_ms=NOW) == loaded


@PROMISE
@given(usual=st.none() | st.integers(0, 300_000), passed=st.lists(st.integers(0, 1_000_000), min_size=2, max_size=10))
def test_progress_never_runs_back_or_claims_to_be_whole(usual: int | None, passed: list[int]) -> None:
    loading = replace(state("loading", since_ms=0), loaded_in_ms=usual)
    told = [progress(loading, now_ms=at) for at in sorted(passed)]
    assert all(p is not None and 0 <= p <= 0.99 for p in told)
    assert told == sorted(told, key=lambda p: p or 0.0)


# Properties: any events, with clocks that only go forward.
an_event: st.SearchStrategy[Event] = st.one_of(
    st.sampled_from([Wanted(), Loaded(), Exited()]),
    st.builds(Tick, running=st.integers(0, 2), progress_at_ms=st.integers(0, 10**6)),
)
a_start: st.SearchStrategy[list[tuple[int, Event]]] = st.sampled_from([[], [(0, Wanted())], [(0, Wanted()), (600, Loaded())]])
a_story = st.tuples(a_start, st.lists(st.tuples(st.sampled_from([0, 1, 600, 40_000, 70_000, 200_000]), an_event), max_size=20)).map(
    lambda both: both[0] + both[1]
)


def tell(story: list[tuple[int, Event]]) -> tuple[Watch, int, list[tuple[Event, Watch, Watch, tuple[Effect, ...], int]]]:
    now, watched = 0, Watch(weights_bytes=2**28)
    told = []
    for pause, event in story:
        now += pause
        met = watched
        watched, effects = step(watched, event, now_ms=now)
        told.append((event, met, watched, effects, now))
    return watched, now, told


@PROMISE
@given(a_story)
def test_an_engine_never_runs_twice_and_is_killed_again_only_if_it_did_not_stop(story: list[tuple[int, Event]]) -> None:
    launched = False
    killed_at: int | None = None
    for event, _, _, effects, now in tell(story)[2]:
        if isinstance(event, Exited):
            launched, killed_at = False, None
        for effect in effects:
            match effect:
                case Launch():
                    assert not launched, "a second process beside the first"
                    launched = True
                case Kill(why=why):
                    assert launched, "nothing there to be killed"
                    assert (why == "not_stopped") == (killed_at is not None)
                    assert killed_at is None or now - killed_at > watch.STOP_MS
                    killed_at = now


@PROMISE
@given(a_story)
def test_nothing_runs_before_it_is_wanted(story: list[tuple[int, Event]]) -> None:
    wanted = False
    for event, _, after, _, _ in tell(story)[2]:
        wanted |= isinstance(event, Wanted)
        assert wanted or after.phase == "cold"


@PROMISE
@given(a_story)
def test_back_off_grows_with_the_faults_and_is_bounded(story: list[tuple[int, Event]]) -> None:
    waits: list[int] = []
    for _, met, after, _, now in tell(story)[2]:
        if met.phase == "backing_off" or after.phase != "backing_off":
            continue
        wait = after.until_ms - now
        assert watch.BACK_OFF_MS_MIN <= wait <= watch.BACK_OFF_MS_MAX
        if after.faults == 1:
            waits = []
        assert len(waits) == after.faults - 1, "a fault was not counted"
        assert all(earlier < wait or earlier == wait == watch.BACK_OFF_MS_MAX for earlier in waits)
        waits.append(wait)


@PROMISE
@given(a_story)
def test_an_engine_is_never_given_up(story: list[tuple[int, Event]]) -> None:
    """From wherever it is, an engine that is wanted comes up in the end."""
    watched, now, _ = tell([*story, (0, Wanted())])
    if watched.phase in ("loading", "ready"):
        return
    if watched.phase == "stopping":
        watched, _ = step(watched, Exited(), now_ms=now)
    assert watched.phase == "backing_off"
    watched, effects = step(watched, IDLE, now_ms=now + watch.BACK_OFF_MS_MAX)
    assert (watched.phase, effects) == ("loading", (Launch(),))


@PROMISE
@given(a_story)
def test_no_phase_with_a_process_lasts_forever_without_progress(story: list[tuple[int, Event]]) -> None:
    watched, now, _ = tell(story)
    far = now + 10**7
    after, effects = step(watched, Tick(running=1, progress_at_ms=now), now_ms=far)
    assert after.phase not in ("ready", "backing_off")
    assert bool(effects) == (watched.phase != "cold")


@PROMISE
@given(a_story)
def test_an_engine_that_moves_is_left_alone(story: list[tuple[int, Event]]) -> None:
    for _, _, watched, _, now in tell([*story, (0, Wanted()), (0, Loaded())])[2]:
        if watched.phase == "ready":
            later = now + 10**6
            assert step(watched, Tick(running=2, progress_at_ms=later - watch.STALL_MS), now_ms=later) == (watched, ())


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("faults", "failed"), [(0, False), (watch.GIVE_UP_FAULTS - 1, False), (watch.GIVE_UP_FAULTS, True), (10**6, True)])
def test_is_failed(phase: Phase, faults: int, failed: bool) -> None:
    assert is_failed(state(phase, faults=faults)) is (failed and phase != "ready")

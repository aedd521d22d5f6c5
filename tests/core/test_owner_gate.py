"""The owner gate: a row for each reason, a property for each promise, and days at real machines."""

from pathlib import Path
from typing import Annotated, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from msgspec.structs import replace

from fallow.core import profiles
from fallow.core.owner_gate import CORE_TOLERANCE, FREED_MS_MIN, GAP_MS, RISE_MS, Gate, start, step, usd_per_kwh_now
from fallow.core.owner_limits import GRACE_MS, RULES
from fallow.model.owner import Battery, Limits, PowerWindow, Profile, Reason, Senses, State, Unknown, Verdict, Window

TRACES = sorted((Path(__file__).parent / "traces").glob("*.json"))
SAMPLE_MS = 100
BROKEN_WIRE = Unknown("permission denied")
QUIET = Senses(cores=4, others_cores=0.1)
INVISIBLE = profiles.limits("invisible", cores_physical=4)
DEDICATED = profiles.limits("dedicated", cores_physical=4)
MAINS = Battery(percent=100, on_mains=True)
FULL = Senses(
    cores=4,
    others_cores=0.1,
    memory_free_share=0.6,
    memory_pressure=0.0,
    io_pressure=0.0,
    battery=MAINS,
    temperature_c=50.0,
    disk_free_bytes=10**11,
    input_idle_s=3_600.0,
    fullscreen=False,
    metered=False,
)
LIMITED = replace(
    INVISIBLE,
    upload_bytes_per_day_max=10**9,
    hours=(Window(8 * 60, 20 * 60),),
    programs=("steam",),
    usd_per_kwh=0.3,
    power_windows=(PowerWindow(window=Window(8 * 60, 10 * 60), usd_per_kwh=0.2),),
    usd_per_kwh_max=0.25,
)
MORNING = replace(FULL, minute=9 * 60)
NO_SETTLING = {"owner_paused", "hours", "power_price", "upload_spent"}


def feed(gate: Gate, senses: Senses, limits: Limits = INVISIBLE, *, from_ms: int, for_ms: int) -> Gate:
    """The gate after samples at `from_ms` and each 100 ms after it, for less than `for_ms`."""
    for now_ms in range(from_ms, from_ms + for_ms, SAMPLE_MS):
        gate = step(gate, senses, limits, now_ms=now_ms)
    return gate


def running(senses: Senses = QUIET, limits: Limits = INVISIBLE) -> Gate:
    gate = step(start(0), senses, limits, now_ms=0)
    assert (gate.verdict.state, gate.verdict.reason) == ("run", "clear")
    return gate


def told(verdict: Verdict) -> tuple[State, Reason]:
    return verdict.state, verdict.reason


# What breaks each limit, what the gate says at the same sample, and what it tells the owner.
BREAKS: list[tuple[Reason, State, dict[str, object], str]] = [
    ("owner_paused", "pause", {"paused_until_ms": 5_000}, "you paused it"),
    ("memory_low", "leave", {"memory_free_share": 0.1}, "10 % of memory is free, the limit is 15 %"),
    ("memory_pressure", "leave", {"memory_pressure": 12.0}, "programs wait for memory 12 % of the time, the limit is 10 %"),
    ("hours", "pause", {"minute": 7 * 60 + 30}, "it is outside of the hours 8-20"),
    ("power_price", "pause", {"minute": 10 * 60}, "power costs 0.30 USD per kWh, the limit is 0.25"),
    ("upload_spent", "pause", {"uploaded_today_bytes": 10**9}, "1.0 GB were uploaded today, the limit is 1.0 GB"),
    ("program", "pause", {"programs": frozenset({"steam"})}, "steam runs, which is on your list of programs"),
    ("fullscreen", "pause", {"fullscreen": True}, "a program fills the screen"),
    ("input", "pause", {"input_idle_s": 12.0}, "keyboard or mouse were used 12 s ago, the limit is 180 s"),
    ("on_battery", "pause", {"battery": Battery(percent=100, on_mains=False)}, "the machine runs on its battery"),
    ("battery_low", "pause", {"battery": Battery(percent=49, on_mains=True)}, "the battery is at 49 %, the limit is 50 %"),
    ("battery_unknown", "pause", {"battery": BROKEN_WIRE}, "the battery can't be read: permission denied"),
    ("hot", "pause", {"temperature_c": 86.0}, "the processor is at 86 degrees, the limit is 85"),
    ("temperature_unknown", "pause", {"temperature_c": BROKEN_WIRE}, "the temperature can't be read: permission denied"),
    ("metered", "pause", {"metered": True}, "the network is metered"),
    ("disk_low", "pause", {"disk_free_bytes": 10**9}, "1.0 GB of the disk are free, the limit is 2.0 GB"),
    ("io_pressure", "pause", {"io_pressure": 26.0}, "programs wait for the disk 26 % of the time, the limit is 25 %"),
]


@pytest.mark.parametrize(("reason", "state", "change", "detail"), BREAKS, ids=[row[0] for row in BREAKS])
def test_a_broken_limit_stops_at_the_same_sample(reason: Reason, state: State, change: dict[str, object], detail: str) -> None:
    verdict = step(running(MORNING, LIMITED), replace(MORNING, **change), LIMITED, now_ms=100).verdict
    assert (*told(verdict), verdict.detail) == (state, reason, detail)
    assert (verdict.cores, verdict.since_ms) == (0, 100)
    assert verdict.grace_ms == (GRACE_MS if reason in {"hours", "power_price", "upload_spent"} else 0)


@pytest.mark.parametrize(("reason", "state", "change", "detail"), BREAKS, ids=[row[0] for row in BREAKS])
def test_a_broken_limit_keeps_it_from_starting(reason: Reason, state: State, change: dict[str, object], detail: str) -> None:
    assert told(step(start(0), replace(MORNING, **change), LIMITED, now_ms=0).verdict) == (state, reason)


def test_every_reason_of_the_table_has_a_row() -> None:
    assert [rule.reason for rule in RULES if rule.reason != "cpu_busy"] == [row[0] for row in BREAKS]
    gates = {"clear", "cores_busy", "cpu_busy", "settling", "paused_long"}
    assert {rule.reason for rule in RULES} | gates == set(get_args(Reason))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("others_share_max", {"others_cores": 4.0}),
        ("usd_per_kwh_max", {"minute": 10 * 60}),
        ("input_idle_s_min", {"input_idle_s": 0.0}),
        ("temperature_c_max", {"temperature_c": 120.0}),
        ("temperature_c_max", {"temperature_c": BROKEN_WIRE}),
        ("memory_pressure_max", {"memory_pressure": 100.0}),
        ("io_pressure_max", {"io_pressure": 100.0}),
        ("upload_bytes_per_day_max", {"uploaded_today_bytes": 10**15}),
    ],
)
def test_a_limit_that_is_none_is_off(name: str, change: dict[str, object]) -> None:
    limits, senses = replace(LIMITED, **{name: None}), replace(MORNING, **change)
    assert feed(running(MORNING, limits), senses, limits, from_ms=100, for_ms=300).verdict.state in ("run", "throttle")


@pytest.mark.parametrize(
    "change",
    [
        {"fullscreen": True},
        {"battery": Battery(percent=3, on_mains=False)},
        {"battery": BROKEN_WIRE},
        {"input_idle_s": 0.0},
        {"io_pressure": 90.0},
        {"temperature_c": 90.0},
    ],
)
def test_dedicated_goes_on(change: dict[str, object]) -> None:
    assert step(running(FULL, DEDICATED), replace(FULL, **change), DEDICATED, now_ms=100).verdict.state == "run"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"memory_free_share": 0.15}, True),
        ({"memory_free_share": 0.149}, False),
        ({"memory_pressure": 10.0}, True),
        ({"memory_pressure": 10.1}, False),
        ({"io_pressure": 25.0}, True),
        ({"temperature_c": 85.0}, True),
        ({"temperature_c": 85.1}, False),
        ({"battery": Battery(percent=50, on_mains=True)}, True),
        ({"disk_free_bytes": 2 * 10**9}, True),
        ({"disk_free_bytes": 2 * 10**9 - 1}, False),
        ({"input_idle_s": 180.0}, True),
        ({"input_idle_s": 179.9}, False),
        ({"paused_until_ms": 100}, True),
        ({"paused_until_ms": 101}, False),
        ({"minute": 8 * 60}, True),
        ({"minute": 8 * 60 - 1}, False),
        ({"minute": 10 * 60 - 1}, True),
        ({"uploaded_today_bytes": 10**9 - 1}, True),
    ],
)
def test_where_each_limit_lies(change: dict[str, object], kept: bool) -> None:
    verdict = step(running(MORNING, LIMITED), replace(MORNING, **change), LIMITED, now_ms=100).verdict
    assert (verdict.state == "run") is kept


# Others' CPU


def test_two_samples_over_the_limit_stop_and_one_never_does() -> None:
    busy = replace(QUIET, others_cores=3.9)
    gate = running()
    for now_ms in range(100, 3_000, 200):
        gate = step(gate, busy, INVISIBLE, now_ms=now_ms)
        assert gate.verdict.state == "run"
        gate = step(gate, QUIET, INVISIBLE, now_ms=now_ms + 100)
        assert gate.verdict.state == "run"
    gate = feed(gate, busy, from_ms=3_100, for_ms=200)
    assert told(gate.verdict) == ("pause", "cpu_busy")
    assert (gate.verdict.detail, gate.verdict.grace_ms) == ("others use 3.9 of 4 cores, the limit is 1.0", 0)


def test_use_at_the_limit_is_allowed() -> None:
    assert feed(running(), replace(QUIET, others_cores=1.0), from_ms=100, for_ms=1_000).verdict.state != "pause"


def test_a_busy_machine_doesnt_start_and_needs_no_quiet_period_after_one_sample() -> None:
    busy = replace(QUIET, others_cores=2.0)
    gate = step(start(0), busy, INVISIBLE, now_ms=0)
    assert told(gate.verdict) == ("pause", "cpu_busy")
    assert told(step(gate, QUIET, INVISIBLE, now_ms=100).verdict) == ("run", "clear")
    assert told(feed(gate, busy, from_ms=100, for_ms=100).verdict) == ("pause", "cpu_busy")
    assert told(step(feed(gate, busy, from_ms=100, for_ms=100), QUIET, INVISIBLE, now_ms=200).verdict) == ("pause", "settling")


def test_a_busy_sample_at_the_end_of_the_quiet_period_waits_for_the_next() -> None:
    gate = feed(running(), replace(QUIET, others_cores=4.0), from_ms=100, for_ms=200)
    gate = feed(gate, QUIET, from_ms=300, for_ms=179_900)
    assert told(gate.verdict) == ("pause", "settling")
    gate = step(gate, replace(QUIET, others_cores=0.9), INVISIBLE, now_ms=180_200)
    assert told(gate.verdict) == ("pause", "cpu_busy")
    assert told(step(gate, QUIET, INVISIBLE, now_ms=180_300).verdict) == ("run", "clear")


def test_others_that_cant_be_read_are_named_and_stop_nothing() -> None:
    blind = replace(QUIET, others_cores=BROKEN_WIRE)
    verdict = feed(running(), blind, from_ms=100, for_ms=1_000).verdict
    assert (*told(verdict), verdict.cores, verdict.unread) == ("run", "clear", 3, ("others_cores",))


def test_others_never_use_more_than_there_is() -> None:
    gate = feed(running(), replace(QUIET, others_cores=4.4), from_ms=100, for_ms=200)
    assert gate.verdict.detail == "others use 4.0 of 4 cores, the limit is 1.0"


# Fewer threads


def test_threads_go_down_on_two_samples_and_up_after_a_while() -> None:
    gate = running(FULL, DEDICATED)
    assert gate.verdict.cores == 4
    busy = replace(FULL, others_cores=1.6)
    gate = step(gate, busy, DEDICATED, now_ms=100)
    assert (gate.verdict.state, gate.verdict.cores) == ("run", 4)
    gate = step(gate, busy, DEDICATED, now_ms=200)
    assert (*told(gate.verdict), gate.verdict.cores, gate.verdict.since_ms) == ("throttle", "cores_busy", 2, 200)
    assert gate.verdict.detail == "others use 1.6 of 4 cores, so engines use 2 of 4"
    gate = feed(gate, FULL, DEDICATED, from_ms=300, for_ms=RISE_MS)
    assert (gate.verdict.state, gate.verdict.cores) == ("throttle", 2)
    gate = step(gate, FULL, DEDICATED, now_ms=300 + RISE_MS)
    assert (*told(gate.verdict), gate.verdict.cores, gate.verdict.since_ms) == ("run", "clear", 4, 300 + RISE_MS)


def test_threads_rise_to_what_was_free_all_the_while() -> None:
    gate = feed(running(FULL, DEDICATED), replace(FULL, others_cores=4.0), DEDICATED, from_ms=100, for_ms=200)
    assert gate.verdict.cores == 1
    gate = feed(gate, replace(FULL, others_cores=1.0), DEDICATED, from_ms=300, for_ms=1_000)
    gate = feed(gate, FULL, DEDICATED, from_ms=1_300, for_ms=RISE_MS - 900)
    assert (gate.verdict.state, gate.verdict.cores) == ("throttle", 3)


def test_single_samples_neither_stop_the_rise_nor_begin_it() -> None:
    busy = replace(FULL, others_cores=2.0)
    gate = feed(running(FULL, DEDICATED), busy, DEDICATED, from_ms=100, for_ms=200)
    for now_ms in range(300, 300 + 2 * RISE_MS, 300):  # two busy samples of three
        gate = step(gate, FULL, DEDICATED, now_ms=now_ms)
        gate = feed(gate, busy, DEDICATED, from_ms=now_ms + 100, for_ms=200)
    assert gate.verdict.cores == 2
    for now_ms in range(20_000, 20_000 + 2 * RISE_MS, 200):  # every second one
        gate = step(gate, FULL, DEDICATED, now_ms=now_ms)
        gate = step(gate, busy, DEDICATED, now_ms=now_ms + 100)
    assert gate.verdict.cores == 4


@pytest.mark.parametrize(
    ("cores", "cores_max", "others_cores", "allowed"),
    [
        (4, 4, 0.0, 4),
        (4, 4, CORE_TOLERANCE, 4),
        (4, 4, 0.3, 3),
        (4, 3, 0.9, 3),
        (4, 3, 1.25, 3),
        (4, 3, 1.3, 2),
        (4, 3, 3.2, 1),
        (4, 3, 4.0, 1),
        (4, 3, 9.0, 1),
        (2, 4, 0.0, 2),
        (1, 4, 0.9, 1),
        (1, 1, -0.5, 1),
    ],
)
def test_how_many_threads(cores: int, cores_max: int, others_cores: float, allowed: int) -> None:
    limits = replace(DEDICATED, cores_max=cores_max)
    verdict = step(start(0), Senses(cores=cores, others_cores=others_cores), limits, now_ms=0).verdict
    assert verdict.cores == allowed
    assert verdict.state == ("run" if allowed == min(cores, cores_max) else "throttle")


# Coming back


def test_it_goes_on_when_the_quiet_period_is_over() -> None:
    gate = feed(running(FULL), replace(FULL, fullscreen=True), from_ms=100, for_ms=1_000)
    gate = step(gate, FULL, INVISIBLE, now_ms=1_100)
    assert (*told(gate.verdict), gate.verdict.since_ms, gate.verdict.until_ms) == ("pause", "settling", 1_100, 181_000)
    assert gate.verdict.detail == "all limits are kept again; it goes on once that lasts 180 s"
    gate = feed(gate, FULL, from_ms=1_200, for_ms=179_800)
    assert told(gate.verdict) == ("pause", "settling")
    gate = step(gate, FULL, INVISIBLE, now_ms=181_000)
    assert (*told(gate.verdict), gate.verdict.cores, gate.verdict.since_ms) == ("run", "clear", 3, 181_000)


def test_any_limit_that_breaks_meanwhile_starts_the_quiet_period_anew() -> None:
    gate = feed(running(FULL), replace(FULL, fullscreen=True), from_ms=100, for_ms=100)
    gate = feed(gate, FULL, from_ms=200, for_ms=170_000)
    gate = step(gate, replace(FULL, metered=True), INVISIBLE, now_ms=170_200)
    assert told(gate.verdict) == ("pause", "metered")
    gate = feed(gate, FULL, from_ms=170_300, for_ms=179_900)
    assert told(gate.verdict) == ("pause", "settling")
    assert told(step(gate, FULL, INVISIBLE, now_ms=350_200).verdict) == ("run", "clear")


@pytest.mark.parametrize(
    ("broken", "nearly", "eased"),
    [
        ({"others_cores": 1.1}, {"others_cores": 0.9}, {"others_cores": 0.79}),
        ({"temperature_c": 86.0}, {"temperature_c": 81.0}, {"temperature_c": 80.0}),
        ({"memory_free_share": 0.14}, {"memory_free_share": 0.19}, {"memory_free_share": 0.2}),
        ({"memory_pressure": 11.0}, {"memory_pressure": 9.0}, {"memory_pressure": 8.0}),
        ({"io_pressure": 26.0}, {"io_pressure": 21.0}, {"io_pressure": 20.0}),
        ({"disk_free_bytes": 1}, {"disk_free_bytes": 2_400_000_000}, {"disk_free_bytes": 2_500_000_000}),
        ({"battery": Battery(percent=40, on_mains=True)}, {"battery": Battery(percent=49, on_mains=True)}, {"battery": MAINS}),
    ],
)
def test_a_limit_that_broke_needs_some_room(broken: dict[str, object], nearly: dict[str, object], eased: dict[str, object]) -> None:
    limits = replace(INVISIBLE, resume_after_ms=1_000)
    if "battery" not in broken:
        assert feed(running(FULL, limits), replace(FULL, **nearly), limits, from_ms=100, for_ms=1_000).verdict.state == "run"
    gate = feed(running(FULL, limits), replace(FULL, **broken), limits, from_ms=100, for_ms=200)
    why = gate.verdict.reason
    gate = feed(gate, replace(FULL, **nearly), limits, from_ms=300, for_ms=2_000)
    assert gate.verdict.reason == why
    quiet_ms = FREED_MS_MIN if gate.verdict.state == "leave" else 1_000
    gate = feed(gate, replace(FULL, **eased), limits, from_ms=2_300, for_ms=quiet_ms - 100)
    assert gate.verdict.reason == "settling"
    assert feed(gate, replace(FULL, **eased), limits, from_ms=2_200 + quiet_ms, for_ms=100).verdict.state == "run"


def test_a_limit_that_broke_tells_what_it_takes_to_go_on() -> None:
    gate = step(running(FULL), replace(FULL, temperature_c=90.0), INVISIBLE, now_ms=100)
    gate = step(gate, replace(FULL, temperature_c=83.0), INVISIBLE, now_ms=200)
    assert gate.verdict.detail == "the processor is at 83 degrees, the limit is 85, and 80 to go on"


def test_one_limit_that_broke_doesnt_tighten_the_others() -> None:
    warm = replace(FULL, temperature_c=83.0, io_pressure=22.0, memory_free_share=0.17)
    gate = step(running(warm), replace(warm, paused_until_ms=1_000), INVISIBLE, now_ms=100)
    assert told(step(gate, warm, INVISIBLE, now_ms=1_000).verdict) == ("run", "clear")


def test_all_of_the_memory_can_be_asked_for() -> None:
    limits = replace(INVISIBLE, memory_free_share_min=0.98, resume_after_ms=0)
    gate = step(start(0), FULL, limits, now_ms=0)
    assert gate.verdict.reason == "memory_low"
    gate = feed(gate, replace(FULL, memory_free_share=0.995), limits, from_ms=100, for_ms=FREED_MS_MIN)
    assert gate.verdict.state == "run"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"paused_until_ms": 60_000}, "owner_paused"),
        ({"minute": 7 * 60}, "hours"),
        ({"minute": 11 * 60}, "power_price"),
        ({"uploaded_today_bytes": 10**10}, "upload_spent"),
    ],
)
def test_what_needs_no_quiet_period(change: dict[str, object], reason: Reason) -> None:
    gate = feed(running(MORNING, LIMITED), replace(MORNING, **change), LIMITED, from_ms=100, for_ms=1_000)
    assert gate.verdict.reason == reason
    assert told(step(gate, MORNING, LIMITED, now_ms=1_100).verdict) == ("run", "clear")


def test_a_manual_pause_ends_by_itself_and_by_the_owner() -> None:
    paused = replace(FULL, paused_until_ms=1_000)
    gate = step(running(FULL), paused, INVISIBLE, now_ms=100)
    assert (*told(gate.verdict), gate.verdict.until_ms) == ("pause", "owner_paused", 1_000)
    assert told(step(gate, paused, INVISIBLE, now_ms=1_000).verdict) == ("run", "clear")
    assert told(step(gate, FULL, INVISIBLE, now_ms=200).verdict) == ("run", "clear")
    assert step(gate, replace(FULL, paused_until_ms=2**63), INVISIBLE, now_ms=200).verdict.until_ms is None


def test_a_manual_pause_isnt_a_way_around_the_quiet_period() -> None:
    gate = step(running(FULL), replace(FULL, fullscreen=True, paused_until_ms=500), INVISIBLE, now_ms=100)
    assert told(gate.verdict) == ("pause", "owner_paused")
    gate = step(gate, FULL, INVISIBLE, now_ms=500)
    assert (*told(gate.verdict), gate.verdict.until_ms) == ("pause", "settling", 180_100)


def test_the_time_since_a_key_was_touched_is_quiet_already() -> None:
    gate = running(FULL)
    for now_ms in range(60_000, 60_000 + 180_000, SAMPLE_MS):
        gate = step(gate, replace(FULL, input_idle_s=(now_ms - 60_000) / 1_000), INVISIBLE, now_ms=now_ms)
        assert (*told(gate.verdict), gate.verdict.until_ms) == ("pause", "input", 240_000)
    assert told(step(gate, replace(FULL, input_idle_s=180.0), INVISIBLE, now_ms=240_000).verdict) == ("run", "clear")


def test_a_touch_that_was_noticed_late_still_means_the_whole_quiet_period() -> None:
    gate = step(running(FULL), replace(FULL, input_idle_s=170.0), INVISIBLE, now_ms=100)
    gate = feed(gate, FULL, from_ms=200, for_ms=179_900)
    assert told(gate.verdict) == ("pause", "settling")
    assert told(step(gate, FULL, INVISIBLE, now_ms=180_100).verdict) == ("run", "clear")


def test_sleep_is_not_quiet() -> None:
    gate = feed(running(FULL), replace(FULL, fullscreen=True), from_ms=100, for_ms=100)
    gate = step(gate, FULL, INVISIBLE, now_ms=8 * 3_600_000)
    assert (gate.verdict.reason, gate.verdict.until_ms) == ("settling", 8 * 3_600_000 + 180_000)
    gate = step(gate, FULL, INVISIBLE, now_ms=8 * 3_600_000 + GAP_MS)
    assert gate.verdict.until_ms == 8 * 3_600_000 + 180_000


def test_a_clock_that_goes_back_makes_it_wait_no_longer_than_the_quiet_period() -> None:
    gate = step(start(10**9), replace(FULL, fullscreen=True), INVISIBLE, now_ms=10**9)
    gate = step(gate, FULL, INVISIBLE, now_ms=0)
    assert (*told(gate.verdict), gate.verdict.since_ms, gate.verdict.until_ms) == ("pause", "settling", 0, 180_000)
    assert told(feed(gate, FULL, from_ms=100, for_ms=180_000).verdict) == ("run", "clear")


# Freeing memory


def test_a_long_pause_frees_memory_and_says_why_it_began() -> None:
    film = replace(FULL, fullscreen=True)
    limits = replace(INVISIBLE, leave_after_ms=10_000, resume_after_ms=1_000)
    gate = feed(running(FULL, limits), film, limits, from_ms=100, for_ms=10_100)
    assert told(gate.verdict) == ("pause", "fullscreen")
    gate = step(gate, film, limits, now_ms=10_200)
    assert told(gate.verdict) == ("leave", "paused_long")
    assert gate.verdict.detail == "a program fills the screen; this has lasted so long that memory was freed"
    assert told(step(gate, replace(film, memory_free_share=0.1), limits, now_ms=10_300).verdict) == ("leave", "memory_low")
    gate = feed(gate, FULL, limits, from_ms=10_300, for_ms=900)
    assert told(gate.verdict) == ("leave", "settling")
    assert told(step(gate, FULL, limits, now_ms=11_200).verdict) == ("run", "clear")


def test_without_a_limit_a_pause_keeps_memory_for_ever() -> None:
    limits = replace(INVISIBLE, leave_after_ms=None)
    gate = feed(running(FULL, limits), replace(FULL, fullscreen=True), limits, from_ms=100, for_ms=100)
    assert step(gate, replace(FULL, fullscreen=True), limits, now_ms=10**12).verdict.state == "pause"


def test_memory_once_freed_stays_free_until_it_runs() -> None:
    gate = step(running(FULL), replace(FULL, memory_free_share=0.05), INVISIBLE, now_ms=100)
    assert told(gate.verdict) == ("leave", "memory_low")
    assert told(step(gate, replace(FULL, fullscreen=True), INVISIBLE, now_ms=200).verdict) == ("leave", "fullscreen")
    assert told(step(gate, FULL, INVISIBLE, now_ms=200).verdict) == ("leave", "settling")


def test_memory_wins_in_the_state_and_the_owner_in_the_reason() -> None:
    senses = replace(FULL, paused_until_ms=9_000, memory_free_share=0.01)
    assert told(step(running(FULL), senses, INVISIBLE, now_ms=100).verdict) == ("leave", "owner_paused")


# Grace, ends, several limits


def test_the_first_of_the_table_is_told() -> None:
    change: dict[str, object] = {}
    for reason, _, broken, _ in reversed(BREAKS):
        change |= broken if reason != "hours" else {}  # "power_price" and "hours" are about the same minute
        if reason not in {"on_battery", "battery_low", "battery_unknown", "hot", "temperature_unknown", "hours"}:
            assert step(running(MORNING, LIMITED), replace(MORNING, **change), LIMITED, now_ms=100).verdict.reason == reason
    assert step(running(MORNING, LIMITED), replace(MORNING, minute=0), LIMITED, now_ms=100).verdict.reason == "hours"


def test_grace_runs_out_and_never_comes_back() -> None:
    night = replace(MORNING, minute=7 * 60)
    gate = step(running(MORNING, LIMITED), night, LIMITED, now_ms=1_000)
    assert gate.verdict.grace_ms == GRACE_MS
    gate = step(gate, night, LIMITED, now_ms=5_000)
    assert (gate.verdict.grace_ms, gate.verdict.since_ms) == (GRACE_MS - 4_000, 1_000)
    spent = step(gate, replace(night, uploaded_today_bytes=10**10, minute=9 * 60), LIMITED, now_ms=6_000)
    assert (spent.verdict.reason, spent.verdict.grace_ms) == ("upload_spent", GRACE_MS - 5_000)
    hurried = step(gate, replace(night, fullscreen=True), LIMITED, now_ms=6_000)
    assert (hurried.verdict.reason, hurried.verdict.grace_ms) == ("hours", 0)
    assert step(hurried, night, LIMITED, now_ms=7_000).verdict.grace_ms == 0
    assert step(gate, night, LIMITED, now_ms=1_000 + GRACE_MS + 1).verdict.grace_ms == 0


@pytest.mark.parametrize(
    ("change", "minutes"),
    [
        ({"minute": 7 * 60 + 30}, 30),
        ({"minute": 20 * 60}, 12 * 60),
        ({"minute": 10 * 60}, 22 * 60),
        ({"minute": 9 * 60, "uploaded_today_bytes": 10**10}, 15 * 60),
    ],
)
def test_when_a_reason_of_the_day_ends(change: dict[str, object], minutes: int) -> None:
    senses = replace(FULL, **change)
    gate = step(start(0), senses, LIMITED, now_ms=0)
    assert gate.verdict.until_ms == minutes * 60_000
    gate = feed(gate, senses, LIMITED, from_ms=100, for_ms=59_900)  # each sample of the minute tells the same
    assert gate.verdict.until_ms == minutes * 60_000
    assert step(gate, replace(senses, minute=senses.minute + 1), LIMITED, now_ms=60_000).verdict.until_ms == minutes * 60_000


def test_power_that_never_gets_cheap_has_no_end() -> None:
    limits = replace(INVISIBLE, usd_per_kwh=0.3, usd_per_kwh_max=0.1, power_windows=LIMITED.power_windows)
    verdict = step(start(0), FULL, limits, now_ms=0).verdict
    assert (verdict.reason, verdict.until_ms) == ("power_price", None)


@pytest.mark.parametrize(("minute", "price"), [(0, 0.3), (8 * 60, 0.2), (9 * 60 + 59, 0.2), (10 * 60, 0.3), (12 * 60, 0.1)])
def test_what_power_costs_now(minute: int, price: float) -> None:
    noon = PowerWindow(window=Window(12 * 60, 13 * 60), usd_per_kwh=0.1)
    later = PowerWindow(window=Window(12 * 60, 18 * 60), usd_per_kwh=9.0)
    cheap = replace(LIMITED, power_windows=(*LIMITED.power_windows, noon, later))
    if minute == 12 * 60:
        assert usd_per_kwh_now(replace(cheap, power_windows=(later, noon)), minute) == 9.0  # the first that has it
    assert usd_per_kwh_now(cheap, minute) == price


def test_a_program_counts_only_while_there_is_a_list() -> None:
    senses = replace(FULL, programs=frozenset({"steam"}))
    assert step(start(0), senses, replace(INVISIBLE, programs=("steam",)), now_ms=0).verdict.reason == "program"
    assert step(start(0), senses, INVISIBLE, now_ms=0).verdict.reason == "clear"


def test_changed_limits_count_from_the_next_sample() -> None:
    gate = running(FULL)
    narrow = replace(INVISIBLE, cores_max=1, temperature_c_max=40.0)
    assert told(step(gate, FULL, narrow, now_ms=100).verdict) == ("pause", "hot")
    gate = step(gate, FULL, replace(INVISIBLE, cores_max=1), now_ms=100)
    assert (gate.verdict.state, gate.verdict.cores) == ("run", 1)
    assert step(gate, FULL, INVISIBLE, now_ms=200).verdict.cores == 3
    gate = feed(gate, replace(FULL, fullscreen=True), from_ms=200, for_ms=100)
    assert step(gate, FULL, DEDICATED, now_ms=300).verdict.state == "run"


# Sensors that a machine lacks, or that can't be read

SENSORS = ["memory_pressure", "io_pressure", "battery", "temperature_c", "disk_free_bytes", "input_idle_s", "fullscreen", "metered"]


@pytest.mark.parametrize("name", SENSORS)
def test_a_sensor_that_isnt_there_is_no_reason(name: str) -> None:
    verdict = step(start(0), replace(FULL, **{name: None}), INVISIBLE, now_ms=0).verdict
    assert (*told(verdict), verdict.unread) == ("run", "clear", ())


@pytest.mark.parametrize("name", [*SENSORS, "others_cores", "memory_free_share"])
@pytest.mark.parametrize("unread", [BROKEN_WIRE, float("nan"), float("inf"), float("-inf")])
def test_a_sensor_that_cant_be_read_is_named(name: str, unread: Unknown | float) -> None:
    value = Battery(percent=unread, on_mains=True) if name == "battery" and isinstance(unread, float) else unread
    verdict = step(start(0), replace(FULL, **{name: value}), INVISIBLE, now_ms=0).verdict
    stops = {"battery": "battery_unknown", "temperature_c": "temperature_unknown"}
    assert (verdict.unread, verdict.reason) == ((name,), stops.get(name, "clear"))
    if name not in stops:
        assert verdict.detail == f"all limits are kept; can't be read: {name}"


def test_all_that_cant_be_read_is_named_in_order() -> None:
    blind = replace(FULL, **dict.fromkeys((*SENSORS, "others_cores", "memory_free_share"), BROKEN_WIRE))
    assert step(start(0), blind, INVISIBLE, now_ms=0).verdict.unread == tuple(sorted((*SENSORS, "others_cores", "memory_free_share")))


def test_before_the_first_sample_nothing_runs() -> None:
    assert (start(7).verdict.state, start(7).verdict.since_ms, start(7).verdict.cores) == ("pause", 7, 0)
    assert told(step(Gate(), FULL, INVISIBLE, now_ms=3).verdict) == ("run", "clear")


# Promises

UNKNOWNS = st.just(BROKEN_WIRE)


def of(*values: object, missing: bool = True) -> st.SearchStrategy[object]:
    return st.sampled_from([*values, *values, *values, BROKEN_WIRE, *([None] if missing else [])])


SENSED = st.fixed_dictionaries(
    {
        "cores": st.just(4),
        "others_cores": of(0.0, 0.1, 0.3, 0.9, 1.0, 1.1, 2.6, 4.0, missing=False),
    },
    optional={
        "memory_free_share": of(0.5, 0.14, 0.16, 0.2, 0.04, missing=False),
        "memory_pressure": of(0.0, 9.0, 11.0, 50.0),
        "io_pressure": of(0.0, 21.0, 26.0),
        "battery": of(MAINS, Battery(percent=40, on_mains=True), Battery(percent=90, on_mains=False)),
        "temperature_c": of(40.0, 64.0, 82.0, 86.0, 99.0),
        "disk_free_bytes": of(10**11, 10**9),
        "input_idle_s": of(0.0, 179.0, 1_000.0),
        "fullscreen": of(False, True),
        "metered": of(False, True),
        "programs": st.sampled_from([frozenset(), frozenset({"steam"})]),
        "uploaded_today_bytes": st.sampled_from([0, 10**10]),
        "minute": st.sampled_from([0, 9 * 60, 15 * 60, 23 * 60]),
        "paused_until_ms": st.sampled_from([None, 1_000, 100_000, 10**15]),
    },
).map(lambda fields: Senses(**fields))  # type: ignore[arg-type]
CALM = st.just(FULL) | st.sampled_from([replace(FULL, others_cores=0.7), QUIET])
TIMES = st.sampled_from([100, 100, 100, 100, 500, 4_000, 60_000])
PROFILES = st.sampled_from(get_args(Profile))


@st.composite
def owners(draw: st.DrawFn) -> Limits:
    profile: Profile = draw(PROFILES)
    usual = profiles.limits(profile, cores_physical=draw(st.integers(1, 6)))
    if draw(st.booleans()):
        return usual
    return replace(
        usual,
        resume_after_ms=draw(st.sampled_from([0, 300, 2_000])),
        programs=("steam",),
        upload_bytes_per_day_max=draw(st.sampled_from([None, 10**9])),
        hours=draw(st.sampled_from([(), LIMITED.hours])),
        leave_after_ms=draw(st.sampled_from([None, 1_000])),
        usd_per_kwh=0.3,
        usd_per_kwh_max=draw(st.sampled_from([None, 0.25])),
        power_windows=LIMITED.power_windows,
    )


def breaks(senses: Senses, limits: Limits, now_ms: int) -> bool:
    """Whether a limit is broken at this sample, but for the CPU's, told in another way than the gate's own."""

    def over(value: object, most: float | None) -> bool:
        return isinstance(value, float) and most is not None and value > most

    battery, idle, disk = senses.battery, senses.input_idle_s, senses.disk_free_bytes
    price = 0.2 if limits.power_windows and 480 <= senses.minute < 600 else limits.usd_per_kwh
    is_day = {0: False, 9 * 60: True, 15 * 60: True, 23 * 60: False}[senses.minute]
    in_hours = {(): True, LIMITED.hours: is_day, (profiles.NIGHT,): not is_day}[limits.hours]
    return any(
        [
            senses.paused_until_ms is not None and senses.paused_until_ms > now_ms,
            isinstance(senses.memory_free_share, float) and senses.memory_free_share < limits.memory_free_share_min,
            over(senses.memory_pressure, limits.memory_pressure_max),
            over(senses.io_pressure, limits.io_pressure_max),
            over(senses.temperature_c, limits.temperature_c_max),
            senses.temperature_c == BROKEN_WIRE and limits.temperature_c_max is not None,
            battery == BROKEN_WIRE and not (limits.on_battery and limits.battery_percent_min == 0),
            isinstance(battery, Battery) and not battery.on_mains and not limits.on_battery,
            isinstance(battery, Battery) and battery.percent < limits.battery_percent_min,
            isinstance(idle, float) and limits.input_idle_s_min is not None and idle < limits.input_idle_s_min,
            isinstance(disk, int) and disk < limits.disk_free_bytes_min,
            senses.fullscreen is True and not limits.while_fullscreen,
            senses.metered is True and not limits.while_metered,
            bool(limits.programs) and bool(senses.programs),
            limits.upload_bytes_per_day_max is not None and senses.uploaded_today_bytes >= limits.upload_bytes_per_day_max,
            not in_hours,
            limits.usd_per_kwh_max is not None and price > limits.usd_per_kwh_max,
        ]
    )


def is_busy(senses: Senses, limits: Limits) -> bool:
    busy, most = senses.others_cores, limits.others_share_max
    return isinstance(busy, float) and most is not None and busy / senses.cores > most


DAYS = st.lists(st.tuples(TIMES, SENSED | CALM | CALM), max_size=40)


@given(DAYS, owners())
@settings(max_examples=300)
def test_it_never_runs_while_a_limit_is_broken(day: list[tuple[int, Senses]], limits: Limits) -> None:
    gate, now_ms, busy_before = start(0), 0, True
    for wait_ms, senses in day:
        now_ms += wait_ms
        was_running = gate.verdict.cores > 0
        gate = step(gate, senses, limits, now_ms=now_ms)
        runs = gate.verdict.state in ("run", "throttle")
        assert not (runs and breaks(senses, limits, now_ms))
        busy = is_busy(senses, limits)
        assert not (runs and busy and (busy_before or not was_running))
        assert (1 if runs else 0) <= gate.verdict.cores <= min(limits.cores_max, senses.cores)
        assert runs == (gate.verdict.cores > 0)
        assert gate.verdict.since_ms <= now_ms
        assert gate.verdict.detail
        assert 0 <= gate.verdict.grace_ms <= (0 if runs or gate.verdict.state == "leave" else GRACE_MS)
        busy_before = busy


@given(DAYS, owners())
@settings(max_examples=300)
def test_it_comes_back_no_sooner_than_the_owner_allows(day: list[tuple[int, Senses]], limits: Limits) -> None:
    gate, now_ms = start(0), 0
    stopped_ms: int | None = None
    needs_quiet = was_left = False
    for wait_ms, senses in day:
        now_ms += wait_ms
        before = gate.verdict
        gate = step(gate, senses, limits, now_ms=now_ms)
        runs = gate.verdict.cores > 0
        if before.cores > 0 and not runs:
            stopped_ms, needs_quiet, was_left = now_ms, gate.verdict.reason not in NO_SETTLING, False
        if not runs:  # a single busy sample is told as cpu_busy too, if it is all that keeps the node from starting
            needs_quiet |= gate.verdict.reason not in NO_SETTLING | {"paused_long", "cpu_busy"}
            assert not was_left or gate.verdict.state == "leave"
            was_left = gate.verdict.state == "leave"
        if runs and before.cores == 0 and stopped_ms is not None and needs_quiet:
            assert now_ms - stopped_ms >= limits.resume_after_ms
        if runs and before.reason == "settling" and stopped_ms is not None:
            assert before.until_ms is not None
            assert now_ms >= before.until_ms


@given(DAYS, owners())
def test_the_same_day_gives_the_same_verdicts(day: list[tuple[int, Senses]], limits: Limits) -> None:
    def lived() -> list[Gate]:
        gates, now_ms = [start(0)], 0
        for wait_ms, senses in day:
            now_ms += wait_ms
            gates.append(step(gates[-1], senses, limits, now_ms=now_ms))
        return gates

    assert lived() == lived()


@given(DAYS, owners(), SENSED)
def test_what_cant_be_read_is_always_named(day: list[tuple[int, Senses]], limits: Limits, last: Senses) -> None:
    gate, now_ms = start(0), 0
    for wait_ms, senses in [*day, (100, last)]:
        now_ms += wait_ms
        gate = step(gate, senses, limits, now_ms=now_ms)
    assert gate.verdict.unread == tuple(sorted(name for name in last.__struct_fields__ if getattr(last, name) == BROKEN_WIRE))


@given(SENSED, owners(), st.sets(st.sampled_from(SENSORS)))
def test_a_sensor_less_never_stops(senses: Senses, limits: Limits, lost: set[str]) -> None:
    fewer = replace(senses, **dict.fromkeys(lost))
    if step(start(0), senses, limits, now_ms=0).verdict.cores:
        assert step(start(0), fewer, limits, now_ms=0).verdict.cores


WILD = st.floats() | UNKNOWNS
WILD_OR_NONE = WILD | st.none()
WILD_SENSES = st.builds(
    Senses,
    cores=st.integers(-1, 10**6),
    others_cores=WILD,
    memory_free_share=WILD,
    memory_pressure=WILD_OR_NONE,
    io_pressure=WILD_OR_NONE,
    battery=st.none() | UNKNOWNS | st.builds(Battery, percent=st.floats(), on_mains=st.booleans()),
    temperature_c=WILD_OR_NONE,
    disk_free_bytes=st.none() | UNKNOWNS | st.integers(),
    input_idle_s=WILD_OR_NONE,
    fullscreen=st.none() | UNKNOWNS | st.booleans(),
    metered=st.none() | UNKNOWNS | st.booleans(),
    programs=st.frozensets(st.text(max_size=3), max_size=2),
    uploaded_today_bytes=st.integers(),
    minute=st.integers(0, 1439),
    paused_until_ms=st.none() | st.integers(),
)


@given(st.lists(st.tuples(st.integers(), WILD_SENSES, owners()), max_size=8))
def test_there_is_a_verdict_for_all_that_can_be_sensed(day: list[tuple[int, Senses, Limits]]) -> None:
    gate = Gate()
    for now_ms, senses, limits in day:
        gate = step(gate, senses, limits, now_ms=now_ms)
        assert gate.verdict.cores <= min(limits.cores_max, max(1, senses.cores))
        assert gate.verdict.since_ms <= now_ms


# Days at real machines


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some seconds of a trace. `others_cores` is repeated sample by sample; `set` holds until another part sets it anew.

    With `is_touched` somebody types; else the time since they did grows.
    """

    for_s: Annotated[float, Meta(gt=0)]
    others_cores: tuple[float, ...]
    set: dict[str, msgspec.Raw] = {}
    is_touched: bool = False


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine sensed, and when the gate is expected to say what."""

    about: str
    profile: Profile
    cores: int
    sample_ms: int
    idle_s: float | None
    parts: tuple[Part, ...]
    expected: tuple[tuple[float, State, Reason, int], ...]


def sensed(trace: Trace) -> list[tuple[int, Senses]]:
    rows: list[tuple[int, Senses]] = []
    kinds = {field.name: field.type for field in msgspec.structs.fields(Senses)}
    known: dict[str, object] = {}
    now_ms, touched_ms = 0, None if trace.idle_s is None else -int(trace.idle_s * 1_000)
    for part in trace.parts:
        known |= {name: msgspec.json.decode(raw, type=kinds[name]) for name, raw in part.set.items()}
        for index in range(int(part.for_s * 1_000) // trace.sample_ms):
            if part.is_touched:
                touched_ms = now_ms
            idle_s = None if touched_ms is None else (now_ms - touched_ms) / 1_000
            others_cores = part.others_cores[index % len(part.others_cores)]
            rows.append((now_ms, Senses(cores=trace.cores, others_cores=others_cores, input_idle_s=idle_s, **known)))  # type: ignore[arg-type]
            now_ms += trace.sample_ms
    return rows


@pytest.mark.parametrize("path", TRACES, ids=[path.stem for path in TRACES])
def test_a_day_at_a_machine(path: Path) -> None:
    trace = msgspec.json.decode(path.read_bytes(), type=Trace)
    limits = profiles.limits(trace.profile, cores_physical=trace.cores)
    gate, found = start(0), []
    for now_ms, senses in sensed(trace):
        before = gate.verdict
        gate = step(gate, senses, limits, now_ms=now_ms)
        after = gate.verdict
        if (*told(before), before.cores) != (*told(after), after.cores) or not now_ms:
            found.append((now_ms / 1_000, *told(after), after.cores))
    assert found == list(trace.expected)


def test_there_are_traces() -> None:
    assert len(TRACES) >= 4


@pytest.mark.parametrize("name", SENSORS)
def test_a_sensor_that_a_machine_lacks_is_named_whether_it_works_or_not(name: str) -> None:
    for change in ({}, {"paused_until_ms": 60_000}):
        senses = replace(FULL, **{name: None}, **change)
        assert name in step(start(0), senses, INVISIBLE, now_ms=0).verdict.absent
        assert name not in step(start(0), replace(FULL, **change), INVISIBLE, now_ms=0).verdict.absent

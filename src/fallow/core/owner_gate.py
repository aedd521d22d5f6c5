"""The owner gate: from what is sensed of a machine and what its owner allows, whether engines may work now, and why."""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.core.owner_limits import (
    OVER_SAMPLES,
    Broken,
    Moment,
    absent,
    broken_limits,
    cores,
    is_over,
    legible,
    others,
    until_ms,
    usd_per_kwh_now,
)
from fallow.model.owner import WORKING, Limits, Reason, Senses, State, Verdict

__all__ = ["Gate", "start", "step", "usd_per_kwh_now"]

CORE_TOLERANCE = 0.25
"""A core of which others use less than this is free: a thread less would cost a small machine more than it loses there."""
RISE_MS = 5_000
"""How long more cores must be free before engines get more."""
GAP_MS = 5_000
"""After this long without a sample (the machine slept, or had no time for us) the quiet period starts anew: nobody saw quiet."""
FREED_MS_MIN = 60_000
"""How long memory must be free before engines come back for it, whatever the owner's quiet period is: else they might come and go."""
JITTER_MS = 60_000
"""Ends that are only known to the minute are told anew when they move by more than this."""
NOTHING_SENSED = Verdict(state="pause", reason="settling", detail="nothing has been sensed yet", cores=0, since_ms=0)


class Spare(msgspec.Struct, frozen=True, kw_only=True):
    """How many whole cores others leave, one at least, smoothed: `cores` falls when two samples agree, and rises after RISE_MS.

    `last` is the newest sample. `rise_since_ms` is since when it was more, and `rise_to` the least of that time.
    """

    cores: int
    last: int
    rise_since_ms: int | None = None
    rise_to: int = 0


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate says, and what it must remember for the next sample. Times are those of `step`.

    `at_ms` is the newest sample. `over` counts samples in a row over the CPU limit. While engines don't run: `held` are the
    limits that were broken, `unquiet_at_ms` is when one that needs a quiet period last was, `paused_since_ms` when it began,
    `left` why memory was freed (`long`: the pause lasted), and `grace_until_ms` how long calls may still end.
    """

    verdict: Verdict = NOTHING_SENSED
    at_ms: int | None = None
    over: int = 0
    held: frozenset[Reason] = frozenset()
    unquiet_at_ms: int | None = None
    paused_since_ms: int | None = None
    left: Literal["", "memory", "long"] = ""
    grace_until_ms: int | None = None
    spare: Spare | None = None


def start(now_ms: int) -> Gate:
    """The gate before its first sample."""
    return Gate(verdict=replace(NOTHING_SENSED, since_ms=now_ms))


def step(gate: Gate, senses: Senses, limits: Limits, *, now_ms: int) -> Gate:
    """The gate after one more sample.

    A limit that breaks stops engines at this sample, but for the CPU's, which takes two. They go on when all limits have been
    kept for `resume_after_ms` without a break, or at once if only limits that need no quiet period were broken, or at the first
    sample of all. Limits may change from sample to sample.
    """
    gate = _timed(gate, now_ms)
    senses, unread = legible(senses)
    moment = Moment(senses=senses, limits=limits, now_ms=now_ms, held=gate.held)
    over = min(gate.over + 1, OVER_SAMPLES) if is_over(moment) else 0
    moment = replace(moment, over=over)
    broken = broken_limits(moment)
    unquiet_at_ms = _unquiet_at_ms(gate, broken, moment)
    gate = replace(gate, at_ms=now_ms, over=over, unquiet_at_ms=unquiet_at_ms, spare=_spare(gate, moment))
    is_settled = unquiet_at_ms is None or now_ms - unquiet_at_ms >= _quiet_ms(gate, limits)
    if not broken and is_settled and over and not _is_running(gate):
        broken_now = broken_limits(replace(moment, over=OVER_SAMPLES))  # one busy sample doesn't stop, but it doesn't start either
    else:
        broken_now = broken
    if broken_now or not is_settled:
        gate = replace(gate, held=gate.held | {one.rule.reason for one in broken})
        gate = _stopped(gate, broken_now, moment, unread)
    else:
        gate = _running(gate, moment, unread)
    return replace(gate, verdict=replace(gate.verdict, absent=absent(senses)))


def _quiet_ms(gate: Gate, limits: Limits) -> int:
    """How long it must be quiet; longer where memory was short, as loading takes it again."""
    return max(limits.resume_after_ms, FREED_MS_MIN) if gate.left == "memory" else limits.resume_after_ms


def _is_running(gate: Gate) -> bool:
    return gate.verdict.state in WORKING


def _timed(gate: Gate, now_ms: int) -> Gate:
    """The gate with no time in the future, should the clock have gone back, and without a quiet period that nobody saw."""
    unquiet_at_ms = gate.unquiet_at_ms
    if unquiet_at_ms is not None:
        unquiet_at_ms = now_ms if gate.at_ms is None or now_ms - gate.at_ms > GAP_MS else min(unquiet_at_ms, now_ms)
    paused, spare = gate.paused_since_ms, gate.spare
    if spare is not None and spare.rise_since_ms is not None:
        spare = replace(spare, rise_since_ms=min(spare.rise_since_ms, now_ms))
    return replace(gate, unquiet_at_ms=unquiet_at_ms, paused_since_ms=None if paused is None else min(paused, now_ms), spare=spare)


def _unquiet_at_ms(gate: Gate, broken: Sequence[Broken], moment: Moment) -> int | None:
    """When it was last not quiet. Of a keyboard it is known when it was touched, so that time counts as quiet already."""
    times = [] if gate.unquiet_at_ms is None else [gate.unquiet_at_ms]
    for one in broken:
        idle_s = moment.senses.input_idle_s
        if one.rule.reason == "input" and isinstance(idle_s, (int, float)):
            began = moment.now_ms if gate.paused_since_ms is None else gate.paused_since_ms
            times.append(max(began, moment.now_ms - round(max(0.0, idle_s) * 1_000)))
        elif one.rule.settles:
            times.append(moment.now_ms)
    return max(times, default=None)


def _spare(gate: Gate, moment: Moment) -> Spare:
    """How many cores others leave; while engines don't run there are no threads that could flap, so it may rise at once."""
    spare, busy = gate.spare, others(moment.senses)
    free = cores(moment.senses) if busy is None else max(1, math.floor(cores(moment.senses) - busy + CORE_TOLERANCE))
    if spare is None:
        return Spare(cores=free, last=free)
    seen = max(spare.last, free)  # a single sample with less doesn't count
    if seen <= spare.cores or not _is_running(gate):
        return Spare(cores=seen, last=free)
    since_ms = moment.now_ms if spare.rise_since_ms is None else spare.rise_since_ms
    least = seen if spare.rise_since_ms is None else min(spare.rise_to, seen)
    if moment.now_ms - since_ms >= RISE_MS:
        return Spare(cores=least, last=free)
    return Spare(cores=spare.cores, last=free, rise_since_ms=since_ms, rise_to=least)


def _running(gate: Gate, moment: Moment, unread: tuple[str, ...]) -> Gate:
    assert gate.spare is not None
    most = max(1, min(moment.limits.cores_max, cores(moment.senses)))
    allowed = min(most, gate.spare.cores)
    state: State = "run"
    reason: Reason = "clear"
    detail = "all limits are kept"
    if allowed < most:
        state, reason = "throttle", "cores_busy"
        detail = f"others use {others(moment.senses) or 0.0:.1f} of {cores(moment.senses)} cores, so engines use {allowed} of {most}"
        if gate.spare.last > gate.spare.cores:
            detail = f"others used more until a moment ago, so engines still use {allowed} of {most} cores"
    if unread:
        detail += f"; can't be read: {', '.join(unread)}"
    since_ms = _since_ms(gate, state, reason, moment.now_ms)
    verdict = Verdict(state=state, reason=reason, detail=detail, cores=allowed, since_ms=since_ms, unread=unread)
    return Gate(verdict=verdict, at_ms=gate.at_ms, over=gate.over, spare=gate.spare)


def _stopped(gate: Gate, broken: Sequence[Broken], moment: Moment, unread: tuple[str, ...]) -> Gate:
    now_ms, limits = moment.now_ms, moment.limits
    paused_since_ms = now_ms if gate.paused_since_ms is None else gate.paused_since_ms
    is_long = limits.leave_after_ms is not None and now_ms - paused_since_ms > limits.leave_after_ms
    left = gate.left or ("memory" if any(one.rule.frees for one in broken) else "long" if is_long else "")
    state: State = "leave" if left else "pause"
    reason, detail = _told(broken, _quiet_ms(gate, limits))
    if left == "long" and broken and not broken[0].rule.frees:
        reason, detail = "paused_long", f"{detail}; this has lasted so long that memory was freed"
    grace_until_ms = now_ms + min((one.rule.grace_ms for one in broken), default=0) if not left else now_ms
    if gate.grace_until_ms is not None:
        grace_until_ms = min(gate.grace_until_ms, grace_until_ms)
    verdict = Verdict(
        state=state,
        reason=reason,
        detail=detail,
        cores=0,
        since_ms=_since_ms(gate, state, reason, now_ms),
        until_ms=_until_ms(gate, reason, broken, moment),
        grace_ms=max(0, grace_until_ms - now_ms),
        unread=unread,
    )
    return replace(gate, verdict=verdict, paused_since_ms=paused_since_ms, left=left, grace_until_ms=grace_until_ms)


def _told(broken: Sequence[Broken], quiet_ms: int) -> tuple[Reason, str]:
    if broken:
        return broken[0].rule.reason, broken[0].detail
    return "settling", f"all limits are kept again; it goes on once that lasts {quiet_ms / 1_000:g} s"


def _since_ms(gate: Gate, state: State, reason: Reason, now_ms: int) -> int:
    before = gate.verdict
    return min(before.since_ms, now_ms) if (before.state, before.reason) == (state, reason) else now_ms


def _until_ms(gate: Gate, reason: Reason, broken: Sequence[Broken], moment: Moment) -> int | None:
    """When this reason ends. What is known to the minute only isn't moved by each sample within one."""
    if reason == "settling":
        return None if gate.unquiet_at_ms is None else gate.unquiet_at_ms + _quiet_ms(gate, moment.limits)
    cause = broken[0].rule.reason
    until, before = until_ms(cause, moment), gate.verdict.until_ms
    if until is None or before is None or gate.verdict.reason != reason or cause not in ("hours", "power_price", "upload_spent"):
        return until
    return before if until - JITTER_MS <= before <= until else until

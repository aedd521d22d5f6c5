"""What callers want of each model, smoothed over time, and whether a call got what it needed: what placement starts from."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import NamedTuple

import msgspec

from fallow.model.ids import GatewayId
from fallow.model.messages import Demand
from fallow.model.needs import Needs
from fallow.model.receipt import Usage

RISES_IN_MS = 30_000
"""The time constant with which a rate follows growing demand: a burst shouldn't wait."""
FALLS_IN_MS = 300_000
"""And shrinking demand: a pause between two bursts shouldn't cost a load."""
IDLE_AFTER_MS = 15 * 60_000
"""A model that nobody asked for in this time is wanted no more."""
MISSED_SHARE_MAX = 0.02
"""Calls that are missed whatever is placed: somebody always asks for what no machine can do."""
SPARE_MAX = 4.0
"""How many times the supply that demand alone asks for, at most, while calls are missed."""
SPARE_GAIN = 0.5
"""How far one span in which all calls were missed raises it."""
SPARE_FALLS_IN_MS = 15 * 60_000
"""The time constant with which it sinks again: quick enough to free memory, slow enough not to swing."""
MODELS_MAX = 4_096
"""Models whose demand is remembered; the least wanted are forgotten first."""

SUPPLY_CODES = frozenset(
    {"no_capacity", "no_node", "busy", "yielding", "leaving", "model_loading", "model_not_here", "node_unreachable", "node_silent"}
    | {"node_too_slow", "engine_failed", "engine_stalled"}
)
"""The failures that more supply, or supply elsewhere, would have helped against."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The demand for one model. `spare` is how many times the supply that it asks for should be there, 1 unless calls are missed."""

    asked_at_ms: int
    calls_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    spare: float = 1.0


class _Rate(NamedTuple):
    """What is asked in a second."""

    calls: float = 0.0
    missed: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0


NOTHING = _Rate()


def hear(wanted: Mapping[str, Wanted], reports: Sequence[Demand], *, span_ms: int, now_ms: int) -> dict[str, Wanted]:
    """Take in what gateways reported in the last `span_ms`; models that nobody asked for are forgotten after a while."""
    assert span_ms > 0, "a mean needs a span of time"
    rates = _rates(reports)
    heard: dict[str, Wanted] = {}
    for model in sorted({*wanted, *rates}):
        before = wanted.get(model, Wanted(asked_at_ms=now_ms))
        after = _follow(before, rates.get(model, NOTHING), span_ms=span_ms, now_ms=now_ms)
        if now_ms - after.asked_at_ms < IDLE_AFTER_MS:
            heard[model] = after
    if len(heard) > MODELS_MAX:
        heard = dict(sorted(heard.items(), key=lambda item: (-item[1].calls_per_s, item[0]))[:MODELS_MAX])
    return heard


def is_missed(
    needs: Needs, *, failure_code: str | None, first_token_ms: float | None, end_ms: float, ended_at_ms: int, usage: Usage
) -> bool:
    """Whether a call was refused for lack of supply, or answered later than it needs.

    `first_token_ms` and `end_ms` count from its arrival; the first is None where the answer came as a whole. `ended_at_ms` is UTC.
    """
    if failure_code is not None:
        return failure_code in SUPPLY_CODES
    if needs.first_token_within_ms is not None and first_token_ms is not None and first_token_ms > needs.first_token_within_ms:
        return True
    if needs.deadline_at_ms is not None and ended_at_ms > needs.deadline_at_ms:
        return True
    if needs.per_token_within_ms is None or first_token_ms is None or usage.output_tokens < 2:
        return False
    return (end_ms - first_token_ms) / (usage.output_tokens - 1) > needs.per_token_within_ms


def _rates(reports: Sequence[Demand]) -> dict[str, _Rate]:
    """Per second, by model: each gateway's counts over the time that its reports are about, all gateways together."""
    spans_ms: dict[GatewayId, int] = {}
    counts: dict[tuple[GatewayId, str], _Rate] = {}
    for report in reports:
        spans_ms[report.gateway_id] = spans_ms.get(report.gateway_id, 0) + report.span_ms
        for one in report.models:
            key = (report.gateway_id, one.model)
            said = _Rate(one.calls, one.missed, one.prompt_tokens, one.output_tokens)
            counts[key] = _sum(counts.get(key, NOTHING), said)
    rates: dict[str, _Rate] = {}
    for (gateway_id, model), count in sorted(counts.items()):  # sums of fractions depend on their order
        per_s = 1000 / spans_ms[gateway_id]
        rates[model] = _sum(rates.get(model, NOTHING), _Rate(*(number * per_s for number in count)))
    return rates


def _sum(one: _Rate, other: _Rate) -> _Rate:
    return _Rate(*(first + second for first, second in zip(one, other, strict=True)))


def _follow(before: Wanted, now: _Rate, *, span_ms: int, now_ms: int) -> Wanted:
    missed_share = now.missed / max(now.calls, now.missed) if now.missed else 0.0
    if missed_share > MISSED_SHARE_MAX:
        spare = min(SPARE_MAX, before.spare * (1 + SPARE_GAIN * missed_share))
    else:
        spare = 1 + (before.spare - 1) * exp(-span_ms / SPARE_FALLS_IN_MS)
    return Wanted(
        asked_at_ms=now_ms if now.calls else before.asked_at_ms,
        calls_per_s=_smooth(before.calls_per_s, now.calls, span_ms),
        prompt_tokens_per_s=_smooth(before.prompt_tokens_per_s, now.prompt_tokens, span_ms),
        output_tokens_per_s=_smooth(before.output_tokens_per_s, now.output_tokens, span_ms),
        spare=spare,
    )


def _smooth(before: float, rate: float, span_ms: int) -> float:
    """An exponential mean whose weight depends on the span, so that uneven spans don't matter."""
    return before + (rate - before) * (1 - exp(-span_ms / (RISES_IN_MS if rate > before else FALLS_IN_MS)))

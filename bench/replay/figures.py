"""What a replay shows: needs met, money, promises kept, who got the work, and how the pool took a change."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.replay.run import EPOCH_MS, Replayed, Story
from bench.replay.world import Lies, Machine
from bench.report import Figure

DEAREST = 2.0
"""A call that wasn't met is charged what its work costs at so many times the pool's dearest price: somebody must do it again."""
SETTLED_S = 120.0
"""After a change the pool has so long to find out."""
BINS = ((0.0, 0.5), (0.5, 0.8), (0.8, 0.9), (0.9, 0.94), (0.94, 0.96), (0.96, 0.98), (0.98, 0.995), (0.995, 1.01))
PER = 1_000
STEPS_MIN = 8
"""Shorter answers say little about the time of a token."""
TIERS = ("default", "priority", "flex")


class Totals(NamedTuple):
    """What a rule came to. Money is USD per thousand calls, a call that wasn't met included at its charge in `burden_usd`."""

    met: float
    paid_usd: float
    burden_usd: float
    on_cpu: float


def share(kept: Iterable[bool]) -> float:
    """How many of these are true; NaN of none."""
    every = list(kept)
    return sum(every) / len(every) if every else math.nan


def at(values: Sequence[float], part: float) -> float:
    """The value at this part of the ordered whole; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else math.nan


def totals(run: Replayed, machines: Sequence[Machine]) -> Totals:
    stories = run.stories
    dear = {model: dearest(machines, model) for model in {story.asking.call.needs.model for story in stories}}
    charge = sum(
        DEAREST
        * (story.asking.prompt * dear[story.asking.call.needs.model][0] + story.asking.output * dear[story.asking.call.needs.model][1])
        for story in stories
        if not story.met
    )
    paid = sum(story.paid_usd for story in stories)
    count = len(stories) / PER
    return Totals(
        met=share(story.met for story in stories),
        paid_usd=paid / count,
        burden_usd=(paid + charge) / count,
        on_cpu=share(story.hardware == "cpu" for story in stories if story.hardware is not None),
    )


def dearest(machines: Sequence[Machine], model: str) -> tuple[float, float]:
    """The highest prices of a prompt's and an answer's token."""
    engines = [engine for machine in machines for engine in machine.engines if engine.model == model]
    return max(engine.prompt_usd for engine in engines), max(engine.output_usd for engine in engines)


def why_missed(story: Story) -> str:
    """The first thing that went wrong."""
    needs, asked_s = story.asking.call.needs, story.asking.at_s
    if story.fate != "whole" or story.first_s is None or story.end_s is None:
        return f"refused ({story.limit})" if story.fate == "refused" else str(story.fate)
    if needs.first_token_within_ms is not None and story.first_s - asked_s > needs.first_token_within_ms / 1000:
        return "first token late"
    if needs.deadline_at_ms is not None and EPOCH_MS + 1000 * story.end_s > needs.deadline_at_ms:
        return "after the deadline"
    return "tokens slow"


def overview(run: Replayed, machines: Sequence[Machine]) -> list[Figure]:
    """Needs and money."""
    found, stories = totals(run, machines), run.stories
    missed = Counter(why_missed(story) for story in stories if not story.met)
    reasons = ", ".join(f"{count} {why}" for why, count in missed.most_common())
    each = [
        Figure(name="met", value=100 * found.met, unit="%", better="higher", note=f"of {len(stories):,} calls; missed: {reasons or 'none'}")
    ]
    for tier in TIERS:
        of_tier = [story for story in stories if story.asking.call.needs.service_tier == tier]
        wrong = Counter(why_missed(story) for story in of_tier if not story.met)
        note = ", ".join(f"{count} {why}" for why, count in wrong.most_common())
        each.append(Figure(name=f"met, tier {tier}", value=100 * share(s.met for s in of_tier), unit="%", better="higher", note=note))
    follow = [story for story in stories if story.warm_somewhere and story.first_s is not None]
    waited = [story.quoted_s - story.asking.at_s for story in stories if story.quote and story.asking.call.needs.service_tier == "flex"]
    return [
        *each,
        Figure(name="paid per 1,000 calls", value=1e3 * found.paid_usd, unit="mUSD"),
        Figure(name="paid and missed per 1,000 calls", value=1e3 * found.burden_usd, unit="mUSD"),
        Figure(name="calls that ended on a CPU", value=100 * found.on_cpu, unit="%"),
        Figure(
            name="follow-ups that met a prefix still warm",
            value=100 * share(story.cached > 0 for story in follow),
            unit="%",
            better="higher",
            note=f"{len(follow)} calls",
        ),
        Figure(name="flex calls waited to be sent, p50", value=at(waited, 0.5), unit="s", note=f"p90 {at(waited, 0.9):.0f} s"),
        Figure(name="decisions per call", value=run.decisions / len(stories), unit="", note=f"digest of all {run.digest}"),
    ]


def calibration(run: Replayed) -> list[Figure]:
    """How many of the calls kept what their first quote promised."""
    quoted = [(story.quote.chance, story.met) for story in run.stories if story.quote is not None]
    if not quoted:
        return []
    found = [
        Figure(name="promised to meet their needs, mean", value=100 * sum(chance for chance, _ in quoted) / len(quoted), unit="%"),
        Figure(name="did, of those", value=100 * share(met for _, met in quoted), unit="%", better="higher"),
        Figure(name="Brier's score", value=sum((chance - met) ** 2 for chance, met in quoted) / len(quoted), unit=""),
    ]
    for low, high in BINS:
        inside = [(chance, met) for chance, met in quoted if low <= chance < high]
        if inside:
            mean = 100 * sum(chance for chance, _ in inside) / len(inside)
            met = 100 * share(met for _, met in inside)
            found.append(
                Figure(
                    name=f"met, of those promised {low:g}–{min(1.0, high):g}",
                    value=met,
                    unit="%",
                    note=f"promised {mean:.1f} %, {len(inside)} calls",
                )
            )
    return found


def errors(run: Replayed) -> list[Figure]:
    """What happened ÷ what the quote said, of the calls that went through on their first try."""
    found = []
    for kind in ("cpu", "gpu"):
        first: list[float] = []
        step: list[float] = []
        for story in run.stories:
            quote, first_s, end_s, steps = story.quote, story.first_s, story.end_s, story.asking.output - 1
            if story.hardware != kind or story.fate != "whole" or len(story.tried) > 1 or quote is None or first_s is None or end_s is None:
                continue
            first.append((first_s - story.quoted_s) / max(0.02, quote.first_token_in_ms / 1000))
            if steps >= STEPS_MIN:
                step.append(1000 * (end_s - first_s) / steps / max(1e-3, quote.per_token_ms))
        for name, values in (("first token", first), ("time of a token", step)):
            note = f"p5 {at(values, 0.05):.2f}, p95 {at(values, 0.95):.2f}, p99 {at(values, 0.99):.2f}, {len(values)} calls"
            found.append(Figure(name=f"{name} ÷ quoted, {kind}, p50", value=at(values, 0.5), unit="", note=note))
    return found


def slow_but_honest(run: Replayed, machines: Sequence[Machine]) -> list[Figure]:
    """The old machines that say how slow they are."""
    old = [machine for machine in machines if machine.name.startswith("old")]
    engines = len(old)
    if not engines:
        return []
    names = {machine.name for machine in old}
    busy_s = sum(run.busy_s.get(name, 0.0) for name in names)
    theirs = [story for story in run.stories if story.node in names]
    use = busy_s / (engines * run.span_s)
    return [
        Figure(name="honest slow nodes: their time in use", value=100 * use, unit="%", better="higher", note=f"{engines} nodes"),
        Figure(
            name="honest slow nodes: calls that were met",
            value=100 * share(s.met for s in theirs),
            unit="%",
            better="higher",
            note=f"{len(theirs)} calls",
        ),
    ]


def windows(with_lies: Replayed, without: Replayed, lies: Lies, liars: Sequence[str]) -> list[Figure]:
    """The 99th percentile of the first token, of calls that have a target for it, by when they came; and how many were met."""
    edges = (
        ("before", 0.0, lies.from_s),
        ("0–2 min after", lies.from_s, lies.from_s + SETTLED_S),
        ("later", lies.from_s + SETTLED_S, math.inf),
    )
    used = share(story.node in liars for story in without.stories)
    found = [Figure(name="calls that the liars have while they are honest", value=100 * used, unit="%", note=", ".join(liars))]
    for name, begin, end in edges:
        lied, honest = (_hasty(run, begin, end) for run in (with_lies, without))
        met = [100 * share(story.met for story in stories) for stories in (lied, honest)]
        note = f"{_p99(lied):.2f} against {_p99(honest):.2f} s; met {met[0]:.1f} against {met[1]:.1f} %"
        goal = 2.0 if name == "later" else None
        found.append(
            Figure(name=f"liars: first tokens' p99 {name} ÷ honest", value=_p99(lied) / _p99(honest), unit="", goal=goal, note=note)
        )
    return found


def _hasty(run: Replayed, begin_s: float, end_s: float) -> list[Story]:
    """Those that weren't refused: a caller who asked for that got an answer at once."""
    return [
        s
        for s in run.stories
        if begin_s <= s.asking.at_s < end_s and s.asking.call.needs.first_token_within_ms is not None and s.fate != "refused"
    ]


def _p99(stories: Sequence[Story]) -> float:
    return at([math.inf if story.first_s is None else story.first_s - story.asking.at_s for story in stories], 0.99)

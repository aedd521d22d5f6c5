"""The replay that the matcher is measured with: every run with one seed is the same run, and no call is lost in it."""

import functools
import sys
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

sys.path.append(str(Path(__file__).parents[2]))  # the benches aren't installed

from bench.replay import figures
from bench.replay.__main__ import Setting, askings, replayed
from bench.replay.calls import Asking, read_trace
from bench.replay.engine import CALL_SD, Job, Running
from bench.replay.run import Replayed
from bench.replay.world import Lies, Machine, pool

from fallow.model.ids import CallId

SETTING = Setting("town", seed=3, load=0.1, span_s=60.0)
SHORTER = SETTING._replace(span_s=20.0)
WIDE_MARGIN = 1.5


@functools.cache
def plain() -> Replayed:
    return replayed(SETTING)


def test_one_seed_is_one_run() -> None:
    assert replayed(SETTING).digest == plain().digest
    assert replayed(SHORTER).digest != replayed(SHORTER._replace(seed=4)).digest


@pytest.mark.parametrize(("rule", "gateways", "lies"), [("match", 1, Lies(0.1, 10.0)), ("match", 2, None), ("power of two", 1, None)])
def test_every_call_ends(rule: str, gateways: int, lies: Lies | None) -> None:
    run = replayed(SHORTER, rule, gateways=gateways, lies=lies)
    assert len(run.stories) > 50
    assert Counter(story.fate is None for story in run.stories) == {False: len(run.stories)}
    assert len({story.asking.call.id for story in run.stories}) == len(run.stories)
    assert all(story.end_s is not None and story.end_s > story.asking.at_s for story in run.stories if story.fate != "refused")
    assert sum(story.fate == "whole" for story in run.stories) > 0.8 * len(run.stories)
    machines = pool(SHORTER.pool, seed=SHORTER.seed, span_s=SHORTER.span_s)
    assert all(0 <= run.busy_s.get(machine.name, 0.0) <= SHORTER.span_s for machine in machines)


def test_better_than_taking_turns() -> None:
    machines = pool(SETTING.pool, seed=SETTING.seed, span_s=SETTING.span_s)
    ours, theirs = figures.totals(plain(), machines), figures.totals(replayed(SETTING, "round robin"), machines)
    assert theirs.burden_usd > WIDE_MARGIN * ours.burden_usd
    assert ours.met > theirs.met


def finished_s(asked: list[Asking], machine: Machine) -> list[tuple[float, float]]:
    """When the first token and the end of each call come, if all are sent at once to an engine of a machine that never drifts."""
    running = Running(machine, machine.engines[0], seed=0)
    for asking in asked:
        assert running.enter(Job(asking=asking, attempt=1), 0.0)
    first: dict[str, float] = {}
    end: dict[str, float] = {}
    while running.is_busy:
        now_s = running.next_s()
        running.work(now_s)
        for times, jobs in zip((first, end), running.reached(now_s), strict=True):
            times.update({job.asking.call.id: now_s for job in jobs})
    return [(first[asking.call.id], end[asking.call.id]) for asking in asked]


def test_an_engine_reads_in_turn_and_shares_its_steps() -> None:
    """The world itself: a lone call takes its prompt's and its tokens' time, a second one waits for the first one's prompt."""
    machine = next(one for one in pool("office", seed=1, span_s=1.0) if one.name.startswith("desktop"))
    machine.sort = machine.sort._replace(drift_sd=0.0, context_scale=1e12, prompt_scale=1e12)
    engine = machine.engines[0]
    asking = next(one for one in askings(SHORTER, pool("town", seed=3, span_s=1.0), gateways=1) if one.output > 50)
    [(first, end)] = finished_s([asking], machine)
    assert first == pytest.approx(asking.prompt / engine.prefill)
    assert end - first == pytest.approx((asking.output - 1) / engine.decode, rel=4 * CALL_SD)
    other = asking._replace(call=replace(asking.call, id=CallId("other")), session=(9, 9))
    (first_a, end_a), (first_b, end_b) = finished_s([asking, other], machine)
    assert first_a == pytest.approx(first)
    assert first_b == pytest.approx(first + asking.prompt / (engine.prefill * machine.sort.reading_share))
    assert end_a > end
    assert end_b - first_b > end - first


def test_a_trace_keeps_its_order_and_gets_the_wanted_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{minute:02}:00.0000000,{100 + minute},{10 + minute}" for minute in range(11)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    shapes = read_trace(path, span_s=30.0, calls_per_s=1.0)
    assert [shape.at_s for shape in shapes] == sorted(shape.at_s for shape in shapes)
    assert (shapes[0].prompt, shapes[0].output) == (100, 10)
    assert 27 <= len(shapes) <= 33

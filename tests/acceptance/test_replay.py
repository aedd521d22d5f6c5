"""The replay that the matcher is measured with: every run with one seed is the same run, and no call is lost in it."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # the benches aren't installed

from bench.replay import figures
from bench.replay.__main__ import Setting, replayed
from bench.replay.calls import read_trace
from bench.replay.world import Lies, pool

SETTING = Setting("town", seed=3, load=0.1, span_s=60.0)
WIDE_MARGIN = 1.5


def test_one_seed_is_one_run() -> None:
    first, second = replayed(SETTING), replayed(SETTING)
    assert first.digest == second.digest
    shorter = SETTING._replace(span_s=10.0)
    assert replayed(shorter).digest != replayed(shorter._replace(seed=4)).digest


@pytest.mark.parametrize(("rule", "gateways", "lies"), [("match", 2, Lies(0.2, 10.0)), ("power of two", 1, None)])
def test_every_call_ends(rule: str, gateways: int, lies: Lies | None) -> None:
    run = replayed(SETTING, rule, gateways=gateways, lies=lies)
    assert len(run.stories) > 100
    assert Counter(story.fate is None for story in run.stories) == {False: len(run.stories)}
    assert len({story.asking.call.id for story in run.stories}) == len(run.stories)
    assert all(story.end_s is not None and story.end_s > story.asking.at_s for story in run.stories if story.fate != "refused")
    assert sum(story.fate == "whole" for story in run.stories) > 0.8 * len(run.stories)
    machines = pool(SETTING.pool, seed=SETTING.seed, span_s=SETTING.span_s)
    assert all(0 <= run.busy_s.get(machine.name, 0.0) <= SETTING.span_s for machine in machines)


def test_better_than_taking_turns() -> None:
    machines = pool(SETTING.pool, seed=SETTING.seed, span_s=SETTING.span_s)
    ours, theirs = (figures.totals(replayed(SETTING, rule), machines) for rule in ("match", "round robin"))
    assert theirs.burden_usd > WIDE_MARGIN * ours.burden_usd
    assert ours.met > theirs.met


def test_a_trace_keeps_its_order_and_gets_the_wanted_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{minute:02}:00.0000000,{100 + minute},{10 + minute}" for minute in range(11)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    shapes = read_trace(path, span_s=30.0, calls_per_s=1.0)
    assert [shape.at_s for shape in shapes] == sorted(shape.at_s for shape in shapes)
    assert (shapes[0].prompt, shapes[0].output) == (100, 10)
    assert 27 <= len(shapes) <= 33

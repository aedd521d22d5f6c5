"""The steadiness benches in short: nodes die under streams, a key floods, all ask too much. What callers saw is judged, never how soon."""

import sys
from collections.abc import Sequence
from pathlib import Path

from histories import Left, Seen, judge_all

sys.path.append(str(Path(__file__).parents[2]))  # the benches aren't installed

from bench.load import run
from bench.steady_calls import Shape
from bench.steady_kills import Kills, Tried, try_kills
from bench.steady_load import Flood, Flooded, Overload, Overloaded, try_flood, try_overload
from bench.steady_site import running_site

SHAPE = Shape(words=30, interval_ms=40, delay_ms=50)
COMPLETE_MIN = 90.0
"""Percent. The benches ask for more, on a machine that does nothing else."""
REFUSALS = frozenset({429, 503})


DEATHS = [Kills(how="drop", waves=1, shape=SHAPE, warm_rounds=1), Kills(how="hush", waves=1, shape=SHAPE, warm_rounds=1)]
FLOOD = Flood(alone_s=0.7, beside_s=1.5, warm_s=0.7, settle_s=0.3, times=4, patience_s=2)
OVERLOAD = Overload(sweep_s=2.3, span_s=2.5, after_s=1.5, warm_s=1, rest_s=0.5, loads=(1.0,), patience_s=3)
"""Some callers lose patience and leave, as they do."""


async def kill() -> list[Tried]:
    async with running_site() as site:
        return [await try_kills(site, kills) for kills in DEATHS]


async def crowd() -> tuple[Flooded, Overloaded]:
    async with running_site(keys=2) as site:
        return await try_flood(site, FLOOD), await try_overload(site, OVERLOAD)


def refused(calls: Sequence[Seen]) -> set[tuple[int, str | None]]:
    """How the calls ended that weren't complete and that nobody left."""
    return {(seen.status, seen.code) for seen in calls if not seen.is_complete and not isinstance(seen.events[-1], Left)}


def test_nodes_die_under_streams() -> None:
    """By a connection that breaks, and by silence."""
    for kills, tried in zip(DEATHS, run(kill()), strict=True):
        assert len(tried.calls) == kills.streams
        assert tried.kills
        assert tried.faults == []
        assert tried.harm == 0
        assert tried.complete >= COMPLETE_MIN, refused(tried.calls)


def test_more_calls_than_there_is_room_for() -> None:
    """Of one key beside another, then of all."""
    flooded, overloaded = run(crowd())
    check_flood(flooded)
    check_overload(overloaded)


def check_flood(found: Flooded) -> None:
    assert judge_all([*found.alone, *found.beside, *found.flood]) == []
    assert refused(found.alone) == set()
    assert any(seen.is_complete for seen in found.beside)
    assert any(seen.is_complete for seen in found.flood)
    assert {status for status, _ in refused(found.flood)} <= REFUSALS


def check_overload(found: Overloaded) -> None:
    assert judge_all([*found.during, *found.others]) == []
    assert {status for status, _ in refused(found.during)} <= REFUSALS
    assert not all(seen.is_complete for seen in found.during), "so many calls have no room"
    assert any(seen.is_complete for seen in found.during)
    assert any(seen.is_complete for seen in found.others[-20:]), "afterwards there is room again"

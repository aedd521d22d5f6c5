"""The steadiness benches in short: nodes die under streams, a key floods, all ask too much. What callers saw is judged, never how soon."""

import sys
from pathlib import Path

import pytest
from histories import Seen, judge_all

sys.path.append(str(Path(__file__).parents[2]))  # the benches aren't installed

from bench.load import run
from bench.steady_calls import Shape
from bench.steady_kills import Kills, Tried, try_kills
from bench.steady_load import Flood, Flooded, Overload, Overloaded, try_flood, try_overload
from bench.steady_site import running_site

SHAPE = Shape(words=40, interval_ms=40, delay_ms=50)
COMPLETE_MIN = 90.0
"""Percent. The benches ask for more, on a machine that does nothing else."""
REFUSALS = frozenset({429, 503})


async def kill(kills: Kills) -> Tried:
    async with running_site() as site:
        return await try_kills(site, kills)


async def flood(how: Flood) -> Flooded:
    async with running_site(keys=2) as site:
        return await try_flood(site, how)


async def overload(how: Overload) -> Overloaded:
    async with running_site(keys=2) as site:
        return await try_overload(site, how)


def said(calls: tuple[Seen, ...]) -> set[tuple[int, str | None]]:
    """How the calls that weren't complete ended."""
    return {(seen.status, seen.code) for seen in calls if not seen.is_complete}


@pytest.mark.parametrize(
    "kills",
    [
        Kills(how="drop", waves=1, shape=SHAPE),
        Kills(how="hush", waves=1, shape=SHAPE),
        Kills(how="sigkill", waves=1, streams=8, nodes=3, victims=1, shape=SHAPE),
    ],
    ids=lambda kills: kills.how,
)
def test_nodes_die_under_streams(kills: Kills) -> None:
    tried = run(kill(kills))
    assert len(tried.calls) == kills.streams
    assert tried.kills
    assert tried.faults == []
    assert tried.harm == 0
    assert tried.complete >= COMPLETE_MIN, said(tried.calls)


def test_a_key_that_floods() -> None:
    found = run(flood(Flood(alone_s=1, beside_s=3, settle_s=1, times=4)))
    assert judge_all([*found.alone, *found.beside, *found.flood]) == []
    assert said(found.alone) == set()
    assert any(seen.is_complete for seen in found.beside)
    assert any(seen.is_complete for seen in found.flood)
    assert {status for status, _ in said(found.flood)} <= REFUSALS


def test_more_than_there_is_room_for() -> None:
    found = run(overload(Overload(sweep_s=3, span_s=4, after_s=2, rest_s=1, loads=(1.0,))))
    assert judge_all([*found.during, *found.others]) == []
    assert {status for status, _ in said(found.during)} <= REFUSALS
    assert said(found.during), "so many calls have no room"
    assert any(seen.is_complete for seen in found.during)
    assert found.others[-1].is_complete, "afterwards all is as before"

"""A network whose nodes come and go under a steady load: which calls succeed."""

import asyncio
import contextlib
import random
import time

import msgspec

from bench.report import Figure
from bench.steady_calls import Callers, Shape, arrivals
from bench.steady_judge import Seen, judge_all, told
from bench.steady_site import PenHerd, Site, pen, running_site

SEED = 6


class Churn(msgspec.Struct, frozen=True, kw_only=True):
    """How often nodes are interrupted, how long they stay away, and for how long this goes on."""

    span_s: float
    every_s: float
    away_s: float
    nodes: int = 20
    slots: int = 2
    load: float = 0.5
    shape: Shape = Shape(words=40, interval_ms=50, delay_ms=200)

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.load * self.nodes * self.slots / self.shape.seconds


CHURN_FULL = Churn(span_s=600, every_s=540, away_s=20)
CHURN_QUICK = Churn(span_s=60, every_s=54, away_s=5)


class Comings:
    """One network's interruptions, counted by kind."""

    def __init__(self, herd: PenHerd, churn: Churn, draw: random.Random) -> None:
        self._herd = herd
        self._churn = churn
        self._draw = draw
        self.counts = {"drop": 0, "hush": 0, "pause": 0}

    async def trouble(self, name: str) -> None:
        """Interrupt one node now and then until cancelled: half by its owner, a quarter each by death and by silence."""
        while True:
            await asyncio.sleep(self._draw.expovariate(1 / self._churn.every_s))
            word = self._draw.choice(("pause", "pause", "drop", "hush"))
            self.counts[word] += 1
            await self._herd.tell(word, name)
            await asyncio.sleep(self._churn.away_s * self._draw.uniform(0.75, 1.25))
            await self._herd.tell("resume" if word == "pause" else "start", name)


async def try_churn(site: Site, churn: Churn, *, seed: int = SEED) -> tuple[list[list[Seen]], dict[str, int]]:
    """All calls with their retries, and how often nodes were interrupted."""
    draw = random.Random(f"{seed}/churn")
    callers = Callers(site.base_url, seed=draw.getrandbits(32))
    times_s = arrivals(churn.rate, churn.span_s, draw)
    async with pen(site, nodes=churn.nodes, slots=churn.slots) as herd:
        comings = Comings(herd, churn, draw)
        troubles = [asyncio.create_task(comings.trouble(name)) for name in herd.names]
        began = time.perf_counter()
        tasks: list[asyncio.Task[list[Seen]]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for at_s in times_s:
                    await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
                    tasks.append(group.create_task(callers.retry(churn.shape, site.keys[0])))
        finally:
            for trouble in troubles:
                trouble.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*troubles)
    return [task.result() for task in tasks], comings.counts


async def measure_churn(*, quick: bool) -> list[Figure]:
    """The share of calls that succeed while nodes come and go."""
    churn = CHURN_QUICK if quick else CHURN_FULL
    async with running_site() as site:
        calls, counts = await try_churn(site, churn)
    faults = judge_all([seen for tries in calls for seen in tries])
    first = 100 * sum(tries[0].is_complete for tries in calls) / len(calls)
    retried = 100 * sum(tries[-1].is_complete for tries in calls) / len(calls)
    codes = sorted({tries[0].code or "cut" for tries in calls if not tries[0].is_complete})
    title = f"{churn.nodes} nodes, one interruption each {churn.every_s:g} s, {churn.span_s:g} s, load {churn.load:g}"
    note = f"{len(calls)} calls, {counts['pause']} yields, {counts['drop']} deaths, {counts['hush']} silences"
    return [
        Figure(name=f"{title}: first try succeeds", value=first, unit="%", goal=99, better="higher", note=note),
        Figure(name=f"{title}: with one retry", value=retried, unit="%", goal=99.9, better="higher", note=", ".join(codes)),
        Figure(name=f"{title}: faults in histories", value=len(faults), unit="", goal=0, note=told(faults)),
    ]

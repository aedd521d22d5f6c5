"""Streams whose nodes die under them: what is lost, doubled or late."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from bench.load import percentile
from bench.report import Figure
from bench.steady_calls import Asked, Callers, Shape
from bench.steady_judge import Fault, Seen, damage, judge_all, told
from bench.steady_site import Death, Herd, Site, lent, pen, running_site

SEED = 6
STAGGER_S = 0.5
"""Streams of a wave don't begin in the same millisecond."""
KILLED_SHAPE = Shape(words=60, interval_ms=50, delay_ms=100)
RESTART_S: dict[Death, float] = {"drop": 1.0, "hush": 4.0, "sigkill": 0.0}
"""One that was silent comes back after the gateway's silence timer, else its return would be what is measured."""
HEARD_GOAL_MS: dict[Death, float] = {"drop": 1_500, "hush": 4_000, "sigkill": 1_500}
WORDS: dict[Death, str] = {"drop": "broker tells", "hush": "silence", "sigkill": "SIGKILL of `fallow lend`"}
WARM_SHAPE = Shape(words=10, interval_ms=50, delay_ms=100)
"""A gateway that has just started knows nothing of its nodes' speed, and prefers those that it has seen."""
LEFT_ALIVE_MIN = 2
"""So many nodes are never killed at the same time: somebody must be there to go on."""


class Kills(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of death is tried: `streams` at once, `waves` times, with every tenth stream's node killed."""

    how: Death
    waves: int
    streams: int = 40
    nodes: int = 10
    slots: int = 8
    victims: int = 4
    shape: Shape = KILLED_SHAPE
    warm_rounds: int = 3


LENT = Kills(how="sigkill", waves=10, streams=20, victims=2)
FULL = (Kills(how="drop", waves=25), Kills(how="hush", waves=25), LENT)
QUICK = (Kills(how="drop", waves=2), Kills(how="hush", waves=2), msgspec.structs.replace(LENT, waves=2, nodes=6))


class Killed(NamedTuple):
    """A death: of which node, and when."""

    node: str
    at_s: float


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a kind of death."""

    calls: tuple[Seen, ...]
    kills: tuple[Killed, ...]
    interval_ms: int
    delay_ms: int

    @property
    def faults(self) -> list[Fault]:
        return judge_all(self.calls)

    @property
    def harm(self) -> int:
        """Characters twice, left out or never in the answer."""
        return sum(damage(seen.delivered, seen.right).total for seen in self.calls)

    @property
    def complete(self) -> float:
        """The share of calls, in percent, that came to their end."""
        return 100 * sum(seen.is_complete for seen in self.calls) / len(self.calls)

    def hit(self) -> list[Seen]:
        """The calls whose node died under them: before the answer began, or the one that began it."""
        return [seen for seen in self.calls if _has_moved(seen) or any(_hits(seen, kill) for kill in self.kills)]

    def added_ms(self) -> list[float]:
        """What the deaths added, for each call that was hit and went on: the longest wait beyond the usual one."""
        return [max(0.0, wait) for seen in self.hit() if seen.is_complete for wait in _waits(seen, self.interval_ms, self.delay_ms)]


def _has_moved(seen: Seen) -> bool:
    """Whether another node was asked before the answer began."""
    return seen.headers.get("fallow-attempts", "1") != "1"


def _hits(seen: Seen, kill: Killed) -> bool:
    ended_s = seen.ended_s
    is_there = seen.sent_s <= kill.at_s and (ended_s is None or kill.at_s < ended_s)
    return is_there and seen.headers.get("fallow-node") == kill.node


def _waits(seen: Seen, interval_ms: int, delay_ms: int) -> Iterator[float]:
    times = [text.at_s for text in seen.texts]
    if times:
        gaps = [1000 * (later - earlier) - interval_ms for earlier, later in itertools.pairwise(times)]
        yield max([1000 * (times[0] - seen.sent_s) - delay_ms, *gaps])


class Reaper:
    """Kills nodes and brings them back."""

    def __init__(self, herd: Herd, site: Site, how: Death) -> None:
        self._herd = herd
        self._site = site
        self._how: Death = how
        self._dead: set[str] = set()
        self.kills: list[Killed] = []

    async def kill(self, name: str) -> None:
        """Kill a node and start it again a while later; one that is dead already, or of the last ones, is let be."""
        if name in self._dead or len(self._herd.names) - len(self._dead) <= LEFT_ALIVE_MIN:
            return
        self._dead.add(name)
        self.kills.append(Killed(name, time.perf_counter()))
        await self._herd.kill(name, self._how)
        await asyncio.sleep(RESTART_S[self._how])
        await self._herd.start(name)
        self._dead.discard(name)

    async def heal(self) -> None:
        """All are there again, and the gateway knows."""
        await self._site.know(self._herd.names)


async def _kill_under(asked: Asked, after_s: float, reaper: Reaper, names: Sequence[str], draw: random.Random) -> None:
    """The node of one stream at one moment of it; before the stream has begun nobody can tell which it is, and any one is taken."""
    await asyncio.sleep(after_s)
    if not asked.is_over:
        await reaper.kill(asked.node or draw.choice(names))


async def wave(site: Site, herd: Herd, kills: Kills, callers: Callers, reaper: Reaper, draw: random.Random) -> list[Seen]:
    """Streams at once; nodes of some of them die."""
    moments = {number: draw.uniform(0, kills.shape.seconds) for number in draw.sample(range(kills.streams), kills.victims)}
    tasks: list[asyncio.Task[Seen]] = []
    async with asyncio.TaskGroup() as group:

        async def stream(number: int, after_s: float) -> Seen:
            await asyncio.sleep(after_s)

            def watch(asked: Asked) -> None:
                if number in moments:
                    group.create_task(_kill_under(asked, moments[number], reaper, herd.names, draw))

            return await callers.ask(kills.shape, site.keys[0], watch)

        for number in range(kills.streams):
            tasks.append(group.create_task(stream(number, draw.uniform(0, STAGGER_S))))
    await reaper.heal()
    return [task.result() for task in tasks]


async def try_kills(site: Site, kills: Kills, *, seed: int = SEED) -> Tried:
    """All waves of one kind of death."""
    draw = random.Random(f"{seed}/{kills.how}")
    callers = Callers(site.base_url, seed=draw.getrandbits(32))
    calls: list[Seen] = []
    keeper = lent(site, nodes=kills.nodes, slots=kills.slots) if kills.how == "sigkill" else pen(site, nodes=kills.nodes, slots=kills.slots)
    async with keeper as herd:
        reaper = Reaper(herd, site, kills.how)
        for _ in range(kills.warm_rounds):
            calls += await asyncio.gather(*(callers.ask(WARM_SHAPE, site.keys[0]) for _ in range(kills.nodes * kills.slots)))
        calls.clear()
        for _ in range(kills.waves):
            calls += await wave(site, herd, kills, callers, reaper, draw)
    return Tried(calls=tuple(calls), kills=tuple(reaper.kills), interval_ms=kills.shape.interval_ms, delay_ms=kills.shape.delay_ms)


async def measure_kills(*, quick: bool) -> list[Figure]:
    """Streams whose nodes die, by each kind of death."""
    figures: list[Figure] = []
    for kills in QUICK if quick else FULL:
        async with running_site() as site:
            tried = await try_kills(site, kills)
        title = f"{len(tried.calls)} streams, {len(tried.kills)} deaths ({WORDS[kills.how]})"
        added, hit = tried.added_ms(), len(tried.hit())
        figures += [
            Figure(name=f"{title}: twice, missing or strange", value=tried.harm, unit="characters", goal=0),
            Figure(name=f"{title}: faults in histories", value=len(tried.faults), unit="", goal=0, note=told(tried.faults)),
            Figure(name=f"{title}: complete", value=tried.complete, unit="%", goal=99.5, better="higher", note=f"{hit} were hit"),
            Figure(
                name=f"{title}: added at the interruption, p95",
                value=percentile(added, 95),
                unit="ms",
                goal=HEARD_GOAL_MS[kills.how],
                note=f"of {len(added)} hit and complete, p50 {percentile(added, 50):.0f}",
            ),
        ]
    return figures

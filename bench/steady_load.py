"""More calls than there is room for: one key that floods beside one that doesn't, and an overload of all."""

import asyncio
import math
import random
import time
from collections.abc import Sequence

import msgspec

from bench.load import percentile
from bench.report import Figure
from bench.steady_calls import PATIENCE_S, Callers, Shape, arrivals, open_load
from bench.steady_judge import Seen, judge_all, told
from bench.steady_site import Site, pen, running_site

SEED = 6
SHAPE = Shape(words=20, interval_ms=20, delay_ms=300)
NODES, SLOTS = 8, 4
CAPACITY_PER_S = NODES * SLOTS / SHAPE.seconds
"""What the stub engines could do at most."""
WARM_LOAD = 0.5


def first_ms(seen: Seen) -> float:
    """Milliseconds to the first token; infinite if none came."""
    return math.inf if seen.first_s is None else 1000 * seen.first_s


def refusals(calls: Sequence[Seen]) -> str:
    """How calls ended that didn't come to their end, with counts, for a table's note."""
    codes = [seen.code or "cut" for seen in calls if not seen.is_complete]
    return ", ".join(f"{codes.count(code)} {code}" for code in sorted(set(codes))) or "none refused"


async def warm(callers: Callers, site: Site, warm_s: float, draw: random.Random) -> list[Seen]:
    """The gateway learns how fast the nodes are."""
    return await open_load(callers, SHAPE, site.keys, arrivals(WARM_LOAD * CAPACITY_PER_S, warm_s, draw))


# one key floods
class Flood(msgspec.Struct, frozen=True, kw_only=True):
    """How long the quiet key is watched, alone and then beside one that asks for `times` the capacity."""

    alone_s: float
    beside_s: float
    warm_s: float = 3.0
    settle_s: float = 3.0
    times: float = 10.0
    patience_s: float = PATIENCE_S


FLOOD_FULL = Flood(alone_s=40, beside_s=60)
FLOOD_QUICK = Flood(alone_s=8, beside_s=12)


class Flooded(msgspec.Struct, frozen=True, kw_only=True):
    """The quiet key's calls alone and under the flood, and the flood's own."""

    alone: tuple[Seen, ...]
    beside: tuple[Seen, ...]
    flood: tuple[Seen, ...]


async def one_by_one(callers: Callers, key: str, for_s: float) -> list[Seen]:
    """A caller that asks, reads to the end and asks again. One that is refused comes back when it is told to."""
    found: list[Seen] = []
    until_s = time.perf_counter() + for_s
    while time.perf_counter() < until_s:
        found += await callers.retry(SHAPE, key)
    return found


async def try_flood(site: Site, flood: Flood, *, seed: int = SEED) -> Flooded:
    """The first key is quiet, the second one floods; every refused flood call is given up."""
    draw = random.Random(f"{seed}/flood")
    quiet = Callers(site.base_url, seed=draw.getrandbits(32))
    loud = Callers(site.base_url, seed=draw.getrandbits(32), patience_s=flood.patience_s)
    async with pen(site, nodes=NODES, slots=SLOTS):
        await warm(loud, site, flood.warm_s, draw)
        alone = await one_by_one(quiet, site.keys[0], flood.alone_s)
        times_s = arrivals(flood.times * CAPACITY_PER_S, flood.settle_s + flood.beside_s, draw)
        flooding = asyncio.create_task(open_load(loud, SHAPE, site.keys[1:2], times_s))
        await asyncio.sleep(flood.settle_s)
        beside = await one_by_one(quiet, site.keys[0], flood.beside_s)
        flooded = await flooding
    return Flooded(alone=tuple(alone), beside=tuple(beside), flood=tuple(flooded))


async def measure_flood(*, quick: bool) -> list[Figure]:
    """What a key's own calls feel of another key's flood."""
    flood = FLOOD_QUICK if quick else FLOOD_FULL
    async with running_site(keys=2) as site:
        found = await try_flood(site, flood)
    alone, beside = (percentile(list(map(first_ms, calls)), 95) for calls in (found.alone, found.beside))
    ratio = beside / alone if math.isfinite(beside) else math.nan
    faults = judge_all([*found.alone, *found.beside, *found.flood])
    span_s = max(seen.ended_s or 0 for seen in found.flood) - found.flood[0].sent_s
    served = sum(seen.is_complete for seen in found.flood) / span_s
    return [
        Figure(name="one key alone: first token, p95", value=alone, unit="ms", note=f"{len(found.alone)} calls, one at a time"),
        Figure(
            name=f"the same beside a flood of {flood.times:g} x capacity",
            value=beside if math.isfinite(beside) else math.nan,
            unit="ms",
            note=f"{len(found.beside)} calls: {refusals(found.beside)}",
        ),
        Figure(name="first token under the flood ÷ alone, p95", value=ratio, unit="", goal=1.5),
        Figure(name="the flood's own calls that ended well", value=served, unit="calls/s", better="higher", note=refusals(found.flood)),
        Figure(name="flood: faults in histories", value=len(faults), unit="", goal=0, note=told(faults)),
    ]


# overload
class Overload(msgspec.Struct, frozen=True, kw_only=True):
    """How the peak is looked for, and for how long `times` the load of the peak lasts."""

    sweep_s: float
    span_s: float
    after_s: float
    warm_s: float = 3.0
    rest_s: float = 2.0
    loads: tuple[float, ...] = (0.8, 1.0, 1.2, 1.5)
    times: float = 5.0
    target_ms: int = 2_000
    patience_s: float = PATIENCE_S


OVERLOAD_FULL = Overload(sweep_s=12, span_s=60, after_s=15)
OVERLOAD_QUICK = Overload(sweep_s=6, span_s=15, after_s=10)
RAMP_S = 2.0
"""At first a load fills free slots and queues, which says nothing of what is done a second."""
WINDOW_S = 0.5
SLOWER, SLOWER_MS = 1.5, 100
"""Back to normal is a p95 of at most so many times the usual one, and a bit."""
KEYS = 4


class Overloaded(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that met the target, per second, before and during the overload; memory; how long the recovery took."""

    peak_per_s: float
    peak_load: float
    during_per_s: float
    before_mib: float
    after_mib: float
    recovery_s: float
    during: tuple[Seen, ...]
    others: tuple[Seen, ...]


def goodput(calls: Sequence[Seen], overload: Overload, span_s: float) -> float:
    """Calls a second that came within the target to their first token, and then to their end, while the load lasted."""
    from_s, until_s = calls[0].sent_s + RAMP_S, calls[0].sent_s + span_s
    good = [seen.ended_s for seen in calls if seen.is_complete and first_ms(seen) <= overload.target_ms]
    return sum(from_s <= ended_s < until_s for ended_s in good if ended_s is not None) / (until_s - from_s)


def recovery_s(calls: Sequence[Seen], ended_s: float, normal_ms: float) -> float:
    """Seconds from the overload's end until the p95 of the first token is usual, by windows of the calls' sending; NaN if never."""
    late = SLOWER * normal_ms + SLOWER_MS
    windows: dict[int, list[float]] = {}
    for seen in calls:
        windows.setdefault(int((seen.sent_s - ended_s) / WINDOW_S), []).append(first_ms(seen))
    for number in sorted(windows):
        if percentile(windows[number], 95) <= late:
            return number * WINDOW_S
    return math.nan


async def try_overload(site: Site, overload: Overload, *, seed: int = SEED) -> Overloaded:
    """Sweep for the peak, then overload, then look at the recovery."""
    draw = random.Random(f"{seed}/overload")
    callers = Callers(site.base_url, seed=draw.getrandbits(32), first_token_ms=overload.target_ms, patience_s=overload.patience_s)

    async def load(share: float, for_s: float) -> list[Seen]:
        return await open_load(callers, SHAPE, site.keys, arrivals(share * CAPACITY_PER_S, for_s, draw))

    async with pen(site, nodes=NODES, slots=SLOTS):
        usual = await warm(callers, site, overload.warm_s, draw)
        others = list(usual)
        peaks: list[tuple[float, float]] = []
        for share in overload.loads:
            calls = await load(share, overload.sweep_s)
            peaks.append((goodput(calls, overload, overload.sweep_s), share))
            others += calls
            await asyncio.sleep(overload.rest_s)
        peak_per_s, peak_load = max(peaks)
        before = site.gateway_mib()
        overloading = asyncio.create_task(load(overload.times * peak_load, overload.span_s))
        await asyncio.sleep(overload.span_s)
        ended_s = time.perf_counter()
        after = await load(WARM_LOAD, overload.after_s)
        during = await overloading
        after_mib = site.gateway_mib()
    normal_ms = percentile(list(map(first_ms, usual)), 95)
    return Overloaded(
        peak_per_s=peak_per_s,
        peak_load=peak_load,
        during_per_s=goodput(during, overload, overload.span_s),
        before_mib=before,
        after_mib=after_mib,
        recovery_s=recovery_s(after, ended_s, normal_ms),
        during=tuple(during),
        others=(*others, *after),
    )


async def measure_overload(*, quick: bool) -> list[Figure]:
    """What is left of the peak under a multiple of its load, and afterwards."""
    overload = OVERLOAD_QUICK if quick else OVERLOAD_FULL
    async with running_site(keys=KEYS) as site:
        found = await try_overload(site, overload)
    faults = judge_all([*found.during, *found.others])
    title = f"{overload.times:g} x overload, {overload.span_s:g} s"
    target = f"first token within {overload.target_ms / 1000:g} s"
    return [
        Figure(name=f"peak, {target}", value=found.peak_per_s, unit="calls/s", better="higher", note=f"at load {found.peak_load:g}"),
        Figure(
            name=f"{title}: of the peak is left",
            value=100 * found.during_per_s / found.peak_per_s if found.peak_per_s else math.nan,
            unit="%",
            goal=90,
            better="higher",
            note=f"{len(found.during)} calls: {refusals(found.during)}",
        ),
        Figure(
            name=f"{title}: gateway's memory grows by",
            value=100 * (found.after_mib / found.before_mib - 1),
            unit="%",
            goal=20,
            note=f"{found.before_mib:.0f} to {found.after_mib:.0f} MiB",
        ),
        Figure(name=f"{title}: first token's p95 usual again after", value=found.recovery_s, unit="s", goal=5),
        Figure(name=f"{title}: faults in histories", value=len(faults), unit="", goal=0, note=told(faults)),
    ]

"""Measures several endpoints under the same load, turn by turn, so that what else the machine does falls on all of them alike."""

import statistics
from collections.abc import Mapping

import msgspec

from bench.load import Latencies, chat_body, closed_loop

CALLERS = 16
PASSES = 3
WARM_CALLS = 320
WARM_CALLS_ALONE = 50
PASS_S = 3.0
CALLS_MIN = 200
CALLS_MAX = 50_000
CALLS_ALONE_MIN = 50
CALLS_ALONE_MAX = 5_000


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller has to know to use an OpenAI-compatible API."""

    base_url: str
    key: str
    model: str


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast an endpoint answered: throughput with `CALLERS` callers, and the time of a call made alone."""

    calls_per_s: float
    alone_p50_ms: float


async def measure_loop(endpoint: Endpoint, *, callers: int, calls: int) -> Latencies:
    """Run one closed loop that has to succeed: a failed call is fast, and would flatter the endpoint."""
    seen = await closed_loop(endpoint.base_url, endpoint.key, chat_body(endpoint.model), callers=callers, calls=calls)
    if seen.failures:
        raise RuntimeError(f"{seen.failures} of {calls} calls to {endpoint.base_url} failed, the first with {seen.first_failure!r}")
    return seen


def calls_for(warm: Latencies, least: int, most: int) -> int:
    """Choose as many calls as fill a pass at the speed just seen."""
    return max(least, min(most, int(warm.calls_per_s * PASS_S)))


async def measure_once(endpoint: Endpoint) -> Speed:
    """Warm the endpoint up, then measure it with many callers and with one."""
    warm = await measure_loop(endpoint, callers=CALLERS, calls=WARM_CALLS)
    together = await measure_loop(endpoint, callers=CALLERS, calls=calls_for(warm, CALLS_MIN, CALLS_MAX))
    warm = await measure_loop(endpoint, callers=1, calls=WARM_CALLS_ALONE)
    alone = await measure_loop(endpoint, callers=1, calls=calls_for(warm, CALLS_ALONE_MIN, CALLS_ALONE_MAX))
    return Speed(calls_per_s=together.calls_per_s, alone_p50_ms=alone.percentiles_ms.p50)


async def compare(endpoints: Mapping[str, Endpoint], *, passes: int = PASSES) -> dict[str, Speed]:
    """Measure every endpoint once a pass and keep each figure's median over the passes."""
    assert passes > 0
    seen: dict[str, list[Speed]] = {name: [] for name in endpoints}
    for _ in range(passes):
        for name, endpoint in endpoints.items():
            seen[name].append(await measure_once(endpoint))
    return {
        name: Speed(
            calls_per_s=statistics.median(speed.calls_per_s for speed in speeds),
            alone_p50_ms=statistics.median(speed.alone_p50_ms for speed in speeds),
        )
        for name, speeds in seen.items()
    }

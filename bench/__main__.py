"""`make bench`: what Fallow adds to an engine, as a table and as JSON. Ratios and differences are taken in one run."""

import argparse
import statistics

from bench.chain import Chain, running_chain, running_model
from bench.load import Latencies, chat_body, closed_loop, percentile, run, streams
from bench.model import tokens_per_s
from bench.report import Figure, publish
from bench.steady import publish_all

CALLERS = 16
PASSES = 5
ALONE_CALLS = 1_500
TOGETHER_CALLS = 6_000
FIRST_STREAMS = 200
WIDE_STREAMS = 64
WIDE_CHUNKS = 20
WIDE_INTERVAL_MS = 50
GROWTH_CALLS = 20_000
GROWTH_MIB_MAX = 4.0
"""What an allocator may still settle by; a leak of 1 KiB a call would show as 20."""
MODEL = "smollm2-135m-instruct"
MODEL_STREAMS = 8
MODEL_PASSES = 8
STREAM_CHUNKS = 8


async def loop(chain: Chain, base_url: str, *, callers: int, calls: int) -> Latencies:
    """A closed loop in which no call may fail."""
    seen = await closed_loop(base_url, chain.key, chat_body("stub"), callers=callers, calls=calls)
    if seen.failures:
        raise RuntimeError(f"{seen.failures} of {calls} calls failed, the first with {seen.first_failure!r}")
    return seen


async def measure_calls(chain: Chain) -> list[Figure]:
    """Added time for one caller and throughput for many, turn by turn with the bare engine."""
    added: list[float] = []
    rate: list[float] = []
    cpu_us: list[float] = []
    await loop(chain, chain.base_url, callers=CALLERS, calls=TOGETHER_CALLS // 4)
    for _ in range(PASSES):
        direct = await loop(chain, chain.engine, callers=1, calls=ALONE_CALLS)
        through = await loop(chain, chain.base_url, callers=1, calls=ALONE_CALLS)
        added.append(through.percentiles_ms.p50 - direct.percentiles_ms.p50)
        before = chain.cpu_s()
        together = await loop(chain, chain.base_url, callers=CALLERS, calls=TOGETHER_CALLS)
        cpu_us.append((chain.cpu_s() - before) * 1e6 / TOGETHER_CALLS)
        rate.append(together.calls_per_s)
    return [
        Figure(name="added to a call, one caller, p50", value=statistics.median(added), unit="ms", goal=1.7, aim=1.0),
        Figure(
            name=f"calls answered, {CALLERS} callers", value=statistics.median(rate), unit="req/s", goal=1_300, aim=2_000, better="higher"
        ),
        Figure(name="CPU of gateway, broker and node", value=statistics.median(cpu_us), unit="µs/call", aim=450),
    ]


async def measure_streams(chain: Chain) -> list[Figure]:
    """Added time to the first chunk, and many slow streams of which no chunk may be lost."""
    body = chat_body("stub", stream=True)
    direct: list[float] = []
    through: list[float] = []
    for _ in range(FIRST_STREAMS):
        direct += (await streams(chain.engine, chain.key, body, count=1, expected_chunks=STREAM_CHUNKS)).first_chunk_ms
        through += (await streams(chain.base_url, chain.key, body, count=1, expected_chunks=STREAM_CHUNKS)).first_chunk_ms
    wide = chat_body("stub", stream=True, metadata={"chunks": str(WIDE_CHUNKS), "interval_ms": str(WIDE_INTERVAL_MS)})
    seen = await streams(chain.base_url, chain.key, wide, count=WIDE_STREAMS, expected_chunks=WIDE_CHUNKS)
    wrong = seen.lost + seen.duplicated + seen.disordered + seen.strange + seen.unfinished + seen.failures
    title = f"{WIDE_STREAMS} streams x {WIDE_CHUNKS} chunks, {1000 // WIDE_INTERVAL_MS}/s"
    return [
        Figure(
            name="added to the first chunk, one stream, p50", value=percentile(through, 50) - percentile(direct, 50), unit="ms", goal=3.0
        ),
        Figure(name=f"{title}: lost, doubled or disordered", value=wrong, unit="chunks", goal=0),
        Figure(name=f"{title}: gap, p99", value=percentile(seen.gaps_ms, 99), unit="ms"),
    ]


async def measure_memory(chain: Chain) -> list[Figure]:
    """The gateway's memory, and how it grows over many calls."""
    before = chain.memory_mib("gateway")
    await loop(chain, chain.base_url, callers=CALLERS, calls=GROWTH_CALLS)
    after = chain.memory_mib("gateway")
    return [
        Figure(name="gateway's memory", value=after, unit="MiB", goal=120 / 1.048576),
        Figure(name=f"its growth over {GROWTH_CALLS:,} calls", value=after - before, unit="MiB", goal=GROWTH_MIB_MAX),
        Figure(name="node's memory, without engine", value=chain.memory_mib("lend"), unit="MiB"),
    ]


async def measure_model() -> list[Figure]:
    """Parallel streams of the real model through the chain, against the same engine called directly, turn by turn."""
    direct: list[float] = []
    through: list[float] = []
    async with running_model(MODEL) as chain:
        for number in range(MODEL_PASSES + 1):
            ways = [(chain.engine, direct), (chain.base_url, through)]
            for turn, (address, rates) in enumerate(ways if number % 2 else reversed(ways)):
                first = (2 * number + turn) * MODEL_STREAMS  # new prompts each time: a warm prefix would flatter who comes second
                rate = await tokens_per_s(address, chain.key, MODEL, streams=range(first, first + MODEL_STREAMS))
                if number:  # the first pass warms up
                    rates.append(rate)
    ratio = statistics.median(t / d for t, d in zip(through, direct, strict=True))
    title = f"{MODEL}, {MODEL_STREAMS} streams"
    return [
        Figure(name=f"{title}: engine alone", value=statistics.median(direct), unit="tokens/s", better="higher"),
        Figure(name=f"{title}: through Fallow", value=statistics.median(through), unit="tokens/s", better="higher"),
        Figure(name=f"{title}: ratio, median of pairs", value=100 * ratio, unit="%", goal=98, better="higher"),
    ]


async def measure(*, with_model: bool) -> list[Figure]:
    async with running_chain() as chain:
        figures = [*await measure_calls(chain), *await measure_streams(chain), *await measure_memory(chain)]
    return [*figures, *(await measure_model() if with_model else [])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What Fallow adds to an engine")
    parser.add_argument("--no-model", action="store_true", help="leave out the real model")
    parser.add_argument("--no-steady", action="store_true", help="leave out dying nodes, floods and overload: twenty-five minutes")
    chosen = parser.parse_args()
    publish("chain", run(measure(with_model=not chosen.no_model)))
    if not chosen.no_steady:
        publish_all()


if __name__ == "__main__":
    main()

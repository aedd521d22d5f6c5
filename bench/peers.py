"""Compares Fallow's whole chain with LiteLLM's proxy, both in front of the same stub engine: `python -m bench.peers`."""

import argparse
from collections.abc import Mapping

from bench.chain import running_chain
from bench.compare import CALLERS, PASSES, Endpoint, Speed
from bench.litellm_peer import DIRECT, LITELLM, Server, install, litellm_version, measure_litellm
from bench.load import run
from bench.report import Figure, publish

FALLOW = "Fallow"
RATIO_GOAL = 20.0


def figures_of(speeds: Mapping[str, Speed]) -> list[Figure]:
    """Say each endpoint's throughput, what each adds to a lone call, and how often Fallow's throughput holds LiteLLM's."""
    direct_p50_ms = speeds[DIRECT].alone_p50_ms
    figures = [
        Figure(name=f"{name}: {CALLERS} callers", value=speed.calls_per_s, unit="req/s", better="higher") for name, speed in speeds.items()
    ]
    figures.append(Figure(name=f"{DIRECT}: one caller, p50", value=direct_p50_ms, unit="ms"))
    figures += [
        Figure(name=f"{name}: added for one caller, p50", value=speed.alone_p50_ms - direct_p50_ms, unit="ms")
        for name, speed in speeds.items()
        if name != DIRECT
    ]
    ratio = speeds[FALLOW].calls_per_s / speeds[LITELLM].calls_per_s
    note = "one gateway process against one LiteLLM worker"
    return [*figures, Figure(name="Fallow / LiteLLM, req/s", value=ratio, unit="×", goal=RATIO_GOAL, better="higher", note=note)]


async def measure(passes: int, server: Server) -> dict[str, Speed]:
    async with running_chain() as chain:
        fallow = Endpoint(base_url=chain.base_url, key=chain.key, model=chain.model)
        return await measure_litellm({FALLOW: fallow}, passes=passes, server=server)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Fallow beside LiteLLM's proxy")
    parser.add_argument("--passes", type=int, default=PASSES, help="passes whose median counts (default: %(default)s)")
    parser.add_argument("--server", choices=("uvicorn", "granian"), default="uvicorn", help="LiteLLM's server (default: its own default)")
    chosen = parser.parse_args()
    install()
    speeds = run(measure(chosen.passes, chosen.server))
    publish("peers", figures_of(speeds), more_versions={"litellm": f"{litellm_version()} on {chosen.server}"})


if __name__ == "__main__":
    main()

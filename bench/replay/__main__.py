"""`python -m bench.replay`: the matcher in three pools beside known rules, with liars, and as several gateways."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from bench.replay import figures
from bench.replay.calls import EVERYBODY, PATH, Asking, Callers, read_trace
from bench.replay.routers import RULES, Matcher, Router, router
from bench.replay.run import EPOCH_MS, Replay, Replayed
from bench.replay.world import POOLS, Lies, Machine, pool, tokens_per_s
from bench.report import Figure, publish
from fallow.core.match.decide import match
from fallow.core.match.survey import Moment
from fallow.model.call import Call
from fallow.model.ids import CallId, GatewayId, KeyId, OrgId
from fallow.model.needs import Needs
from fallow.model.quote import Place

SEED, LOAD, SPAN_S, GATEWAYS = 1, 0.5, 360.0, 4
USUAL_PROMPT, USUAL_OUTPUT = 700.0, 150.0
"""The sizes that the load is reckoned with."""
PROBES = 12
TIGHT_S, LOOSE_S = 6, 900
PARTS = ("match", "rules", "lies", "gateways")


class Setting(NamedTuple):
    """One pool under one load."""

    pool: str
    seed: int
    load: float
    span_s: float
    trace: Path | None = None


class Twin(NamedTuple):
    """The same call under two deadlines at one moment: on which hardware, and what is expected to be paid, in micro-credits."""

    tight: tuple[str, int] | None
    loose: tuple[str, int] | None


def askings(setting: Setting, machines: Sequence[Machine], *, gateways: int) -> list[Asking]:
    """The calls of a setting: as many as make its load, of what the pool can do if its slots are always full."""
    callers = Callers(setting.pool, seed=setting.seed, gateways=gateways, epoch_ms=EPOCH_MS)
    models = POOLS[setting.pool].models
    rate = sum(tokens_per_s(list(machines), model=model, prompt=USUAL_PROMPT, output=USUAL_OUTPUT) for model in models) / USUAL_OUTPUT
    if setting.trace is not None:
        return callers.traced(read_trace(setting.trace, span_s=setting.span_s, calls_per_s=setting.load * rate))
    return callers.drawn(span_s=setting.span_s, calls_per_s=setting.load * rate)


def replayed(
    setting: Setting, rule: str = "match", *, gateways: int = 1, lies: Lies | None = None, twins: list[Twin] | None = None
) -> Replayed:
    """One run of one rule."""
    machines = pool(setting.pool, seed=setting.seed, span_s=setting.span_s, lies=lies)
    routers: list[Router] = [router(rule, seed=setting.seed, gateway=number) for number in range(gateways)]
    replay = Replay(machines, routers, askings(setting, machines, gateways=gateways), seed=setting.seed, span_s=setting.span_s)
    first = routers[0]
    probes = []
    if twins is not None and isinstance(first, Matcher):
        every_s = setting.span_s / (PROBES + 1)
        probes = [(every_s * (number + 1), lambda now_s: twins.append(twin(setting.pool, first, now_s))) for number in range(PROBES)]
    return replay.run(probes)


def twin(pool_name: str, gateway: Matcher, now_s: float) -> Twin:
    """Ask where a call would go; it isn't run."""

    def asked(deadline_s: int) -> tuple[str, int] | None:
        now_ms = EPOCH_MS + round(1000 * now_s)
        needs = Needs(
            model=POOLS[pool_name].models[0],
            prompt_tokens=600,
            output_tokens_max=100,
            deadline_at_ms=now_ms + 1000 * deadline_s,
            rings=EVERYBODY,
        )
        call = Call(
            id=CallId(f"twin-{now_s:.0f}"),
            org_id=OrgId("somebody"),
            key_id=KeyId("twin"),
            gateway_id=GatewayId("gw-0"),
            path=PATH,
            stream=True,
            body_bytes=2_400,
            needs=needs,
            arrived_at_ms=now_ms,
        )
        answer = match(call, gateway.market, now=Moment(now_ms, now_s))
        return (answer.quote.hardware, answer.quote.cost_expected_micro) if isinstance(answer, Place) else None

    return Twin(asked(TIGHT_S), asked(LOOSE_S))


def twin_figures(twins: Sequence[Twin]) -> list[Figure]:
    found = []
    for name, deadline_s, ones in (("tight", TIGHT_S, [one.tight for one in twins]), ("loose", LOOSE_S, [one.loose for one in twins])):
        placed = [one for one in ones if one is not None]
        if placed:
            cost = sum(micro for _, micro in placed) / len(placed)
            on_gpu = sum(kind == "gpu" for kind, _ in placed)
            note = f"{on_gpu} of {len(placed)} on a GPU"
            found.append(Figure(name=f"the same call with {deadline_s} s ({name}): price", value=cost, unit="µcr", note=note))
    return found


def rule_figures(setting: Setting, plain: Replayed) -> list[Figure]:
    """What the known rules make of the same calls on the same machines."""
    machines = pool(setting.pool, seed=setting.seed, span_s=setting.span_s)
    ours = figures.totals(plain, machines)
    found = []
    for rule in RULES:
        theirs = figures.totals(replayed(setting, rule), machines)
        note = f"met {100 * theirs.met:.1f} %, paid {1e3 * theirs.paid_usd:.1f} mUSD, {100 * theirs.on_cpu:.0f} % on a CPU"
        found.append(
            Figure(
                name=f"{rule}: paid and missed ÷ ours",
                value=theirs.burden_usd / ours.burden_usd,
                unit="",
                better="higher",
                goal=1.0,
                note=note,
            )
        )
    return found


def lie_figures(setting: Setting, plain: Replayed, share: float) -> list[Figure]:
    lies = Lies(share, setting.span_s / 3)
    machines = pool(setting.pool, seed=setting.seed, span_s=setting.span_s, lies=lies)
    liars = [machine.name for machine in machines if machine.lies_from_s < math.inf]
    return figures.windows(replayed(setting, lies=lies), plain, lies, liars)


def gateway_figures(setting: Setting, plain: Replayed, gateways: int) -> list[Figure]:
    machines = pool(setting.pool, seed=setting.seed, span_s=setting.span_s)
    one, many = figures.totals(plain, machines), figures.totals(replayed(setting, gateways=gateways), machines)
    note = f"met {100 * many.met:.1f} against {100 * one.met:.1f} %, paid {1e3 * many.paid_usd:.1f} against {1e3 * one.paid_usd:.1f} mUSD"
    return [
        Figure(name=f"{gateways} gateways: paid and missed ÷ one", value=many.burden_usd / one.burden_usd, unit="", goal=1.1, note=note)
    ]


def measure(setting: Setting, parts: Sequence[str], *, gateways: int, lies: float) -> list[Figure]:
    """All figures of a pool."""
    twins: list[Twin] = []
    plain = replayed(setting, twins=twins)
    machines = pool(setting.pool, seed=setting.seed, span_s=setting.span_s)
    found: list[Figure] = []
    if "match" in parts:
        found += figures.overview(plain, machines) + figures.calibration(plain) + figures.errors(plain)
        found += figures.slow_but_honest(plain, machines) + twin_figures(twins)
    if "rules" in parts:
        found += rule_figures(setting, plain)
    if "lies" in parts:
        found += lie_figures(setting, plain, lies)
    if "gateways" in parts:
        found += gateway_figures(setting, plain, gateways)
    return [replace(one, name=f"{setting.pool}: {one.name}") for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description="The matcher on a virtual clock")
    parser.add_argument("--pool", choices=[*POOLS], action="append", help="one of the pools; all of them if left out")
    parser.add_argument("--part", choices=PARTS, action="append", help="what to report; everything if left out")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--load", type=float, default=LOAD, help="share of what the pool can do")
    parser.add_argument("--span", type=float, default=SPAN_S, help="seconds of virtual time in which calls come")
    parser.add_argument("--gateways", type=int, default=GATEWAYS)
    parser.add_argument("--lies", type=float, default=0.1, help="share of the nodes that become far slower than they say")
    parser.add_argument("--trace", type=Path, help="a CSV with TIMESTAMP, ContextTokens and GeneratedTokens, instead of drawn calls")
    chosen = parser.parse_args()
    for name in chosen.pool or POOLS:
        setting = Setting(name, chosen.seed, chosen.load, chosen.span, chosen.trace)
        publish(f"replay-{name}", measure(setting, chosen.part or PARTS, gateways=chosen.gateways, lies=chosen.lies))


if __name__ == "__main__":
    main()

"""The pools: machines as they are, which differs from what they say, and when their owners need them.

Speeds are round figures for a 2B model in four bits, of the order that public benchmarks give for such classes.
"""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from bench.replay.chance import source
from fallow.model.needs import HardwareKind

PIECE_S = 30.0
"""A machine's speed stays the same for so long, then drifts."""
DRIFT = 0.8
USE = 0.55
"""The share of the time that a lender expects to be paid for."""
LIE_FACTOR = 20.0
WORD_SHARE = 0.75
"""Of the owners that come back, those whose machine says so; the others' fall silent."""
SILENT_S = 7.0
"""After so long without a heartbeat a gateway takes a node for gone."""


class Class(NamedTuple):
    """Machines of a kind: one stream's speeds in tokens per second, the batch curve `1 + a (m - 1)^b`, and what they cost.

    `reading_share` is what a prompt that is being read takes from the streams beside it. `context_scale` is how many tokens of
    context make a step twice as long, `prompt_scale` the same for reading a prompt. `droop` is what is left under lasting load.
    """

    hardware: HardwareKind
    prefill: float
    decode: float
    a: float
    b: float
    reading_share: float
    context_scale: float
    prompt_scale: float
    slots: int
    watts: float = 0.0
    rent_usd_per_h: float = 0.0
    drift_sd: float = 0.06
    droop: float = 1.0
    leaves_per_h: float = 0.0


CLASSES = {
    "laptop": Class("cpu", 60, 8, 0.75, 1.0, 0.93, 9_000, 12_000, 1, watts=28, drift_sd=0.09, droop=0.82, leaves_per_h=1.2),
    "desktop": Class("cpu", 150, 14, 0.55, 1.05, 0.93, 12_000, 16_000, 2, watts=65, leaves_per_h=0.7),
    "server": Class("cpu", 600, 30, 0.25, 1.1, 0.9, 30_000, 30_000, 8, watts=160, drift_sd=0.05, leaves_per_h=0.1),
    "amx": Class("cpu", 1_800, 45, 0.14, 1.1, 0.88, 40_000, 40_000, 8, watts=260, drift_sd=0.04, leaves_per_h=0.05),
    "gamer": Class("gpu", 9_000, 140, 0.12, 1.0, 0.75, 60_000, 60_000, 4, watts=330, drift_sd=0.03, leaves_per_h=1.0),
    "l4": Class("gpu", 5_500, 55, 0.03, 1.05, 0.65, 120_000, 90_000, 24, rent_usd_per_h=0.7, drift_sd=0.02),
    "h100": Class("gpu", 36_000, 210, 0.014, 1.05, 0.6, 400_000, 200_000, 48, rent_usd_per_h=3.2, drift_sd=0.02),
    "old": Class("cpu", 22, 3.2, 0.9, 1.0, 0.95, 9_000, 9_000, 1, watts=15, drift_sd=0.05),
}
SMALLER = {"big": 1.0, "small": 3.6}
"""How much faster than the 2B model a model is."""
HUGE = 0.28
"""Speed of an 8B model, for the pool of a cloud."""


class MakeUp(NamedTuple):
    """A pool in outline. `homes` says who owns the machines of a class; `callers` are the organisations that ask, with weights."""

    counts: dict[str, int]
    homes: dict[str, str]
    callers: dict[str, float]
    models: tuple[str, ...] = ("big",)
    scale: float = 1.0


POOLS = {
    "town": MakeUp(
        {"laptop": 24, "desktop": 36, "server": 8, "amx": 3, "gamer": 3, "l4": 1, "old": 3},
        {"laptop": "", "desktop": "", "gamer": "", "old": "", "server": "town-hall", "amx": "utility", "l4": "rented"},
        {"town-hall": 2, "library": 3, "shop": 5},
        models=("big", "small"),
    ),
    "office": MakeUp(
        {"desktop": 60, "server": 6, "l4": 1, "h100": 1, "old": 3},
        {"desktop": "office", "server": "office", "l4": "rented", "h100": "rented", "old": ""},
        {"office": 9, "guest": 1},
    ),
    "cloud": MakeUp(
        {"server": 6, "amx": 4, "l4": 8, "h100": 3, "old": 3},
        {"server": "campus", "amx": "campus", "l4": "rented", "h100": "rented", "old": ""},
        {"campus": 2, "startup": 8},
        scale=HUGE,
    ),
}


class Lies(NamedTuple):
    """From `from_s` on, `share` of the machines are far slower than they say."""

    share: float
    from_s: float


class Absence(NamedTuple):
    """The owner needs the machine."""

    begin_s: float
    end_s: float
    says_so: bool


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one machine: what is true of it, and what it says. Prices are USD per token."""

    model: str
    prefill: float
    decode: float
    slots: int
    waiting_max: int
    said_prefill: float
    said_decode: float
    said_by_streams: tuple[tuple[int, float], ...]
    prompt_usd: float
    cached_usd: float
    output_usd: float


class Machine(msgspec.Struct, kw_only=True):
    """A node. `speeds` is the drift so far, by piece of time."""

    name: str
    sort: Class
    org: str
    region: str
    rtt_s: float
    engines: tuple[Engine, ...]
    absences: tuple[Absence, ...]
    chance: random.Random
    lies_from_s: float = math.inf
    drifts: list[float] = []

    def speed(self, now_s: float) -> float:
        """What is left of its full speed now."""
        piece = int(now_s / PIECE_S)
        while len(self.drifts) <= piece:
            before = self.drifts[-1] if self.drifts else self.chance.gauss(0, 1)
            self.drifts.append(DRIFT * before + math.sqrt(1 - DRIFT**2) * self.chance.gauss(0, 1))
        factor = math.exp(self.sort.drift_sd * self.drifts[piece]) * self.sort.droop
        return factor / LIE_FACTOR if now_s >= self.lies_from_s else factor

    def away(self, now_s: float) -> Absence | None:
        return next((one for one in self.absences if one.begin_s <= now_s < one.end_s), None)


def step_factor(sort: Class, streams: int, context: float) -> float:
    """How many times longer than a lone stream's with an empty context a step is."""
    batch: float = max(0, streams - 1) ** sort.b
    return (1.0 + sort.a * batch) * (1.0 + context / sort.context_scale)


def pool(name: str, *, seed: int, span_s: float, lies: Lies | None = None) -> list[Machine]:
    """The machines of a pool, in the order of their names."""
    make_up = POOLS[name]
    found = []
    for sort_name, count in make_up.counts.items():
        for number in range(count):
            chance = source(seed, name, sort_name, number)
            home = make_up.homes[sort_name] or f"home-{sort_name}-{number}"
            found.append(_machine(f"{sort_name}-{number:02}", CLASSES[sort_name], home, make_up, chance, span_s))
    for liar in _liars(found, lies) if lies is not None else ():
        liar.lies_from_s = lies.from_s if lies is not None else math.inf
    return sorted(found, key=lambda one: one.name)


def _liars(machines: list[Machine], lies: Lies) -> list[Machine]:
    """One of so many, from the cheapest to the dearest, so that wanted ones are among them; the old ones stay honest."""
    able = sorted((one for one in machines if not one.name.startswith("old")), key=lambda one: (one.engines[0].output_usd, one.name))
    count = round(lies.share * len(able))
    return [able[int((number + 0.3) * len(able) / count)] for number in range(count)]


def _machine(name: str, sort: Class, home: str, make_up: MakeUp, chance: random.Random, span_s: float) -> Machine:
    individual = make_up.scale * chance.lognormvariate(0, 0.1)
    offered = [model for model in make_up.models if len(make_up.models) == 1 or chance.random() < 0.65] or [chance.choice(make_up.models)]
    margin, tariff = chance.uniform(1.15, 2.0), chance.choice((0.13, 0.22, 0.31, 0.36))
    if sort is CLASSES["old"]:
        margin, tariff = 1.0, 0.02  # sun on its owner's roof
    usd_per_s = (sort.rent_usd_per_h or sort.watts / 1000 * tariff) / 3600 * margin / (USE if sort.rent_usd_per_h else 1.0)
    return Machine(
        name=name,
        sort=sort,
        org=home,
        region=chance.choice(("eu-de", "eu-de", "eu-de", "eu-fr", "eu-nl")),
        rtt_s=chance.uniform(0.004, 0.06),
        engines=tuple(_engine(model, sort, individual * SMALLER[model], usd_per_s, chance) for model in offered),
        absences=tuple(_absences(sort, span_s, chance)),
        chance=chance,
        drifts=[],
    )


def _engine(model: str, sort: Class, scale: float, usd_per_s: float, chance: random.Random) -> Engine:
    prefill, decode = sort.prefill * scale, sort.decode * scale

    def said(rate: float) -> float:
        return rate * chance.lognormvariate(0, 0.06)

    counts = [count for count in (1, 2, 4, 8, 16, 32) if count < sort.slots] + [sort.slots]
    rates = {count: count * decode / step_factor(sort, count, 200.0) for count in counts}
    return Engine(
        model=model,
        prefill=prefill,
        decode=decode,
        slots=sort.slots,
        waiting_max=2 * sort.slots,
        said_prefill=said(prefill),
        said_decode=said(rates.get(1, decode)),
        said_by_streams=tuple((count, said(rate)) for count, rate in rates.items()),
        prompt_usd=usd_per_s / prefill,
        cached_usd=0.1 * usd_per_s / prefill,
        output_usd=usd_per_s / rates[sort.slots],
    )


def _absences(sort: Class, span_s: float, chance: random.Random) -> Iterator[Absence]:
    """Most owners are back for a moment, some for long."""
    at = 0.0
    while sort.leaves_per_h:
        at += chance.expovariate(sort.leaves_per_h / 3600)
        if at >= span_s:
            return
        end = at + (chance.uniform(30, 180) if chance.random() < 0.75 else chance.uniform(900, 3_600))
        yield Absence(at, end, chance.random() < WORD_SHARE)
        at = end


def tokens_per_s(machines: list[Machine], *, model: str, prompt: float, output: float) -> float:
    """Output tokens per second of these machines together, if their slots are always full of calls of such a size."""
    found = 0.0
    for machine in machines:
        for engine in machine.engines:
            if engine.model == model:
                share = sum(1 for one in machine.engines)
                step = step_factor(machine.sort, engine.slots, engine.slots * (prompt + output / 2)) / engine.decode / engine.slots
                found += machine.sort.droop / share * output / (prompt / engine.prefill + output * step)
    return found

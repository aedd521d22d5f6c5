"""What lending costs in electricity: watts beyond idling, and the price per million tokens below which a lender pays for working."""

import itertools
import math
from typing import Literal

import msgspec

from fallow.model.measured import Measured
from fallow.model.offer import Price

Machine = Literal["server", "desktop", "laptop"]
Method = Literal["owner", "rapl", "modelled"]

LOAD_CURVE = (
    (0.0, 0.12), (0.1, 0.20), (0.2, 0.28), (0.3, 0.36), (0.4, 0.44), (0.5, 0.53),
    (0.6, 0.62), (0.7, 0.70), (0.8, 0.79), (0.9, 0.88), (1.0, 0.95),
)  # fmt: skip
"""The part of its rated power that a machine draws, by the part of its cores that work: GreenSKU's curve (`reference/market.md` §2).
The curve begins at 10 %; its value at 0 continues the line of 10 and 20 %."""
RATED_WATTS_PER_CORE: dict[Machine, float] = {"server": 5.0, "desktop": 10.0, "laptop": 4.0}
"""Guesses of the rated power per physical core: EPYC and Xeon of 2019 to 2024 are rated 3.8 to 6.8, desktops of 65 W have 6 or 8 cores,
laptops of 15 to 28 W have 4 to 8."""
AROUND: dict[Machine, float] = {"server": 2.0, "desktop": 1.5, "laptop": 1.3}
"""Memory, converters, fans and the supply's loss beside the processor. Of servers market.md §0 (e) doubles; the others are guesses."""
SUPPLY = 1.05 / 0.95
"""The part of a processor's own reading that its converter and power supply lose too: GreenSKU's 5 % each."""
SERVER_CORES_MIN = 17
SERVER_NAMES = ("epyc", "xeon", "neoverse", "graviton", "ampere", "altra", "opteron", "platinum", "power9", "power10")
MICRO_PER_USD = 1_000_000
TOKENS_PER_MUNIT = 1_000_000
JOULES_PER_KWH = 3_600_000
PRICE_MAX = 2**40
"""What an offer can hold."""


class Watts(msgspec.Struct, frozen=True, kw_only=True):
    """What work draws beyond idling. `method` says where the figure is from: the owner, the processor's meter (RAPL), or a model."""

    value: float
    method: Method


def machine_class(*, cores: int, has_battery: bool, cpu: str = "") -> Machine:
    """What kind of machine this is, as far as its battery, its processor's name and its cores tell."""
    if has_battery:
        return "laptop"
    is_server = cores >= SERVER_CORES_MIN or any(name in cpu.lower() for name in SERVER_NAMES)
    return "server" if is_server else "desktop"


def watts_of(*, busy: int, cores: int, machine: Machine, owner_watts: float = 0.0, measured_watts: float | None = None) -> Watts:
    """Watts beyond idling while `busy` of `cores` physical cores work.

    `owner_watts` is the owner's own figure for all cores at work, and wins if it isn't 0; its part for `busy` is by the count.
    `measured_watts` is what the processor's meter said while as many worked. Else the load curve times the class's rated power.
    """
    assert cores > 0, "a machine has a core"
    assert busy >= 0, "cores can't be negative"
    share = min(1.0, busy / cores)
    if owner_watts > 0:
        return Watts(value=owner_watts * share, method="owner")
    if measured_watts is not None and measured_watts > 0:
        return Watts(value=measured_watts * SUPPLY, method="rapl")
    rated = RATED_WATTS_PER_CORE[machine] * cores * AROUND[machine]
    return Watts(value=rated * (_drawn(share) - _drawn(0.0)), method="modelled")


def floor_price(watts: Watts, *, usd_per_kwh: float, tokens_per_s: float) -> int:
    """What a million tokens cost in electricity, in micro-credits (1 credit is 1 USD), rounded up.

    0 for what has no speed: an embedding has no output that could be sold.
    W ÷ (tokens/s) are joules per token; 3.6 million of them cost `usd_per_kwh`.
    """
    if tokens_per_s <= 0:
        return 0
    usd_per_token = watts.value * usd_per_kwh / (tokens_per_s * JOULES_PER_KWH)
    return min(PRICE_MAX, math.ceil(usd_per_token * TOKENS_PER_MUNIT * MICRO_PER_USD))


def price(measured: Measured, watts: Watts, *, usd_per_kwh: float) -> Price:
    """The least that a lender can ask without paying for it: the cost of a prompt and of a single stream, which is the dearest case.

    Prompt tokens that the engine still knows are free: they need no work, and a price for them would be earnings and not cost.
    """
    return Price(
        prompt_micro_per_munit=floor_price(watts, usd_per_kwh=usd_per_kwh, tokens_per_s=measured.prefill_tokens_per_s),
        cached_prompt_micro_per_munit=0,
        output_micro_per_munit=floor_price(watts, usd_per_kwh=usd_per_kwh, tokens_per_s=measured.decode_tokens_per_s),
    )


def _drawn(share: float) -> float:
    """The load curve between its points."""
    for (low, at_low), (high, at_high) in itertools.pairwise(LOAD_CURVE):
        if share <= high:
            return at_low + (at_high - at_low) * (share - low) / (high - low)
    return LOAD_CURVE[-1][1]

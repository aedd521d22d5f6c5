"""What a call costs on each offer: what is expected, and the most, which is what a quote promises."""

import math
from typing import TypeVar

from fallow.core.match.columns import Facts, Floats
from fallow.core.match.predict import Written

Prices = TypeVar("Prices", Floats, float)
MUNIT = 1_000_000
PROMPT_MARGIN = 1.5
"""A prompt is estimated from its bytes; a quote covers one that has so many times the tokens. Nothing above a quote is charged."""


def expected(f: Facts, w: Written, *, unread: Floats | float, warm: Floats | None) -> Floats:
    """Micro-credits that the call will probably cost."""
    cost = f.prompt_price * unread
    if warm is not None:
        cost += f.cached_price * warm
    cost += w.cost
    return cost


def most(prompt_price: Prices, output_price: Prices, *, prompt: float, limit: Prices | float) -> Prices:
    """Micro-credits that the call can cost at most, if nothing is cached and the answer is as long as it can be."""
    return prompt_price * (PROMPT_MARGIN * prompt) + output_price * limit


def quiet(f: Facts, w: Written, cost: Floats, read_s: Floats) -> Floats:
    """What the call costs with the rent of its time: seconds of the whole machine, what it reads alone and its part of shared steps.

    A stream's part of a step with m streams is slope + (1 - slope) / m; m is taken as the slots, as on a busy machine.
    """
    found = w.work_s + read_s
    found *= f.rent
    found += cost
    return found


def rounded(cost: float) -> int:
    """A ceiling in whole micro-credits."""
    return math.ceil(cost - 1e-6)

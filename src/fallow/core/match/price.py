"""What a call costs on each offer: what is expected, and the most, which is what a quote promises."""

import math
from typing import TypeVar

from fallow.core.match.columns import Facts, Floats

Prices = TypeVar("Prices", Floats, float)
MUNIT = 1_000_000
PROMPT_MARGIN = 1.5
"""A prompt is estimated from its bytes; a quote covers one that has so many times the tokens. Nothing above a quote is charged."""


def expected(c: Facts, *, unread: Floats | float, warm: Floats | None, output: Floats | float) -> Floats:
    """Micro-credits that the call will probably cost."""
    cost = c.prompt_price * unread
    if warm is not None:
        cost += c.cached_price * warm
    cost += c.output_price * output
    return cost


def most(prompt_price: Prices, output_price: Prices, *, prompt: float, limit: Prices | float) -> Prices:
    """Micro-credits that the call can cost at most, if nothing is cached and the answer is as long as it can be."""
    return prompt_price * (PROMPT_MARGIN * prompt) + output_price * limit


def work_s(c: Facts, read_s: Floats, *, output: Floats | float) -> Floats:
    """Seconds of the whole machine that the call takes: what it reads alone, and its part of steps shared with others.

    A stream's part of a step with m streams is slope + (1 - slope) / m; m is taken as the slots, as on a busy machine.
    """
    work = c.token_work * output
    work += read_s
    return work


def rounded(cost: float) -> int:
    """A ceiling in whole micro-credits."""
    return math.ceil(cost - 1e-6)

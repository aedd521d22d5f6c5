"""What a call costs on each offer: what is expected, and the most, which is what a quote promises."""

import math

import numpy as np

from fallow.core.match.columns import Codes, Columns, Facts, Floats
from fallow.core.match.predict import Written

MUNIT = 1_000_000
ROUND = 1e-6
"""So much above a whole number is taken for what arithmetic adds."""
PROMPT_MARGIN = 1.5
"""A prompt is estimated from its bytes; a quote covers one that has so many times the tokens. Nothing above a quote is charged."""


def expected(f: Facts, w: Written, *, unread: Floats | float, warm: Floats | None) -> Floats:
    """Micro-credits that the call will probably cost."""
    cost = f.prompt_price * unread
    if warm is not None:
        cost += f.cached_price * warm
    cost += w.cost
    return cost


def most(c: Columns, rows: Codes | slice, *, prompt: float, limit: float) -> Floats:
    """Micro-credits that the call can cost at most: nothing is cached, and the answer is as long as it can be, which may have no limit."""
    longest = np.maximum(0.0, c.context[rows] - prompt) if limit == math.inf else limit
    return c.prompt_price[rows] * (PROMPT_MARGIN * prompt) + c.output_price[rows] * longest


def promised(c: Columns, row: int, *, prompt: float, limit: float) -> int:
    """The same on one row in whole micro-credits: what a quote promises."""
    longest = max(0.0, c.context.item(row) - prompt) if limit == math.inf else limit
    return math.ceil(c.prompt_price.item(row) * (PROMPT_MARGIN * prompt) + c.output_price.item(row) * longest - ROUND)


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
    return math.ceil(cost - ROUND)

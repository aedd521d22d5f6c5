"""What a second of a machine is worth to the calls to come: a price for its time, so that a call that can go elsewhere leaves it.

The prices are those of the fluid problem "least cost for the demand of late, no machine beyond what it can do", found as
the shadow prices of its capacities by subgradient steps (tâtonnement; Bertsekas, Nonlinear Programming, §6.3): where the calls
that would choose a machine need more of its time than there is, its rent rises; where they need less, it falls, to nothing.
Lenders aren't paid it, and callers don't pay it: it only decides who goes where.
"""

import math
from typing import NamedTuple

import numpy as np

from fallow.core.match.columns import Columns, Floats
from fallow.core.match.predict import LEAST_SD_S, SHARE, phi

USE_MAX = 0.95
"""The share of a machine's time that can be used; the rest is lost between calls."""
STEP = 0.01
"""How far a rent moves in one round, as a share of what a second costs."""
ROUNDS = 10
MORE_MAX = 3.0
"""Demand counts as at most so many times what there is, and one more."""
CALLS_MAX = 256
"""The calls of late that stand for the demand."""
CALLS_MIN = 16
ROWS_MAX = 512
"""Only the cheapest offers have rents: where there are more, there is no lack."""
CELLS_MAX = 8_192
"""Calls times offers in one round: some milliseconds."""
CROWDED_LOG = 0.7
"""Prompts that are read beside make steps longer; only beyond a factor of two does that count as slowness."""
STEP_SD = 0.25
STREAMS = 0.6
"""How many of a machine's slots are usually busy where it is wanted."""


class Wanted(NamedTuple):
    """A call of late: its tokens, its targets in seconds (infinite for those that can wait), and what missing them costs."""

    prompt: float
    output: float
    first_s: float
    per_token_s: float
    miss: float


def rents(c: Columns, wanted: Floats, *, calls_per_s: float) -> Floats:
    """The rents of these offers after one more look at the demand; `wanted` has a row per call, as in Wanted."""
    prompt, output, first_s, per_token_s, miss = (wanted[:, at : at + 1] for at in range(5))
    prefill = c.prefill * np.exp(c.prefill_log)
    read = prompt / (SHARE * prefill)
    step = (1.0 + c.slope * STREAMS * np.maximum(0.0, c.slots - 1.0)) / (c.decode * np.exp(np.minimum(0.0, c.decode_log + CROWDED_LOG)))
    late = 1.0 - phi((np.minimum(first_s, 1e6) - c.rtt_s - read) / np.sqrt(read**2 * c.prefill_var + LEAST_SD_S**2)) * phi(
        np.log(np.minimum(per_token_s, 1e6) / step) / STEP_SD
    )
    cost = c.prompt_price * prompt + c.output_price * output
    work = prompt / prefill + output / c.decode * (c.slope + (1.0 - c.slope) / c.slots)
    scale = float(np.median(cost / work))
    total = np.where(c.stop != 0, math.inf, cost + late * miss)
    there = max(1, len(wanted))
    rent = c.rent
    there_at_all = np.isfinite(total).any(1)
    for _ in range(ROUNDS):
        chosen = (total + rent * work).argmin(1)
        demand = np.bincount(chosen, work[np.arange(there), chosen] * there_at_all, len(rent)) * (calls_per_s / there)
        rent = np.maximum(0.0, rent + STEP * scale * np.clip(demand / USE_MAX - 1.0, -1.0, MORE_MAX))
    return rent

"""Which of the offers is taken."""

import math
from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from fallow.core.match.columns import Flags, Floats
from fallow.model.ids import CallId, GatewayId

CHANCE_MIN = 0.95
"""An offer meets a call's needs if its chance to do so is at least this."""
NEAR = 0.02
"""Offers that cost so much more than the best are as good; of two of them the less busy is taken, so that gateways don't herd."""
EXPLORE = 0.01
"""The share of calls that believe what a node says of itself, so that one that was slow for a while is seen again."""


def draw(gateway_id: GatewayId, call_id: CallId, attempt: int) -> float:
    """A number from 0 to 1 that depends on the call alone."""
    digest = blake2b(f"{gateway_id}/{call_id}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def pick(score: Floats, able: Flags, busy: Floats, name: Callable[[int], str], *, luck: float) -> int:
    """The row with the least score among those that are able; of two drawn from the near-best the less busy; ties by id.

    At least one must be able.
    """
    scores = np.where(able, score, math.inf)
    best = int(scores.argmin())
    least = float(scores[best])
    near = np.flatnonzero(scores <= least + NEAR * abs(least))
    if len(near) == 1:
        return best
    rows = sorted((int(row) for row in near), key=name) if len(near) <= 64 else [int(row) for row in near]
    first = int(luck * len(rows))
    second = (first + 1 + int((luck * len(rows) - first) * (len(rows) - 1))) % len(rows)
    return min(rows[first], rows[second], key=lambda row: (busy[row], scores[row], name(row)))

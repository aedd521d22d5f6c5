"""Which of the offers is taken."""

from collections.abc import Callable
from hashlib import blake2b

from fallow.core.match.columns import Floats
from fallow.model.ids import CallId, GatewayId

CHANCE_MIN = 0.95
"""An offer meets a call's needs if its chance to do so is at least this."""
NEAR = 0.02
"""Offers that cost so much more than the best are as good; of two of them the less busy is taken, so that gateways don't herd."""
NAMED_MAX = 64
"""More of the near-best are drawn from as they stand on the shelf, which is the order of their prices."""
EXPLORE = 0.01
"""The share of calls that believe what a node says of itself, so that one that was slow for a while is seen again."""


def draw(gateway_id: GatewayId, call_id: CallId, attempt: int) -> float:
    """A number from 0 to 1 that depends on the call alone."""
    digest = blake2b(f"{gateway_id}/{call_id}/{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def pick(scores: Floats, sooner: Floats, name: Callable[[int], str], *, best: int, luck: float) -> int:
    """The row with the least score; of two drawn from the near-best the one that begins sooner; ties by id.

    `best` is a row with the least score, which is finite; rows that aren't able have an infinite one.
    """
    least = float(scores[best])
    near = (scores <= least + NEAR * abs(least)).nonzero()[0]
    if len(near) == 1:
        return best
    rows = sorted(near.tolist(), key=name) if len(near) <= NAMED_MAX else near.tolist()
    first = int(luck * len(rows))
    second = (first + 1 + int((luck * len(rows) - first) * (len(rows) - 1))) % len(rows)
    return min(rows[first], rows[second], key=lambda row: (sooner[row], scores[row], name(row)))

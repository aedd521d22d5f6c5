"""When a call is sent to a second node besides the first: seldom, for priority calls only, and only before their first token.

A second attempt costs another machine's time, so that it is rationed: each call earns a part of one (Dean, Barroso, "The tail at
scale", 2013, bounds hedged requests in the same way).
"""

import msgspec

from fallow.model.call import Call
from fallow.model.quote import Quote

SHARE_MAX = 0.02
"""Of all calls."""
SAVED_MAX = 5.0
"""Hedges that can be saved for a bad moment."""
LATE_FACTOR = 1.5
LATE_MS_MIN = 200
"""A first token is late after so many times what was promised, and not before this."""


class Ration(msgspec.Struct, frozen=True, kw_only=True):
    """The hedges that may still be made."""

    saved: float = 0.0


def earn(ration: Ration) -> Ration:
    """A call came."""
    return Ration(saved=min(SAVED_MAX, ration.saved + SHARE_MAX))


def spend(ration: Ration) -> Ration | None:
    """A hedge is made; None if it may not be."""
    return Ration(saved=ration.saved - 1.0) if ration.saved >= 1.0 else None


def after_ms(call: Call, quote: Quote) -> float | None:
    """How long the first node is waited for; None if the call is never hedged."""
    return max(LATE_MS_MIN, LATE_FACTOR * quote.first_token_in_ms) if call.needs.service_tier == "priority" else None

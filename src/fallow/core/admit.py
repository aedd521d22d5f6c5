"""Whether a node takes a call that a gateway sent it."""

from collections.abc import Collection, Mapping

import msgspec

from fallow.model.errors import Failure, shortened
from fallow.model.messages import Request
from fallow.model.offer import Price

BODY_BYTES_MAX = 32 * 1024 * 1024
"""One request's body, the same at the gateway and at the node."""
BODIES_BYTES_MAX = 128 * 1024 * 1024
"""All request bodies that a node holds at once."""
BUSY_RETRY_AFTER_MS = 2_000
YIELDING_RETRY_AFTER_MS = 30_000
"""What a caller is told when the only machine yields: owners come back for minutes, not for seconds."""
WAITING_PER_SLOT = 2
"""How many calls may wait at a node for each slot."""
LEASE_MS = 15_000
"""A gateway that says nothing for so long is dead, and its callers are gone."""
GATEWAY_CALLS_MAX = 2_000
GATEWAY_BODIES_BYTES_MAX = 256 * 1024 * 1024
GATEWAY_RETRY_AFTER_MS = 1_000
"""What is said while nobody can tell when a call will end."""


class Desk(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has on its hands. `yielding` is set while the owner needs the machine; `refuses` are organisations and countries."""

    leaving: bool
    yielding: bool = False
    refuses: Collection[str] = ()
    running: int
    slots: int
    waiting_max: int
    bodies_bytes: int


def admit(request: Request, desk: Desk, offered: Mapping[str, Collection[str]]) -> Failure | None:
    """None if the node takes the call, else why it doesn't. `offered` has the paths of each model.

    A path that isn't offered never reaches an engine: an attached server answers more than its lender lends.
    """
    if desk.leaving:
        return Failure(code="leaving", message="the node is leaving the network")
    if desk.yielding:
        return yielding()
    if request.org_id in desk.refuses or request.country in desk.refuses:
        return Failure(code="lender_refuses", message="the lender doesn't work for this organisation or country")
    if request.model not in offered:
        return Failure(code="model_not_here", message=f"the node doesn't offer {shortened(request.model)!r}")
    if request.path not in offered[request.model]:
        return Failure(code="unknown_path", message=f"the node doesn't offer {shortened(request.path)} for this model")
    if request.body_bytes > BODY_BYTES_MAX:
        return Failure(code="body_too_large", message=f"a body of {request.body_bytes} bytes is over the limit of {BODY_BYTES_MAX}")
    if not 0 <= len(request.body) <= request.body_bytes:
        return Failure(code="invalid_request", message="the first part of the body is longer than the body")
    if desk.running >= desk.slots + desk.waiting_max:
        return Failure(code="busy", message="all slots and queue places of the node are taken", retry_after_ms=BUSY_RETRY_AFTER_MS)
    if desk.bodies_bytes + request.body_bytes > BODIES_BYTES_MAX:
        return Failure(code="busy", message="the node holds too many request bodies", retry_after_ms=BUSY_RETRY_AFTER_MS)
    return None


def terms(request: Request, *, model_digest: str, asked: Collection[Price]) -> Failure | None:
    """None if the call is made for the weights that the node has, and for a price that it asks now or asked a moment ago."""
    if request.model_digest != model_digest:
        return Failure(code="model_not_here", message="the node has other weights under this name by now")
    paid = msgspec.structs.astuple(request.price)
    if not any(all(a >= b for a, b in zip(paid, msgspec.structs.astuple(price), strict=True)) for price in asked):
        return Failure(code="price_changed", message="the node asks more than this by now")
    return None


def yielding() -> Failure:
    """The owner needs the machine. That is no fault of the node's, and nothing of the call's is lost but time."""
    return Failure(code="yielding", message="the owner of the machine needs it now", retry_after_ms=YIELDING_RETRY_AFTER_MS)


def is_abandoned(leased_at_ms: int, *, now_ms: int) -> bool:
    """Whether the gateway that asked for an attempt has died."""
    return now_ms - leased_at_ms > LEASE_MS


def admit_call(*, calls: int, bodies_bytes: int, size: int, retry_after_ms: int = GATEWAY_RETRY_AFTER_MS) -> Failure | None:
    """None if a gateway that answers `calls` and holds `bodies_bytes` takes one more call with a body of `size`.

    `retry_after_ms` is when there will probably be a place.
    """
    if calls >= GATEWAY_CALLS_MAX:
        text = f"this gateway already answers {GATEWAY_CALLS_MAX} calls, its limit; wait for one to end, or ask another gateway"
        return Failure(code="too_many_calls", message=text, retry_after_ms=retry_after_ms)
    if bodies_bytes + size > GATEWAY_BODIES_BYTES_MAX:
        text = f"this gateway already holds {bodies_bytes} bytes of request bodies; the limit is {GATEWAY_BODIES_BYTES_MAX}"
        return Failure(code="too_many_calls", message=text, retry_after_ms=retry_after_ms)
    return None

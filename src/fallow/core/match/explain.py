"""Why no offer can take a call, and what would lift the limit."""

from collections import Counter
from collections.abc import Sequence

from fallow.core.admit import YIELDING_RETRY_AFTER_MS
from fallow.core.match.candidate import Candidate
from fallow.core.match.filter import LIMITS
from fallow.model.call import Call
from fallow.model.quote import Refuse, Stopped

RETRY_AFTER_MS = 2_000
"""When a refusal may have lifted itself: the roster's heartbeat."""

LIFTED_BY = {
    "no_nodes": "no machine is lending here now; start one with `fallow lend`",
    "model_not_offered": "name one of the models that are offered",
    "path_not_offered": "the model is offered, but not for this endpoint",
    "offer_expired": "the node must renew its offer",
    "ring": "the key must allow another ring, or a node of the call's own organisation must offer the model",
    "lender_refuses": "the lenders don't work for this organisation or country",
    "region": "allow another region",
    "hardware": "allow the other kind of hardware",
    "isolation": "allow a lower isolation",
    "over_price": "raise the price ceiling",
    "already_tried": "every node that offers the model was tried",
    "owner_is_back": "the owners need their machines now; try again later, or lend one more",
    "engine_failed": "the engine is being restarted; try again shortly",
    "busy": "all slots and queue places are taken; try again shortly",
}


def _retry_after_ms(limit: str, soonest_ms: int | None) -> int:
    """An owner stays for minutes; anything else may be over with the next heartbeat, or when a model is loaded."""
    return YIELDING_RETRY_AFTER_MS if limit == "owner_is_back" else soonest_ms or RETRY_AFTER_MS


def explain(call: Call, candidates: Sequence[Candidate], stopped: Counter[str]) -> Refuse:
    """The limit that the most promising offer met (the last in the order of limits), with all counts."""
    models = tuple(sorted({c.offer.model for c in candidates}))
    counts = tuple(Stopped(limit=name, offers=stopped[name], lifted_by=LIFTED_BY[name]) for name, _ in LIMITS if stopped[name])
    limit = counts[-1].limit if counts else "no_nodes"
    soonest = min((c.load.ready_in_ms for c in candidates if c.load.ready_in_ms and c.offer.model == call.needs.model), default=None)
    return Refuse(
        limit=limit,
        lifted_by=LIFTED_BY[limit],
        stopped=counts,
        models=models,
        retry_after_ms=None if limit == "model_not_offered" else _retry_after_ms(limit, soonest),
    )

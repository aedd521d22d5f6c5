"""Why no offer can take a call, and what would lift each limit."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fallow.core.admit import YIELDING_RETRY_AFTER_MS
from fallow.core.match import predict, survey
from fallow.core.match.columns import Codes, Floats
from fallow.core.match.filter import CODE, FREE, LIMITS
from fallow.core.match.market import Market
from fallow.core.match.predict import Times
from fallow.core.match.survey import Look
from fallow.model.call import Call
from fallow.model.quote import Refuse, Stopped

RETRY_AFTER_MS = 2_000
"""When a refusal may have lifted itself: the roster's heartbeat."""
RETRY_AFTER_MS_MAX = 60_000
NAMES_MAX = 6
MICRO = 1e6

NO_NODES = "no machine is lending here now; start one with `fallow lend`"
NOT_OFFERED = "name one of the models that are offered"
Lift = Callable[[Sequence[Look], int], str]


def _credits(micro: float) -> str:
    """An amount in credits, rounded up to whole micro-credits."""
    return f"{math.ceil(micro - 1e-6) / MICRO:.6f}".rstrip("0").rstrip(".")


def _least(looks: Sequence[Look], code: int, of: Callable[[Look, Codes], Floats]) -> float:
    """The least value among the offers that a limit stopped, given by their rows."""
    stopped = [(look, look.stopped(code)) for look in looks]
    return min((float(of(look, rows).min()) for look, rows in stopped if len(rows)), default=math.inf)


def _times(look: Look, rows: Codes) -> Times:
    q = look.question
    f = q.shelf.table.facts(rows)
    return survey.times(q, f, predict.written(f, q.length.mean_tokens), q.prompt)


def _kinds(looks: Sequence[Look], code: int, what: str) -> str:
    found = set()
    for look in looks:
        kinds = np.unique(look.question.shelf.columns.kind[look.stopped(code)]).tolist()
        found |= {getattr(look.question.kind_list[kind], what) for kind in kinds}
    return ", ".join(sorted(str(one) or "unknown" for one in found)[:NAMES_MAX])


def _over_price(looks: Sequence[Look], code: int) -> str:
    dearest = _least(looks, code, lambda look, rows: look.question.shelf.columns.output_price[rows] * MICRO)
    return f"raise max_price: the cheapest is {_credits(dearest)}"


def _over_cost(looks: Sequence[Look], code: int) -> str:
    cheapest = _least(looks, code, lambda look, rows: survey.cost_max(look.question, rows))
    return f"raise max_cost, or lower the limit of the answer's tokens: the cheapest is {_credits(cheapest)}"


def _over_context(looks: Sequence[Look], code: int) -> str:
    longest = -_least(looks, code, lambda look, rows: -look.question.shelf.columns.context[rows])
    return f"shorten the prompt: the longest context is {longest:.0f} tokens"


def _too_slow(looks: Sequence[Look], code: int) -> str:
    slow = [(look.times, look.chances, look.codes == code) for look in looks]
    some = [one for one in slow if one[2].any()]
    first = min(float(times.first_s[there].min()) for times, _, there in some)
    step = min(float(times.step_s[there].min()) for times, _, there in some)
    chance = max(float(chances[there].max()) for _, chances, there in some)
    return (
        f"leave out strict, or allow more time: the first token can be expected after {first:.1f} s at the soonest, "
        f"a token takes {1000 * step:.0f} ms at the least, and the best chance to meet all is {100 * chance:.0f} %"
    )


LIFTED_BY: dict[str, str | Lift] = {
    "path_not_offered": "the model is offered, but not for this endpoint",
    "quantisation": lambda looks, code: f"allow another quantisation; offered: {_kinds(looks, code, 'quantisation')}",
    "ring": "the key must allow another ring, or a node of the call's own organisation must offer the model",
    "lender_refuses": "the lenders don't work for this organisation or country",
    "region": lambda looks, code: f"allow another region; offered: {_kinds(looks, code, 'region')}",
    "country": lambda looks, code: f"allow another country; offered in: {_kinds(looks, code, 'region')}",
    "hardware": "allow the other kind of hardware",
    "isolation": lambda looks, code: f"allow a lower isolation; offered: {_kinds(looks, code, 'isolation')}",
    "offer_expired": "the node must renew its offer",
    "over_context": _over_context,
    "over_price": _over_price,
    "over_cost": _over_cost,
    "already_tried": "every node that offers the model was tried",
    "owner_is_back": "the owners need their machines now; try again later, or lend one more",
    "engine_failed": "the engine is being restarted; try again shortly",
    "backing_off": "the node failed a moment ago, or isn't heard, and is left alone for a while; try again shortly",
    "busy": "all slots and queue places are taken; try again shortly",
    "too_slow": _too_slow,
}


def refuse(call: Call, market: Market, looks: Sequence[Look]) -> Refuse:
    """The limit that the most promising offer met (the last in the order of limits), with all counts. `looks` are at everything."""
    models = market.models()
    if not looks:
        limit, lifted = ("model_not_offered", NOT_OFFERED) if models else ("no_nodes", NO_NODES)
        return Refuse(limit=limit, lifted_by=lifted, models=models, retry_after_ms=None if models else RETRY_AFTER_MS)
    counts = sum(np.bincount(np.maximum(look.codes, 0), minlength=FREE + 1) for look in looks)
    assert not isinstance(counts, int), "there is a look"
    stopped = tuple(_stopped(name, int(counts[CODE[name]]), looks) for name in LIMITS if counts[CODE[name]])
    if not stopped:
        return Refuse(limit="no_nodes", lifted_by=NO_NODES, retry_after_ms=RETRY_AFTER_MS)
    last = stopped[-1]
    return Refuse(
        limit=last.limit, lifted_by=last.lifted_by, stopped=stopped, models=models, retry_after_ms=_retry_after_ms(last.limit, looks)
    )


def _stopped(limit: str, offers: int, looks: Sequence[Look]) -> Stopped:
    lift = LIFTED_BY[limit]
    return Stopped(limit=limit, offers=offers, lifted_by=lift if isinstance(lift, str) else lift(looks, CODE[limit]))


def _retry_after_ms(limit: str, looks: Sequence[Look]) -> int:
    """An owner stays for minutes; a queue has moved when the next first token is expected; anything else may be over with a heartbeat."""
    if limit == "owner_is_back":
        return YIELDING_RETRY_AFTER_MS
    if limit == "backing_off":
        soonest = 1000 * _least(looks, CODE[limit], lambda look, rows: look.question.shelf.columns.back_s[rows] - look.question.now_s)
        return int(min(RETRY_AFTER_MS_MAX, max(RETRY_AFTER_MS, soonest)))
    if limit == "busy":
        soonest = 1000 * _least(looks, CODE["busy"], lambda look, rows: _times(look, rows).first_s)
        return int(min(RETRY_AFTER_MS_MAX, max(RETRY_AFTER_MS, soonest)))
    return RETRY_AFTER_MS

"""What else there is for a call that no offer suits now: what it would cost to wait, who backs off, and who is the least late."""

import math

import numpy as np

from fallow.core.match import predict, price, survey
from fallow.core.match.columns import Codes, Flags, Floats
from fallow.core.match.filter import CODE, FREE, RINGS
from fallow.core.match.survey import Look
from fallow.model.needs import Ring

_PASSING = ("owner_is_back", "engine_failed", "backing_off", "busy", "too_slow")
PASSING: Flags = np.isin(np.arange(FREE + 2), [FREE, *(CODE[name] for name in _PASSING)])
"""By code, what stops an offer only for a while; the last is for the rows of offers that are gone."""


def quiet_cost(look: Look, ring: Ring) -> float:
    """The least that the call would cost if nothing else was to be done; infinite if it could not be taken then either."""
    places = _places(look, ring)
    return float(_quiet(look)[places].min()) if len(places) else math.inf


def quiet_cost_at(look: Look, at: int) -> float:
    """What one offer would cost if it had nothing else to do."""
    return float(_quiet(look)[at])


def _quiet(look: Look) -> Floats:
    q = look.question
    if len(look.quiet) and not q.trusts_cards:
        return look.quiet
    f, warm = q.shelf.table.facts(look.rows), survey.warm_of(q, look.rows)
    unread, w = survey.unread_of(q, warm), predict.written(f, q.length.mean_tokens)
    return price.quiet(f, w, price.expected(f, w, unread=unread, warm=warm), unread / f.rate)


def _places(look: Look, ring: Ring) -> Codes:
    """The places of the offers of a ring that can take the call, now or when something has passed by itself. The market has all."""
    if ring != "market":
        near = look.near[RINGS.index(ring)]
        return near[PASSING[look.codes[near]]]
    found: Codes = PASSING[look.codes].nonzero()[0]
    return found


def may_come(look: Look, ring: Ring) -> bool:
    """Whether a ring has offers that can take the call, now or when something has passed by itself. The market has all that there are."""
    return len(_places(look, ring)) > 0


def backing_off(look: Look) -> tuple[float, Look] | None:
    """Until when nodes back off at the least whose offers nothing else stops, and a look at those as if they didn't.

    None if there are none. A call that can't be spared is sent only where the time is over.
    """
    q, c = look.question, look.question.columns
    rows = look.stopped(CODE["backing_off"])
    fits = c.held[rows] < c.room[rows]
    if not survey.can_be_spared(q.call):
        fits &= c.stop[rows] == 0
    rows = rows[fits]
    if not len(rows):
        return None
    until_s = np.maximum(q.now_s, c.back_s[rows])
    rows = rows[until_s == until_s.min()]
    return float(until_s.min()), survey.weigh(q, rows, np.full(len(rows), FREE), survey.NOWHERE, end=look.end)


def lateness(look: Look) -> Floats:
    """How many times longer than it should each offer takes, at the worst of the call's targets."""
    targets, t = look.question.targets, look.times
    end = t.first_s + look.question.length.mean_tokens * t.step_s
    late = np.maximum(t.first_s / max(1e-3, targets.first_s), t.step_s / max(1e-6, targets.per_token_s))
    return np.maximum(np.maximum(late, end / max(1e-3, targets.end_s)), 1e-9 * end)

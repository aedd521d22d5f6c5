"""A look at the offers of a shelf for one call: what stops each, when it would answer, how sure that is, what it costs."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fallow.core.match import pick, predict, price
from fallow.core.match.columns import GONE, Codes, Facts, Flags, Floats
from fallow.core.match.filter import CODE, LIMITS, MARKET, RINGS, Ask, Kind, codes, sought_by
from fallow.core.match.lengths import Length
from fallow.core.match.market import Market
from fallow.core.match.predict import Targets, Times
from fallow.core.match.price import MUNIT
from fallow.core.match.rent import Wanted
from fallow.core.match.rows import NOBODY, PARTS
from fallow.core.match.shelf import Shelf
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.needs import Ring

PROMPT_SURE = 0.3
"""The part of an estimated prompt that it has at least: a call isn't refused for a guess. What embeds takes many short texts."""
FLEX_QUEUE_S = 2.0
"""A call that can wait doesn't stand in the way of others: it goes where little is queued."""


_PASSING = ("owner_is_back", "engine_failed", "backing_off", "busy", "too_slow")
PASSING: Flags = np.isin(np.arange(len(LIMITS) + 2), [0, *(CODE[name] for name in _PASSING)])
"""By code, what stops an offer only for a while; the last is for the rows of offers that are gone."""


class Moment(NamedTuple):
    """Now: by the wall for deadlines, and by a clock that never jumps for everything else."""

    wall_ms: int
    at_s: float


class Question(NamedTuple):
    """What is asked of every offer of a shelf."""

    call: Call
    shelf: Shelf
    outcomes: NDArray[np.int8]
    kind_list: Sequence[Kind]
    near_orgs: tuple[tuple[int, ...], tuple[int, ...]]
    near: Codes
    near_rings: Codes
    prompt: float
    length: Length
    limit: float
    targets: Targets
    warm: dict[int, float]
    tried: frozenset[int]
    on_probation: frozenset[int]
    miss: float
    now_s: float
    trusts_cards: bool
    only_free: bool


class Look(NamedTuple):
    """Some rows of a shelf as the call sees them, ascending; `codes` and `rings` are of all of them (None: all in the market).

    Nothing stops those at the places `some`; `facts` and all that follows are of these alone. Every ordered row before `end` has
    been looked at.
    """

    question: Question
    rows: Codes
    codes: Codes
    rings: Codes | None
    end: int
    some: Codes
    facts: Facts
    times: Times
    chances: Floats
    cost: Floats
    score: Floats
    able: Flags

    def row(self, at: int) -> int:
        return int(self.rows[self.some[at]])

    def rings_at(self, at: Codes) -> list[Ring]:
        if self.rings is None:
            return [RINGS[MARKET]] * len(at)
        return [RINGS[ring] for ring in self.rings[self.some[at]].tolist()]

    def node_id(self, at: int) -> NodeId:
        return self.question.shelf.nodes[self.row(at)]

    def stopped(self, code: int) -> Codes:
        """The rows that a limit stopped."""
        rows: Codes = self.rows[self.codes == code]
        return rows

    def able_in(self, ring: Ring) -> Flags | None:
        """Which of the offers that nothing stops are able and in a ring; None if nothing that was looked at is in it."""
        if self.rings is None:
            return self.able if ring == "market" else None
        there: Flags = self.able & (self.rings[self.some] == RINGS.index(ring))
        return there


def targets_of(call: Call, now: Moment) -> Targets:
    """The targets in seconds from now."""
    needs, waited_s = call.needs, (now.wall_ms - call.arrived_at_ms) / 1000
    return Targets(
        math.inf if needs.first_token_within_ms is None else needs.first_token_within_ms / 1000 - waited_s,
        math.inf if needs.per_token_within_ms is None else needs.per_token_within_ms / 1000,
        math.inf if needs.deadline_at_ms is None else (needs.deadline_at_ms - now.wall_ms) / 1000,
    )


def question(
    call: Call, market: Market, shelf: Shelf, *, tried: Collection[NodeId], now: Moment, trusts_cards: bool = False, only_free: bool = False
) -> Question:
    """The call put as a question to the offers of a shelf."""
    needs, own = call.needs, market.org(call.org_id)
    prompt = market.prompts.tokens(call)
    length = market.lengths.expected(call.key_id, shelf.model, limit=needs.output_tokens_max)
    near_orgs = ((own,), tuple({market.org(org) for org in needs.partners} - {own}))
    near = sorted((row, ring) for ring, orgs in enumerate(near_orgs) for row in shelf.cheapest_of(orgs, beyond=PARTS[0]))
    limit = math.inf if needs.output_tokens_max is None else float(needs.output_tokens_max)
    return Question(
        call=call,
        shelf=shelf,
        outcomes=market.kinds.outcomes(sought_by(call)),
        kind_list=market.kinds.list,
        near_orgs=near_orgs,
        near=np.array([row for row, _ in near], np.intp) if near else NOBODY,
        near_rings=np.array([ring for _, ring in near], np.intp) if near else NOBODY,
        prompt=prompt,
        length=length,
        limit=limit,
        targets=targets_of(call, now),
        warm=market.warmth.of(call, shelf, prompt),
        tried=frozenset(row for node_id in tried if (row := shelf.row_of.get(node_id)) is not None),
        on_probation=frozenset() if can_be_spared(call) else frozenset(shelf.row_of[node_id] for node_id in shelf.on_probation),
        miss=shelf.miss(prompt, length.mean_tokens),
        now_s=now.at_s,
        trusts_cards=trusts_cards,
        only_free=only_free,
    )


def can_be_spared(call: Call) -> bool:
    """Whether the call may find out if a node that failed has mended: it is tried elsewhere if not, but that takes its time."""
    return call.needs.service_tier != "priority" and not call.needs.strict


def wanted(call: Call, market: Market, now: Moment) -> Wanted | None:
    """The call as demand; None if nobody offers the model."""
    for shelf in market.shelves(call.needs.model):
        prompt = market.prompts.tokens(call)
        output = market.lengths.expected(call.key_id, shelf.model, limit=call.needs.output_tokens_max).mean_tokens
        targets = targets_of(call, now)
        is_patient = call.needs.service_tier == "flex"
        first_s, per_token_s = (math.inf, math.inf) if is_patient else (targets.first_s, targets.per_token_s)
        return Wanted(prompt, output, first_s, per_token_s, shelf.miss(prompt, output))
    return None


def cost_max(q: Question, rows: Codes | slice) -> Floats:
    """The most that the call can cost on these rows."""
    c = q.shelf.columns
    limit = np.maximum(0.0, c.context[rows] - q.prompt) if q.limit == math.inf else q.limit
    return price.most(c.prompt_price[rows], c.output_price[rows], prompt=q.prompt, limit=limit)


def times(q: Question, f: Facts, warm: Floats | float = 0.0) -> Times:
    """When the answer would come from these offers."""
    minds = min(q.targets.per_token_s, q.targets.end_s) < math.inf
    prompt_mean = q.shelf.prompt_mean if minds else None
    return predict.times(f, prompt=q.prompt, warm=warm, output_mean=q.length.mean_tokens, prompt_mean=prompt_mean, now_s=q.now_s)


def _look(q: Question, rows: Codes, where: Codes | slice, rings: Codes | None, *, end: int) -> Look:
    """Ask the question of these rows; `where` are the same rows."""
    return weigh(q, rows, _codes(q, rows, where, rings), rings, end=end)


def weigh(q: Question, rows: Codes, found: Codes, rings: Codes | None, *, end: int) -> Look:
    """Predict and price those of the rows that nothing stops, by the codes that were `found`."""
    needs, shelf, output = q.call.needs, q.shelf, q.length.mean_tokens
    some = np.equal(found, 0).nonzero()[0]
    picked = rows[some]
    f = predict.as_cards_say(shelf.table.rows(picked)) if q.trusts_cards else shelf.table.facts(picked)
    warm = _warm(q, picked)
    t = times(q, f, warm)
    chances = predict.chance(t, q.targets, q.length, limit=q.limit)
    cost = price.expected(f, prompt=q.prompt, warm=warm, output=output)
    if needs.service_tier == "flex":  # it has the time to find out whether a node that failed has mended
        able = (chances >= pick.CHANCE_MIN) & (t.queue_s < FLEX_QUEUE_S) & (f.held < f.slots)
        chances *= f.trust
    else:
        chances *= f.trust
        able = chances >= pick.CHANCE_MIN
    if q.only_free:
        free = able & (f.held < f.slots)
        able = free if np.count_nonzero(free) else able
    if needs.strict:
        found[some[~able]] = CODE["too_slow"]
    if needs.prefer == "fast":
        score = t.first_s + output * t.step_s
    else:
        score = price.work_s(f, t.read_s, output=output)
        score *= f.rent
        score += cost
        score += (1.0 - chances) * q.miss
    return Look(q, rows, found, rings, end, some, f, t, chances, cost, score, able)


def _codes(q: Question, rows: Codes, where: Codes | slice, rings: Codes | None) -> Codes:
    needs, shelf = q.call.needs, q.shelf
    kinds = shelf.columns.kind[where]
    tokens = PROMPT_SURE * q.prompt
    ask = Ask(
        tokens=tokens if tokens > shelf.context else None,
        output_price_max=None if needs.price_max_micro_per_munit is None else needs.price_max_micro_per_munit / MUNIT,
        cost_max=None if needs.cost_max_micro is None else float(needs.cost_max_micro),
        tried=_places(rows, q.tried)[0] if q.tried else None,
        on_probation=_places(rows, q.on_probation)[0] if q.on_probation else None,
        expired_s=q.now_s if q.now_s >= shelf.expires_s else None,
        has_gone=shelf.gone > 0,
    )
    outcomes = q.outcomes[MARKET].take(kinds)
    if rings is not None:
        nearer = (rings != MARKET).nonzero()[0]
        outcomes[nearer] = q.outcomes[rings[nearer], kinds[nearer]]
    return codes(shelf.columns, where, outcomes, cost_max(q, where) if ask.cost_max is not None else None, ask)


def _places(rows: Codes, wanted: Collection[int]) -> tuple[Codes, list[int]]:
    """Where these rows stand among others, which ascend; and which of them those are."""
    found = [(at, row) for row, at in zip(wanted, np.searchsorted(rows, list(wanted)).tolist(), strict=True)]
    there = [(at, row) for at, row in found if at < len(rows) and rows[at] == row]
    return np.array([at for at, _ in there], np.intp), [row for _, row in there]


def _warm(q: Question, rows: Codes) -> Floats | float:
    """The warm tokens of each of these rows."""
    if not q.warm:
        return 0.0
    places, there = _places(rows, q.warm)
    if not there:
        return 0.0
    warm = np.zeros(len(rows))
    warm[places] = [q.warm[row] for row in there]
    return warm


def first(q: Question) -> Look:
    """The first look: the cheapest offers and the newest, the quickest where that matters, and the cheapest of the nearer rings."""
    shelf, count = q.shelf, len(q.shelf.nodes)
    if "market" not in q.call.needs.rings:
        return _look(q, q.near, q.near, q.near_rings, end=0)
    if shelf.ordered <= PARTS[0]:
        rows = np.arange(count)
        return _look(q, rows, slice(0, count), _rings(q, rows), end=count)
    end = PARTS[0]
    apart = q.near[q.near.searchsorted(end) : q.near.searchsorted(shelf.ordered)]
    if q.call.needs.prefer == "fast":
        apart = np.union1d(apart, _market_rows(q, shelf.quick[shelf.quick.searchsorted(end) :]))
    if not len(apart) and count == shelf.ordered:
        rows = np.arange(end)
        return _look(q, rows, slice(0, end), _rings(q, rows), end=end)
    rows = np.concatenate([np.arange(end), apart, np.arange(shelf.ordered, count)])
    return _look(q, rows, rows, _rings(q, rows), end=end)


def _rings(q: Question, rows: Codes) -> Codes | None:
    """The ring of each of these rows, which ascend and have all of the nearer rings; None if all are in the market."""
    if not len(q.near):
        return None
    rings = np.full(len(rows), MARKET, np.intp)
    rings[rows.searchsorted(q.near)] = q.near_rings
    return rings


def rest_of(q: Question, ring: Ring) -> Look | None:
    """The offers of a nearer ring that the first look left out; None if there are none."""
    rows = np.setdiff1d(np.array(q.shelf.of_orgs(q.near_orgs[RINGS.index(ring)]), np.intp), q.near)
    return _look(q, rows, rows, np.full(len(rows), RINGS.index(ring)), end=0) if len(rows) else None


def further(look: Look) -> Look | None:
    """The next offers by their price, none of a nearer ring; None if there are no more."""
    q, begin = look.question, look.end
    if begin >= q.shelf.ordered or "market" not in q.call.needs.rings:
        return None
    end = min(next(part for part in PARTS if part > begin), q.shelf.ordered)
    rows = _market_rows(q, np.arange(begin, end))
    if q.call.needs.prefer == "fast":
        rows = np.setdiff1d(rows, q.shelf.quick, assume_unique=True)
    return _look(q, rows, slice(begin, end) if len(rows) == end - begin else rows, None, end=end)


def _market_rows(q: Question, rows: Codes) -> Codes:
    """Those of the rows that aren't in a nearer ring."""
    near = [org for orgs in q.near_orgs for org in orgs if org in q.shelf.orgs]
    return rows[~np.isin(q.shelf.columns.org[rows], near)] if near else rows


def floor(look: Look) -> float:
    """The least that a call can cost beyond the rows that were looked at; infinite if these were all, or what is able will do."""
    q, shelf, end = look.question, look.question.shelf, look.end
    if end >= shelf.ordered:
        return math.inf
    if q.call.needs.prefer == "fast":
        return math.inf if look.able.any() else 0.0
    return float(shelf.cheapest_prompt[end] * q.prompt + shelf.columns.output_price[end] * q.length.mean_tokens)


def quiet_cost(look: Look, ring: Ring) -> float:
    """The least that the call would cost if nothing else was to be done; infinite if it could not be taken then either."""
    q = look.question
    may = may_come(look, ring)
    if not len(may):
        return math.inf
    return float(_quiet(q, may).min())


def quiet_cost_at(look: Look, at: int) -> float:
    """What one offer would cost if it had nothing else to do."""
    return float(_quiet(look.question, np.array([look.row(at)]))[0])


def _quiet(q: Question, rows: Codes) -> Floats:
    f, warm, output = q.shelf.table.facts(rows), _warm(q, rows), q.length.mean_tokens
    read_s = (q.prompt - warm) / f.rate
    return price.expected(f, prompt=q.prompt, warm=warm, output=output) + f.rent * price.work_s(f, read_s, output=output)


def may_come(look: Look, ring: Ring) -> Codes:
    """The rows that can take the call, now or when something has passed by itself. The market has all that there are."""
    passing = PASSING[look.codes]
    if ring != "market":
        if look.rings is None:
            return NOBODY
        passing &= look.rings == RINGS.index(ring)
    return look.rows[passing]


def backing_off(look: Look) -> tuple[float, Look] | None:
    """Until when nodes back off at the least whose offers nothing else stops, and a look at those as if they didn't.

    None if there are none. A call that can't be spared is sent only where the time is over.
    """
    q, c = look.question, look.question.shelf.columns
    at = np.flatnonzero(look.codes == CODE["backing_off"])
    rows = look.rows[at]
    fits = c.held[rows] < c.room[rows]
    if not can_be_spared(q.call):
        fits &= c.stop[rows] == 0
    at, rows = at[fits], rows[fits]
    if not len(rows):
        return None
    until_s = np.maximum(q.now_s, c.back_s[rows])
    soonest = until_s == until_s.min()
    at, rows = at[soonest], rows[soonest]
    rings = None if look.rings is None else look.rings[at]
    return float(until_s.min()), weigh(q, rows, np.zeros(len(rows), np.intp), rings, end=look.end)


def lateness(look: Look) -> Floats:
    """How many times longer than it should each offer takes, at the worst of the call's targets."""
    targets, t = look.question.targets, look.times
    end = t.first_s + look.question.length.mean_tokens * t.step_s
    late = np.maximum(t.first_s / max(1e-3, targets.first_s), t.step_s / max(1e-6, targets.per_token_s))
    return np.maximum(np.maximum(late, end / max(1e-3, targets.end_s)), 1e-9 * end)


def everything(q: Question) -> Look:
    """All offers of the shelf at once, whatever ring they are in."""
    rows = np.flatnonzero(q.shelf.columns.stop[: len(q.shelf.nodes)] != GONE)
    rings = np.full(len(rows), MARKET, np.intp)
    for ring, orgs in enumerate(q.near_orgs):
        rings[np.isin(q.shelf.columns.org[rows], orgs)] = ring
    return _look(q, rows, rows, rings, end=len(q.shelf.nodes))

"""A look at the offers of a shelf for one call: what stops each, when it would answer, how sure that is, what it costs."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from fallow.core.match import pick, predict, price
from fallow.core.match.columns import GONE, Codes, Columns, Facts, Flags, Floats
from fallow.core.match.filter import CODE, FREE, MARKET, RINGS, Ask, Kind, Outcomes, codes, sought_by
from fallow.core.match.lengths import Length
from fallow.core.match.market import Market
from fallow.core.match.predict import Targets, Times, Written
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
FEW_ORGS = 8
"""So many are compared one by one."""
_NO_ROWS: frozenset[int] = frozenset()
NOWHERE = (NOBODY, NOBODY)
"""No rows of the nearer rings."""
_NO_NUMBERS: Floats = np.zeros(0)
_NO_FACTS = Facts(*(_NO_NUMBERS,) * len(Facts.__struct_fields__))
_NO_TIMES = Times(*(_NO_NUMBERS,) * len(Times.__struct_fields__))
_CHANCE_MIN, _FLEX_QUEUE, _ONE, _FREE = (np.array(one) for one in (pick.CHANCE_MIN, FLEX_QUEUE_S, 1.0, FREE))


class Moment(NamedTuple):
    """Now: by the wall for deadlines, and by a clock that never jumps for everything else."""

    wall_ms: int
    at_s: float


class Near(msgspec.Struct, frozen=True):
    """Whose offers are in the nearer rings, and those of their rows that are looked at first, ascending, and whether these are all."""

    orgs: tuple[Sequence[int], Sequence[int]]
    rows: tuple[Codes, Codes]
    are_all: tuple[bool, bool]


class Question(msgspec.Struct, frozen=True):
    """What is asked of every offer of a shelf."""

    call: Call
    shelf: Shelf
    columns: Columns
    outcomes: Outcomes
    kind_list: Sequence[Kind]
    near: Near
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


class Look(msgspec.Struct, frozen=True):
    """Some rows of a shelf as the call sees them, ascending in each ring, and what stops each. Every ordered row before `end` is there.

    `near` are the places of the rows of the nearer rings, by ring. What follows `end` is of all rows, but says nothing of those that
    something stops; where that is all of them, only `able` is there. `quiet` is the cost with the rent.
    """

    question: Question
    rows: Codes
    codes: Codes
    near: tuple[Codes, Codes]
    end: int
    facts: Facts
    times: Times
    chances: Floats
    cost: Floats
    quiet: Floats
    score: Floats
    able: Flags

    def node_id(self, at: int) -> NodeId:
        return self.question.shelf.nodes[self.rows.item(at)]

    def stopped(self, code: int) -> Codes:
        """The rows that a limit stopped, or none (FREE)."""
        rows: Codes = self.rows[self.codes == code]
        return rows

    def able_in(self, ring: Ring) -> Codes:
        """The places of the offers of a ring that are able."""
        if ring != "market":
            near = self.near[RINGS.index(ring)]
            return near[self.able[near]] if len(near) else near
        able = self.able
        if len(self.near[0]) + len(self.near[1]):
            able = able.copy()
            able[self.near[0]] = able[self.near[1]] = False
        found: Codes = able.nonzero()[0]
        return found


def targets_of(call: Call, now: Moment) -> Targets:
    """The targets in seconds from now."""
    needs, waited_s = call.needs, (now.wall_ms - call.arrived_at_ms) / 1000
    return Targets(
        math.inf if needs.first_token_within_ms is None else needs.first_token_within_ms / 1000 - waited_s,
        math.inf if needs.per_token_within_ms is None else needs.per_token_within_ms / 1000,
        math.inf if needs.deadline_at_ms is None else (needs.deadline_at_ms - now.wall_ms) / 1000,
    )


def question(
    call: Call,
    market: Market,
    shelf: Shelf,
    *,
    tried: Collection[NodeId] = (),
    now: Moment,
    trusts_cards: bool = False,
    only_free: bool = False,
) -> Question:
    """The call put as a question to the offers of a shelf."""
    needs = call.needs
    prompt = market.prompts.tokens(call)
    length = market.lengths.expected(call.key_id, shelf.model, limit=needs.output_tokens_max)
    row_of, rare = shelf.row_of, shelf.on_probation
    return Question(
        call=call,
        shelf=shelf,
        columns=shelf.columns,
        outcomes=market.kinds.outcomes(sought_by(call)),
        kind_list=market.kinds.list,
        near=_near(call, market, shelf),
        prompt=prompt,
        length=length,
        limit=math.inf if needs.output_tokens_max is None else float(needs.output_tokens_max),
        targets=targets_of(call, now),
        warm=market.warmth.of(call, shelf, prompt) if call.prefix else {},
        tried=frozenset(row for node_id in tried if (row := row_of.get(node_id)) is not None) if tried else _NO_ROWS,
        on_probation=frozenset(row_of[node_id] for node_id in rare) if rare and not can_be_spared(call) else _NO_ROWS,
        miss=shelf.miss(prompt, length.mean_tokens),
        now_s=now.at_s,
        trusts_cards=trusts_cards,
        only_free=only_free,
    )


def _near(call: Call, market: Market, shelf: Shelf) -> Near:
    known = market.orgs  # whom nobody knows has no offers
    own = known.get(call.org_id, -1)
    partners = [number for org in call.needs.partners if (number := known.get(org, -1)) != own]
    mine, are_mine = shelf.cheapest_of((own,), beyond=PARTS[0])
    theirs, are_theirs = shelf.cheapest_of(partners, beyond=PARTS[0])
    return Near(((own,), partners), (mine, theirs), (are_mine, are_theirs))


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
    return price.most(q.columns, rows, prompt=q.prompt, limit=q.limit)


def times(q: Question, f: Facts, w: Written, unread: Floats | float) -> Times:
    """When the answer would come from these offers."""
    minds = q.targets.per_token_s < math.inf or q.targets.end_s < math.inf
    return predict.times(f, w, unread=unread, prompt_mean=q.shelf.prompt_mean if minds else None, now_s=q.now_s)


def unread_of(q: Question, warm: Floats | None) -> Floats:
    """The tokens of the prompt that have to be read, as an array, since arithmetic with Python's numbers takes twice as long."""
    return np.array(q.prompt) if warm is None else q.prompt - warm


def weigh(q: Question, rows: Codes, found: Codes, near: tuple[Codes, Codes], f: Facts | None = None, *, end: int) -> Look:
    """Predict and price these rows, of which `found` stops some; `f` are their facts, where somebody has them already."""
    needs, shelf = q.call.needs, q.shelf
    free = found == _FREE
    if not np.count_nonzero(free):
        return _nothing(q, rows, found, near, end=end)
    if q.trusts_cards:
        f = predict.as_cards_say(shelf.table.rows(rows))
    elif f is None:
        f = shelf.table.facts(rows)
    warm, output = warm_of(q, rows), np.array(q.length.mean_tokens)
    unread = unread_of(q, warm)
    w = predict.written(f, output)
    t = times(q, f, w, unread)
    chances = predict.chance(t, q.targets, q.length, limit=q.limit)
    if needs.service_tier == "flex":  # it has the time to find out whether a node that failed has mended
        able = (chances >= _CHANCE_MIN) & (t.queue_s < _FLEX_QUEUE) & (f.over < _ONE)
        chances = chances * f.trust if shelf.doubted else chances
    else:
        chances = chances * f.trust if shelf.doubted else chances
        able = chances >= _CHANCE_MIN
    able &= free
    if q.only_free:
        idle = able & (f.over < _ONE)
        able = idle if np.count_nonzero(idle) else able
    if needs.strict:
        found[free & ~able] = CODE["too_slow"]
    cost = price.expected(f, w, unread=unread, warm=warm)
    quiet = price.quiet(f, w, cost, t.read_s) if shelf.has_rents else cost
    if needs.prefer == "fast":
        score = t.first_s + w.step_s
    else:
        score = _ONE - chances
        score *= np.array(q.miss)
        score += quiet
    return Look(q, rows, found, near, end, f, t, chances, cost, quiet, score, able)


def _nothing(q: Question, rows: Codes, found: Codes, near: tuple[Codes, Codes] = NOWHERE, *, end: int) -> Look:
    """A look at rows that are all stopped, of which nothing needs to be known."""
    none, able = _NO_NUMBERS, np.zeros(len(rows), np.bool_)
    return Look(q, rows, found, near, end, _NO_FACTS, _NO_TIMES, none, none, none, none, able)


def _codes(q: Question, rows: Codes, where: Codes | slice, outcomes: Outcomes) -> Codes:
    """What stops each of these rows, which are also `where`; `outcomes` are those of their kinds and rings."""
    needs, shelf = q.call.needs, q.shelf
    tokens = PROMPT_SURE * q.prompt
    is_long, has_expired = tokens > shelf.context, q.now_s >= shelf.expires_s
    price_max, cost_limit = needs.price_max_micro_per_munit, needs.cost_max_micro
    if not (is_long or has_expired or q.tried or q.on_probation) and price_max is None and cost_limit is None:
        return np.minimum(outcomes, q.columns.halt[where])  # nothing else can stop an offer: so it is with most calls
    ask = Ask(
        tokens=tokens if is_long else None,
        output_price_max=None if price_max is None else price_max / MUNIT,
        cost_max=None if cost_limit is None else float(cost_limit),
        tried=_places(rows, q.tried)[0] if q.tried else None,
        on_probation=_places(rows, q.on_probation)[0] if q.on_probation else None,
        expired_s=q.now_s if has_expired else None,
    )
    return codes(q.columns, where, outcomes, cost_max(q, where) if ask.cost_max is not None else None, ask)


def _places(rows: Codes, wanted: Collection[int]) -> tuple[Codes, list[int]]:
    """Where these rows stand among others, and which of them those are."""
    order = rows.argsort()
    found = [(at, row) for row, at in zip(wanted, np.searchsorted(rows, list(wanted), sorter=order).tolist(), strict=True)]
    there = [(order[at], row) for at, row in found if at < len(rows) and rows[order[at]] == row]
    return np.array([at for at, _ in there], np.intp), [row for _, row in there]


def warm_of(q: Question, rows: Codes) -> Floats | None:
    """The warm tokens of each of these rows; None if there are none."""
    if not q.warm:
        return None
    places, there = _places(rows, q.warm)
    if not there:
        return None
    warm = np.zeros(len(rows))
    warm[places] = [q.warm[row] for row in there]
    return warm


def first(q: Question) -> Look:
    """The first look: the cheapest offers and the newest, the quickest where that matters, and the cheapest of the nearer rings."""
    kind, near = q.columns.kind, q.near.rows
    end, more = _first_rows(q)
    if len(more):
        rows = np.concatenate((np.arange(end), more))
        where: Codes | slice = rows
        facts = q.shelf.table.joined(end, more)
        near = (rows.searchsorted(near[0]), rows.searchsorted(near[1]))
    else:
        rows, where, facts = np.arange(end), slice(0, end), q.shelf.table.first(end)
    kinds = kind[where]
    outcomes = q.outcomes[MARKET].take(kinds)
    for ring, places in enumerate(near):
        if len(places):
            outcomes[places] = q.outcomes[ring].take(kinds[places])
    return weigh(q, rows, _codes(q, rows, where, outcomes), near, facts, end=end)


def _first_rows(q: Question) -> tuple[int, Codes]:
    """All rows before some one, and some after it: these are looked at first by who may use the market."""
    shelf, count = q.shelf, len(q.shelf.nodes)
    if shelf.ordered <= PARTS[0]:
        return count, NOBODY
    end = PARTS[0]
    more = [near[near.searchsorted(end) : near.searchsorted(shelf.ordered)] for near in q.near.rows if len(near)]
    if q.call.needs.prefer == "fast":
        quick = shelf.quick[shelf.quick.searchsorted(end) :]
        nearer = _are_near(q, quick)
        more.append(quick if nearer is None else quick[~nearer])
    found = np.sort(np.concatenate(more)) if more else NOBODY
    return end, np.concatenate((found, np.arange(shelf.ordered, count))) if count > shelf.ordered else found


def nearer(q: Question) -> Look:
    """A look at the cheapest of the nearer rings alone, and the newest: most calls of who has machines go no further."""
    return _nearer(q, q.near.rows)


def _nearer(q: Question, near: tuple[Codes, Codes]) -> Look:
    own, partner = near
    first, count = len(own), len(own) + len(partner)
    if not count:
        return _nothing(q, NOBODY, NOBODY, end=0)
    rows = own if first == count else partner if not first else np.concatenate(near)
    outcomes = q.outcomes[int(not first)].take(q.columns.kind[rows])
    if 0 < first < count:
        outcomes[first:] = q.outcomes[1].take(q.columns.kind[partner])
    places = np.arange(count)
    return weigh(q, rows, _codes(q, rows, rows, outcomes), (places[:first], places[first:]), end=0)


def rest_of(q: Question, ring: Ring) -> Look | None:
    """The offers of a nearer ring that the first look left out; None if there are none."""
    number = RINGS.index(ring)
    if q.near.are_all[number]:
        return None
    rows = np.sort(np.array(q.shelf.of_orgs(q.near.orgs[number]), np.intp))
    is_left = np.ones(len(rows), np.bool_)
    is_left[rows.searchsorted(q.near.rows[number])] = False
    rows = rows[is_left]
    return _nearer(q, (NOBODY, rows) if number else (rows, NOBODY))


def further(look: Look) -> Look | None:
    """The next offers by their price, none of a nearer ring; None if there are no more."""
    q, begin = look.question, look.end
    if begin >= q.shelf.ordered or "market" not in q.call.needs.rings:
        return None
    end = min(next(part for part in PARTS if part > begin), q.shelf.ordered)
    rows, where = np.arange(begin, end), slice(begin, end)
    found = _codes(q, rows, where, q.outcomes[MARKET].take(q.columns.kind[where]))
    near = _are_near(q, where)
    if near is not None:
        found[near] = GONE  # they are looked at elsewhere
    if q.call.needs.prefer == "fast":
        quick = q.shelf.quick
        found[quick[quick.searchsorted(begin) : quick.searchsorted(end)] - begin] = GONE
    return weigh(q, rows, found, NOWHERE, q.shelf.table.between(begin, end), end=end)


def _are_near(q: Question, where: Codes | slice) -> Flags | None:
    """Which of these rows are in a nearer ring; None if none of the shelf is."""
    near = [org for orgs in q.near.orgs for org in orgs if org in q.shelf.orgs]
    if not near:
        return None
    orgs = q.columns.org[where]
    found: Flags = np.isin(orgs, near) if len(near) > FEW_ORGS else np.logical_or.reduce([orgs == org for org in near])
    return found


def floor(look: Look) -> float:
    """The least that a call can cost beyond the rows that were looked at; infinite if these were all, or what is able will do."""
    q, shelf, end = look.question, look.question.shelf, look.end
    if end >= shelf.ordered:
        return math.inf
    if q.call.needs.prefer == "fast":
        return math.inf if look.able.any() else 0.0
    return float(shelf.cheapest_prompt[end] * q.prompt + shelf.columns.output_price[end] * q.length.mean_tokens)


def everything(q: Question) -> Look:
    """All offers of the shelf at once, whatever ring they are in."""
    c, count = q.columns, len(q.shelf.nodes)
    rows = (c.stop[:count] != GONE).nonzero()[0]
    rings = np.full(len(rows), MARKET, np.intp)
    for ring, orgs in enumerate(q.near.orgs):
        rings[np.isin(c.org[rows], orgs)] = ring
    outcomes = q.outcomes[rings, c.kind[rows]]
    by_ring = ((rings == 0).nonzero()[0], (rings == 1).nonzero()[0])
    return weigh(q, rows, _codes(q, rows, rows, outcomes), by_ring, end=count)

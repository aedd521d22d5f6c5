"""A look at the offers of a shelf for one call: what stops each, when it would answer, how sure that is, what it costs."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fallow.core.match import pick, predict, price
from fallow.core.match.columns import GONE, Codes, Facts, Flags, Floats
from fallow.core.match.filter import CODE, LIMITS, MARKET, RINGS, Ask, Kind, codes, rings_of, sought_by
from fallow.core.match.lengths import Length
from fallow.core.match.market import Market, warm_column
from fallow.core.match.predict import Targets, Times
from fallow.core.match.price import MUNIT
from fallow.core.match.rent import Wanted
from fallow.core.match.rows import PARTS
from fallow.core.match.shelf import Shelf
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.needs import Ring

PROMPT_SURE = 0.3
"""The part of an estimated prompt that it has at least: a call isn't refused for a guess. What embeds takes many short texts."""
FLEX_QUEUE_S = 2.0
"""A call that can wait doesn't stand in the way of others: it goes where little is queued."""


PASSING: Flags = np.isin(np.arange(len(LIMITS) + 2), [0, *(CODE[name] for name in ("owner_is_back", "engine_failed", "busy", "too_slow"))])
"""By code, what stops an offer only for a while; the last is for the rows of offers that are gone."""


class Moment(NamedTuple):
    """Now: by the wall for deadlines, and by a clock that never jumps for everything else."""

    wall_ms: int
    at_s: float


Pool = Iterator["Look"]


class Question(NamedTuple):
    """What is asked of every offer of a shelf."""

    call: Call
    shelf: Shelf
    outcomes: Codes
    kind_list: Sequence[Kind]
    own: int
    partners: frozenset[int]
    prompt: float
    length: Length
    limit: float
    targets: Targets
    warm: dict[int, float]
    tried: frozenset[int]
    miss: float
    now_s: float
    trusts_cards: bool


class Look(NamedTuple):
    """Some rows of a shelf as the call sees them; `rows` are their places on the shelf."""

    question: Question
    facts: Facts
    rows: Codes
    rings: Codes | None
    codes: Codes
    times: Times
    chances: Floats
    cost: Floats
    cost_max: Floats
    score: Floats
    able: Flags
    is_part: bool
    """Whether it is a part of the whole shelf, rather than some rows of it."""

    def ring(self, at: int) -> Ring:
        return RINGS[MARKET if self.rings is None else int(self.rings[at])]

    def kind(self, at: int) -> Kind:
        return self.question.kind_list[int(self.facts.kind[at])]

    def node_id(self, at: int) -> NodeId:
        return self.question.shelf.nodes[int(self.rows[at])]


def targets_of(call: Call, now: Moment) -> Targets:
    """The targets in seconds from now."""
    needs, waited_s = call.needs, (now.wall_ms - call.arrived_at_ms) / 1000
    return Targets(
        math.inf if needs.first_token_within_ms is None else needs.first_token_within_ms / 1000 - waited_s,
        math.inf if needs.per_token_within_ms is None else needs.per_token_within_ms / 1000,
        math.inf if needs.deadline_at_ms is None else (needs.deadline_at_ms - now.wall_ms) / 1000,
    )


def question(call: Call, market: Market, shelf: Shelf, *, tried: Collection[NodeId], now: Moment, trusts_cards: bool = False) -> Question:
    """The call put as a question to the offers of a shelf."""
    needs = call.needs
    prompt = market.prompts.tokens(call)
    length = market.lengths.expected(call.key_id, shelf.model, limit=needs.output_tokens_max)
    limit = math.inf if needs.output_tokens_max is None else float(needs.output_tokens_max)
    return Question(
        call=call,
        shelf=shelf,
        outcomes=market.outcomes(sought_by(call)),
        kind_list=market.kinds,
        own=market.org(call.org_id),
        partners=frozenset(market.org(org) for org in needs.partners),
        prompt=prompt,
        length=length,
        limit=limit,
        targets=targets_of(call, now),
        warm=market.warmth.of(call, shelf, prompt),
        tried=frozenset(row for node_id in tried if (row := shelf.row_of.get(node_id)) is not None),
        miss=shelf.miss(prompt, length.mean_tokens),
        now_s=now.at_s,
        trusts_cards=trusts_cards,
    )


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


def look(q: Question, f: Facts, rows: Codes, warm: Floats | float, *, is_part: bool) -> Look:
    """Ask the question of these rows."""
    needs, shelf = q.call.needs, q.shelf
    output = q.length.mean_tokens
    t = predict.times(f, prompt=q.prompt, warm=warm, output_mean=output, prompt_mean=shelf.prompt_mean, now_s=q.now_s)
    chances = predict.chance(t, q.targets, q.length, limit=q.limit)
    cost = price.expected(f, prompt=q.prompt, warm=warm, output=output)
    limit = np.maximum(0.0, f.context - q.prompt) if q.limit == math.inf else q.limit
    cost_max = price.most(f, prompt=q.prompt, limit=limit)
    if q.own in shelf.orgs or any(partner in shelf.orgs for partner in q.partners):
        rings = rings_of(f, own=q.own, partners=q.partners)
        outcomes = q.outcomes[rings, f.kind]
    else:
        rings = None
        outcomes = q.outcomes[MARKET][f.kind]
    tokens = PROMPT_SURE * q.prompt
    ask = Ask(
        tokens=tokens if tokens > shelf.context else None,
        output_price_max=None if needs.price_max_micro_per_munit is None else needs.price_max_micro_per_munit / MUNIT,
        cost_max=None if needs.cost_max_micro is None else float(needs.cost_max_micro),
        tried=[int(at) for row in q.tried for at in np.flatnonzero(rows == row)] if q.tried else (),
        expired_s=q.now_s if q.now_s >= shelf.expires_s else None,
    )
    found = codes(f, outcomes, cost_max, ask)
    possible = found == 0
    able = possible & (chances >= pick.CHANCE_MIN)
    if needs.service_tier == "flex":
        able &= (t.queue_s < FLEX_QUEUE_S) & (f.held < f.slots)
    if needs.strict:
        found[possible & ~able] = CODE["too_slow"]
    if needs.prefer == "fast":
        score = t.first_s + output * t.step_s
    else:
        score = cost + (1.0 - chances) * q.miss + f.rent * price.work_s(f, t, output=output)
    return Look(q, f, rows, rings, found, t, chances, cost, cost_max, score, able, is_part)


def pool(q: Question, ring: Ring) -> Iterator[Look]:
    """The offers of a ring, the cheapest first: the next part is looked at only when it is asked for."""
    shelf, columns = q.shelf, q.shelf.columns
    if ring not in q.call.needs.rings:
        return
    if ring == "market":
        yield from _parts(q)
        return
    orgs = [org for org in ((q.own,) if ring == "own" else q.partners - {q.own}) if org in shelf.orgs]
    if orgs:
        count = len(shelf.nodes)
        mine = np.isin(columns.org[:count], orgs) if len(orgs) > 1 else columns.org[:count] == orgs[0]
        yield _picked(q, np.flatnonzero(mine & (columns.stop[:count] != GONE)))


def _picked(q: Question, rows: Codes) -> Look:
    warm: Floats | float = np.array([q.warm.get(int(row), 0.0) for row in rows]) if q.warm else 0.0
    columns = q.shelf.columns
    facts = predict.as_cards_say(columns.rows(rows)).facts(0, len(rows)) if q.trusts_cards else columns.facts_of(rows)
    return look(q, facts, rows, warm, is_part=False)


def _parts(q: Question) -> Iterator[Look]:
    """Newcomers, then the rows in their order; see `floor` for when the rest can't be better."""
    shelf = q.shelf
    count, ordered = len(shelf.nodes), shelf.ordered
    if q.call.needs.prefer == "fast" and len(shelf.quick) and ordered > PARTS[0]:
        yield _picked(q, shelf.quick)
    begin, size = (ordered, count - ordered) if count > ordered else (0, 0)
    if size:
        yield _part(q, begin, count)
    begin = 0
    for end in PARTS:
        if begin >= ordered:
            return
        yield _part(q, begin, min(end, ordered))
        begin = end


def _part(q: Question, begin: int, end: int) -> Look:
    columns = q.shelf.columns
    facts = predict.as_cards_say(columns.part(begin, end)).facts(0, end - begin) if q.trusts_cards else columns.facts(begin, end)
    return look(q, facts, np.arange(begin, end), warm_column(q.warm, begin, end), is_part=True)


def floor(look: Look) -> float:
    """The least that a call can cost beyond the rows that were just looked at; infinite if these were the last."""
    q = look.question
    shelf, begin, end = q.shelf, int(look.rows[0]), int(look.rows[-1]) + 1
    if q.call.needs.prefer == "fast":
        return math.inf if look.able.any() and len(look.rows) == len(shelf.quick) else 0.0
    if begin >= shelf.ordered or end - begin != len(look.rows):  # newcomers, or rows of a ring: they come before the rest
        return 0.0
    if end >= shelf.ordered:
        return math.inf
    return float(shelf.cheapest_prompt[end] * q.prompt + shelf.columns.output_price[end] * q.length.mean_tokens)


def when_quiet(look: Look) -> Floats:
    """What each offer would cost if it had nothing else to do; infinite for those that could not take the call then either."""
    work = price.work_s(look.facts, look.times, output=look.question.length.mean_tokens)
    return np.where(may_come(look), look.cost + look.facts.rent * work, math.inf)


def may_come(look: Look) -> Flags:
    """Which offers can take the call, now or when something has passed by itself."""
    return PASSING[look.codes]


def lateness(look: Look) -> Floats:
    """How many times longer than it should each offer takes, at the worst of the call's targets."""
    targets, t = look.question.targets, look.times
    end = t.first_s + look.question.length.mean_tokens * t.step_s
    late = np.maximum(t.first_s / max(1e-3, targets.first_s), t.step_s / max(1e-6, targets.per_token_s))
    return np.maximum(np.maximum(late, end / max(1e-3, targets.end_s)), 1e-9 * end)


def everything(q: Question) -> Look:
    """All offers of the shelf at once, whatever ring they are in."""
    return _picked(q, np.flatnonzero(q.shelf.columns.stop[: len(q.shelf.nodes)] != GONE))

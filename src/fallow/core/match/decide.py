"""Where a call goes: the offer that is likely to meet its needs at the least cost, or why there is none."""

import math
from collections.abc import Collection, Sequence

import msgspec
import numpy as np

from fallow.core.match import explain, otherwise, pick, price, survey
from fallow.core.match.columns import Codes, Floats
from fallow.core.match.filter import FREE, RINGS
from fallow.core.match.market import Market
from fallow.core.match.survey import Look, Moment, Question
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.needs import Ring
from fallow.model.quote import Place, Quote, Refuse, Wait

FLEX_RETRY_MS, FLEX_RETRY_MS_MAX, FLEX_RETRY_GROWTH = 1_000, 4_000, 0.1
"""A call that waits is asked again after a tenth of the time that it waited, within these bounds."""
FLEX_PATIENCE_S = 180.0
FLEX_LEFT = 0.4
"""A call that can wait does so for what it would choose if nothing was busy, so long and while so much of its time is left."""
HOPE_MIN = 0.5
"""Below this chance everywhere, a call that is late anyway goes where it is least late."""
OTHERS_MAX = 3
QUOTES_MAX = 20


def match(
    call: Call, market: Market, *, tried: Collection[NodeId] = (), now: Moment, attempt: int = 1, only_free: bool = False
) -> Place | Refuse | Wait:
    """Filter → predict → price → pick, ring by ring; or explain. `tried` are the nodes on which this call already failed.

    `only_free` keeps to offers with a free slot where there are any, since others wait for the cheaper ones too.
    """
    luck = pick.draw(call.gateway_id, call.id, attempt)
    questions = ask(call, market, tried=tried, now=now, trusts_cards=luck < pick.EXPLORE and not call.needs.strict, only_free=only_free)
    is_wide = "market" in call.needs.rings
    looks = [survey.first(q) if is_wide and only_free else survey.nearer(q) for q in questions]  # whether a slot is free, all must tell
    for ring in RINGS:
        if ring == "market" and is_wide and not only_free:
            looks[: len(questions)] = [survey.first(q) for q in questions]
        best: Best | None = None
        for look in looks[: len(questions)]:
            best = _best(look, ring, looks, best)
        if best is not None:
            return _patience(call, looks, best, ring, now) or _place(best, luck)
        if call.needs.service_tier == "flex" and _has_time(call, now) and any(otherwise.may_come(look, ring) for look in looks):
            return Wait(for_ms=_retry_ms(call, now), why="all that could take the call is busy now, and there is time")
    return _second_best(call, market, questions, looks)


def ask(
    call: Call, market: Market, *, tried: Collection[NodeId] = (), now: Moment, trusts_cards: bool = False, only_free: bool = False
) -> list[Question]:
    """The call as a question to each shelf that could answer it: one for a model, several for a family."""
    shelves = market.shelves(call.needs.model)
    return [survey.question(call, market, shelf, tried=tried, now=now, trusts_cards=trusts_cards, only_free=only_free) for shelf in shelves]


def quotes(call: Call, market: Market, *, now: Moment) -> tuple[tuple[Quote, ...], Refuse | None]:
    """What each offer would cost and promise, the best first, and what stopped the others. Nothing is run."""
    everything = [survey.everything(q) for q in ask(call, market, now=now)]
    found: list[tuple[bool, float, str, Quote]] = []
    for look in everything:
        possible = (look.codes == FREE).nonzero()[0]
        order = possible[np.lexsort((look.score[possible], ~look.able[possible]))[:QUOTES_MAX]].tolist()
        for at, quote in zip(order, quotes_of(look, order), strict=True):
            found.append((not look.able[at], float(look.score[at]), quote.node_id, quote))
    found.sort(key=lambda one: one[:3])
    refusal = explain.refuse(call, market, everything) if any((look.codes != FREE).any() for look in everything) or not found else None
    return tuple(quote for *_, quote in found[:QUOTES_MAX]), refusal


class Best(msgspec.Struct, frozen=True):
    """A look, the places of those that are able, their scores, and which of these is the least.

    `seen` is how many were able in this look and those before it.
    """

    look: Look
    able: Codes
    scores: Floats
    at: int
    score: float
    seen: int

    def is_before(self, other: "Best") -> bool:
        """Ties by id."""
        return self.score < other.score or (self.score == other.score and self._node_id() < other._node_id())

    def _node_id(self) -> NodeId:
        return self.look.node_id(int(self.able[self.at]))


def _best(look: Look, ring: Ring, looks: list[Look], best: Best | None) -> Best | None:
    """The best of a ring and of `best`. Of each part that can be worth a look: not if all it has costs more than what was found."""
    least, seen = math.inf, 0
    part: Look | None = look
    while part is not None:
        able = part.able_in(ring)
        if len(able):
            seen += len(able)
            scores = part.score[able]
            at = int(scores.argmin())
            found = Best(part, able, scores, at, float(scores[at]), seen)
            least = min(least, found.score)
            if best is None or found.is_before(best):
                best = found
        if ring != "market":
            part = survey.rest_of(part.question, ring) if part is look and not len(able) else None
        else:
            part = None if survey.floor(part) > least * (1.0 + pick.NEAR) else survey.further(part)
        if part is not None:
            looks.append(part)
    return best


def _place(best: Best, luck: float) -> Place:
    look, able, scores = best.look, best.able, best.scores
    at = pick.pick(scores, look.times.first_s[able], lambda at: look.node_id(able[at]), best=best.at, luck=luck)
    chosen = [able.item(at)]
    for _ in range(min(OTHERS_MAX, len(scores) - 1)):
        scores[at] = math.inf
        at = int(scores.argmin())
        chosen.append(able.item(at))
    quote, *others = quotes_of(look, chosen)
    return Place(node_id=quote.node_id, quote=quote, why=_why(look, best.seen), able=best.seen, others=tuple(others))


def _why(look: Look, able: int) -> str:
    least = "the quickest" if look.question.call.needs.prefer == "fast" else "the least expected cost"
    offers = "1 offer that was" if able == 1 else f"{able} offers that were"
    return f"{least} of {offers} likely to meet the call's needs" + (
        "; one call in a hundred believes what nodes say of themselves" if look.question.trusts_cards else ""
    )


def _patience(call: Call, looks: Sequence[Look], best: Best, ring: Ring, now: Moment) -> Wait | None:
    """A flex call waits for a cheaper offer that is busy now."""
    needs = call.needs
    if needs.service_tier != "flex" or needs.prefer == "fast" or not _has_time(call, now):
        return None
    quiet = min(otherwise.quiet_cost(look, ring) for look in looks)
    if otherwise.quiet_cost_at(best.look, int(best.able[best.at])) <= quiet * (1.0 + pick.NEAR):
        return None
    return Wait(for_ms=_retry_ms(call, now), why="a cheaper offer is busy now, and there is time")


def _retry_ms(call: Call, now: Moment) -> int:
    return round(min(FLEX_RETRY_MS_MAX, max(FLEX_RETRY_MS, FLEX_RETRY_GROWTH * (now.wall_ms - call.arrived_at_ms))))


def _has_time(call: Call, now: Moment) -> bool:
    waited_s = (now.wall_ms - call.arrived_at_ms) / 1000
    deadline = call.needs.deadline_at_ms
    left = math.inf if deadline is None else (deadline - now.wall_ms) / max(1, deadline - call.arrived_at_ms)
    return waited_s < FLEX_PATIENCE_S and left > FLEX_LEFT


def _second_best(call: Call, market: Market, questions: Sequence[Question], looks: Sequence[Look]) -> Place | Refuse:
    """Nothing is likely to meet the needs: a strict call is refused, any other goes where it is least late."""
    possible = [(look, (look.codes == FREE).nonzero()[0]) for look in looks]
    possible = [(look, free) for look, free in possible if len(free)]
    if not possible:
        resort = _last_resort(looks)
        if resort is not None:
            return resort
        return explain.refuse(call, market, looks if "market" in call.needs.rings else [survey.everything(q) for q in questions])
    hope = max(float(look.chances[free].max()) for look, free in possible)
    found: list[tuple[bool, float, NodeId, Look, int]] = []
    for look, free in possible:
        ranks = (look.score if hope >= HOPE_MIN and call.needs.prefer == "cheap" else otherwise.lateness(look))[free]
        is_full = look.facts.over[free] > 0.0 if look.question.only_free else np.zeros(len(ranks), np.bool_)
        ranks = np.where(is_full, math.inf, ranks) if not is_full.all() else ranks
        best = min((ranks == ranks.min()).nonzero()[0].tolist(), key=lambda at: look.node_id(free[at]))
        at = int(free[best])
        found.append((bool(is_full[best]), float(ranks[best]), look.node_id(at), look, at))
    *_, node_id, look, at = min(found, key=lambda one: one[:3])
    why = "no offer is likely to meet the call's needs; this one misses them least"
    return Place(node_id=node_id, quote=quotes_of(look, [at])[0], why=why, able=0)


def _last_resort(looks: Sequence[Look]) -> Place | None:
    """All that could take the call back off: rather than refused, it goes where that is over the soonest. No node is left alone forever."""
    found: list[tuple[float, float, NodeId, Look, int]] = []
    for until_s, look in filter(None, map(otherwise.backing_off, looks)):
        able = (look.codes == FREE).nonzero()[0]
        if len(able):
            late = otherwise.lateness(look)[able]
            at = min(able[late == late.min()].tolist(), key=look.node_id)
            found.append((until_s, float(late.min()), look.node_id(at), look, at))
    if not found:
        return None
    *_, node_id, look, at = min(found, key=lambda one: one[:3])
    why = "every offer that could take the call backs off; this one is tried"
    return Place(node_id=node_id, quote=quotes_of(look, [at])[0], why=why, able=0)


def quotes_of(look: Look, ats: Sequence[int]) -> list[Quote]:
    """Offers, by their places in a look, applied to the call's needs."""
    q, c, t, found = look.question, look.question.columns, look.times, []
    shelf, output, limit, prompt = q.shelf, q.length.mean_tokens, q.limit, q.prompt
    own, partners = q.near.orgs
    for at in ats:
        row = look.rows.item(at)
        first, step, chance = t.first_s.item(at), t.step_s.item(at), look.chances.item(at)
        kind, org = q.kind_list[c.kind.item(row)], c.org.item(row)
        quote = Quote(
            node_id=shelf.nodes[row],
            model=shelf.model,
            hardware=kind.hardware,
            ring="own" if org in own else "partner" if org in partners else "market",
            region=kind.region,
            cost_max_micro=price.promised(c, row, prompt=prompt, limit=limit),
            cost_expected_micro=price.rounded(look.cost.item(at)),
            first_token_in_ms=round(1000 * first),
            per_token_ms=int(1_000_000 * step + 0.5) / 1000,  # `round` with digits takes three times as long
            end_in_ms=round(1000 * (first + output * step)),
            chance=int(10_000 * chance + 0.5) / 10_000,
        )
        found.append(quote)
    return found

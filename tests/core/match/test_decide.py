"""Where a call goes: tier by tier and ring by ring, and what holds whatever is offered: limits, order, one more offer, short cuts."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match import pick
from fallow.core.match.decide import FLEX_LEFT, FLEX_PATIENCE_S, FLEX_RETRY_MS, OTHERS_MAX, QUOTES_MAX, match, quotes
from fallow.core.match.market import Market
from fallow.core.standing import Failed
from fallow.model.call import Call
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Needs, ServiceTier
from fallow.model.quote import Place, Quote, Refuse, Wait
from offers import (
    AT_S,
    CREDIT,
    EXPLORER_ID,
    NOW,
    PLAIN,
    WALL_MS,
    Lent,
    call_of,
    later,
    market_of,
    may,
    node_of,
    placed,
    put,
    quote_at,
    refused,
    some_lents,
    some_needs,
)

PROMISE = settings(max_examples=100)
PARTNERS = replace(PLAIN, partners=frozenset({OrgId("friend")}))
FLEX = replace(PLAIN, service_tier="flex", deadline_at_ms=WALL_MS + 3_600_000)
IN_TIME = replace(PLAIN, first_token_within_ms=1_000, per_token_within_ms=100)
CPU = Lent(node="cpu", kind="cpu", prefill=200.0, decode=10.0, output_price=CREDIT // 10)
GPU = Lent(node="gpu", kind="gpu", prefill=4_000.0, decode=100.0, output_price=CREDIT)
CHEAP = Lent(node="cheap", output_price=CREDIT // 10)
DEAR = Lent(node="dear", output_price=CREDIT)
SLOW = Lent(node="slow", prefill=10.0, decode=2.0, output_price=1)
SLOWER = Lent(node="slower", prefill=5.0, decode=1.0, output_price=0)


# Which one.
TAKEN: list[Any] = [
    pytest.param(PLAIN, [Lent(node="a")], "a", id="the only one"),
    pytest.param(PLAIN, [DEAR, replace(CHEAP, decode=1.0)], "cheap", id="cheap and slow, where nobody minds"),
    pytest.param(IN_TIME, [DEAR, replace(CHEAP, decode=1.0)], "dear", id="what is too slow isn't cheap"),
    pytest.param(IN_TIME, [DEAR, replace(CHEAP, prefill=50.0)], "dear", id="nor what begins too late"),
    pytest.param(PLAIN, [replace(DEAR, output_price=0, prompt_price=CREDIT // 10), CHEAP], "cheap", id="the sum counts"),
    pytest.param(replace(PLAIN, prompt_tokens=1), [replace(DEAR, output_price=0, prompt_price=CREDIT), CHEAP], "dear", id="of this call"),
    pytest.param(PLAIN, [Lent(node="b"), Lent(node="a")], "a", id="ties by id"),
    pytest.param(PLAIN, [Lent(node="a", others=1), Lent(node="b")], "b", id="the idler of equals"),
    pytest.param(PLAIN, [Lent(node="a", ready_in_ms=9_000), Lent(node="b")], "b", id="the one that has loaded"),
    pytest.param(PLAIN, [Lent(node="a", model="big"), DEAR], "dear", id="another model doesn't count"),
    pytest.param(IN_TIME, [Lent(node="a", prefill=0.0, decode=0.0), DEAR], "dear", id="measured before guessed"),
    pytest.param(replace(PLAIN, prefer="fast"), [CPU, GPU], "gpu", id="the quickest"),
    pytest.param(
        replace(PLAIN, prefer="fast"), [replace(GPU, others=30, slots=1, waiting_max=99), CPU], "cpu", id="the quickest as things are"
    ),
    pytest.param(replace(PLAIN, prefer="fast", cost_max_micro=40), [CPU, GPU], "cpu", id="the quickest for that money"),
    pytest.param(replace(IN_TIME, service_tier="priority", prefer="fast"), [CPU, GPU, CHEAP], "gpu", id="priority"),
    pytest.param(replace(PLAIN, model="kin"), [replace(DEAR, family="kin"), Lent(node="b", model="big", family="kin")], "b", id="a family"),
    pytest.param(
        replace(PLAIN, model="kin", quantisations=frozenset({"q8_0"})),
        [Lent(node="a", family="kin", quantisation="Q4_0"), replace(DEAR, model="big", family="kin", quantisation="Q8_0")],
        "dear",
        id="of a family, the quantisation allowed",
    ),
    # When none is likely to meet the needs, a call of the default tier goes where it is least late.
    pytest.param(IN_TIME, [SLOW, SLOWER], "slow", id="least late"),
    pytest.param(IN_TIME, [replace(SLOW, node="b"), replace(SLOW, node="a")], "a", id="ties of the late by id"),
    pytest.param(replace(IN_TIME, prefer="fast"), [SLOW, SLOWER], "slow", id="least late for the hasty"),
    pytest.param(
        replace(PLAIN, deadline_at_ms=WALL_MS + 1_000), [SLOW, SLOWER, replace(CHEAP, others=4)], "slow", id="late is better than refused"
    ),
    pytest.param(
        replace(PLAIN, first_token_within_ms=1_010),
        [Lent(node="a", prefill=100.0), Lent(node="b", prefill=99.0, output_price=1)],
        "b",
        id="of those with an even chance, the cheapest",
    ),
]


@pytest.mark.parametrize(("needs", "lents", "taken"), TAKEN)
def test_which_one(needs: Needs, lents: list[Lent], taken: str) -> None:
    for order in (lents, lents[::-1]):
        market = market_of(order)
        place = placed(match(call_of(needs), market, now=NOW))
        assert place.node_id == place.quote.node_id == taken
        assert place.quote == quote_at(market, call_of(needs), taken)


@pytest.mark.parametrize(
    ("within_s", "taken", "hardware"), [(1.5, "gpu", "gpu"), (5.0, "gpu", "gpu"), (8.0, "cpu", "cpu"), (3_600.0, "cpu", "cpu")]
)
def test_two_deadlines_two_kinds_of_hardware(within_s: float, taken: str, hardware: str) -> None:
    """50 tokens take the CPU 5.5 s and the GPU half a second; the answer says which it was."""
    needs = replace(PLAIN, deadline_at_ms=WALL_MS + round(1000 * within_s))
    place = placed(match(call_of(needs), market_of([CPU, GPU]), now=NOW))
    assert (place.node_id, place.quote.hardware) == (taken, hardware)
    assert place.quote.chance >= pick.CHANCE_MIN
    assert place.quote.end_in_ms <= 1000 * within_s


def test_what_a_place_says() -> None:
    lents = [Lent(node=f"node-{at}", output_price=CREDIT * (1 + at)) for at in range(6)]
    place = placed(match(call_of(), market_of([*lents, Lent(node="paused", state="pause")]), now=NOW))
    assert (place.node_id, place.able) == ("node-0", 6)
    assert [quote.node_id for quote in place.others] == ["node-1", "node-2", "node-3"]
    assert place.why == "the least expected cost of 6 offers that were likely to meet the call's needs"
    quickest = placed(match(call_of(replace(PLAIN, prefer="fast")), market_of([CPU, GPU]), now=NOW))
    assert quickest.why == "the quickest of 2 offers that were likely to meet the call's needs"
    assert placed(match(call_of(), market_of([CHEAP]), now=NOW)).others == ()
    late = placed(match(call_of(IN_TIME), market_of([SLOW]), now=NOW))
    assert (late.able, late.why) == (0, "no offer is likely to meet the call's needs; this one misses them least")


# Rings.
@pytest.mark.parametrize(
    ("needs", "lents", "taken"),
    [
        pytest.param(PARTNERS, [CHEAP, replace(DEAR, org="friend")], "dear", id="a dear partner before a cheap market"),
        pytest.param(PARTNERS, [replace(CHEAP, org="friend"), replace(DEAR, org="home")], "dear", id="a dear own node before both"),
        pytest.param(IN_TIME, [CHEAP, replace(SLOW, org="home")], "cheap", id="spills over where the own one would miss"),
        pytest.param(PLAIN, [CHEAP, replace(SLOW, org="home")], "slow", id="but not where nobody minds"),
        pytest.param(
            replace(IN_TIME, rings=frozenset({"own"})), [CHEAP, replace(SLOW, org="home")], "slow", id="nor where the key forbids"
        ),
        pytest.param(PLAIN, [CHEAP, replace(DEAR, org="home", state="pause")], "cheap", id="the owner of the own one is back"),
        pytest.param(PLAIN, [CHEAP, replace(DEAR, org="home", others=4)], "cheap", id="the own one is full"),
        pytest.param(
            replace(PARTNERS, first_token_within_ms=1_000, rings=frozenset({"own", "market"})),
            [replace(CHEAP, org="friend"), DEAR, replace(SLOW, org="home")],
            "dear",
            id="a ring between may be left out",
        ),
        pytest.param(IN_TIME, [replace(SLOWER, org="home"), SLOW], "slow", id="if every ring would miss, the least late of all"),
    ],
)
def test_rings_come_one_after_another(needs: Needs, lents: list[Lent], taken: str) -> None:
    assert node_of(match(call_of(needs), market_of(lents), now=NOW)) == taken


def test_a_ring_that_was_tried_is_left() -> None:
    market = market_of([CHEAP, replace(DEAR, org="home")])
    assert node_of(match(call_of(), market, now=NOW)) == "dear"
    assert node_of(match(call_of(), market, tried=(NodeId("dear"),), now=NOW)) == "cheap"


# Tiers.
def test_strict_is_refused_where_default_would_be_late() -> None:
    market = market_of([SLOW, SLOWER])
    refusal = refused(match(call_of(replace(IN_TIME, strict=True)), market, now=NOW))
    assert [(one.limit, one.offers) for one in refusal.stopped] == [("too_slow", 2)]
    assert node_of(match(call_of(IN_TIME), market, now=NOW)) == "slow"


BUSY = replace(CHEAP, others=2)
"""Its slots are taken."""


@pytest.mark.parametrize(
    ("lents", "waits_for"),
    [
        pytest.param([BUSY], "all that could take the call is busy now, and there is time", id="all are busy"),
        pytest.param([replace(BUSY, others=4)], "all that could take the call is busy now, and there is time", id="all are full"),
        pytest.param([BUSY, DEAR], "a cheaper offer is busy now, and there is time", id="the cheap one is busy"),
        pytest.param([CHEAP, DEAR], None, id="the cheap one is idle"),
        pytest.param([CHEAP, replace(DEAR, others=2)], None, id="only the dear one is busy"),
        pytest.param([BUSY, replace(DEAR, output_price=CREDIT // 10 + 1)], None, id="a busy one that is hardly cheaper"),
    ],
)
def test_flex_waits_while_what_it_would_choose_is_busy(lents: list[Lent], waits_for: str | None) -> None:
    decision = match(call_of(FLEX), market_of(lents), now=NOW)
    assert decision == Wait(for_ms=FLEX_RETRY_MS, why=waits_for) if waits_for else isinstance(decision, Place)
    assert isinstance(match(call_of(), market_of(lents), now=NOW), Place) == any(lent.others < 4 for lent in lents)  # others don't


@pytest.mark.parametrize(
    ("waited_s", "deadline_s", "waits"),
    [
        (0.0, 3_600.0, True),
        (FLEX_PATIENCE_S - 1, 3_600.0, True),
        (FLEX_PATIENCE_S, 3_600.0, False),
        (0.0, 10.0, True),
        (5.9, 10.0, True),
        (10.0 * (1 - FLEX_LEFT), 10.0, False),
        (20.0, 10.0, False),
    ],
)
def test_flex_waits_no_longer_than_it_can(waited_s: float, deadline_s: float, waits: bool) -> None:
    needs = replace(FLEX, deadline_at_ms=WALL_MS + round(1000 * deadline_s))
    decision = match(call_of(needs), market_of([BUSY, DEAR]), now=later(waited_s))
    assert isinstance(decision, Wait if waits else Place)


@pytest.mark.parametrize("changes", [{"output_price": 2 * CREDIT}, {"region": "us"}, {"paths": frozenset()}, {"context": 10}])
def test_flex_does_not_wait_for_what_can_never_take_it(changes: dict[str, Any]) -> None:
    needs = replace(FLEX, price_max_micro_per_munit=CREDIT, regions=frozenset({"eu-de"}), prompt_tokens=1_000)
    assert isinstance(match(call_of(needs), market_of([replace(CHEAP, **changes)]), now=NOW), Refuse)


def test_flex_takes_an_idle_offer_whose_chance_will_do() -> None:
    """There is nothing to wait for."""
    needs = replace(FLEX, first_token_within_ms=300)
    market = market_of([replace(CHEAP, prefill=400.0 / 1.0)], refreshed=True)
    assert pick.CHANCE_MIN <= quote_at(market, call_of(needs), "cheap").chance < 0.99
    assert node_of(match(call_of(needs), market, now=NOW)) == "cheap"


def test_flex_waits_for_its_own_ring_while_it_can() -> None:
    market = market_of([CHEAP, replace(DEAR, org="home", others=2)])
    assert isinstance(match(call_of(FLEX), market, now=NOW), Wait)


def test_flex_that_prefers_speed_waits_for_nothing_idle() -> None:
    assert node_of(match(call_of(replace(FLEX, prefer="fast")), market_of([replace(GPU, output_price=0)]), now=NOW)) == "gpu"


# Where all back off.
def failed(lents: list[Lent], **faults: int) -> Market:
    """A market in which nodes failed so often in a row, the last time a moment before NOW."""
    market = market_of(lents)
    for node, count in faults.items():
        at_s = AT_S - 0.001 - sum(min(60, 2**more) for more in range(count - 1))
        for more in range(count):
            market.told(NodeId(node), Failed(code="node_silent"), now_s=at_s)
            at_s += min(60, 2**more)
    return market


RESORT: list[Any] = [
    pytest.param(PLAIN, [CHEAP], {"cheap": 9}, "cheap", id="the only one, however often it failed"),
    pytest.param(PLAIN, [CHEAP, DEAR], {"cheap": 3, "dear": 2}, "dear", id="the one that backs off for the shorter time"),
    pytest.param(PLAIN, [CHEAP, DEAR], {"cheap": 2, "dear": 3}, "cheap", id="the other way round"),
    pytest.param(PLAIN, [CHEAP, replace(CHEAP, node="quick", decode=40.0)], {"cheap": 1, "quick": 1}, "quick", id="or else the sooner"),
    pytest.param(PLAIN, [CHEAP, SLOW], {"cheap": 1}, "slow", id="only if there is nobody else"),
    pytest.param(PLAIN, [CHEAP, replace(DEAR, others=4)], {"cheap": 2, "dear": 1}, "cheap", id="not if it is full as well"),
    pytest.param(IN_TIME, [SLOWER], {"slower": 1}, "slower", id="late is better than refused here too"),
    pytest.param(replace(FLEX, deadline_at_ms=WALL_MS), [CHEAP], {"cheap": 2}, "cheap", id="a flex call that can't wait any more"),
    pytest.param(replace(PLAIN, service_tier="priority"), [CHEAP], {"cheap": 1}, None, id="priority is no probe"),
    pytest.param(replace(PLAIN, strict=True), [CHEAP], {"cheap": 1}, None, id="nor is strict"),
]


@pytest.mark.parametrize(("needs", "lents", "faults", "taken"), RESORT)
def test_no_call_is_refused_for_a_back_off_alone(needs: Needs, lents: list[Lent], faults: dict[str, int], taken: str | None) -> None:
    decision = match(call_of(needs), failed(lents, **faults), now=NOW)
    assert (decision.node_id if isinstance(decision, Place) else None) == taken
    assert isinstance(decision, Place) or refused(decision).limit == "backing_off"


def test_who_must_be_sure_goes_where_the_back_off_is_over() -> None:
    """If nobody probes, since all calls are such, the node is not left alone forever."""
    market, over = failed([CHEAP], cheap=1), later(1)
    market.refresh(now_s=over.at_s)
    for needs in (replace(PLAIN, service_tier="priority"), replace(PLAIN, strict=True)):
        place = placed(match(call_of(needs), market, now=over))
        assert (place.node_id, place.able, place.why) == ("cheap", 0, "every offer that could take the call backs off; this one is tried")
    hasty = replace(IN_TIME, strict=True, first_token_within_ms=100)
    assert refused(match(call_of(hasty), market, now=over)).limit == "backing_off"


def test_a_flex_call_waits_while_all_back_off() -> None:
    assert isinstance(match(call_of(FLEX), failed([CHEAP], cheap=1), now=NOW), Wait)


def test_what_was_tried_is_no_resort() -> None:
    assert refused(match(call_of(), failed([CHEAP], cheap=1), tried=(NodeId("cheap"),), now=NOW)).limit == "already_tried"


@PROMISE
@given(some_needs, some_lents, st.dictionaries(st.sampled_from([f"node-{letter}" for letter in "abcdefgh"]), st.integers(1, 8)))
def test_a_call_of_the_default_tier_is_never_refused_for_a_back_off(needs: Needs, lents: list[Lent], faults: dict[str, int]) -> None:
    call = call_of(needs)
    decision = match(call, failed(lents, **faults), now=NOW)
    able = {lent.node for lent in lents if may(call, lent)}
    assert isinstance(decision, Place) == bool(able)
    if isinstance(decision, Place):
        assert decision.node_id in (able - faults.keys() or able)


# Whatever is offered.
some_tried = st.just(frozenset[NodeId]()) | st.frozensets(st.sampled_from([NodeId(f"node-{letter}") for letter in "abc"]), max_size=2)
some_tier: st.SearchStrategy[ServiceTier] = st.sampled_from(["default", "default", "priority", "flex"])


@PROMISE
@given(some_needs, some_tier, st.booleans(), some_lents, some_tried)
def test_never_an_offer_that_breaks_a_limit(
    needs: Needs, tier: ServiceTier, strict: bool, lents: list[Lent], tried: frozenset[NodeId]
) -> None:
    needs = replace(needs, service_tier=tier, strict=strict and tier != "flex")
    call, market = call_of(needs), market_of(lents)
    able = {lent.node: lent for lent in lents if may(call, lent, tried=tried)}
    decision = match(call, market, tried=tried, now=NOW)
    match decision:
        case Place(quote=quote, others=others):
            assert {quote.node_id, *(other.node_id for other in others)} <= able.keys()
            assert quote.node_id not in {other.node_id for other in others}
            assert len(others) <= OTHERS_MAX
            assert all(keeps(needs, able[one.node_id], one) for one in (quote, *others))
        case Refuse():
            assert needs.strict or not able
        case Wait():
            assert tier == "flex"
    found, _ = quotes(call, market, now=NOW)
    assert {quote.node_id for quote in found} <= {lent.node for lent in lents if may(call, lent)}


def keeps(needs: Needs, lent: Lent, quote: Quote) -> bool:
    """Whether a quote says no more than the needs allow and nothing impossible."""
    ring = "own" if lent.org == "home" else "partner" if lent.org in needs.partners else "market"
    return (
        (quote.ring, quote.region, quote.hardware, quote.model) == (ring, lent.region, lent.kind, lent.model)
        and 0 <= quote.cost_expected_micro <= quote.cost_max_micro <= (needs.cost_max_micro or quote.cost_max_micro)
        and 0 <= quote.first_token_in_ms <= quote.end_in_ms
        and 0.0 <= quote.chance <= 1.0
        and (not needs.strict or quote.chance >= pick.CHANCE_MIN)
    )


@PROMISE
@given(some_needs, some_lents, some_tried)
def test_trying_on_visits_each_node_once_and_ends(needs: Needs, lents: list[Lent], tried: frozenset[NodeId]) -> None:
    call, market, visited = call_of(needs), market_of(lents), list(tried)
    attempt = 1
    while isinstance(decision := match(call, market, tried=visited, now=NOW, attempt=attempt), Place):
        assert decision.node_id not in visited
        visited.append(decision.node_id)
        attempt += 1
    assert set(visited) - tried == {lent.node for lent in lents if may(call, lent, tried=tried)}


def decided(call: Call, lents: list[Lent], *, tried: frozenset[NodeId] = frozenset()) -> Place | Refuse | Wait:
    return match(call, market_of(lents), tried=tried, now=NOW)


@PROMISE
@given(some_needs, some_tier, some_lents, st.integers(0, 2**32), st.sampled_from([call_of().id, EXPLORER_ID]))
def test_the_order_in_which_offers_came_changes_nothing(needs: Needs, tier: ServiceTier, lents: list[Lent], seed: int, id: Any) -> None:
    call = call_of(replace(needs, service_tier=tier), id)
    shuffled = random.Random(seed).sample(lents, len(lents))
    assert decided(call, shuffled) == decided(call, lents)
    assert quotes(call, market_of(shuffled), now=NOW) == quotes(call, market_of(lents), now=NOW)


@PROMISE
@given(some_needs, some_tier, some_lents)
def test_the_same_question_twice(needs: Needs, tier: ServiceTier, lents: list[Lent]) -> None:
    """Deciding changes nothing."""
    call, market = call_of(replace(needs, service_tier=tier)), market_of(lents)
    first = match(call, market, now=NOW)
    assert match(call, market, now=NOW) == first == decided(call, lents)


@PROMISE
@given(some_needs, some_lents, st.randoms(use_true_random=False))
def test_one_more_offer_never_raises_the_best_quote(needs: Needs, lents: list[Lent], luck: random.Random) -> None:
    call, market = call_of(replace(needs, prefer="cheap")), Market()
    best: tuple[bool, int] | None = None
    for lent in luck.sample(lents, len(lents)):
        put(market, lent)
        found, _ = quotes(call, market, now=NOW)
        now_best = (found[0].chance < pick.CHANCE_MIN, found[0].cost_expected_micro) if found else None
        assert best is None or (now_best is not None and now_best <= best)
        best = now_best


def test_quotes_are_ranked_and_few() -> None:
    lents = [Lent(node=f"node-{at:02}", output_price=CREDIT * (40 - at), decode=1.0 if at > 30 else 20.0) for at in range(40)]
    found, refusal = quotes(call_of(IN_TIME), market_of([*lents, Lent(node="paused", state="pause")]), now=NOW)
    assert [quote.node_id for quote in found] == [f"node-{at:02}" for at in range(30, 30 - QUOTES_MAX, -1)]
    assert refusal is not None
    assert [(one.limit, one.offers) for one in refusal.stopped] == [("owner_is_back", 1)]

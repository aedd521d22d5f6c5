"""What each limit stops and lets pass, and that rings come from both sides' organisations."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match.decide import match, quotes
from fallow.core.match.filter import CODE, FREE, LIMITS, ring_of
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment
from fallow.core.standing import BACK_OFF_S_MIN, HALF_LIFE_S, Event, Failed, Heard, Succeeded, Suspected, Yielded
from fallow.model.call import Call
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Isolation, Needs, Ring
from offers import (
    ALL_RINGS,
    AT_S,
    CHAT,
    CREDIT,
    EXPLORER_ID,
    NOW,
    PLAIN,
    Lent,
    call_of,
    later,
    looks,
    market_of,
    may,
    node_of,
    put,
    quote_at,
    refused,
    some_lents,
    some_needs,
    some_rings,
)

PROMISE = settings(max_examples=100)
FRIENDS = replace(PLAIN, partners=frozenset({OrgId("friend")}))
FRENCH = replace(PLAIN, countries=frozenset({"fr"}))
FOUR_BITS = replace(PLAIN, quantisations=frozenset({"q4_0", "q4_k_m"}))
LONG = replace(PLAIN, prompt_tokens=20_000)
CREDITS_20 = replace(PLAIN, cost_max_micro=20, output_tokens_max=100)
"""Of 100 tokens, each may cost 0.2 micro-credits: 0.2 credits per million."""


def ringed(*rings: Ring, needs: Needs = PLAIN) -> Needs:
    return replace(needs, rings=frozenset(rings))


# limit, call, an offer that it stops, the same offer just within the limit
STOPS: list[tuple[str, Call, Lent, Lent]] = [
    ("path_not_offered", call_of(path="/v1/completions"), Lent(), Lent(paths=frozenset({CHAT, "/v1/completions"}))),
    ("quantisation", call_of(FOUR_BITS), Lent(quantisation="Q8_0"), Lent(quantisation="Q4_K_M")),
    ("quantisation", call_of(FOUR_BITS), Lent(), Lent(quantisation="q4_0")),
    ("ring", call_of(ringed("own", "partner")), Lent(org="stranger"), Lent(org="home")),
    ("ring", call_of(ringed("own", "partner", needs=FRIENDS)), Lent(org="stranger"), Lent(org="friend")),
    ("ring", call_of(ringed("own", needs=FRIENDS)), Lent(org="friend"), Lent(org="home")),
    ("ring", call_of(ringed("market")), Lent(org="home"), Lent(org="stranger")),
    ("ring", call_of(), Lent(org="home", serves=frozenset({"partner", "market"})), Lent(org="home", serves=frozenset({"own"}))),
    ("ring", call_of(FRIENDS), Lent(org="friend", serves=frozenset({"own"})), Lent(org="friend", serves=frozenset({"partner"}))),
    ("lender_refuses", call_of(), Lent(refuses=frozenset({"home"})), Lent(refuses=frozenset({"friend"}))),
    ("lender_refuses", call_of(country="zz"), Lent(refuses_countries=frozenset({"zz"})), Lent(refuses_countries=frozenset({"unknown"}))),
    ("region", call_of(replace(PLAIN, regions=frozenset({"eu-de", "eu-fr"}))), Lent(region="eu-de-berlin"), Lent(region="eu-fr")),
    ("country", call_of(FRENCH), Lent(region="eu-de"), Lent(region="eu-fr-paris")),
    ("country", call_of(FRENCH), Lent(region="unknown"), Lent(region="eu-fr")),
    ("hardware", call_of(replace(PLAIN, hardware="gpu")), Lent(kind="cpu"), Lent(kind="gpu")),
    ("hardware", call_of(replace(PLAIN, hardware="cpu")), Lent(kind="gpu"), Lent(kind="cpu")),
    ("isolation", call_of(replace(PLAIN, isolation="landlock")), Lent(isolation="none"), Lent(isolation="landlock")),
    ("offer_expired", call_of(), Lent(expires_s=AT_S), Lent(expires_s=AT_S + 0.001)),
    ("over_context", call_of(LONG), Lent(context=2_048), Lent(context=32_768)),
    ("over_price", call_of(replace(PLAIN, price_max_micro_per_munit=50)), Lent(output_price=51), Lent(output_price=50)),
    ("over_price", call_of(replace(PLAIN, price_max_micro_per_munit=0)), Lent(output_price=1), Lent(output_price=0)),
    ("over_cost", call_of(CREDITS_20), Lent(output_price=CREDIT // 5 + 1), Lent(output_price=CREDIT // 5)),
    ("over_cost", call_of(CREDITS_20), Lent(output_price=CREDIT // 5, prompt_price=1), Lent(output_price=0, prompt_price=CREDIT // 10)),
    ("already_tried", call_of(), Lent(node="node-tried"), Lent(node="node-fresh")),
    ("owner_is_back", call_of(), Lent(state="pause"), Lent(state="throttle")),
    ("owner_is_back", call_of(), Lent(state="leave"), Lent(state="run")),
    ("engine_failed", call_of(), Lent(readiness="failed"), Lent(readiness="loading")),
    ("engine_failed", call_of(), Lent(readiness="failed"), Lent(readiness="cold")),
    ("backing_off", call_of(replace(PLAIN, strict=True)), Lent(fails=True), Lent()),
    ("backing_off", call_of(replace(PLAIN, service_tier="priority")), Lent(fails=True, others=4), Lent()),
    ("busy", call_of(), Lent(slots=2, waiting_max=2, others=4), Lent(slots=2, waiting_max=2, others=3)),
    ("busy", call_of(), Lent(slots=1, waiting_max=0, others=1), Lent(slots=1, waiting_max=0)),
    ("busy", call_of(), Lent(slots=0, waiting_max=0), Lent(slots=1, waiting_max=0)),
    ("too_slow", call_of(replace(PLAIN, strict=True, per_token_within_ms=100)), Lent(decode=9.0), Lent(decode=30.0)),
    ("too_slow", call_of(replace(PLAIN, strict=True, first_token_within_ms=300)), Lent(prefill=300.0), Lent(prefill=600.0)),
    ("too_slow", call_of(replace(PLAIN, strict=True, deadline_at_ms=NOW.wall_ms + 5_000)), Lent(decode=9.0), Lent(decode=30.0)),
]
TRIED = (NodeId("node-tried"),)


@pytest.mark.parametrize(("limit", "call", "stopped", "fits"), STOPS)
def test_each_limit_stops_and_lets_pass(limit: str, call: Call, stopped: Lent, fits: Lent) -> None:
    alone = refused(match(call, market_of([stopped]), tried=TRIED, now=NOW))
    assert (alone.limit, [(one.limit, one.offers) for one in alone.stopped]) == (limit, [(limit, 1)])
    assert alone.lifted_by == alone.stopped[0].lifted_by
    assert node_of(match(call, market_of([fits]), tried=TRIED, now=NOW)) == fits.node


@pytest.mark.parametrize(("limit", "call", "stopped", "fits"), [row for row in STOPS if row[0] != "already_tried"])
def test_who_is_stopped_is_counted_beside_who_fits(limit: str, call: Call, stopped: Lent, fits: Lent) -> None:
    market = market_of([replace(stopped, node="node-1"), replace(fits, node="node-2"), replace(stopped, node="node-3")])
    assert node_of(match(call, market, now=NOW)) == "node-2"
    found, refusal = quotes(call, market, now=NOW)
    assert [quote.node_id for quote in found] == ["node-2"]
    assert refusal is not None
    assert [(one.limit, one.offers) for one in refusal.stopped] == [(limit, 2)]


def test_the_table_knows_every_limit() -> None:
    assert tuple(dict.fromkeys(limit for limit, *_ in STOPS)) == LIMITS
    assert {limit: 1 + LIMITS.index(limit) for limit in LIMITS} == CODE


WANTED = Needs(
    model="tiny",
    quantisations=frozenset({"q4_0"}),
    prompt_tokens=1_000,
    output_tokens_max=100,
    first_token_within_ms=2_000,
    cost_max_micro=10,
    price_max_micro_per_munit=CREDIT,
    strict=True,
    rings=frozenset({"own"}),
    regions=frozenset({"eu-fr", "us"}),
    countries=frozenset({"fr"}),
    hardware="gpu",
    isolation="bwrap",
)
WORST = Lent(
    node="node-tried",
    refuses=frozenset({"home"}),
    paths=frozenset(),
    prefill=10.0,
    context=64,
    output_price=9 * CREDIT,
    slots=1,
    waiting_max=0,
    readiness="failed",
    state="pause",
    expires_s=0.0,
    others=1,
    fails=True,
)
MENDED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("path_not_offered", {"paths": frozenset({CHAT})}),
    ("quantisation", {"quantisation": "q4_0"}),
    ("ring", {"org": "home"}),
    ("lender_refuses", {"refuses": frozenset()}),
    ("region", {"region": "us"}),
    ("country", {"region": "eu-fr"}),
    ("hardware", {"kind": "gpu"}),
    ("isolation", {"isolation": "bwrap"}),
    ("offer_expired", {"expires_s": AT_S + 9}),
    ("over_context", {"context": 4_096}),
    ("over_price", {"output_price": CREDIT}),
    ("over_cost", {"output_price": CREDIT // 10}),
    ("already_tried", {"node": "node-fresh"}),
    ("owner_is_back", {"state": "run"}),
    ("engine_failed", {"readiness": "ready"}),
    ("backing_off", {"fails": False}),
    ("busy", {"others": 0}),
    ("too_slow", {"prefill": 4_000.0}),
)
"""What an offer that nothing speaks for must change, limit by limit."""


def test_the_first_limit_in_the_order_is_the_one_that_counts() -> None:
    assert tuple(limit for limit, _ in MENDED) == LIMITS
    lent, met = WORST, []
    for _, change in MENDED:
        met.append(refused(match(call_of(WANTED), market_of([lent]), tried=TRIED, now=NOW)).limit)
        lent = replace(lent, **change)
    assert tuple(met) == LIMITS
    assert node_of(match(call_of(WANTED), market_of([lent]), tried=TRIED, now=NOW)) == "node-fresh"


def test_who_minds_nothing_gets_everything() -> None:
    anything = [
        Lent(node="node-b", region="unknown", kind="gpu", output_price=2**40),
        Lent(node="node-c", isolation="bwrap", readiness="cold", ready_in_ms=60_000),
        Lent(node="node-d", org="home", serves=frozenset({"own"}), readiness="loading", ready_in_ms=9, state="throttle"),
        Lent(node="node-e", prefill=0.0, decode=0.0, slots=0, waiting_max=1),
    ]
    found, refusal = quotes(call_of(), market_of(anything), now=NOW)
    assert {quote.node_id for quote in found} == {lent.node for lent in anything}
    assert refusal is None


@pytest.mark.parametrize("wanted", [None, "none", "landlock", "bwrap"])
@pytest.mark.parametrize("given_", ["none", "landlock", "bwrap"])
def test_a_stronger_isolation_does_for_a_weaker_one(wanted: Isolation | None, given_: Isolation) -> None:
    ranks = ["none", "landlock", "bwrap"]
    found, _ = quotes(call_of(replace(PLAIN, isolation=wanted)), market_of([Lent(isolation=given_)]), now=NOW)
    assert bool(found) == (wanted is None or ranks.index(given_) >= ranks.index(wanted))


# Backing off.
def told(market: Market, node: str, *events: Event, at_s: float = AT_S) -> Market:
    for event in events:
        market.told(NodeId(node), event, now_s=at_s)
    return market


def fitting(market: Market, call: Call, *, now: Moment = NOW) -> set[str]:
    """The nodes that nothing stops."""
    return {look.node_id(at) for look in looks(market, call, now=now) for at in (look.codes == FREE).nonzero()[0]}


FAULT = Failed(code="node_silent")
DEFAULT, PRIORITY, STRICT = call_of(), call_of(replace(PLAIN, service_tier="priority")), call_of(replace(PLAIN, strict=True))
FLEXIBLE = call_of(replace(PLAIN, service_tier="flex"))
PAIR = (Lent(node="node-1"), Lent(node="node-2"))


def test_a_back_off_outlives_what_the_node_says_of_itself() -> None:
    """A heartbeat with news, another price, another shelf's offer, being gone and back: none of that ends it."""
    market = told(market_of(PAIR), "node-1", FAULT)
    put(market, replace(PAIR[0], ready_in_ms=5))
    assert fitting(market, DEFAULT) == {"node-2"}
    put(market, replace(PAIR[0], output_price=5))
    assert fitting(market, DEFAULT) == {"node-2"}
    put(market, replace(PAIR[0], model="big"))
    assert fitting(market, call_of(replace(PLAIN, model="big"))) == set()
    market.drop(NodeId("node-1"))
    put(market, PAIR[0])
    assert fitting(market, DEFAULT) == {"node-2"}


def test_a_back_off_does_not_hide_the_nodes_own_state() -> None:
    market = told(market_of([replace(PAIR[0], state="pause")]), "node-1", FAULT)
    assert refused(match(DEFAULT, market, now=NOW)).limit == "owner_is_back"
    told(market, "node-1", Succeeded())
    assert refused(match(DEFAULT, market, now=NOW)).limit == "owner_is_back"
    put(market, PAIR[0])
    assert fitting(market, DEFAULT) == {"node-1"}


def test_after_the_back_off_calls_that_can_be_spared_go_one_by_one() -> None:
    market = told(market_of(PAIR), "node-1", FAULT)
    over = later(BACK_OFF_S_MIN)
    market.refresh(now_s=over.at_s)
    assert [fitting(market, call, now=over) for call in (DEFAULT, FLEXIBLE)] == 2 * [{"node-1", "node-2"}]
    assert [fitting(market, call, now=over) for call in (PRIORITY, STRICT)] == 2 * [{"node-2"}]
    market.began("probe", DEFAULT, quote_at(market, DEFAULT, "node-1", now=over), now_s=over.at_s)
    assert fitting(market, DEFAULT, now=over) == {"node-2"}
    told(market, "node-1", Yielded(), at_s=over.at_s)  # it told nothing
    assert fitting(market, DEFAULT, now=over) == {"node-1", "node-2"}
    told(market, "node-1", Succeeded(), at_s=over.at_s)
    assert [fitting(market, call, now=over) for call in (DEFAULT, PRIORITY, STRICT)] == 3 * [{"node-1", "node-2"}]


def test_who_is_suspected_is_left_aside_until_it_is_heard() -> None:
    market = told(market_of(PAIR), "node-1", Suspected())
    market.refresh(now_s=AT_S + 1e6)
    assert fitting(market, DEFAULT) == {"node-2"}
    told(market, "node-1", Heard())
    assert fitting(market, PRIORITY) == {"node-1", "node-2"}


def test_a_few_calls_find_out_whether_who_often_failed_has_mended() -> None:
    """The others go where they are more likely to come to their end, as long as that exists."""
    market = market_of([replace(PAIR[0], output_price=0), PAIR[1]])
    for _ in range(5):
        told(market, "node-1", FAULT, Succeeded())
    assert quote_at(market, DEFAULT, "node-1").chance < 0.95 <= quote_at(market, DEFAULT, "node-2").chance
    assert node_of(match(DEFAULT, market, now=NOW)) == "node-2"
    assert node_of(match(call_of(id=EXPLORER_ID), market, now=NOW)) == "node-1"
    assert node_of(match(FLEXIBLE, market, now=NOW)) == "node-1"
    much_later = later(10 * HALF_LIFE_S)
    market.refresh(now_s=much_later.at_s)
    assert node_of(match(call_of(at=much_later), market, now=much_later)) == "node-1"


@pytest.mark.parametrize(("stream", "kind"), [(True, "first_token_in_ms"), (False, "end_in_ms")])
def test_an_attempt_that_ended_is_held_against_its_promise(stream: bool, kind: str) -> None:
    market, call = market_of(PAIR), call_of(stream=stream)
    quote = quote_at(market, call, "node-1")
    market.began("call", call, quote, now_s=AT_S)
    if stream:  # else nobody tells
        market.first("call", now_s=AT_S + 2)
    promised_s, took_s = market.ended("call", call, None, now_s=AT_S + 7)
    assert (promised_s, took_s) == pytest.approx((getattr(quote, kind) / 1000, 2.0 if stream else 7.0))
    assert market.ended("call", call, None, now_s=AT_S + 8) == (0.0, None)
    market.began("mute", call_of(), quote, now_s=AT_S)
    assert market.ended("mute", call, None, now_s=AT_S + 9)[1] is None


# Rings.
@pytest.mark.parametrize(
    ("org", "card_org", "partners", "ring"),
    [
        ("home", "home", (), "own"),
        ("home", "home", ("home",), "own"),
        ("home", "friend", ("friend",), "partner"),
        ("home", "friend", (), "market"),
        ("home", "friend", ("other",), "market"),
        ("friend", "home", ("friend",), "market"),  # that they named us makes us no partner of theirs
    ],
)
def test_ring_of(org: str, card_org: str, partners: tuple[str, ...], ring: Ring) -> None:
    assert ring_of(OrgId(org), OrgId(card_org), [OrgId(partner) for partner in partners]) == ring
    call = call_of(replace(PLAIN, partners=frozenset(map(OrgId, partners))), org=org)
    assert [quote.ring for quote in quotes(call, market_of([Lent(org=card_org)]), now=NOW)[0]] == [ring]


@PROMISE
@given(
    card_org=st.sampled_from(["home", "friend", "other"]),
    partners=st.frozensets(st.sampled_from([OrgId("friend"), OrgId("other")])),
    rings=some_rings,
    serves=some_rings,
)
def test_a_card_can_only_narrow_its_ring(
    card_org: str, partners: frozenset[OrgId], rings: frozenset[Ring], serves: frozenset[Ring]
) -> None:
    """Whatever a card says that it serves, its node stays in the ring of its organisation."""
    call = call_of(replace(PLAIN, rings=rings, partners=partners))
    ring: Ring = "own" if card_org == "home" else "partner" if card_org in partners else "market"
    for given_ in (ALL_RINGS, serves):
        market = market_of([Lent(org=card_org, serves=given_)])
        found, _ = quotes(call, market, now=NOW)
        assert bool(found) == (ring in rings & given_)
        if found:
            assert node_of(match(call, market, now=NOW)) == "node-a"
        else:
            assert refused(match(call, market, now=NOW)).limit == "ring"


def test_a_node_that_changes_its_organisation_changes_its_ring() -> None:
    """The former owner is not left with a look at nothing."""
    market = market_of([Lent(org="home"), Lent(node="node-b")])
    put(market, Lent(org="friend"))
    own = call_of(ringed("own"))
    assert refused(match(own, market, now=NOW)).limit == "ring"
    assert node_of(match(replace(own, org_id=OrgId("friend")), market, now=NOW)) == "node-a"


# All together.
@PROMISE
@given(some_needs, some_lents, *2 * [st.frozensets(st.sampled_from([NodeId("node-a"), NodeId("node-b")]))])
def test_every_offer_either_may_or_is_counted_once(
    needs: Needs, lents: list[Lent], tried: frozenset[NodeId], failing: frozenset[NodeId]
) -> None:
    lents = [replace(lent, fails=lent.node in failing) for lent in lents]
    call, market = call_of(needs), market_of(lents)
    everything = looks(market, call, tried=tried)
    fit = {look.node_id(at) for look in everything for at in (look.codes == FREE).nonzero()[0]}
    assert fit == {lent.node for lent in lents if may(call, lent, tried=tried)}
    offered = [lent for lent in lents if needs.model in (lent.model, lent.family)]
    assert sum(len(look.rows) for look in everything) == len(offered)
    assert all(1 <= code <= FREE for look in everything for code in look.codes)


@PROMISE
@given(some_needs, st.lists(some_lents, min_size=1, max_size=3))
def test_what_the_filter_remembers_of_a_call_holds_for_later_offers(needs: Needs, rounds: list[list[Lent]]) -> None:
    """Outcomes are remembered per kind of offer; a kind that comes later, or a node that changes its kind, is looked at too."""
    market, call = Market(), call_of(needs)
    known: dict[tuple[str, str], Lent] = {}
    for lents in rounds:
        for lent in lents:
            if lent.others == 0 and (lent.node, lent.model) in known:
                market.heard(NodeId(lent.node), lent.model, running=0, now_s=AT_S)
            put(market, lent)
            known[lent.node, lent.model] = lent
        everything = [(look, at) for look in looks(market, call) for at in (look.codes == FREE).nonzero()[0]]
        found = {(look.node_id(at), look.question.shelf.model) for look, at in everything}
        assert found == {key for key, lent in known.items() if may(call, lent)}

"""Where a call goes: what each limit stops, how a refusal is explained, which quote wins, and that no order of offers matters."""

import itertools
import random
from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match.candidate import Candidate
from fallow.core.match.decide import match
from fallow.core.match.explain import LIFTED_BY, RETRY_AFTER_MS, explain
from fallow.core.match.filter import LIMITS, ring_of, sieve
from fallow.core.match.pick import pick
from fallow.core.match.price import quote
from fallow.model.call import Call
from fallow.model.card import Card, Hardware
from fallow.model.ids import CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import HardwareKind, Isolation, Needs, Ring
from fallow.model.offer import Load, Offer, Price, Readiness, Speed
from fallow.model.owner import State
from fallow.model.quote import Place, Quote, Refuse

PROMISE = settings(derandomize=True, deadline=None, max_examples=60)
NOW = 1_000_000
CHAT = "/v1/chat/completions"
ALL_RINGS: frozenset[Ring] = frozenset({"own", "partner", "market"})
PLAIN = Needs(model="tiny", prompt_tokens=100, output_tokens_max=50)


def call(needs: Needs = PLAIN, *, path: str = CHAT, org: str = "home") -> Call:
    return Call(
        id=CallId("call"),
        org_id=OrgId(org),
        key_id=KeyId("key"),
        gateway_id=GatewayId("gw"),
        path=path,
        stream=True,
        body_bytes=400,
        needs=needs,
        arrived_at_ms=NOW,
    )


def candidate(
    node: str = "node-a",
    *,
    org: str = "home",
    serves: Collection[Ring] = ALL_RINGS,
    region: str = "eu-de",
    kind: HardwareKind = "cpu",
    isolation: Isolation = "none",
    model: str = "tiny",
    paths: Collection[str] = (CHAT,),
    context: int = 4096,
    prefill: float = 100.0,
    decode: float = 10.0,
    prompt_price: int = 0,
    output_price: int = 0,
    slots: int = 2,
    expires_at_ms: int = NOW + 1,
    readiness: Readiness = "ready",
    ready_in_ms: int | None = None,
    waiting_max: int = 2,
    elsewhere: int = 0,
    in_flight: int = 0,
    state: State = "run",
    refuses: Collection[str] = (),
    refuses_countries: Collection[str] = (),
) -> Candidate:
    return Candidate(
        offer=Offer(
            node_id=NodeId(node),
            model=model,
            paths=frozenset(paths),
            context_tokens=context,
            model_digest="",
            speed=Speed(prefill_tokens_per_s=prefill, decode_tokens_per_s=decode),
            price=Price(prompt_micro_per_munit=prompt_price, output_micro_per_munit=output_price),
            slots=slots,
            expires_at_ms=expires_at_ms,
        ),
        card=Card(
            node_id=NodeId(node),
            org_id=OrgId(org),
            sequence=1,
            expires_at_ms=NOW + 10**6,
            hardware=Hardware(kind=kind, isa="x86_64-avx2", cores=8, memory_bytes=2**34),
            isolation=isolation,
            region=region,
            serves=frozenset(serves),
            refuses_organisations=frozenset(refuses),
            refuses_countries=frozenset(refuses_countries),
        ),
        state=state,
        load=Load(model=model, readiness=readiness, slots_free=slots, waiting=0, waiting_max=waiting_max, ready_in_ms=ready_in_ms),
        elsewhere=elsewhere,
        in_flight=in_flight,
    )


some_ring: st.SearchStrategy[Ring] = st.sampled_from(["own", "partner", "market"])
some_rings = st.frozensets(some_ring)
some_needs = st.builds(
    Needs,
    model=st.sampled_from(["tiny", "tiny", "tiny", "big"]),
    prompt_tokens=st.integers(0, 3_000),
    output_tokens_max=st.none() | st.integers(1, 500),
    price_max_micro_per_munit=st.none() | st.sampled_from([0, 50, 100]),
    rings=some_rings | st.just(ALL_RINGS),
    partners=st.frozensets(st.sampled_from([OrgId("friend"), OrgId("other")])),
    regions=st.just(frozenset()) | st.frozensets(st.sampled_from(["eu-de", "eu-fr"])),
    hardware=st.sampled_from([None, None, "cpu", "gpu"]),
    isolation=st.sampled_from([None, None, "none", "landlock", "bwrap"]),
)
"""Needs from a small world, so that every limit is met now and then, and ties are common."""


usual = st.sampled_from([True, True, True, False])
some_candidates = st.lists(
    st.builds(
        candidate,
        st.sampled_from([f"node-{letter}" for letter in "abcdefgh"]),
        org=st.sampled_from(["home", "friend", "other"]),
        serves=st.just(ALL_RINGS) | some_rings,
        region=st.sampled_from(["eu-de", "eu-fr"]),
        kind=st.sampled_from(["cpu", "gpu"]),
        isolation=st.sampled_from(["none", "landlock", "bwrap"]),
        model=usual.map(lambda yes: "tiny" if yes else "big"),
        paths=usual.map(lambda yes: (CHAT,) if yes else ("/v1/completions",)),
        prefill=st.sampled_from([0.0, 50.0, 400.0]),
        decode=st.sampled_from([0.0, 8.0, 30.0]),
        prompt_price=st.sampled_from([0, 10]),
        output_price=st.sampled_from([0, 50, 51, 100]),
        slots=st.integers(1, 3),
        expires_at_ms=usual.map(lambda yes: NOW + 1 if yes else NOW),
        readiness=usual.map(lambda yes: "ready" if yes else "failed"),
        ready_in_ms=st.sampled_from([None, None, 700]),
        waiting_max=st.integers(0, 2),
        elsewhere=st.integers(0, 2),
        in_flight=st.integers(0, 2),
    ),
    unique_by=lambda one: one.offer.node_id,
    max_size=5,
)
"""Offers of different nodes from the same small world."""


# The limits.
ORDER = [name for name, _ in LIMITS]
FRIENDS = replace(PLAIN, partners=frozenset({OrgId("friend")}))

# limit, call, an offer that it stops, the same offer just within the limit
STOPS: list[tuple[str, Call, Candidate, Candidate]] = [
    ("model_not_offered", call(), candidate(model="big"), candidate()),
    ("path_not_offered", call(path="/v1/completions"), candidate(), candidate(paths=(CHAT, "/v1/completions"))),
    ("offer_expired", call(), candidate(expires_at_ms=NOW), candidate(expires_at_ms=NOW + 1)),
    ("ring", call(), candidate(org="stranger"), candidate(org="home")),
    ("ring", call(FRIENDS), candidate(org="stranger"), candidate(org="friend")),
    ("ring", call(replace(FRIENDS, rings=frozenset({"own"}))), candidate(org="friend"), candidate(org="home")),
    ("ring", call(replace(PLAIN, rings=frozenset({"market"}))), candidate(org="home"), candidate(org="stranger")),
    ("ring", call(), candidate(serves={"partner", "market"}), candidate(serves={"own"})),
    ("ring", call(FRIENDS), candidate(org="friend", serves={"own"}), candidate(org="friend", serves={"own", "partner"})),
    ("lender_refuses", call(), candidate(refuses={"home"}), candidate(refuses={"friend"})),
    ("lender_refuses", replace(call(), country="zz"), candidate(refuses_countries={"zz"}), candidate(refuses_countries={"unknown"})),
    ("region", call(replace(PLAIN, regions=frozenset({"eu-de", "eu-fr"}))), candidate(region="us"), candidate(region="eu-fr")),
    ("hardware", call(replace(PLAIN, hardware="gpu")), candidate(kind="cpu"), candidate(kind="gpu")),
    ("hardware", call(replace(PLAIN, hardware="cpu")), candidate(kind="gpu"), candidate(kind="cpu")),
    ("isolation", call(replace(PLAIN, isolation="landlock")), candidate(isolation="none"), candidate(isolation="landlock")),
    ("over_price", call(replace(PLAIN, price_max_micro_per_munit=50)), candidate(output_price=51), candidate(output_price=50)),
    ("over_price", call(replace(PLAIN, price_max_micro_per_munit=0)), candidate(output_price=1), candidate(output_price=0)),
    ("already_tried", call(), candidate("node-tried"), candidate("node-fresh")),
    ("owner_is_back", call(), candidate(state="pause"), candidate(state="throttle")),
    ("owner_is_back", call(), candidate(state="leave"), candidate(state="run")),
    ("engine_failed", call(), candidate(readiness="failed"), candidate(readiness="loading")),
    ("busy", call(), candidate(slots=2, waiting_max=2, in_flight=3, elsewhere=1), candidate(slots=2, waiting_max=2, in_flight=3)),
    ("busy", call(), candidate(slots=1, waiting_max=0, elsewhere=1), candidate(slots=1, waiting_max=0)),
]


@pytest.mark.parametrize(("limit", "asked", "stopped", "fits"), STOPS)
def test_each_limit_stops_and_is_counted(limit: str, asked: Call, stopped: Candidate, fits: Candidate) -> None:
    tried = {NodeId("node-tried")}
    assert sieve(asked, [stopped, fits, stopped], tried=tried, now_ms=NOW) == ([fits], {limit: 2})


def test_the_table_knows_every_limit() -> None:
    assert list(dict.fromkeys(limit for limit, *_ in STOPS)) == ORDER


def test_who_minds_nothing_gets_everything() -> None:
    anything = [
        candidate("node-b", region="us", kind="gpu", output_price=10**9),
        candidate("node-c", isolation="bwrap", readiness="cold"),
        candidate("node-d", org="home", serves={"own"}, readiness="loading", ready_in_ms=9),
    ]
    assert sieve(call(), anything, tried=(), now_ms=NOW) == (anything, {})


def test_only_the_first_limit_in_the_order_is_counted() -> None:
    bad = candidate("node-tried", model="big", paths=(), expires_at_ms=0, org="stranger", readiness="failed", elsewhere=9)
    wanted = replace(PLAIN, regions=frozenset({"us"}), hardware="gpu", isolation="bwrap", price_max_micro_per_munit=0)
    mended = [
        bad,
        replace(bad, offer=replace(bad.offer, model="tiny")),
        replace(bad, offer=replace(bad.offer, model="tiny", paths=frozenset({CHAT}))),
        replace(bad, offer=replace(bad.offer, model="tiny", paths=frozenset({CHAT}), expires_at_ms=NOW + 1)),
    ]
    _, stopped = sieve(call(wanted), mended, tried={NodeId("node-tried")}, now_ms=NOW)
    assert list(stopped.items()) == [(limit, 1) for limit in ORDER[:4]]


@pytest.mark.parametrize("wanted", [None, "none", "landlock", "bwrap"])
@pytest.mark.parametrize("given_", ["none", "landlock", "bwrap"])
def test_a_stronger_isolation_does_for_a_weaker_one(wanted: Isolation | None, given_: Isolation) -> None:
    ranks = ["none", "landlock", "bwrap"]
    fit, _ = sieve(call(replace(PLAIN, isolation=wanted)), [candidate(isolation=given_)], tried=(), now_ms=NOW)
    assert bool(fit) == (wanted is None or ranks.index(given_) >= ranks.index(wanted))


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
    asked = call(replace(PLAIN, rings=rings, partners=partners))
    willing, _ = sieve(asked, [candidate(org=card_org, serves=ALL_RINGS)], tried=(), now_ms=NOW)
    ring: Ring = "own" if card_org == "home" else "partner" if card_org in partners else "market"
    assert bool(willing) == (ring in rings)
    picky, _ = sieve(asked, [candidate(org=card_org, serves=serves)], tried=(), now_ms=NOW)
    assert bool(picky) == (ring in rings and ring in serves)


@PROMISE
@given(some_needs, some_candidates)
def test_every_offer_either_passes_or_is_counted_once(needs: Needs, offers: list[Candidate]) -> None:
    fit, stopped = sieve(call(needs), offers, tried={NodeId("node-a")}, now_ms=NOW)
    assert len(fit) + stopped.total() == len(offers)
    assert fit == [offer for offer in offers if offer in fit]  # their order is kept
    assert set(stopped) <= set(ORDER)


# Why not.
def test_every_limit_can_be_lifted() -> None:
    assert LIFTED_BY.keys() == {"no_nodes", *ORDER}
    assert all(LIFTED_BY.values())


@pytest.mark.parametrize("limit", ORDER)
def test_a_single_limit_is_named(limit: str) -> None:
    refusal = explain(call(), [candidate()], Counter({limit: 3}))
    assert (refusal.limit, refusal.lifted_by, refusal.counts) == (limit, LIFTED_BY[limit], ((limit, 3),))


@pytest.mark.parametrize("at", range(1, len(ORDER)))
def test_the_most_promising_offer_decides_and_all_are_counted_in_order(at: int) -> None:
    stopped = Counter({ORDER[at]: 1, ORDER[at - 1]: 7, ORDER[0]: 2} if at > 1 else {ORDER[1]: 1, ORDER[0]: 2})
    refusal = explain(call(), [candidate()], stopped)
    assert refusal.limit == ORDER[at]
    assert refusal.counts == tuple((name, stopped[name]) for name in ORDER if stopped[name])


def test_no_nodes_at_all() -> None:
    assert match(call(), [], tried=(), now_ms=NOW) == Refuse(
        limit="no_nodes", lifted_by=LIFTED_BY["no_nodes"], retry_after_ms=RETRY_AFTER_MS
    )


def test_what_is_offered_is_listed_once_and_sorted() -> None:
    offers = [candidate("a", model="zeta"), candidate("b", model="alpha"), candidate("c", model="zeta")]
    refusal = match(call(), offers, tried=(), now_ms=NOW)
    assert isinstance(refusal, Refuse)
    assert refusal.models == ("alpha", "zeta")
    assert (refusal.limit, refusal.retry_after_ms) == ("model_not_offered", None)  # waiting won't help


@pytest.mark.parametrize(
    ("offers", "retry_after_ms"),
    [
        ([candidate(elsewhere=9)], RETRY_AFTER_MS),
        ([candidate(elsewhere=9, ready_in_ms=800)], 800),
        ([candidate("a", elsewhere=9, ready_in_ms=800), candidate("b", elsewhere=9, ready_in_ms=300)], 300),
        ([candidate(elsewhere=9, ready_in_ms=800), candidate("b", model="big", ready_in_ms=5)], 800),  # another model's
        ([candidate(elsewhere=9, ready_in_ms=0)], RETRY_AFTER_MS),
    ],
)
def test_when_to_try_again(offers: list[Candidate], retry_after_ms: int) -> None:
    refusal = match(call(), offers, tried=(), now_ms=NOW)
    assert isinstance(refusal, Refuse)
    assert (refusal.limit, refusal.retry_after_ms) == ("busy", retry_after_ms)


def test_a_refusal_as_a_whole() -> None:
    offers = [
        candidate("a", model="big"),
        candidate("b", region="us"),
        candidate("c", region="us"),
        candidate("d", output_price=90),
        candidate("e", model="big", output_price=90),
    ]
    needs = replace(PLAIN, regions=frozenset({"eu-de"}), price_max_micro_per_munit=80)
    assert match(call(needs), offers, tried=(), now_ms=NOW) == Refuse(
        limit="over_price",
        lifted_by="raise the price ceiling",
        counts=(("model_not_offered", 2), ("region", 2), ("over_price", 1)),
        models=("big", "tiny"),
        retry_after_ms=RETRY_AFTER_MS,
    )


# Which one.
def quoted(node: str, cost: int, end_ms: int, first_ms: int = 0) -> Quote:
    return Quote(node_id=NodeId(node), model="tiny", cost_max_micro=cost, first_token_in_ms=first_ms, end_in_ms=end_ms, certainty=0.5)


@pytest.mark.parametrize(
    ("quotes", "taken"),
    [
        ([quoted("b", 5, 100)], "b"),
        ([quoted("a", 6, 1), quoted("b", 5, 900)], "b"),  # cheap and slow before dear and fast
        ([quoted("a", 5, 101), quoted("b", 5, 100)], "b"),
        ([quoted("c", 5, 100), quoted("b", 5, 100), quoted("d", 5, 100)], "b"),
        ([quoted("c", 0, 9), quoted("b", 0, 9, first_ms=8)], "b"),  # the first token decides nothing
        ([quoted("node-10", 1, 1), quoted("node-9", 1, 1)], "node-10"),  # ids are text
    ],
)
def test_pick(quotes: list[Quote], taken: str) -> None:
    assert {pick(order).node_id for order in itertools.permutations(quotes)} == {taken}


def test_there_must_be_something_to_pick_from() -> None:
    with pytest.raises(AssertionError):
        pick([])


# All together.
NODES = [NodeId(f"node-{letter}") for letter in "abcdefgh"]
some_tried = st.just(frozenset[NodeId]()) | st.frozensets(st.sampled_from(NODES), max_size=3)


@pytest.mark.parametrize(
    ("offers", "taken"),
    [
        pytest.param([candidate("a")], "a", id="the only one"),
        pytest.param([candidate("a", output_price=10**6), candidate("b", output_price=10**5, decode=1.0)], "b", id="cheap and slow"),
        pytest.param([candidate("a", prompt_price=10**6), candidate("b", output_price=10**6)], "b", id="the sum counts"),
        pytest.param([candidate("a", decode=9.0), candidate("b", decode=10.0)], "b", id="the faster of equals"),
        pytest.param([candidate("a", in_flight=1), candidate("b")], "b", id="the idler of equals"),
        pytest.param([candidate("a", ready_in_ms=1), candidate("b")], "b", id="the one that has loaded"),
        pytest.param([candidate("b"), candidate("a"), candidate("c")], "a", id="ties by id"),
        pytest.param([candidate("a", model="big"), candidate("b", output_price=9)], "b", id="what can't take it doesn't count"),
        pytest.param([candidate("a", decode=0.0), candidate("b", decode=9.0)], "b", id="measured before guessed"),
    ],
)
def test_match(offers: list[Candidate], taken: str) -> None:
    decision = match(call(), offers, tried=(), now_ms=NOW)
    assert isinstance(decision, Place)
    assert decision.node_id == decision.quote.node_id == taken
    assert decision.quote == next(quote(PLAIN, offer) for offer in offers if offer.offer.node_id == taken)


@PROMISE
@given(some_needs, some_candidates, some_tried, st.integers(0, 2**32))
def test_the_order_of_the_roster_changes_nothing(needs: Needs, offers: list[Candidate], tried: frozenset[NodeId], seed: int) -> None:
    shuffled = random.Random(seed).sample(offers, len(offers))
    assert match(call(needs), shuffled, tried=tried, now_ms=NOW) == match(call(needs), offers, tried=tried, now_ms=NOW)


def may(needs: Needs, offer: Candidate, tried: frozenset[NodeId]) -> bool:
    """All limits once more, in other words."""
    org = offer.card.org_id
    ring = "own" if org == "home" else "partner" if org in needs.partners else "market"
    strength = {None: 0, "none": 0, "landlock": 1, "bwrap": 2}
    return all(
        (
            offer.offer.model == needs.model,
            CHAT in offer.offer.paths,
            offer.offer.expires_at_ms > NOW,
            ring in needs.rings & offer.card.serves,
            offer.card.region in (needs.regions or {offer.card.region}),
            needs.hardware is None or needs.hardware == offer.card.hardware.kind,
            strength[needs.isolation] <= strength[offer.card.isolation],
            needs.price_max_micro_per_munit is None or offer.offer.price.output_micro_per_munit <= needs.price_max_micro_per_munit,
            offer.offer.node_id not in tried,
            offer.load.readiness != "failed",
            offer.elsewhere + offer.in_flight < offer.offer.slots + offer.load.waiting_max,
        )
    )


@PROMISE
@given(some_needs, some_candidates, some_tried)
def test_a_place_is_the_cheapest_that_may_and_a_refusal_means_none(needs: Needs, offers: list[Candidate], tried: frozenset[NodeId]) -> None:
    able = {offer.offer.node_id: quote(needs, offer) for offer in offers if may(needs, offer, tried)}
    decision = match(call(needs), offers, tried=tried, now_ms=NOW)
    if isinstance(decision, Refuse):
        assert not able
        assert sum(count for _, count in decision.counts) == len(offers)
        return
    assert able[decision.node_id] == decision.quote
    best = min(able.values(), key=lambda q: (q.cost_max_micro, q.end_in_ms))
    assert (decision.quote.cost_max_micro, decision.quote.end_in_ms) == (best.cost_max_micro, best.end_in_ms)


@PROMISE
@given(some_needs, some_candidates)
def test_trying_on_visits_each_node_once_and_ends(needs: Needs, offers: list[Candidate]) -> None:
    visited: list[NodeId] = []
    while isinstance(decision := match(call(needs), offers, tried=visited, now_ms=NOW), Place):
        assert decision.node_id not in visited
        visited.append(decision.node_id)
    assert len(visited) == sum(may(needs, offer, frozenset()) for offer in offers)


@PROMISE
@given(some_needs, some_candidates)
def test_a_limit_that_is_named_is_one_that_stopped(needs: Needs, offers: list[Candidate]) -> None:
    decision = match(call(replace(needs, rings=frozenset())), offers, tried=(), now_ms=NOW)
    assert isinstance(decision, Refuse)  # nobody is in none of the rings
    assert decision.limit in ("no_nodes", "model_not_offered", "path_not_offered", "offer_expired", "ring")
    assert decision.limit == (decision.counts[-1][0] if offers else "no_nodes")

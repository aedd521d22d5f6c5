"""Why not: each refusal names its limit, counts the offers, gives the figure that would lift it, and says when to try again."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.admit import YIELDING_RETRY_AFTER_MS
from fallow.core.match.decide import match, quotes
from fallow.core.match.explain import LIFTED_BY, NAMES_MAX, NO_NODES, NOT_OFFERED, RETRY_AFTER_MS, RETRY_AFTER_MS_MAX
from fallow.core.match.filter import LIMITS
from fallow.core.match.market import Market
from fallow.core.needs import micro
from fallow.core.standing import Failed
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.needs import Needs
from fallow.model.quote import Refuse, Stopped, Wait
from offers import AT_S, CREDIT, NOW, PLAIN, Lent, call_of, later, market_of, may, node_of, put, refused, some_lents, some_needs

PROMISE = settings(max_examples=100)
F16 = replace(PLAIN, quantisations=frozenset({"f16"}))
STRICT = replace(PLAIN, strict=True, first_token_within_ms=100, per_token_within_ms=10)


def test_no_nodes_at_all() -> None:
    assert match(call_of(), Market(), now=NOW) == Refuse(limit="no_nodes", lifted_by=NO_NODES, retry_after_ms=RETRY_AFTER_MS)


def test_the_last_node_went() -> None:
    market = market_of([Lent()])
    market.drop(NodeId("node-a"))
    assert refused(match(call_of(), market, now=NOW)).limit == "no_nodes"


def test_what_is_offered_is_listed_once_and_sorted() -> None:
    market = market_of([Lent(node="a", model="zeta"), Lent(node="b", model="alpha"), Lent(node="c", model="zeta")])
    refusal = refused(match(call_of(), market, now=NOW))
    assert refusal == Refuse(limit="model_not_offered", lifted_by=NOT_OFFERED, models=("alpha", "zeta"))  # waiting won't help
    assert quotes(call_of(), market, now=NOW) == ((), refusal)


def dozen(**changes: object) -> list[Lent]:
    """Twelve offers; the price, the context and the speed tell them apart."""
    usual = [
        Lent(node=f"node-{at:02}", output_price=210_000 + 10_000 * at, context=1_024 + at, prefill=100.0 - at, decode=20.0 - at)
        for at in range(12)
    ]
    return [replace(lent, **changes) for lent in usual]


MIXED = [replace(lent, region=f"r{at}-fr", isolation="landlock", quantisation=f"Q{at}") for at, lent in enumerate(dozen())]
# call, offers, the limit, how many, what lifts it
FIGURES: list[tuple[Call, list[Lent], str, int, str]] = [
    (call_of(replace(PLAIN, price_max_micro_per_munit=200_000)), dozen(), "over_price", 12, r"raise max_price: the cheapest is 0\.21"),
    (call_of(replace(PLAIN, price_max_micro_per_munit=215_000)), dozen()[1:], "over_price", 11, r"raise max_price: the cheapest is 0\.22"),
    (call_of(replace(PLAIN, price_max_micro_per_munit=1)), dozen(output_price=2), "over_price", 12, r".*: the cheapest is 0\.000002"),
    (
        call_of(replace(PLAIN, cost_max_micro=1)),
        dozen(),
        "over_cost",
        12,
        r"raise max_cost, or lower the limit of the answer's tokens: the cheapest is 0\.000011",
    ),
    (call_of(replace(PLAIN, prompt_tokens=10_000)), dozen(), "over_context", 12, r"shorten the prompt: the longest context is 1035 tokens"),
    (
        call_of(STRICT),
        dozen(),
        "too_slow",
        12,
        r"leave out strict, .*: the first token can be expected after 1\.0 s at the soonest, a token takes 50 ms at the least, "
        r"and the best chance to meet all is 0 %",
    ),
    (call_of(replace(PLAIN, regions=frozenset({"us"}))), dozen(), "region", 12, r"allow another region; offered: eu-de"),
    (call_of(replace(PLAIN, countries=frozenset({"de"}))), MIXED, "country", 12, r"allow another country; offered in: r0-fr, r1-fr, .*"),
    (call_of(replace(PLAIN, isolation="bwrap")), MIXED, "isolation", 12, r"allow a lower isolation; offered: landlock"),
    (
        call_of(F16),
        dozen(),
        "quantisation",
        12,
        r"allow another quantisation; offered: unknown",
    ),
    (call_of(F16), MIXED, "quantisation", 12, r".*; offered: q0, q1, q10, q11, q2, q3"),
]


@pytest.mark.parametrize(("call", "lents", "limit", "count", "lifted_by"), FIGURES)
def test_a_refusal_counts_and_says_what_lifts_it(call: Call, lents: list[Lent], limit: str, count: int, lifted_by: str) -> None:
    refusal = refused(match(call, market_of(lents), now=NOW))
    assert (refusal.limit, refusal.stopped) == (limit, (Stopped(limit=limit, offers=count, lifted_by=refusal.lifted_by),))
    assert re.fullmatch(lifted_by, refusal.lifted_by), refusal.lifted_by


def test_a_list_of_what_is_offered_is_short() -> None:
    refusal = refused(match(call_of(replace(PLAIN, regions=frozenset({"us"}))), market_of(MIXED), now=NOW))
    assert len(refusal.lifted_by.split(": ")[1].split(", ")) == NAMES_MAX


ROUNDED = "explain._credits rounds to the nearest of 6 digits, so that half of the figures are a hair too low to be let through"


@pytest.mark.parametrize(
    ("name", "lent"),
    [
        ("price_max_micro_per_munit", Lent(output_price=210_000)),
        ("cost_max_micro", Lent(output_price=20 * CREDIT)),
        pytest.param("price_max_micro_per_munit", Lent(output_price=1_234_564)),
        pytest.param("cost_max_micro", Lent(prompt_price=123_457)),
    ],
)
def test_a_caller_who_raises_the_limit_to_the_figure_is_let_through(name: str, lent: Lent) -> None:
    """The figure is written in credits, as the caller writes the limit."""
    market, low = market_of([lent]), replace(PLAIN, **{name: 1})
    figure = float(refused(match(call_of(low), market, now=NOW)).lifted_by.rsplit(" ", 1)[1])
    assert node_of(match(call_of(replace(low, **{name: micro(figure)})), market, now=NOW)) == "node-a"


def test_every_limit_can_be_lifted() -> None:
    assert LIFTED_BY.keys() == set(LIMITS)
    assert all(LIFTED_BY.values())


def test_a_refusal_as_a_whole() -> None:
    """All limits that stopped offers are counted, in their order; the offer that came furthest names the refusal."""
    lents = [
        Lent(node="a", model="big"),
        Lent(node="b", output_price=90_000),
        Lent(node="c", region="us"),
        Lent(node="d", output_price=100_000),
        Lent(node="e", region="us", output_price=1),
        Lent(node="f", org="friend", refuses=frozenset({"home"})),
    ]
    needs = replace(PLAIN, regions=frozenset({"eu-de"}), price_max_micro_per_munit=80_000)
    price = "raise max_price: the cheapest is 0.09"
    assert match(call_of(needs), market_of(lents), now=NOW) == Refuse(
        limit="over_price",
        lifted_by=price,
        stopped=(
            Stopped(limit="lender_refuses", offers=1, lifted_by="the lenders don't work for this organisation or country"),
            Stopped(limit="region", offers=2, lifted_by="allow another region; offered: us"),
            Stopped(limit="over_price", offers=2, lifted_by=price),
        ),
        models=("big", "tiny"),
        retry_after_ms=RETRY_AFTER_MS,
    )


def test_a_refusal_counts_what_tiers_and_rings_left_aside() -> None:
    """Offers of a ring that the key doesn't allow are never looked at for a place, but a refusal knows them."""
    lents = [*dozen(), Lent(node="own", org="home", state="pause")]
    needs = replace(PLAIN, rings=frozenset({"own", "partner"}))
    refusal = refused(match(call_of(needs), market_of(lents), now=NOW))
    assert [(one.limit, one.offers) for one in refusal.stopped] == [("ring", 12), ("owner_is_back", 1)]


@pytest.mark.parametrize(
    ("lents", "retry_after_ms"),
    [
        pytest.param([Lent(state="pause")], YIELDING_RETRY_AFTER_MS, id="an owner stays for minutes"),
        pytest.param([Lent(state="pause"), Lent(node="b", readiness="failed")], RETRY_AFTER_MS, id="the soonest"),
        pytest.param([Lent(readiness="failed")], RETRY_AFTER_MS, id="an engine is soon restarted"),
        pytest.param([Lent(readiness="failed"), Lent(node="b", fails=True, others=4)], RETRY_AFTER_MS, id="a first fault is soon over"),
        pytest.param([Lent(others=4, decode=1_000.0, prefill=1e6)], RETRY_AFTER_MS, id="never sooner than a heartbeat"),
        pytest.param([Lent(others=4, decode=0.01)], RETRY_AFTER_MS_MAX, id="never so late that nobody comes back"),
    ],
)
def test_when_to_try_again(lents: list[Lent], retry_after_ms: int) -> None:
    assert refused(match(call_of(), market_of(lents), now=NOW)).retry_after_ms == retry_after_ms


def test_a_refusal_tells_when_the_first_node_has_backed_off() -> None:
    market = market_of([Lent(others=4), Lent(node="b", others=4)])
    for node, faults in (("node-a", 6), ("b", 4)):
        at_s = AT_S
        for _ in range(faults):
            market.told(NodeId(node), Failed(code="node_silent"), now_s=at_s)
            at_s = market.standings.of(NodeId(node), at_s).backs_off_until_s
    now = later(1 + 2 + 4 + 1)  # the fourth back-off is 8 s, of which 7 are left
    refusal = refused(match(call_of(at=now), market, now=now))
    assert (refusal.limit, refusal.retry_after_ms) == ("backing_off", 7_000)


def test_a_queue_has_moved_when_the_next_first_token_is_expected() -> None:
    crowd = [Lent(others=4, decode=5.0), Lent(node="b", others=4, decode=10.0)]
    slower, faster = (refused(match(call_of(), market_of(lents), now=NOW)).retry_after_ms for lents in (crowd[:1], crowd))
    assert slower is not None
    assert faster is not None
    assert RETRY_AFTER_MS < faster < slower < RETRY_AFTER_MS_MAX


def test_an_offer_that_came_back_is_explained_as_it_is_now() -> None:
    market = market_of([Lent(state="pause")])
    put(market, Lent(readiness="failed"), at_s=AT_S + 1)
    assert refused(match(call_of(), market, now=NOW)).limit == "engine_failed"


@PROMISE
@given(some_needs, some_lents, st.sampled_from(["default", "priority", "flex"]), st.booleans())
def test_a_refusal_accounts_for_every_offer(needs: Needs, lents: list[Lent], tier: str, strict: bool) -> None:
    needs = replace(needs, service_tier=tier, strict=strict and tier != "flex")
    call = call_of(needs)
    decision = match(call, market_of(lents), now=NOW)
    offered = [lent for lent in lents if needs.model in (lent.model, lent.family)]
    if not isinstance(decision, Refuse):
        assert any(may(call, lent) for lent in offered) or (isinstance(decision, Wait) and tier == "flex")
        return
    assert needs.strict or not any(may(call, lent) for lent in offered)
    if not offered:
        assert (decision.limit, decision.stopped) == ("model_not_offered" if lents else "no_nodes", ())
        return
    assert sum(one.offers for one in decision.stopped) == len(offered)
    assert [one.limit for one in decision.stopped] == [limit for limit in LIMITS if limit in {one.limit for one in decision.stopped}]
    assert (decision.limit, decision.lifted_by) == (decision.stopped[-1].limit, decision.stopped[-1].lifted_by)
    assert "inf" not in decision.lifted_by
    assert "nan" not in decision.lifted_by


@pytest.mark.parametrize("needs", [replace(PLAIN, regions=frozenset({"eu-de"})), replace(PLAIN, output_tokens_max=50, cost_max_micro=1)])
def test_who_went_away_is_not_counted(needs: Needs) -> None:
    market = market_of([Lent(node=f"node-{at}", region="us", output_price=9 * CREDIT) for at in range(3)])
    market.drop(NodeId("node-1"))
    assert [one.offers for one in refused(match(call_of(needs), market, now=NOW)).stopped] == [2]

"""What a market remembers of calls, keys, nodes and families; and that no number of a stranger breaks a decision."""

import numpy as np
import pytest
from msgspec.structs import replace

from fallow.core import prefix
from fallow.core.match.decide import match, quotes
from fallow.core.match.keys import KEYS_MAX, PROMPT_FACTOR_MAX, WARM_NODES_MAX
from fallow.core.match.market import Market
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.quote import Place, Quote
from fallow.model.receipt import Usage
from offers import (
    AT_S,
    CREDIT,
    NOW,
    PLAIN,
    WALL_MS,
    Lent,
    answer,
    call_id,
    call_of,
    later,
    market_of,
    node_of,
    put,
    quote_at,
    refused,
)

IN_TIME = replace(PLAIN, prompt_tokens=400, first_token_within_ms=3_000, per_token_within_ms=150)
LIAR = Lent(node="liar", prefill=400.0, decode=20.0, output_price=CREDIT // 10)
HONEST = Lent(node="honest", prefill=400.0, decode=20.0, output_price=CREDIT // 5)
LAME = Lent(node="lame", prefill=20.0, decode=2.0, output_price=CREDIT // 50)
"""Slow, and says so."""


def taught(market: Market, node: str, *, reads: float, writes: float, times: int = 12, from_s: float = 0.0) -> float:
    """The node answered so many calls at these speeds, one after another; how many seconds after NOW the last one ended."""
    at_s = AT_S + from_s
    for number in range(times):
        at_s = answer(
            market, call_of(replace(PLAIN, prompt_tokens=400), call_id(f"taught-{number}")), node, reads=reads, writes=writes, at_s=at_s
        )
        market.refresh(now_s=at_s)
    return at_s - AT_S


def quote(market: Market, node: str, passed_s: float = 0.0) -> Quote:
    at = later(passed_s)
    return quote_at(market, call_of(IN_TIME, at=at), node, now=at)


def place(market: Market, call: Call, passed_s: float = 0.0) -> str:
    return node_of(match(replace(call, arrived_at_ms=later(passed_s).wall_ms), market, now=later(passed_s)))


# Prompts.
def test_how_long_the_prompts_of_a_key_are_is_learnt_of_that_key() -> None:
    market = market_of([LIAR])
    for number in range(60):
        call = call_of(replace(PLAIN, prompt_tokens=100), call_id(f"prompt-{number}"))
        answer(market, call, "liar", reads=400.0, writes=20.0, prompt=200)
    assert market.prompts.tokens(call_of(replace(PLAIN, prompt_tokens=300))) == pytest.approx(600, rel=0.02)
    assert market.prompts.tokens(call_of(replace(PLAIN, prompt_tokens=300), key="other")) == 300
    assert market.prompts.tokens(call_of(replace(PLAIN, model="big", prompt_tokens=300))) == 300


@pytest.mark.parametrize(("prompt", "factor"), [(10**9, PROMPT_FACTOR_MAX), (1, 1 / PROMPT_FACTOR_MAX), (0, 1.0)])
def test_no_count_of_a_node_makes_prompts_endless(prompt: int, factor: float) -> None:
    market = Market()
    for _ in range(200):
        market.prompts.learn(call_of(), prompt)
    assert market.prompts.tokens(call_of()) == pytest.approx(100 * factor, rel=0.01)


def test_prompts_of_few_keys_are_remembered() -> None:
    market = Market()
    for number in range(KEYS_MAX + 1):
        market.prompts.learn(call_of(key=f"key-{number}"), 900)
    assert market.prompts.tokens(call_of(key="key-0")) == 100
    assert market.prompts.tokens(call_of(key="key-1")) > 100


# Warm prefixes.
TALK = b"".join(b"%08d" % number for number in range(1_000))
SALT = b"salt"


def turn(bytes_: int, id: str, *, key: str = "key", talk: bytes = TALK) -> Call:
    """A call whose body is so much of a talk."""
    needs = replace(PLAIN, prompt_tokens=bytes_ // 4, first_token_within_ms=20_000)
    return call_of(needs, call_id(id), key=key, body_bytes=bytes_, prefix=prefix.blocks(talk[:bytes_], salt=SALT))


def warmed(*lents: Lent, node: str = "b") -> Market:
    """A market where one node has answered the first turn of the talk."""
    market = market_of(lents, refreshed=True)
    answer(market, turn(4_000, "first"), node, reads=400.0, writes=20.0)
    return market


TWIN = Lent(prompt_price=CREDIT, cached_price=CREDIT // 10, output_price=CREDIT, prefill=400.0, decode=20.0)
TWINS = [replace(TWIN, node=node) for node in ("a", "b", "c")]
AFTER = later(60.0)


def test_a_warm_node_is_sooner_and_cheaper_for_that_key_only() -> None:
    market = warmed(*TWINS)
    cold, warm = (quote_at(market, turn(6_000, "second"), node, now=AFTER) for node in ("a", "b"))
    assert warm.first_token_in_ms < 0.6 * cold.first_token_in_ms
    assert warm.cost_expected_micro < cold.cost_expected_micro
    assert warm.cost_max_micro == cold.cost_max_micro  # a quote doesn't count on it
    for call in (turn(6_000, "second", key="other"), turn(6_000, "second", talk=TALK[1:])):
        assert quote_at(market, call, "b", now=AFTER).first_token_in_ms == pytest.approx(cold.first_token_in_ms, rel=0.02)
        assert quote_at(market, call, "b", now=AFTER).cost_expected_micro == quote_at(market, call, "a", now=AFTER).cost_expected_micro


def test_a_session_sticks_where_it_is_warm_unless_the_load_says_otherwise() -> None:
    for attempt in range(20):
        assert node_of(match(turn(6_000, f"turn-{attempt}"), warmed(*TWINS), now=AFTER)) == "b"
    busy = warmed(*TWINS)
    busy.heard(NodeId("b"), "tiny", running=1, now_s=AFTER.at_s)
    assert node_of(match(turn(6_000, "turn"), busy, now=AFTER)) == "b"  # a call beside it is no reason
    hasty = replace(turn(6_000, "turn"), needs=replace(turn(6_000, "turn").needs, first_token_within_ms=6_000))
    put(busy, replace(TWINS[1], waiting_max=50, others=40))
    busy.refresh(now_s=AFTER.at_s)
    assert node_of(match(replace(hasty, arrived_at_ms=AFTER.wall_ms), busy, now=AFTER)) in ("a", "c")
    full = warmed(*TWINS)
    full.heard(NodeId("b"), "tiny", running=4, now_s=AFTER.at_s)
    assert node_of(match(turn(6_000, "turn"), full, now=AFTER)) in ("a", "c")


def test_warmth_moves_with_the_talk_and_ends_with_the_node() -> None:
    market = warmed(*TWINS)
    answer(market, turn(4_000, "again"), "c", reads=400.0, writes=20.0)
    assert {quote.node_id for quote in quotes(turn(6_000, "turn"), market, now=AFTER)[0][:2]} == {"b", "c"}
    market.drop(NodeId("b"))
    assert node_of(match(turn(6_000, "turn"), market, now=AFTER)) == "c"


def test_few_nodes_and_few_keys_are_remembered_as_warm() -> None:
    lents = [replace(TWINS[0], node=f"node-{at:02}") for at in range(WARM_NODES_MAX + 1)]
    market = market_of(lents)
    for lent in lents:
        market.warmth.put(turn(4_000, "first"), "tiny", NodeId(lent.node))
    shelf = market.shelves("tiny")[0]
    assert set(market.warmth.of(turn(6_000, "turn"), shelf, 1_500.0)) == set(range(1, WARM_NODES_MAX + 1))
    for number in range(KEYS_MAX):
        market.warmth.put(turn(1_000, "first", key=f"key-{number}"), "tiny", NodeId("node-05"))
    assert market.warmth.of(turn(6_000, "turn"), shelf, 1_500.0) == {}
    assert market.warmth.of(turn(6_000, "turn", key="key-7"), shelf, 1_500.0).keys() == {5}


def test_never_is_all_of_a_prompt_warm() -> None:
    market = warmed(*TWINS)
    shelf = market.shelves("tiny")[0]
    assert 0 < market.warmth.of(turn(4_000, "same"), shelf, 1_000.0)[1] <= 999.0
    assert quote_at(market, turn(4_000, "same"), "b", now=AFTER).first_token_in_ms >= 0


# Offers come and go.
def test_a_node_that_comes_back_while_its_call_goes_on() -> None:
    """The broker went away for a moment: the node is forgotten and back, and the first token of its call comes afterwards."""
    market, call = market_of([LIAR]), call_of(IN_TIME)
    market.began("goes on", call, quote(market, "liar"), now_s=AT_S)
    market.drop(NodeId("liar"))
    put(market, LIAR)
    market.first("goes on", now_s=AT_S + 1.0)
    market.ended("goes on", call, Usage(prompt_tokens=400, output_tokens=50), now_s=AT_S + 4.0)
    assert quote(market, "liar", 5.0).chance > 0.9


def test_a_call_whose_node_went() -> None:
    market, call = market_of([LIAR, HONEST]), call_of(IN_TIME)
    market.began("lost", call, quote(market, "liar"), now_s=AT_S)
    market.drop(NodeId("liar"))
    market.first("lost", now_s=AT_S + 1.0)
    market.ended("lost", call, None, now_s=AT_S + 1.0)
    market.ended("lost", call, None, now_s=AT_S + 1.0)  # said twice
    market.first("never began", now_s=AT_S)
    assert place(market, call) == "honest"
    market.drop(NodeId("honest"))
    assert refused(match(call, market, now=NOW)).limit == "no_nodes"
    market.began("nowhere", call, quote(market_of([LIAR]), "liar"), now_s=AT_S)
    market.heard(NodeId("liar"), "tiny", running=3, now_s=AT_S)
    market.drop(NodeId("liar"))


def test_a_node_may_keep_some_of_its_offers() -> None:
    market = market_of([LIAR, replace(LIAR, model="big"), replace(LIAR, model="huge")])
    assert market.models() == ("big", "huge", "tiny")
    market.drop(NodeId("liar"), keep={"big": None})
    assert market.models() == ("big",)
    assert market.offer(NodeId("liar"), "big") is not None
    assert market.offer(NodeId("liar"), "tiny") is None


# Families.
def test_a_family_is_all_models_that_say_so() -> None:
    kin = replace(PLAIN, model="kin")
    market = market_of([replace(LIAR, family="kin"), replace(HONEST, model="big", family="kin"), replace(LAME, model="odd")])
    assert {quote.model for quote in quotes(call_of(kin), market, now=NOW)[0]} == {"tiny", "big"}
    market.drop(NodeId("liar"))
    assert {quote.model for quote in quotes(call_of(kin), market, now=NOW)[0]} == {"big"}
    market.drop(NodeId("honest"))
    assert refused(match(call_of(kin), market, now=NOW)).limit == "model_not_offered"


def test_a_family_that_not_all_lenders_name() -> None:
    market = market_of([replace(LIAR, family="kin"), HONEST])
    market.drop(NodeId("liar"))
    market.drop(NodeId("honest"))
    assert refused(match(call_of(replace(PLAIN, model="kin")), market, now=NOW)).limit == "no_nodes"


def test_a_family_that_is_named_later() -> None:
    market = market_of([LIAR])
    put(market, replace(LIAR, family="kin"))
    assert node_of(match(call_of(replace(PLAIN, model="kin")), market, now=NOW)) == "liar"


# Strangers' numbers.
EXTREMES = [
    pytest.param({}, id="usual"),
    pytest.param({"prefill": 0.0, "decode": 0.0}, id="nothing measured"),
    pytest.param({"prefill": 5e-324, "decode": 5e-324, "context": 2**40}, id="almost nothing"),
    pytest.param({"prefill": 1e9, "decode": 1e9, "slots": 0, "waiting_max": 1}, id="fast, without slots"),
    pytest.param({"prefill": 1e9, "decode": 5e-324, "by_streams": ((2**62, 1e9), (2, 5e-324))}, id="odd batches"),
    pytest.param({"by_streams": ((1, 0.0), (0, 1.0), (-5, 1.0), (2, 1e9))}, id="impossible batches"),
    pytest.param({"prompt_price": 2**40, "cached_price": 2**40, "output_price": 2**40, "context": 2**40}, id="dear"),
    pytest.param({"prompt_price": 0, "cached_price": 2**40, "output_price": 0}, id="free, but not when cached"),
    pytest.param({"slots": 2**40, "waiting_max": 2**40, "others": 2**40}, id="crowded"),
    pytest.param({"ready_in_ms": 2**40, "readiness": "loading"}, id="loading for ever"),
    pytest.param({"context": 0}, id="no context"),
    pytest.param({"expires_s": -1e15}, id="long expired"),
    pytest.param({"writes": False, "decode": 0.0, "prefill": 5e-324}, id="it embeds, slowly"),
    pytest.param({"region": "-", "quantisation": "ẞ", "family": "tiny", "refuses": frozenset({""})}, id="odd words"),
]


@pytest.mark.parametrize("changes", EXTREMES)
@pytest.mark.parametrize("tier", ["default", "priority", "flex"])
def test_no_number_of_a_stranger_breaks_a_decision(changes: dict[str, object], tier: str) -> None:
    """Not alone, not beside others, not after answers; numpy's warnings would be errors here."""
    lent = replace(LIAR, node="stranger", **changes)
    needs = replace(IN_TIME, service_tier=tier, prefer="fast" if tier == "priority" else "cheap", deadline_at_ms=WALL_MS + 60_000)
    for others in ([], [HONEST, LAME]):
        market = market_of([lent, *others], refreshed=True)
        for number in range(3):
            call = call_of(replace(needs, output_tokens_max=None if number else 50), call_id(f"odd-{number}", explores=number == 2))
            found, _ = quotes(call, market, now=NOW)
            assert all(is_sane(one) for one in found)
            assert all(is_sane(one.quote) for one in [match(call, market, now=NOW)] if isinstance(one, Place))
            market.began(f"odd-{number}", call, quote_at(market, call, "stranger"), now_s=AT_S)
            market.refresh(now_s=AT_S + 100.0)
            market.first(f"odd-{number}", now_s=AT_S + number)
            market.ended(f"odd-{number}", call, Usage(prompt_tokens=2**40, output_tokens=2**40), now_s=AT_S + number)
        market.refresh(now_s=AT_S + 1e9)
        shelf = market.shelves("tiny")[0]
        assert all(np.isfinite(column[: len(shelf.nodes)]).all() for column in shelf.columns)


def is_sane(quote: Quote) -> bool:
    return (
        quote.cost_expected_micro >= 0
        and quote.cost_max_micro >= 0
        and 0 <= quote.first_token_in_ms <= quote.end_in_ms
        and 0.0 <= quote.per_token_ms < float("inf")
        and 0.0 <= quote.chance <= 1.0
    )

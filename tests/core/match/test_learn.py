"""What answers tell of a machine: who is slower than it says, who has recovered, and who is slow but honest."""

import pytest
from msgspec.structs import replace

from fallow.core.match.decide import match
from fallow.core.match.learn import FORGET_S
from fallow.core.match.market import Market
from fallow.model.call import Call
from fallow.model.ids import CallId
from fallow.model.quote import Quote
from offers import (
    AT_S,
    CREDIT,
    EXPLORER_ID,
    PLAIN,
    Lent,
    answer,
    call_id,
    call_of,
    later,
    market_of,
    node_of,
    placed,
    put,
    quote_at,
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


# Who is slow.
def test_who_is_slower_than_it_says_is_found_out_after_a_few_answers() -> None:
    market = market_of([LIAR, HONEST])
    assert place(market, call_of(IN_TIME)) == "liar"
    passed_s = taught(market, "liar", reads=20.0, writes=1.0, times=5)
    found = quote(market, "liar", passed_s)
    assert found.first_token_in_ms > 5 * 1_000
    assert found.per_token_ms > 5 * 50
    assert found.chance < 0.5
    assert place(market, call_of(IN_TIME), passed_s) == "honest"


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(2.0, id="an answer every six seconds"),
        pytest.param(20.0, id="an answer a minute"),
    ],
)
def test_what_is_seen_again_and_again_is_what_is_expected(slow: float) -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=400.0 / slow, writes=20.0 / slow, times=60)
    assert quote(market, "liar", passed_s).first_token_in_ms == pytest.approx(1_000 * slow, rel=0.25)
    assert quote(market, "liar", passed_s).per_token_ms == pytest.approx(50 * slow, rel=0.25)


def test_one_answer_does_not_condemn() -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=200.0, writes=10.0, times=1)
    assert quote(market, "liar", passed_s).first_token_in_ms < 1_500


def test_who_never_begins_is_slow_before_it_ends() -> None:
    """No first token came, none was refused: the prompt that is overdue is evidence enough."""
    market, call = market_of([LIAR, HONEST]), call_of(IN_TIME)
    market.began("stuck", call, quote(market, "liar"), now_s=AT_S)
    for second in range(1, 30):
        market.refresh(now_s=AT_S + second)
    market.ended("stuck", call, None, now_s=AT_S + 30)
    assert quote(market, "liar", 30.0).first_token_in_ms > 5_000
    assert place(market, call_of(IN_TIME, call_id("next")), 30.0) == "honest"


def test_a_prompt_that_takes_as_long_as_it_should_is_not_overdue() -> None:
    market, fresh = market_of([LAME]), market_of([LAME])
    market.began("slow", call_of(IN_TIME), quote(market, "lame"), now_s=AT_S)
    for second in range(1, 25):
        market.refresh(now_s=AT_S + second)
    market.ended("slow", call_of(IN_TIME), None, now_s=AT_S + 25)
    assert quote(market, "lame", 25.0) == quote(fresh, "lame")


def test_it_is_forgotten_slowly() -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    firsts = []
    for _ in range(8):
        firsts.append(quote(market, "liar", passed_s).first_token_in_ms)
        passed_s += FORGET_S / 2
        market.refresh(now_s=AT_S + passed_s)
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[1] > firsts[0] / 5  # after minutes it is still known
    assert firsts[-1] < 1_500  # after an hour it is believed again


def test_it_is_forgotten_at_the_same_pace_however_often_one_looks() -> None:
    seldom, often = market_of([LIAR]), market_of([LIAR])
    for market, every_s in ((seldom, 600), (often, 5)):
        passed_s = taught(market, "liar", reads=20.0, writes=1.0)
        for more_s in range(every_s, 601, every_s):
            market.refresh(now_s=AT_S + passed_s + more_s)
    assert quote(seldom, "liar", passed_s + 600).first_token_in_ms == pytest.approx(
        quote(often, "liar", passed_s + 600).first_token_in_ms, rel=0.02
    )


def test_who_recovers_is_believed_after_a_few_answers() -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    passed_s = taught(market, "liar", reads=400.0, writes=20.0, from_s=passed_s)
    assert quote(market, "liar", passed_s).first_token_in_ms < 1_800
    assert quote(market, "liar", passed_s).per_token_ms < 90


PATIENT = replace(IN_TIME, first_token_within_ms=6_000, per_token_within_ms=400)


def test_one_call_in_a_hundred_believes_what_a_node_says() -> None:
    market = market_of([LIAR, HONEST])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    assert place(market, call_of(PATIENT), passed_s) == "honest"
    at = later(passed_s)
    explorer = placed(match(call_of(PATIENT, EXPLORER_ID, at=at), market, now=at))
    assert explorer.node_id == "liar"
    assert "believes what nodes say" in explorer.why
    assert node_of(match(call_of(replace(PATIENT, strict=True), EXPLORER_ID, at=at), market, now=at)) == "honest"  # not at its risk
    calls = [call_of(PATIENT, CallId(f"one-of-many-{number}"), at=at) for number in range(3_000)]
    gone = sum(node_of(match(call, market, now=at)) == "liar" for call in calls)
    assert 15 <= gone <= 45


def test_a_call_in_a_hurry_explores_too() -> None:
    market = market_of([LIAR, HONEST])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    assert place(market, call_of(IN_TIME, EXPLORER_ID), passed_s) == "liar"


def test_exploring_leaves_what_is_known_alone() -> None:
    market = market_of([LIAR, HONEST])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    before = quote(market, "liar", passed_s)
    place(market, call_of(IN_TIME, EXPLORER_ID), passed_s)
    assert quote(market, "liar", passed_s) == before


def test_an_honest_slow_node_keeps_its_prediction_and_the_work_that_it_can_do() -> None:
    market = market_of([LAME, HONEST])
    before = quote(market, "lame")
    passed_s = taught(market, "lame", reads=20.0, writes=2.0, times=20)
    after = quote(market, "lame", passed_s)
    assert after.first_token_in_ms == pytest.approx(before.first_token_in_ms, rel=0.05)
    assert after.per_token_ms == pytest.approx(before.per_token_ms, rel=0.05)
    at = later(passed_s)
    hour = replace(PLAIN, service_tier="flex", deadline_at_ms=at.wall_ms + 3_600_000)
    relaxed = replace(PLAIN, prompt_tokens=100, first_token_within_ms=15_000, per_token_within_ms=2_000)
    assert place(market, call_of(hour), passed_s) == "lame"
    assert place(market, call_of(relaxed), passed_s) == "lame"
    assert place(market, call_of(IN_TIME), passed_s) == "honest"


def test_who_answers_evenly_is_surer_than_who_does_not() -> None:
    even, odd = market_of([LIAR]), market_of([LIAR])
    taught(even, "liar", reads=400.0, writes=20.0, times=40)
    passed_s = 0.0
    for number in range(40):
        factor = 2.0 if number % 2 else 0.5
        passed_s = taught(odd, "liar", reads=400.0 * factor, writes=20.0 * factor, times=1, from_s=passed_s)
    target = replace(IN_TIME, first_token_within_ms=round(1.3 * quote(even, "liar").first_token_in_ms))
    assert quote_at(even, call_of(target), "liar").chance > quote_at(odd, call_of(target), "liar").chance


def test_what_was_learnt_outlives_a_new_price() -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    before = quote(market, "liar", passed_s)
    put(market, replace(LIAR, output_price=CREDIT // 5))
    after = quote(market, "liar", passed_s)
    assert (after.first_token_in_ms, after.per_token_ms, after.chance) == (before.first_token_in_ms, before.per_token_ms, before.chance)


def test_what_was_learnt_moves_with_its_row() -> None:
    market = market_of([LIAR])
    passed_s = taught(market, "liar", reads=20.0, writes=1.0)
    market.began("here", call_of(), quote(market, "liar", passed_s), now_s=AT_S + passed_s)
    before = quote(market, "liar", passed_s)
    for number in range(100):
        put(market, replace(HONEST, node=f"node-{number}", output_price=number))
    market.shelves("tiny")[0].order()
    assert market.shelves("tiny")[0].ordered == 101
    assert quote(market, "liar", passed_s) == before

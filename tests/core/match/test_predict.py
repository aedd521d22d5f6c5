"""The numbers behind a quote: when an answer is expected, by the formula and in direction, how likely it is in time, what it costs."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match import predict
from fallow.core.match.lengths import Length, Lengths
from fallow.core.match.market import Market
from fallow.core.match.predict import DECODE_TOKENS_PER_S_GUESS, PREFILL_TOKENS_PER_S_GUESS, SHARE, Targets, Times, phi
from fallow.core.match.rows import slope_of
from fallow.core.match.shelf import PROMPT_MEAN_TOKENS
from fallow.model.ids import KeyId
from fallow.model.needs import Needs
from fallow.model.offer import Speed
from fallow.model.receipt import Usage
from offers import AT_S, CREDIT, NOW, PLAIN, WALL_MS, Lent, call_id, call_of, later, market_of, most, offer_of, put, quote_at, some_lent

PROMISE = settings(max_examples=100)
LENT = Lent(prefill=100.0, decode=10.0, slots=2)
EMBEDS = replace(LENT, writes=False, decode=0.0)
some_sizes = st.builds(
    Needs,
    model=st.just("tiny"),
    prompt_tokens=st.integers(0, 3_000),
    output_tokens_max=st.none() | st.integers(1, 5_000),
    first_token_within_ms=st.none() | st.integers(1, 20_000),
    per_token_within_ms=st.none() | st.integers(1, 500),
    rings=st.just(PLAIN.rings),
)
some_tiny = some_lent.map(lambda lent: replace(lent, model="tiny", family="", ready_in_ms=(lent.ready_in_ms or 0) * lent.slots))


def mean(needs: Needs) -> float:
    """What is expected of an answer of a key that nobody knows."""
    return Lengths().expected(KeyId("key"), "tiny", limit=needs.output_tokens_max).mean_tokens


def began(market: Market, id: str, needs: Needs = PLAIN, *, node: str = "node-a", at_s: float = 0.0) -> None:
    """Another call of this gateway goes to the node, so many seconds after NOW."""
    call = call_of(needs, call_id(id))
    market.began(id, call, quote_at(market, call, node, now=later(at_s)), now_s=AT_S + at_s)


# When: an idle machine.
@pytest.mark.parametrize(
    ("needs", "lent", "first_s", "per_token_s"),
    [
        pytest.param(PLAIN, LENT, 1.0, 0.1, id="100 tokens at 100/s, the others at 10/s"),
        pytest.param(replace(PLAIN, prompt_tokens=300), LENT, 3.0, 0.1, id="a longer prompt"),
        pytest.param(replace(PLAIN, prompt_tokens=0), LENT, 0.01, 0.1, id="no prompt has no tokens"),
        pytest.param(PLAIN, replace(LENT, rtt_s=0.2), 1.2, 0.1, id="the way there and back"),
        pytest.param(PLAIN, replace(LENT, ready_in_ms=700), 1.7, 0.1, id="it still loads"),
        pytest.param(PLAIN, replace(LENT, slots=0), 1.0, 0.1, id="no slots are taken for one"),
        pytest.param(
            PLAIN,
            replace(LENT, prefill=0.0, decode=0.0),
            100 / PREFILL_TOKENS_PER_S_GUESS,
            1 / DECODE_TOKENS_PER_S_GUESS,
            id="nobody measured it",
        ),
    ],
)
def test_by_the_formula(needs: Needs, lent: Lent, first_s: float, per_token_s: float) -> None:
    quote = quote_at(market_of([lent]), call_of(needs), "node-a")
    assert quote.first_token_in_ms == pytest.approx(1000 * first_s, abs=1)
    assert quote.per_token_ms == pytest.approx(1000 * per_token_s, abs=0.001)
    assert quote.end_in_ms == pytest.approx(1000 * (first_s + mean(needs) * per_token_s), abs=1)


@pytest.mark.parametrize(("by_streams", "per_token_s"), [((), 0.2), (((1, 10.0), (2, 16.0)), 0.125), (((2, 20.0),), 0.1)])
def test_beside_a_call_of_others(by_streams: tuple[tuple[int, float], ...], per_token_s: float) -> None:
    """Reading shares the machine and so does writing, and what the other has to read comes first as far as is known."""
    quote = quote_at(market_of([replace(LENT, others=1, by_streams=by_streams)]), call_of(), "node-a")
    read_ms = 1000 * 100 / (SHARE * 100)
    assert read_ms - 1 <= quote.first_token_in_ms <= read_ms + 1000 * PROMPT_MEAN_TOKENS / (SHARE * 100) + 1
    assert quote.per_token_ms == pytest.approx(1000 * per_token_s, abs=0.001)


# When: a machine with calls of this gateway.
def test_a_prompt_waits_until_those_before_it_are_read() -> None:
    market = market_of([LENT])
    began(market, "other", replace(PLAIN, prompt_tokens=200))
    read_s = 1.0 / SHARE
    assert quote_at(market, call_of(), "node-a").first_token_in_ms == pytest.approx(1000 * (2.0 + read_s), abs=1)
    at = later(1.5)
    assert quote_at(market, call_of(at=at), "node-a", now=at).first_token_in_ms == pytest.approx(1000 * (0.5 + read_s), abs=1)
    market.first("other", now_s=AT_S + 1.5)
    assert quote_at(market, call_of(at=at), "node-a", now=at).first_token_in_ms == pytest.approx(1000 * read_s, rel=0.1)


def test_a_call_that_ended_is_gone() -> None:
    market, fresh = market_of([LENT]), quote_at(market_of([LENT]), call_of(), "node-a")
    began(market, "other")
    assert quote_at(market, call_of(), "node-a") != fresh
    market.ended("other", call_of(), None, now_s=AT_S)
    assert quote_at(market, call_of(), "node-a") == fresh


def test_who_finds_all_slots_taken_waits_for_one() -> None:
    market = market_of([replace(LENT, waiting_max=4)])
    firsts = []
    for number in range(5):
        quote = quote_at(market, call_of(), "node-a")
        firsts.append(quote.first_token_in_ms)
        assert quote.per_token_ms == pytest.approx(100 * min(number + 1, 2), rel=0.01)  # no more than its slots write
        began(market, f"call-{number}")
        market.first(f"call-{number}", now_s=AT_S)
    life_ms = mean(PLAIN) * 200
    assert firsts[1] < 2_000
    assert all(later - sooner > 0.3 * life_ms for sooner, later in itertools.pairwise(firsts[1:]))


def test_an_answer_in_one_piece_is_taken_to_be_read_when_it_should() -> None:
    """Nobody tells when the first token of such an answer came."""
    market = market_of([LENT])
    call = call_of(replace(PLAIN, prompt_tokens=1_000), stream=False)
    market.began("whole", call, quote_at(market, call, "node-a"), now_s=AT_S)
    market.refresh(now_s=AT_S + 9.0)
    assert market.shelves("tiny")[0].columns.reading[0] == 1
    market.refresh(now_s=AT_S + 10.5)
    columns = market.shelves("tiny")[0].columns
    assert (columns.reading[0], columns.streams[0]) == (0, 1)
    market.ended("whole", call, Usage(prompt_tokens=1_000, output_tokens=50), now_s=AT_S + 15.0)
    at = later(15.0)
    assert quote_at(market, call_of(at=at), "node-a", now=at).per_token_ms == pytest.approx(100, rel=0.1)


def test_what_embeds_is_done_when_the_prompt_is_read() -> None:
    needs = replace(PLAIN, per_token_within_ms=1, deadline_at_ms=WALL_MS + 3_000)
    quote = quote_at(market_of([EMBEDS]), call_of(needs), "node-a")
    assert quote.first_token_in_ms == quote.end_in_ms == 1_000
    assert (quote.chance, quote.cost_expected_micro, quote.cost_max_micro) == (1.0, 0, 0)
    late = replace(needs, deadline_at_ms=WALL_MS + 900)
    assert quote_at(market_of([EMBEDS]), call_of(late), "node-a").chance < 0.5


def test_one_lender_cannot_say_that_the_others_do_not_write() -> None:
    """Else a stranger makes every quote of the model too low, and what was quoted is all that can be charged."""
    alone = quote_at(market_of([LENT]), call_of(), "node-a")
    assert quote_at(market_of([LENT, replace(EMBEDS, node="liar")]), call_of(), "node-a") == alone


def test_a_guess_is_surer_when_it_was_measured() -> None:
    needs = replace(PLAIN, first_token_within_ms=2_600)
    guessed, measured = Lent(prefill=0.0, decode=0.0), Lent(prefill=PREFILL_TOKENS_PER_S_GUESS, decode=DECODE_TOKENS_PER_S_GUESS)
    chances = [quote_at(market_of([lent]), call_of(needs), "node-a").chance for lent in (guessed, measured)]
    assert 0.5 < chances[0] < chances[1]


@PROMISE
@given(some_sizes, some_tiny, st.integers(1, 4))
def test_more_work_never_makes_it_sooner(needs: Needs, lent: Lent, more: int) -> None:
    market, call = market_of([lent]), call_of(needs)
    before = quote_at(market, call, lent.node)
    longer = quote_at(market, call_of(replace(needs, prompt_tokens=needs.prompt_tokens + 100 * more)), lent.node)
    assert longer.first_token_in_ms > before.first_token_in_ms
    assert longer.end_in_ms > before.end_in_ms
    for number in range(more):
        began(market, f"more-{number}", node=lent.node)
        after = quote_at(market, call, lent.node)
        assert after.first_token_in_ms >= before.first_token_in_ms
        assert after.end_in_ms >= before.end_in_ms
        assert after.per_token_ms >= before.per_token_ms
        before = after
    crowded = market_of([replace(lent, others=lent.others + more)])
    assert quote_at(crowded, call, lent.node).first_token_in_ms >= quote_at(market_of([lent]), call, lent.node).first_token_in_ms


@PROMISE
@given(some_sizes, some_tiny)
def test_an_answer_ends_after_it_began(needs: Needs, lent: Lent) -> None:
    quote = quote_at(market_of([lent]), call_of(needs), lent.node)
    assert (lent.ready_in_ms or 0) <= quote.first_token_in_ms <= quote.end_in_ms
    assert 0.0 <= quote.chance <= 1.0


@pytest.mark.parametrize(
    ("by_streams", "decode", "slope"),
    [
        ((), 10.0, 1.0),
        (((1, 10.0),), 10.0, 1.0),
        (((1, 10.0), (2, 20.0)), 10.0, 0.0),  # two write as fast as one
        (((1, 10.0), (2, 16.0)), 10.0, 0.25),
        (((1, 10.0), (4, 10.0)), 10.0, 1.0),  # all of them together as fast as one
        (((2, 1e9),), 10.0, 0.0),
        (((2, 5e-324),), 1e9, 1.0),
        (((2, 16.0),), 0.0, 1.0),
        (((0, 10.0), (-3, 5.0), (2, 0.0)), 10.0, 1.0),
    ],
)
def test_how_much_longer_a_step_takes_with_each_stream(by_streams: tuple[tuple[int, float], ...], decode: float, slope: float) -> None:
    speed = Speed(decode_tokens_per_s=decode, decode_by_streams=by_streams)
    assert slope_of(replace(offer_of(LENT), speed=speed)) == pytest.approx(slope)


# How likely.
def test_the_normal_distribution() -> None:
    z = np.linspace(-40.0, 40.0, 4_001)
    exact = [0.5 * math.erfc(-one / math.sqrt(2)) for one in z]
    assert np.abs(phi(z) - exact).max() < 2e-4
    assert (np.diff(phi(z)) >= 0.0).all()


def times(first_s: float = 1.0, sd_s: float = 0.1, step_s: float = 0.1, spread: float = 0.2) -> Times:
    first, none, step = (np.array([one]) for one in (first_s, 0.0, step_s))
    return Times(first, np.array([[sd_s], [spread]]), first, none, step, np.log(step), none)


EVEN = Length(50.0, np.linspace(0.02, 1.0, 56))


@pytest.mark.parametrize(
    ("targets", "limit", "chance"),
    [
        (Targets(math.inf, math.inf, math.inf), 50.0, 1.0),
        (Targets(1.0, math.inf, math.inf), 50.0, 0.5),
        (Targets(1.1, math.inf, math.inf), 50.0, 0.841),
        (Targets(0.9, math.inf, math.inf), 50.0, 0.159),
        (Targets(-5.0, math.inf, math.inf), 50.0, 0.0),  # it is late already
        (Targets(math.inf, 0.1, math.inf), 50.0, 0.5),
        (Targets(math.inf, 0.1 * math.exp(0.2), math.inf), 50.0, 0.841),
        (Targets(1.0, 0.1, math.inf), 50.0, 0.25),
        (Targets(math.inf, math.inf, 1.201 + 50 * 0.1 * math.exp(0.2)), 50.0, 1.0),  # even if it is as long as it can be
        (Targets(math.inf, math.inf, 1.2), math.inf, 0.0),
        (Targets(math.inf, math.inf, -9.0), math.inf, 0.0),
    ],
)
def test_chance(targets: Targets, limit: float, chance: float) -> None:
    assert predict.chance(times(), targets, EVEN, limit=limit)[0] == pytest.approx(chance, abs=0.001)


@PROMISE
@given(st.floats(0.0, 1e6), st.floats(0.02, 1e3), st.floats(1e-9, 1e3), st.floats(0.03, 1.0), st.floats(-1e3, 1e6), st.floats(0.0, 1e3))
def test_more_time_never_lowers_a_chance(first_s: float, sd_s: float, step_s: float, spread: float, within_s: float, more_s: float) -> None:
    t = times(first_s, sd_s, step_s, spread)
    length = Lengths().expected(KeyId("key"), "tiny", limit=500)

    def chance(within_s: float) -> list[float]:
        every = Targets(within_s, max(1e-3, within_s), within_s)
        alone = [Targets(*(one if at == kept else math.inf for at, one in enumerate(every))) for kept in range(3)]
        return [float(predict.chance(t, targets, length, limit=500.0)[0]) for targets in (every, *alone)]

    tight, loose = chance(within_s), chance(within_s + more_s)
    assert all(0.0 <= less <= more + 1e-12 <= 1.0 + 2e-12 for less, more in zip(tight, loose, strict=True))
    assert tight[0] <= min(tight[1:]) + 1e-12  # all of them are never likelier than one


# How much.
@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens", "prompt_price", "output_price", "cost"),
    [
        (100, 50, 0, 0, 0),
        (1, 2, 0, 1, 1),  # two millionths of a micro-credit are rounded up
        (1, 1_000_000, 0, 7, 7),
        (1, 1_000_001, 0, 7, 8),
        (1_000_000, 1_000_000, 2, 3, 6),  # a prompt may be half as long again as it was estimated
        (500_000, 500_000, 1, 1, 2),  # 0.75 + 0.5: the sum is rounded, not its parts
        (100, 50, CREDIT // 10, CREDIT, 65),
        (96, None, 0, CREDIT, 4_000),  # no limit given: the rest of the context
        (100, 9_999, 0, CREDIT, 9_999),
    ],
)
def test_the_most_it_can_cost(prompt_tokens: int, output_tokens: int | None, prompt_price: int, output_price: int, cost: int) -> None:
    needs = replace(PLAIN, prompt_tokens=prompt_tokens, output_tokens_max=output_tokens)
    lent = Lent(prompt_price=prompt_price, output_price=output_price, context=4_096)
    assert quote_at(market_of([lent]), call_of(needs), "node-a").cost_max_micro == cost


@PROMISE
@given(some_sizes, some_tiny, st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_quote_is_the_least_whole_ceiling(needs: Needs, lent: Lent, prompt_price: int, output_price: int) -> None:
    lent = replace(lent, prompt_price=prompt_price, output_price=output_price)
    quote = quote_at(market_of([lent]), call_of(needs), lent.node)
    assert -1e-4 <= quote.cost_max_micro - most(needs, lent) < 1
    if needs.output_tokens_max is not None or mean(needs) <= lent.context - needs.prompt_tokens:
        assert quote.cost_expected_micro <= quote.cost_max_micro
    expected = (Fraction(max(1, needs.prompt_tokens)) * prompt_price + Fraction(mean(needs)) * output_price) / CREDIT
    assert -1e-4 <= quote.cost_expected_micro - expected < 1


def test_a_cached_prompt_never_costs_more_than_a_fresh_one() -> None:
    market = market_of([Lent(prompt_price=CREDIT, cached_price=9 * CREDIT, output_price=0)])
    call = call_of(prefix=(1,), body_bytes=600)
    cold = quote_at(market, call, "node-a")
    market.began("first", call, cold, now_s=AT_S)
    market.ended("first", call, None, now_s=AT_S)
    assert quote_at(market, call, "node-a").cost_expected_micro == cold.cost_expected_micro


def test_a_change_of_the_offer_is_a_change_of_its_quotes() -> None:
    market = market_of([LENT])
    for changed in (replace(LENT, prompt_price=9), replace(LENT, decode=20.0), replace(LENT, output_price=7), replace(LENT, rtt_s=1.0)):
        put(market, changed)
        assert quote_at(market, call_of(), "node-a", now=NOW) == quote_at(market_of([changed]), call_of(), "node-a", now=NOW)

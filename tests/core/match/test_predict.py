"""The numbers behind a quote: when an answer is expected, by the formula and in direction, and what it costs at most."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match.candidate import Candidate
from fallow.core.match.predict import (
    CERTAINTY_GUESSED,
    CERTAINTY_MEASURED,
    DECODE_TOKENS_PER_S_GUESS,
    OUTPUT_TOKENS_GUESS,
    PREFILL_TOKENS_PER_S_GUESS,
    predict,
)
from fallow.core.match.price import quote
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Needs
from fallow.model.offer import Load, Offer, Price, Speed

PROMISE = settings(derandomize=True, deadline=None, max_examples=60)
CREDIT = 1_000_000
PLAIN = Needs(model="tiny", prompt_tokens=100, output_tokens_max=50)


def candidate(
    *,
    prefill: float = 100.0,
    decode: float = 10.0,
    prompt_price: int = 0,
    output_price: int = 0,
    context: int = 4096,
    slots: int = 2,
    ready_in_ms: int | None = None,
    elsewhere: int = 0,
    in_flight: int = 0,
) -> Candidate:
    node_id = NodeId("node-a")
    return Candidate(
        offer=Offer(
            node_id=node_id,
            model="tiny",
            paths=frozenset(),
            context_tokens=context,
            model_digest="",
            speed=Speed(prefill_tokens_per_s=prefill, decode_tokens_per_s=decode),
            price=Price(prompt_micro_per_munit=prompt_price, output_micro_per_munit=output_price),
            slots=slots,
            expires_at_ms=1,
        ),
        card=Card(
            node_id=node_id,
            org_id=OrgId("home"),
            sequence=1,
            expires_at_ms=1,
            hardware=Hardware(kind="cpu", isa="x86_64-avx2", cores=8, memory_bytes=2**34),
            isolation="none",
            region="eu-de",
            serves=frozenset({"own"}),
        ),
        load=Load(model="tiny", readiness="ready", slots_free=slots, waiting=0, waiting_max=4, ready_in_ms=ready_in_ms),
        elsewhere=elsewhere,
        in_flight=in_flight,
    )


some_needs = st.builds(
    Needs, model=st.just("tiny"), prompt_tokens=st.integers(0, 3_000), output_tokens_max=st.none() | st.integers(1, 5_000)
)
some_candidate = st.builds(
    candidate,
    prefill=st.sampled_from([0.0, 50.0, 400.0]) | st.floats(0.5, 10_000),
    decode=st.sampled_from([0.0, 8.0, 30.0]) | st.floats(0.5, 1_000),
    prompt_price=st.integers(0, 10**7),
    output_price=st.integers(0, 10**7),
    context=st.integers(512, 8_192),
    slots=st.integers(0, 4),
    ready_in_ms=st.none() | st.integers(0, 60_000),
    elsewhere=st.integers(0, 5),
    in_flight=st.integers(0, 5),
)


@pytest.mark.parametrize(
    ("needs", "offer", "first_ms", "end_ms"),
    [
        pytest.param(PLAIN, candidate(), 1_000, 6_000, id="100 tokens at 100/s, 50 at 10/s"),
        pytest.param(PLAIN, candidate(in_flight=1), 2_000, 12_000, id="two streams share the machine"),
        pytest.param(PLAIN, candidate(elsewhere=1), 2_000, 12_000, id="no matter whose they are"),
        pytest.param(PLAIN, candidate(in_flight=2), 2_000 + 5_000, 7_000 + 10_000, id="one waits for half of a full answer"),
        pytest.param(PLAIN, candidate(in_flight=3), 2_000 + 10_000, 12_000 + 10_000, id="two wait"),
        pytest.param(PLAIN, candidate(slots=1, in_flight=1), 1_000 + 5_000, 6_000 + 5_000, id="one slot: alone, but later"),
        pytest.param(PLAIN, candidate(slots=0, in_flight=1), 1_000 + 5_000, 6_000 + 5_000, id="no slots are taken for one"),
        pytest.param(PLAIN, candidate(ready_in_ms=700), 1_700, 6_700, id="it still loads"),
        pytest.param(replace(PLAIN, prompt_tokens=0), candidate(), 0, 5_000, id="no prompt"),
        pytest.param(replace(PLAIN, output_tokens_max=9_999), candidate(context=100), 1_000, 11_000, id="the context bounds the answer"),
        pytest.param(
            replace(PLAIN, output_tokens_max=None), candidate(), 1_000, 1_000 + 100 * OUTPUT_TOKENS_GUESS, id="no length was given"
        ),
        pytest.param(PLAIN, candidate(prefill=0.0, decode=0.0), 2_000, 8_250, id="nobody measured it"),
    ],
)
def test_predict(needs: Needs, offer: Candidate, first_ms: int, end_ms: int) -> None:
    times = predict(needs, offer)
    assert (times.first_token_in_ms, times.end_in_ms) == (first_ms, end_ms)


@pytest.mark.parametrize(("decode", "certainty"), [(0.0, CERTAINTY_GUESSED), (0.1, CERTAINTY_MEASURED), (900.0, CERTAINTY_MEASURED)])
def test_a_guess_is_said_to_be_one(decode: float, certainty: float) -> None:
    assert predict(PLAIN, candidate(decode=decode)).certainty == certainty
    assert 0 < CERTAINTY_GUESSED < CERTAINTY_MEASURED < 1


def test_what_embeds_is_done_when_the_prompt_is_read() -> None:
    offer = candidate(decode=0.0)
    embeds = replace(offer, offer=replace(offer.offer, speed=replace(offer.offer.speed, writes=False)))
    times = predict(PLAIN, embeds)
    assert times.first_token_in_ms == times.end_in_ms
    assert times.certainty == CERTAINTY_MEASURED


@PROMISE
@given(some_needs, some_candidate, st.integers(1, 5))
def test_more_work_never_makes_it_sooner(needs: Needs, offer: Candidate, more: int) -> None:
    now = predict(needs, offer)
    busier = predict(needs, replace(offer, in_flight=offer.in_flight + more))
    assert busier.first_token_in_ms >= now.first_token_in_ms
    assert busier.end_in_ms >= now.end_in_ms
    longer = predict(replace(needs, prompt_tokens=needs.prompt_tokens + 100 * more), offer)
    assert longer.first_token_in_ms > now.first_token_in_ms


@PROMISE
@given(some_needs, some_candidate)
def test_an_answer_ends_after_it_began(needs: Needs, offer: Candidate) -> None:
    times = predict(needs, offer)
    assert (offer.load.ready_in_ms or 0) <= times.first_token_in_ms <= times.end_in_ms
    assert times.end_in_ms > 0


def test_what_was_measured_to_be_usual_beats_a_guess() -> None:
    measured = candidate(prefill=PREFILL_TOKENS_PER_S_GUESS * 2, decode=DECODE_TOKENS_PER_S_GUESS * 2)
    assert predict(PLAIN, measured).end_in_ms < predict(PLAIN, candidate(prefill=0.0, decode=0.0)).end_in_ms


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens", "prompt_price", "output_price", "cost"),
    [
        (100, 50, 0, 0, 0),
        (0, 1, 0, 1, 1),  # a millionth of a micro-credit is rounded up
        (0, 1_000_000, 0, 7, 7),
        (0, 1_000_001, 0, 7, 8),
        (1_000_000, 1_000_000, 2, 3, 5),
        (500_000, 500_000, 1, 1, 1),  # the sum is rounded, not its parts
        (100, 50, CREDIT // 10, CREDIT, 60),
        (100, None, 0, CREDIT, 4_096),  # no limit given: the whole context
        (100, 9_999, 0, CREDIT, 9_999),
    ],
)
def test_cost(prompt_tokens: int, output_tokens: int | None, prompt_price: int, output_price: int, cost: int) -> None:
    needs = replace(PLAIN, prompt_tokens=prompt_tokens, output_tokens_max=output_tokens)
    offer = candidate(prompt_price=prompt_price, output_price=output_price, context=4_096)
    assert quote(needs, offer).cost_max_micro == cost


@PROMISE
@given(some_needs, some_candidate)
def test_a_quote_is_the_least_whole_ceiling(needs: Needs, offer: Candidate) -> None:
    made = quote(needs, offer)
    output = offer.offer.context_tokens if needs.output_tokens_max is None else needs.output_tokens_max
    price = offer.offer.price
    exact = Fraction(needs.prompt_tokens * price.prompt_micro_per_munit + output * price.output_micro_per_munit, CREDIT)
    assert 0 <= made.cost_max_micro - exact < 1
    assert (made.node_id, made.model) == (offer.offer.node_id, offer.offer.model)
    assert (made.first_token_in_ms, made.end_in_ms, made.certainty) == predict(needs, offer)

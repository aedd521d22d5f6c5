"""What an answer costs: exact sums, and never more than the quote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.core.cost import PICO_PER_MICRO, cost_of
from fallow.model.offer import Price
from fallow.model.receipt import Usage

PRICE = Price(prompt_micro_per_munit=9_021, cached_prompt_micro_per_munit=1_000, output_micro_per_munit=128_402)
TOKENS = st.integers(0, 2**31)
MICRO = st.integers(0, 2**40)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({}, 0),
        ({"prompt_tokens": 1}, 9_021),
        ({"output_tokens": 1}, 128_402),
        ({"prompt_tokens": 10, "cached_tokens": 4}, 6 * 9_021 + 4 * 1_000),
        ({"prompt_tokens": 10, "cached_tokens": 40}, 10 * 1_000),
    ],
)
def test_what_usage_costs(usage: dict[str, int], cost: int) -> None:
    assert cost_of(Usage(**usage), PRICE, cost_max_micro=1) == cost


def test_a_cached_prompt_is_no_dearer_than_a_new_one() -> None:
    dear = Price(prompt_micro_per_munit=10, cached_prompt_micro_per_munit=99)
    assert cost_of(Usage(prompt_tokens=5, cached_tokens=5), dear, cost_max_micro=1) == 50


@given(st.tuples(TOKENS, TOKENS, TOKENS), st.tuples(MICRO, MICRO, MICRO), MICRO)
def test_never_more_than_the_quote_and_never_less_than_nothing(
    tokens: tuple[int, int, int], asked: tuple[int, int, int], most: int
) -> None:
    usage = Usage(prompt_tokens=tokens[0], cached_tokens=tokens[1], output_tokens=tokens[2])
    price = Price(prompt_micro_per_munit=asked[0], cached_prompt_micro_per_munit=asked[1], output_micro_per_munit=asked[2])
    assert 0 <= cost_of(usage, price, cost_max_micro=most) <= most * PICO_PER_MICRO

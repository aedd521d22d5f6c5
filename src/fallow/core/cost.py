"""What an answer costs at its offer's price: exact, and never more than its quote said."""

from fallow.model.offer import Price
from fallow.model.receipt import Usage

PICO_PER_MICRO = 1_000_000
"""Tokens times micro-credits per million tokens are millionths of a micro-credit: nothing is rounded."""


def cost_of(usage: Usage, price: Price, *, cost_max_micro: int) -> int:
    """Millionths of a micro-credit. A prompt's cached part costs no more than the rest of it."""
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    cached_price = min(price.cached_prompt_micro_per_munit, price.prompt_micro_per_munit)
    cost = (usage.prompt_tokens - cached) * price.prompt_micro_per_munit + cached * cached_price
    return min(cost + usage.output_tokens * price.output_micro_per_munit, cost_max_micro * PICO_PER_MICRO)

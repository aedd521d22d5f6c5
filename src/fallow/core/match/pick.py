"""Which of the quotes is taken."""

from collections.abc import Sequence

from fallow.model.quote import Quote


def pick(quotes: Sequence[Quote]) -> Quote:
    """The cheapest; among equals the one that ends first; ties by id, so that a replay agrees."""
    assert quotes, "the filter left nothing to pick from"
    return min(quotes, key=lambda q: (q.cost_max_micro, q.end_in_ms, q.node_id))

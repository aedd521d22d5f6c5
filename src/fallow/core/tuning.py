"""From the points of a self-benchmark to the threads, slots and batch that an engine gets, and how near that is to the memory's limit."""

from collections.abc import Sequence

from fallow.core.sizing import BATCH_TOKENS, SLOTS_MAX
from fallow.model.measured import Choice, Point, Rates

STREAMS = (1, 2, 4, 8)
"""How many streams are tried together."""
BATCHES = (1, 8)
"""How many texts are tried in one request."""
ALIKE = 0.05
"""Threads that bring less than this part more aren't worth the owner's cores."""
LOSS_MAX = 0.10
"""What sharing may cost in all, as a part of the best: callers who share are served sooner than callers who wait."""
STREAM_SHARE_MIN = 0.25
"""Of a lone stream's speed, what each must keep in company; or this many tokens a second, if that is less:"""
STREAM_TOKENS_PER_S_MIN = 4.0
BATCH_MS_MAX = 1_000
"""How long one batch of a prompt may freeze the streams beside it."""
BATCH_TOKENS_MIN = SLOTS_MAX
"""A batch must hold a token of each stream."""


def candidates(cores_allowed: int) -> tuple[int, ...]:
    """The numbers of threads to try: all that the owner allows, half of them, and one. The most first."""
    most = max(1, cores_allowed)
    return tuple(sorted({most, max(1, most // 2), 1}, reverse=True))


def streams_to_try(slots: int) -> tuple[int, ...]:
    """How many streams fit into the slots there are."""
    return tuple(number for number in STREAMS if number <= max(1, slots))


def is_worth_streams(point: Point, others: Sequence[Point]) -> bool:
    """Whether this number of threads can still be the choice, so that its parallel streams are of interest."""
    return choose_threads((*others, point)) == point.threads


def is_worth_fewer(points: Sequence[Point]) -> bool:
    """Whether fewer threads than were tried can still be the choice: not once fewer were clearly slower than more."""
    return len(points) <= 1 or choose_threads(points) == min(point.threads for point in points)


def choose_threads(points: Sequence[Point]) -> int:
    """The fewest threads whose lone stream (or single text) is about as fast as the fastest."""
    assert points, "one point at least"
    best = max(_alone(point) for point in points)
    return min(point.threads for point in points if _alone(point) >= best * (1 - ALIKE))


def choose_slots(rates: Rates) -> int:
    """The most streams of which each keeps a bearable speed while all together lose next to nothing; 1 if nothing was measured."""
    lone = next((rate for number, rate in rates if number == 1), 0.0)
    chosen, best = 1, lone
    for number, total in sorted(rates):
        bearable = min(STREAM_SHARE_MIN * lone, STREAM_TOKENS_PER_S_MIN)
        if number > 1 and total / number >= bearable and total >= best * (1 - LOSS_MAX):
            chosen = number
        best = max(best, total)
    return chosen


def choose_batch(prefill_tokens_per_s: float) -> int:
    """The largest power of two of tokens, up to 128, that a prompt gets through in a second; 128 where nothing was measured."""
    batch = BATCH_TOKENS
    while prefill_tokens_per_s > 0 and batch > BATCH_TOKENS_MIN and 1000 * batch > BATCH_MS_MAX * prefill_tokens_per_s:
        batch //= 2
    return max(batch, BATCH_TOKENS_MIN)


def choose(points: Sequence[Point], *, slots_max: int, writes: bool) -> Choice:
    """What the points say is best. A model that doesn't write keeps its slots: they are a queue, and one text runs at a time."""
    threads = choose_threads(points)
    point = next(point for point in points if point.threads == threads)
    fitting = tuple((number, total) for number, total in point.decode_by_streams if number <= slots_max)
    slots = choose_slots(fitting) if writes else slots_max
    return Choice(threads=threads, slots=slots, batch_tokens=choose_batch(point.prefill_tokens_per_s) if writes else BATCH_TOKENS)


def bytes_per_token(*, weights_bytes: int, kv_bytes_per_token: int, context_tokens: int) -> int:
    """What decoding one token reads of memory: all weights once, and the keys and values of what stands before it.

    The size of the file stands for the weights. A model whose output matrix isn't also its table of tokens reads of that
    table one row only, which makes the figure 2 to 10 % too high; of a mixture of experts most of the weights rest, and it is
    several times too high.
    """
    return weights_bytes + kv_bytes_per_token * context_tokens


def roofline(*, decode_tokens_per_s: float, bytes_per_token: int | None, memory_bytes_per_s: int | None) -> float | None:
    """The part of the memory's speed that one stream uses, tokens/s × bytes per token ÷ bytes/s; None where one isn't known."""
    if not decode_tokens_per_s or not bytes_per_token or not memory_bytes_per_s:
        return None
    return decode_tokens_per_s * bytes_per_token / memory_bytes_per_s


def _alone(point: Point) -> float:
    return point.decode_tokens_per_s or point.texts_per_s

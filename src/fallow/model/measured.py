"""How fast one model ran on this machine: what the self-benchmark saw, and how the engine is started because of it."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Rate = Annotated[float, Meta(ge=0, le=1e9)]
Work = Literal["text", "embeddings", "rerank"]
Rates = tuple[tuple[Annotated[int, Meta(ge=1)], Rate], ...]
"""(how many at once, how many a second in all), the smallest number first."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen with one number of threads. Where nothing was measured there is no entry, or 0."""

    threads: Annotated[int, Meta(ge=1)]
    prefill_tokens_per_s: Rate = 0.0
    decode_by_streams: Rates = ()
    """Tokens per second of all streams together, by how many there were."""
    texts_by_batch: Rates = ()
    """Texts per second of a model that embeds or ranks, by how many came in one request."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Of a single stream."""
        return rate_at(self.decode_by_streams, 1)

    @property
    def texts_per_s(self) -> float:
        """Of one text at a time."""
        return rate_at(self.texts_by_batch, 1)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """With what the engine is to be started."""

    threads: Annotated[int, Meta(ge=1)]
    slots: Annotated[int, Meta(ge=1)]
    batch_tokens: Annotated[int, Meta(ge=1)]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one model. `points` are all that was tried; the other rates are those of the choice.

    `prefill_tokens_per_s` is of one prompt; of a model that embeds or ranks, of one text at a time.
    `bytes_per_token` is what one token's decoding reads of memory, `memory_bytes_per_s` what the memory gives,
    `roofline_share` how much of that one stream used (0 to 1; over 1 where not all weights are read for each token).
    `watts` is what the processor's own meter said beyond idling; None without one. `is_whole` is False if time ran out.
    """

    work: Work
    choice: Choice
    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate = 0.0
    decode_by_streams: Rates = ()
    texts_by_batch: Rates = ()
    points: tuple[Point, ...]
    at_ms: int
    bytes_per_token: int | None = None
    memory_bytes_per_s: int | None = None
    roofline_share: float | None = None
    watts: float | None = None
    is_whole: bool = True


def rate_at(rates: Rates, number: int) -> float:
    """The rate with this many at once; 0 where that wasn't measured."""
    return next((rate for at, rate in rates if at == number), 0.0)

"""What one node will run, how fast and for how much, until the offer expires."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fallow.model.ids import NodeId

Count = Annotated[int, Meta(ge=0, le=2**40)]
Rate = Annotated[float, Meta(ge=0, le=1e9)]
ModelName = Annotated[str, Meta(min_length=1, max_length=200)]
Readiness = Literal["cold", "loading", "ready", "failed"]


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Micro-credits per million tokens."""

    prompt_micro_per_munit: Count = 0
    cached_prompt_micro_per_munit: Count = 0
    output_micro_per_munit: Count = 0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured tokens per second of one stream; 0 until something was measured. What embeds or ranks has a prefill only."""

    prefill_tokens_per_s: Rate = 0.0
    decode_tokens_per_s: Rate = 0.0
    decode_by_streams: Annotated[tuple[tuple[int, Rate], ...], Meta(max_length=16)] = ()
    """Tokens per second of all streams together, by how many there were."""
    writes: bool = True
    """False for what embeds or ranks: it answers at once when the prompt is read."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One model (or capability) on one node. `paths` are the HTTP paths that its engine answers."""

    node_id: NodeId
    model: ModelName
    paths: Annotated[frozenset[str], Meta(max_length=64)]
    context_tokens: Count
    model_digest: str
    speed: Speed
    price: Price
    slots: Count
    expires_at_ms: int
    family: Annotated[str, Meta(max_length=200)] = ""
    quantisation: Annotated[str, Meta(max_length=64)] = ""
    """As the catalogue writes it; empty where the lender doesn't say."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy an offer is now. `progress` is 0 to 1 while loading, `ready_in_ms` a prediction."""

    model: ModelName
    readiness: Readiness
    slots_free: Count
    waiting: Count
    waiting_max: Count
    progress: Annotated[float, Meta(ge=0, le=1)] | None = None
    ready_in_ms: Count | None = None

"""What one node will run, how fast and for how much, until the offer expires."""

from typing import Literal

import msgspec

from fallow.model.ids import NodeId

Readiness = Literal["cold", "loading", "ready", "failed"]


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Micro-credits per million tokens."""

    prompt_micro_per_munit: int = 0
    cached_prompt_micro_per_munit: int = 0
    output_micro_per_munit: int = 0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured tokens per second of one stream; 0 until something was measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One model (or capability) on one node. `paths` are the HTTP paths that its engine answers."""

    node_id: NodeId
    model: str
    paths: frozenset[str]
    context_tokens: int
    model_digest: str
    speed: Speed
    price: Price
    slots: int
    expires_at_ms: int


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy an offer is now. `progress` is 0 to 1 while loading, `ready_in_ms` a prediction."""

    model: str
    readiness: Readiness
    slots_free: int
    waiting: int
    waiting_max: int
    progress: float | None = None
    ready_in_ms: int | None = None

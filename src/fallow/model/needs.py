"""What a call requires of the machine that runs it."""

from typing import Literal

import msgspec

from fallow.model.ids import OrgId

Ring = Literal["own", "partner", "market"]
ServiceTier = Literal["flex", "default", "priority"]
Privacy = Literal["plain", "padded"]
HardwareKind = Literal["cpu", "gpu"]
Isolation = Literal["none", "landlock", "bwrap"]
COUNTRY_UNKNOWN = "unknown"

RINGS_DEFAULT: frozenset[Ring] = frozenset({"own", "partner"})


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """A call's requirements. None means that the caller doesn't mind.

    Sizes are in tokens: `prompt_tokens` is an estimate, `output_tokens_max` the most the caller asked for.
    `cost_max_micro` bounds the whole call in micro-credits, `price_max_micro_per_munit` a million output tokens.
    """

    model: str
    prompt_tokens: int = 0
    output_tokens_max: int | None = None
    service_tier: ServiceTier = "default"
    deadline_at_ms: int | None = None
    first_token_within_ms: int | None = None
    cost_max_micro: int | None = None
    price_max_micro_per_munit: int | None = None
    rings: frozenset[Ring] = RINGS_DEFAULT
    partners: frozenset[OrgId] = frozenset()
    regions: frozenset[str] = frozenset()
    hardware: HardwareKind | None = None
    isolation: Isolation | None = None
    privacy: Privacy = "plain"

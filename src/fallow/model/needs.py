"""What a call requires of the machine that runs it."""

from typing import Literal

import msgspec

from fallow.model.ids import OrgId

Ring = Literal["own", "partner", "market"]
ServiceTier = Literal["flex", "default", "priority"]
Privacy = Literal["plain", "padded", "whole"]
"""What the way an answer travels may tell whoever watches it. `plain` hides the content; `padded` also rounds sizes up, and sends ten times
a second at most; `whole` also sends the answer in one go when it is complete."""
HardwareKind = Literal["cpu", "gpu"]
Isolation = Literal["none", "landlock", "bwrap"]
Prefer = Literal["cheap", "fast"]
COUNTRY_UNKNOWN = "unknown"

RINGS_DEFAULT: frozenset[Ring] = frozenset({"own", "partner"})


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """A call's requirements. None, and an empty set, mean that the caller doesn't mind.

    `model` names a model, or a family of which `quantisations` are allowed. Sizes are in tokens: `prompt_tokens` is an
    estimate, `output_tokens_max` the most the caller asked for. `per_token_within_ms` is the mean over the answer.
    `cost_max_micro` bounds the whole call in micro-credits, `price_max_micro_per_munit` a million output tokens.
    `strict`: rather refused than likely to miss a target.
    """

    model: str
    quantisations: frozenset[str] = frozenset()
    prompt_tokens: int = 0
    output_tokens_max: int | None = None
    service_tier: ServiceTier = "default"
    deadline_at_ms: int | None = None
    first_token_within_ms: int | None = None
    per_token_within_ms: int | None = None
    cost_max_micro: int | None = None
    price_max_micro_per_munit: int | None = None
    strict: bool = False
    prefer: Prefer = "cheap"
    rings: frozenset[Ring] = RINGS_DEFAULT
    partners: frozenset[OrgId] = frozenset()
    regions: frozenset[str] = frozenset()
    countries: frozenset[str] = frozenset()
    hardware: HardwareKind | None = None
    isolation: Isolation | None = None
    privacy: Privacy = "plain"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What an API key allows. Its calls may ask for less, never for more; what they leave out is as it stands here."""

    rings: frozenset[Ring] = RINGS_DEFAULT
    partners: frozenset[OrgId] = frozenset()
    regions: frozenset[str] = frozenset()
    countries: frozenset[str] = frozenset()
    hardware: HardwareKind | None = None
    isolation: Isolation | None = None
    prefer: Prefer = "cheap"
    cost_max_micro: int | None = None
    price_max_micro_per_munit: int | None = None
    privacy: Privacy = "plain"

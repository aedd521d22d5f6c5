"""One HTTP request of a caller, and each try of it."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import COUNTRY_UNKNOWN, Needs, Policy

CONCURRENCY_DEFAULT = 256
"""Calls of a key at once, and those of them that may wait for a slot, unless somebody says otherwise."""
PER_MINUTE_MAX = 2**40
WEIGHT_MAX = 1_000.0


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """How much an API key may ask for at a time; a rate of 0 is no limit.

    `concurrency_max` bounds its calls at once in each gateway, `waiting_max` those of them that wait for a slot. Where work waits, a
    key of weight 2 gets twice as much done as one of weight 1.
    """

    concurrency_max: Annotated[int, Meta(ge=1, le=PER_MINUTE_MAX)] = CONCURRENCY_DEFAULT
    waiting_max: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] = CONCURRENCY_DEFAULT
    calls_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)] = 0
    weight: Annotated[float, Meta(ge=1 / WEIGHT_MAX, le=WEIGHT_MAX)] = 1.0


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway knows of a request once it is admitted. The body isn't here: it travels as the bytes that came.

    `country` is the gateway's, as two letters: lenders may refuse some. `budget_micro` is its key's, None: no limit, and
    `spent_micro` what is spent of that as far as the hub had heard.
    """

    id: CallId
    org_id: OrgId
    key_id: KeyId
    gateway_id: GatewayId
    path: str
    stream: bool
    body_bytes: int
    needs: Needs
    arrived_at_ms: int
    country: str = COUNTRY_UNKNOWN
    prefix: tuple[int, ...] = ()
    allowance: Allowance = Allowance()
    budget_micro: int | None = None
    spent_micro: int = 0


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try of a call on one node."""

    id: AttemptId
    call_id: CallId
    node_id: NodeId
    number: int
    asked_at_ms: int


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What an API key allows. The key itself is never here.

    `policy.partners` are those of its organisation that it may use. Empty `models` are all; a budget None is no limit.
    `expires_at_ms` is in UTC; None: it doesn't expire. `spent_micro` is what its calls have cost on all gateways, as far as they had
    told when the hub said this; 0 for a key without a budget.
    """

    key_id: KeyId
    org_id: OrgId
    policy: Policy = Policy()
    allowance: Allowance = Allowance()
    models: frozenset[str] = frozenset()
    expires_at_ms: int | None = None
    budget_micro: int | None = None
    spent_micro: int = 0

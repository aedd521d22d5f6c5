"""What people and programs are shown of a running network."""

from typing import Literal

import msgspec

from fallow.model.ids import CallId, GatewayId, NodeId, OrgId
from fallow.model.messages import NodeState
from fallow.model.offer import Readiness


class OfferView(msgspec.Struct, frozen=True, kw_only=True):
    """One model on a node."""

    model: str
    readiness: Readiness
    slots: int
    slots_free: int
    waiting: int
    context_tokens: int


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node on the gateway's roster. `heard_ms_ago` is the age of its last heartbeat."""

    node_id: NodeId
    org_id: OrgId
    state: NodeState
    hardware: str
    isolation: str
    region: str
    heard_ms_ago: int
    offers: list[OfferView]


class NodeList(msgspec.Struct, frozen=True, kw_only=True):
    """All nodes that a gateway knows."""

    nodes: list[NodeView]


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a gateway is."""

    gateway_id: GatewayId
    version: str
    broker_up: bool
    calls_under_way: int
    nodes: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a probe; `reason` says what is missing."""

    ok: bool
    reason: str = ""


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One node that was tried. `code` says why it came to nothing; `ms` is missing while the attempt is under way."""

    node: NodeId
    hardware: str
    code: str | None
    ms: float | None


CallState = Literal["running", "done", "failed", "caller_left"]


class CallView(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a call. What isn't known, or not known yet, is null; `arrived_at` is UTC.

    `http_status` and `code` are what the caller got; what each node said is with its attempt.
    """

    id: CallId
    object: Literal["fallow.call"] = "fallow.call"
    path: str
    model: str | None
    status: CallState
    http_status: int | None
    code: str | None
    arrived_at: str
    first_byte_ms: float | None
    total_ms: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    attempts: list[AttemptView]

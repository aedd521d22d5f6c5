"""What people and programs are shown of a running network."""

import msgspec

from fallow.model.ids import GatewayId, NodeId, OrgId
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

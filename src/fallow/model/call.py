"""One HTTP request of a caller, and each try of it."""

import msgspec

from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import COUNTRY_UNKNOWN, Needs, Policy


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway knows of a request once it is admitted. The body isn't here: it travels as the bytes that came.

    `country` is the gateway's, as two letters: lenders may refuse some.
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


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try of a call on one node."""

    id: AttemptId
    call_id: CallId
    node_id: NodeId
    number: int
    asked_at_ms: int


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What an API key allows. The key itself is never here."""

    key_id: KeyId
    org_id: OrgId
    policy: Policy = Policy()

"""Who takes part: organisations and what they agreed on, who was invited, who joined, and API keys as a hub keeps them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fallow.model.call import Allowance
from fallow.model.ids import KeyId, OrgId
from fallow.model.needs import Policy

MemberRole = Literal["node", "gateway"]
KeyRole = Literal["caller", "lender", "operator"]
"""What a key is for: making calls; looking after one's own organisation's nodes; looking after the hub."""
Name = Annotated[str, Meta(max_length=128)]
Stamp = Annotated[int, Meta(ge=0, le=2**53)]
"""UTC in milliseconds."""


class Organisation(msgspec.Struct, frozen=True, kw_only=True):
    """Who owns keys, gateways and nodes. `public_key` is its NKey (`A…`), with which it signs agreements; empty if it has none yet."""

    id: OrgId
    public_key: str = ""
    created_at_ms: Stamp = 0


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Two organisations are partners: their callers may use each other's nodes. `left` sorts before `right`.

    Both sign the same bytes (`wire/sign.py`). It holds from `begins_at_ms` until `ends_at_ms`, which either may set to now.
    """

    left: OrgId
    right: OrgId
    begins_at_ms: Stamp
    ends_at_ms: Stamp | None = None
    left_signature: bytes = b""
    right_signature: bytes = b""


class Invite(msgspec.Struct, frozen=True, kw_only=True):
    """Leave to join an organisation. Only the SHA-256 of its secret word is kept. `uses_left` None: no limit."""

    id: str
    word_digest: bytes
    org_id: OrgId
    roles: frozenset[MemberRole]
    uses_left: int | None = 1
    created_at_ms: Stamp = 0
    expires_at_ms: Stamp | None = None
    ended_at_ms: Stamp | None = None


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node or a gateway that joined. `invite_id` is empty for who came by open enrolment."""

    public_key: str
    role: MemberRole
    org_id: OrgId
    joined_at_ms: Stamp = 0
    invite_id: str = ""
    banned_at_ms: Stamp | None = None
    banned_why: str = ""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as it is kept: its SHA-256, never itself. Empty `models` are all; a budget None is no limit.

    `policy.partners` stays empty here: partners follow from agreements.
    """

    id: KeyId
    digest: bytes
    org_id: OrgId
    name: Name = ""
    role: KeyRole = "caller"
    policy: Policy = Policy()
    allowance: Allowance = Allowance()
    models: frozenset[str] = frozenset()
    budget_micro: int | None = None
    created_at_ms: Stamp = 0
    expires_at_ms: Stamp | None = None
    revoked_at_ms: Stamp | None = None


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the public log of cards. `hash` is SHA-256 over the hash before, the number, the time and the card's bytes,
    signature included."""

    number: int
    node_id: str
    card: bytes
    at_ms: Stamp
    hash: bytes

"""What people and programs are shown of a running network."""

from typing import Literal

import msgspec

from fallow.model.ids import CallId, GatewayId, NodeId, OrgId
from fallow.model.messages import NodeState
from fallow.model.needs import HardwareKind, Ring
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


class QuoteView(msgspec.Struct, frozen=True, kw_only=True):
    """What one offer would cost and promise for a call. Costs are in credits, times count from asking the node.

    `first_token_ms`, `per_token_ms` and `end_ms` are expected, as is `cost_expected`; the call costs no more than `cost_max`.
    `chance` is the one to meet all that the call needs, 0 to 1. `gpu` names the card, where it is one.
    """

    node: NodeId
    model: str
    hardware: HardwareKind
    gpu: str | msgspec.UnsetType = msgspec.UNSET
    ring: Ring
    region: str
    cost_max: float
    cost_expected: float
    first_token_ms: int
    per_token_ms: float
    end_ms: int
    chance: float


class StoppedView(msgspec.Struct, frozen=True, kw_only=True):
    """How many offers a limit stopped, and what would lift it."""

    limit: str
    offers: int
    lifted_by: str


class QuoteList(msgspec.Struct, frozen=True, kw_only=True):
    """What a call would cost where, the best first, and what stopped the other offers. Nothing was run.

    `prompt_tokens` is estimated from the body's size, `output_tokens` is the length that is expected of the answer.
    """

    object: Literal["fallow.quotes"] = "fallow.quotes"
    model: str
    path: str
    prompt_tokens: int
    output_tokens: int
    quotes: list[QuoteView]
    refused: list[StoppedView]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One node that was tried. `code` says why it came to nothing; `ms` is missing while the attempt is under way.

    `why` says why it was chosen, `quote` what was expected of it, `others` what the next best offers would have been.
    """

    node: NodeId
    hardware: str
    ring: Ring
    region: str
    code: str | None
    ms: float | None
    why: str
    quote: QuoteView
    others: list[QuoteView]


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """From asking the node: milliseconds to the first token, and to the answer's end."""

    first_token_ms: float | None
    end_ms: float | None


CallState = Literal["running", "done", "failed", "caller_left"]


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """What a call that waits here can know: its place, 1 being next, how many seconds it will probably take, and why it waits.

    `estimate_s` is null until calls were seen to end. Where a `flex` call waits for a better moment, it is when it is looked at again
    at the latest, and the place counts the calls for the same model that do so too.
    """

    position: int
    estimate_s: float | None
    why: str


class CallView(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a call. What isn't known, or not known yet, is null; `arrived_at` is UTC.

    `http_status` and `code` are what the caller got; what each node said is with its attempt. `predicted` and `actual` are of
    the last attempt; only a stream tells when the first token came. `cost` is in credits, and never more than the quote's
    `cost_max`. `waited_ms` is how long the call waited here for its turn or a better moment, and `wait_why` why; `waiting` is there
    while it does.
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
    cost: float | None
    predicted: Timing | None
    actual: Timing | None
    waited_ms: float | None
    wait_why: str | None
    waiting: Waiting | None = None
    attempts: list[AttemptView]


class WaitingCall(Waiting, frozen=True, kw_only=True):
    """A call of the caller's organisation that waits."""

    id: CallId
    model: str | None
    path: str
    waited_ms: float


class WaitingList(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of the caller's organisation that wait at this gateway, as they came; `total` counts those that aren't listed too."""

    object: Literal["list"] = "list"
    data: list[WaitingCall]
    total: int

"""What was done, signed by node and gateway."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.model.ids import AttemptId, CallId, GatewayId, NodeId, TabId

Tokens = Annotated[int, Meta(ge=0, le=2**40)]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer. `cached_tokens` is the part of the prompt that the engine still knew."""

    prompt_tokens: Tokens = 0
    cached_tokens: Tokens = 0
    output_tokens: Tokens = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Running totals of one attempt. The signatures stay empty until nodes and gateways have keys."""

    call_id: CallId
    attempt_id: AttemptId
    node_id: NodeId
    gateway_id: GatewayId
    tab_id: TabId
    model_digest: str
    usage: Usage
    cost_micro: int
    answer_digest: bytes
    node_signature: bytes = b""
    gateway_signature: bytes = b""

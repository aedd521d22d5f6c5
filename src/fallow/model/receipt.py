"""What was done, signed by node and gateway."""

import msgspec

from fallow.model.ids import AttemptId, CallId, GatewayId, NodeId, TabId


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer. `cached_tokens` is the part of the prompt that the engine still knew."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


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

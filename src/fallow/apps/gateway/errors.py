"""Fallow's error codes as HTTP: the one table, and the envelope of each protocol."""

from typing import Literal, NamedTuple

from fallow.model.errors import MESSAGE_MAX, Failure, shortened
from fallow.model.quote import Refuse
from fallow.wire import messages_api, openai, responses_answer, sse


class Status(NamedTuple):
    """An HTTP status and OpenAI's type of error."""

    http: int
    kind: str


INTERNAL = Status(500, "server_error")
TABLE: dict[str, Status] = {
    "invalid_request": Status(400, "invalid_request_error"),
    "context_length_exceeded": Status(400, "invalid_request_error"),
    "answer_incomplete": Status(400, "invalid_request_error"),
    "invalid_api_key": Status(401, "authentication_error"),
    "model_not_allowed": Status(403, "invalid_request_error"),
    "model_not_found": Status(404, "invalid_request_error"),
    "unknown_path": Status(404, "invalid_request_error"),
    "call_not_found": Status(404, "invalid_request_error"),
    "method_not_allowed": Status(405, "invalid_request_error"),
    "idempotency_conflict": Status(409, "invalid_request_error"),
    "idempotency_answer_too_long": Status(409, "invalid_request_error"),
    "body_timeout": Status(408, "invalid_request_error"),
    "body_too_large": Status(413, "invalid_request_error"),
    "over_limits": Status(400, "invalid_request_error"),
    "rate_limit_exceeded": Status(429, "rate_limit_error"),
    "budget_spent": Status(429, "insufficient_quota"),
    "too_many_calls": Status(503, "server_error"),
    "no_capacity": Status(503, "server_error"),
    "no_node": Status(503, "server_error"),
    "busy": Status(503, "server_error"),
    "yielding": Status(503, "server_error"),
    "lender_refuses": Status(503, "server_error"),
    "leaving": Status(503, "server_error"),
    "model_loading": Status(503, "server_error"),
    "model_not_here": Status(503, "server_error"),
    "node_unreachable": Status(503, "server_error"),
    "broker_lost": Status(503, "server_error"),
    "gateway_stopping": Status(503, "server_error"),
    "wire_error": Status(502, "server_error"),
    "engine_failed": Status(502, "server_error"),
    "engine_stalled": Status(502, "server_error"),
    "schema_not_met": Status(422, "invalid_request_error"),
    "price_changed": Status(503, "server_error"),
    "not_opened": Status(502, "server_error"),
    "answer_gap": Status(502, "server_error"),
    "answer_malformed": Status(502, "server_error"),
    "answer_too_long": Status(502, "server_error"),
    "body_lost": Status(502, "server_error"),
    "caller_too_slow": Status(408, "invalid_request_error"),
    "attempt_lost": Status(502, "server_error"),
    "cannot_continue": Status(502, "server_error"),
    "stream_interrupted": Status(502, "server_error"),
    "node_silent": Status(504, "server_error"),
    "node_too_slow": Status(504, "server_error"),
    "internal_error": INTERNAL,
}
MODELS_NAMED_MAX = 20
RETRY_AFTER_MS = 2_000
"""For what comes to an end by itself and doesn't know better when."""
PASSING = (429, 503)
"""The statuses after which trying the same again can help."""
LASTING = ("budget_spent",)
"""Of those, what doesn't pass by itself unless it says when."""
_CODES = {
    "busy": "no_capacity",
    "over_context": "context_length_exceeded",
    **dict.fromkeys(("no_nodes", "engine_failed", "backing_off", "already_tried", "offer_expired", "owner_is_back"), "no_node"),
}
"""The public code of each limit of matching; what the caller chose is `over_limits`."""

Protocol = Literal["openai", "responses", "messages"]


def protocol_of(path: str, *, anthropic: bool) -> Protocol:
    """Whose errors a path answers; `anthropic` is set for a client that names the version of Anthropic's API."""
    if path.startswith(openai.MESSAGES) or (anthropic and path.startswith(openai.MODELS)):
        return "messages"
    return "responses" if path == openai.RESPONSES else "openai"


def body_of(failure: Failure, protocol: Protocol, call_id: str) -> bytes:
    """The document that answers a call that failed."""
    status, kind = status_of(failure)
    if protocol == "messages":
        return messages_api.error_body(failure.message, failure.code, status, call_id)
    return openai.error_body(failure, kind)


def event_of(failure: Failure, protocol: Protocol, call_id: str) -> bytes:
    """The last event of a stream that began and then failed."""
    status, kind = status_of(failure)
    match protocol:
        case "messages":
            return messages_api.error_event(failure.message, failure.code, status, call_id)
        case "responses":
            return responses_answer.error_event(failure.code, failure.message, failure.param)
        case "openai":
            return sse.event(openai.error_body(failure, kind))


def status_of(failure: Failure) -> Status:
    return TABLE.get(failure.code, INTERNAL)


def retry_after_s(failure: Failure) -> int | None:
    """Whole seconds for `Retry-After`, where trying again can help."""
    if status_of(failure).http not in PASSING or (failure.code in LASTING and failure.retry_after_ms is None):
        return None
    return max(1, -(-(failure.retry_after_ms or RETRY_AFTER_MS) // 1000))


def refused(refusal: Refuse, model: str) -> Failure:
    """What matching refused, as the caller hears it: what would lift the limit of the most promising offers, then the others."""
    if refusal.limit == "model_not_offered":
        there = ", ".join(refusal.models[:MODELS_NAMED_MAX]) or "none"
        text = f"the model {shortened(model)!r} is not offered here; offered now: {there}"
        return Failure(code="model_not_found", message=text, param="model")
    text = shortened(f"no node can take this call: {_lifts(refusal)}", MESSAGE_MAX - 1)
    return Failure(code=_CODES.get(refusal.limit, "over_limits"), message=text, retry_after_ms=refusal.retry_after_ms)


def _lifts(refusal: Refuse) -> str:
    """Each limit with its count and what would lift it, the last one to apply first: its offers came furthest."""
    said = refusal.lifted_by
    if refusal.stopped:
        last = refusal.stopped[-1]
        said += f" ({last.offers} {'offer' if last.offers == 1 else 'offers'} stopped by {last.limit})"
    return "; also ".join((said, *(f"{one.offers} by {one.limit}: {one.lifted_by}" for one in reversed(refusal.stopped[:-1]))))

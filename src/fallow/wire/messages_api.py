"""`/v1/messages`: the answers of Anthropic's API, as an event stream or whole, its token counts and its errors."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from fallow.model.receipt import Usage
from fallow.wire import messages_request, sse
from fallow.wire.generation import Called, Ended, Event, Generation, Reasoning, Stamp, Text, ToolCall

Running = Literal["thinking", "text"]

_encode = msgspec.json.Encoder().encode
_DELTAS: dict[Running, tuple[str, str]] = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class MessagesEndpoint:
    """One turn of a conversation; see Endpoint."""

    def __init__(self, body: bytes, stamp: Stamp) -> None:
        request, self.generation = messages_request.read(body)
        self.stream = request.stream
        self._stamp = stamp
        self._ended = Ended(0, "stop")
        self._index = 0
        self._running: Running | None = None

    def begin(self) -> bytes:
        message = self._message([], None, Usage())
        return _event("message_start", {"message": message}) + _event("ping", {})

    def write(self, event: Event) -> bytes:
        match event:
            case Reasoning():
                return self._go_on("thinking", event.text)
            case Text():
                return self._go_on("text", event.text)
            case Called():
                delta = {"type": "input_json_delta", "partial_json": event.call.arguments}
                return self._close() + self._start(_call_block(event.call, b"{}")) + self._delta(delta) + self._stop()
            case Ended():
                self._ended = event
                return self._close()

    def end(self, usage: Usage) -> bytes:
        delta = _stop_fields(self._ended) | {"container": None}
        used = _usage(usage) | {"output_tokens_details": None, "server_tool_use": None}
        return self._close() + _event("message_delta", {"delta": delta, "usage": used}) + _event("message_stop", {})

    def whole(self, events: Sequence[Event], usage: Usage) -> bytes:
        ended = next((event for event in events if isinstance(event, Ended)), None)
        return _encode(self._message(_blocks(events), ended or self._ended, usage))

    def _message(self, content: list[dict[str, Any]], ended: Ended | None, usage: Usage) -> dict[str, Any]:
        unknown = ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
        return {
            "id": f"msg_{self._stamp.id}",
            "type": "message",
            "role": "assistant",
            "model": self._stamp.model,
            "content": content,
            **_stop_fields(ended),
            "usage": _usage(usage) | dict.fromkeys(unknown),
            "container": None,
        }

    def _go_on(self, kind: Running, text: str) -> bytes:
        """A piece of a running block, which is opened if another or none runs."""
        if not text:
            return b""
        opening = b""
        if self._running != kind:
            opening = self._close() + self._start(_text_block(kind, ""))
            self._running = kind
        delta, field = _DELTAS[kind]
        return opening + self._delta({"type": delta, field: text})

    def _close(self) -> bytes:
        """The end of the running block, if there is one."""
        if self._running is None:
            return b""
        # Nobody here signs thoughts, but clients wait for the field.
        signature = self._delta({"type": "signature_delta", "signature": ""}) if self._running == "thinking" else b""
        self._running = None
        return signature + self._stop()

    def _start(self, block: dict[str, Any]) -> bytes:
        return _event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._index, "delta": delta})

    def _stop(self) -> bytes:
        self._index += 1
        return _event("content_block_stop", {"index": self._index - 1})


def read_count(body: bytes) -> Generation:
    """What a request to count tokens would ask of an engine; raises InvalidRequest naming the parameter."""
    return messages_request.read_count(body)


def count_body(tokens: int) -> bytes:
    """The answer to a request to count tokens."""
    return _encode({"input_tokens": tokens})


def error_body(message: str, code: str, http_status: int, request_id: str) -> bytes:
    """Anthropic's envelope around an error. It has no place for `param`, so the message must name the field; `code` is ours."""
    return _encode({"type": "error", **_error(message, code, http_status, request_id)})


def error_event(message: str, code: str, http_status: int, request_id: str) -> bytes:
    """The same as the last event of a stream that broke."""
    return _event("error", _error(message, code, http_status, request_id))


def _error(message: str, code: str, http_status: int, request_id: str) -> dict[str, Any]:
    kind = _ERRORS.get(http_status, "api_error")
    return {"error": {"type": kind, "message": message, "code": code}, "request_id": request_id}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\n" + sse.event(_encode({"type": kind, **fields}))


def _text_block(kind: Running, text: str) -> dict[str, Any]:
    if kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text, "citations": None}


def _call_block(call: ToolCall, arguments: bytes) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": msgspec.Raw(arguments), "caller": {"type": "direct"}}


def _blocks(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The content that a stream of the same events would build up."""
    blocks: list[tuple[Running, list[str]] | ToolCall] = []
    for event in events:
        match event:
            case Text() | Reasoning():
                kind: Running = "text" if isinstance(event, Text) else "thinking"
                last = blocks[-1] if blocks else None
                if isinstance(last, tuple) and last[0] == kind:
                    last[1].append(event.text)
                elif event.text:
                    blocks.append((kind, [event.text]))
            case Called():
                blocks.append(event.call)
            case Ended():
                pass
    return [
        _call_block(one, one.arguments.encode()) if isinstance(one, ToolCall) else _text_block(one[0], "".join(one[1])) for one in blocks
    ]


def _stop_fields(ended: Ended | None) -> dict[str, Any]:
    if ended is None:
        return {"stop_reason": None, "stop_sequence": None, "stop_details": None}
    met = ended.stop_text if ended.reason == "stop" else None
    return {"stop_reason": _REASONS[ended.reason] if met is None else "stop_sequence", "stop_sequence": met, "stop_details": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was cached apart from the rest of the prompt."""
    return {
        "input_tokens": max(usage.prompt_tokens - usage.cached_tokens, 0),
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.output_tokens,
    }

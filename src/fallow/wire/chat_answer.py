"""`/v1/chat/completions`: the answer, as an event stream or whole."""

from collections.abc import Sequence
from typing import Any

import msgspec

from fallow.model.receipt import Usage
from fallow.wire import chat_request, sse
from fallow.wire.generation import Called, Choice, Ended, Event, Reasoning, Stamp, Text, ToolCall, gather
from fallow.wire.openai_fields import logprobs, usage_fields

_encode = msgspec.json.Encoder().encode


class ChatEndpoint:
    """One chat; see Endpoint."""

    def __init__(self, body: bytes, stamp: Stamp) -> None:
        request, self.generation = chat_request.read(body)
        self.stream = bool(request.stream)
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._wants_logprobs = self.generation.top_logprobs is not None
        self._head: dict[str, Any] = {"id": f"chatcmpl-{stamp.id}", "created": stamp.created_s, "model": stamp.model}
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}

    def begin(self) -> bytes:
        return b"".join(self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.generation.choices))

    def write(self, event: Event) -> bytes:
        match event:
            case Text():
                return self._chunk(event.choice, {"content": event.text}, tokens=event)
            case Reasoning():
                return self._chunk(event.choice, {"reasoning_content": event.text})
            case Called():
                head = {"index": event.index, **_call(event.call, arguments="")}
                rest = {"index": event.index, "function": {"arguments": event.call.arguments}}
                return self._chunk(event.choice, {"tool_calls": [head]}) + self._chunk(event.choice, {"tool_calls": [rest]})
            case Ended():
                return self._chunk(event.choice, {}, finish=event.reason)

    def _chunk(self, index: int, delta: dict[str, Any], *, finish: str | None = None, tokens: Text | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        if self._wants_logprobs:
            choice["logprobs"] = {"content": logprobs(tokens.tokens), "refusal": None} if tokens is not None else None
        fields = self._chunk_head | {"choices": [choice]}
        if self._include_usage:
            fields["usage"] = None
        return sse.event(_encode(fields))

    def end(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return sse.DONE
        return sse.event(_encode(self._chunk_head | {"choices": [], "usage": usage_fields(usage)})) + sse.DONE

    def whole(self, events: Sequence[Event], usage: Usage) -> bytes:
        choices = [self._whole(index, choice) for index, choice in enumerate(gather(events, self.generation.choices))]
        return _encode(self._head | {"object": "chat.completion", "choices": choices, "usage": usage_fields(usage)})

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text or None if choice.calls else choice.text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [_call(call, arguments=call.arguments) for call in choice.calls]
        found = {"content": logprobs(choice.tokens), "refusal": None} if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": found, "finish_reason": choice.reason}


def _call(call: ToolCall, *, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

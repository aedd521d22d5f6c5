"""`/v1/responses`: what the engine wrote, as OpenAI's items: an event stream, or one whole response."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from fallow.model.receipt import Usage
from fallow.wire import responses_request
from fallow.wire.generation import Called, Ended, Event, Reason, Reasoning, Stamp, Text, Token, ToolCall
from fallow.wire.openai_fields import logprobs
from fallow.wire.responses_request import Asked, ReasoningOptions, TextOptions

SEQUENCE_LAST = 2**31 - 1
"""The number of an event whose sender doesn't know how many came before: no other is later."""

Fields = dict[str, Any]
Kind = Literal["message", "reasoning"]
_PREFIX: dict[Kind, str] = {"message": "msg", "reasoning": "rs"}
_PART: dict[Kind, str] = {"message": "output_text", "reasoning": "reasoning_text"}
_LINE_ENDS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
"""Characters of a text at which some clients end a line, though the standard of events doesn't."""
_encoder = msgspec.json.Encoder()


def count_body(tokens: int) -> bytes:
    """The answer of `/v1/responses/input_tokens`."""
    return _encoder.encode({"object": "response.input_tokens", "input_tokens": tokens})


def error_event(code: str, message: str, param: str | None = None, sequence_number: int = SEQUENCE_LAST) -> bytes:
    """The last event of a stream that breaks off."""
    return _event({"type": "error", "code": code, "message": message, "param": param, "sequence_number": sequence_number})


def _event(event: Fields) -> bytes:
    kind: str = event["type"]
    data = _encoder.encode(event)
    if not data.isascii():
        for raw, escaped in _LINE_ENDS:
            data = data.replace(raw, escaped)
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


class ResponsesEndpoint:
    """One response; see Endpoint."""

    def __init__(self, body: bytes, stamp: Stamp) -> None:
        asked = responses_request.read(body)
        self.generation = asked.generation
        self.stream = bool(asked.request.stream)
        self._head = _head(asked, stamp)
        self._output = _Output(stamp.id, wants_logprobs=self.generation.top_logprobs is not None)
        self._sent = 0

    def begin(self) -> bytes:
        response = self._head | {"status": "in_progress", "output": []}
        return self._number([{"type": f"response.{step}", "response": response} for step in ("created", "in_progress")])

    def write(self, event: Event) -> bytes:
        return self._number(self._output.add(event))

    def end(self, usage: Usage) -> bytes:
        response = self._response(usage)
        return self._number([{"type": f"response.{response['status']}", "response": response}])

    def whole(self, events: Sequence[Event], usage: Usage) -> bytes:
        for event in events:
            self._output.add(event)
        return _encoder.encode(self._response(usage))

    def failed_event(self, code: str, message: str) -> bytes:
        """The last event of a stream whose answer broke off."""
        return error_event(code, message, sequence_number=self._sent)

    def _number(self, events: Sequence[Fields]) -> bytes:
        first = self._sent
        self._sent += len(events)
        return b"".join([_event(event | {"sequence_number": number}) for number, event in enumerate(events, first)])

    def _response(self, usage: Usage) -> Fields:
        is_cut = self._output.reason == "length"
        return self._head | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},  # the engines don't count them apart
                "total_tokens": usage.prompt_tokens + usage.output_tokens,
            },
        }


def _head(asked: Asked, stamp: Stamp) -> Fields:
    """What is the same of a response at its beginning and its end."""
    request = asked.request
    text = request.text or TextOptions()
    reasoning = request.reasoning or ReasoningOptions()
    optional = {
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }
    return {
        "id": f"resp_{stamp.id}",
        "object": "response",
        "created_at": stamp.created_s,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "model": stamp.model,
        "output": [],
        "parallel_tool_calls": asked.generation.parallel_calls,
        "previous_response_id": None,
        "prompt_cache_retention": request.prompt_cache_retention,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "service_tier": "default" if request.service_tier in (None, "auto") else request.service_tier,
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text.format, "verbosity": text.verbosity or "medium"},
        "tool_choice": asked.tool_choice,
        "tools": asked.tools,
        "top_logprobs": asked.generation.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        **{name: value for name, value in optional.items() if value is not None},  # their schemas know no null
    }


class _Output:
    """The items of a response as they grow. Text and thoughts collect in an open item until something else begins."""

    def __init__(self, answer_id: str, *, wants_logprobs: bool) -> None:
        self._answer_id = answer_id
        self._wants_logprobs = wants_logprobs
        self._open: Kind | None = None
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self.items: list[Fields] = []
        self.reason: Reason = "stop"

    def add(self, event: Event) -> list[Fields]:
        """What is to be told of it, without numbers."""
        match event:
            case Text() if not event.text and not event.tokens:
                return []
            case Text():
                return [*self._begin("message"), self._grow(event.text, event.tokens)]
            case Reasoning():
                return [*self._begin("reasoning"), self._grow(event.text, ())] if event.text else []
            case Called():
                return [*self._close("completed"), *self._call(event.call)]
            case Ended():
                self.reason = event.reason
                status = "incomplete" if event.reason == "length" else "completed"
                is_answered = self._open == "message" or any(item["type"] != "reasoning" for item in self.items)
                return [*([] if is_answered else self._begin("message")), *self._close(status)]

    def _place(self, kind: Kind) -> Fields:
        """Where in the response the open item's only part stands."""
        index = len(self.items)
        return {"item_id": f"{_PREFIX[kind]}_{self._answer_id}_{index}", "output_index": index, "content_index": 0}

    def _begin(self, kind: Kind) -> list[Fields]:
        if self._open == kind:
            return []
        before = self._close("completed")
        self._open = kind
        place = self._place(kind)
        item = self._item(kind, "in_progress", [])
        return [
            *before,
            {"type": "response.output_item.added", "output_index": place["output_index"], "item": item},
            {"type": "response.content_part.added", **place, "part": self._part(kind, "")},
        ]

    def _grow(self, text: str, tokens: Sequence[Token]) -> Fields:
        kind = self._open
        assert kind is not None
        self._texts.append(text)
        delta = {"type": f"response.{_PART[kind]}.delta", **self._place(kind), "delta": text}
        if kind == "message":
            delta["logprobs"] = self._plain_logprobs(tokens)
            self._tokens.extend(tokens)
        return delta

    def _close(self, status: str) -> list[Fields]:
        kind, text = self._open, "".join(self._texts)
        if kind is None:
            return []
        place, part = self._place(kind), self._part(kind, text)
        item = self._item(kind, status, [part])
        done = {"type": f"response.{_PART[kind]}.done", **place, "text": text}
        if kind == "message":
            done["logprobs"] = self._plain_logprobs(self._tokens)
        self._open, self._texts, self._tokens = None, [], []
        self.items.append(item)
        return [
            done,
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.output_item.done", "output_index": place["output_index"], "item": item},
        ]

    def _item(self, kind: Kind, status: str, content: list[Fields]) -> Fields:
        own: Fields = {"role": "assistant"} if kind == "message" else {"summary": []}
        return {"id": self._place(kind)["item_id"], "type": kind, "status": status, "content": content, **own}

    def _part(self, kind: Kind, text: str) -> Fields:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        shown = logprobs(self._tokens) if self._wants_logprobs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": shown}

    def _plain_logprobs(self, tokens: Sequence[Token]) -> list[Fields]:
        """Log probabilities as an event has them: without bytes."""
        if not self._wants_logprobs:
            return []
        tops = [[{"token": one.token, "logprob": one.logprob} for one in token.top] for token in tokens]
        return [{"token": t.token, "logprob": t.logprob, "top_logprobs": top} for t, top in zip(tokens, tops, strict=True)]

    def _call(self, call: ToolCall) -> list[Fields]:
        index = len(self.items)
        item = {
            "id": f"fc_{self._answer_id}_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        self.items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        kind = "response.function_call_arguments"
        return [
            {"type": "response.output_item.added", "output_index": index, "item": item | {"status": "in_progress", "arguments": ""}},
            {"type": f"{kind}.delta", **place, "delta": call.arguments},
            {"type": f"{kind}.done", **place, "name": call.name, "arguments": call.arguments},
            {"type": "response.output_item.done", "output_index": index, "item": item},
        ]

"""What a llama.cpp engine streams, edited into what OpenAI's clients expect: an event stream, or one whole answer."""

from typing import Any

import msgspec

from fallow.model.errors import EngineFailed, Failure
from fallow.model.receipt import Tokens, Usage
from fallow.wire import sse
from fallow.wire.openai import CHAT

_PROGRESS = b'"prompt_progress":'  # unescaped quotes: a key, never a part of somebody's text
_ROLE = b'"delta":{"role":"assistant","content":null}'  # the engine says it as often as it tells of progress
_USAGE = b'"usage":'
_ERROR = b'data: {"error":'
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: Tokens = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    prompt_tokens_details: _Details = _Details()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: _Delta = _Delta()
    text: str = ""
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None
    usage: dict[str, Any] | None = None

    @property
    def first_index(self) -> int:
        """Of the choice that an opening event is about; raises EngineFailed if there is none."""
        if not self.choices:
            raise EngineFailed("the engine wrote an event about no choice")
        return self.choices[0].index


_chunk = msgspec.json.Decoder(_Chunk)


def _read(event: bytes) -> _Chunk:
    try:
        return _chunk.decode(sse.payload(event))
    except UNREADABLE:
        raise EngineFailed("the engine wrote an event that can't be read") from None


def _fields(event: bytes) -> dict[str, Any]:
    """An event that must be rewritten: a chunk with at most one choice."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(sse.payload(event), type=dict[str, Any])
        _chunk.decode(sse.payload(event))
    except UNREADABLE:
        raise EngineFailed("the engine wrote an event that can't be read") from None
    return fields


def added(usage: Usage | None, found: Any) -> Usage:
    """Usage with one more choice. The engine counts each choice apart; the prompt is there once."""
    try:
        more = msgspec.convert(found, _Usage)
    except msgspec.ValidationError:
        raise EngineFailed("the engine wrote a usage that can't be read") from None
    return Usage(
        prompt_tokens=more.prompt_tokens,
        cached_tokens=more.prompt_tokens_details.cached_tokens if usage is None else usage.cached_tokens,
        output_tokens=more.completion_tokens + (usage.output_tokens if usage else 0),
    )


class StreamedAnswer:
    """Edits an event stream. Most events pass as the bytes that came; only the first and the last ones are read."""

    def __init__(self, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._cutter = sse.EventCutter()
        self._opening: dict[int, dict[str, Any]] = {}
        self._opened: set[int] = set()
        self._last: dict[str, Any] = {}
        self.usage: Usage | None = None
        self.is_whole = False

    def feed(self, chunk: bytes) -> bytes:
        """What of this chunk goes to the caller; raises EngineFailed if the engine says that it failed."""
        return b"".join([out for event in self._cutter.feed(chunk) if (out := self._edit(event))])

    def _edit(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            return b""  # a comment that only keeps the connection alive; we have our own
        if _PROGRESS in event or _ROLE in event:
            fields = _fields(event)
            index = _read(event).first_index
            if index not in self._opened:
                self._opening[index] = fields
            return b""
        if event.startswith(_ERROR):
            raise EngineFailed("the engine broke off its answer")
        out = self._open() if self._opening else b""
        if event == sse.DONE:
            self.is_whole = True
            return out + self._account() + event
        if _USAGE in event:
            return out + self._close(event)
        return out + event

    def _open(self) -> bytes:
        """The first event of each choice with its role, made of those that told of progress."""
        out = b""
        for index, fields in sorted(self._opening.items()):
            self._opened.add(index)
            fields.pop("prompt_progress", None)
            delta = fields["choices"][0].get("delta")
            if delta is not None:  # completions have no opening event
                delta["content"] = ""
                out += sse.event(msgspec.json.encode(fields))
        self._opening = {}
        return out

    def _close(self, event: bytes) -> bytes:
        """The last event of a choice, as OpenAI has it: usage kept for the end, no timings."""
        fields = _fields(event)
        self.usage = added(self.usage, fields.pop("usage"))
        fields.pop("timings", None)
        self._last = fields
        return sse.event(msgspec.json.encode(fields)) if fields["choices"] else b""

    def _account(self) -> bytes:
        if self.usage is None or not self._include_usage:
            return b""
        return sse.event(msgspec.json.encode(self._last | {"choices": [], "usage": openai_usage(self.usage)}))


class WholeAnswer:
    """Collects an event stream into one answer."""

    def __init__(self, *, chat: bool, choices: int) -> None:
        self._chat = chat
        self._cutter = sse.EventCutter()
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._reasoning: list[list[str]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices
        self._last: _Chunk | None = None
        self.usage: Usage | None = None
        self.is_whole = False

    def feed(self, chunk: bytes) -> None:
        """Take in a piece of the stream; raises EngineFailed if the engine says that it failed."""
        for event in self._cutter.feed(chunk):
            if event.startswith(b":") or _PROGRESS in event or _ROLE in event:
                continue
            if event.startswith(_ERROR):
                raise EngineFailed("the engine broke off its answer")
            if event == sse.DONE:
                self.is_whole = True
                continue
            self._collect(_read(event))

    def _collect(self, chunk: _Chunk) -> None:
        self._last = chunk
        if chunk.usage is not None:
            self.usage = added(self.usage, chunk.usage)
        for choice in chunk.choices:
            if not 0 <= choice.index < len(self._texts):
                raise EngineFailed("the engine wrote a choice that nobody asked for")
            self._texts[choice.index].append(choice.delta.content or choice.text)
            self._reasoning[choice.index].append(choice.delta.reasoning_content or "")
            self._finish[choice.index] = choice.finish_reason or self._finish[choice.index]

    def body(self) -> bytes:
        """The whole answer; raises EngineFailed if the stream ended before its end."""
        if not self.is_whole or self._last is None or self.usage is None:
            raise EngineFailed("the engine stopped in the middle of its answer")
        last = self._last
        fields = {
            "id": last.id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": last.created,
            "model": last.model,
            "system_fingerprint": last.system_fingerprint,
            "choices": [self._choice(index) for index in range(len(self._texts))],
            "usage": openai_usage(self.usage),
        }
        return msgspec.json.encode(fields)

    def _choice(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts[index])
        ending = {"index": index, "logprobs": None, "finish_reason": self._finish[index] or "stop"}
        if not self._chat:
            return {"text": text, **ending}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(self._reasoning[index]):
            message["reasoning_content"] = reasoning
        return {"message": message, **ending}


def openai_usage(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class _EngineError(msgspec.Struct, frozen=True):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _EngineEnvelope(msgspec.Struct, frozen=True):
    error: _EngineError = _EngineError()


def refusal(path: str, status: int, body: bytes) -> Failure:
    """What an error answer of the engine means for the caller. Its own words may echo the prompt, so most are not passed on."""
    try:
        error = msgspec.json.decode(body, type=_EngineEnvelope).error
    except UNREADABLE:
        error = _EngineError()
    if error.type == "exceed_context_size_error":
        text = f"the prompt has {error.n_prompt_tokens} tokens, the model's context on this node {error.n_ctx}"
        return Failure(code="context_length_exceeded", message=text, param="messages" if path == CHAT else "prompt")
    if error.type == "unavailable_error" or status == 503:
        return Failure(code="model_loading", message="the model is still being loaded", retry_after_ms=1_000)
    if 400 <= status < 500:
        return Failure(code="invalid_request", message="the engine can't run this request; check schema and parameters")
    return Failure(code="engine_failed", message="the engine failed on this request")

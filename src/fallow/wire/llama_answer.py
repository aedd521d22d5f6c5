"""What a llama.cpp engine streams, read into events."""

from collections.abc import Mapping
from typing import Any

import msgspec

from fallow.model.errors import EngineFailed, Failure, WireError
from fallow.model.messages import TokenId
from fallow.model.receipt import Tokens, Usage
from fallow.wire import sse
from fallow.wire.generation import Alternative, Ended, Event, Reasoning, Text, Token

LOGPROB_MIN = -9999.0
"""OpenAI's value for a token that is very unlikely."""
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BROKEN = (b'data: {"error":', b"error:")
_NOTHING = b"data: null\n\n"


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: Tokens = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    prompt_tokens_details: _Details = _Details()


class _Timings(msgspec.Struct, frozen=True):
    cache_n: Tokens = 0
    prompt_n: Tokens = 0
    predicted_n: Tokens = 0


class _Top(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    bytes: list[int] | None = None
    logprob: float | None = None


class _Logprob(_Top, frozen=True, kw_only=True):
    id: TokenId | None = None
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[_Logprob] | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: _Delta = _Delta()
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    usage: _Usage | None = None
    timings: _Timings | None = None


_chunk = msgspec.json.Decoder(_Chunk)


class EngineStream:
    """Reads the answer to one request, whose choices are told as `first`, `first + 1`, …

    `usage` is what the engine counted so far; the prompt is in it once, however many choices there are.
    """

    def __init__(self, *, choices: int, first: int = 0, top_logprobs: int | None = None) -> None:
        self._choices = choices
        self._first = first
        self._top = top_logprobs
        self._cutter = sse.EventCutter()
        self.usage: Usage | None = None
        self.timed = Usage()
        self.is_whole = False
        self.token_ids: list[int] = []
        """What was written, as the engine's own numbers; it tells them with log probabilities only."""

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that a piece of the stream completes; raises EngineFailed if the engine says that it failed."""
        found: list[Event] = []
        for event in self._events(chunk):
            if event == sse.DONE:
                self.is_whole = True
            elif event.startswith(_BROKEN):
                raise EngineFailed("the engine broke off its answer")
            elif not event.startswith(b":") and event != _NOTHING:  # a comment only keeps the connection alive
                self._read(event, found)
        return found

    def _events(self, chunk: bytes) -> list[bytes]:
        try:
            return self._cutter.feed(chunk)
        except WireError:
            raise EngineFailed("the engine wrote an event that is longer than it can be") from None

    def _read(self, event: bytes, found: list[Event]) -> None:
        try:
            chunk = _chunk.decode(sse.payload(event))
        except UNREADABLE:
            raise EngineFailed("the engine wrote an event that can't be read") from None
        if chunk.timings is not None:
            timings = chunk.timings
            self.timed = Usage(
                prompt_tokens=timings.cache_n + timings.prompt_n, cached_tokens=timings.cache_n, output_tokens=timings.predicted_n
            )
        if chunk.usage is not None:
            self.usage = _added(self.usage, chunk.usage)
        for choice in chunk.choices:
            if not 0 <= choice.index < self._choices:
                raise EngineFailed("the engine wrote a choice that nobody asked for")
            index = self._first + choice.index
            if choice.delta.reasoning_content:
                found.append(Reasoning(index, choice.delta.reasoning_content))
            text = choice.delta.content or choice.text
            tokens = self._tokens(choice.logprobs)
            if text or tokens:
                found.append(Text(index, text, tokens))
            if choice.finish_reason is not None:
                found.append(Ended(index, "length" if choice.finish_reason == "length" else "stop"))

    def _tokens(self, logprobs: _Logprobs | None) -> tuple[Token, ...]:
        if self._top is None or logprobs is None:
            return ()
        self.token_ids += [one.id for one in logprobs.content or () if one.id is not None]
        return tuple(_token(one, self._top) for one in logprobs.content or ())


def _token(one: _Logprob, top: int) -> Token:
    chosen = _alternative(one)
    return Token(chosen.token, chosen.bytes, chosen.logprob, tuple(_alternative(other) for other in one.top_logprobs[:top]))


def _alternative(one: _Top) -> Alternative:
    logprob = LOGPROB_MIN if one.logprob is None or one.logprob < LOGPROB_MIN else min(0.0, one.logprob)
    return Alternative(one.token, one.bytes if one.bytes is not None else list(one.token.encode()), logprob)


def _added(usage: Usage | None, more: _Usage) -> Usage:
    """Usage with one more choice. The engine counts each choice apart; the prompt is there once."""
    return Usage(
        prompt_tokens=more.prompt_tokens,
        cached_tokens=more.prompt_tokens_details.cached_tokens if usage is None else usage.cached_tokens,
        output_tokens=more.completion_tokens + (usage.output_tokens if usage else 0),
    )


def added(usage: Usage | None, found: Any) -> Usage:
    """Usage with what an engine's answer says of one more choice; raises EngineFailed."""
    try:
        return _added(usage, msgspec.convert(found, _Usage))
    except msgspec.ValidationError:
        raise EngineFailed("the engine wrote a usage that can't be read") from None


class _EngineError(msgspec.Struct, frozen=True):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _EngineEnvelope(msgspec.Struct, frozen=True):
    error: _EngineError = _EngineError()


def refusal(status: int, body: bytes, params: Mapping[str, str]) -> Failure:
    """What an error answer of the engine means for the caller. Its own words may echo the prompt, so most are not passed on.

    `params` names the request's fields: which of them holds the messages.
    """
    try:
        error = msgspec.json.decode(body, type=_EngineEnvelope).error
    except UNREADABLE:
        error = _EngineError()
    if error.type == "exceed_context_size_error":
        text = f"the prompt has {error.n_prompt_tokens} tokens, the model's context on this node {error.n_ctx}"
        return Failure(code="context_length_exceeded", message=text, param=params.get("messages"))
    if error.type == "unavailable_error" or status == 503:
        return Failure(code="model_loading", message="the model is still being loaded", retry_after_ms=1_000)
    if 400 <= status < 500:
        return Failure(code="invalid_request", message="the engine can't run this request; check schema and parameters")
    return Failure(code="engine_failed", message="the engine failed on this request")

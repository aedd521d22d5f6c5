"""`/v1/completions`: texts continued, as an event stream or whole."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire import sse
from fallow.wire.chat_request import sampling
from fallow.wire.generation import Called, Choice, Ended, Event, Generation, Reasoning, Stamp, Text, Token, gather
from fallow.wire.openai import decode
from fallow.wire.openai_fields import Common, TokenId, check_stream_options, usage_fields

PROMPTS_MAX = 16
MAX_TOKENS_DEFAULT = 16
"""OpenAI's own default for this endpoint."""
PromptText = Annotated[str, Meta(min_length=1)]
PromptTokens = Annotated[list[TokenId], Meta(min_length=1)]
Prompt = PromptText | Annotated[list[PromptText | TokenId | PromptTokens], Meta(min_length=1)]


class CompletionRequest(Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole request. A prompt is a text, tokens, or a list of either; `suffix` is OpenAI's, and no packaged engine can fill it."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    suffix: None = None


_decoder = msgspec.json.Decoder(CompletionRequest)
_encode = msgspec.json.Encoder().encode


def read(body: bytes) -> tuple[CompletionRequest, Generation]:
    """A request and what it asks of an engine; raises InvalidRequest naming the parameter."""
    request: CompletionRequest = decode(_decoder, body)
    check_stream_options(request)
    prompts = _prompts(request.prompt)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("best_of can't be more than n with this model's engine", param="best_of")
    if request.echo and (request.logprobs is not None or not all(isinstance(prompt, str) for prompt in prompts)):
        raise InvalidRequest("echo can't be combined with logprobs or token prompts with this model's engine", param="echo")
    generation = Generation(
        prompts=prompts,
        sampling=sampling(request, request.max_tokens or MAX_TOKENS_DEFAULT),
        choices=request.n or 1,
        top_logprobs=request.logprobs,
        params={"messages": "prompt", "max_tokens": "max_tokens"},
    )
    return request, generation


def _prompts(prompt: Prompt) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if all(isinstance(one, int) for one in prompt):
        return (tuple(one for one in prompt if isinstance(one, int)),)
    if len(prompt) > PROMPTS_MAX:
        raise InvalidRequest(f"at most {PROMPTS_MAX} prompts can be continued by one call", param="prompt")
    found: list[str | tuple[int, ...]] = []
    for index, one in enumerate(prompt):
        if isinstance(one, int):
            raise InvalidRequest("a prompt's list holds either tokens, or texts and lists of tokens", param=f"prompt[{index}]")
        found.append(one if isinstance(one, str) else tuple(one))
    return tuple(found)


class CompletionsEndpoint:
    """One request for completions; see Endpoint."""

    def __init__(self, body: bytes, stamp: Stamp) -> None:
        request, self.generation = read(body)
        self.stream = bool(request.stream)
        self._echo = bool(request.echo)
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._head: dict[str, Any] = {
            "id": f"cmpl-{stamp.id}",
            "object": "text_completion",
            "created": stamp.created_s,
            "model": stamp.model,
        }
        self._offsets = [0] * (len(self.generation.prompts) * self.generation.choices)

    def begin(self) -> bytes:
        if not self._echo:
            return b""
        return b"".join(self._chunk(index, self._prompt(index)) for index in range(len(self._offsets)))

    def _prompt(self, choice: int) -> str:
        prompt = self.generation.prompts[choice // self.generation.choices]
        return prompt if isinstance(prompt, str) else ""

    def write(self, event: Event) -> bytes:
        match event:
            case Text():
                return self._chunk(event.choice, event.text, logprobs=self._logprobs(event.choice, event.tokens))
            case Reasoning() | Called():
                return b""
            case Ended():
                return self._chunk(event.choice, "", finish=event.reason)

    def _chunk(self, index: int, text: str, *, finish: str | None = None, logprobs: dict[str, Any] | None = None) -> bytes:
        fields = self._head | {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]}
        return sse.event(_encode(fields))

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log probabilities in the form of this old endpoint; offsets count characters of the choice's text."""
        if self.generation.top_logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{one.token: one.logprob for one in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def end(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return sse.DONE
        return sse.event(_encode(self._head | {"choices": [], "usage": usage_fields(usage)})) + sse.DONE

    def whole(self, events: Sequence[Event], usage: Usage) -> bytes:
        choices = [self._whole(index, choice) for index, choice in enumerate(gather(events, len(self._offsets)))]
        return _encode(self._head | {"choices": choices, "usage": usage_fields(usage)})

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = (self._prompt(index) if self._echo else "") + choice.text
        return {"index": index, "text": text, "logprobs": self._logprobs(index, choice.tokens), "finish_reason": choice.reason}

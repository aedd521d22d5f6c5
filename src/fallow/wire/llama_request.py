"""What a generation asks of a llama.cpp engine, put so that the engine can't misunderstand it."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fallow.wire.generation import Generation, Sampling, ToolCall, Turn
from fallow.wire.openai import CHAT, COMPLETIONS

_COMMON = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>")


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is asked, but for the slot that answers it. The prompt comes first in `body`: what begins alike, reads alike."""

    path: str
    body: bytes


class Neutraliser:
    """Breaks control tokens in what callers wrote: else a user could speak as the system.

    `control_tokens` are those of the model's vocabulary; anything of the common form `<|…|>` is broken besides.
    """

    def __init__(self, control_tokens: Iterable[str] = ()) -> None:
        self._tokens = frozenset(token for token in control_tokens if len(token) > 1)
        self._lengths = sorted({len(token) for token in self._tokens})
        firsts = {"<"} | {token[0] for token in self._tokens}
        self._first = re.compile("[" + "".join(re.escape(first) for first in sorted(firsts)) + "]")

    def text(self, text: str) -> str:
        """The same text, in which nothing is a control token."""
        return self._first.sub(self._broken, text)

    def _broken(self, found: re.Match[str]) -> str:
        text, at = found.string, found.start()
        is_control = _COMMON.match(text, at) or any(text[at : at + length] in self._tokens for length in self._lengths)
        return found.group() + "\u200b" if is_control else found.group()

    def turns(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The same conversation, in which nothing is a control token."""
        return tuple(msgspec.structs.replace(turn, text=self.text(turn.text), calls=self._calls(turn.calls)) for turn in turns)

    def _calls(self, calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
        return tuple(msgspec.structs.replace(call, arguments=self.text(call.arguments)) for call in calls)


def chat(generation: Generation, turns: Sequence[Turn], sampling: Sampling, *, schema: dict[str, Any] | None) -> EngineRequest:
    """A conversation's next turn. The turns' roles are those that every template knows: system, user, assistant."""
    fields: dict[str, Any] = {"messages": messages(generation, turns)}
    fields |= _common(generation, sampling)
    if schema is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if generation.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": max(1, generation.top_logprobs)}
    if generation.think is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": generation.think}
    return EngineRequest(path=CHAT, body=msgspec.json.encode(fields))


def completion(generation: Generation, prompt: str | tuple[int, ...], sampling: Sampling) -> EngineRequest:
    """A text's continuation."""
    said = "".join(generation.delivered or ())
    fields: dict[str, Any] = {"prompt": prompt if not said else prompt + said if isinstance(prompt, str) else [*prompt, said]}
    fields |= _common(generation, sampling)
    if generation.top_logprobs is not None:
        fields["n_probs"] = max(1, generation.top_logprobs)
    return EngineRequest(path=COMPLETIONS, body=msgspec.json.encode(fields))


def messages(generation: Generation, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """A conversation as engines take it. An assistant's words at its end are gone on with."""
    found = [{"role": turn.role, "content": turn.text} for turn in turns]
    said = "".join(generation.delivered or ())
    if said and found and found[-1]["role"] == "assistant":
        found[-1]["content"] += said
    elif said:
        found.append({"role": "assistant", "content": said})
    return found


def placed(request: EngineRequest, *, slot: int, may_reuse: bool, choices: int = 1) -> bytes:
    """The body for one of the engine's slots. Unless it may reuse what the slot remembers, all of the prompt is read anew.

    The choices are numbered from 0. Those after the first are written in other free slots, which the engine empties afterwards.
    """
    fields = {"id_slot": slot, "cache_prompt": may_reuse} | ({"n": choices} if choices > 1 else {})
    return request.body[:-1] + b"," + msgspec.json.encode(fields)[1:]


def _common(generation: Generation, sampling: Sampling) -> dict[str, Any]:
    """The engine is always asked to stream and to tell its progress: only then does it notice that nobody waits any more."""
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
    for name in ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed"):
        value = getattr(sampling, name)
        if name == "max_tokens" and value is not None:
            value = max(1, value - len(generation.delivered or ()))
        if value is not None:
            fields[name] = value
    if sampling.stop and not generation.tells_stop:
        fields["stop"] = list(sampling.stop)
    if generation.tells_stop:
        fields["timings_per_token"] = True
    if sampling.logit_bias:
        fields["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
    return fields


def template(turns: Sequence[Turn]) -> bytes:
    """The body for `/apply-template`, which tells the text that a conversation becomes."""
    return msgspec.json.encode({"messages": [{"role": turn.role, "content": turn.text} for turn in turns]})


def tokenize(text: str) -> bytes:
    """The body for `/tokenize`."""
    return msgspec.json.encode({"content": text, "add_special": True, "parse_special": True})

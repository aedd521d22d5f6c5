"""Brings an engine's slot to where another engine broke off: token by token, so that a greedy answer goes on as it would have gone.

How many tokens an engine reads at once changes the last digits of what it computes, and with them now and then a word. Up to
STEP_TOKENS at once it computes what it would have computed writing them one by one (measured with llama.cpp: bit for bit).
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from fallow.model.errors import EngineFailed
from fallow.wire import llama_request
from fallow.wire.generation import Generation, Turn
from fallow.wire.llama_answer import UNREADABLE

STEP_TOKENS = 4
RETRACED_TOKENS_MAX = 2_048
"""Reading in small steps takes about a third of the time that writing took; a longer answer is read at once, and goes on as it may."""

_T = TypeVar("_T")
Fetch = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]


class _Prompt(msgspec.Struct, frozen=True):
    prompt: str


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


def wants(generation: Generation) -> bool:
    """Whether the answer is one that can be gone on with exactly."""
    return bool(generation.delivered) and generation.sampling.temperature == 0.0


async def retrace(generation: Generation, turns: Sequence[Turn], fetch: Fetch, *, slot: int, may_reuse: bool) -> bool:
    """Have the slot read the prompt at once and the delivered text in small steps; False if it reads nothing. Raises EngineFailed."""
    prompt, whole = await _tokens(generation, turns, fetch)
    begin = len(prompt)
    if whole[:begin] != prompt or len(whole) - begin > RETRACED_TOKENS_MAX:
        return False
    for end in [*range(begin, len(whole) - 1, STEP_TOKENS), len(whole) - 1]:
        fields = {"prompt": whole[:end], "n_predict": 0, "id_slot": slot, "cache_prompt": may_reuse or end > begin}
        status, _ = await fetch("/completion", msgspec.json.encode(fields))
        if status != 200:
            return False
    return True


async def _tokens(generation: Generation, turns: Sequence[Turn], fetch: Fetch) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and those of the prompt with what was delivered of its answer."""
    if generation.prompts:
        (prompt,) = generation.prompts
        said = "".join(generation.delivered or ())
        if not isinstance(prompt, str):
            return list(prompt), [*prompt, *await _tokenize(said, fetch, is_start=False)]
        return await _tokenize(prompt, fetch), await _tokenize(prompt + said, fetch)
    texts = []
    for messages in ([{"role": turn.role, "content": turn.text} for turn in turns], llama_request.messages(generation, turns)):
        status, answer = await fetch("/apply-template", msgspec.json.encode({"messages": messages}))
        texts.append(_decoded(status, answer, _Prompt).prompt)
    return await _tokenize(texts[0], fetch), await _tokenize(texts[1], fetch)


async def _tokenize(text: str, fetch: Fetch, *, is_start: bool = True) -> list[int]:
    fields = {"content": text, "add_special": is_start, "parse_special": True}
    return _decoded(*await fetch("/tokenize", msgspec.json.encode(fields)), _Tokens).tokens


def _decoded(status: int, answer: bytes, kind: type[_T]) -> _T:
    if status == 200:
        try:
            return msgspec.json.decode(answer, type=kind)
        except UNREADABLE:
            pass
    raise EngineFailed("the engine wrote an answer that can't be read")

"""What every text endpoint asks of an engine, and what comes back: the form between the endpoints and the engines."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from fallow.model.receipt import Usage

ToolChoice = Literal["auto", "none", "required"]
Reason = Literal["stop", "length", "tool_calls"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A model's wish to call a tool. `arguments` is JSON text of an object."""

    id: str
    name: str
    arguments: str


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation. A turn of an assistant may carry calls; one of a tool answers the call `call_id`."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call; `parameters` is the JSON schema of its arguments, an object's."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. None leaves it to the engine."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = {}


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A text to be written: a conversation's next turn (`turns`), or the continuation of each of the `prompts`.

    Choices are numbered prompt by prompt: choice `p * choices + i` is the i-th for prompt p. `top_logprobs` None wants no
    log probabilities. `tells_stop` is set where the answer must say which stop sequence it met. `tool_name` is the one tool that
    must be called, with `tool_choice` "required". `schema` is what the text must fit. `delivered` are the pieces, a token each
    as far as is known, of a text that another engine began: what is written goes on from there.
    `params` names the request's fields for errors: {"schema": "response_format.json_schema.schema",
    "tools": "tools[{index}].function.parameters", …}.
    """

    turns: tuple[Turn, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    sampling: Sampling = Sampling()
    choices: int = 1
    top_logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    tool_name: str | None = None
    parallel_calls: bool = True
    schema: dict[str, Any] | None = None
    think: bool | None = None
    tells_stop: bool = False
    params: dict[str, str] = {}
    delivered: tuple[str, ...] | None = None


def may_continue(generation: Generation) -> bool:
    """Whether an engine can go on with such a text where another one broke off: only if nothing but its words matters so far."""
    return (
        generation.choices == 1
        and len(generation.prompts) <= 1
        and (not generation.tools or generation.tool_choice == "none")
        and generation.schema is None
        and generation.top_logprobs is None
        and not generation.tells_stop
    )


class Alternative(msgspec.Struct, frozen=True):
    """A token that the model might have chosen; `bytes` are its UTF-8 code units."""

    token: str
    bytes: list[int]
    logprob: float


class Token(Alternative, frozen=True):
    """A token that it chose, with the likeliest alternatives."""

    top: tuple[Alternative, ...] = ()


class Text(msgspec.Struct, frozen=True):
    """A piece of a choice's text."""

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thought before it answered."""

    choice: int
    text: str


class Called(msgspec.Struct, frozen=True):
    """A whole call of a tool, whose arguments fit the tool's schema; `index` counts a choice's calls from 0."""

    choice: int
    index: int
    call: ToolCall


class Ended(msgspec.Struct, frozen=True):
    """A choice is over. `stop_text` is the stop sequence that it met, if that is known."""

    choice: int
    reason: Reason
    stop_text: str | None = None


Event = Text | Reasoning | Called | Ended


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in every event of an answer. `id` is a random word without a prefix; `created_s` is UTC."""

    id: str
    created_s: int
    model: str


class Endpoint(Protocol):
    """One request to a text endpoint, read, and the form of its answer.

    A streamed answer is `begin()`, then `write()` for each event, then `end()`; a whole one is `whole()`.
    Events of several choices may be mixed; those of one choice come in order and close with its `Ended`.
    """

    generation: Generation
    stream: bool

    def begin(self) -> bytes: ...

    def write(self, event: Event) -> bytes: ...

    def end(self, usage: Usage) -> bytes: ...

    def whole(self, events: Sequence[Event], usage: Usage) -> bytes: ...


class Choice(msgspec.Struct):
    """One choice, put together from its events."""

    text: str = ""
    reasoning: str = ""
    tokens: list[Token] = []
    calls: list[ToolCall] = []
    reason: Reason = "stop"
    stop_text: str | None = None


def gather(events: Sequence[Event], choices: int) -> list[Choice]:
    """All choices of an answer."""
    texts: list[list[str]] = [[] for _ in range(choices)]
    thoughts: list[list[str]] = [[] for _ in range(choices)]
    found = [Choice() for _ in range(choices)]
    for event in events:
        choice = found[event.choice]
        match event:
            case Text():
                texts[event.choice].append(event.text)
                choice.tokens.extend(event.tokens)
            case Reasoning():
                thoughts[event.choice].append(event.text)
            case Called():
                choice.calls.append(event.call)
            case Ended():
                choice.reason, choice.stop_text = event.reason, event.stop_text
    for choice, text, thought in zip(found, texts, thoughts, strict=True):
        choice.text, choice.reasoning = "".join(text), "".join(thought)
    return found

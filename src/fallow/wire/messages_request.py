"""`/v1/messages`: the request of Anthropic's API, checked against what a packaged engine can do."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fallow.model.errors import InvalidRequest, shortened
from fallow.wire import openai
from fallow.wire.generation import Generation, Sampling, Tool, ToolCall, ToolChoice, Turn
from fallow.wire.openai import TOKENS_MAX

NESTING_MAX = 100
"""How deep a schema or a call's input may go."""
_SAME = ("messages", "max_tokens", "temperature", "top_p", "top_k", "tool_choice")
PARAMS = {name: name for name in _SAME} | {
    **{"tools": "tools[{index}].input_schema", "stop": "stop_sequences"},
    "tool_name": "tool_choice.name",
    "parallel_calls": "tool_choice.disable_parallel_tool_use",
    "schema": "output_config.format.schema",
    "think": "thinking",
}
"""What the parts of a Generation are called in this request."""

T = TypeVar("T")
Share = Annotated[float, Meta(ge=0, le=1)]
Word = Annotated[str, Meta(min_length=1)]
CallId = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]+\Z")]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything here refuses a field that it doesn't know: better than to pass over a wish in silence."""


class CacheControl(Strict, frozen=True, kw_only=True):
    """Where the caller would like a cache to cut. Engines decide that themselves."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | UnsetType = UNSET


class TextBlock(Strict, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: Word
    cache_control: CacheControl | None = None
    citations: list[dict[str, Any]] | None = None


class ImageBlock(msgspec.Struct, frozen=True, tag_field="type", tag="image"):
    """Not understood by a model without eyes."""


class DocumentBlock(msgspec.Struct, frozen=True, tag_field="type", tag="document"):
    """A file, which a model of text can't open."""


Unseen = ImageBlock | DocumentBlock  # a type that stands alone needs no tag, so these also see to it that a text says its type


class ToolUseBlock(Strict, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call in the history."""

    id: CallId
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    input: dict[str, Any]
    caller: dict[str, Any] | UnsetType = UNSET
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict, frozen=True, kw_only=True, tag_field="type", tag="tool_result"):
    """What a call in the history came to."""

    tool_use_id: CallId
    content: str | list[TextBlock | Unseen] = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What a model thought earlier; it isn't said again."""

    thinking: str
    signature: str


class RedactedThinkingBlock(Strict, frozen=True, kw_only=True, tag_field="type", tag="redacted_thinking"):
    """The same, hidden by another provider."""

    data: str


UserBlock = TextBlock | ToolResultBlock | Unseen
AssistantBlock = TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock | Unseen


class UserMessage(Strict, frozen=True, kw_only=True, tag_field="role", tag="user"):
    content: str | list[UserBlock]


class AssistantMessage(Strict, frozen=True, kw_only=True, tag_field="role", tag="assistant"):
    content: str | list[AssistantBlock]


Message = UserMessage | AssistantMessage


class OwnTool(Strict, frozen=True, kw_only=True):
    """A tool that the caller runs."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}\Z")]
    input_schema: dict[str, Any]
    description: str = ""
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool = False
    eager_input_streaming: bool | None = None


class ToolList(msgspec.Struct, frozen=True, kw_only=True):
    """Around the tools, so that an error's path begins with their name."""

    tools: list[OwnTool]


class AutoChoice(Strict, frozen=True, kw_only=True, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool = False


class AnyChoice(Strict, frozen=True, kw_only=True, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool = False


class NamedChoice(Strict, frozen=True, kw_only=True, tag_field="type", tag="tool"):
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(Strict, frozen=True, kw_only=True, tag_field="type", tag="none"):
    disable_parallel_tool_use: bool = False


Choice = AutoChoice | AnyChoice | NamedChoice | NoChoice


class ThinkingEnabled(Strict, frozen=True, kw_only=True, tag_field="type", tag="enabled"):
    budget_tokens: Annotated[int, Meta(ge=1024, le=TOKENS_MAX)]


class ThinkingDisabled(Strict, frozen=True, kw_only=True, tag_field="type", tag="disabled"):
    """No thinking."""


class ThinkingAdaptive(Strict, frozen=True, kw_only=True, tag_field="type", tag="adaptive"):
    """As much as the model likes."""


Thinking = ThinkingEnabled | ThinkingDisabled | ThinkingAdaptive


class JsonFormat(Strict, frozen=True, kw_only=True):
    """The schema that the answer must fit."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Strict, frozen=True, kw_only=True):
    """The form of the answer."""

    format: JsonFormat | None = None


class Metadata(Strict, frozen=True, kw_only=True):
    """For whom the caller asks."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class CountRequest(Strict, frozen=True, kw_only=True):
    """`/v1/messages/count_tokens`. `tools` are looked at in a second step: one of another kind has fields of its own.

    Null is taken where Anthropic's schema has it. `fallow` is the gateway's business.
    """

    model: Word
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: str | list[TextBlock | Unseen] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: Choice | UnsetType = UNSET
    thinking: Thinking | UnsetType = UNSET
    output_config: OutputConfig | UnsetType = UNSET
    cache_control: CacheControl | None = None
    fallow: dict[str, Any] | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """`/v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
    stream: bool = False
    stop_sequences: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=8)] = []
    temperature: Share | UnsetType = UNSET
    top_p: Share | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0, le=TOKENS_MAX)] | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    service_tier: Literal["auto", "standard_only"] | UnsetType = UNSET


_messages = msgspec.json.Decoder(MessagesRequest)
_count = msgspec.json.Decoder(CountRequest)


def read(body: bytes) -> tuple[MessagesRequest, Generation]:
    """A request and what it asks of an engine; raises InvalidRequest naming the parameter."""
    request: MessagesRequest = _decode(_messages, body)
    thinking = request.thinking
    if isinstance(thinking, ThinkingEnabled) and thinking.budget_tokens >= request.max_tokens:
        at = "thinking.budget_tokens"
        raise InvalidRequest(f"{at} must be less than max_tokens, {request.max_tokens}; raise max_tokens or lower it", param=at)
    for index, text in enumerate(request.stop_sequences):
        if not text.strip():
            raise InvalidRequest(f"stop_sequences[{index}] must not be white space only", param=f"stop_sequences[{index}]")
    sampling = Sampling(
        max_tokens=request.max_tokens,
        temperature=_given(request.temperature),
        top_p=_given(request.top_p),
        top_k=_given(request.top_k),
        stop=tuple(request.stop_sequences),
    )
    return request, _generation(request, sampling)


def read_count(body: bytes) -> Generation:
    """What a request to count tokens would ask of an engine; raises InvalidRequest naming the parameter."""
    return _generation(_decode(_count, body), Sampling())


def _decode(decoder: "msgspec.json.Decoder[Any]", body: bytes) -> Any:
    try:
        return openai.decode(decoder, body)
    except InvalidRequest as error:  # of a value that isn't in its list, msgspec says back the whole
        if error.param is not None and error.message.startswith((f"{error.param}: Invalid value", f"{error.param}: Invalid enum value")):
            raise InvalidRequest(f"{error.param} is not one of the values that are taken here", param=error.param) from None
        raise


def _given(value: T | UnsetType) -> T | None:
    return None if value is UNSET else value


def _generation(request: CountRequest, sampling: Sampling) -> Generation:
    tools = _tools(request.tools)
    choice, name = _choice(request.tool_choice, tools)
    return Generation(
        turns=_turns(request),
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        tool_name=name,
        parallel_calls=isinstance(request.tool_choice, UnsetType) or not request.tool_choice.disable_parallel_tool_use,
        schema=_schema(request.output_config),
        think=None if isinstance(request.thinking, UnsetType) else not isinstance(request.thinking, ThinkingDisabled),
        tells_stop=bool(sampling.stop),
        params=PARAMS,
    )


def _tools(entries: list[dict[str, Any]]) -> tuple[Tool, ...]:
    for index, entry in enumerate(entries):
        if entry.get("type") not in (None, "custom"):
            at = f"tools[{index}].type"
            raise InvalidRequest(f'{at} must be "custom" or absent: only tools that the caller runs are known here', param=at)
        _check_nesting(entry, f"tools[{index}]")
    try:
        tools = msgspec.convert({"tools": entries}, ToolList).tools
    except msgspec.ValidationError as error:
        raise openai.invalid(str(error)) from None
    found: dict[str, Tool] = {}
    for index, tool in enumerate(tools):
        if tool.name in found:
            raise InvalidRequest(f"tools[{index}].name: two tools are called {tool.name!r}", param=f"tools[{index}].name")
        if tool.input_schema.get("type") != "object":
            at = f"tools[{index}].input_schema.type"
            raise InvalidRequest(f'{at} must be "object"', param=at)
        found[tool.name] = Tool(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return tuple(found.values())


def _choice(choice: Choice | UnsetType, tools: Sequence[Tool]) -> tuple[ToolChoice, str | None]:
    match choice:
        case UnsetType() | AutoChoice():
            return "auto", None
        case NoChoice():
            return "none", None
        case AnyChoice() | NamedChoice() if not tools:
            raise InvalidRequest("tool_choice needs tools; give some or leave it out", param="tool_choice")
        case AnyChoice():
            return "required", None
        case NamedChoice(name=name):
            if any(tool.name == name for tool in tools):
                return "required", name
            raise InvalidRequest(f"tool_choice.name: no tool is called {shortened(name)!r}", param="tool_choice.name")


def _schema(config: OutputConfig | UnsetType) -> dict[str, Any] | None:
    if config is UNSET or config.format is None:
        return None
    _check_nesting(config.format.schema, PARAMS["schema"])
    return config.format.schema


def _turns(request: CountRequest) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    called: set[str] = set()
    last = len(request.messages) - 1
    for index, message in enumerate(request.messages):
        at = f"messages[{index}].content"
        if not message.content and not (isinstance(message, AssistantMessage) and index == last):
            raise InvalidRequest(f"{at} must not be empty", param=at)
        match message:
            case UserMessage(content=content):
                turns += _user(content, at, called)
            case AssistantMessage(content=content):
                said = _assistant(content, at)
                called |= {call.id for turn in said for call in turn.calls}
                turns += said
    if not turns:
        raise InvalidRequest("messages has no text to go on from; add a user message", param="messages")
    system = _text(request.system, "system")
    return (Turn(role="system", text=system), *turns) if system else tuple(turns)


def _user(content: str | list[UserBlock], at: str, called: set[str]) -> list[Turn]:
    """The results of tools first, then what the user says, as one turn."""
    if isinstance(content, str):
        return [Turn(role="user", text=content)]
    turns, texts = [], []
    for index, block in enumerate(content):
        here = f"{at}[{index}]"
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolResultBlock():
                if block.tool_use_id not in called:
                    raise InvalidRequest(f"{here}.tool_use_id answers no tool_use of an earlier message", param=f"{here}.tool_use_id")
                text = _text(block.content, f"{here}.content")
                turns.append(Turn(role="tool", text=f"Error: {text}" if block.is_error else text, call_id=block.tool_use_id))
            case ImageBlock() | DocumentBlock():
                raise _unseen(block, here)
    if texts:
        turns.append(Turn(role="user", text="".join(texts)))
    return turns


def _assistant(content: str | list[AssistantBlock], at: str) -> list[Turn]:
    """One turn, or none if nothing but thoughts were said."""
    if isinstance(content, str):
        return [Turn(role="assistant", text=content)] if content else []
    texts, calls = [], []
    for index, block in enumerate(content):
        here = f"{at}[{index}]"
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock():
                _check_nesting(block.input, f"{here}.input")
                calls.append(ToolCall(id=block.id, name=block.name, arguments=msgspec.json.encode(block.input).decode()))
            case ImageBlock() | DocumentBlock():
                raise _unseen(block, here)
            case ThinkingBlock() | RedactedThinkingBlock():
                pass
    return [Turn(role="assistant", text="".join(texts), calls=tuple(calls))] if texts or calls else []


def _text(content: str | Sequence[TextBlock | Unseen], at: str) -> str:
    """Blocks as one text, with nothing between: callers cut a text at any place to mark what to cache."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        if not isinstance(block, TextBlock):
            raise _unseen(block, f"{at}[{index}]")
        texts.append(block.text)
    return "".join(texts)


def _unseen(block: Unseen, at: str) -> InvalidRequest:
    kind = "images" if isinstance(block, ImageBlock) else "documents"
    return InvalidRequest(f"{at}: this model takes text only, no {kind}", param=at)


def _check_nesting(value: object, at: str) -> None:
    waiting = [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        if not isinstance(part, dict | list):
            continue
        if depth > NESTING_MAX:
            raise InvalidRequest(f"{at} is nested deeper than {NESTING_MAX} levels", param=at)
        waiting += [(inner, depth + 1) for inner in (part.values() if isinstance(part, dict) else part)]

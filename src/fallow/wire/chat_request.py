"""`/v1/chat/completions`: the request, checked against what a packaged engine can do."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fallow.model.errors import InvalidRequest, shortened
from fallow.wire.generation import Generation, Sampling, Tool, ToolCall, ToolChoice, Turn
from fallow.wire.openai import decode
from fallow.wire.openai_fields import Common, Metadata, Tokens, TopLogprobs, Word, check_stream_options, stop_texts

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
PARAMS = {
    "tools": "tools[{index}].function.parameters",
    "schema": "response_format.json_schema.schema",
    "messages": "messages",
    "max_tokens": "max_tokens",
}


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """Not understood by a model without eyes."""


class AudioPart(msgspec.Struct, frozen=True, tag_field="type", tag="input_audio"):
    """Not understood by a model without ears."""


class FilePart(msgspec.Struct, frozen=True, tag_field="type", tag="file"):
    """A document."""


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart
Content = str | Annotated[list[Part], Meta(min_length=1)]
SENSE: dict[type, str] = {ImagePart: "images", AudioPart: "audio", FilePart: "files"}


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which function an earlier turn called, with JSON text as arguments."""

    name: FunctionName
    arguments: str


class EarlierCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in the history."""

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    type: Literal["function"]
    function: Function
    index: int | None = None


class SystemMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="system"):
    content: Content
    name: str | None = None


class DeveloperMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="developer"):
    content: Content
    name: str | None = None


class UserMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="user"):
    content: Content
    name: str | None = None


class AssistantMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """An earlier answer. What it was made of besides text and calls (thoughts, annotations) isn't said again."""

    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[EarlierCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: list[Any] | None = None
    function_call: None = None
    audio: None = None


class ToolMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that may be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionTool


class ChosenFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named schema that the answer must fit."""

    name: FunctionName
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole request. Fields of type None are OpenAI's that no packaged engine can fill; null is fine for them."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    response_format: ResponseFormat | None = None
    tools: list[ChatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None


_decoder = msgspec.json.Decoder(ChatRequest)


def read(body: bytes) -> tuple[ChatRequest, Generation]:
    """A request and what it asks of an engine; raises InvalidRequest naming the parameter."""
    request: ChatRequest = decode(_decoder, body)
    check_stream_options(request)
    if request.store:
        raise InvalidRequest("answers are not stored here; leave store out or set it to false", param="store")
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None and request.max_tokens != request.max_completion_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens disagree; give one", param="max_tokens")
    tools = _tools(request.tools)
    choice, name = _choice(request, tools)
    generation = Generation(
        turns=_turns(request.messages),
        sampling=sampling(request, request.max_completion_tokens or request.max_tokens),
        choices=request.n or 1,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        tools=tools,
        tool_choice=choice,
        tool_name=name,
        parallel_calls=request.parallel_tool_calls is not False,
        schema=_schema(request.response_format),
        think=None if request.reasoning_effort is None else request.reasoning_effort not in ("none", "minimal"),
        params=PARAMS if request.max_completion_tokens is None else PARAMS | {"max_tokens": "max_completion_tokens"},
    )
    return request, generation


def sampling(request: Common, max_tokens: int | None) -> Sampling:
    """How tokens are to be chosen."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        seed=request.seed,
        stop=stop_texts(request.stop),
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
    )


def _tools(tools: list[ChatTool] | None) -> tuple[Tool, ...]:
    found: dict[str, Tool] = {}
    for index, tool in enumerate(tools or ()):
        function = tool.function
        if function.name in found:
            raise InvalidRequest(f"two tools are called {function.name!r}", param=f"tools[{index}].function.name")
        found[function.name] = Tool(name=function.name, description=function.description or "", parameters=function.parameters or {})
    return tuple(found.values())


def _choice(request: ChatRequest, tools: tuple[Tool, ...]) -> tuple[ToolChoice, str | None]:
    choice = request.tool_choice
    if choice in (None, "auto", "none"):
        return ("none" if choice == "none" else "auto"), None
    if not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        if all(tool.name != name for tool in tools):
            raise InvalidRequest(f"no tool is called {shortened(name)!r}", param="tool_choice.function.name")
        return "required", name
    return "required", None


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema is required", param="response_format.json_schema")
    return wanted.json_schema.schema


def _turns(messages: list[Message]) -> tuple[Turn, ...]:
    called: set[str] = set()
    turns = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        match message:
            case SystemMessage() | DeveloperMessage():
                turns.append(Turn(role="system", text=_text(message.content, at)))
            case UserMessage():
                turns.append(Turn(role="user", text=_text(message.content, at)))
            case AssistantMessage():
                turns.append(_assistant(message, at))
                called |= {call.id for call in turns[-1].calls}
            case ToolMessage():
                if message.tool_call_id not in called:
                    raise InvalidRequest(f"{at}.tool_call_id answers no call of an earlier message", param=f"{at}.tool_call_id")
                turns.append(Turn(role="tool", text=_text(message.content, at), call_id=message.tool_call_id))
    return tuple(turns)


def _assistant(message: AssistantMessage, at: str) -> Turn:
    calls = tuple(ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments) for c in message.tool_calls or ())
    if message.content is None and not calls and message.refusal is None:
        raise InvalidRequest(f"{at}.content is required where there are no tool_calls", param=f"{at}.content")
    text = _text(message.content, at) if message.content is not None else message.refusal or ""
    return Turn(role="assistant", text=text, calls=calls)


def _text(content: Content, at: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        match part:
            case TextPart():
                texts.append(part.text)
            case RefusalPart():
                texts.append(part.refusal)
            case ImagePart() | AudioPart() | FilePart():
                where = f"{at}.content[{index}]"
                raise InvalidRequest(f"{where}: this model takes text only, no {SENSE[type(part)]}", param=where)
    return "".join(texts)

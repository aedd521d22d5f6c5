"""`/v1/responses`: the request, checked, and turned into what it asks of an engine."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from fallow.model.errors import InvalidRequest, shortened
from fallow.wire.generation import Generation, Sampling, Tool, ToolCall, ToolChoice, Turn
from fallow.wire.openai import Tier, decode, invalid
from fallow.wire.openai_fields import Share, Temperature, Tokens, TopLogprobs, Word

TOOLS_MAX = 128
METADATA_KEY_MAX = 64
SCHEMA_DEPTH_MAX = 64
"""Answers repeat the tools and the form; what nests deeper might be read and yet not be written again."""
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    **{name: name for name in ("temperature", "top_p", "top_logprobs", "tool_choice")},
    "tools": "tools[{index}].parameters",
    "parallel_calls": "parallel_tool_calls",
    "schema": "text.format.schema",
    "think": "reasoning.effort",
}
INSTEAD = {
    "background": "every answer is waited for; leave it out and, for a long one, set stream to true",
    "context_management": "nothing is shortened here; send no more than fits the model's context",
    "conversation": "no conversation is kept here; send its messages in input",
    "max_tool_calls": "tools run on your side, so count their calls there",
    "previous_response_id": "no answer is kept here; send the earlier messages in input",
    "prompt": "no prompt is kept here; write it into instructions or input",
}
"""Parameters that can't be fulfilled, each with what to do instead."""
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
SENSES = {"input_image": "images", "input_file": "files", "input_audio": "audio"}

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
CallId = Annotated[str, Meta(min_length=1, max_length=128)]
Status = Literal["in_progress", "completed", "incomplete"]
Summary = Literal["auto", "concise", "detailed"]
Fields = dict[str, Any]
Items = Annotated[list[Fields], Meta(min_length=1)]
Metadata = Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
T = TypeVar("T")


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a request, all of whose fields are known."""


class TextPart(Strict, frozen=True):
    """A piece of text of a caller or a tool."""

    type: Literal["input_text"]
    text: str


class AnswerPart(Strict, frozen=True):
    """A piece of an earlier answer; what is known of it besides the text isn't said again."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Strict, frozen=True):
    """An earlier answer that was a refusal."""

    type: Literal["refusal"]
    refusal: str


PARTS: dict[str, type[TextPart | AnswerPart | RefusalPart]] = {"input_text": TextPart, "output_text": AnswerPart, "refusal": RefusalPart}


class MessageItem(Strict, frozen=True):
    """A message of anyone but a tool."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Fields]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Strict, frozen=True):
    """An earlier call of a tool."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Status | None = None


class OutputItem(Strict, frozen=True):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str | list[Fields]
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Strict, frozen=True):
    """What the model thought before an earlier answer; it isn't shown to it again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Fields] | None = None
    content: list[Fields] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class FunctionTool(Strict, frozen=True):
    """A function that may be called."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Fields | None = None
    strict: bool | None = None


class ChosenFunction(Strict, frozen=True):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName


class PlainFormat(Strict, frozen=True, tag_field="type", tag="text"):
    """Any text."""


class ObjectFormat(Strict, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaFormat(Strict, frozen=True, tag_field="type", tag="json_schema", omit_defaults=True):
    """JSON that fits a schema."""

    name: FunctionName
    schema: Fields
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict, frozen=True):
    """The form of the answer's text. How wordy it is stays the model's choice."""

    format: PlainFormat | ObjectFormat | SchemaFormat = PlainFormat()
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict, frozen=True):
    """Whether the model is to think first. No summary is ever written."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None


class StreamOptions(Strict, frozen=True):
    """How a stream looks. Its events get no random filling."""

    include_obfuscation: bool | None = None


class CountRequest(Strict, frozen=True):
    """What decides the length of a prompt: `/v1/responses/input_tokens`. Fields of type Any are refused unless they are null."""

    model: str
    input: str | Items | None = None
    instructions: str | None = None
    tools: Annotated[list[Fields], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: str | Fields | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    previous_response_id: Any = None
    conversation: Any = None
    fallow: Fields | None = None


class ResponsesRequest(CountRequest, frozen=True):
    """The whole request. `fallow` is the gateway's business."""

    input: str | Items
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    user: Word | None = None
    safety_identifier: Annotated[str, Meta(max_length=64)] | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Tier | None = None
    background: Any = None
    context_management: Any = None
    max_tool_calls: Any = None
    prompt: Any = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request, with the parts that the answer repeats."""

    request: ResponsesRequest
    generation: Generation
    tools: tuple[FunctionTool, ...]
    tool_choice: ToolChoice | ChosenFunction


_request = msgspec.json.Decoder(ResponsesRequest)
_count = msgspec.json.Decoder(CountRequest)
_arguments = msgspec.json.Decoder(Fields)


def read(body: bytes) -> Asked:
    """A request and what it asks of an engine; raises InvalidRequest naming the parameter."""
    request: ResponsesRequest = decode(_request, body)
    if request.store:
        raise InvalidRequest("answers aren't kept here; keep them yourself and send the history in input", param="store")
    if any(len(key) > METADATA_KEY_MAX for key in request.metadata or ()):
        raise InvalidRequest(f"a key of metadata has at most {METADATA_KEY_MAX} characters", param="metadata")
    for index, wish in enumerate(request.include or ()):
        if wish not in (LOGPROBS, ENCRYPTED):
            raise InvalidRequest(f"only {LOGPROBS} can be included", param=f"include[{index}]")
    sampling = Sampling(max_tokens=request.max_output_tokens, temperature=request.temperature, top_p=request.top_p)
    wants_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    return _asked(request, sampling, (request.top_logprobs or 0) if wants_logprobs else None)


def read_count(body: bytes) -> Generation:
    """Whose prompt is to be counted; raises InvalidRequest naming the parameter."""
    count: CountRequest = decode(_count, body)
    given = {name: value for name, value in msgspec.structs.asdict(count).items() if value is not None}
    return _asked(ResponsesRequest(**{"input": [], **given}), Sampling(), None).generation


def _asked(request: ResponsesRequest, sampling: Sampling, top_logprobs: int | None) -> Asked:
    for field, advice in INSTEAD.items():
        value = getattr(request, field)
        if value is not None and not (field == "background" and value is False):
            raise InvalidRequest(f"{field} can't be used: {advice}", param=field)
    if request.truncation not in (None, "disabled"):
        raise InvalidRequest("truncation can only be disabled: send no more than fits the model's context", param="truncation")
    tools = _tools(request.tools or [])
    choice = _choice(request.tool_choice, tools)
    form = request.text.format if request.text is not None else PlainFormat()
    effort = request.reasoning.effort if request.reasoning is not None else None
    generation = Generation(
        turns=_turns(request.instructions, request.input),
        sampling=sampling,
        top_logprobs=top_logprobs,
        tools=tuple(Tool(name=t.name, description=t.description or "", parameters=t.parameters or {}) for t in tools),
        tool_choice="required" if isinstance(choice, ChosenFunction) else choice,
        tool_name=choice.name if isinstance(choice, ChosenFunction) else None,
        parallel_calls=request.parallel_tool_calls is not False,
        schema=_schema(form),
        think=None if effort is None else effort not in ("none", "minimal"),
        params=PARAMS | {"schema": "text.format"} if isinstance(form, ObjectFormat) else PARAMS,
    )
    return Asked(request=request, generation=generation, tools=tools, tool_choice=choice)


def _convert(kind: type[T], value: object, at: str) -> T:
    """One part of a request; `at` is where it stands, for the error."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        said, found, path = str(error).rpartition(" - at `$")
        raise invalid(f"{said} - at `$.{at}{path}" if found else f"{path} - at `$.{at}`") from None


def _tools(tools: Sequence[Fields]) -> tuple[FunctionTool, ...]:
    found: dict[str, FunctionTool] = {}
    for index, fields in enumerate(tools):
        at = f"tools[{index}]"
        if fields.get("type", "function") != "function":
            raise InvalidRequest(
                "only tools of the type function are taken; offer any other as a function that you run", param=f"{at}.type"
            )
        tool = _convert(FunctionTool, fields, at)
        if tool.name in found:
            raise InvalidRequest(f"two tools are called {tool.name!r}", param=f"{at}.name")
        _check_depth(tool.parameters, f"{at}.parameters")
        found[tool.name] = tool
    return tuple(found.values())


def _choice(wanted: str | Fields | None, tools: Sequence[FunctionTool]) -> ToolChoice | ChosenFunction:
    if wanted is None or wanted == "auto" or wanted == "none":
        return "none" if wanted == "none" else "auto"
    if isinstance(wanted, str) and wanted != "required":
        raise InvalidRequest('tool_choice is "none", "auto", "required" or a function', param="tool_choice")
    if isinstance(wanted, dict) and wanted.get("type", "function") != "function":
        raise InvalidRequest("a tool_choice of this type isn't understood; name a function, or offer fewer tools", param="tool_choice.type")
    chosen = _convert(ChosenFunction, wanted, "tool_choice") if isinstance(wanted, dict) else None
    if not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if chosen is None:
        return "required"
    if all(tool.name != chosen.name for tool in tools):
        raise InvalidRequest(f"no tool is called {shortened(chosen.name)!r}", param="tool_choice.name")
    return chosen


def _schema(form: PlainFormat | ObjectFormat | SchemaFormat) -> Fields | None:
    match form:
        case PlainFormat():
            return None
        case ObjectFormat():
            return {"type": "object"}
        case SchemaFormat():
            _check_depth(form.schema, "text.format.schema")
            return form.schema


def _check_depth(schema: object, param: str) -> None:
    level = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [one for part in inner for one in part]
        if not level:
            return
    raise InvalidRequest(f"the schema is nested more than {SCHEMA_DEPTH_MAX} deep", param=param)


def _turns(instructions: str | None, items: str | Sequence[Fields]) -> tuple[Turn, ...]:
    turns = [Turn(role="system", text=instructions)] if instructions else []
    if isinstance(items, str):
        return (*turns, Turn(role="user", text=items))
    called: set[str] = set()
    for index, item in enumerate(items):
        at = f"input[{index}]"
        kind = item.get("type", "item_reference" if "id" in item and "role" not in item else "message")
        if kind == "message":
            message = _convert(MessageItem, item, at)
            role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
            turns.append(Turn(role=role, text=_text(message.content, f"{at}.content", tuple(PARTS))))
        elif kind == "function_call":
            call = _call(item, at)
            called.add(call.id)
            if turns and turns[-1].role == "assistant":
                turns[-1] = msgspec.structs.replace(turns[-1], calls=(*turns[-1].calls, call))
            else:
                turns.append(Turn(role="assistant", calls=(call,)))
        elif kind == "function_call_output":
            output = _convert(OutputItem, item, at)
            if output.call_id not in called:
                raise InvalidRequest("call_id answers no function_call before it", param=f"{at}.call_id")
            turns.append(Turn(role="tool", text=_text(output.output, f"{at}.output", ("input_text",)), call_id=output.call_id))
        elif kind == "reasoning":
            _convert(ReasoningItem, item, at)
        else:
            raise InvalidRequest(f"only whole items are taken, of the types {', '.join(ITEMS)}", param=f"{at}.type")
    if len(turns) == (1 if instructions else 0):
        raise InvalidRequest("input holds no message", param="input")
    return tuple(turns)


def _call(item: Fields, at: str) -> ToolCall:
    call = _convert(CallItem, item, at)
    try:
        _arguments.decode(call.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("arguments must be the JSON text of an object", param=f"{at}.arguments") from None
    return ToolCall(id=call.call_id, name=call.name, arguments=call.arguments or "{}")


def _text(content: str | Sequence[Fields], at: str, kinds: tuple[str, ...]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, fields in enumerate(content):
        kind = fields.get("type")
        if isinstance(kind, str) and kind in SENSES:
            raise InvalidRequest(f"this model takes text only, no {SENSES[kind]}", param=f"{at}[{index}]")
        if kind not in kinds:
            raise InvalidRequest(f"a part must be of the type {' or '.join(kinds)}", param=f"{at}[{index}].type")
        part = _convert(PARTS[kind], fields, f"{at}[{index}]")
        texts.append(part.refusal if isinstance(part, RefusalPart) else part.text)
    return "".join(texts)

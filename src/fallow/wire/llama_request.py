"""What a caller may ask of a llama.cpp engine: an allow-list, checked, and put into the form that the engine needs."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fallow.model.errors import InvalidRequest
from fallow.wire.openai import CHAT, COMPLETIONS, TOKENS_MAX, StreamOptions, Tier, decode

Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=4)]
SCHEMA_BYTES_MAX = 64 * 1024


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named schema that the answer must fit."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that chats and completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Choices | None = None
    user: str | None = None
    service_tier: Tier | None = None


class ChatRequest(Shared, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None


class CompletionRequest(Shared, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`/v1/completions`, for one prompt."""

    prompt: Annotated[str, Meta(min_length=1)]


_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    CHAT: msgspec.json.Decoder(ChatRequest),
    COMPLETIONS: msgspec.json.Decoder(CompletionRequest),
}
_OURS = frozenset({"stream", "stream_options", "user", "service_tier", "store", "metadata", "max_completion_tokens", "messages"})


_CONTROL = re.compile(r"<\|(?=[A-Za-z0-9_]{1,40}\|>)")


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the engine gets it, and what of the caller's wishes concerns the answer's form."""

    body: bytes
    stream: bool
    include_usage: bool
    choices: int


def prepare(path: str, body: bytes) -> EngineRequest:
    """Check a caller's request and rewrite it; raises InvalidRequest naming the parameter.

    The engine is always asked to stream and to tell its progress: only then does it notice that nobody waits any more.
    """
    decoder = _decoders.get(path)
    if decoder is None:
        raise InvalidRequest(f"this model's engine does not answer {path}")
    request = decode(decoder, body)
    fields = {name: value for name, value in msgspec.structs.asdict(request).items() if value is not None and name not in _OURS}
    if isinstance(request, ChatRequest):
        _prepare_chat(request, fields)
    fields |= {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True, "cache_prompt": True}
    return EngineRequest(
        body=msgspec.json.encode(fields),
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        choices=request.n or 1,
    )


def _prepare_chat(request: ChatRequest, fields: dict[str, Any]) -> None:
    fields["messages"] = [{"role": "system" if m.role == "developer" else m.role, "content": text_of(m.content)} for m in request.messages]
    if request.max_completion_tokens is not None:
        fields["max_tokens"] = request.max_completion_tokens
    if request.response_format is not None:
        fields["response_format"] = _response_format(request.response_format)


def _response_format(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema is required", param="response_format.json_schema")
    if len(msgspec.json.encode(wanted.json_schema.schema)) > SCHEMA_BYTES_MAX:
        raise InvalidRequest(f"the schema is over {SCHEMA_BYTES_MAX} bytes", param="response_format.json_schema.schema")
    keyword = ignored_keyword(wanted.json_schema.schema)
    if keyword is not None:
        raise InvalidRequest(
            f"schemas with {keyword!r} can't be enforced by this model's engine", param="response_format.json_schema.schema"
        )
    return {"type": "json_schema", "json_schema": {"name": wanted.json_schema.name, "schema": wanted.json_schema.schema}}


def text_of(content: str | list[TextPart]) -> str:
    """A message's content as one text, in which nothing is a control token: else a user could speak as the system."""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return _CONTROL.sub("<\u200b|", text) if "<|" in text else text


_IGNORED = frozenset(
    {"not", "uniqueItems", "multipleOf", "if", "then", "else", "contains", "propertyNames", "patternProperties", "dependentSchemas"}
)
_NAMED = ("properties", "$defs", "definitions")


def ignored_keyword(schema: object) -> str | None:
    """The first keyword of a JSON schema that llama.cpp would pass over in silence, so that answers needn't fit it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        for keyword, value in part.items():
            if keyword in _IGNORED:
                return str(keyword)
            if keyword == "pattern" and not (isinstance(value, str) and value.startswith("^") and value.endswith("$")):
                return "pattern without ^ and $"
            if keyword in _NAMED and isinstance(value, dict):
                waiting += value.values()
            elif keyword not in ("enum", "const", "default", "examples"):
                waiting.append(value)
    return None

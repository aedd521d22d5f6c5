"""The hot paths in the OpenAPI document: they aren't Litestar's, so they are added here, from the types that read them."""

from collections import defaultdict
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from fallow.apps.gateway import errors, prices
from fallow.core.repeat import KEY_CHARS_MAX
from fallow.model.views import CallView, QuoteList, WaitingList
from fallow.wire import messages_request, models_api, openai, quote_request, responses_request, wishes
from fallow.wire.chat_request import ChatRequest
from fallow.wire.completions_api import CompletionRequest
from fallow.wire.embeddings import EmbeddingsRequest
from fallow.wire.prefer import WAIT_S_MAX
from fallow.wire.rerank import RerankRequest

REFERENCE = "#/components/schemas/{name}"
Envelopes = tuple[Any, ...]


class MessagesError(msgspec.Struct, frozen=True, kw_only=True):
    """Anthropic's error object."""

    type: str
    message: str


class MessagesErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """How errors look to Anthropic's clients; `request_id` is the call's id."""

    error: MessagesError
    request_id: str | None
    type: Literal["error"] = "error"


OURS: Envelopes = (openai.ErrorEnvelope,)
THEIRS: Envelopes = (MessagesErrorEnvelope,)


class Door(NamedTuple):
    """One path, what comes in and what goes out."""

    path: str
    method: str
    summary: str
    asked: Envelopes = ()
    answered: Envelopes = ()
    streams: bool = False
    envelopes: Envelopes = OURS


DOORS = (
    Door(openai.CHAT, "post", "Answer a chat, streamed or whole", (ChatRequest,), streams=True),
    Door(openai.COMPLETIONS, "post", "Continue a text, streamed or whole", (CompletionRequest,), streams=True),
    Door(openai.RESPONSES, "post", "Answer, as OpenAI's newer API has it", (responses_request.ResponsesRequest,), streams=True),
    Door(openai.RESPONSES_COUNT, "post", "Count the tokens of a response's input", (responses_request.CountRequest,)),
    Door(
        openai.MESSAGES, "post", "Answer a chat, as Anthropic has it", (messages_request.MessagesRequest,), streams=True, envelopes=THEIRS
    ),
    Door(openai.MESSAGES_COUNT, "post", "Count the tokens of a message's input", (messages_request.CountRequest,), envelopes=THEIRS),
    Door(openai.EMBEDDINGS, "post", "Turn texts into vectors", (EmbeddingsRequest,)),
    Door(openai.RERANK, "post", "Sort texts by how well they fit a question", (RerankRequest,)),
    Door(
        quote_request.PATH,
        "post",
        "What a call would cost, where and how soon; nothing is run",
        (
            ChatRequest,
            CompletionRequest,
            responses_request.ResponsesRequest,
            messages_request.MessagesRequest,
            EmbeddingsRequest,
            RerankRequest,
        ),
        answered=(QuoteList,),
    ),
    Door(
        openai.MODELS,
        "get",
        "The models that are offered now",
        answered=(openai.ModelList, models_api.ModelInfoList),
        envelopes=OURS + THEIRS,
    ),
    Door(openai.MODELS + "/{model}", "get", "One model", answered=(openai.Model, models_api.ModelInfo), envelopes=OURS + THEIRS),
    Door(openai.CALLS, "get", "The calls of your organisation that wait", answered=(WaitingList,)),
    Door(openai.CALLS + "/{id}", "get", "What happened to a call", answered=(CallView,)),
    Door(prices.PATH, "get", "What a million tokens go for", answered=(prices.PriceList,)),
    Door(prices.PATH + "/{model}", "get", "One model's prices, and how they went", answered=(prices.ModelPrices,)),
)
_TYPES = list(dict.fromkeys(t for door in DOORS for t in (*door.asked, *door.answered, *door.envelopes, wishes.Wishes)))
_LOOK_UP_CODES = (
    *("invalid_api_key", "model_not_allowed", "model_not_found", "call_not_found", "broker_lost", "gateway_stopping"),
    "internal_error",
)
_LIST_CODES = ("invalid_request", "invalid_api_key", "broker_lost", "gateway_stopping", "internal_error")
_NOT_OF_A_CALL = ("call_not_found", "method_not_allowed")
_QUOTE_CODES = (
    *("invalid_request", "invalid_api_key", "model_not_allowed", "model_not_found", "body_timeout", "body_too_large", "no_node"),
    "too_many_calls",
    *("rate_limit_exceeded", "idempotency_conflict", "idempotency_answer_too_long", "broker_lost", "gateway_stopping", "internal_error"),
)
ANSWER_HEADERS = {
    "Fallow-Call": "The call's id.",
    "Fallow-Node": "The node that answered.",
    "Fallow-Hardware": "What it answered on.",
    "Fallow-Ring": "Whose node that is: `own`, `partner` or `market`.",
    "Fallow-Cost-Max": "The most that the answer can cost, in credits; `GET /v1/calls/{id}` tells what it did.",
    "Fallow-Attempts": "How many nodes were tried.",
    "Fallow-Overhead-Ms": "Time added to the engine's own, in milliseconds.",
    "Fallow-Repeated": "`1` if this is the answer of an earlier call with the same `Idempotency-Key`.",
    "Preference-Applied": "The wait that was granted, if `Prefer` asked for one.",
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds after which trying again makes sense.", "schema": {"type": "integer"}}}
PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": f"`wait=60`: wait up to so many seconds (at most {WAIT_S_MAX}) for the model to be loaded, where it isn't.",
    "schema": {"type": "string"},
    "example": "wait=60",
}
NEEDS: tuple[dict[str, Any], ...] = (
    *(
        {
            "name": header,
            "in": "header",
            "required": False,
            "description": f"As `{wishes.OBJECT}.{name}`: {wishes.ABOUT[name]}" + ("; with commas between" if name in wishes.LISTS else ""),
            "schema": {"type": "string"},
        }
        for header, name in wishes.HEADERS.items()
    ),
    {
        "name": wishes.TIER_HEADER,
        "in": "header",
        "required": False,
        "description": "As `service_tier` in OpenAI's bodies.",
        "schema": {"enum": list(get_args(openai.Tier))},
    },
)
IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": f"A name for this request, of at most {KEY_CHARS_MAX} characters: the same again within an hour gets the same answer, "
    "and is never run twice.",
    "schema": {"type": "string"},
}
PATH: dict[str, Any] = {
    "name": quote_request.PATH_HEADER,
    "in": "header",
    "required": False,
    "description": "The endpoint that the call is for, where its body doesn't tell.",
    "schema": {"enum": list(openai.HEADS)},
}
STATE: dict[str, Any] = {
    "name": "state",
    "in": "query",
    "required": True,
    "description": "Which calls; those that wait are the ones that can be listed.",
    "schema": {"enum": ["waiting"]},
}
ANTHROPIC_VERSION: dict[str, Any] = {
    "name": "anthropic-version",
    "in": "header",
    "required": False,
    "description": "If it is there, the answer has the shape that Anthropic's clients read.",
    "schema": {"type": "string"},
}


def with_calls(schema: dict[str, Any]) -> dict[str, Any]:
    """Litestar's document with the hot paths in it."""
    parts, components = msgspec.json.schema_components(_TYPES, ref_template=REFERENCE)
    by_type = dict(zip(_TYPES, parts, strict=True))
    full = {**schema, "paths": dict(schema.get("paths", {})), "components": dict(schema.get("components", {}))}
    full["components"]["schemas"] = {**full["components"].get("schemas", {}), **_readable(_with_wishes(components, by_type))}
    for door in DOORS:
        full["paths"].setdefault(door.path, {})[door.method] = _operation(door, by_type)
    return full


def _is_call(door: Door) -> bool:
    """Whether a node answers there."""
    return door.path in openai.HEADS


def _with_wishes(components: dict[str, Any], by_type: dict[Any, Any]) -> dict[str, Any]:
    """The same schemas with our object as the gateway reads it; the engines' readers only let it pass."""
    found: dict[str, Any] = {}
    for name, part in components.items():
        fields = part.get("properties", {})
        found[name] = {**part, "properties": {**fields, wishes.OBJECT: by_type[wishes.Wishes]}} if wishes.OBJECT in fields else part
    return found


def _readable(part: Any) -> Any:
    """The same schema with its patterns in the dialect of OpenAPI, which has no `\\Z` and whose `$` is as strict."""
    if isinstance(part, dict):
        return {
            key: value.replace("\\Z", "$") if key == "pattern" and isinstance(value, str) else _readable(value)
            for key, value in part.items()
        }
    return [_readable(one) for one in part] if isinstance(part, list) else part


def _operation(door: Door, by_type: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _one_of(door.answered, by_type) if door.answered else {"type": "object"}}}
    if door.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in ANSWER_HEADERS.items()} if _is_call(door) else {}
    operation: dict[str, Any] = {
        "summary": door.summary,
        "tags": ["calls"],
        "security": [{"key": []}, {"api_key": []}],
        "responses": {"200": {"description": "The answer", "headers": headers, "content": content}, **_errors(door, by_type)},
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("model", "id")
        if f"{{{name}}}" in door.path
    ]
    if door.asked:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _one_of(door.asked, by_type)}}}
        parameters += (PREFER, IDEMPOTENCY_KEY, *NEEDS) if _is_call(door) else (PATH, PREFER, IDEMPOTENCY_KEY, *NEEDS)
    elif len(door.answered) > 1:
        parameters.append(ANTHROPIC_VERSION)
    elif door.path == openai.CALLS:
        parameters.append(STATE)
    if parameters:
        operation["parameters"] = parameters
    return operation


def _errors(door: Door, by_type: dict[Any, Any]) -> dict[str, Any]:
    """The errors of a path by status, with the codes that come under each."""
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    others = _QUOTE_CODES if door.asked else _LIST_CODES if door.path == openai.CALLS else _LOOK_UP_CODES
    for code, status in errors.TABLE.items():
        if code not in _NOT_OF_A_CALL if _is_call(door) else code in others:
            by_status[status.http].append(code)
    schema = _one_of(door.envelopes, by_type)
    return {
        str(status): {
            "description": ", ".join(f"`{code}`" for code in codes),
            "headers": RETRY_AFTER if status in errors.PASSING else {},
            "content": {"application/json": {"schema": schema}},
        }
        for status, codes in sorted(by_status.items())
    }


def _one_of(types: Envelopes, by_type: dict[Any, Any]) -> Any:
    return by_type[types[0]] if len(types) == 1 else {"anyOf": [by_type[t] for t in types]}

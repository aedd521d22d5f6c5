"""Bodies for the fuzz check: what schemathesis makes of our own document and of the vendors', and good bodies gone wrong."""

import copy
import json
import os
import re
from collections.abc import Callable
from typing import Any

import msgspec
import schemathesis
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from odd_values import BIG, DEEP, NAMES, SCHEMAS, VALUES
from schemathesis.core import NOT_SET
from schemathesis.generation import GenerationMode
from vendor import Vendor, document

CHAT_MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "36"))
"""How many bodies each endpoint gets, from all sources together."""
OUTPUT_TOKENS = 2
FORM_TOKENS = 16
"""Room for a small call of a tool or JSON object."""
TOKENS_MAX = 2**31 - 1
CHOICES = 2
MUTATIONS_MAX = 2
Json = dict[str, Any]

SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TALK: list[Json] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name one colour."}]
FUNCTION: Json = {"name": "weather", "description": "Weather of a city.", "parameters": SCHEMA, "strict": True}
TOOL: Json = {"type": "function", "function": FUNCTION}
SAID: Json = {"user": "u", "metadata": {"k": "v"}, "store": False, "service_tier": "default", "safety_identifier": "s"}
SAMPLING: Json = {"temperature": 0.7, "top_p": 0.9}
PENALTIES: Json = {"frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"42": -100}, "top_k": 40, "seed": 7}
CHAT_CALL: Json = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm","unit":"C"}'}}
CHATS: tuple[Json, ...] = (
    {"messages": TALK, "max_tokens": 2, "stop": ["a", "e"], "n": 2, **SAMPLING, **PENALTIES, **SAID},
    {"messages": TALK, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "reasoning_effort": "low", "verbosity": "low"},
    {"messages": TALK, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "modalities": ["text"]},
    {"messages": TALK, "max_tokens": 16, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"messages": TALK, "max_tokens": 16, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {"messages": TALK, "max_tokens": 16, "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}},
    {"messages": TALK, "max_tokens": 16, "response_format": {"type": "json_object"}, "stream": True},
    {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            {"role": "tool", "content": "9 C", "tool_call_id": "call_1"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "And?"},
        ],
        "max_tokens": 2,
        "tools": [TOOL],
        "tool_choice": "auto",
    },
)
COMPLETIONS: tuple[Json, ...] = (
    {"prompt": "Once upon", "max_tokens": 2, "n": 2, "best_of": 2, "stop": "z", **SAMPLING, **PENALTIES, "user": "u"},
    {"prompt": ["Once upon", [1, 42, 7]], "max_tokens": 2, "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": [1, 42, 7], "max_tokens": 2},
    {"prompt": ["The sea", "A hill"], "max_tokens": 2, "echo": True, "suffix": None},
)
RESPONSE_TOOL: Json = {"type": "function", **FUNCTION}
ITEMS: list[Json] = [
    {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Ulm","unit":"C"}', "status": "completed"},
    {"type": "function_call_output", "call_id": "call_1", "output": "9 C"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Cold.", "annotations": []}], "id": "msg_1"},
    {"role": "user", "content": "And?"},
]
PROMPTS: tuple[Json, ...] = (
    {"input": "Name one colour.", "instructions": "Be brief.", "truncation": "disabled", "reasoning": {"effort": "low"}},
    {"input": ITEMS, "tools": [RESPONSE_TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {"input": "Weather?", "tools": [RESPONSE_TOOL], "tool_choice": {"type": "function", "name": "weather"}},
    {"input": "Weather?", "text": {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}, "verbosity": "low"}},
)
RESPONSES: tuple[Json, ...] = (
    *({**prompt, "max_output_tokens": 16, "stream": index % 2 == 0} for index, prompt in enumerate(PROMPTS)),
    {"input": "x", "max_output_tokens": 2, "include": ["message.output_text.logprobs"], "top_logprobs": 2, **SAMPLING, **SAID},
    {"input": "x", "max_output_tokens": 16, "text": {"format": {"type": "json_object"}}, "background": False, "prompt_cache_key": "k"},
)
MESSAGE_TOOL: Json = {"name": "weather", "description": "Weather of a city.", "input_schema": SCHEMA}
BLOCKS: list[Json] = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm", "unit": "C"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "9 C"}]}]},
]
DIALOGUES: tuple[Json, ...] = (
    {"messages": TALK[1:], "system": [{"type": "text", "text": "Be brief."}], "thinking": {"type": "disabled"}},
    {
        "messages": BLOCKS,
        "system": "Be brief.",
        "tools": [MESSAGE_TOOL],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
    {"messages": TALK[1:], "tools": [MESSAGE_TOOL], "tool_choice": {"type": "tool", "name": "weather"}},
    {"messages": TALK[1:], "tools": [MESSAGE_TOOL], "tool_choice": {"type": "any"}},
    {"messages": TALK[1:], "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    {"messages": [*TALK[1:], {"role": "assistant", "content": "One colour is"}]},
)
MESSAGES: tuple[Json, ...] = (
    *({**talk, "max_tokens": 16, "stream": index % 2 == 0} for index, talk in enumerate(DIALOGUES)),
    {"messages": TALK[1:], "max_tokens": 2, "stop_sequences": ["e"], "top_k": 5, "metadata": {"user_id": "u"}, **SAMPLING},
)
EMBEDDINGS: tuple[Json, ...] = (
    {"input": "a cat", "encoding_format": "base64", "dimensions": 384, "user": "u"},
    {"input": ["a cat", "a dog"], "encoding_format": "float"},
    {"input": [101, 4937, 102]},
    {"input": [[101, 4937, 102], [101, 3899, 102]]},
)
RANKINGS: tuple[Json, ...] = (
    {"query": "a pet", "documents": ["a kitten", {"text": "a lorry"}], "top_n": 1, "return_documents": True},
    {"query": "a pet", "documents": ["a kitten", "interest rates"], "user": "u"},
)


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What the generators know of one endpoint: good bodies, the vendor's name for its request, and which fields limit the output."""

    path: str
    seeds: tuple[Json, ...]
    model: str = CHAT_MODEL
    vendor: Vendor | None = None
    schema: str = ""
    limits: tuple[str, ...] = ()


_ALL = (
    Endpoint(
        path="/v1/chat/completions",
        seeds=CHATS,
        vendor="openai",
        schema="CreateChatCompletionRequest",
        limits=("max_tokens", "max_completion_tokens"),
    ),
    Endpoint(path="/v1/messages", seeds=MESSAGES, vendor="anthropic", schema="CreateMessageParams", limits=("max_tokens",)),
    Endpoint(path="/v1/responses", seeds=RESPONSES, vendor="openai", schema="CreateResponse", limits=("max_output_tokens",)),
    Endpoint(path="/v1/completions", seeds=COMPLETIONS, vendor="openai", schema="CreateCompletionRequest", limits=("max_tokens",)),
    Endpoint(path="/v1/responses/input_tokens", seeds=PROMPTS, vendor="openai", schema="TokenCountsBody"),
    Endpoint(path="/v1/messages/count_tokens", seeds=DIALOGUES, vendor="anthropic", schema="CountMessageTokensParams"),
    Endpoint(path="/v1/embeddings", seeds=EMBEDDINGS, model=EMBEDDER, vendor="openai", schema="CreateEmbeddingRequest"),
    Endpoint(path="/v1/rerank", seeds=RANKINGS, model=EMBEDDER),
)
ENDPOINTS = {one.path: one for one in _ALL}


def from_document(openapi: Json, endpoint: Endpoint) -> SearchStrategy[bytes]:
    """What schemathesis makes of an OpenAPI document for this endpoint: bodies that fit it, and bodies that don't."""
    operation = schemathesis.openapi.from_dict(openapi)[endpoint.path]["POST"]
    known = _documented(openapi, endpoint)

    def sent(case: Any) -> bytes:
        if isinstance(case.body, bytes):
            return case.body
        return written(_tame(case.body, endpoint, known)) if case.body is not NOT_SET else b""

    fitting, unfit = (operation.as_strategy(generation_mode=mode).map(sent) for mode in GenerationMode)
    return st.one_of(fitting, unfit)


def from_vendor(endpoint: Endpoint) -> SearchStrategy[bytes]:
    """The same of the vendor's published schema."""
    return from_document(_vendor_document(endpoint), endpoint)


def _vendor_document(endpoint: Endpoint) -> Json:
    assert endpoint.vendor is not None
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{endpoint.schema}"}}}
    post = {"requestBody": {"required": True, "content": content}, "responses": {"200": {"description": "An answer."}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": endpoint.schema, "version": "1"},
        "paths": {endpoint.path: {"post": post}},
        "components": document(endpoint.vendor)["components"],
    }


def _documented(openapi: Json, endpoint: Endpoint) -> tuple[str, ...]:
    """The names of all parameters of an endpoint's body."""
    schema = openapi["paths"][endpoint.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return tuple(sorted(_properties(openapi, schema)))


def _properties(openapi: Json, schema: Json) -> set[str]:
    if "$ref" in schema:
        return _properties(openapi, openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    parts = [one for word in ("allOf", "anyOf", "oneOf") for one in schema.get(word, [])]
    return set(schema.get("properties", {})).union(*(_properties(openapi, one) for one in parts))


def _tame(body: Any, endpoint: Endpoint, known: tuple[str, ...]) -> Any:
    """Let a generated body come further than the door: it names a model that is there, and only parameters that are documented.

    Documents that allow any further parameter make schemathesis add some to nearly every body, and the first one would end it.
    """
    if not isinstance(body, dict):
        return body
    kept = {name: value for name, value in body.items() if name in known}
    if isinstance(kept.get("model"), str):
        kept["model"] = endpoint.model
    return cheap(kept, endpoint)


def cheap(body: Any, endpoint: Endpoint) -> Any:
    """Keep a body that may be valid from running long. Limits that are wrong stay as they are."""
    if not isinstance(body, dict):
        return body
    out = dict(body)
    few = FORM_TOKENS if {"tools", "response_format", "text", "output_config"} & out.keys() else OUTPUT_TOKENS
    for name in endpoint.limits:
        if _between(out.get(name), few, TOKENS_MAX):
            out[name] = few
    if endpoint.limits and all(out.get(name) is None for name in endpoint.limits):
        out[endpoint.limits[0]] = few
    for name in ("n", "best_of"):
        if endpoint.limits and _between(out.get(name), CHOICES, TOKENS_MAX):
            out[name] = CHOICES
    return out


def _between(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high


def written(body: Any) -> bytes:
    """A body as JSON, lone surrogates escaped, and with what stands for deep or big values put in."""
    text = json.dumps(body)
    text = re.sub(r'"<deep ([a-z]+) (\d+)>"', lambda found: _deep(found[1], int(found[2])), text)
    return re.sub(r"<big (\d+)>", lambda found: "=" * int(found[1]), text).encode()


def _deep(kind: str, levels: int) -> str:
    return "[" * levels + "]" * levels if kind == "list" else '{"a":' * levels + "0" + "}" * levels


@st.composite
def mutated(draw: DrawFn, endpoint: Endpoint) -> bytes:
    """A good body with a few things changed, and sometimes with its bytes broken as well."""
    names = NAMES if endpoint.vendor is None else NAMES + _documented(_vendor_document(endpoint), endpoint)
    holder = {"body": {"model": endpoint.model, **copy.deepcopy(draw(st.sampled_from(endpoint.seeds)))}}
    for _ in range(draw(st.integers(0, MUTATIONS_MAX))):
        draw(st.sampled_from(MUTATIONS))(draw, holder, names)
    good = written(cheap(holder.get("body"), endpoint))
    return draw(st.sampled_from(BREAKS))(draw, good) if draw(st.integers(0, 9)) == 9 else good


Spot = tuple[Any, Any]
Mutation = Callable[[DrawFn, Json, tuple[str, ...]], None]


def _spots(value: Any) -> list[Spot]:
    """All places in a value, each as what holds it and the key there."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [spot for key in keys for spot in ((value, key), *_spots(value[key]))]


def _spot(draw: DrawFn, holder: Json) -> Spot:
    spots = _spots(holder)
    return draw(st.sampled_from(spots)) if spots else (holder, "body")


def _replace(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    box[key] = copy.deepcopy(draw(VALUES))


def _delete(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    if box is not holder:
        del box[key]


def _double(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    if isinstance(box, list):
        box[key:key] = [copy.deepcopy(box[key]) for _ in range(draw(st.sampled_from([1, 2, 20])))]
    else:
        box[key] = [box.get(key), copy.deepcopy(box.get(key))]


def _nest(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    value = box.get(key) if isinstance(box, dict) else box[key]
    box[key] = draw(st.sampled_from([[value], [[value]], {"value": value}, {str(key): value}, {"type": "text", "text": value}]))


def _retype(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    value = box.get(key) if isinstance(box, dict) else box[key]
    text = json.dumps(value)
    others: list[Any] = [text, len(text), not value, [*value] if isinstance(value, str | dict) else [value], {"0": value}, None]
    box[key] = draw(st.sampled_from(others))


def _swap(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    other, there = _spot(draw, holder)
    box[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else other[there])


def _add(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    boxes = [holder, *(box[key] for box, key in _spots(holder))]
    box = draw(st.sampled_from([box for box in boxes if isinstance(box, dict)]))
    box[draw(st.sampled_from(names) | st.text(max_size=8))] = copy.deepcopy(draw(VALUES))


def _reach(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    box, key = _spot(draw, holder)
    box[key] = copy.deepcopy(draw(DEEP | BIG))


def _schema(draw: DrawFn, holder: Json, names: tuple[str, ...]) -> None:
    """A strange schema where one belongs, if one does."""
    spots = [(box, key) for box, key in _spots(holder) if key in ("parameters", "schema", "input_schema")]
    box, key = draw(st.sampled_from(spots)) if spots else _spot(draw, holder)
    box[key] = copy.deepcopy(draw(SCHEMAS))


CHANGES: tuple[Mutation, ...] = (_replace, _delete, _double, _nest, _retype, _swap, _add, _reach, _schema)
MUTATIONS = (*CHANGES, _replace, _replace, _add, _schema)
"""The last ones again, since they find more."""


def _cut(draw: DrawFn, body: bytes) -> bytes:
    return body[: draw(st.integers(0, len(body)))]


def _flip(draw: DrawFn, body: bytes) -> bytes:
    at = draw(st.integers(0, max(0, len(body) - 1)))
    return body[:at] + draw(st.binary(min_size=1, max_size=2)) + body[at + 1 :]


def _twice(draw: DrawFn, body: bytes) -> bytes:
    """A key that stands there twice."""
    key = draw(st.sampled_from(["model", "messages", "input", "prompt", "max_tokens", "tools", "stream", "fallow"]))
    return b"{" + json.dumps(key).encode() + b":" + written(draw(VALUES)) + b"," + body[1:]


def _wrapped(draw: DrawFn, body: bytes) -> bytes:
    before, after = draw(
        st.sampled_from([(b"\xef\xbb\xbf", b""), (b"", b"{}"), (b"[", b"]"), (b" \n", b"\0"), (b"", b","), (b"//\n", b"")])
    )
    return before + body + after


BREAKS: tuple[Callable[[DrawFn, bytes], bytes], ...] = (_cut, _flip, _twice, _wrapped)

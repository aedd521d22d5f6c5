"""The hot paths in the OpenAPI document: they aren't Litestar's, so they are added here, from the types that read them."""

from typing import Any

import msgspec

from fallow.wire import openai
from fallow.wire.llama_request import ChatRequest, CompletionRequest

REFERENCE = "#/components/schemas/{name}"
_CALLS = (
    (openai.CHAT, "post", "Answer a chat, streamed or whole", ChatRequest, None),
    (openai.COMPLETIONS, "post", "Continue a text, streamed or whole", CompletionRequest, None),
    (openai.MODELS, "get", "The models that are offered now", None, openai.ModelList),
    (openai.MODELS + "/{model}", "get", "One model", None, openai.Model),
)
_TYPES = [ChatRequest, CompletionRequest, openai.ModelList, openai.Model, openai.ErrorEnvelope]
ANSWER_HEADERS = {
    "Fallow-Call": "The call's id.",
    "Fallow-Node": "The node that answered.",
    "Fallow-Hardware": "What it answered on.",
    "Fallow-Attempts": "How many nodes were tried.",
    "Fallow-Overhead-Ms": "Time added to the engine's own, in milliseconds.",
}


def with_calls(schema: dict[str, Any]) -> dict[str, Any]:
    """Litestar's document with the hot paths in it."""
    paths, components = msgspec.json.schema_components(_TYPES, ref_template=REFERENCE)
    by_type = dict(zip(_TYPES, paths, strict=True))
    full = {**schema, "paths": dict(schema.get("paths", {})), "components": dict(schema.get("components", {}))}
    full["components"]["schemas"] = {**full["components"].get("schemas", {}), **components}
    for path, method, summary, asked, answered in _CALLS:
        full["paths"][path] = {method: _operation(summary, by_type, asked, answered, has_model="{model}" in path)}
    return full


def _operation(summary: str, by_type: dict[Any, Any], asked: Any, answered: Any, *, has_model: bool) -> dict[str, Any]:
    error = {"description": "An error", "content": {"application/json": {"schema": by_type[openai.ErrorEnvelope]}}}
    schema = by_type[answered] if answered is not None else {"type": "object"}
    content = {"application/json": {"schema": schema}}
    if asked is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in ANSWER_HEADERS.items()} if asked else {}
    operation: dict[str, Any] = {
        "summary": summary,
        "tags": ["calls"],
        "security": [{"key": []}],
        "responses": {"200": {"description": "The answer", "headers": headers, "content": content}, "default": error},
    }
    if asked is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": by_type[asked]}}}
    if has_model:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation

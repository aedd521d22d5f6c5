"""A caller's JSON schema, refused if it can't be used or is made to cost, before an engine or a validator sees it."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator

from fallow.model.errors import InvalidRequest, shortened
from fallow.wire.regex_cost import pattern_cost

BYTES_MAX = 64 * 1024
DEPTH_MAX = 32
SCHEMAS_MAX = 1_000
ENUM_MAX = PROPERTIES_MAX = 500
PATTERNS_MAX = 100
COUNT_MAX = 1_000
CHAIN_MAX = 32

Schema = dict[str, Any]
Place = tuple[str, ...]
"""Where a schema stands in its document: the parts of its JSON pointer."""

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"}
"""What stands under these holds for the same value as what stands beside them."""
_LEAST = ("minItems", "minLength", "minProperties", "minContains")
_metaschema = Draft202012Validator(Draft202012Validator.META_SCHEMA)


def check_schema(schema: Any, *, param: str) -> None:
    """Refuse a schema that can't be used, or that is made to cost."""
    checks: tuple[Callable[[Any], str | None], ...] = (_size, _counts, _costs, _language, _references)
    for check in checks:
        if (why := check(schema)) is not None:
            raise InvalidRequest(f"{shortened(param)} {why}", param=param)


def places(schema: Any) -> dict[Place, Any]:
    """Every schema of a document by its place, as far as one more than `SCHEMAS_MAX`."""
    found: dict[Place, Any] = {}
    todo: list[tuple[Place, Any]] = [((), schema)]
    while todo and len(found) <= SCHEMAS_MAX:
        place, part = todo.pop()
        found[place] = part
        todo.extend((place + more, inner) for more, inner in _inner(part))
    return found


def target(ref: str) -> Place | None:
    """The place that a reference names; None if it isn't one into the same document."""
    if ref == "#":
        return ()
    if not ref.startswith("#/"):
        return None
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in unquote(ref[2:]).split("/"))


def nested(value: Any, most: int) -> bool:
    """Is a value nested deeper than this?"""
    todo = [(value, 1)]
    while todo:
        one, depth = todo.pop()
        if depth > most:
            return True
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        todo.extend((part, depth + 1) for part in inner)
    return False


def _inner(schema: Any) -> Iterator[tuple[Place, Any]]:
    """The schemas that stand in this one, each with its place."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in _MAPS and isinstance(value, dict):
            yield from (((key, name), part) for name, part in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from (((key, str(index)), part) for index, part in enumerate(value))
        elif key in _SINGLES:
            yield (key,), value


def _parts(schema: Any) -> list[Schema]:
    return [part for part in places(schema).values() if isinstance(part, dict)]


def _size(schema: Any) -> str | None:
    if not isinstance(schema, dict):
        return "must be an object"
    if nested(schema, DEPTH_MAX):
        return f"is nested deeper than {DEPTH_MAX} levels"
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError):
        return "is not JSON"
    return f"is {size} bytes long; at most {BYTES_MAX} are taken" if size > BYTES_MAX else None


def _counts(schema: Any) -> str | None:
    """The limits on how many there are of everything."""
    if len(places(schema)) > SCHEMAS_MAX:
        return f"has more than {SCHEMAS_MAX} schemas in all"
    parts = _parts(schema)
    counted = (
        ("enum values", ENUM_MAX, ("enum",), list),
        ("properties", PROPERTIES_MAX, ("properties", "patternProperties"), dict),
        ("required properties", PROPERTIES_MAX, ("required",), list),
    )
    for what, most, keys, kind in counted:
        if sum(len(part[key]) for part in parts for key in keys if isinstance(part.get(key), kind)) > most:
            return f"has more than {most} {what} in all"
    if any(isinstance(part.get("type"), list) and len(part["type"]) > len(TYPES) for part in parts):
        return f"has a type that names more than the {len(TYPES)} there are"  # comparing a long list with itself takes long
    return None


def _costs(schema: Any) -> str | None:
    """What is small to write and large to run."""
    parts = _parts(schema)
    for key in _LEAST:
        if any(isinstance(part.get(key), (int, float)) and part[key] > COUNT_MAX for part in parts):
            return f"has a {key} over {COUNT_MAX}"
    patterns = [part["pattern"] for part in parts if isinstance(part.get("pattern"), str)]
    patterns += itertools.chain.from_iterable(
        part["patternProperties"] for part in parts if isinstance(part.get("patternProperties"), dict)
    )
    if len(patterns) > PATTERNS_MAX:
        return f"has more than {PATTERNS_MAX} patterns in all"
    refused = next((why for one in patterns if (why := pattern_cost(one).refused) is not None), None)
    return f"has a pattern that {refused}" if refused is not None else None


def _language(schema: Any) -> str | None:
    """Is it a JSON schema at all, and does it ask for what can be?"""
    for place, part in places(schema).items():
        if place and isinstance(part, dict) and ("$id" in part or "$schema" in part):
            return "has an $id or a $schema below its root; it is one document in one language"
        if isinstance(part, dict) and "dependencies" in part:
            return "uses dependencies, which draft 2020-12 does not know; dependentRequired and dependentSchemas are its words for it"
    try:
        error = next(_metaschema.iter_errors(schema), None)
    except (RecursionError, ArithmeticError, ValueError, TypeError, LookupError):
        return "is not a JSON schema"
    if error is not None:
        where = shortened(".".join(map(str, error.absolute_path)), 100)
        return f"is not a valid JSON schema (draft 2020-12) at {where or 'its root'}"
    for part in _parts(schema):
        if part.get("enum") == []:
            return "has an empty enum, which nothing fits"
        named = part.get("properties", {})
        more = True if "patternProperties" in part else part.get("additionalProperties", True)
        if any(named.get(name, more) is False for name in part.get("required", ())):
            return "requires a property that it forbids"
    return None


def _references(schema: Any) -> str | None:
    known = places(schema)
    for part in _parts(schema):
        if "$dynamicRef" in part or "$recursiveRef" in part:
            return "uses $dynamicRef or $recursiveRef; only $ref is known"
        if "$ref" in part and target(part["$ref"]) not in known:
            return "has a $ref that names no schema in it; a $ref is # or begins with #/"
    weights: dict[Place, int] = {}
    if any(_weight(place, known, weights, CHAIN_MAX) > SCHEMAS_MAX for place in known):
        return f"refers to itself without end, or holds one value against over {CHAIN_MAX} schemas in a chain or {SCHEMAS_MAX} in all"
    return None


def _weight(place: Place, known: Mapping[Place, Any], weights: dict[Place, int], left: int) -> int:
    """How many schemas apply to one value, from this place on; a loop counts as too many."""
    if left < 0:
        return SCHEMAS_MAX + 1
    if place not in weights:
        part = known[place]
        nexts = [place + more for more, _ in _inner(part) if more[0] in _IN_PLACE]
        if isinstance(part, dict) and "$ref" in part:
            nexts.append(target(part["$ref"]) or ())
        weights[place] = SCHEMAS_MAX + 1  # whoever comes back here while it is being worked out has found a loop
        weights[place] = 1 + min(SCHEMAS_MAX, sum(_weight(one, known, weights, left - 1) for one in nexts))
    return weights[place]

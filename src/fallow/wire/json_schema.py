"""A caller's JSON schema: put into what llama.cpp's grammars understand, and held against the answers."""

import copy
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

from fallow.wire.regex_cost import pattern_cost
from fallow.wire.schema_check import CHAIN_MAX, TYPES, Place, Schema, check_schema, nested, places, target

__all__ = ["Constraint", "check_schema", "constrain", "fits", "fits_text", "tightened"]

SLOW_CHARS_MAX = 500
"""Longer strings are not held against a pattern that takes more than linear time."""
STEPS_MAX = 100_000
ANSWER_DEPTH_MAX = 64
COUNT_SAID_MAX = 10_000
"""The longest maxLength or maxItems that the engine is told; it refuses those over its own integers."""
INTEGER_MAX = 10**15 - 1
TIGHT_CHARS, TIGHT_ITEMS = 200, 5

_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "number": _BOUNDS,
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _BOUNDS,
    "boolean": (),
    "null": (),
}
_NOT_IN_GRAMMARS = {
    *("not", "if", "allOf", "dependentSchemas", "dependentRequired", "patternProperties", "propertyNames"),
    *("contains", "uniqueItems", "multipleOf", "unevaluatedItems", "unevaluatedProperties"),
}
_WITHOUT_FORCE = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$defs", "definitions", "$id", "$schema"),
}
_FORMATS = ("date", "email", "idn-email", "ipv4", "ipv6", "uuid")
"""What jsonschema checks without other packages; not regex, which may take long to compile."""
_ENGINE_FORMATS = ("date", "time", "date-time", "uuid")
_ANYTHING: Schema = {"type": [kind for kind in TYPES if kind != "integer"]}
_RANGE = r"\[(?:[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[A-Za-z0-9_ .@:])+-?\]"
_ATOM = rf"(?:[A-Za-z0-9_ @:-]|\\[.d]|{_RANGE})(?:[*+?]|\{{\d{{1,3}}(?:,\d{{0,3}})?\}})?"
_ENGINE_PATTERN = re.compile(rf"\^(?:{_ATOM}|\((?:{_ATOM})+(?:\|(?:{_ATOM})+)*\)\??)+\$", re.ASCII)
"""What llama.cpp is known to take as Python does, and can't end a JSON string early."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is told to write. If `exact`, all that its grammar lets through fits the caller's schema."""

    engine: dict[str, Any]
    exact: bool


def fits(schema: Schema, value: Any) -> bool:
    """Does a value fit a checked schema? One that can't be judged at a bounded cost doesn't."""
    return _judged(_validator(schema), value)


def fits_text(schema: Schema, text: str) -> bool:
    """Is a text one JSON value that fits? One nested deeper than `ANSWER_DEPTH_MAX`, or with NaN or Infinity in it, doesn't."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)  # not msgspec, which refuses 1e999 that a grammar lets through
    except (ValueError, RecursionError):
        return False
    return not nested(value, ANSWER_DEPTH_MAX) and fits(schema, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


class _TooSlowError(ValueError):
    """A check that could take too long."""


class _Meter(FormatChecker):
    """Rides along with a validation, and counts what it costs."""

    def __init__(self, document: Schema) -> None:
        super().__init__(_FORMATS)
        self.steps = 0
        parts = [part for part in places(document).values() if isinstance(part, dict)]
        self._enums: dict[int, tuple[Any, frozenset[Hashable]]] = {}
        self._plain: dict[int, tuple[Any, Hashable]] = {}
        self.names = [name for part in parts for name in part.get("patternProperties", ())]

    def count(self, keyword: str, argument: Any, instance: Any, schema: Schema) -> None:
        """Note one keyword's check of one value, before it is made."""
        patterns: list[str] = []
        match keyword:
            case "pattern":
                patterns = [argument]
            case "patternProperties" | "additionalProperties":
                patterns = list(schema.get("patternProperties", ()))
            case "unevaluatedProperties":  # it looks into the schemas that apply, wherever they stand
                patterns = self.names
        texts = instance if isinstance(instance, dict) else [instance]
        slow = any(isinstance(text, str) and len(text) > SLOW_CHARS_MAX for text in texts)
        self.steps += 1 + len(patterns) * len(texts) // 10
        if self.steps > STEPS_MAX or (slow and any(pattern_cost(one).power for one in patterns)):
            raise _TooSlowError

    def plain(self, value: Any) -> Hashable:
        """The same for equal values, as JSON schemas mean it: 1 is 1.0, but not true."""
        if not isinstance(value, (list, dict)):
            return (isinstance(value, bool), value)
        if id(value) not in self._plain:
            found: Hashable = tuple(map(self.plain, value))
            if isinstance(value, dict):
                found = frozenset((name, self.plain(inner)) for name, inner in value.items())
            self._plain[id(value)] = (value, found)  # with the value, so that no other takes its id
        return self._plain[id(value)][1]

    def plain_of(self, values: Any) -> frozenset[Hashable]:
        """All of an enum's values."""
        if id(values) not in self._enums:
            self._enums[id(values)] = (values, frozenset(map(self.plain, values)))
        return self._enums[id(values)][1]


def _enum(validator: Any, values: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    meter = validator.format_checker
    if meter.plain(instance) not in meter.plain_of(values):
        yield ValidationError("not in enum")


def _const(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    meter = validator.format_checker
    if meter.plain(instance) != meter.plain(value):
        yield ValidationError("not const")


def _unique(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    meter = validator.format_checker
    if unique and isinstance(instance, list) and len(set(map(meter.plain, instance))) < len(instance):
        yield ValidationError("not unique")


def _metered(keyword: str, rule: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def check(validator: Any, argument: Any, instance: Any, schema: Any) -> Iterator[Any]:
        validator.format_checker.count(keyword, argument, instance, schema)
        yield from rule(validator, argument, instance, schema) or ()

    return check


_compared = {"enum": _enum, "const": _const, "uniqueItems": _unique}
"""In place of jsonschema's own, which hold every value against every other."""
_rules = {keyword: _metered(keyword, rule) for keyword, rule in (Draft202012Validator.VALIDATORS | _compared).items()}
_Validator: Any = extend(Draft202012Validator, _rules)  # type: ignore[no-untyped-call]


def _validator(schema: Schema) -> Any:
    """A fresh one for each value, as it carries the meter. A $schema left in would bring its own, without one."""
    document = {key: part for key, part in schema.items() if key not in ("$id", "$schema")}
    return _Validator(document, registry=Registry(), format_checker=_Meter(document))


def _judged(validator: Any, value: Any) -> bool:
    try:
        return bool(validator.is_valid(value))
    except (RecursionError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError, re.error, Unresolvable):
        return False


def constrain(schema: Schema) -> Constraint:
    """What to tell llama.cpp so that it writes what fits a checked schema, as far as its grammars can say that."""
    lowering = _Lowering(schema)
    engine = lowering.lower(schema)
    defs: Schema = {}
    while len(defs) < len(lowering.names):
        place, name = list(lowering.names.items())[len(defs)]
        defs[name] = lowering.lower(lowering.places[place])
    return Constraint(engine={**engine, "$defs": defs} if defs else engine, exact=lowering.exact)


def tightened(engine: Schema) -> Schema:
    """The same for a second try, after the model ran on without end: strings and arrays without a limit get one."""
    whole = copy.deepcopy(engine)
    for part in places(whole).values():
        if not isinstance(part, dict):
            continue
        if part.get("type") == "string" and not part.keys() & {"pattern", "format", "enum", "const"}:
            part["maxLength"] = min(part.get("maxLength", TIGHT_CHARS), max(TIGHT_CHARS, part.get("minLength", 0)))
        if part.get("type") == "array" and "prefixItems" not in part:
            part["maxItems"] = part.get("maxItems", max(TIGHT_ITEMS, part.get("minItems", 0)))
    return whole


class _Lowering:
    """Says a schema in the few forms that llama.cpp is known to take at their word; where it can't, more is let through."""

    def __init__(self, root: Schema) -> None:
        self.validator = _validator(root)  # one for all enums, so that its meter limits what they take together
        self.exact = True
        self.places = places(root)
        self.names: dict[Place, str] = {}
        self.refers = any(isinstance(part, dict) and "$ref" in part for part in self.places.values())

    def lower(self, schema: Any) -> Schema:
        """One schema; `exact` is False from here on if the engine may write what doesn't fit it."""
        if not isinstance(schema, dict) or schema == {}:
            self.exact &= schema is not False
            return _ANYTHING
        if "enum" in schema or "const" in schema:
            return self._values(schema)
        only = schema.get("allOf", ())
        if len(only) == 1 and schema.keys() - _WITHOUT_FORCE == {"allOf"}:
            return self.lower(only[0])
        own = {key for keys in _OF_TYPE.values() for key in keys} & schema.keys()
        others = [key for key in ("$ref", "anyOf", "oneOf") if key in schema]
        mixed = bool(others) and (bool(own) or "type" in schema or len(others) > 1)
        self.exact &= not (mixed or "oneOf" in schema or schema.keys() & _NOT_IN_GRAMMARS)
        self.exact &= not ("number" in schema.get("type", "number") and schema.keys() & set(_BOUNDS))
        if "$ref" in schema:
            name = self.names.setdefault(target(schema["$ref"]) or (), f"r{len(self.names)}")
            return {"$ref": f"#/$defs/{name}"}
        if others and "properties" not in schema:
            if self.refers and self._is_ambiguous(schema[others[0]]):
                self.exact = False  # each level would double the ways that llama.cpp follows, until it hangs
                return _ANYTHING
            lowered = [self.lower(one) for one in schema[others[0]] if one is not False]
            self.exact &= bool(lowered)
            return {"anyOf": lowered or [_ANYTHING]}
        if only and "properties" not in schema:
            return {"allOf": [self.lower(one) for one in only]}
        return self._typed(schema, bare=not own)

    def _is_ambiguous(self, branches: Sequence[Any]) -> bool:
        """Whether several branches of a union begin alike: as arrays, or as objects whose first property doesn't tell them apart."""
        begins = [begin for one in branches for begin in self._beginnings(one, CHAIN_MAX)]
        return len(begins) > len(set(begins))

    def _beginnings(self, schema: Any, left: int) -> list[str]:
        """How arrays and objects that fit begin, as far as the schema says."""
        if not isinstance(schema, dict) or not left:
            return []
        if "$ref" in schema:
            return self._beginnings(self.places.get(target(schema["$ref"]) or ()), left - 1)
        for union in ("anyOf", "oneOf", "allOf"):
            if union in schema:
                return [begin for one in schema[union] for begin in self._beginnings(one, left - 1)]
        first: tuple[str, Any] = next(iter(schema.get("properties", {}).items()), ("", {}))
        told = {key: first[1][key] for key in ("const", "enum") if isinstance(first[1], dict) and key in first[1]}
        kinds = schema.get("type", ["object"] if "properties" in schema else ["array"] if "items" in schema else [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return [kind if kind == "array" else json.dumps([first[0], told]) for kind in kinds if kind in ("array", "object")]

    def _values(self, schema: Schema) -> Schema:
        values = schema.get("enum", [schema.get("const")])
        read = json.loads(json.dumps(values), parse_int=float)  # as llama.cpp does: a number over 2^53 becomes another one
        rules = {key: rule for key, rule in schema.items() if key not in ("$id", "$schema")}
        validator = self.validator.evolve(schema=rules)
        values = [one for one, there in zip(values, read, strict=True) if _judged(validator, there)]
        self.exact &= bool(values)
        return {"enum": values} if values else _ANYTHING

    def _typed(self, schema: Schema, *, bare: bool) -> Schema:
        inferred = [kind for kind, keys in _OF_TYPE.items() if schema.keys() & set(keys) and kind != "integer"]
        kinds = schema.get("type") or inferred[:1] or _ANYTHING["type"]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if bare and len(kinds) > 1:
            return {"type": kinds}
        says = {"object": self._object, "array": self._array, "string": self._string, "integer": self._integer}
        parts = [says[kind](schema) if kind in says else {"type": kind} for kind in kinds]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _object(self, schema: Schema) -> Schema:
        required, more = list(schema.get("required", ())), schema.get("additionalProperties", True)
        named = {name: part for name, part in schema.get("properties", {}).items() if part is not False}
        named |= {name: more for name in required if name not in named}
        self.exact &= schema.get("minProperties", 0) <= len(set(required)) and "maxProperties" not in schema
        lowered = {name: self.lower(part) for name, part in named.items()}
        extra = more is not False and ("additionalProperties" in schema or "properties" not in schema)
        extra = extra and all(re.fullmatch(r"\w+", name, re.ASCII) for name in named)
        self.exact &= not (extra and "properties" in schema)  # the engine may then write a declared name with an escape in it
        if extra and not named and more in (True, {}):
            return {"type": "object"}
        return {"type": "object", "properties": lowered, "required": required, "additionalProperties": extra and self.lower(more)}

    def _array(self, schema: Schema) -> Schema:
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        rest, begin = schema.get("items", True), list(schema.get("prefixItems", ()))
        limit = {} if most is None else {"maxItems": min(int(most), COUNT_SAID_MAX)}
        self.exact &= least <= limit.get("maxItems", least)
        if begin and most != 0:  # the engine writes all of them, and nothing more
            self.exact &= least <= len(begin)
            return {"type": "array", "prefixItems": [self.lower(one) for one in begin[: limit.get("maxItems")]]}
        return {"type": "array", "items": self.lower(rest), "minItems": least, **limit}

    def _string(self, schema: Schema) -> Schema:
        pattern, kind = schema.get("pattern"), schema.get("format")
        lengths: Schema = {key: min(int(schema[key]), COUNT_SAID_MAX) for key in ("minLength", "maxLength") if key in schema}
        self.exact &= lengths.get("minLength", 0) <= min(1, lengths.get("maxLength", 1))  # two escapes may be one character
        self.exact &= kind not in _FORMATS or (kind == "uuid" and pattern is None)
        known = pattern is not None and _ENGINE_PATTERN.fullmatch(pattern) is not None
        if pattern is not None or kind in _ENGINE_FORMATS:
            self.exact &= not lengths and (known or pattern is None)
        if pattern is not None and known:
            return {"type": "string", "pattern": pattern.replace("\\d", "[0-9]")}
        return {"type": "string", "format": kind} if kind in _ENGINE_FORMATS else {"type": "string", **lengths}

    def _integer(self, schema: Schema) -> Schema:
        if not schema.keys() & set(_BOUNDS):
            return {"type": "integer"}
        low = max(math.ceil(schema.get("minimum", -INTEGER_MAX)), math.floor(schema.get("exclusiveMinimum", -INTEGER_MAX - 1)) + 1)
        high = min(math.floor(schema.get("maximum", INTEGER_MAX)), math.ceil(schema.get("exclusiveMaximum", INTEGER_MAX + 1)) - 1)
        low, high = max(low, -INTEGER_MAX), min(high, INTEGER_MAX)  # llama.cpp keeps to bounds only if it is given both
        self.exact &= low <= high
        return {"type": "integer", "minimum": low, "maximum": high} if low <= high else {"type": "integer"}

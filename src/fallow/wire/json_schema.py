"""A caller's JSON schema: refused if hostile, put into what llama.cpp's grammars understand, and held against answers."""

import copy
import functools
import importlib
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

from fallow.model.errors import InvalidRequest, shortened

BYTES_MAX = 64 * 1024
DEPTH_MAX = 32
SCHEMAS_MAX = 1_000
ENUM_MAX = PROPERTIES_MAX = 500
PATTERNS_MAX, PATTERN_CHARS_MAX = 100, 200
COUNT_MAX = 1_000
CHAIN_MAX = 32
LOOPS_MAX = 2
SLOW_CHARS_MAX = 500
"""Longer strings are not held against a pattern that takes more than linear time."""
STEPS_MAX = 100_000
INTEGER_MAX = 10**15 - 1
TIGHT_CHARS, TIGHT_ITEMS = 200, 5
ANSWER_DEPTH_MAX = 100

Schema = dict[str, Any]
Place = tuple[str, ...]

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
            "unevaluatedProperties", "contentSchema")  # fmt: skip
_IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"}
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_OF_TYPE = {"object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"), "number": _BOUNDS,
            "array": ("items", "prefixItems", "minItems", "maxItems"), "string": ("minLength", "maxLength", "pattern", "format"),
            "integer": _BOUNDS, "boolean": (), "null": ()}  # fmt: skip
_NOT_IN_GRAMMARS = {"not", "if", "dependentSchemas", "dependentRequired", "patternProperties", "propertyNames", "contains", "uniqueItems",
                    "multipleOf", "unevaluatedItems", "unevaluatedProperties", "allOf"}  # fmt: skip
_FORMATS = ("date", "email", "idn-email", "ipv4", "ipv6", "regex", "uuid")  # what jsonschema checks without other packages
_ENGINE_FORMATS = ("date", "time", "date-time", "uuid")
_ANYTHING: Schema = {"type": ["object", "array", "string", "number", "boolean", "null"]}
_ATOM = r"(?:[A-Za-z0-9_ @:]|\\[.d]|\[(?:[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|[A-Za-z0-9_ .@:])+\])(?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})?"
_ENGINE_PATTERN = re.compile(rf"\^(?:{_ATOM}|\((?:{_ATOM})+(?:\|(?:{_ATOM})+)*\)\??)+\$", re.ASCII)
"""What llama.cpp is known to take as Python does, and can't end a JSON string early."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is told to write. If `exact`, all that its grammar lets through fits the caller's schema."""

    engine: dict[str, Any]
    exact: bool


def check_schema(schema: Any, *, param: str) -> None:
    """Refuse a schema that can't be used, or that is made to cost, before an engine or a validator sees it."""
    for check in (_size, _parts, _language, _references):
        if (why := check(schema)) is not None:
            raise InvalidRequest(f"{shortened(param)} {why}", param=param)


def _inner(schema: Any) -> Iterator[tuple[Place, Any]]:
    """The schemas that stand in this one, each with its place."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in _MAPS and isinstance(value, dict):
            yield from (((key, name), part) for name, part in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from (((key, str(index)), part) for index, part in enumerate(value))
        elif key in _SINGLES:
            yield (key,), value


def _places(schema: Any) -> dict[Place, Any]:
    """Every schema of a document by its place, as far as one more than `SCHEMAS_MAX`."""
    found: dict[Place, Any] = {}
    todo: list[tuple[Place, Any]] = [((), schema)]
    while todo and len(found) <= SCHEMAS_MAX:
        place, part = todo.pop()
        found[place] = part
        todo.extend((place + more, inner) for more, inner in _inner(part))
    return found


def _target(ref: str) -> Place | None:
    """The place that a reference names; None if it isn't one into the same document."""
    if ref == "#":
        return ()
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in unquote(ref[2:]).split("/")) if ref.startswith("#/") else None


def _size(schema: Any) -> str | None:
    if not isinstance(schema, dict):
        return "must be an object"
    todo = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > DEPTH_MAX:
            return f"is nested deeper than {DEPTH_MAX} levels"
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo.extend((part, depth + 1) for part in inner)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError):
        return "is not JSON"
    return f"is {size} bytes long; at most {BYTES_MAX} are taken" if size > BYTES_MAX else None


def _parts(schema: Any) -> str | None:
    """The limits on how many there are of everything."""
    places = _places(schema)
    parts = [part for part in places.values() if isinstance(part, dict)]
    names = [list(part[key]) for part in parts for key in ("properties", "patternProperties") if isinstance(part.get(key), dict)]
    patterns = [part["pattern"] for part in parts if isinstance(part.get("pattern"), str)]
    patterns += [name for part in parts if isinstance(part.get("patternProperties"), dict) for name in part["patternProperties"]]
    values = [part["enum"] for part in parts if isinstance(part.get("enum"), list)]
    for what, count, most in (("schemas", len(places), SCHEMAS_MAX), ("enum values", sum(map(len, values)), ENUM_MAX),
                              ("properties", sum(map(len, names)), PROPERTIES_MAX), ("patterns", len(patterns), PATTERNS_MAX)):  # fmt: skip
        if count > most:
            return f"has more than {most} {what} in all"
    if [] in values:
        return "has an empty enum, which nothing fits"
    for key in ("minItems", "minLength", "minProperties", "minContains"):
        if any(isinstance(part.get(key), (int, float)) and part[key] > COUNT_MAX for part in parts):
            return f"has a {key} over {COUNT_MAX}"
    if any("$id" in part for place, part in places.items() if place and isinstance(part, dict)):
        return "has an $id below its root; it can only refer to parts of one document"
    return next((f"has a pattern that {why}" for one in patterns if isinstance(why := _loops(one), str)), None)


def _language(schema: Any) -> str | None:
    """Is it a JSON schema at all, and does it ask for what can be?"""
    try:
        error = next(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema), None)
    except (RecursionError, ArithmeticError, ValueError, TypeError, LookupError):
        return "is not a JSON schema"
    if error is not None:
        where = shortened(".".join(map(str, error.absolute_path)), 100)
        return f"is not a valid JSON schema (draft 2020-12) at {where or 'its root'}"
    forbidden = (part["properties"].get(name) for part in _places(schema).values() if isinstance(part, dict) and "properties" in part
                 for name in part.get("required", ()))  # fmt: skip
    return "requires a property that it forbids" if any(one is False for one in forbidden) else None


def _references(schema: Any) -> str | None:
    places = _places(schema)
    for part in places.values():
        if isinstance(part, dict) and ("$dynamicRef" in part or "$recursiveRef" in part):
            return "uses $dynamicRef or $recursiveRef; only $ref is known"
        if isinstance(part, dict) and "$ref" in part and _target(part["$ref"]) not in places:
            return "has a $ref that names no schema in it; a $ref is # or begins with #/"
    weights: dict[Place, int] = {}
    if any(_weight(place, places, weights, CHAIN_MAX) > SCHEMAS_MAX for place in places):
        return f"refers to itself without end, or holds one value against over {CHAIN_MAX} schemas in a chain or {SCHEMAS_MAX} in all"
    return None


def _weight(place: Place, places: Mapping[Place, Any], weights: dict[Place, int], left: int) -> int:
    """How many schemas apply to one value, from this place on; a loop counts as too many."""
    if left < 0:
        return SCHEMAS_MAX + 1
    if place not in weights:
        part = places[place]
        nexts = [place + more for more, _ in _inner(part) if more[0] in _IN_PLACE]
        if isinstance(part, dict) and "$ref" in part:
            nexts.append(_target(part["$ref"]) or ())
        weights[place] = SCHEMAS_MAX + 1  # whoever comes back here while it is being worked out has found a loop
        weights[place] = 1 + min(SCHEMAS_MAX, sum(_weight(one, places, weights, left - 1) for one in nexts))
    return weights[place]


class _TooSlow(ValueError):
    """A pattern, or a check, that could take too long."""


_regex = importlib.import_module("re._parser")  # it has no public name, but what it reads is what will run
_OTHER, _ALL = 1 << 128, (1 << 129) - 1
_joined: Callable[[Iterable[int]], int] = functools.partial(functools.reduce, operator.or_)
_CATEGORY = {"DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S", "WORD": r"\w", "NOT_WORD": r"\W"}


def _characters(op: str, arg: Any) -> int:
    """At least the characters that an item of a pattern takes: a bit for each of ASCII, and one for all others."""
    match op:
        case "LITERAL":
            return 1 << min(arg, 128)
        case "RANGE":
            return (2 << min(arg[1], 128)) - (1 << min(arg[0], 128))
        case "CATEGORY":
            kind = re.compile(_CATEGORY[str(arg).removeprefix("CATEGORY_")])
            return _OTHER | sum(1 << code for code in range(128) if kind.match(chr(code)))
        case "IN":
            found = _joined(_characters(str(kind), one) for kind, one in arg if str(kind) != "NEGATE")
            return _ALL & ~found | _OTHER if str(arg[0][0]) == "NEGATE" else found
        case "ANY" | "NOT_LITERAL":
            return _ALL
    raise _TooSlow


class _Cost:
    """How often a backtracking matcher may have to choose: `choices` ways, times the text's length for each of `loops`."""

    def __init__(self) -> None:
        self.loops, self.choices = 0, 1

    def run(self, items: Any, follow: int, looped: int) -> tuple[int, bool]:
        """With which characters items in `looped` loops begin, and whether they may be empty; `follow` is what may come after them."""
        first, empty = 0, True
        for op, arg in reversed(list(items)):
            begin, skips = self._one(str(op), arg, first | (follow if empty else 0), looped)
            first, empty = begin | (first if skips else 0), skips and empty
        return first, empty

    def _one(self, op: str, arg: Any, follow: int, looped: int) -> tuple[int, bool]:
        match op:
            case "AT":
                return 0, True
            case "SUBPATTERN" if not arg[1] and not arg[2]:
                return self.run(arg[3], follow, looped)
            case "BRANCH":
                begins = [self.run(one, follow, looped) for one in arg[1]]
                sets = [first | (follow if empty else 0) for first, empty in begins]
                if sum(map(int.bit_count, sets)) != _joined(sets).bit_count() or sum(empty for _, empty in begins) > 1:
                    self._choose(len(sets), looped)
                return _joined(first for first, _ in begins), any(empty for _, empty in begins)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = arg
                endless = most is _regex.MAXREPEAT
                first, empty = _Cost().run(body, 0, looped + 1) if looped < 5 else (0, True)
                if max(least, 0 if endless else most) > COUNT_MAX or (empty and most > 1):
                    raise _TooSlow
                if least != most and (first & follow or empty):
                    self._choose(None if endless else most - least + 1, looped)
                self.run(body, follow | (first if most > 1 else 0), looped + (most > 1))
                return first, empty or least == 0
        return _characters(op, arg), False

    def _choose(self, ways: int | None, looped: int) -> None:
        self.loops, self.choices = self.loops + (ways is None), self.choices * (ways or 1)
        if looped or self.loops > LOOPS_MAX or self.choices > COUNT_MAX:
            raise _TooSlow


@functools.lru_cache(1024)
def _loops(pattern: str) -> int | str:
    """The power of a text's length that matching may take, or what is wrong with the pattern."""
    if len(pattern) > PATTERN_CHARS_MAX:
        return f"is longer than {PATTERN_CHARS_MAX} characters"
    cost = _Cost()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = _regex.parse(pattern)
        cost.run(tree, 0, 0)
    except _TooSlow:
        return f"could take too long, repeats over {COUNT_MAX} times, or looks around or back; simpler loops lift this"
    except (re.error, RecursionError, OverflowError, Warning):
        return "is not a valid regular expression"
    anchored = len(tree) and str(tree[0][0]) == "AT" and str(tree[0][1]).startswith("AT_BEGINNING")
    return "sets flags" if tree.state.flags != re.UNICODE.value else cost.loops + (not anchored)


class _Meter(FormatChecker):
    """Rides along with a validation, and counts what it costs."""

    steps = 0


def _metered(keyword: str, rule: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def check(validator: Any, argument: Any, instance: Any, schema: Any) -> Iterator[Any]:
        meter = validator.format_checker
        meter.steps += 1 + (len(instance) ** 2 // 100 if keyword == "uniqueItems" and isinstance(instance, list) else 0)
        patterns = {"pattern": [argument], "patternProperties": argument}.get(keyword, ())
        texts = instance if isinstance(instance, dict) else [instance]
        slow = any(isinstance(text, str) and len(text) > SLOW_CHARS_MAX for text in texts) and any(_loops(one) for one in patterns)
        if slow or meter.steps > STEPS_MAX:
            raise _TooSlow
        yield from rule(validator, argument, instance, schema) or ()

    return check


_Validator: Any = extend(Draft202012Validator, {key: _metered(key, rule) for key, rule in Draft202012Validator.VALIDATORS.items()})  # type: ignore[no-untyped-call]


def fits(schema: Schema, value: Any, *, root: Schema | None = None) -> bool:
    """Does a value fit? One that can't be judged at a bounded cost doesn't. References are looked up in `root`."""
    document = {key: part for key, part in (root or schema).items() if key not in ("$id", "$schema")}
    validator = _Validator(document, registry=Registry(), format_checker=_Meter(_FORMATS))
    try:
        return bool((validator if root is None else validator.evolve(schema=schema)).is_valid(value))
    except (RecursionError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError, Unresolvable):
        return False


def fits_text(schema: Schema, text: str) -> bool:
    """Is a text one JSON value that fits? One nested without end, or with NaN or Infinity in it, is not."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return False
    return _depth(value, ANSWER_DEPTH_MAX) and fits(schema, value)


def _depth(value: Any, most: int) -> bool:
    """Is a value nested no deeper than this?"""
    todo = [(value, 1)]
    while todo:
        one, depth = todo.pop()
        if depth > most:
            return False
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        todo.extend((part, depth + 1) for part in inner)
    return True


def constrain(schema: Schema) -> Constraint:
    """What to tell llama.cpp so that it writes what fits, as far as its grammars can say that. The schema has been checked."""
    lowering = _Lowering(schema)
    engine = lowering.lower(schema)
    defs: Schema = {}
    while len(defs) < len(lowering.names):
        place, name = list(lowering.names.items())[len(defs)]
        defs[name] = lowering.lower(lowering.places[place])
    return Constraint(engine={**engine, "$defs": defs} if defs else engine, exact=lowering.exact)


class _Lowering:
    """Says a schema in the few forms that llama.cpp is known to take at their word; where it can't, more is let through."""

    def __init__(self, root: Schema) -> None:
        self.root, self.exact, self.places = root, True, _places(root)
        self.names: dict[Place, str] = {}

    def lower(self, schema: Any) -> Schema:
        if schema is False or not isinstance(schema, dict):
            self.exact &= schema is True
            return _ANYTHING
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            read = json.loads(json.dumps(values), parse_int=float)  # as llama.cpp does: a number over 2^53 becomes another one
            values = [one for one, there in zip(values, read, strict=True) if fits(schema, there, root=self.root)]
            self.exact &= bool(values)
            return {"enum": values} if values else _ANYTHING
        if len(schema.get("allOf", ())) == 1 and isinstance(schema["allOf"][0], dict) and not schema.keys() & schema["allOf"][0].keys():
            return self.lower({key: part for key, part in schema.items() if key != "allOf"} | schema["allOf"][0])
        self.exact &= not ("number" in schema.get("type", "number") and schema.keys() & set(_BOUNDS))
        own = {key for keys in _OF_TYPE.values() for key in keys} & schema.keys()
        others = [key for key in ("$ref", "anyOf", "oneOf") if key in schema]
        if schema.keys() & _NOT_IN_GRAMMARS or (others and (own or "type" in schema or len(others) > 1)) or "oneOf" in schema:
            self.exact = False
        if "$ref" in schema:
            place = _target(schema["$ref"]) or ()
            return {"$ref": f"#/$defs/{self.names.setdefault(place, f'r{len(self.names)}')}"}
        if others and "properties" not in schema:
            return {"anyOf": [self.lower(one) for one in schema[others[0]] if one is not False] or [_ANYTHING]}
        if "allOf" in schema and "properties" not in schema:
            return {"allOf": [self.lower(one) for one in schema["allOf"]]}
        inferred = [kind for kind, keys in _OF_TYPE.items() if schema.keys() & set(keys) and kind != "integer"]
        kinds = schema.get("type") or inferred[:1] or _ANYTHING["type"]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not own and len(kinds) > 1:
            return {"type": kinds}
        parts = [getattr(self, f"_{kind}")(schema) if hasattr(self, f"_{kind}") else {"type": kind} for kind in kinds]
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
        limit = {} if most is None else {"maxItems": int(most)}
        self.exact &= least <= limit.get("maxItems", least)
        if begin and most != 0:  # the engine writes all of them, and nothing more
            self.exact &= least <= len(begin)
            return {"type": "array", "prefixItems": [self.lower(one) for one in begin[: limit.get("maxItems")]]}
        return {"type": "array", "items": self.lower(rest), "minItems": least, **limit}

    def _string(self, schema: Schema) -> Schema:
        pattern, kind = schema.get("pattern"), schema.get("format")
        lengths = {key: int(schema[key]) for key in ("minLength", "maxLength") if key in schema}
        self.exact &= lengths.get("minLength", 0) <= min(1, lengths.get("maxLength", 1))  # two escapes may be one character
        self.exact &= kind not in _FORMATS or (kind == "uuid" and pattern is None)
        known = pattern is not None and _ENGINE_PATTERN.fullmatch(pattern) is not None
        if pattern is not None or kind in _ENGINE_FORMATS:
            self.exact &= not lengths and (known or pattern is None)
        if known:
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


def tightened(engine: Schema) -> Schema:
    """The same for a second try, after the model ran on without end: strings and arrays without a limit get one."""
    whole = copy.deepcopy(engine)
    for part in _places(whole).values():
        if isinstance(part, dict) and part.get("type") == "string" and not part.keys() & {"pattern", "format", "enum", "const"}:
            part["maxLength"] = min(part.get("maxLength", TIGHT_CHARS), max(TIGHT_CHARS, part.get("minLength", 0)))
        if isinstance(part, dict) and part.get("type") == "array" and "prefixItems" not in part:
            part["maxItems"] = part.get("maxItems", max(TIGHT_ITEMS, part.get("minItems", 0)))
    return whole

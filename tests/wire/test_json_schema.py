"""Callers' schemas: the hostile refused, the usual taken, said to an engine as it understands them, and held against answers."""

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fallow.model.errors import InvalidRequest
from fallow.wire.json_schema import ANSWER_DEPTH_MAX, COUNT_SAID_MAX, check_schema, constrain, fits, fits_text, tightened
from fallow.wire.regex_cost import CHARS_MAX, pattern_cost
from fallow.wire.schema_check import BYTES_MAX, COUNT_MAX, DEPTH_MAX, ENUM_MAX, PATTERNS_MAX, PROPERTIES_MAX, SCHEMAS_MAX

PROMISE = settings(max_examples=300)
ANYTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}
Json = dict[str, Any]


def deep(levels: int) -> Json:
    schema: Json = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def chain(length: int) -> Json:
    """Definitions, of which each refers to the next."""
    return {"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(length)} | {str(length): True}, "$ref": "#/$defs/0"}


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], "must be an object"),
    "true": (True, "must be an object"),
    "null": (None, "must be an object"),
    "not a number": ({"const": float("nan")}, "is not JSON"),
    "half a character": ({"const": "\ud800"}, "is not JSON"),
    "large": ({"description": "x" * BYTES_MAX}, f"at most {BYTES_MAX}"),
    "deep": (deep(DEPTH_MAX), "nested deeper"),
    "deep without end": (deep(50_000), "nested deeper"),
    "deep in a value": ({"const": json.loads("[" * DEPTH_MAX + "]" * DEPTH_MAX)}, "nested deeper"),
    "schemas": ({"anyOf": [{}] * SCHEMAS_MAX}, f"more than {SCHEMAS_MAX} schemas"),
    "enum values": ({"enum": [*range(ENUM_MAX + 1)]}, f"more than {ENUM_MAX} enum values"),
    "enum values in two": ({"anyOf": [{"enum": [*range(ENUM_MAX)]}, {"enum": [1]}]}, f"more than {ENUM_MAX} enum values"),
    "properties": ({"properties": {str(n): {} for n in range(PROPERTIES_MAX + 1)}}, f"more than {PROPERTIES_MAX} properties"),
    "required": ({"required": [str(n) for n in range(PROPERTIES_MAX + 1)]}, f"more than {PROPERTIES_MAX} required"),
    "types": ({"type": [*range(5_000), {}]}, "names more than the 7"),
    "patterns": ({"anyOf": [{"pattern": "a"}] * (PATTERNS_MAX + 1)}, f"more than {PATTERNS_MAX} patterns"),
    "a count": ({"minItems": COUNT_MAX + 1}, f"minItems over {COUNT_MAX}"),
    "a large count": ({"items": {"minLength": 1e300}}, f"minLength over {COUNT_MAX}"),
    "properties counted": ({"minProperties": 10**9}, "minProperties over"),
    "a reference elsewhere": ({"$ref": "https://example.com/schema.json"}, "names no schema"),
    "a file": ({"$ref": "file:///etc/passwd"}, "names no schema"),
    "a reference to nothing": ({"$ref": "#/$defs/a"}, "names no schema"),
    "a reference to no schema": ({"title": "a", "$ref": "#/title"}, "names no schema"),
    "an anchor": ({"$defs": {"a": {"$anchor": "a"}}, "$ref": "#a"}, "names no schema"),
    "itself": ({"$ref": "#"}, "without end"),
    "itself in a part": ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "without end"),
    "each other": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"not": {"$ref": "#/$defs/a"}}}}, "without end"),
    "a long chain": (chain(40), "in a chain"),
    "doubling": ({"$defs": {str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(12)} | {"12": True}}, "in all"),
    "$dynamicRef": ({"$dynamicRef": "#meta"}, "$dynamicRef"),
    "$recursiveRef": ({"items": {"$recursiveRef": "#"}}, "$recursiveRef"),
    "$id below": ({"$defs": {"a": {"$id": "https://example.com/"}}}, "$id"),
    "another language below": ({"items": {"$schema": "http://json-schema.org/draft-03/schema#"}}, "$schema"),
    "dependencies": ({"dependencies": {"a": ["b"]}}, "dependentRequired"),
    "a wrong type": ({"type": "text"}, "not a valid JSON schema (draft 2020-12) at type"),
    "a wrong place": ({"properties": {"a": {"minLength": "2"}}}, "at properties.a.minLength"),
    "properties as a list": ({"properties": ["a"]}, "at properties"),
    "items as a list": ({"items": [{}]}, "at items"),
    "a reference that is none": ({"$ref": 3}, "at $ref"),
    "an empty anyOf": ({"anyOf": []}, "at anyOf"),
    "an empty enum": ({"items": {"enum": []}}, "nothing fits"),
    "a forbidden property": ({"properties": {"a": False}, "required": ["a"]}, "it forbids"),
    "a property it leaves out": ({"properties": {"b": True}, "required": ["a"], "additionalProperties": False}, "it forbids"),
}

PATTERNS_REFUSED: list[tuple[str, str]] = [
    *((one, "could take too long") for one in ("(a+)+$", "(a|a)*b", "(a?){50}", "(x+x+)+y", "(.*)(.*)(.*)(.*)x", "(a{1,500}){2}b")),
    *((one, "could take too long") for one in ("^(([a-z])+.)+[A-Z]([a-z])+$", "((((((a*b)*c)*d)*e)*f)*g)*", "^(.|\\n)*$", "(a*)*")),
    *((one, "repeats over") for one in ("a{5000}", "(ab){2,1001}")),
    *((one, "looks around or back") for one in ("(?=a)b", "(a)\\1", "(?<!a)b", "(?>a)", "a*+b", "(?i:a)")),
    *((one, "is not a valid regular expression") for one in ("(", "[z-a]", "a{3,2}", "[[a]", "\\p{L}", "*")),
    ("(?i)a", "sets flags"),
    ("a" * (CHARS_MAX + 1), f"longer than {CHARS_MAX}"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    schema, why = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        check_schema(schema, param="tools[0].parameters")
    assert why in str(caught.value)
    assert str(caught.value).startswith("tools[0].parameters ")
    assert caught.value.param == "tools[0].parameters"


@pytest.mark.parametrize(("pattern", "why"), PATTERNS_REFUSED)
@pytest.mark.parametrize("keyword", ["pattern", "patternProperties"])
def test_patterns_refused(pattern: str, why: str, keyword: str) -> None:
    with pytest.raises(InvalidRequest, match="has a pattern that") as caught:
        check_schema({"items": {keyword: pattern if keyword == "pattern" else {pattern: True}}}, param="schema")
    assert why in str(caught.value)
    assert len(pattern) < 5 or pattern not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "power"),
    [
        ("^a$", 0),
        ("^[a-z]+@[a-z]+\\.com$", 0),
        ("a", 1),
        ("^.*x", 1),
        (".*x", 2),
        ("^.*,.*,", 2),
        ("^(ab|cd)*$", 0),
        ("^\\d{3}-\\d{4}$", 0),
    ],
)
def test_what_a_pattern_costs(pattern: str, power: int) -> None:
    cost = pattern_cost(pattern)
    assert (cost.power, cost.refused) == (power, None)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Part(pydantic.BaseModel):
    name: str = pydantic.Field(description="What it is called")
    count: int = pydantic.Field(gt=0, le=100)
    note: str | None = None


class Order(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["new", "used"]
    colour: Colour = Colour.RED
    parts: list[Part] = pydantic.Field(min_length=1)
    scores: dict[str, int]
    best: Part


class Tree(pydantic.BaseModel):
    value: int
    children: list["Tree"] = []


class Priced(pydantic.BaseModel):
    price: float = pydantic.Field(ge=0)
    place: tuple[int, str]
    thing: Part | Tree


ORDER = Order(kind="new", parts=[Part(name="a", count=1)], scores={"x": 1}, best=Part(name="b", count=100, note="c"))
TREE = Tree(value=1, children=[Tree(value=2), Tree(value=3, children=[Tree(value=4)])])
MODELS: list[tuple[pydantic.BaseModel, Json, bool]] = [
    (Part(name="a", count=3), {"name": "a", "count": 0}, True),
    (ORDER, ORDER.model_dump(mode="json") | {"colour": "green"}, True),
    (TREE, {"value": 1, "children": [{"value": "2"}]}, True),
    (Priced(price=1.5, place=(1, "x"), thing=TREE), {"price": -1, "place": [1, "x"], "thing": {"value": 1}}, False),
]


@pytest.mark.parametrize(("made", "wrong", "exact"), MODELS, ids=lambda one: type(one).__name__)
def test_schemas_made_by_pydantic(made: pydantic.BaseModel, wrong: Json, exact: bool) -> None:
    schema = type(made).model_json_schema()
    check_schema(schema, param="schema")
    constraint = constrain(schema)
    right = made.model_dump(mode="json")
    assert constraint.exact is exact
    assert (fits(schema, right), fits(schema, wrong)) == (True, False)
    assert fits(constraint.engine, right), "the engine must be able to write what fits"
    if exact:
        assert not fits(constraint.engine, wrong)


RECURSIVE: Json = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
ACCEPTED: list[tuple[Json, Any, Any]] = [
    ({}, {"a": [1]}, ...),
    ({"type": "object"}, {}, []),
    (RECURSIVE, [[], [[]]], [1]),
    ({"type": "array", "items": {"$ref": "#"}}, [[], [[]]], [1]),
    ({"anyOf": [{"type": "null"}, {"anyOf": [{"type": "integer"}, {"anyOf": [{"const": "a"}]}]}]}, "a", "b"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/", "type": "string"}, "a", 1),
    ({"$schema": "no such language", "enum": ["a"]}, "a", "b"),
    ({"definitions": {"a~b/c d": {"type": "null"}}, "$ref": "#/definitions/a~0b~1c%20d"}, None, 1),
    ({"properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}}, {"b": None}, {"b": 1}),
    ({"prefixItems": [{"const": 1}], "items": {"$ref": "#/prefixItems/0"}}, [1, 1.0], [1, 2]),
    ({"enum": [True, {"a": [0]}, 1.5]}, {"a": [0.0]}, {"a": [False]}),
    ({"const": 1}, 1.0, True),
    ({"uniqueItems": True}, [1, True, "1", [1], [True], {"a": 1}, {"a": 2}], [{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]),
    ({"uniqueItems": False}, [1, 1], ...),
    ({"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False, "required": ["ab"]}, {"ab": 1}, {"ab": "c"}),
    ({"unevaluatedProperties": False, "allOf": [{"patternProperties": {"^a": True}}]}, {"a": 1}, {"b": 1}),
    ({"multipleOf": 3}, 9, 10),
    ({"format": "date"}, "2026-02-28", "2026-02-30"),
    ({"format": "regex"}, "(", ...),
    ({"if": {"type": "string"}, "then": {"maxLength": 1}}, 7, "ab"),
    ({"not": {"type": "null"}}, 1, None),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), ACCEPTED)
def test_what_is_accepted(schema: Json, right: Any, wrong: Any) -> None:
    check_schema(schema, param="schema")
    constraint = constrain(schema)
    assert fits(schema, right)
    assert wrong is ... or not fits(schema, wrong)
    check_schema(constraint.engine, param="engine")
    check_schema(tightened(constraint.engine), param="engine")


def nodes(**more: Any) -> Json:
    return {"type": "object", "properties": {"a": {"type": "string"}}, **more}


ARRAYS_NOT_SAID: list[Json] = [{"uniqueItems": True}, {"contains": {}}, {"minItems": 2, "maxItems": 1}]
EXACT: list[tuple[bool, Json]] = [
    *((True, one) for one in ({}, {"type": "object"}, {"type": "array"}, {"type": "string"}, {"type": "integer"}, {"type": "number"})),
    *((True, one) for one in (nodes(), nodes(required=["a"]), nodes(additionalProperties=False), nodes(title="A", description="B"))),
    *((True, {"type": "string", **more}) for more in ({"maxLength": 5}, {"minLength": 1}, {"format": "uuid"}, {"format": "no such"})),
    *((True, {"type": "string", "pattern": one}) for one in ("^[a-z]+$", "^\\d{4}-\\d{2}$", "^(a|b)c?$", "^[a-z0-9-]{1,9}$")),
    *((True, {"type": "integer", **more}) for more in ({"minimum": 1}, {"exclusiveMaximum": 0}, {"minimum": 0.5, "maximum": 1})),
    *((True, one) for one in ({"enum": [1, "a", None]}, {"const": {"a": [1]}}, {"enum": [1, 2, "a"], "type": "string"})),
    *((True, one) for one in ({"anyOf": [{"type": "null"}, {"const": 1}]}, RECURSIVE, {"allOf": [{"const": 1}], "default": 1})),
    *((True, {"type": "array", **more}) for more in ({"items": {"const": 1}, "minItems": 2}, {"maxItems": 0}, {"maxItems": 1e300})),
    (True, {"type": "array", "prefixItems": [{"type": "string"}], "items": False}),
    (True, {"type": ["string", "null"], "maxLength": 3}),
    (True, {"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}}),
    (True, {"minLength": 1}),
    (False, nodes(additionalProperties=True)),
    *((False, nodes(**more)) for more in ({"minProperties": 1}, {"maxProperties": 1}, {"propertyNames": {"maxLength": 3}})),
    *((False, nodes(**more)) for more in ({"patternProperties": {"^b": True}}, {"dependentRequired": {"a": ["b"]}})),
    *((False, nodes(**more)) for more in ({"anyOf": [{"required": ["a"]}]}, {"$ref": "#/$defs/b", "$defs": {"b": {"type": "object"}}})),
    (False, {"properties": {"a": {"const": 1}}, "allOf": [{"additionalProperties": False}]}),
    (False, {"type": "string", "minLength": 2}),
    (False, {"type": "string", "minLength": 1, "maxLength": 0}),
    *((False, {"type": "string", "format": one}) for one in ("date", "email", "ipv4")),
    *((False, {"type": "string", "pattern": one}) for one in ("a", "^a", "^a$|b", "^.$", "^\\w$", "^[^a]$", '^"$', "^\\\\$", "^\\d$|^a$")),
    (False, {"type": "string", "pattern": "^a+$", "maxLength": 3}),
    (False, {"type": "string", "format": "date-time", "maxLength": 20}),
    *((False, {"type": "number", one: 1}) for one in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
    (False, {"minimum": 1}),
    (False, {"type": "integer", "minimum": 2, "maximum": 1}),
    (False, {"type": "integer", "minimum": 1e20}),
    *((False, {"type": "array"} | more) for more in ARRAYS_NOT_SAID),
    (False, {"type": "array", "prefixItems": [{}], "minItems": 2}),
    *((False, {one: [{"const": 1}, {"const": 2}]}) for one in ("oneOf", "allOf")),
    (False, {"not": {"const": 1}}),
    (False, {"anyOf": [False]}),
    (False, {"properties": {"a": False}, "anyOf": [{}]}),
    (False, {"enum": [1], "type": "string"}),
    (False, {"const": 2**63 + 1, "maximum": 2**63 + 1}),
    (False, {"type": "array", "items": {"type": "array", "items": {"not": {}}}}),
]


@pytest.mark.parametrize(("exact", "schema"), EXACT)
def test_whether_a_grammar_can_say_all_of_it(exact: bool, schema: Json) -> None:
    check_schema(schema, param="schema")
    assert constrain(schema).exact is exact


def obj(properties: Json, required: list[str], more: Any = False) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


REWRITTEN: list[tuple[Json, Json]] = [
    ({}, ANYTHING),
    ({"type": "object"}, {"type": "object"}),
    ({"properties": {"a": {}}}, obj({"a": ANYTHING}, [])),
    ({"properties": {"a": {"type": "null"}, "b": False}}, obj({"a": {"type": "null"}}, [])),
    ({"required": ["a"], "additionalProperties": {"type": "null"}}, obj({"a": {"type": "null"}}, ["a"], {"type": "null"})),
    ({"properties": {"a b": {"type": "null"}}, "additionalProperties": True}, obj({"a b": {"type": "null"}}, [])),
    ({"const": 3}, {"enum": [3]}),
    ({"enum": [1, "ab", "a"], "maxLength": 1, "type": "string"}, {"enum": ["a"]}),
    ({"enum": [2**53, 2**53 + 1], "minimum": 2**53}, {"enum": [2**53, 2**53 + 1]}),
    ({"type": "integer", "minimum": 1}, {"type": "integer", "minimum": 1, "maximum": 10**15 - 1}),
    ({"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 3}, {"type": "integer", "minimum": 1, "maximum": 2}),
    ({"type": "number", "minimum": 1}, {"type": "number"}),
    ({"type": "string", "pattern": "^\\d+$"}, {"type": "string", "pattern": "^[0-9]+$"}),
    ({"type": "string", "pattern": "a"}, {"type": "string"}),
    ({"type": "string", "maxLength": 1e300}, {"type": "string", "maxLength": COUNT_SAID_MAX}),
    ({"type": "string", "format": "email"}, {"type": "string"}),
    ({"type": "string", "format": "time"}, {"type": "string", "format": "time"}),
    ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
    ({"type": ["string", "null"], "maxLength": 2.0}, {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}),
    ({"type": "array", "prefixItems": [{"const": 1}, {}], "maxItems": 1}, {"type": "array", "prefixItems": [{"enum": [1]}]}),
    ({"type": "array", "items": {"const": 1}, "uniqueItems": True}, {"type": "array", "items": {"enum": [1]}, "minItems": 0}),
    ({"allOf": [{"type": "null"}], "description": "a"}, {"type": "null"}),
    ({"oneOf": [{"type": "null"}, False]}, {"anyOf": [{"type": "null"}]}),
    (RECURSIVE, {"$ref": "#/$defs/r0", "$defs": {"r0": {"type": "array", "items": {"$ref": "#/$defs/r0"}, "minItems": 0}}}),
]


@pytest.mark.parametrize(("schema", "engine"), REWRITTEN)
def test_what_the_engine_is_told(schema: Json, engine: Json) -> None:
    check_schema(schema, param="schema")
    assert constrain(schema).engine == engine


def test_tightened_limits_what_has_no_limit() -> None:
    items = {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "string", "maxLength": 900, "minLength": 300}}}
    items |= {"c": {"type": "array", "items": {}, "minItems": 7}, "d": {"type": "string", "format": "date"}, "e": {"enum": ["x"]}}
    before = json.dumps(engine := obj(items, [], {"type": "array", "items": {}, "maxItems": 9}) | {"$defs": {"r0": {"type": "string"}}})
    tight = tightened(engine)
    assert tight["properties"]["a"]["maxLength"] == tight["$defs"]["r0"]["maxLength"] == 200
    assert tight["properties"]["b"] == {"type": "array", "items": {"type": "string", "maxLength": 300, "minLength": 300}, "maxItems": 5}
    assert tight["properties"]["c"]["maxItems"] == 7
    assert tight["properties"]["d"] == items["d"]
    assert tight["properties"]["e"] == items["e"]
    assert tight["additionalProperties"]["maxItems"] == 9
    assert json.dumps(engine) == before, "what was given stays as it was"


TEXTS = [
    ("[1]", True),
    (" [ ] ", True),
    ('"\\ud800"', True),
    ("1e999", True),
    ("[" * ANSWER_DEPTH_MAX + "]" * ANSWER_DEPTH_MAX, True),
    ("[" * (ANSWER_DEPTH_MAX + 1) + "]" * (ANSWER_DEPTH_MAX + 1), False),
    ("[" * 200_000, False),
    ('{"a":' * 200_000, False),
    *(
        (one, False)
        for one in ("", "[1", "1 2", "NaN", "[-Infinity]", "Infinity", "None", "'a'", "9" * 5_000, "\ufeff1", "```json\n1\n```")
    ),
]


@pytest.mark.parametrize(("text", "right"), TEXTS, ids=lambda one: repr(one)[:20])
def test_texts_that_are_json(text: str, right: bool) -> None:
    assert fits_text({}, text) is right


def test_a_text_is_held_against_its_schema() -> None:
    assert fits_text({"type": "integer"}, "1")
    assert not fits_text({"type": "integer"}, '"1"')


def test_a_recursive_answer_fits_as_deep_as_texts_may_be() -> None:
    assert fits_text({"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"const": 1}]}}, "[" * ANSWER_DEPTH_MAX + "]" * ANSWER_DEPTH_MAX)


LONG = "a" * 60_000
COSTLY: list[tuple[Json, Any]] = [
    ({"pattern": "a*a*b"}, LONG),
    ({"patternProperties": {"a*a*b": False}}, {LONG: 1}),
    ({"additionalProperties": True, "patternProperties": {"a*a*b": False}}, {LONG: 1}),
    ({"additionalProperties": False, "patternProperties": {"a*a*b": False}}, {LONG: 1}),
    ({"unevaluatedProperties": True, "patternProperties": {"a*a*b": False}}, {LONG: 1}),
    ({"items": {"anyOf": [{"const": n} for n in range(900)]}}, [901] * 10_000),
    ({"additionalProperties": True, "patternProperties": {f"^{n}a": True for n in range(100)}}, {str(n): 1 for n in range(20_000)}),
]


@pytest.mark.parametrize(("schema", "value"), COSTLY)
def test_what_would_take_too_long_to_judge_does_not_fit(schema: Json, value: Any) -> None:
    check_schema(schema, param="schema")
    assert not fits(schema, value)


def test_patterns_that_are_right_apart_and_wrong_together() -> None:
    schema = {"additionalProperties": False, "patternProperties": {"(?P<a>x)": True, "(?P<a>y)": True}}
    check_schema(schema, param="schema")
    assert not fits(schema, {"q": 1})


def test_values_that_compare_in_long_are_compared_at_once() -> None:
    nested = [[[n]] for n in range(20_000)]
    assert fits({"uniqueItems": True}, [*nested, {}])
    assert not fits({"uniqueItems": True}, [*nested, [[7.0]]])
    assert fits({"const": nested}, nested)


SCALARS = st.none() | st.booleans() | st.integers(-3, 2**64) | st.floats() | st.text(max_size=5)
KEYWORDS = st.sampled_from(
    [
        *("type", "enum", "const", "properties", "required", "items", "anyOf", "allOf", "oneOf", "not", "if", "then", "$ref", "$defs"),
        *("additionalProperties", "patternProperties", "prefixItems", "minLength", "maxLength", "pattern", "format", "minimum"),
        *("exclusiveMaximum", "multipleOf", "uniqueItems", "minItems", "maxItems", "unevaluatedProperties", "contains", "$schema"),
        *("dependentRequired", "dependentSchemas", "propertyNames", "minProperties", "a"),
    ]
)
WORDS = st.sampled_from(
    ["string", "object", "array", "integer", "number", "#", "#/$defs/a", "#/items", "a", "^a+$", "(a+)+", "date", "uuid"]
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
)


@PROMISE
@given(schema=JSON, value=JSON)
def test_no_json_gets_through_to_fail_later(schema: Any, value: Any) -> None:
    try:
        check_schema(schema, param="schema")
    except InvalidRequest:
        return
    use(schema, value)


COUNTS = st.integers(0, 3)
NAMES = st.sampled_from(["a", "b", "é c", '"'])
PLAIN = st.none() | st.booleans() | st.integers(-3, 2**53 + 9) | st.floats(-9, 9) | st.text(max_size=3)
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.just({}),
    st.booleans(),
    st.sampled_from([{"$ref": "#"}, {"$ref": "#/$defs/a"}]),
    st.fixed_dictionaries({"type": st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])}),
    st.fixed_dictionaries({"enum": st.lists(PLAIN, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": COUNTS, "exclusiveMaximum": st.floats(-2, 5)}),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"minLength": COUNTS, "maxLength": COUNTS, "pattern": st.just("^a*$")}),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=3)
    both = {"minItems": COUNTS, "maxItems": COUNTS, "items": inner, "prefixItems": lists, "uniqueItems": st.booleans()}
    named = st.dictionaries(NAMES, inner, max_size=3)
    some = {"required": st.lists(NAMES, unique=True, max_size=2), "additionalProperties": inner, "minProperties": COUNTS}
    return st.one_of(
        st.fixed_dictionaries({"type": st.just("array")}, optional=both),
        st.fixed_dictionaries({"properties": named}, optional=some),
        st.fixed_dictionaries({}, optional={"anyOf": lists, "oneOf": lists, "allOf": lists, "not": inner, "type": st.just("string")}),
    )


SCHEMAS = st.builds(
    lambda one, a: one | {"$defs": {"a": a}}, st.recursive(LEAVES, larger, max_leaves=6).filter(lambda one: isinstance(one, dict)), LEAVES
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["", "a", "aa", 0, 1, 2]), lambda one: st.lists(one, max_size=3) | st.dictionaries(NAMES, one, max_size=3)
)


def use(schema: Any, value: Any) -> None:
    constraint = constrain(schema)
    told = json.dumps(constraint.engine)
    check_schema(constraint.engine, param="engine")
    check_schema(tightened(constraint.engine), param="engine")
    assert json.dumps(constraint.engine) == told
    assert isinstance(fits(schema, value), bool)
    assert isinstance(fits_text(schema, json.dumps(value)), bool)


def written(draw: Callable[[st.SearchStrategy[Any]], Any], part: Any, defs: Json, left: int = 12) -> Any:
    """What an engine may write when it is told this."""
    assume(left > 0)
    if "$ref" in part:
        return written(draw, defs[part["$ref"].removeprefix("#/$defs/")], defs, left - 1)
    for one in [part["anyOf"][draw(st.integers(0, len(part["anyOf"]) - 1))]] if "anyOf" in part else ():
        return written(draw, one, defs, left - 1)
    if "enum" in part:
        return draw(st.sampled_from(part["enum"]))
    kind = draw(st.sampled_from(part["type"])) if isinstance(part["type"], list) else part["type"]
    match kind:
        case "object" if "properties" not in part:
            return draw(st.dictionaries(NAMES, SCALARS, max_size=2))
        case "object":
            names = [name for name in part["properties"] if name in part["required"] or draw(st.booleans())]
            found = {name: written(draw, part["properties"][name], defs, left - 1) for name in names}
            more = isinstance(part["additionalProperties"], dict) and draw(st.booleans())
            return found | ({"more": written(draw, part["additionalProperties"], defs, left - 1)} if more else {})
        case "array" if "prefixItems" in part:
            return [written(draw, one, defs, left - 1) for one in part["prefixItems"]]
        case "array" if "items" in part:
            count = draw(st.integers(part["minItems"], min(part.get("maxItems", 3), 3))) if part["minItems"] < 3 else part["minItems"]
            return [written(draw, part["items"], defs, left - 1) for _ in range(count)]
        case "string" if "pattern" in part:
            return draw(st.from_regex(part["pattern"], fullmatch=True))
        case "string":
            return draw(st.text(min_size=part.get("minLength", 0), max_size=part.get("maxLength")))
        case "integer":
            return draw(st.integers(part.get("minimum"), part.get("maximum")))
    return draw(
        {"array": st.lists(SCALARS, max_size=2), "number": st.floats(allow_nan=False), "boolean": st.booleans(), "null": st.none()}[kind]
    )


@settings(PROMISE, max_examples=300)
@given(schema=SCHEMAS, value=VALUES, data=st.data())
def test_what_an_exact_constraint_lets_through_fits(schema: Any, value: Any, data: st.DataObject) -> None:
    try:
        check_schema(schema, param="schema")
    except InvalidRequest:
        return
    use(schema, value)
    constraint = constrain(schema)
    if constraint.exact:
        answer = written(data.draw, constraint.engine, constraint.engine.get("$defs", {}))
        assert fits(schema, answer)
        assert fits(constraint.engine, answer)


LEAF = {"type": "object", "properties": {"kind": {"const": "leaf"}}, "required": ["kind"], "additionalProperties": False}
ARRAY = {"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1}


def tree(name: str, told: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: told, "left": {"$ref": "#/$defs/A"}}, "required": [name], "additionalProperties": False}


@pytest.mark.parametrize(
    ("branches", "is_told_to_the_engine"),
    [
        ([ARRAY, ARRAY | {"maxItems": 3}], False),
        ([ARRAY, {"anyOf": [{"type": "null"}, ARRAY]}], False),
        ([tree("x", {"type": "integer"}), tree("x", {"type": "string"})], False),
        ([LEAF, tree("kind", {"const": "tree"})], True),
        ([tree("x", {"type": "integer"}), tree("y", {"type": "string"})], True),
        ([ARRAY, {"type": "null"}], True),
    ],
)
def test_a_union_that_doubles_the_ways_at_each_level_is_not_told_to_the_engine(branches: list[Any], is_told_to_the_engine: bool) -> None:
    constraint = constrain({"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": branches}}})
    assert any("anyOf" in part for part in constraint.engine["$defs"].values()) is is_told_to_the_engine
    assert not constraint.exact or is_told_to_the_engine

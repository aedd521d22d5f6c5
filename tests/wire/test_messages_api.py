"""Anthropic's API: what is taken and what of it reaches an engine, and answers, events and errors as Anthropic published them."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from vendor import check, complaints, events

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.generation import Called, Ended, Endpoint, Event, Generation, Reasoning, Sampling, Stamp, Text, Tool, ToolCall, Turn
from fallow.wire.messages_api import MessagesEndpoint, count_body, error_body, error_event, read_count
from fallow.wire.messages_request import NESTING_MAX, PARAMS
from fallow.wire.openai import TOKENS_MAX
from fallow.wire.sse import EventCutter

PROMISE = settings(max_examples=400)
STAMP = Stamp(id="abc123", created_s=1_700_000_000, model="tiny")
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi"}}
CACHE = {"type": "ephemeral", "ttl": "1h"}
SECRET = "xyzzy-of-the-caller"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 100, "messages": HELLO} | fields


def encode(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def ask(**fields: Any) -> MessagesEndpoint:
    check("anthropic", "CreateMessageParams", {k: v for k, v in body(**fields).items() if k != "fallow"})
    return MessagesEndpoint(encode(body(**fields)), STAMP)


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def use(call_id: str, name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id: str, *content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id} | ({"content": content[0]} if content else {}) | fields


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "object"}
    for _ in range(levels - 1):
        value = {"type": "object", "a": value}
    return value


# --- requests ---


def test_smallest_request() -> None:
    endpoint = ask()
    assert endpoint.generation == Generation(
        turns=(Turn(role="user", text="Hello"),), sampling=Sampling(max_tokens=100), params=endpoint.generation.params
    )
    assert endpoint.stream is False


SAMPLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 1}, {"max_tokens": 1}),
    ({"max_tokens": TOKENS_MAX}, {"max_tokens": TOKENS_MAX}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 1.0}, {"temperature": 1.0}),
    ({"top_p": 0.25}, {"top_p": 0.25}),
    ({"top_k": 0}, {"top_k": 0}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"stop_sequences": []}, {"stop": ()}),
    ({"stop_sequences": ["\n\nHuman:", "x" * 256]}, {"stop": ("\n\nHuman:", "x" * 256)}),
    ({"stop_sequences": list("abcdefgh")}, {"stop": tuple("abcdefgh")}),
]


@pytest.mark.parametrize(("fields", "expected"), SAMPLED)
def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    generation = ask(**fields).generation
    assert generation.sampling == msgspec.structs.replace(Sampling(max_tokens=100), **expected)
    assert generation.tells_stop == bool(expected.get("stop"))  # the answer names the sequence that it met


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"metadata": {"user_id": "u" * 512}},
    {"metadata": {"user_id": None}},
    {"metadata": {}},
    {"service_tier": "auto"},
    {"service_tier": "standard_only"},
    {"cache_control": CACHE},
    {"cache_control": None},
    {"fallow": {"deadline_s": 3, "any": ["thing"]}},
    {"tools": []},
    {"tool_choice": {"type": "auto"}},
    {"output_config": {}},
    {"output_config": {"format": None}},
    {"system": ""},
    {"system": []},
    {"stream": False},
    {"messages": [user(text("Hel"), text("lo"))]},
    {"messages": [user(text("Hello") | {"cache_control": CACHE, "citations": None})]},
]


@pytest.mark.parametrize("fields", WITHOUT_EFFECT)
def test_taken_without_effect(fields: dict[str, Any]) -> None:
    assert ask(**fields).generation == ask().generation


def test_stream_wish() -> None:
    assert ask(stream=True).stream is True


ASK = Turn(role="user", text="Hello")
PARIS = ToolCall(id="t1", name="weather", arguments='{"city":"Paris"}')
NOW = ToolCall(id="t2", name="clock", arguments="{}")
THOUGHTS = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "redacted_thinking", "data": "zzz"}]
# system, messages -> turns
CONVERSATIONS: list[tuple[Any, list[dict[str, Any]], list[Turn]]] = [
    ("Be brief.", HELLO, [Turn(role="system", text="Be brief."), ASK]),
    ([text("Be "), text("brief.") | {"cache_control": CACHE}], HELLO, [Turn(role="system", text="Be brief."), ASK]),
    ("", [*HELLO, {"role": "assistant", "content": "Hi, I"}], [ASK, Turn(role="assistant", text="Hi, I")]),
    ("", [*HELLO, *HELLO], [ASK, ASK]),
    ("", [*HELLO, {"role": "assistant", "content": ""}], [ASK]),
    ("", [*HELLO, assistant()], [ASK]),
    ("", [*HELLO, assistant(*THOUGHTS)], [ASK]),
    ("", [*HELLO, assistant(*THOUGHTS, text("Hi")), *HELLO], [ASK, Turn(role="assistant", text="Hi"), ASK]),
    ("", [*HELLO, assistant(*THOUGHTS), *HELLO], [ASK, ASK]),
    (
        "",
        [*HELLO, assistant(text("I'll "), text("look."), use("t1", city="Paris"), use("t2", "clock"))],
        [ASK, Turn(role="assistant", text="I'll look.", calls=(PARIS, NOW))],
    ),
    (
        "",
        [*HELLO, assistant(use("t1", city="Paris") | {"caller": {"type": "direct"}}), user(result("t1", "rain"))],
        [ASK, Turn(role="assistant", calls=(PARIS,)), Turn(role="tool", text="rain", call_id="t1")],
    ),
    (
        "",
        [
            *HELLO,
            assistant(use("t1", city="Paris"), use("t2", "clock")),
            user(result("t2", [text("1"), text("2:00")]), text("And "), result("t1", "broken", is_error=True), text("now?")),
        ],
        [
            ASK,
            Turn(role="assistant", calls=(PARIS, NOW)),
            Turn(role="tool", text="12:00", call_id="t2"),
            Turn(role="tool", text="Error: broken", call_id="t1"),
            Turn(role="user", text="And now?"),
        ],
    ),
    (
        "",
        [*HELLO, assistant(use("t2", "clock")), user(result("t2")), user(result("t2", [], is_error=False))],
        [
            ASK,
            Turn(role="assistant", calls=(NOW,)),
            Turn(role="tool", call_id="t2"),
            Turn(role="tool", call_id="t2"),
        ],
    ),
]


@pytest.mark.parametrize(("system", "messages", "turns"), CONVERSATIONS)
def test_conversation(system: Any, messages: list[dict[str, Any]], turns: list[Turn]) -> None:
    assert list(ask(system=system, messages=messages).generation.turns) == turns


def test_arguments_survive() -> None:
    arguments: dict[str, Any] = {"a": 2**70, "b": -0.5, "c": "ä\n\u2028", "d": [None, True, {}]}
    call = ask(messages=[*HELLO, assistant(use("t1", **arguments))]).generation.turns[1].calls[0]
    assert json.loads(call.arguments) == arguments
    assert " " not in call.arguments


TOOLS = (Tool(name="weather", description="of a city", parameters=SCHEMA), Tool(name="clock", parameters={"type": "object"}))
CHOICES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"tool_choice": {"type": "auto"}}, {}),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, {"parallel_calls": False}),
    ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
    ({"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, {"tool_choice": "required", "parallel_calls": False}),
    ({"tool_choice": {"type": "any", "disable_parallel_tool_use": False}}, {"tool_choice": "required"}),
    ({"tool_choice": {"type": "tool", "name": "clock"}}, {"tool_choice": "required", "tool_name": "clock"}),
    (
        {"tool_choice": {"type": "tool", "name": "clock", "disable_parallel_tool_use": True}},
        {"tool_choice": "required", "tool_name": "clock", "parallel_calls": False},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CHOICES)
def test_tools(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    extras = {"type": "custom", "cache_control": CACHE, "strict": True, "eager_input_streaming": None}
    got = ask(tools=[WEATHER | extras, CLOCK | {"type": None}], **fields).generation
    assert got == msgspec.structs.replace(ask().generation, tools=TOOLS, **expected)


THINKING: list[tuple[dict[str, Any], bool | None]] = [
    ({}, None),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1025}, True),
    ({"thinking": {"type": "adaptive"}}, True),
    ({"thinking": {"type": "disabled"}}, False),
]


@pytest.mark.parametrize(("fields", "think"), THINKING)
def test_thinking(fields: dict[str, Any], think: bool | None) -> None:
    assert ask(**fields).generation.think is think


def test_output_format() -> None:
    assert ask(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}).generation.schema == SCHEMA


def test_params_name_the_requests_fields() -> None:
    parts = set(Generation.__struct_fields__) | set(Sampling.__struct_fields__) | {"messages"}
    assert set(PARAMS) <= parts
    properties = {"max_tokens", "messages", "tools", "tool_choice", "thinking", "output_config", "stop_sequences"}
    assert {name.split(".")[0].removesuffix("[{index}]") for name in PARAMS.values()} == properties | {"temperature", "top_p", "top_k"}
    assert ask().generation.params == PARAMS


CALLED = [*HELLO, assistant(use("t1", city="Paris"))]
# fields -> param
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 2**80}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": SECRET, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"role": 1, "content": "hi"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ({"messages": [user()]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": ""}, *HELLO]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages"),
    ({"messages": [assistant(*THOUGHTS)]}, "messages"),
    ({"messages": [{"role": "user", "content": "hi", "name": "x"}]}, "messages[0].name"),
    ({"messages": [user("hi")]}, "messages[0].content[0]"),
    ({"messages": [user(text(""))]}, "messages[0].content[0].text"),
    ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
    ({"messages": [user({"text": "a"})]}, "messages[0].content[0].type"),
    ({"messages": [user({"type": SECRET})]}, "messages[0].content[0].type"),
    ({"messages": [user(text("a") | {"lang": "de"})]}, "messages[0].content[0].lang"),
    ({"messages": [user(text("a") | {"cache_control": {"type": "for_ever"}})]}, "messages[0].content[0].cache_control.type"),
    ({"messages": [user(text("a"), IMAGE)]}, "messages[0].content[1]"),
    ({"messages": [user(text("a"), DOCUMENT)]}, "messages[0].content[1]"),
    ({"messages": [*HELLO, assistant(IMAGE)]}, "messages[1].content[0]"),
    ({"messages": [*CALLED, user(result("t1", [text("a"), IMAGE]))]}, "messages[2].content[0].content[1]"),
    ({"messages": [user(use("t1"))]}, "messages[0].content[0].type"),
    ({"messages": [user(THOUGHTS[0])]}, "messages[0].content[0].type"),
    ({"messages": [*HELLO, assistant({"type": "thinking", "thinking": "a"})]}, "messages[1].content[0].signature"),
    ({"messages": [*HELLO, assistant(use("t 1"))]}, "messages[1].content[0].id"),
    ({"messages": [*HELLO, assistant(use("t1\n"))]}, "messages[1].content[0].id"),
    ({"messages": [*HELLO, assistant(use("t1", ""))]}, "messages[1].content[0].name"),
    ({"messages": [*HELLO, assistant(use("t1") | {"input": "{}"})]}, "messages[1].content[0].input"),
    ({"messages": [*HELLO, assistant(use("t1") | {"input": nested(NESTING_MAX + 1)})]}, "messages[1].content[0].input"),
    ({"messages": [*CALLED, assistant(result("t1", "a"))]}, "messages[2].content[0].type"),
    ({"messages": [*CALLED, user(result("t2", "a"))]}, "messages[2].content[0].tool_use_id"),
    ({"messages": [*CALLED, user(result("t1", "a", is_error="no"))]}, "messages[2].content[0].is_error"),
    ({"messages": [*CALLED, user(result("t1", 5))]}, "messages[2].content[0].content"),
    ({"messages": [user(result("t1", "a")), assistant(use("t1"))]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [user(text("a"), result("t1"))]}, "messages[0].content[1].tool_use_id"),
    ({"system": 5}, "system"),
    ({"system": None}, "system"),
    ({"system": [text("")]}, "system[0].text"),
    ({"system": [IMAGE]}, "system[0]"),
    ({"system": [{"text": "a"}]}, "system[0].type"),
    ({"system": [{"type": SECRET}]}, "system[0].type"),
    ({"stream": 1}, "stream"),
    ({"stream": "true"}, "stream"),
    ({"stop_sequences": "END"}, "stop_sequences"),
    ({"stop_sequences": list("abcdefghi")}, "stop_sequences"),
    ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
    ({"stop_sequences": ["a", " \n"]}, "stop_sequences[1]"),
    ({"stop_sequences": ["x" * 257]}, "stop_sequences[0]"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": None}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 2**40}, "top_k"),
    ({"metadata": {"user_id": "u" * 513}}, "metadata.user_id"),
    ({"metadata": {"name": "x"}}, "metadata.name"),
    ({"metadata": None}, "metadata"),
    ({"service_tier": SECRET}, "service_tier"),
    ({"cache_control": {}}, "cache_control.type"),
    ({"cache_control": {"type": "ephemeral", "ttl": None}}, "cache_control.ttl"),
    ({"cache_control": {"type": "ephemeral", "ttl": SECRET}}, "cache_control.ttl"),
    ({"fallow": 5}, "fallow"),
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{}]}, "tools[0].name"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
    ({"tools": [CLOCK, WEATHER | {"name": "a b"}]}, "tools[1].name"),
    ({"tools": [WEATHER | {"name": "a\n"}]}, "tools[0].name"),
    ({"tools": [WEATHER | {"name": "a" * 129}]}, "tools[0].name"),
    ({"tools": [WEATHER | {"description": 5}]}, "tools[0].description"),
    ({"tools": [WEATHER | {"input_schema": []}]}, "tools[0].input_schema"),
    ({"tools": [WEATHER | {"input_schema": {}}]}, "tools[0].input_schema.type"),
    ({"tools": [WEATHER | {"input_schema": {"type": "string"}}]}, "tools[0].input_schema.type"),
    ({"tools": [WEATHER | {"input_schema": nested(NESTING_MAX + 1)}]}, "tools[0]"),
    ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [CLOCK, WEATHER, CLOCK]}, "tools[2].name"),
    ({"tools": [CLOCK, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "tools[1].type"),
    ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0].type"),
    ({"tools": [WEATHER | {"type": 5}]}, "tools[0].type"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": SECRET}}, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
    ({"tool_choice": {"type": "tool", "name": "clock"}, "tools": [WEATHER]}, "tool_choice.name"),
    ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}, "tools": [CLOCK]}, "tool_choice.disable_parallel_tool_use"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1023}, "max_tokens": 5000}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2000}, "thinking.budget_tokens"),
    ({"thinking": {"type": "disabled", "budget_tokens": 2000}}, "thinking.budget_tokens"),
    ({"thinking": {"type": SECRET}}, "thinking.type"),
    ({"thinking": True}, "thinking"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"output_config": {"format": {"schema": SCHEMA}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": nested(101)}}}, "output_config.format.schema"),
    ({"container": "c"}, "container"),
    ({"context_management": {}}, "context_management"),
    ({"mcp_servers": []}, "mcp_servers"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"betas": []}, "betas"),
    ({"seed": 1}, "seed"),
]


@pytest.mark.parametrize(("fields", "param"), INVALID)
def test_invalid(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MessagesEndpoint(encode(body(**fields)), STAMP)
    assert caught.value.param == param
    assert param in caught.value.message  # Anthropic's envelope has no other place for it
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("name", ["model", "messages", "max_tokens"])
def test_required(name: str) -> None:
    fields = body()
    del fields[name]
    with pytest.raises(InvalidRequest, match=f"{name} is required") as caught:
        MessagesEndpoint(encode(fields), STAMP)
    assert caught.value.param == name


@pytest.mark.parametrize("bad", [b"", b"{", b"[]", b"null", b"\xff", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000])
def test_not_a_request(bad: bytes) -> None:
    for read in (lambda: MessagesEndpoint(bad, STAMP), lambda: read_count(bad)):
        with pytest.raises(InvalidRequest):
            read()


@pytest.mark.parametrize("field", ["input_schema", "input", "schema"])
def test_nesting_limit(field: str) -> None:
    deep = nested(NESTING_MAX - 1)
    if field == "input_schema":
        assert ask(tools=[CLOCK | {"input_schema": deep}]).generation.tools[0].parameters == deep
    elif field == "input":
        assert json.loads(ask(messages=[*HELLO, assistant(use("t1", **deep))]).generation.turns[1].calls[0].arguments) == deep
    else:
        assert ask(output_config={"format": {"type": "json_schema", "schema": deep}}).generation.schema == deep


def test_count() -> None:
    fields = {"model": "m", "messages": CALLED, "system": "Be brief.", "tools": [WEATHER, CLOCK], "cache_control": CACHE}
    fields |= {"thinking": {"type": "enabled", "budget_tokens": 4096}, "tool_choice": {"type": "any"}}
    check("anthropic", "CountMessageTokensParams", fields)
    counted = read_count(encode(fields))
    asked = ask(**(fields | {"max_tokens": 5000})).generation
    assert counted == msgspec.structs.replace(asked, sampling=Sampling())
    answer = json.loads(count_body(17))
    check("anthropic", "CountMessageTokensResponse", answer)
    assert MessageTokensCount.model_validate(answer, strict=True).input_tokens == 17


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [user(IMAGE)]}, "messages[0].content[0]"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].name"),
    ],
)
def test_invalid_count(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_count(encode({"model": "m", "messages": HELLO} | fields))
    assert caught.value.param == param


# --- any body ---

FULL = body(
    stream=True,
    system=[text("Be brief.") | {"cache_control": CACHE}],
    messages=[
        *HELLO,
        assistant(*THOUGHTS, text("I'll look."), use("t1", city="Paris", deep=[{"a": [1]}])),
        user(result("t1", [text("rain")], is_error=True), text("So?")),
    ],
    max_tokens=5000,
    stop_sequences=["END"],
    temperature=0.5,
    top_p=0.5,
    top_k=5,
    metadata={"user_id": "u"},
    service_tier="auto",
    tools=[WEATHER | {"type": "custom", "strict": True}, CLOCK],
    tool_choice={"type": "tool", "name": "clock", "disable_parallel_tool_use": True},
    thinking={"type": "enabled", "budget_tokens": 2000},
    output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
)
Path = tuple[str | int, ...]


def paths(value: Any, at: Path = ()) -> list[Path]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inner for path in paths(one, (*at, key)))]


PATHS = [path for path in paths(FULL) if path]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
ODD = st.sampled_from(
    ["", [], {}, None, True, -1, 0, 1.5, 2**64, -(2**64), 10**400, 1e308, "\x00", "text", "user", [[]], [{}], {"type": "text"}, nested(90)]
)


def put(fields: Any, path: Path, value: Any) -> None:
    for key in path[:-1]:
        fields = fields[key]
    fields[path[-1]] = value


def read_or_refuse(data: bytes) -> MessagesEndpoint | None:
    try:
        return MessagesEndpoint(data, STAMP)
    except InvalidRequest:
        return None


def test_the_full_body_is_fine() -> None:
    check("anthropic", "CreateMessageParams", FULL)
    endpoint = read_or_refuse(encode(FULL))
    assert endpoint is not None
    assert len(endpoint.generation.turns) == 5


@PROMISE
@given(st.data())
def test_any_body_is_read_or_refused(data: st.DataObject) -> None:
    fields = copy.deepcopy(FULL)
    path = data.draw(st.sampled_from(PATHS))
    put(fields, path, data.draw(ODD | JSON))
    if read_or_refuse(encode(fields)) is not None and not {"input_schema", "schema"} & set(path):
        assert not complaints("anthropic", "CreateMessageParams", fields)  # what is taken is valid there, too


@PROMISE
@given(st.sampled_from(PATHS), st.integers(90, 110) | st.sampled_from([500, 900, 950, 975, 1000, 1100, 50_000]), st.booleans())
def test_deep_nesting_is_read_or_refused(path: Path, levels: int, in_objects: bool) -> None:
    fields = copy.deepcopy(FULL)
    put(fields, path, "@deep@")
    opening, closing = (b'{"a":', b"}") if in_objects else (b"[", b"]")
    endpoint = read_or_refuse(encode(fields).replace(b'"@deep@"', opening * levels + b"1" + closing * levels))
    assert endpoint is None or levels <= NESTING_MAX


@PROMISE
@given(st.data())
def test_damaged_bytes_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(encode(FULL))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=4))
        whole = whole or bytearray(b" ")
    read_or_refuse(bytes(whole))


# --- answers ---

USAGE = Usage(prompt_tokens=30, cached_tokens=10, output_tokens=7)
TURN: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
STOP = Ended(0, "stop")
CALL = Called(0, 0, ToolCall(id="call_1", name="weather", arguments='{"city":"Köln"}'))
CALL_2 = Called(0, 1, ToolCall(id="call_2", name="clock", arguments="{}"))
WEATHER_BLOCK = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}, "caller": {"type": "direct"}}
CLOCK_BLOCK = {"type": "tool_use", "id": "call_2", "name": "clock", "input": {}, "caller": {"type": "direct"}}


def said(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "citations": None}


def thought(value: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value, "signature": ""}


# events -> content, stop_reason, stop_sequence
ANSWERS: list[tuple[list[Event], list[dict[str, Any]], str, str | None]] = [
    ([Text(0, "Hel"), Text(0, "lo\n\ndata: x"), STOP], [said("Hello\n\ndata: x")], "end_turn", None),
    ([Text(0, "Hel"), Ended(0, "length")], [said("Hel")], "max_tokens", None),
    ([Text(0, "a"), Ended(0, "stop", "END")], [said("a")], "stop_sequence", "END"),
    ([Text(0, "a"), Ended(0, "length", "END")], [said("a")], "max_tokens", None),
    ([STOP], [], "end_turn", None),
    ([Text(0, ""), Reasoning(0, ""), STOP], [], "end_turn", None),
    ([CALL, Ended(0, "tool_calls")], [WEATHER_BLOCK], "tool_use", None),
    ([Text(0, "I"), CALL, CALL_2, Ended(0, "tool_calls")], [said("I"), WEATHER_BLOCK, CLOCK_BLOCK], "tool_use", None),
    ([Reasoning(0, "h"), Reasoning(0, "m"), Text(0, "a"), STOP], [thought("hm"), said("a")], "end_turn", None),
    ([Reasoning(0, "hm"), Ended(0, "length")], [thought("hm")], "max_tokens", None),
    (
        [Reasoning(0, "hm"), Text(0, "a"), CALL, Text(0, "b"), Reasoning(0, "c"), Ended(0, "tool_calls")],
        [thought("hm"), said("a"), WEATHER_BLOCK, said("b"), thought("c")],
        "tool_use",
        None,
    ),
    ([Text(0, "a"), Text(0, ""), Reasoning(0, ""), Text(0, "b"), STOP], [said("ab")], "end_turn", None),
]
USED = {"input_tokens": 20, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 0, "output_tokens": 7}


def streamed(answer: Sequence[Event], usage: Usage = USAGE) -> bytes:
    endpoint: Endpoint = ask(stream=True)
    return b"".join([endpoint.begin(), *map(endpoint.write, answer), endpoint.end(usage)])


def cut(data: bytes) -> list[dict[str, Any]]:
    """Events by their bytes: a text may hold what Python, though not the standard, takes for the end of a line."""
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in EventCutter().feed(data)]


def through_client(content: bytes, content_type: str) -> Message:
    """What Anthropic's own client makes of a response."""
    response = httpx2.Response(200, content=content, headers={"content-type": content_type})
    with httpx2.Client(transport=httpx2.MockTransport(lambda _: response)) as http:
        client = anthropic.Anthropic(api_key="k", base_url="http://localhost", http_client=http, max_retries=0)
        if content_type == "application/json":
            return client.messages.create(model="m", max_tokens=100, messages=[{"role": "user", "content": "Hello"}])
        with client.messages.stream(model="m", max_tokens=100, messages=[{"role": "user", "content": "Hello"}]) as stream:
            return stream.get_final_message()


@pytest.mark.parametrize(("answer", "content", "reason", "sequence"), ANSWERS)
def test_whole(answer: list[Event], content: list[dict[str, Any]], reason: str, sequence: str | None) -> None:
    data = ask().whole(answer, USAGE)
    message = json.loads(data)
    check("anthropic", "Message", message)
    Message.model_validate(message)
    assert (message["id"], message["model"], message["role"]) == ("msg_abc123", "tiny", "assistant")
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == (content, reason, sequence)
    assert USED.items() <= message["usage"].items()
    assert through_client(data, "application/json").to_dict() == message


@pytest.mark.parametrize(("answer", "content", "reason", "sequence"), ANSWERS)
def test_stream(answer: list[Event], content: list[dict[str, Any]], reason: str, sequence: str | None) -> None:
    data = streamed(answer)
    found = events(data)
    for name, event in found:
        assert name == event["type"]
        if name != "ping":
            check("anthropic", "MessageStreamEvent", event)
            TURN.validate_python(event)
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    assert found[0][1]["message"]["usage"]["input_tokens"] == 0
    assert found[-2][1]["delta"] == {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}
    assert USED.items() <= found[-2][1]["usage"].items()
    assert [event["index"] for name, event in found if name == "content_block_start"] == list(range(len(content)))
    opened: list[int] = []
    for name, event in found:  # one block at a time, and each is closed
        if name == "content_block_start":
            assert not opened
            opened.append(event["index"])
        elif name == "content_block_delta":
            assert opened == [event["index"]]
        elif name == "content_block_stop":
            assert opened.pop() == event["index"]
    assert not opened
    final = through_client(data, "text/event-stream")
    assert [block.to_dict() for block in final.content] == content
    assert (final.stop_reason, final.stop_sequence, final.usage.output_tokens) == (reason, sequence, 7)


def test_stream_in_full() -> None:
    answer: list[Event] = [Reasoning(0, "hm"), Text(0, "a"), Text(0, "b"), CALL, Ended(0, "tool_calls")]
    short = [(name, e.get("index"), e.get("delta", {}).get("type")) for name, e in events(streamed(answer)) if name.startswith("content")]
    assert short == [
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
    ]


EVENT = (
    st.builds(Text, st.just(0), st.text(max_size=5))
    | st.builds(Reasoning, st.just(0), st.text(max_size=5))
    | st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2).map(
        lambda found: Called(0, 0, ToolCall(id="c", name="n", arguments=json.dumps(found)))
    )
)


@settings(PROMISE, max_examples=100)
@given(st.lists(EVENT, max_size=8), st.sampled_from(["stop", "length", "tool_calls"]), st.integers(0, 50), st.integers(0, 50))
def test_a_stream_says_what_a_whole_answer_says(answer: list[Event], reason: Any, prompt: int, cached: int) -> None:
    answer = [*answer, Ended(0, reason)]
    usage = Usage(prompt_tokens=prompt, cached_tokens=min(prompt, cached), output_tokens=3)
    whole = json.loads(ask().whole(answer, usage))
    check("anthropic", "Message", whole)
    blocks: list[dict[str, Any]] = []
    tail: dict[str, Any] = {}
    for event in cut(streamed(answer, usage)):
        name = event["type"]
        if name == "content_block_start":
            blocks.append(event["content_block"])
        elif name == "content_block_delta":
            match event["delta"]:
                case {"type": "text_delta", "text": piece}:
                    blocks[-1]["text"] += piece
                case {"type": "thinking_delta", "thinking": piece}:
                    blocks[-1]["thinking"] += piece
                case {"type": "input_json_delta", "partial_json": piece}:
                    blocks[-1]["input"] = json.loads(piece)
        elif name == "message_delta":
            tail = event
    assert blocks == whole["content"]
    assert tail["delta"].items() <= whole.items()
    assert tail["usage"].items() <= whole["usage"].items()


def test_an_answer_can_be_said_back() -> None:
    content = json.loads(ask().whole([Reasoning(0, "hm"), Text(0, "I"), CALL, Ended(0, "tool_calls")], USAGE))["content"]
    turns = ask(messages=[*HELLO, assistant(*content), user(result("call_1", "rain"))]).generation.turns
    assert turns[1] == Turn(role="assistant", text="I", calls=(CALL.call,))


# --- errors ---

STATUS: list[tuple[int, str]] = [
    (400, "invalid_request_error"),
    (401, "authentication_error"),
    (402, "billing_error"),
    (403, "permission_error"),
    (404, "not_found_error"),
    (408, "timeout_error"),
    (422, "invalid_request_error"),
    (429, "rate_limit_error"),
    (500, "api_error"),
    (502, "api_error"),
    (503, "overloaded_error"),
    (504, "timeout_error"),
    (529, "overloaded_error"),
]


@pytest.mark.parametrize(("status", "kind"), STATUS)
def test_error(status: int, kind: str) -> None:
    error = json.loads(error_body("top_k is too high", "invalid_request", status, "req_1"))
    check("anthropic", "ErrorResponse", error)
    assert error == {
        "type": "error",
        "error": {"type": kind, "message": "top_k is too high", "code": "invalid_request"},
        "request_id": "req_1",
    }
    assert events(error_event("top_k is too high", "invalid_request", status, "req_1")) == [("error", error)]


def test_error_of_a_body_too_large() -> None:
    # Anthropic documents this type; its published schema doesn't list it.
    error = json.loads(error_body("over 32 MiB", "body_too_large", 413, "req_1"))
    assert error["error"]["type"] == "request_too_large"
    assert complaints("anthropic", "ErrorResponse", error)

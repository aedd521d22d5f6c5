"""OpenAI's Responses API: each field on its way to an engine, and every answer and event against what OpenAI published."""

import contextlib
import copy
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseErrorEvent
from vendor import check, complaints, events

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.generation import (
    Alternative,
    Called,
    Ended,
    Endpoint,
    Event,
    Reasoning,
    Sampling,
    Stamp,
    Text,
    Token,
    Tool,
    ToolCall,
    Turn,
)
from fallow.wire.responses_answer import ResponsesEndpoint, count_body, error_event
from fallow.wire.responses_request import SCHEMA_DEPTH_MAX, TOOLS_MAX, read_count

PROMISE = settings(max_examples=300)
STAMP = Stamp(id="abc", created_s=1_700_000_000, model="tiny")
USAGE = Usage(prompt_tokens=7, cached_tokens=3, output_tokens=5)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Of a city", "parameters": SCHEMA, "strict": True}
CLOCK = {"type": "function", "name": "clock"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Ulm"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "rain"}
HI = {"role": "user", "content": "Hi"}


def ask(**fields: Any) -> ResponsesEndpoint:
    return ResponsesEndpoint(json.dumps({"model": "tiny", "input": "Hi", **fields}).encode(), STAMP)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


# --- requests that are taken

USER = Turn(role="user", text="Hi")
ULM = ToolCall(id="c1", name="weather", arguments='{"city": "Ulm"}')
NOW = ToolCall(id="c2", name="clock", arguments="{}")

TURNS: list[tuple[Any, list[Turn]]] = [
    ("", [Turn(role="user")]),
    ("Hi", [USER]),
    ([HI], [USER]),
    ([{"type": "message", "id": "msg_1", "status": "completed", **HI}], [USER]),
    ([{"role": "developer", "content": "Be brief"}, HI], [Turn(role="system", text="Be brief"), USER]),
    ([{"role": "system", "content": "Be brief"}, HI], [Turn(role="system", text="Be brief"), USER]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]}], [USER]),
    (
        [
            HI,
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Yo", "annotations": [], "logprobs": []}, {"type": "refusal", "refusal": "!"}],
            },
        ],
        [USER, Turn(role="assistant", text="Yo!")],
    ),
    ([HI, {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}], [USER]),
    ([HI, CALL, RESULT], [USER, Turn(role="assistant", calls=(ULM,)), Turn(role="tool", text="rain", call_id="c1")]),
    (
        [HI, CALL, RESULT | {"output": [{"type": "input_text", "text": "ra"}, {"type": "input_text", "text": "in"}]}],
        [USER, Turn(role="assistant", calls=(ULM,)), Turn(role="tool", text="rain", call_id="c1")],
    ),
    (
        [HI, {"role": "assistant", "content": "Wait"}, CALL, {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": ""}],
        [USER, Turn(role="assistant", text="Wait", calls=(ULM, NOW))],
    ),
    (
        [HI, CALL, {"type": "reasoning", "id": "r", "summary": []}, CALL | {"call_id": "c2", "name": "clock", "arguments": "{}"}],
        [USER, Turn(role="assistant", calls=(ULM, NOW))],
    ),
    (
        [HI, CALL, {"role": "assistant", "content": "Wait"}],
        [USER, Turn(role="assistant", calls=(ULM,)), Turn(role="assistant", text="Wait")],
    ),
]


@pytest.mark.parametrize(("given", "turns"), TURNS)
def test_input_becomes_turns(given: Any, turns: list[Turn]) -> None:
    assert list(ask(input=given).generation.turns) == turns
    body = {"model": "tiny", "input": given, "instructions": "Be kind"}
    assert list(read_count(json.dumps(body).encode()).turns) == [Turn(role="system", text="Be kind"), *turns]


TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [  # fields of the request -> fields of the generation
    ({}, {"sampling": Sampling(), "schema": None, "think": None, "top_logprobs": None, "parallel_calls": True, "tool_choice": "auto"}),
    ({"instructions": "Be kind"}, {"turns": (Turn(role="system", text="Be kind"), USER)}),
    ({"instructions": ""}, {"turns": (USER,)}),
    ({"max_output_tokens": 1, "temperature": 0, "top_p": 0.5}, {"sampling": Sampling(max_tokens=1, temperature=0, top_p=0.5)}),
    ({"max_output_tokens": 2**31 - 1, "temperature": 2}, {"sampling": Sampling(max_tokens=2**31 - 1, temperature=2)}),
    ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 0}),
    ({"include": ["message.output_text.logprobs"], "top_logprobs": 20}, {"top_logprobs": 20}),
    ({"top_logprobs": 2}, {"top_logprobs": 2}),
    ({"top_logprobs": 0}, {"top_logprobs": None}),
    ({"include": ["reasoning.encrypted_content"]}, {"top_logprobs": None}),
    ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"schema": None}),
    ({"text": {"format": {"type": "json_object"}}}, {"schema": {"type": "object"}}),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}}, {"schema": SCHEMA}),
    ({"reasoning": {"effort": "none"}}, {"think": False}),
    ({"reasoning": {"effort": "minimal", "summary": "auto"}}, {"think": False}),
    ({"reasoning": {"effort": "low"}}, {"think": True}),
    ({"reasoning": {"effort": "xhigh"}}, {"think": True}),
    ({"reasoning": {"effort": None}}, {"think": None}),
    (
        {"tools": [WEATHER, CLOCK]},
        {"tools": (Tool(name="weather", description="Of a city", parameters=SCHEMA), Tool(name="clock")), "tool_choice": "auto"},
    ),
    ({"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": "none", "tool_name": None}),
    ({"tools": [WEATHER], "tool_choice": "required"}, {"tool_choice": "required", "tool_name": None}),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}, {"tool_choice": "required", "tool_name": "weather"}),
    ({"tools": [WEATHER], "parallel_tool_calls": False}, {"parallel_calls": False}),
]


@pytest.mark.parametrize(("fields", "found"), TAKEN)
def test_a_field_reaches_the_engine(fields: dict[str, Any], found: dict[str, Any]) -> None:
    generation = ask(**fields).generation
    assert {name: getattr(generation, name) for name in found} == found


NULLABLE = [
    "instructions", "max_output_tokens", "temperature", "top_p", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls",
    "text", "reasoning", "top_logprobs", "include", "store", "metadata", "user", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "service_tier", "truncation", "background", "previous_response_id", "conversation", "prompt",
    "max_tool_calls", "context_management", "fallow",
]  # fmt: skip
UNUSED: list[dict[str, Any]] = [
    *({name: None} for name in NULLABLE),
    {"store": False},
    {"background": False},
    {"metadata": {"k" * 64: "v" * 512}},
    {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h"},
    {"stream_options": {"include_obfuscation": True}},
    {"truncation": "disabled"},
    {"fallow": {"anything": [1, {"deep": None}]}},
    *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority")),
]


@pytest.mark.parametrize("fields", UNUSED, ids=str)
def test_a_field_that_the_engine_need_not_know_changes_nothing(fields: dict[str, Any]) -> None:
    assert ask(**fields).generation == ask().generation
    check("openai", "Response", json.loads(ask(**fields).whole(TEXT, USAGE)))


def test_errors_of_the_engine_can_name_the_field() -> None:
    assert ask().generation.params["max_tokens"] == "max_output_tokens"
    assert ask(text={"format": {"type": "json_object"}}).generation.params["schema"] == "text.format"
    form = {"type": "json_schema", "name": "a", "schema": {}}
    assert ask(text={"format": form}).generation.params["schema"] == "text.format.schema"


@pytest.mark.parametrize(("stream", "wanted"), [(None, False), (False, False), (True, True)])
def test_stream(stream: bool | None, wanted: bool) -> None:
    endpoint: Endpoint = ask(stream=stream)
    assert endpoint.stream is wanted


# --- requests that are refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"input": None}, "input"),
    ({"input": 3}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}], "instructions": "Be kind"}, "input"),
    ({"input": ["Hi"]}, "input[0]"),
    ({"input": [HI, None]}, "input[1]"),
    ({"input": [{}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
    ({"input": [{"role": "tool", "content": "Hi"}]}, "input[0].role"),
    ({"input": [{"role": ["user"], "content": "Hi"}]}, "input[0].role"),
    ({"input": [HI | {"name": "Ann"}]}, "input[0].name"),
    ({"input": [HI | {"status": "done"}]}, "input[0].status"),
    ({"input": [{"role": "user", "content": ["Hi"]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"text": "Hi"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": {}, "text": "Hi"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 3}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "", "x": 3}]}]}, "input[0].content[0].x"),
    ({"input": [HI, {"role": "user", "content": [{"type": "input_text", "text": ""}, {"type": "input_image"}]}]}, "input[1].content[1]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": None, "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
    ({"input": [{"type": ["message"], **HI}]}, "input[0].type"),
    ({"input": [HI, RESULT]}, "input[1].call_id"),
    ({"input": [HI, RESULT, CALL]}, "input[1].call_id"),
    ({"input": [HI, CALL, RESULT | {"call_id": "c2"}]}, "input[2].call_id"),
    ({"input": [HI, CALL, RESULT | {"output": None}]}, "input[2].output"),
    ({"input": [HI, CALL, RESULT | {"output": [{"type": "input_image"}]}]}, "input[2].output[0]"),
    ({"input": [HI, CALL, RESULT | {"output": [{"type": "output_text", "text": ""}]}]}, "input[2].output[0].type"),
    ({"input": [CALL | {"arguments": {}}]}, "input[0].arguments"),
    ({"input": [CALL | {"arguments": "[]"}]}, "input[0].arguments"),
    ({"input": [CALL | {"arguments": "{"}]}, "input[0].arguments"),
    ({"input": [CALL | {"arguments": '{"a":' * 5000}]}, "input[0].arguments"),
    ({"input": [CALL | {"name": "two words"}]}, "input[0].name"),
    ({"input": [CALL | {"call_id": ""}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [HI, {"type": "reasoning", "id": 3, "summary": []}]}, "input[1].id"),
    ({"instructions": ["Be kind"]}, "instructions"),
    *(({"max_output_tokens": value}, "max_output_tokens") for value in (0, -1, 2**31, 1.5, "5", True)),
    *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, "1", True)),
    *(({"top_p": value}, "top_p") for value in (-0.1, 1.1, "1")),
    *(({"top_logprobs": value}, "top_logprobs") for value in (-1, 21, 1.5)),
    ({"include": "message.output_text.logprobs"}, "include"),
    ({"include": ["message.output_text.logprobs", "file_search_call.results"]}, "include[1]"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"store": True}, "store"),
    ({"metadata": {"k" * 65: ""}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata[...]"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"k": 3}}, "metadata[...]"),
    ({"user": 3}, "user"),
    ({"safety_identifier": "s" * 65}, "safety_identifier"),
    ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
    ({"service_tier": "fast"}, "service_tier"),
    ({"truncation": "auto"}, "truncation"),
    ({"background": True}, "background"),
    ({"background": 0}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"messages": [HI]}, "messages"),
    ({"grammar": "root ::= x"}, "grammar"),
    ({"fallow": 3}, "fallow"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"format": {"name": "a"}}}, "text.format.type"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": True}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": nested(SCHEMA_DEPTH_MAX)}}}, "text.format.schema"),
    ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
    ({"tools": {}}, "tools"),
    ({"tools": [3]}, "tools[0]"),
    ({"tools": [CLOCK | {"name": f"t{n}"} for n in range(TOOLS_MAX + 1)]}, "tools"),
    ({"tools": [CLOCK, {"type": "web_search"}]}, "tools[1].type"),
    ({"tools": [{"search_context_size": "low", "type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "a"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [CLOCK | {"name": "two words"}]}, "tools[0].name"),
    ({"tools": [CLOCK | {"name": "n" * 65}]}, "tools[0].name"),
    ({"tools": [CLOCK | {"name": "clock\n"}]}, "tools[0].name"),
    ({"tools": [CLOCK | {"parameters": []}]}, "tools[0].parameters"),
    ({"tools": [CLOCK | {"parameters": nested(SCHEMA_DEPTH_MAX)}]}, "tools[0].parameters"),
    ({"tools": [CLOCK | {"strict": "yes"}]}, "tools[0].strict"),
    ({"tools": [CLOCK | {"function": {}}]}, "tools[0].function"),
    ({"tools": [CLOCK, WEATHER, CLOCK]}, "tools[2].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "any", "tools": [CLOCK]}, "tool_choice"),
    ({"tool_choice": 3, "tools": [CLOCK]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "date"}, "tools": [CLOCK]}, "tool_choice.name"),
    ({"tool_choice": {"type": "function"}, "tools": [CLOCK]}, "tool_choice.name"),
    ({"tool_choice": {"type": "function", "name": "clock", "x": 1}, "tools": [CLOCK]}, "tool_choice.x"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": [CLOCK]}, "tool_choice.type"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{param}-{n}" for n, (_, param) in enumerate(REFUSED)])
def test_an_invalid_request_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(**fields)
    assert refused.value.param == param
    assert len(refused.value.message) < 250


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {"model": "tiny", "input": "Hi"}
    del body[missing]
    with pytest.raises(InvalidRequest) as refused:
        ResponsesEndpoint(json.dumps(body).encode(), STAMP)
    assert refused.value.param == missing


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff", b'{"model":"m","input":"\xff"}', b"[" * 100_000])
def test_what_is_no_request_at_all_is_refused(body: bytes) -> None:
    for read in (lambda: ResponsesEndpoint(body, STAMP), lambda: read_count(body)):
        with pytest.raises(InvalidRequest) as refused:
            read()
        assert refused.value.param is None


def test_the_deepest_schema_that_is_taken_is_also_written() -> None:
    schema = nested(SCHEMA_DEPTH_MAX - 1)
    endpoint = ask(tools=[CLOCK | {"parameters": schema}])
    assert json.loads(endpoint.whole(TEXT, USAGE))["tools"][0]["parameters"] == schema


# --- counting

COUNT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"max_output_tokens": 5}, "max_output_tokens"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].name"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
]


@pytest.mark.parametrize(("fields", "param"), COUNT_REFUSED)
def test_a_count_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_count(json.dumps({"model": "tiny", "input": "Hi", **fields}).encode())
    assert refused.value.param == param


def test_a_count_sees_the_prompt_that_the_answer_would_have() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be kind", "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False,
        "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "low"}, "truncation": "disabled",
    }  # fmt: skip
    assert read_count(json.dumps({"model": "tiny", "input": "Hi", **fields}).encode()) == ask(**fields).generation
    check("openai", "TokenCountsResource", json.loads(count_body(12)))
    assert json.loads(count_body(12)) == {"object": "response.input_tokens", "input_tokens": 12}


# --- answers

TOKENS = [
    Token("Hel", [72, 101, 108], -0.5, (Alternative("Hel", [72, 101, 108], -0.5), Alternative("\ufffd", [195], -1.5))),
    Token("lo", [108, 111], -0.25),
]
STOP, CUT, CALLS = Ended(0, "stop"), Ended(0, "length"), Ended(0, "tool_calls")
TEXT: list[Event] = [Text(0, "Hel"), Text(0, "lo"), STOP]
FIRST, SECOND = Called(0, 0, ULM), Called(0, 1, NOW)
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
TOOLS = {"tools": [WEATHER, CLOCK], "tool_choice": "required"}

# name -> the request's fields, what the engine wrote, and (type, text or name) of the items
ANSWERS: dict[str, tuple[dict[str, Any], list[Event], list[tuple[str, str]]]] = {
    "text": ({}, TEXT, [("message", "Hello")]),
    "odd text": ({}, [Text(0, "\n\n\u2028\u2029\x85 é\u0000\"'\r"), STOP], [("message", "\n\n\u2028\u2029\x85 é\u0000\"'\r")]),
    "stop text": ({}, [Text(0, "Hello"), Ended(0, "stop", "\n")], [("message", "Hello")]),
    "empty": ({}, [STOP], [("message", "")]),
    "empty pieces": ({}, [Text(0, ""), Reasoning(0, ""), Text(0, ""), STOP], [("message", "")]),
    "cut": ({"max_output_tokens": 2}, [Text(0, "Hello"), CUT], [("message", "Hello")]),
    "cut before it began": ({}, [CUT], [("message", "")]),
    "call": (TOOLS, [FIRST, CALLS], [("function_call", "weather")]),
    "parallel calls": (TOOLS, [FIRST, SECOND, CALLS], [("function_call", "weather"), ("function_call", "clock")]),
    "text and call": (TOOLS, [Text(0, "Wait"), FIRST, CALLS], [("message", "Wait"), ("function_call", "weather")]),
    "text after a call": (TOOLS, [FIRST, Text(0, "So"), STOP], [("function_call", "weather"), ("message", "So")]),
    "reasoning": ({}, [Reasoning(0, "H"), Reasoning(0, "m"), *TEXT], [("reasoning", "Hm"), ("message", "Hello")]),
    "only reasoning": ({}, [Reasoning(0, "Hm"), STOP], [("reasoning", "Hm"), ("message", "")]),
    "cut reasoning": ({}, [Reasoning(0, "Hm"), CUT], [("reasoning", "Hm"), ("message", "")]),
    "reasoning and call": (TOOLS, [Reasoning(0, "Hm"), FIRST, CALLS], [("reasoning", "Hm"), ("function_call", "weather")]),
    "logprobs": (LOGPROBS, [Text(0, "Hel", (TOKENS[0],)), Text(0, "", (TOKENS[1],)), STOP], [("message", "Hel")]),
    "logprobs that nobody wants": ({}, [Text(0, "Hello", tuple(TOKENS)), STOP], [("message", "Hello")]),
    "everything asked": (
        {
            "instructions": "Be kind", "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
            "prompt_cache_retention": "24h", "service_tier": "flex", "temperature": 0, "top_p": 0.5, "max_output_tokens": 9,
            "reasoning": {"effort": "low", "summary": "auto"}, "tools": [WEATHER, CLOCK], "parallel_tool_calls": False,
            "tool_choice": {"type": "function", "name": "weather"}, "top_logprobs": 3, "truncation": "disabled", "store": False,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "description": "d"}, "verbosity": "low"},
        },
        TEXT,
        [("message", "Hello")],
    ),
    "object": ({"text": {"format": {"type": "json_object"}}}, [Text(0, "{}"), STOP], [("message", "{}")]),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", ANSWERS)


def streamed(endpoint: ResponsesEndpoint, written: Sequence[Event]) -> bytes:
    return endpoint.begin() + b"".join(endpoint.write(event) for event in written) + endpoint.end(USAGE)


def shown(item: dict[str, Any]) -> tuple[str, str]:
    return item["type"], item["name"] if item["type"] == "function_call" else item["content"][0]["text"]


@EVERY
def test_a_whole_answer_is_what_openai_published(name: str) -> None:
    fields, written, items = ANSWERS[name]
    got = json.loads(ask(**fields).whole(written, USAGE))
    check("openai", "Response", got)
    assert [shown(item) for item in got["output"]] == items
    response = Response.model_validate(got)
    assert response.output_text == "".join(text for kind, text in items if kind == "message")
    assert got["usage"] == {
        "input_tokens": 7, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12,
    }  # fmt: skip
    is_cut = written[-1] == CUT
    assert (got["status"], got["incomplete_details"]) == (
        ("incomplete", {"reason": "max_output_tokens"}) if is_cut else ("completed", None)
    )
    assert got["output"][-1]["status"] == got["status"]


@EVERY
def test_every_event_is_what_openai_published_and_the_last_one_is_the_whole(name: str) -> None:
    fields, written, _ = ANSWERS[name]
    found = events(streamed(ask(stream=True, **fields), written))
    for kind, event in found:
        assert kind == event["type"]
        check("openai", "ResponseStreamEvent", event)
        check("openai", SCHEMA_OF[kind], event)
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    assert [kind for kind, _ in found[:2]] == ["response.created", "response.in_progress"]
    whole = json.loads(ask(**fields).whole(written, USAGE))
    assert found[-1][1]["response"] == whole
    assert found[-1][0] == f"response.{whole['status']}"
    assert assembled([event for _, event in found]) == whole["output"]


SCHEMA_OF = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.reasoning_text.delta": "ResponseReasoningTextDeltaEvent",
    "response.reasoning_text.done": "ResponseReasoningTextDoneEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
}


def assembled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a reader of the events knows them, who checks that nothing comes out of turn."""
    items: list[dict[str, Any]] = []
    grown = ""
    for event in found:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            grown = ""
        elif "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (items[-1]["id"], len(items) - 1)
        if kind == "content_part.added":
            assert event["part"]["text"] == ""
            items[-1]["content"].append(event["part"])
        elif kind.endswith(".delta"):
            grown += event["delta"]
        elif kind.endswith(("_text.done", "arguments.done")):
            assert event["arguments" if "arguments" in event else "text"] == grown
        elif kind == "content_part.done":
            assert event["part"]["text"] == grown
            items[-1]["content"] = [event["part"]]
        elif kind == "output_item.done":
            item = items[-1] | {"status": event["item"]["status"]} | ({"arguments": grown} if "arguments" in event["item"] else {})
            assert event["item"] == item
            items[-1] = item
    return items


ORDERS: list[tuple[str, str]] = [
    ("empty", "item.added part.added text.done part.done item.done"),
    ("text", "item.added part.added text.delta text.delta text.done part.done item.done"),
    (
        "text and call",
        "item.added part.added text.delta text.done part.done item.done item.added arguments.delta arguments.done item.done",
    ),
    (
        "only reasoning",
        "item.added part.added text.delta text.done part.done item.done item.added part.added text.done part.done item.done",
    ),
]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_events_come_in_openais_order(name: str, order: str) -> None:
    fields, written, _ = ANSWERS[name]
    found = [kind for kind, _ in events(streamed(ask(**fields), written))]
    assert [kind.rsplit("_", 1)[-1] for kind in found[2:-1]] == order.split()


def test_log_probabilities_are_told_in_the_events_and_in_the_end() -> None:
    fields, written, _ = ANSWERS["logprobs"]
    found = events(streamed(ask(**fields), written))
    plain = [
        {"token": "Hel", "logprob": -0.5, "top_logprobs": [{"token": "Hel", "logprob": -0.5}, {"token": "\ufffd", "logprob": -1.5}]},
        {"token": "lo", "logprob": -0.25, "top_logprobs": []},
    ]
    assert [event["logprobs"] for kind, event in found if kind == "response.output_text.delta"] == [plain[:1], plain[1:]]
    assert [event["logprobs"] for kind, event in found if kind == "response.output_text.done"] == [plain]
    last = found[-1][1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [one["bytes"] for one in last] == [[72, 101, 108], [108, 111]]
    assert [one["bytes"] for one in last[0]["top_logprobs"]] == [[72, 101, 108], [195]]


def test_nobody_gets_log_probabilities_that_were_not_wanted() -> None:
    fields, written, _ = ANSWERS["logprobs that nobody wants"]
    assert b"-0.5" not in streamed(ask(**fields), written)


def test_the_answer_repeats_what_was_asked() -> None:
    fields, written, _ = ANSWERS["everything asked"]
    got = json.loads(ask(**fields).whole(written, USAGE))
    tools = [WEATHER, {"type": "function", "name": "clock", "description": None, "parameters": None, "strict": None}]
    assert {name: got[name] for name in fields} == fields | {"tools": tools}
    assert (got["id"], got["created_at"], got["model"]) == ("resp_abc", 1_700_000_000, "tiny")


def test_the_answer_names_its_defaults() -> None:
    got = json.loads(ask().whole(TEXT, USAGE))
    defaults = {
        "temperature": 1.0, "top_p": 1.0, "store": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {},
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled", "service_tier": "default",
        "max_output_tokens": None, "instructions": None, "error": None, "background": False, "top_logprobs": 0,
    }  # fmt: skip
    assert {name: got[name] for name in defaults} == defaults


@EVERY
def test_the_items_of_an_answer_can_be_sent_back(name: str) -> None:
    fields, written, _ = ANSWERS[name]
    got = Response.model_validate_json(ask(**fields).whole(written, USAGE))
    history = [HI, *(item.model_dump(exclude_unset=True) for item in got.output)]
    turns = ask(input=history).generation.turns
    assert [call for turn in turns for call in turn.calls] == [event.call for event in written if isinstance(event, Called)]
    assert "".join(turn.text for turn in turns[1:]) == got.output_text


# --- through the openai package


def client(body: bytes, kind: str) -> openai.OpenAI:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body, headers={"content-type": kind})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://fallow.test/v1", http_client=transport, max_retries=0)


@EVERY
def test_the_openai_package_reads_the_whole(name: str) -> None:
    fields, written, items = ANSWERS[name]
    with client(ask(**fields).whole(written, USAGE), "application/json") as api:
        got = api.responses.create(model="tiny", input="Hi")
    assert got.output_text == "".join(text for kind, text in items if kind == "message")
    assert [item.type for item in got.output] == [kind for kind, _ in items]
    assert got.usage is not None
    assert got.usage.total_tokens == 12


@EVERY
def test_the_openai_package_follows_the_stream(name: str) -> None:
    fields, written, items = ANSWERS[name]
    body = streamed(ask(stream=True, **fields), written)
    with client(body, "text/event-stream") as api, api.responses.stream(model="tiny", input="Hi") as stream:
        found = list(stream)
        snapshots = [event.snapshot for event in found if event.type == "response.output_text.delta"]
        assert [event.type for event in found] == [kind for kind, _ in events(body)]
        texts = [text for kind, text in items if kind == "message"]
        if snapshots:
            assert snapshots[-1] == texts[-1]
        if written[-1] == CUT:
            assert found[-1].type == "response.incomplete"
        else:
            last = stream.get_final_response()
            assert last.output_text == "".join(texts)
            assert [item.type for item in last.output] == [kind for kind, _ in items]


def test_the_openai_package_reads_the_count() -> None:
    with client(count_body(12), "application/json") as api:
        assert api.responses.input_tokens.count(model="tiny", input="Hi").input_tokens == 12


def test_an_answer_that_breaks_off_ends_with_an_error() -> None:
    endpoint = ask(stream=True)
    body = endpoint.begin() + endpoint.write(Text(0, "Hel")) + endpoint.failed_event("engine_failed", "the engine died")
    found = events(body)
    check("openai", "ResponseErrorEvent", found[-1][1])
    assert found[-1] == (
        "error",
        {"type": "error", "code": "engine_failed", "message": "the engine died", "param": None, "sequence_number": 5},
    )
    with client(body, "text/event-stream") as api:
        last = list(api.responses.create(model="tiny", input="Hi", stream=True))[-1]
    assert isinstance(last, ResponseErrorEvent)
    assert last.message == "the engine died"


def test_who_does_not_know_the_count_says_the_error_last() -> None:
    ((_, known),) = events(error_event("node_lost", "gone", "input", 7))
    ((_, unknown),) = events(error_event("node_lost", "gone"))
    check("openai", "ResponseErrorEvent", known)
    check("openai", "ResponseErrorEvent", unknown)
    assert (known["param"], known["sequence_number"]) == ("input", 7)
    assert (unknown["param"], unknown["sequence_number"]) == (None, 2**31 - 1)


# --- promises

FULL: dict[str, Any] = {
    "model": "tiny",
    "stream": True,
    "input": [
        HI,
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        CALL,
        RESULT,
    ],
    **ANSWERS["everything asked"][0],
    "include": ["message.output_text.logprobs"],
    "stream_options": {"include_obfuscation": False},
    "fallow": {"deadline": 3},
}
COUNTED = ("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "truncation", "fallow")
ODD = st.sampled_from(
    [None, True, False, 0, -1, 1.5, 1e300, 2**63, 10**30, "", "\ud83d\ude00", "function", "message", "input_image", [], {}, [[]], [None],
     {"type": "function"}, {"type": []}, [{"type": "input_text"}], nested(30), nested(400)]
)  # fmt: skip
ANY = st.recursive(
    ODD | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


PLACES = [place for place in places(FULL) if place]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    body = copy.deepcopy(FULL)
    for place in draw(st.lists(st.sampled_from(PLACES), max_size=3)):
        try:
            parent = body
            for key in place[:-1]:
                parent = parent[key]
            kind = draw(st.sampled_from(["put", "add", "drop"]))
            if kind == "put":
                parent[place[-1]] = draw(ANY)
            elif kind == "drop":
                del parent[place[-1]]
            elif isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = draw(ANY)
            else:
                parent.insert(0, draw(ANY))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change took the place away
    return json.dumps(body).encode()


def test_the_full_request_is_one_that_is_taken_and_that_openai_would_take() -> None:
    ResponsesEndpoint(json.dumps(FULL).encode(), STAMP)
    read_count(json.dumps({name: FULL[name] for name in COUNTED}).encode())
    # We take a tool with less, and fewer tokens. Of OpenAI's kinds of messages some are two at once, which its schema then refuses.
    check("openai", "CreateResponse", FULL | {"input": "Hi", "tools": [WEATHER], "max_output_tokens": 16})


@given(mutated())
@PROMISE
def test_whatever_is_sent_is_answered_or_refused(body: bytes) -> None:
    counted = {name: value for name, value in json.loads(body).items() if name in COUNTED}
    with contextlib.suppress(InvalidRequest):
        assert read_count(json.dumps(counted).encode()).turns
    try:
        endpoint = ResponsesEndpoint(body, STAMP)
    except InvalidRequest:
        return
    assert endpoint.generation.turns
    for _, event in events(streamed(endpoint, TEXT)):
        assert complaints("openai", "ResponseStreamEvent", event) == []


PIECES = st.lists(
    st.builds(Text, st.just(0), st.text(max_size=3))
    | st.builds(Reasoning, st.just(0), st.text(max_size=3))
    | st.builds(Called, st.just(0), st.integers(0, 3), st.just(ULM)),
    max_size=8,
)


@given(PIECES, st.sampled_from([STOP, CUT, CALLS]))
@PROMISE
def test_whatever_an_engine_writes_the_stream_adds_up_to_the_whole(pieces: list[Event], last: Ended) -> None:
    written = [*pieces, last]
    whole = json.loads(ask().whole(written, USAGE))
    found = [event for _, event in events(streamed(ask(), written))]
    assert found[-1]["response"] == whole
    assert assembled(found) == whole["output"]
    assert complaints("openai", "Response", whole) == []
    assert "".join(c["text"] for i in whole["output"] if i["type"] == "message" for c in i["content"]) == "".join(
        event.text for event in pieces if isinstance(event, Text)
    )
    assert any(item["type"] != "reasoning" for item in whole["output"])

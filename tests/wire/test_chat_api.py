"""Chats: each field on its way to an engine, each that has none, and every answer and event against what OpenAI published."""

import json
from collections.abc import Sequence
from typing import Any, get_type_hints

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from vendor import check, events

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.chat_answer import ChatEndpoint
from fallow.wire.chat_request import PARAMS, ChatRequest, read
from fallow.wire.generation import (
    Alternative,
    Called,
    Ended,
    Event,
    Generation,
    Reasoning,
    Sampling,
    Stamp,
    Text,
    Token,
    Tool,
    ToolCall,
    Turn,
)
from fallow.wire.openai import TOKENS_MAX

PROMISE = settings(max_examples=200)
STAMP = Stamp(id="abc", created_s=1_700_000_000, model="tiny")
USAGE = Usage(prompt_tokens=7, cached_tokens=3, output_tokens=5)
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
NAMED = {"type": "function", "function": {"name": "weather"}}
PLAIN = Generation(turns=(Turn(role="user", text="Hello"),), params=PARAMS)
TOOLS = (Tool(name="weather", description="Of a city", parameters=SCHEMA), Tool(name="clock"))


def encode(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO, **fields}).encode()


def ask(**fields: Any) -> Generation:
    return read(encode(**fields))[1]


def plus(**fields: Any) -> Generation:
    return Generation(turns=PLAIN.turns, **({"params": PARAMS} | fields))


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}


# --- what is taken

SAMPLED: list[tuple[str, Any, Sampling]] = [
    ("max_tokens", 1, Sampling(max_tokens=1)),
    ("max_tokens", TOKENS_MAX, Sampling(max_tokens=TOKENS_MAX)),
    ("temperature", 0, Sampling(temperature=0.0)),
    ("temperature", 1.25, Sampling(temperature=1.25)),
    ("temperature", 2, Sampling(temperature=2.0)),
    ("top_p", 0.5, Sampling(top_p=0.5)),
    ("frequency_penalty", -2, Sampling(frequency_penalty=-2.0)),
    ("presence_penalty", 2, Sampling(presence_penalty=2.0)),
    ("seed", 0, Sampling(seed=0)),
    ("seed", -(2**63), Sampling(seed=-(2**63))),
    ("stop", "END", Sampling(stop=("END",))),
    ("stop", ["a", "b", "c", "d"], Sampling(stop=("a", "b", "c", "d"))),
    ("logit_bias", {"15": -100, "16": 2}, Sampling(logit_bias={15: -100.0, 16: 2.0})),
    ("logit_bias", {}, Sampling()),
]
MORE: list[tuple[str, Any, Sampling]] = [  # OpenAI doesn't have these, and they do no harm
    ("top_k", 40, Sampling(top_k=40)),
    ("stop", [], Sampling()),
    ("logit_bias", {"16": 2.5}, Sampling(logit_bias={16: 2.5})),
]
TAKEN: list[tuple[dict[str, Any], Generation]] = [
    *(({field: value}, plus(sampling=sampling)) for field, value, sampling in SAMPLED),
    ({"max_completion_tokens": 5}, plus(sampling=Sampling(max_tokens=5), params=PARAMS | {"max_tokens": "max_completion_tokens"})),
    (
        {"max_completion_tokens": 5, "max_tokens": 5},
        plus(sampling=Sampling(max_tokens=5), params=PARAMS | {"max_tokens": "max_completion_tokens"}),
    ),
    ({"n": 1}, PLAIN),
    ({"n": 8}, plus(choices=8)),
    ({"response_format": {"type": "text"}}, PLAIN),
    ({"response_format": {"type": "json_object"}}, plus(schema={"type": "object"})),
    ({"response_format": form(SCHEMA, strict=True, description="of an a")}, plus(schema=SCHEMA)),
    ({"response_format": form({})}, plus(schema={})),
    ({"logprobs": True}, plus(top_logprobs=0)),
    ({"logprobs": True, "top_logprobs": 20}, plus(top_logprobs=20)),
    ({"logprobs": False}, PLAIN),
    ({"tools": []}, PLAIN),
    ({"tools": [], "tool_choice": "auto"}, PLAIN),
    ({"tool_choice": "none"}, plus(tool_choice="none")),
    ({"tools": [WEATHER, CLOCK]}, plus(tools=TOOLS)),
    ({"tools": [WEATHER, CLOCK], "tool_choice": "auto"}, plus(tools=TOOLS)),
    ({"tools": [WEATHER, CLOCK], "tool_choice": "none"}, plus(tools=TOOLS, tool_choice="none")),
    ({"tools": [WEATHER, CLOCK], "tool_choice": "required"}, plus(tools=TOOLS, tool_choice="required")),
    ({"tools": [WEATHER, CLOCK], "tool_choice": NAMED}, plus(tools=TOOLS, tool_choice="required", tool_name="weather")),
    ({"tools": [CLOCK], "parallel_tool_calls": False}, plus(tools=TOOLS[1:], parallel_calls=False)),
    ({"tools": [CLOCK], "parallel_tool_calls": True}, plus(tools=TOOLS[1:])),
    *(({"reasoning_effort": effort}, plus(think=False)) for effort in ("none", "minimal")),
    *(({"reasoning_effort": effort}, plus(think=True)) for effort in ("low", "medium", "high", "xhigh")),
]
STAYS: list[tuple[str, Any]] = [  # taken, and answered or meant for us
    ("model", "other"),
    ("stream", True),
    ("stream", False),
    ("user", "somebody"),
    ("safety_identifier", "somebody"),
    ("service_tier", "flex"),
    ("store", False),
    ("metadata", {"a": "b"}),
    ("verbosity", "low"),
    ("prompt_cache_key", "k"),
    ("prompt_cache_retention", "24h"),
    ("modalities", ["text"]),
    ("fallow", {}),
]
UNFILLED = {"audio", "prediction", "web_search_options", "functions", "function_call"}


@pytest.mark.parametrize(("fields", "wanted"), TAKEN, ids=lambda one: json.dumps(one)[:60] if isinstance(one, dict) else "")
def test_what_is_taken(fields: dict[str, Any], wanted: Generation) -> None:
    assert ask(**fields) == wanted
    check("openai", "CreateChatCompletionRequest", json.loads(encode(**fields)))


@pytest.mark.parametrize(("field", "value", "sampling"), MORE)
def test_what_is_taken_besides(field: str, value: Any, sampling: Sampling) -> None:
    assert ask(**{field: value}) == plus(sampling=sampling)


@pytest.mark.parametrize(("field", "value"), STAYS)
def test_what_concerns_only_us_stays_here(field: str, value: Any) -> None:
    assert ask(**{field: value}) == PLAIN


def test_the_tables_above_know_every_field() -> None:
    known = {field for fields, _ in TAKEN for field in fields} | {field for field, *_ in [*STAYS, *MORE]}
    assert set(get_type_hints(ChatRequest)) == known | UNFILLED | {"messages", "stream_options"}


@pytest.mark.parametrize("field", [field for field in get_type_hints(ChatRequest) if field not in ("model", "messages")])
def test_null_is_as_good_as_nothing(field: str) -> None:
    assert ask(**{field: None}) == PLAIN


ULM = ToolCall(id="c1", name="weather", arguments='{"city": "Ulm"}')
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[Turn]]] = [
    ([{"role": "developer", "content": "Be brief"}], [Turn(role="system", text="Be brief")]),
    (
        [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")],
        [Turn(role=r, text=r) for r in ("system", "user", "assistant", "user")],
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
        [Turn(role="user", text="one two")],
    ),
    ([{"role": "system", "content": [{"type": "text", "text": ""}]}], [Turn(role="system")]),
    ([{"role": "user", "content": ""}], [Turn(role="user")]),
    ([{"role": "user", "content": '\u00e9\n"\\ud83d\\ude00'}], [Turn(role="user", text='\u00e9\n"\\ud83d\\ude00')]),
    ([{"role": "user", "content": "Hi", "name": "Ann"}], [Turn(role="user", text="Hi")]),  # no template has a use for names
    ([{"role": "assistant", "content": None, "refusal": "No"}], [Turn(role="assistant", text="No")]),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}], [Turn(role="assistant", text="No")]),
    (
        [{"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "function_call": None}],
        [Turn(role="assistant", text="Hi")],
    ),
    (
        [{"role": "assistant", "content": "Hi", "reasoning_content": "hm", "reasoning": "hm", "tool_calls": None}],
        [Turn(role="assistant", text="Hi")],
    ),
    (
        [*HELLO, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
        [Turn(role="user", text="Hello"), Turn(role="assistant", calls=(ULM,)), Turn(role="tool", text="rain", call_id="c1")],
    ),
    (
        [
            {"role": "assistant", "content": "Let me see", "tool_calls": [{**CALL, "index": 0}]},
            *HELLO,
            {**RESULT, "content": [{"type": "text", "text": "rain"}], "name": "weather"},
        ],
        [
            Turn(role="assistant", text="Let me see", calls=(ULM,)),
            Turn(role="user", text="Hello"),
            Turn(role="tool", text="rain", call_id="c1"),
        ],
    ),
]


@pytest.mark.parametrize(("messages", "turns"), CONVERSATIONS)
def test_conversations(messages: list[dict[str, Any]], turns: list[Turn]) -> None:
    assert ask(messages=messages) == Generation(turns=tuple(turns), params=PARAMS)


# --- what is not taken

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "f"}}
WORDS = {"type": "text", "text": "x"}
OF_MESSAGES: list[tuple[Any, str]] = [
    ([], "messages"),
    ("Hello", "messages"),
    (None, "messages"),
    ([5], "messages[0]"),
    ([{"role": "function", "name": "f", "content": "x"}], "messages[0].role"),
    ([*HELLO, {"role": "user"}], "messages[1].content"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [IMAGE]}], "messages[0].content[0]"),
    ([*HELLO, {"role": "user", "content": [WORDS, WORDS, IMAGE]}], "messages[1].content[2]"),
    ([{"role": "user", "content": [WORDS, AUDIO]}], "messages[0].content[1]"),
    ([{"role": "user", "content": [FILE]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "video", "text": ""}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"text": ""}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}], "messages[0].content[0].x"),
    ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
    ([{"role": "assistant"}], "messages[0].content"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
    ([{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}], "messages[0].function_call"),
    ([{"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}], "messages[0].tool_calls[0].id"),
    ([{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}], "messages[0].tool_calls[0].type"),
    (
        [{"role": "assistant", "tool_calls": [CALL, {**CALL, "function": {"name": "a b", "arguments": ""}}]}],
        "messages[0].tool_calls[1].function.name",
    ),
    ([{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a"}}]}], "messages[0].tool_calls[0].function.arguments"),
    ([*HELLO, RESULT], "messages[1].tool_call_id"),
    ([RESULT, {"role": "assistant", "tool_calls": [CALL]}], "messages[0].tool_call_id"),
    ([{"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "tool_call_id": "c2"}], "messages[1].tool_call_id"),
    ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
    ([{"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "content": [IMAGE]}], "messages[1].content[0]"),
]
OF_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": WEATHER}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "function": {"name": "a"}}]}, "tools[0].type"),
    ({"tools": [CLOCK, {"type": "retrieval", "function": {"name": "a"}}]}, "tools[1].type"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools[2].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "function": {"name": "clock"}}}, "tool_choice.type"),
    ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
]
OF_THE_REST: list[Any] = [
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": form([])}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "text", "grammar": "x"}}, "response_format.grammar"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"metadata": {"x" * 65: ""}}, "metadata"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"store": True}, "store"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
    ({"reasoning_effort": "some"}, "reasoning_effort"),
    ({"verbosity": "some"}, "verbosity"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"prompt": "x"}, "prompt"),
    ({"grammar": "root ::= x"}, "grammar"),  # the engine's own fields are not the caller's to set
    ({"cache_prompt": False}, "cache_prompt"),
    ({"return_progress": False}, "return_progress"),
    ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"id_slot": 0}, "id_slot"),
    ({"lora": []}, "lora"),
]
OF_ALL: list[Any] = [  # completions refuse these alike
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1_001}, "top_k"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": TOKENS_MAX + 1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 9}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {}, "stream": False}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"user": 5}, "user"),
    ({"user": "x" * 513}, "user"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"15": 101}}, "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"fallow": 5}, "fallow"),
    ({"n_predict": 5}, "n_predict"),
    ({"samplers": []}, "samplers"),
]


@pytest.mark.parametrize(
    ("fields", "param"), [*(({"messages": messages}, param) for messages, param in OF_MESSAGES), *OF_TOOLS, *OF_THE_REST, *OF_ALL]
)
def test_what_is_not_taken_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(encode(**fields))
    assert caught.value.param == param
    assert param.removesuffix(".function.name").split("[")[0] in caught.value.message or "tool" in caught.value.message


@pytest.mark.parametrize("field", ["model", "messages"])
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is required") as caught:
        read(json.dumps({name: one for name, one in {"model": "m", "messages": HELLO}.items() if name != field}).encode())
    assert caught.value.param == field


@pytest.mark.parametrize("part", [IMAGE, AUDIO, FILE])
def test_what_a_model_has_no_sense_for_is_not_said_back(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="text only") as caught:
        ask(messages=[{"role": "user", "content": [part]}])
    assert "aGk" not in caught.value.message


@PROMISE
@given(st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_.\-]{0,15}\Z"), st.none() | st.booleans() | st.text(max_size=3))
def test_no_unknown_field_gets_through(field: str, value: Any) -> None:
    if field in get_type_hints(ChatRequest):
        return
    with pytest.raises(InvalidRequest) as caught:
        ask(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("field", ["", "a`b"])
def test_no_unknown_field_gets_through_unnamed(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**{field: 1})
    assert caught.value.param == field


@pytest.mark.parametrize("deep", range(100, 1_100, 50))
@pytest.mark.parametrize("before", [b'"fallow":', b'"response_format":{"type":"json_object","json_schema":{"name":"a","schema":'])
def test_no_depth_breaks_anything(deep: int, before: bytes) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}],' + before + b'{"a":' * deep + b"1" + b"}" * deep
    body += b"}" * (1 + 2 * (b"schema" in before))
    try:
        read(body)
    except InvalidRequest as error:
        assert "nested" in error.message  # noqa: PT017
        assert deep > 200


FULL = {
    "messages": [{"role": "system", "content": [WORDS]}, {"role": "assistant", "tool_calls": [CALL]}, RESULT, *HELLO],
    "tools": [WEATHER, CLOCK], "tool_choice": NAMED, "n": 2, "stop": ["x"], "temperature": 0.5, "logprobs": True, "top_logprobs": 2,
    "response_format": form(SCHEMA), "logit_bias": {"1": 1}, "metadata": {"a": "b"}, "stream": True, "stream_options": {},
}  # fmt: skip


@PROMISE
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 10**6))
def test_any_bytes_are_read_or_refused(changes: list[tuple[int, int]], end: int) -> None:
    body = bytearray(encode(**FULL))
    read(bytes(body))
    for at, byte in changes:
        body[at % len(body)] = byte
    for damaged in (bytes(body), bytes(body[: end % len(body)])):
        try:
            _, generation = read(damaged)
        except InvalidRequest:
            continue
        assert generation.turns


# --- what is answered

LIKELY = Token("Hi", [72, 105], -0.25, (Alternative("Hi", [72, 105], -0.25), Alternative("He", [72, 101], -1.5)))
NOW = ToolCall(id="c2", name="clock", arguments="{}")
ANSWERS: dict[str, tuple[dict[str, Any], list[Event]]] = {
    "text": ({}, [Text(0, "Hel"), Text(0, "lo"), Ended(0, "stop")]),
    "nothing": ({}, [Ended(0, "stop")]),
    "length": ({"max_tokens": 1}, [Text(0, "a"), Ended(0, "length")]),
    "nasty": ({}, [Text(0, "\u2028\n\ndata: [DONE]\n\n\x00é😀\\"), Ended(0, "stop", ".")]),
    "reasoning": ({}, [Reasoning(0, "h"), Reasoning(0, "m"), Text(0, "Yes"), Ended(0, "stop")]),
    "only reasoning": ({}, [Reasoning(0, "hm"), Ended(0, "length")]),
    "call": ({"tools": [WEATHER]}, [Called(0, 0, ULM), Ended(0, "tool_calls")]),
    "parallel": ({"tools": [WEATHER, CLOCK]}, [Text(0, "Let me see"), Called(0, 0, ULM), Called(0, 1, NOW), Ended(0, "tool_calls")]),
    "logprobs": (
        {"logprobs": True, "top_logprobs": 2},
        [Text(0, "Hi", (LIKELY,)), Text(0, "", (Token("\ufffd", [240], -1.0),)), Ended(0, "stop")],
    ),
    "top 0": ({"logprobs": True}, [Text(0, "Hi", (Token("Hi", [72, 105], -0.25),)), Ended(0, "length")]),
    "no logprobs": ({"logprobs": True}, [Ended(0, "stop")]),
    "choices": (
        {"n": 3, "tools": [CLOCK]},
        [Text(2, "c"), Text(0, "a"), Ended(0, "stop"), Called(1, 0, NOW), Text(2, "C"), Ended(1, "tool_calls"), Ended(2, "length")],
    ),
}
EVERY = pytest.mark.parametrize("name", ANSWERS)


def wanted(name: str) -> list[dict[str, Any]]:
    """What a caller should see of each choice, worked out by hand from the events."""
    fields, told = ANSWERS[name]
    seen: list[dict[str, Any]] = []
    for index in range(fields.get("n", 1)):
        mine = [one for one in told if one.choice == index]
        seen.append(
            {
                "text": "".join(one.text for one in mine if isinstance(one, Text)),
                "reasoning": "".join(one.text for one in mine if isinstance(one, Reasoning)),
                "calls": [(one.call.id, one.call.name, one.call.arguments) for one in mine if isinstance(one, Called)],
                "tokens": [(t.token, t.bytes, t.logprob, len(t.top)) for one in mine if isinstance(one, Text) for t in one.tokens],
                "reason": next(one.reason for one in mine if isinstance(one, Ended)),
            }
        )
    return seen


def shown(completion: Any) -> list[dict[str, Any]]:
    """The same of what the openai package read."""
    seen = []
    for choice in completion.choices:
        content = choice.logprobs.content if choice.logprobs is not None else None
        seen.append(
            {
                "text": choice.message.content or "",
                "reasoning": getattr(choice.message, "reasoning_content", None) or "",
                "calls": [(one.id, one.function.name, one.function.arguments) for one in choice.message.tool_calls or ()],
                "tokens": [(one.token, one.bytes, one.logprob, len(one.top_logprobs)) for one in content or ()],
                "reason": choice.finish_reason,
            }
        )
    return seen


def endpoint(fields: dict[str, Any]) -> ChatEndpoint:
    return ChatEndpoint(encode(**fields), STAMP)


def streamed(fields: dict[str, Any], told: Sequence[Event]) -> bytes:
    one = endpoint({"stream": True, **fields})
    assert one.stream
    return one.begin() + b"".join(one.write(event) for event in told) + one.end(USAGE)


@EVERY
def test_a_whole_answer(name: str) -> None:
    fields, told = ANSWERS[name]
    one = endpoint(fields)
    assert not one.stream
    body = json.loads(one.whole(told, USAGE))
    check("openai", "CreateChatCompletionResponse", body)
    assert (body["id"], body["created"], body["model"], body["object"]) == ("chatcmpl-abc", 1_700_000_000, "tiny", "chat.completion")
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}
    assert [choice["index"] for choice in body["choices"]] == list(range(fields.get("n", 1)))
    assert shown(ChatCompletion.model_validate(body)) == wanted(name)
    for choice in body["choices"]:
        assert (choice["logprobs"] is not None) == fields.get("logprobs", False)
        assert choice["message"]["content"] is not None or choice["message"]["tool_calls"], "only calls do without a text"


@EVERY
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_a_streamed_answer(name: str, options: dict[str, Any] | None) -> None:
    fields, told = ANSWERS[name]
    out = streamed(fields if options is None else {**fields, "stream_options": options}, told)
    *chunks, done = [one for _, one in events(out)]
    assert done == "[DONE]"
    assert out.count(b"\n\n") == len(chunks) + 1
    for chunk in chunks:
        check("openai", "CreateChatCompletionStreamResponse", chunk)
        ChatCompletionChunk.model_validate(chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == ("chatcmpl-abc", 1_700_000_000, "tiny")
    n = fields.get("n", 1)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:n]] == [{"role": "assistant", "content": ""}] * n
    counts = [chunk.get("usage", "none") for chunk in chunks]
    if options and options.get("include_usage"):
        assert counts[:-1] == [None] * (len(chunks) - 1)
        assert counts[-1]["total_tokens"] == 12
        assert chunks[-1]["choices"] == []
    else:
        assert set(counts) == {"none"}
        assert all(chunk["choices"] for chunk in chunks)


@EVERY
def test_the_openai_package_puts_a_stream_together(name: str) -> None:
    fields, told = ANSWERS[name]
    state: Any = ChatCompletionStreamState()
    for _, chunk in events(streamed({**fields, "stream_options": {"include_usage": True}}, told)):
        if chunk != "[DONE]":
            state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    snapshot = state.current_completion_snapshot
    thoughts = [one["reasoning"] for one in wanted(name)]
    assert [one | {"reasoning": ""} for one in shown(snapshot)] == [one | {"reasoning": ""} for one in wanted(name)]
    assert [getattr(choice.message, "reasoning_content", "") for choice in snapshot.choices] == thoughts
    assert snapshot.usage is not None
    assert (snapshot.usage.prompt_tokens, snapshot.usage.completion_tokens) == (7, 5)


def client(body: bytes, kind: str) -> openai.OpenAI:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body, headers={"content-type": kind})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://fallow.test/v1", http_client=transport, max_retries=0)


def test_the_openai_package_reads_both_forms() -> None:
    fields, told = ANSWERS["parallel"]
    messages: Any = HELLO
    with client(endpoint(fields).whole(told, USAGE), "application/json") as api:
        whole = api.chat.completions.create(model="tiny", messages=messages)
        assert shown(whole) == wanted("parallel")
    with client(streamed(fields, told), "text/event-stream") as api:
        tools: Any = [WEATHER, {"type": "function", "function": {"name": "clock", "parameters": {}, "strict": True}}]
        with api.chat.completions.stream(model="tiny", messages=messages, tools=tools) as stream:
            done = [one for one in stream if one.type == "tool_calls.function.arguments.done"]
            assert [(one.index, one.name, one.arguments) for one in done] == [(0, "weather", ULM.arguments), (1, "clock", "{}")]
            assert shown(stream.get_final_completion()) == wanted("parallel")


def test_a_call_begins_with_its_name() -> None:
    fields, told = ANSWERS["parallel"]
    chunks = [one for _, one in events(streamed(fields, told)) if one != "[DONE]"]
    calls = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks if "tool_calls" in chunk["choices"][0]["delta"]]
    assert calls == [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": ULM.arguments}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "clock", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]


some_events = st.lists(
    st.builds(Text, st.just(0), st.text(max_size=8)) | st.builds(Reasoning, st.just(0), st.text(min_size=1, max_size=8)), max_size=6
)


@PROMISE
@given(some_events)
def test_both_forms_say_the_same(told: list[Event]) -> None:
    told = [*told, Ended(0, "stop")]
    body = json.loads(endpoint({}).whole(told, USAGE))
    check("openai", "CreateChatCompletionResponse", body)
    deltas = [chunk["choices"][0]["delta"] for _, chunk in events(streamed({}, told)) if chunk != "[DONE]"]
    assert "".join(delta.get("content", "") for delta in deltas) == body["choices"][0]["message"]["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == body["choices"][0]["message"].get("reasoning_content", "")

"""Completions: each field on its way to an engine, each that has none, and every answer and event as OpenAI published them."""

import json
from collections.abc import Sequence
from typing import Any, get_type_hints

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from vendor import check, events

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.completions_api import MAX_TOKENS_DEFAULT, PROMPTS_MAX, CompletionRequest, CompletionsEndpoint, read
from fallow.wire.generation import Alternative, Called, Ended, Event, Generation, Reasoning, Sampling, Stamp, Text, Token, ToolCall
from fallow.wire.openai import TOKENS_MAX

PROMISE = settings(max_examples=200)
STAMP = Stamp(id="abc", created_s=1_700_000_000, model="tiny")
USAGE = Usage(prompt_tokens=7, cached_tokens=3, output_tokens=5)
PARAMS = {"messages": "prompt", "max_tokens": "max_tokens"}


def encode(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "Once", **fields}).encode()


def ask(**fields: Any) -> Generation:
    return read(encode(**fields))[1]


def made(**fields: Any) -> Generation:
    usual: dict[str, Any] = {"prompts": ("Once",), "sampling": Sampling(max_tokens=MAX_TOKENS_DEFAULT), "params": PARAMS}
    return Generation(**usual | fields)


def sampled(**fields: Any) -> Generation:
    return made(sampling=Sampling(**({"max_tokens": MAX_TOKENS_DEFAULT} | fields)))


# --- what is taken

TAKEN: list[tuple[dict[str, Any], Generation]] = [
    ({}, made()),
    ({"max_tokens": 1}, sampled(max_tokens=1)),
    ({"max_tokens": TOKENS_MAX}, sampled(max_tokens=TOKENS_MAX)),
    ({"temperature": 0}, sampled(temperature=0.0)),
    ({"temperature": 2}, sampled(temperature=2.0)),
    ({"top_p": 0.5}, sampled(top_p=0.5)),
    ({"frequency_penalty": -2}, sampled(frequency_penalty=-2.0)),
    ({"presence_penalty": 2}, sampled(presence_penalty=2.0)),
    ({"seed": 0}, sampled(seed=0)),
    ({"seed": -(2**63)}, sampled(seed=-(2**63))),
    ({"stop": "END"}, sampled(stop=("END",))),
    ({"stop": ["a", "b", "c", "d"]}, sampled(stop=("a", "b", "c", "d"))),
    ({"logit_bias": {"50256": -100}}, sampled(logit_bias={50256: -100.0})),
    ({"n": 8}, made(choices=8)),
    ({"best_of": 1}, made()),
    ({"best_of": 3, "n": 3}, made(choices=3)),
    ({"logprobs": 0}, made(top_logprobs=0)),
    ({"logprobs": 5}, made(top_logprobs=5)),
    ({"echo": False, "logprobs": 5}, made(top_logprobs=5)),
    ({"echo": True}, made()),
    ({"echo": True, "prompt": ["a", "b"]}, made(prompts=("a", "b"))),
]
STAYS: list[tuple[str, Any]] = [("model", "other"), ("stream", True), ("user", "somebody"), ("service_tier", "flex"), ("fallow", {})]


@pytest.mark.parametrize(("fields", "wanted"), TAKEN, ids=lambda one: json.dumps(one) if isinstance(one, dict) else "")
def test_what_is_taken(fields: dict[str, Any], wanted: Generation) -> None:
    assert ask(**fields) == wanted
    check("openai", "CreateCompletionRequest", json.loads(encode(**fields)))


def test_the_top_tokens_are_taken_besides() -> None:
    assert ask(top_k=40) == sampled(top_k=40)


@pytest.mark.parametrize(("field", "value"), STAYS)
def test_what_concerns_only_us_stays_here(field: str, value: Any) -> None:
    assert ask(**{field: value}) == made()


def test_the_tables_above_know_every_field() -> None:
    known = {"stream_options", "top_k", "suffix", *(field for fields, _ in TAKEN for field in fields), *(field for field, _ in STAYS)}
    assert set(get_type_hints(CompletionRequest)) == known


@pytest.mark.parametrize("field", [field for field in get_type_hints(CompletionRequest) if field not in ("model", "prompt")])
def test_null_is_as_good_as_nothing(field: str) -> None:
    assert ask(**{field: None}) == made()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ("Once",)),
        ("é\n\x00", ("é\n\x00",)),
        (["a"], ("a",)),
        (["a", "b", "a"], ("a", "b", "a")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([0], ((0,),)),
        (list(range(PROMPTS_MAX + 5)), (tuple(range(PROMPTS_MAX + 5)),)),  # one prompt, however many tokens
        ([[1, 2], [3]], ((1, 2), (3,))),
        ([[1, 2], "a", [2**31 - 1]], ((1, 2), "a", (2**31 - 1,))),
        (["x"] * PROMPTS_MAX, ("x",) * PROMPTS_MAX),
    ],
)
def test_prompts(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert ask(prompt=prompt) == made(prompts=prompts)


# --- what is not taken

NOT_TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt[0]"),
    ({"prompt": ["a", []]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt[0]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [[1], 2, "a"]}, "prompt[1]"),
    ({"prompt": ["a", None]}, "prompt[1]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": [[1, -1]]}, "prompt[0][1]"),
    ({"prompt": [["a"]]}, "prompt[0][0]"),
    ({"prompt": ["x"] * (PROMPTS_MAX + 1)}, "prompt"),
    ({"prompt": [[1]] * (PROMPTS_MAX + 1)}, "prompt"),
    ({"echo": True, "logprobs": 0}, "echo"),
    ({"echo": True, "prompt": [1, 2]}, "echo"),
    ({"echo": True, "prompt": ["a", [1]]}, "echo"),
    ({"echo": "yes"}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 21, "n": 1}, "best_of"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"suffix": ""}, "suffix"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"max_completion_tokens": 4}, "max_completion_tokens"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"tools": []}, "tools"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"grammar": "root ::= x"}, "grammar"),  # the engine's own fields are not the caller's to set
    ({"n_probs": 5}, "n_probs"),
    ({"n_predict": 5}, "n_predict"),
    ({"cache_prompt": False}, "cache_prompt"),
    ({"model": None}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": TOKENS_MAX + 1}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": list("abcde")}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {}, "stream": False}, "stream_options"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"user": 5}, "user"),
    ({"logit_bias": {"15": 101}}, "logit_bias[...]"),
]


@pytest.mark.parametrize(("fields", "param"), NOT_TAKEN, ids=lambda one: json.dumps(one)[:40] if isinstance(one, dict) else "")
def test_what_is_not_taken_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(encode(**fields))
    assert caught.value.param == param
    assert param.split("[")[0] in caught.value.message


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is required") as caught:
        read(json.dumps({name: "x" for name in ("model", "prompt") if name != field}).encode())
    assert caught.value.param == field


@PROMISE
@given(st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_.\-]{0,15}\Z"), st.none() | st.booleans() | st.text(max_size=3))
def test_no_unknown_field_gets_through(field: str, value: Any) -> None:
    if field in get_type_hints(CompletionRequest):
        return
    with pytest.raises(InvalidRequest) as caught:
        ask(**{field: value})
    assert caught.value.param == field


some_prompt = st.recursive(st.text(max_size=3) | st.integers(-2, 2**31) | st.none(), lambda one: st.lists(one, max_size=4), max_leaves=8)


@PROMISE
@given(some_prompt)
def test_any_prompt_is_read_or_refused(prompt: Any) -> None:
    try:
        found = ask(prompt=prompt).prompts
    except InvalidRequest as error:
        assert (error.param or "").startswith("prompt")  # noqa: PT017
        return
    assert found
    assert all(found)
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    assert [list(p) if isinstance(p, tuple) else p for p in found] == ([prompt] if one else prompt)


FULL = {
    "prompt": ["a", [1, 2]],
    "n": 2,
    "best_of": 2,
    "stop": ["x"],
    "temperature": 0.5,
    "logprobs": 1,
    "stream": True,
    "stream_options": {},
}


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
        assert generation.prompts


# --- what is answered


def token(text: str, logprob: float, *others: tuple[str, float]) -> Token:
    return Token(text, list(text.encode()), logprob, tuple(Alternative(name, list(name.encode()), value) for name, value in others))


ANSWERS: dict[str, tuple[dict[str, Any], list[Event], list[tuple[str, str]]]] = {
    "text": ({}, [Text(0, " there"), Text(0, " was"), Ended(0, "stop")], [(" there was", "stop")]),
    "nothing": ({}, [Ended(0, "stop")], [("", "stop")]),
    "length": ({}, [Text(0, "é\u2028\n\n"), Ended(0, "length")], [("é\u2028\n\n", "length")]),
    "thoughts": (
        {},
        [Reasoning(0, "hm"), Text(0, "a"), Called(0, 0, ToolCall(id="c", name="f", arguments="")), Ended(0, "stop")],
        [("a", "stop")],
    ),
    "echo": ({"echo": True}, [Text(0, " there"), Ended(0, "stop")], [("Once there", "stop")]),
    "logprobs": (
        {"logprobs": 2},
        [
            Text(0, " the", (token(" the", -0.5, (" the", -0.5), (" a", -1.5)),)),
            Text(0, "re", (token("re", -0.1, ("re", -0.1)),)),
            Ended(0, "stop"),
        ],
        [(" there", "stop")],
    ),
    "choices": (
        {"prompt": ["a", "b"], "n": 2, "echo": True},
        [
            Text(1, "1"),
            Text(0, "0"),
            Ended(0, "stop"),
            Ended(1, "length"),
            Text(2, "2"),
            Text(3, "3"),
            Ended(3, "stop"),
            Text(2, "2"),
            Ended(2, "stop"),
        ],
        [("a0", "stop"), ("a1", "length"), ("b22", "stop"), ("b3", "stop")],
    ),
    "tokens": (
        {"prompt": [[1], "b"]},
        [Text(0, "x"), Ended(0, "stop"), Text(1, "y"), Ended(1, "length")],
        [("x", "stop"), ("y", "length")],
    ),
}
EVERY = pytest.mark.parametrize("name", ANSWERS)


def endpoint(fields: dict[str, Any]) -> CompletionsEndpoint:
    return CompletionsEndpoint(encode(**fields), STAMP)


def streamed(fields: dict[str, Any], told: Sequence[Event]) -> bytes:
    one = endpoint({"stream": True, **fields})
    assert one.stream
    return one.begin() + b"".join(one.write(event) for event in told) + one.end(USAGE)


@EVERY
def test_a_whole_answer(name: str) -> None:
    fields, told, wanted = ANSWERS[name]
    one = endpoint(fields)
    assert not one.stream
    body = json.loads(one.whole(told, USAGE))
    check("openai", "CreateCompletionResponse", body)
    assert (body["id"], body["created"], body["model"], body["object"]) == ("cmpl-abc", 1_700_000_000, "tiny", "text_completion")
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}
    read_by_them = Completion.model_validate(body)
    assert [(choice.text, choice.finish_reason) for choice in read_by_them.choices] == wanted
    assert [choice.index for choice in read_by_them.choices] == list(range(len(wanted)))
    assert all((choice.logprobs is not None) == ("logprobs" in fields) for choice in read_by_them.choices)


@EVERY
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_a_streamed_answer(name: str, options: dict[str, Any] | None) -> None:
    fields, told, wanted = ANSWERS[name]
    out = streamed(fields if options is None else {**fields, "stream_options": options}, told)
    *chunks, done = [one for _, one in events(out)]
    assert done == "[DONE]"
    texts, reasons = [""] * len(wanted), [""] * len(wanted)
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert not reasons[choice["index"]], "nothing follows a choice's end"
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or ""
        assert (chunk["id"], chunk["created"], chunk["model"], chunk["object"]) == ("cmpl-abc", 1_700_000_000, "tiny", "text_completion")
    assert list(zip(texts, reasons, strict=True)) == wanted
    counts = [chunk["usage"]["total_tokens"] for chunk in chunks if "usage" in chunk]
    assert counts == ([12] if options and options.get("include_usage") else [])
    assert "usage" not in chunks[0] or not chunks[0]["choices"]


@EVERY
def test_the_events_are_what_openai_published(name: str) -> None:
    """OpenAI has one schema for both forms; only `finish_reason` of a choice that goes on is null besides, as theirs is."""
    fields, told, _ = ANSWERS[name]
    for _, chunk in events(streamed({**fields, "stream_options": {"include_usage": True}}, told)):
        if chunk != "[DONE]":
            for choice in chunk["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            check("openai", "CreateCompletionResponse", chunk)
            Completion.model_validate(chunk)


def test_log_probabilities() -> None:
    fields, told, _ = ANSWERS["logprobs"]
    there = {
        "tokens": [" the", "re"],
        "token_logprobs": [-0.5, -0.1],
        "top_logprobs": [{" the": -0.5, " a": -1.5}, {"re": -0.1}],
        "text_offset": [0, 4],
    }
    assert json.loads(endpoint(fields).whole(told, USAGE))["choices"][0]["logprobs"] == there
    chunks = [chunk["choices"][0]["logprobs"] for _, chunk in events(streamed(fields, told)) if chunk != "[DONE]"]
    assert chunks[-1] is None, "the end has no token"
    assert {name: [one for chunk in chunks[:-1] for one in chunk[name]] for name in there} == there


def test_each_choice_counts_its_own_offsets() -> None:
    told = [
        Text(1, "abc", (token("abc", -1),)),
        Text(0, "x", (token("x", -1),)),
        Text(1, "d", (token("d", -1),)),
        Text(0, "y", (token("y", -1),)),
    ]
    chunks = [one["choices"][0] for _, one in events(streamed({"logprobs": 0, "n": 2}, told)) if one != "[DONE]"]
    assert [(chunk["index"], chunk["logprobs"]["text_offset"]) for chunk in chunks] == [(1, [0]), (0, [0]), (1, [3]), (0, [1])]


def test_a_prompt_is_said_back_only_where_that_is_wanted() -> None:
    assert endpoint({"stream": True}).begin() == b""
    assert [one["choices"][0]["text"] for _, one in events(endpoint({"stream": True, "echo": True, "n": 2}).begin())] == ["Once", "Once"]


def client(body: bytes, kind: str) -> openai.OpenAI:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body, headers={"content-type": kind})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://fallow.test/v1", http_client=transport, max_retries=0)


def test_the_openai_package_reads_both_forms() -> None:
    fields, told, wanted = ANSWERS["choices"]
    with client(endpoint(fields).whole(told, USAGE), "application/json") as api:
        whole = api.completions.create(model="tiny", prompt="x")
        assert [choice.text for choice in whole.choices] == [text for text, _ in wanted]
    with client(streamed({**fields, "stream_options": {"include_usage": True}}, told), "text/event-stream") as api:
        chunks = list(api.completions.create(model="tiny", prompt="x", stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == 2) == "b22"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5

"""llama.cpp's event streams, read into events: alike however they are cut, with nothing of the text touched."""

import contextlib
import itertools
import json
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.errors import EngineFailed
from fallow.model.receipt import Usage
from fallow.wire.generation import Alternative, Ended, Event, Reasoning, Text, Token
from fallow.wire.llama_answer import LOGPROB_MIN, EngineStream, added, refusal
from fallow.wire.sse import DONE, EVENT_BYTES_MAX

PROMISE = settings(max_examples=150)
META = {"created": 1, "id": "chatcmpl-x", "model": "m", "system_fingerprint": "b0", "object": "chat.completion.chunk"}
TEXT_META = {**META, "id": "cmpl-x", "object": "text_completion"}
TIMINGS = {"cache_n": 4, "prompt_n": 31, "predicted_n": 2, "predicted_per_second": 17.5}
ROLE = {"role": "assistant", "content": None}
PARAMS = {"messages": "messages"}


# Events as the engine writes them: compact, in this order of keys, non-ASCII as it is.
def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def delta(index: int, what: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    return event({"choices": [{"finish_reason": finish, "index": index, "delta": what}], **META, **more})


def progress(index: int, done: int) -> bytes:
    return delta(index, ROLE, prompt_progress={"total": 35, "cache": 0, "processed": done, "time_ms": done})


def role(index: int) -> bytes:
    return delta(index, ROLE)


def word(index: int, text: str) -> bytes:
    return delta(index, {"content": text})


def usage(completion: int, prompt: int = 35, cached: int = 0) -> dict[str, Any]:
    return {
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": completion + prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def account(completion: int, cached: int = 0) -> bytes:
    return event({"choices": [], **META, "usage": usage(completion, cached=cached), "timings": TIMINGS})


def text_event(index: int, text: str, finish: str | None = None, **more: Any) -> bytes:
    return event({"choices": [{"text": text, "index": index, "logprobs": None, "finish_reason": finish}], **TEXT_META, **more})


class Choice(NamedTuple):
    """One choice of an answer: its words, and how it ended."""

    words: list[str]
    finish: str
    cached: int


def chat_events(index: int, choice: Choice, repeats: int) -> list[bytes]:
    return [
        *(progress(index, done) for done in range(repeats)),
        role(index),
        *(word(index, text) for text in choice.words),
        delta(index, {}, choice.finish),
        account(len(choice.words), choice.cached),
    ]


def text_events(index: int, choice: Choice, repeats: int) -> list[bytes]:
    return [
        *(text_event(index, "", prompt_progress={"total": 35, "cache": 0, "processed": done, "time_ms": 0}) for done in range(repeats)),
        *(text_event(index, text) for text in choice.words),
        text_event(index, "", choice.finish, usage=usage(len(choice.words), cached=choice.cached), timings=TIMINGS),
    ]


def interleaved(choices: list[list[bytes]], chance: random.Random) -> list[bytes]:
    """The events of all choices in some order that keeps each choice's own; DONE at the end."""
    turns = [index for index, events in enumerate(choices) for _ in events]
    chance.shuffle(turns)
    left = [iter(events) for events in choices]
    return [*(next(left[index]) for index in turns), DONE]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def read(chunks: Iterable[bytes], *, choices: int = 1, first: int = 0, top: int | None = None) -> tuple[list[Event], EngineStream]:
    stream = EngineStream(choices=choices, first=first, top_logprobs=top)
    return [one for chunk in chunks for one in stream.feed(chunk)], stream


# Whole streams in full, for people to read.
CHAT_STREAM = [
    progress(0, 0), progress(0, 35), role(0), word(0, "Once"), word(0, " upon"), delta(0, {}, "length"), account(2), DONE,
]  # fmt: skip
TEXT_STREAM = [
    text_event(0, "", prompt_progress={"total": 35, "cache": 0, "processed": 0, "time_ms": 0}),
    text_event(0, " there"),
    text_event(0, " was"),
    text_event(0, "", "stop", usage=usage(2), timings=TIMINGS),
    DONE,
]


def test_a_chat() -> None:
    events, stream = read(CHAT_STREAM)
    assert events == [Text(0, "Once"), Text(0, " upon"), Ended(0, "length")]
    assert stream.usage == Usage(prompt_tokens=35, output_tokens=2)
    assert stream.is_whole


def test_a_completion() -> None:
    events, stream = read(TEXT_STREAM)
    assert events == [Text(0, " there"), Text(0, " was"), Ended(0, "stop")]
    assert stream.usage == Usage(prompt_tokens=35, output_tokens=2)
    assert stream.is_whole


@pytest.mark.parametrize("first", [0, 1, 6])
def test_choices_are_numbered_from_the_first(first: int) -> None:
    events = [word(1, "b"), word(0, "a"), delta(0, {}, "stop"), account(1), delta(1, {}, "length"), account(1), DONE]
    told, stream = read(events, choices=2, first=first)
    assert told == [Text(first + 1, "b"), Text(first, "a"), Ended(first, "stop"), Ended(first + 1, "length")]
    assert stream.usage == Usage(prompt_tokens=35, output_tokens=2)


def test_reasoning_is_kept_apart() -> None:
    thoughts = [delta(0, {"reasoning_content": "hm"}), delta(0, {"reasoning_content": ""}), delta(0, {"reasoning_content": "m"})]
    events, _ = read([role(0), *thoughts, word(0, "Yes"), delta(0, {}, "stop"), account(3), DONE])
    assert events == [Reasoning(0, "hm"), Reasoning(0, "m"), Text(0, "Yes"), Ended(0, "stop")]


def test_an_answer_without_a_word() -> None:
    assert read([progress(0, 0), role(0), delta(0, {}, "stop"), account(0), DONE])[0] == [Ended(0, "stop")]


@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("content_filter", "stop"), ("", "stop")]
)
def test_ends(finish: str, reason: str) -> None:
    events, _ = read([delta(0, {}, finish)])
    assert events == [Ended(0, "length" if reason == "length" else "stop")]


NASTY = [
    'prompt_progress', '"prompt_progress":', '"prompt_progress":{}', '"usage":', '"usage":{"prompt_tokens":1}', '"timings":{}',
    '"delta":{"role":"assistant","content":null}', 'data: {"error":', 'data: [DONE]\n\n', '\n\n', '\\', '\\"', '"', '{"choices":[]}',
    '\\"usage\\":', 'é', '日本', '😀', '\u2028', '\x00', '\x7f', 'data: null\n\n', ':', '\r\n', "",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_is_taken_for_something_else(text: str) -> None:
    mine = [Text(0, text)] if text else []
    events = [progress(0, 0), role(0), word(0, text), word(0, "."), delta(0, {}, "stop"), account(2), DONE]
    assert read(events)[0] == [*mine, Text(0, "."), Ended(0, "stop")]
    events = [text_event(0, text), text_event(0, ".", "stop", usage=usage(2), timings=TIMINGS), DONE]
    assert read(events)[0] == [*mine, Text(0, "."), Ended(0, "stop")]


some_choice = st.builds(
    Choice,
    words=st.lists(st.sampled_from(NASTY) | st.text(max_size=6), max_size=5),
    finish=st.sampled_from(["stop", "length"]),
    cached=st.integers(0, 35),
)
some_choices = st.lists(some_choice, min_size=1, max_size=4)
some_places = st.lists(st.integers(0, 10**6), max_size=15)


@PROMISE
@given(some_choices, some_places, st.integers(0, 2**32), st.booleans(), st.integers(0, 3))
def test_a_stream_is_the_same_however_it_is_cut(choices: list[Choice], places: list[int], seed: int, chat: bool, repeats: int) -> None:
    make = chat_events if chat else text_events
    events = interleaved([make(i, choice, repeats) for i, choice in enumerate(choices)], random.Random(seed))
    told, stream = read(cut(b"".join(events), places), choices=len(choices))
    assert told == read(events, choices=len(choices))[0]
    for index, choice in enumerate(choices):
        mine = [one for one in told if one.choice == index]
        assert mine == [
            *(Text(index, text) for text in choice.words if text),
            Ended(index, "length" if choice.finish == "length" else "stop"),
        ]
    assert stream.is_whole
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.output_tokens) == (35, sum(len(choice.words) for choice in choices))


@pytest.mark.parametrize("events", [CHAT_STREAM, TEXT_STREAM])
def test_a_stream_can_be_cut_at_every_byte(events: list[bytes]) -> None:
    data = b"".join(events)
    told = read(events)[0]
    assert read([bytes([byte]) for byte in data])[0] == told
    for at in range(len(data)):
        assert read([data[:at], data[at:]])[0] == told
        assert not read([data[:at]])[1].is_whole


@PROMISE
@given(some_choice, some_places, st.integers(0, 10**6))
def test_a_stream_that_breaks_off_is_never_called_whole(choice: Choice, places: list[int], end: int) -> None:
    data = b"".join([*chat_events(0, choice, 1), DONE])
    told, stream = read(cut(data[: end % len(data)], places))
    assert not stream.is_whole
    assert told == read([data])[0][: len(told)]


def test_a_stream_that_does_not_count_has_no_usage() -> None:
    _, stream = read([role(0), word(0, "a"), delta(0, {}, "stop"), DONE])
    assert stream.is_whole
    assert stream.usage is None


ERROR = event({"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}})


@pytest.mark.parametrize("error", [ERROR, b"error: " + ERROR.removeprefix(b"data: ")])
@pytest.mark.parametrize("before", [[], [progress(0, 0)], [role(0), word(0, "a")]])
def test_an_error_of_the_engine_ends_the_answer(before: list[bytes], error: bytes) -> None:
    stream = EngineStream(choices=1)
    for one in before:
        stream.feed(one)
    with pytest.raises(EngineFailed, match="broke off") as caught:
        stream.feed(error)
    assert "Context" not in caught.value.message, "the engine's words may hold the prompt"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"data: {\n\n", id="cut"),
        pytest.param(b"data: []\n\n", id="a list"),
        pytest.param(b"data: {}\n\n", id="empty"),
        pytest.param(b"data:\n\n", id="nothing"),
        pytest.param(b"event: x\ndata: {}\n\n", id="named"),
        pytest.param(b'{"choices":[],"usage":{}}\n\n', id="no event"),
        pytest.param(b'data: {"choices":{}}\n\n', id="choices"),
        pytest.param(b'data: {"choices":5,"usage":{}}\n\n', id="a number of choices"),
        pytest.param(b'data: {"choices":[{"delta":{}}]}\n\n', id="a choice without an index"),
        pytest.param(b'data: {"choices":[{"index":"0"}]}\n\n', id="index"),
        pytest.param(b'data: {"choices":[{"index":0,"delta":{"content":5}}]}\n\n', id="content"),
        pytest.param(b'data: {"choices":[{"index":0,"text":5}]}\n\n', id="text"),
        pytest.param(b'data: {"choices":[{"index":1,"delta":{"content":"a"}}]}\n\n', id="one choice too many"),
        pytest.param(b'data: {"choices":[{"index":-1,"delta":{"content":"a"}}]}\n\n', id="a choice before the first"),
        pytest.param(b'data: {"choices":[],"usage":[]}\n\n', id="usage"),
        pytest.param(event({"choices": [], "usage": {"prompt_tokens": "many"}}), id="usage in words"),
        pytest.param(event({"choices": [], "usage": {"completion_tokens": -1}}), id="impossible usage"),
        pytest.param(event({"choices": [], "timings": {"predicted_n": -1}}), id="impossible timings"),
        pytest.param(event({"choices": [{"index": 0, "logprobs": {"content": [{"logprob": -1}]}}]}), id="logprob of nothing"),
        pytest.param(b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}],"usage":{}}\n\n', id="not UTF-8"),
        pytest.param(b'data: {"choices":[],"usage":' + b"[" * 20_000 + b"\n\n", id="deep"),
        pytest.param(b"data: " + b"x" * EVENT_BYTES_MAX, id="without end"),
    ],
)
def test_nonsense_of_any_kind_is_a_fault_of_the_engine(bad: bytes) -> None:
    with pytest.raises(EngineFailed):
        EngineStream(choices=1, top_logprobs=1).feed(bad)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_choices_that_were_asked_for_are_read(index: int) -> None:
    stream = EngineStream(choices=2, first=5)
    if index < 2:
        assert stream.feed(word(index, "a")) == [Text(5 + index, "a")]
        return
    with pytest.raises(EngineFailed, match="nobody asked for"):
        stream.feed(word(index, "a"))


def logprob(token: str, value: float | None, *others: tuple[str, float | None], **more: Any) -> dict[str, Any]:
    """As llama.cpp tells of one token."""
    top = [{"id": 6, "token": name, "bytes": list(name.encode()), "logprob": one} for name, one in others]
    return {"id": 5, "token": token, "bytes": list(token.encode()), "logprob": value, "top_logprobs": top, **more}


def chosen(text: str, *content: dict[str, Any]) -> bytes:
    one = {"finish_reason": None, "index": 0, "delta": {"content": text}, "logprobs": {"content": list(content)}}
    return event({"choices": [one], **META})


@PROMISE
@given(
    st.sampled_from([CHAT_STREAM, TEXT_STREAM, [chosen("Hi", logprob("Hi", -0.25, ("Hi", -0.25), ("He", -1.5))), *CHAT_STREAM]]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    some_places,
)
def test_a_damaged_stream_is_read_or_a_fault_of_the_engine(events: list[bytes], changes: list[tuple[int, int]], places: list[int]) -> None:
    data = bytearray(b"".join(events))
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(EngineFailed):
        read(cut(bytes(data), places), top=2)


NOTHING = [b":\n\n", b": ping\n\n", b"data: null\n\n"]


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("at", [0, 1, 4, len(CHAT_STREAM)])
def test_what_keeps_the_connection_alive_is_no_answer(nothing: bytes, at: int) -> None:
    told, stream = read([*CHAT_STREAM[:at], nothing, *CHAT_STREAM[at:]])
    assert told == read(CHAT_STREAM)[0]
    assert stream.is_whole


def test_lines_may_end_as_other_servers_end_them() -> None:
    assert read([b"".join(CHAT_STREAM).replace(b"\n", b"\r\n")])[0] == read(CHAT_STREAM)[0]


@pytest.mark.parametrize(
    ("top", "alternatives"),
    [(None, None), (0, []), (1, [("Hi", -0.25)]), (2, [("Hi", -0.25), ("He", -1.5)]), (5, [("Hi", -0.25), ("He", -1.5)])],
)
def test_log_probabilities(top: int | None, alternatives: list[tuple[str, float]] | None) -> None:
    events, _ = read([chosen("Hi", logprob("Hi", -0.25, ("Hi", -0.25), ("He", -1.5)))], top=top)
    if alternatives is None:
        assert events == [Text(0, "Hi")], "nobody asked for them"
        return
    others = tuple(Alternative(name, list(name.encode()), value) for name, value in alternatives)
    assert events == [Text(0, "Hi", (Token("Hi", [72, 105], -0.25, others),))]


@pytest.mark.parametrize(("top", "ids"), [(None, []), (0, [5, 9]), (2, [5, 9])])
def test_the_engines_own_numbers_of_what_it_wrote(top: int | None, ids: list[int]) -> None:
    """It tells them with log probabilities; some engines leave them out."""
    told = [chosen("Hi", logprob("Hi", -0.25)), chosen("ho", logprob("h", -0.5, id=None), logprob("o", -0.5, ("e", -1.0), id=9))]
    _, stream = read([*told, delta(0, {}, "stop"), DONE], top=top)
    assert stream.token_ids == ids


@pytest.mark.parametrize(
    ("value", "told"),
    [(-3.4e38, LOGPROB_MIN), (None, LOGPROB_MIN), (-1e4, LOGPROB_MIN), (LOGPROB_MIN, LOGPROB_MIN), (-0.5, -0.5), (0, 0.0), (1e-9, 0.0)],
)
def test_a_log_probability_is_one(value: float | None, told: float) -> None:
    events, _ = read([chosen("Hi", logprob("Hi", value, ("He", value)))], top=1)
    assert events == [Text(0, "Hi", (Token("Hi", [72, 105], told, (Alternative("He", [72, 101], told),)),))]


def test_part_of_a_character_is_told_by_its_bytes() -> None:
    """A token may be less than a character: then there is no text yet, but there is a token."""
    events, _ = read([chosen("", logprob("\ufffd", -1.0, bytes=[0xF0, 0x9F])), chosen("é", logprob("é", -1.0, bytes=None))], top=0)
    assert events == [Text(0, "", (Token("\ufffd", [0xF0, 0x9F], -1.0),)), Text(0, "é", (Token("é", [0xC3, 0xA9], -1.0),))]


def test_no_log_probabilities_where_they_are_wanted() -> None:
    assert read([delta(0, {"content": "a"}), text_event(0, "b")], top=1)[0] == [Text(0, "a"), Text(0, "b")]


def test_timings_count_an_answer_that_is_left_early() -> None:
    events = [delta(0, {"content": "a"}, timings={"cache_n": 20, "prompt_n": 15, "predicted_n": n}) for n in (1, 2, 3)]
    _, stream = read(events)
    assert stream.timed == Usage(prompt_tokens=35, cached_tokens=20, output_tokens=3)
    assert stream.usage is None
    assert EngineStream(choices=1).timed == Usage()


@pytest.mark.parametrize(
    ("before", "found", "after"),
    [
        (None, {}, Usage()),
        (None, usage(4, 10, 3), Usage(prompt_tokens=10, cached_tokens=3, output_tokens=4)),
        (None, {"prompt_tokens": 10, "completion_tokens": 4}, Usage(prompt_tokens=10, output_tokens=4)),
        (
            Usage(prompt_tokens=10, cached_tokens=3, output_tokens=4),
            usage(5, 10, 10),  # the second choice finds the prompt that the first one left
            Usage(prompt_tokens=10, cached_tokens=3, output_tokens=9),
        ),
    ],
)
def test_usage_adds_up(before: Usage | None, found: dict[str, Any], after: Usage) -> None:
    assert added(before, found) == after


@pytest.mark.parametrize("found", [None, [], 5, "x", {"prompt_tokens": None}, {"completion_tokens": 1.5}, {"prompt_tokens_details": 1}])
def test_usage_must_be_readable(found: Any) -> None:
    with pytest.raises(EngineFailed):
        added(None, found)


@pytest.mark.parametrize("found", [{"prompt_tokens": -1}, {"completion_tokens": 2**41}, {"prompt_tokens_details": {"cached_tokens": -1}}])
def test_usage_must_be_possible(found: Any) -> None:
    """An attached server may say anything; what is impossible is left out, as what can't be read is."""
    with pytest.raises(EngineFailed):
        added(None, found)


def llama_error(kind: str, **more: Any) -> bytes:
    return json.dumps({"error": {"code": 400, "message": "the SECRET prompt", "type": kind, **more}}).encode()


TOO_LONG = llama_error("exceed_context_size_error", n_prompt_tokens=9_000, n_ctx=8_192)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, TOO_LONG, "context_length_exceeded"),
        (400, llama_error("invalid_request_error"), "invalid_request"),
        (404, llama_error("not_found_error"), "invalid_request"),
        (422, b"", "invalid_request"),
        (500, llama_error("server_error"), "engine_failed"),
        (500, b"<html>", "engine_failed"),
        (501, llama_error("not_supported_error"), "engine_failed"),
        (503, llama_error("unavailable_error"), "model_loading"),
        (503, b"", "model_loading"),
        (500, llama_error("unavailable_error"), "model_loading"),
        (302, b"", "engine_failed"),
        (500, b"[]", "engine_failed"),
        (400, b'{"error":5}', "invalid_request"),
        (400, b'{"error":{"type":5}}', "invalid_request"),
        (400, b"{}", "invalid_request"),
    ],
)
def test_refusal(status: int, body: bytes, code: str) -> None:
    failure = refusal(status, body, PARAMS)
    assert failure.code == code
    assert "SECRET" not in failure.message
    assert (failure.retry_after_ms is not None) == (code == "model_loading")
    assert failure.param == ("messages" if code == "context_length_exceeded" else None)


def test_a_prompt_that_is_too_long_is_told_by_how_much() -> None:
    failure = refusal(400, TOO_LONG, PARAMS)
    assert "9000" in failure.message
    assert "8192" in failure.message


@pytest.mark.parametrize(("params", "param"), [({}, None), ({"messages": "prompt"}, "prompt"), ({"messages": "input", "x": "y"}, "input")])
def test_a_prompt_that_is_too_long_is_named_as_the_caller_named_it(params: dict[str, str], param: str | None) -> None:
    assert refusal(400, TOO_LONG, params).param == param


@pytest.mark.parametrize("body", [b'{"error":{"message":"\xff"}}', b'{"x":' + b"[" * 30_000])
def test_a_refusal_in_nonsense_is_still_one(body: bytes) -> None:
    assert refusal(400, body, PARAMS).code == "invalid_request"

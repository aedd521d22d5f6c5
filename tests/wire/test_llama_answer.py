"""llama.cpp's event streams on their way to a caller: edited alike however they are cut, with nothing of the text touched."""

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
from fallow.wire.llama_answer import StreamedAnswer, WholeAnswer, added, openai_usage, refusal
from fallow.wire.openai import CHAT
from fallow.wire.sse import DONE, EventCutter

PROMISE = settings(derandomize=True, deadline=None, max_examples=80)
META = {"created": 1, "id": "chatcmpl-x", "model": "m", "system_fingerprint": "b0", "object": "chat.completion.chunk"}
TEXT_META = {**META, "id": "cmpl-x", "object": "text_completion"}
TIMINGS = {"prompt_n": 35, "predicted_per_second": 17.5}
ROLE = {"role": "assistant", "content": None}


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


def stream(chunks: Iterable[bytes], *, include_usage: bool = False) -> tuple[bytes, StreamedAnswer]:
    answer = StreamedAnswer(include_usage=include_usage)
    return b"".join([answer.feed(chunk) for chunk in chunks]), answer


def whole(chunks: Iterable[bytes], *, chat: bool = True, choices: int = 1) -> tuple[dict[str, Any], WholeAnswer]:
    answer = WholeAnswer(chat=chat, choices=choices)
    for chunk in chunks:
        answer.feed(chunk)
    body: dict[str, Any] = json.loads(answer.body())
    return body, answer


def opened(out: bytes) -> list[dict[str, Any]]:
    """The events that a caller gets, without DONE, which must close them."""
    events = EventCutter().feed(out)
    assert b"".join(events) == out
    assert events[-1] == DONE
    assert DONE not in events[:-1]
    return [json.loads(one.removeprefix(b"data: ")) for one in events[:-1]]


# A whole stream in full, for people to read.
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


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_chat(include_usage: bool) -> None:
    out, answer = stream(CHAT_STREAM, include_usage=include_usage)
    wanted: list[dict[str, Any]] = [
        {"choices": [{"finish_reason": None, "index": 0, "delta": {"role": "assistant", "content": ""}}], **META},
        {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": "Once"}}], **META},
        {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": " upon"}}], **META},
        {"choices": [{"finish_reason": "length", "index": 0, "delta": {}}], **META},
    ]
    assert opened(out) == wanted + ([{"choices": [], **META, "usage": usage(2)}] if include_usage else [])
    assert answer.usage == Usage(prompt_tokens=35, output_tokens=2)
    assert answer.is_whole


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_completion(include_usage: bool) -> None:
    out, answer = stream(TEXT_STREAM, include_usage=include_usage)
    wanted: list[dict[str, Any]] = [
        {"choices": [{"text": " there", "index": 0, "logprobs": None, "finish_reason": None}], **TEXT_META},
        {"choices": [{"text": " was", "index": 0, "logprobs": None, "finish_reason": None}], **TEXT_META},
        {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}], **TEXT_META},
    ]
    assert opened(out) == wanted + ([{"choices": [], **TEXT_META, "usage": usage(2)}] if include_usage else [])
    assert answer.usage == Usage(prompt_tokens=35, output_tokens=2)


def test_a_whole_chat() -> None:
    body, answer = whole(CHAT_STREAM)
    message = {"role": "assistant", "content": "Once upon", "refusal": None}
    assert body == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "b0",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": usage(2),
    }
    assert answer.usage == Usage(prompt_tokens=35, output_tokens=2)


def test_a_whole_completion() -> None:
    body, _ = whole(TEXT_STREAM, chat=False)
    assert body == {
        "id": "cmpl-x",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "system_fingerprint": "b0",
        "choices": [{"text": " there was", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": usage(2),
    }


def test_reasoning_is_kept_apart() -> None:
    events = [role(0), delta(0, {"reasoning_content": "hm"}), delta(0, {"reasoning_content": "m"}), word(0, "Yes"), delta(0, {}, "stop")]
    body, _ = whole([*events, account(3), DONE])
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Yes", "refusal": None, "reasoning_content": "hmm"}
    out, _ = stream([*events, account(3), DONE])
    assert events[1] + events[2] in out


def test_an_answer_without_a_word() -> None:
    events = [progress(0, 0), role(0), delta(0, {}, "stop"), account(0), DONE]
    assert [one["choices"][0]["delta"] for one in opened(stream(events)[0])] == [{"role": "assistant", "content": ""}, {}]
    assert whole(events)[0]["choices"][0]["message"]["content"] == ""


def test_nothing_is_sent_before_the_first_word() -> None:
    answer = StreamedAnswer(include_usage=True)
    assert [answer.feed(one) for one in (progress(0, 0), progress(0, 20), progress(0, 35), role(0))] == [b""] * 4
    assert answer.feed(word(0, "a")).count(b"data: ") == 2
    assert answer.feed(role(0)) == b""  # said late, and dropped
    assert answer.feed(word(0, "b")) == word(0, "b")


NASTY = [
    'prompt_progress', '"prompt_progress":', '"prompt_progress":{}', '"usage":', '"usage":{"prompt_tokens":1}', '"timings":{}',
    '"delta":{"role":"assistant","content":null}', 'data: {"error":', 'data: [DONE]\n\n', '\n\n', '\\', '\\"', '"', '{"choices":[]}',
    '\\"usage\\":', 'é', '日本', '😀', '\u2028', '\x00', '\x7f', "",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_is_taken_for_something_else(text: str) -> None:
    events = [progress(0, 0), role(0), word(0, text), word(0, "."), delta(0, {}, "stop"), account(2), DONE]
    out, _ = stream(events, include_usage=True)
    assert word(0, text) + word(0, ".") in out
    assert out.count(word(0, text)) == 1
    assert whole(events)[0]["choices"][0]["message"]["content"] == text + "."
    events = [text_event(0, text), text_event(0, ".", "stop", usage=usage(2), timings=TIMINGS), DONE]
    assert stream(events)[0].startswith(text_event(0, text))
    assert whole(events, chat=False)[0]["choices"][0]["text"] == text + "."


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_no_text_in_an_event_that_is_rewritten_is_lost(text: str) -> None:
    out, _ = stream([text_event(0, text, "stop", usage=usage(2), timings=TIMINGS), DONE])
    assert [one["choices"][0]["text"] for one in opened(out)] == [text]


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
def test_a_streamed_chat_is_the_same_however_it_is_cut(
    choices: list[Choice], places: list[int], seed: int, include_usage: bool, repeats: int
) -> None:
    events = interleaved([chat_events(i, choice, repeats) for i, choice in enumerate(choices)], random.Random(seed))
    out, answer = stream(cut(b"".join(events), places), include_usage=include_usage)
    assert out == stream(events, include_usage=include_usage)[0]
    told = opened(out)
    for index, choice in enumerate(choices):
        mine = [one for one in told if one["choices"] and one["choices"][0]["index"] == index]
        assert [one["choices"][0]["delta"] for one in mine] == [
            {"role": "assistant", "content": ""},
            *({"content": text} for text in choice.words),
            {},
        ]
        assert [one["choices"][0]["finish_reason"] for one in mine][-1] == choice.finish
    accounts = [one["usage"] for one in told if "usage" in one]
    total = sum(len(choice.words) for choice in choices)
    assert [one["completion_tokens"] for one in accounts] == ([total] if include_usage else [])
    assert not any("timings" in one or "prompt_progress" in one for one in told)
    assert sum(not one["choices"] for one in told) == include_usage
    assert answer.is_whole
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (35, total)


@PROMISE
@given(some_choices, some_places, st.integers(0, 2**32), st.booleans(), st.integers(0, 3))
def test_a_streamed_completion_is_the_same_however_it_is_cut(
    choices: list[Choice], places: list[int], seed: int, include_usage: bool, repeats: int
) -> None:
    events = interleaved([text_events(i, choice, repeats) for i, choice in enumerate(choices)], random.Random(seed))
    out, answer = stream(cut(b"".join(events), places), include_usage=include_usage)
    assert out == stream(events, include_usage=include_usage)[0]
    told = opened(out)
    for index, choice in enumerate(choices):
        mine = [one["choices"][0] for one in told if one["choices"] and one["choices"][0]["index"] == index]
        assert [one["text"] for one in mine] == [*choice.words, ""]
        assert mine[-1]["finish_reason"] == choice.finish
    total = sum(len(choice.words) for choice in choices)
    assert [one["usage"]["completion_tokens"] for one in told if "usage" in one] == ([total] if include_usage else [])
    assert not any("timings" in one or "prompt_progress" in one for one in told)
    assert answer.usage is not None
    assert answer.usage.output_tokens == total


@PROMISE
@given(some_choices, some_places, st.integers(0, 2**32), st.booleans())
def test_a_whole_answer_is_the_same_however_it_is_cut(choices: list[Choice], places: list[int], seed: int, chat: bool) -> None:
    make = chat_events if chat else text_events
    events = interleaved([make(i, choice, 2) for i, choice in enumerate(choices)], random.Random(seed))
    body, answer = whole(cut(b"".join(events), places), chat=chat, choices=len(choices))
    assert body == whole(events, chat=chat, choices=len(choices))[0]
    texts = [choice["message"]["content"] if chat else choice["text"] for choice in body["choices"]]
    assert texts == ["".join(choice.words) for choice in choices]
    assert [choice["finish_reason"] for choice in body["choices"]] == [choice.finish for choice in choices]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(choices)))
    assert answer.usage is not None
    assert body["usage"] == openai_usage(answer.usage)
    assert answer.usage.output_tokens == sum(len(choice.words) for choice in choices)


@PROMISE
@given(some_choice, some_places, st.integers(0, 10**6))
def test_a_stream_that_breaks_off_is_never_called_whole(choice: Choice, places: list[int], end: int) -> None:
    data = b"".join([*chat_events(0, choice, 1), DONE])
    short = data[: end % len(data)]
    out, streamed = stream(cut(short, places))
    assert not streamed.is_whole
    assert DONE not in out
    with pytest.raises(EngineFailed, match="in the middle"):
        whole(cut(short, places))


def test_an_answer_without_its_last_event_was_cut_off() -> None:
    assert not stream(CHAT_STREAM[:-1])[1].is_whole
    with pytest.raises(EngineFailed, match="in the middle"):
        whole(CHAT_STREAM[:-1])


def test_a_stream_without_usage_is_not_a_whole_answer() -> None:
    with pytest.raises(EngineFailed):
        whole([role(0), word(0, "a"), delta(0, {}, "stop"), DONE])
    out, answer = stream([role(0), word(0, "a"), delta(0, {}, "stop"), DONE], include_usage=True)
    assert out.endswith(DONE)
    assert answer.usage is None


ERROR = event({"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}})


@pytest.mark.parametrize("before", [[], [progress(0, 0)], [role(0), word(0, "a")]])
def test_an_error_of_the_engine_ends_the_answer(before: list[bytes]) -> None:
    streamed, collected = StreamedAnswer(include_usage=True), WholeAnswer(chat=True, choices=1)
    for one in before:
        streamed.feed(one)
        collected.feed(one)
    for feed in (streamed.feed, collected.feed):
        with pytest.raises(EngineFailed, match="broke off") as caught:
            feed(ERROR)
        assert "Context" not in caught.value.message  # the engine's words may hold the prompt


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: {}\n\n",
        b'data: {"choices":{}}\n\n',
        b'data: {"choices":[{"index":"0"}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":5}}]}\n\n',
        b'data: {"choices":[{"index":0,"text":5}]}\n\n',
        b'data: {"choices":[{"index":1,"delta":{"content":"a"}}]}\n\n',
        b'data: {"choices":[{"index":-1,"delta":{"content":"a"}}]}\n\n',
        event({"choices": [], "usage": {"prompt_tokens": "many"}}),
    ],
)
def test_a_whole_answer_is_not_made_of_nonsense(bad: bytes) -> None:
    with pytest.raises(EngineFailed):
        WholeAnswer(chat=True, choices=1).feed(bad)


@pytest.mark.parametrize(
    "bad",
    [
        b'data: {"choices":[,"usage":{}}\n\n',
        b'data: {"choices":[],"usage":[]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":"many"}}\n\n',
        b'data: {"choices":5,"usage":{}}\n\n',
        b'data: ["usage":1]\n\n',
        b'{"choices":[],"usage":{}}\n\n',
        b'data: {"choices":5,"prompt_progress":{}}\n\n',
        b'data: {"prompt_progress":{}}\n\n',
    ],
)
def test_an_event_to_be_rewritten_must_be_readable(bad: bytes) -> None:
    with pytest.raises(EngineFailed):
        StreamedAnswer(include_usage=True).feed(bad)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}],"usage":{}}\n\n', id="not UTF-8"),
        pytest.param(b'data: {"choices":[],"usage":' + b"[" * 20_000 + b"\n\n", id="deep"),
        pytest.param(b'data: {"choices":[],"prompt_progress":{}}\n\n', id="progress of no choice"),
        pytest.param(b'data: {"choices":[{"delta":{}}],"prompt_progress":{}}\n\n', id="a choice without an index"),
    ],
)
def test_nonsense_of_any_kind_is_a_fault_of_the_engine(bad: bytes) -> None:
    with pytest.raises(EngineFailed):
        StreamedAnswer(include_usage=True).feed(bad)


@PROMISE
@given(
    st.sampled_from([CHAT_STREAM, TEXT_STREAM]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    some_places,
)
def test_a_damaged_stream_is_passed_on_or_a_fault_of_the_engine(
    events: list[bytes], changes: list[tuple[int, int]], places: list[int]
) -> None:
    data = bytearray(b"".join(events))
    for at, byte in changes:
        data[at % len(data)] = byte
    chunks = cut(bytes(data), places)
    with contextlib.suppress(EngineFailed):
        stream(chunks, include_usage=True)
    with contextlib.suppress(EngineFailed):
        whole(chunks, chat=events is CHAT_STREAM)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_comment_that_keeps_the_connection_alive_is_not_an_answer(at: int) -> None:
    events = [*CHAT_STREAM[:at], b":\n\n", *CHAT_STREAM[at:]]
    assert whole(events)[0] == whole(CHAT_STREAM)[0]


def test_a_comment_does_not_begin_a_streamed_answer() -> None:
    assert stream([progress(0, 0), b":\n\n"])[0] == b""


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


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, llama_error("exceed_context_size_error", n_prompt_tokens=9_000, n_ctx=8_192), "context_length_exceeded"),
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
    failure = refusal(CHAT, status, body)
    assert failure.code == code
    assert "SECRET" not in failure.message
    assert (failure.retry_after_ms is not None) == (code == "model_loading")
    assert failure.param == ("messages" if code == "context_length_exceeded" else None)


def test_a_prompt_that_is_too_long_is_told_by_how_much() -> None:
    failure = refusal(CHAT, 400, llama_error("exceed_context_size_error", n_prompt_tokens=9_000, n_ctx=8_192))
    assert "9000" in failure.message
    assert "8192" in failure.message


@pytest.mark.parametrize("body", [b'{"error":{"message":"\xff"}}', b'{"x":' + b"[" * 30_000])
def test_a_refusal_in_nonsense_is_still_one(body: bytes) -> None:
    assert refusal(CHAT, 400, body).code == "invalid_request"


@pytest.mark.parametrize(
    ("counted", "told"),
    [
        (Usage(), usage(0, 0, 0)),
        (Usage(prompt_tokens=10, cached_tokens=4, output_tokens=3), usage(3, 10, 4)),
    ],
)
def test_openai_usage(counted: Usage, told: dict[str, Any]) -> None:
    assert openai_usage(counted) == told

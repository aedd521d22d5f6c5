"""An answer that broke off, read back and gone on with, is byte for byte what it would have been."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.model.messages import PIECES_MAX
from fallow.model.receipt import Usage
from fallow.wire import delivered, messages_api, openai, responses_answer
from fallow.wire.chat_answer import ChatEndpoint
from fallow.wire.completions_api import CompletionsEndpoint
from fallow.wire.generation import Called, Ended, Endpoint, Event, Reasoning, Stamp, Text, ToolCall

PROMISE = settings(max_examples=60)
STAMP = Stamp(id="0123", created_s=1_700_000_000, model="tiny")
USAGE = Usage(prompt_tokens=5, output_tokens=9)
ASKED: dict[str, tuple[Callable[[bytes, Stamp], Endpoint], dict[str, object]]] = {
    openai.CHAT: (ChatEndpoint, {"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": True}}),
    openai.COMPLETIONS: (CompletionsEndpoint, {"prompt": "hi"}),
    openai.RESPONSES: (responses_answer.ResponsesEndpoint, {"input": "hi"}),
    openai.MESSAGES: (messages_api.MessagesEndpoint, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 99}),
}
some_texts = st.lists(st.text(min_size=1, max_size=8).filter(lambda text: text.encode("utf-8", "ignore").decode() == text), max_size=12)


def endpoint(path: str) -> Endpoint:
    make, fields = ASKED[path]
    return make(msgspec.json.encode({"model": "tiny", "stream": True, **fields}), STAMP)


def written(one: Endpoint, texts: list[str]) -> bytes:
    return b"".join(one.write(Text(0, text)) for text in texts)


@PROMISE
@given(st.sampled_from(sorted(ASKED)), some_texts, st.integers(0, 12))
def test_what_is_read_back_and_gone_on_with_is_the_whole(path: str, texts: list[str], cut: int) -> None:
    whole = endpoint(path)
    said = whole.begin() + written(whole, texts) + whole.write(Ended(0, "stop")) + whole.end(USAGE)

    first = endpoint(path)
    before = first.begin() + written(first, texts[:cut])
    found = delivered.pieces(path, [before[at : at + 7] for at in range(0, len(before), 7)])
    assert found == tuple(texts[:cut])

    second = endpoint(path)  # as a node goes on: it tells nobody what was told
    second.begin()
    written(second, list(found))
    after = written(second, texts[cut:]) + second.write(Ended(0, "stop")) + second.end(USAGE)
    assert before + after == said


@pytest.mark.parametrize("path", sorted(ASKED))
@pytest.mark.parametrize(
    "event",
    [
        Reasoning(0, "hm"),
        Called(0, 0, ToolCall(id="call_1", name="f", arguments="{}")),
        Ended(0, "length"),
    ],
    ids=["thought", "call", "end"],
)
def test_what_is_no_plain_text_cannot_be_gone_on_with(path: str, event: Event) -> None:
    one = endpoint(path)
    data = one.begin() + written(one, ["Once"]) + one.write(event)
    told = one.write(event) != b"" or isinstance(event, Ended)
    assert delivered.pieces(path, [data]) == (None if told else ("Once",))  # what isn't told needn't be gone on with


@pytest.mark.parametrize("path", sorted(ASKED))
def test_half_an_event_cannot_be_gone_on_with(path: str) -> None:
    one = endpoint(path)
    data = one.begin() + written(one, ["Once"])
    assert delivered.pieces(path, [data]) == ("Once",)
    assert delivered.pieces(path, [data, data[-20:-1]]) is None


def test_comments_are_skipped() -> None:
    one = endpoint(openai.CHAT)
    data = one.begin() + written(one, ["Once"]) + b": fallow-moved to node-b\n\n" + written(one, [" upon"])
    assert delivered.pieces(openai.CHAT, [data]) == ("Once", " upon")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
def test_other_answers_are_not_streams_of_text(path: str) -> None:
    assert delivered.pieces(path, [b"{}"]) is None


def test_a_second_choice_cannot_be_gone_on_with() -> None:
    event = b'data: {"choices":[{"index":1,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
    assert delivered.pieces(openai.CHAT, [event]) is None


@pytest.mark.parametrize(("texts", "fits"), [(["x"] * PIECES_MAX, True), (["x"] * (PIECES_MAX + 1), False), (["é" * 32_769], False)])
def test_what_is_too_long_cannot_be_gone_on_with(texts: list[str], fits: bool) -> None:
    one = endpoint(openai.CHAT)
    assert (delivered.pieces(openai.CHAT, [written(one, texts)]) is not None) is fits


@PROMISE
@given(st.sampled_from(sorted(ASKED)), st.lists(st.binary(max_size=40), max_size=4))
def test_anything_else_is_none_and_no_fault(path: str, chunks: list[bytes]) -> None:
    found = delivered.pieces(path, chunks)
    assert found is None or all(isinstance(piece, str) for piece in found)

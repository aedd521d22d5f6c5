"""A machine goes away in the middle of a sentence, and the caller reads on: real engines, every text endpoint, the vendors' own clients."""

import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import anthropic
import openai
import pytest
from running import MODEL, Apart, Running, Service, fallow, node_id_of, until, wait_ready

TOKENS = 40
BREAK_AT = 15
STORY = "Write a story about a fox, a river and the number {number}."


class Told(NamedTuple):
    """A stream as its client saw it."""

    pieces: list[str]
    ids: set[str]
    output_tokens: int | None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Strike = Callable[[str], None]


def _never(node_id: str) -> None: ...


def chat(service: Service, prompt: str, strike: Strike) -> Told:
    pieces: list[str] = []
    ids, tokens = set(), None
    with service.client() as client:
        messages: Any = [{"role": "system", "content": prompt[::-1]}, {"role": "user", "content": prompt}]
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=TOKENS, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        for event in stream:
            ids.add(event.id)
            tokens = event.usage.completion_tokens if event.usage else tokens
            pieces += [choice.delta.content for choice in event.choices if choice.delta.content]
            if len(pieces) == BREAK_AT and event.choices:
                strike(stream.response.headers["fallow-node"])
    return Told(pieces, ids, tokens)


def completion(service: Service, _prompt: str, strike: Strike) -> Told:
    pieces: list[str] = []
    ids = set()
    with service.client() as client:
        count = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"
        stream = client.completions.create(model=MODEL, prompt=count, max_tokens=TOKENS, temperature=0, stream=True)
        for event in stream:
            ids.add(event.id)
            pieces += [choice.text for choice in event.choices if choice.text]
            if len(pieces) == BREAK_AT:
                strike(stream.response.headers["fallow-node"])
    return Told(pieces, ids, None)


def response(service: Service, prompt: str, strike: Strike) -> Told:
    pieces: list[str] = []
    ids: set[str] = set()
    numbers: list[int] = []
    tokens = None
    with service.client() as client:
        stream = client.responses.create(
            model=MODEL, input=prompt, instructions=prompt[::-1], max_output_tokens=TOKENS, temperature=0, stream=True
        )
        for event in stream:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                ids.add(event.item_id)
                pieces.append(event.delta)
                if len(pieces) == BREAK_AT:
                    strike(stream.response.headers["fallow-node"])
            if event.type in ("response.completed", "response.incomplete"):
                assert event.response.output_text == "".join(pieces)
                tokens = event.response.usage.output_tokens if event.response.usage else None
    assert numbers == list(range(len(numbers)))
    return Told(pieces, ids, tokens)


def message(service: Service, prompt: str, strike: Strike) -> Told:
    pieces: list[str] = []
    ids: set[str] = set()
    tokens = None
    with anthropic.Anthropic(base_url=service.root, api_key=service.key, max_retries=0) as client:
        stream = client.messages.create(
            model=MODEL,
            system=prompt[::-1],
            messages=[{"role": "user", "content": prompt}],
            max_tokens=TOKENS,
            extra_body={"temperature": 0},
            stream=True,
        )
        for event in stream:
            if event.type == "message_start":
                ids.add(event.message.id)
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                pieces.append(event.delta.text)
                if len(pieces) == BREAK_AT:
                    strike(stream.response.headers["fallow-node"])
            if event.type == "message_delta":
                tokens = event.usage.output_tokens
    return Told(pieces, ids, tokens)


@pytest.mark.parametrize("how", ["the engine dies", "the owner comes back, and then the node dies"])
def test_who_reads_an_answer_reads_on(apart: Apart, how: str) -> None:
    """A greedy answer is, to the letter, what it would have been."""
    service = apart.start_hub_and_gateway()
    lenders = [apart.lend(name, "--threads", "1") for name in ("node1", "node2")]
    wait_ready(service, 2)
    nodes = {node_id_of(one.data): one for one in lenders}

    def strike(node_id: str) -> None:
        struck.append(node_id)
        node: Running = nodes[node_id]
        if how == "the engine dies":
            node.engine().kill()
        elif number == 0:
            pause(node)
        else:
            node.process.send_signal(signal.SIGKILL)

    for number, way in enumerate([chat, completion, response, message] if how == "the engine dies" else [chat, chat]):
        struck: list[str] = []
        prompt = STORY.format(number=number)
        until(lambda: list(service.readiness().values()).count("ready") == 2, what="both nodes")
        whole = way(service, prompt, _never)
        moved = way(service, prompt, strike)
        assert struck, "nothing broke"
        assert moved.text == whole.text
        assert len(moved.ids) == 1
        assert moved.output_tokens == whole.output_tokens
        if how != "the engine dies" and number == 0:
            assert fallow("resume", "--data", str(nodes[struck[0]].data)).returncode == 0


def pause(node: Running) -> None:
    """The owner says so."""
    assert fallow("pause", "--data", str(node.data)).returncode == 0


def test_a_stream_that_nobody_can_go_on_with_says_so(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    lenders = [apart.lend(name, "--threads", "1") for name in ("node1", "node2")]
    wait_ready(service, 2)
    engines = {node_id_of(one.data): one.engine() for one in lenders}  # looked up before: a short answer is soon over
    with service.client() as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count to a hundred."}],
            max_tokens=200,
            temperature=0,
            stream=True,
            logprobs=True,
        )
        read = [next(stream) for _ in range(5)]
        engines[stream.response.headers["fallow-node"]].kill()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert read
    assert caught.value.code == "stream_interrupted"

"""How a node goes on with another one's answer: read back in small steps for exactness, and as attached servers of each kind like it."""

import itertools
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from fallow.apps.node.continuing import ContinuedAnswer, continued
from fallow.apps.node.retracing import RETRACED_TOKENS_MAX, STEP_TOKENS, retrace, wants
from fallow.apps.node.served import Past
from fallow.model.errors import CannotContinue, EngineFailed
from fallow.model.messages import Head
from fallow.wire.generation import Generation, Sampling, Turn
from fallow.wire.openai import CHAT, COMPLETIONS

pytestmark = pytest.mark.anyio
GREEDY = Generation(turns=(Turn(role="user", text="hi"),), sampling=Sampling(temperature=0.0), delivered=("Once", " upon"))


class Engine:
    """An engine whose tokens are characters; it remembers what it read."""

    def __init__(self, *, status: int = 200, odd: bool = False) -> None:
        self.read: list[dict[str, Any]] = []
        self.status = status
        self.odd = odd

    async def fetch(self, path: str, body: bytes) -> tuple[int, bytes]:
        fields = msgspec.json.decode(body)
        if path == "/apply-template":
            text = "".join(f"<{one['role']}>{one['content']}" for one in fields["messages"])
            return 200, msgspec.json.encode({"prompt": text})
        if path == "/tokenize":
            tokens = [ord(character) for character in fields["content"]]
            return 200, msgspec.json.encode({"tokens": [len(tokens), *tokens] if self.odd else tokens})
        self.read.append(fields)
        return self.status, b"{}"


@pytest.mark.parametrize(
    ("said", "temperature", "wanted"), [((), 0.0, False), (("a",), 0.0, True), (("a",), 0.1, False), (("a",), None, False)]
)
def test_only_greedy_answers_are_retraced(said: tuple[str, ...], temperature: float | None, wanted: bool) -> None:
    assert wants(replace(GREEDY, delivered=said, sampling=Sampling(temperature=temperature))) is wanted


@pytest.mark.parametrize("may_reuse", [False, True])
async def test_the_prompt_is_read_at_once_and_the_answer_in_small_steps(may_reuse: bool) -> None:
    engine = Engine()
    assert await retrace(GREEDY, GREEDY.turns, engine.fetch, slot=3, may_reuse=may_reuse)
    prompt, whole = len("<user>hi"), len("<user>hi<assistant>Once upon")
    lengths = [len(one["prompt"]) for one in engine.read]
    assert lengths[0] == prompt
    assert lengths[-1] == whole - 1  # the last token is read by the request that writes on
    assert all(0 < after - before <= STEP_TOKENS for before, after in itertools.pairwise(lengths))
    assert [one["cache_prompt"] for one in engine.read] == [may_reuse] + [True] * (len(lengths) - 1)
    assert {(one["id_slot"], one["n_predict"]) for one in engine.read} == {(3, 0)}


@pytest.mark.parametrize("prompt", ["Once", (5, 6, 7)])
async def test_a_text_is_retraced_like_a_conversation(prompt: str | tuple[int, ...]) -> None:
    engine = Engine()
    assert await retrace(replace(GREEDY, turns=(), prompts=(prompt,)), (), engine.fetch, slot=0, may_reuse=False)
    assert len(engine.read[0]["prompt"]) == len(prompt)
    assert engine.read[-1]["prompt"][: len(prompt)] == [*map(ord, prompt)] if isinstance(prompt, str) else list(prompt)


@pytest.mark.parametrize(
    ("engine", "generation"),
    [
        (Engine(odd=True), GREEDY),  # the prompt's tokens aren't the beginning of the whole's
        (Engine(), replace(GREEDY, delivered=("x" * (RETRACED_TOKENS_MAX + 1),))),
        (Engine(status=400), GREEDY),
    ],
    ids=["other tokens", "too long", "refused"],
)
async def test_what_cannot_be_retraced_is_read_as_usual(engine: Engine, generation: Generation) -> None:
    assert not await retrace(generation, generation.turns, engine.fetch, slot=0, may_reuse=False)


async def test_an_engine_that_talks_nonsense() -> None:
    async def fetch(path: str, body: bytes) -> tuple[int, bytes]:
        return 200, b"nonsense"

    with pytest.raises(EngineFailed):
        await retrace(GREEDY, GREEDY.turns, fetch, slot=0, may_reuse=False)


# attached servers
ASKED = {"model": "m", "stream": True, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
PAST = Past(delivered=("Once", " upon"))


@pytest.mark.parametrize(("owner", "more"), [("llamacpp", {}), ("vllm", {"continue_final_message": True, "add_generation_prompt": False})])
def test_each_kind_of_server_is_told_in_its_way(owner: str, more: dict[str, bool]) -> None:
    body = msgspec.json.decode(continued(CHAT, msgspec.json.encode(ASKED), PAST, owner))
    said = {"role": "assistant", "content": "Once upon"}
    assert body == {**ASKED, "messages": [*ASKED["messages"], said], "max_tokens": 8, **more}  # type: ignore[misc]


def test_words_put_into_its_mouth_are_gone_on_with() -> None:
    asked = {**ASKED, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure: "}]}
    body = msgspec.json.decode(continued(CHAT, msgspec.json.encode(asked), PAST, "llamacpp"))
    assert body["messages"][-1] == {"role": "assistant", "content": "Sure: Once upon"}


def test_nothing_was_said_yet() -> None:
    assert msgspec.json.decode(continued(CHAT, msgspec.json.encode(ASKED), Past(delivered=()), "vllm")) == ASKED


@pytest.mark.parametrize(
    ("path", "owner", "fields"),
    [
        (CHAT, "", {}),
        (CHAT, "openai", {}),
        (COMPLETIONS, "llamacpp", {}),
        (CHAT, "llamacpp", {"stream": False}),
        (CHAT, "llamacpp", {"n": 2}),
        (CHAT, "llamacpp", {"logprobs": True}),
        (CHAT, "llamacpp", {"tools": [{"type": "function"}]}),
        (CHAT, "llamacpp", {"response_format": {"type": "json_object"}}),
        (CHAT, "llamacpp", {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}),
    ],
)
def test_what_a_server_cannot_go_on_with(path: str, owner: str, fields: dict[str, Any]) -> None:
    with pytest.raises(CannotContinue):
        continued(path, msgspec.json.encode({**ASKED, **fields}), PAST, owner)


class Answered:
    """An answer of an attached server."""

    head = Head(status=200, content_type="text/event-stream", engine_us=0)
    is_complete = False

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    async def body(self) -> Any:
        for chunk in self._chunks:
            yield chunk


async def test_the_role_is_not_told_again_and_what_was_written_before_is_counted() -> None:
    opening = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    text = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":" a"},"finish_reason":null}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    data = opening + text + usage + b"data: [DONE]\n\n"
    answer = ContinuedAnswer(Answered(data[:30], data[30:]), Answered.head, PAST)  # type: ignore[arg-type]
    found = b"".join([piece.data async for piece in answer.pieces()])
    assert found == data.removeprefix(opening)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (5, 5)

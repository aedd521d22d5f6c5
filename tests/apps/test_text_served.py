"""Models that share a node's memory, and a text model asked through all of its endpoints, with engines played by the test."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from vendor import check, events

from fallow.apps.node import room as room_module
from fallow.apps.node.engine_served import Facts
from fallow.apps.node.room import Room
from fallow.apps.node.served import EVENTS, JSON, Answer, Piece, Refused
from fallow.apps.node.text_served import TEXT_PATHS, TextServed
from fallow.core.slots import Asker
from fallow.model.errors import EngineFailed, EngineStalled, FallowError, InvalidRequest, StartFailed
from fallow.model.ids import KeyId, OrgId
from fallow.model.messages import Head
from fallow.model.receipt import Usage
from fallow.ports import EngineAnswer
from fallow.wire import openai
from fallow.wire.sse import DONE

pytestmark = pytest.mark.anyio

LONG_S = 5.0
"""A wait that ends before its time in a build that works."""
READY_IN_MS = 7_400
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    openai.CHAT: {"model": "a", "messages": HELLO},
    openai.COMPLETIONS: {"model": "a", "prompt": "Hello"},
    openai.RESPONSES: {"model": "a", "input": "Hello"},
    openai.RESPONSES_COUNT: {"model": "a", "input": "Hello"},
    openai.MESSAGES: {"model": "a", "max_tokens": 9, "messages": HELLO},
    openai.MESSAGES_COUNT: {"model": "a", "messages": HELLO},
}
WRITERS = [openai.CHAT, openai.COMPLETIONS, openai.RESPONSES, openai.MESSAGES]
COUNTERS = [openai.RESPONSES_COUNT, openai.MESSAGES_COUNT]


class FakeClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.ms = 1_000

    def now_ms(self) -> int:
        return self.ms

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.ms


class FakeSupervisor:
    """An engine's life as the test tells it: `loaded()` and `ended()` are up to the test."""

    def __init__(self) -> None:
        self.phase = "cold"
        self.wanted = 0
        self.left = 0
        self.running = 0
        self.moves = 0
        self.has_stalled = False
        self.hopeless = False
        self._ready = asyncio.Event()

    @property
    def is_present(self) -> bool:
        return self.phase != "cold"

    @property
    def is_leaving(self) -> bool:
        return self.phase == "leaving"

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def want(self) -> None:
        self.wanted += 1
        if self.phase == "cold":
            self.phase = "loading"

    def leave(self) -> None:
        self.left += 1
        self.phase = "leaving"
        self._ready.clear()

    def loaded(self) -> None:
        assert self.phase == "loading", "it was not started"
        self.phase = "ready"
        self._ready.set()

    def ended(self) -> None:
        assert self.phase == "leaving", "it was not told to leave"
        self.phase = "cold"

    def moved(self) -> None:
        self.moves += 1

    async def ready(self, within_s: float) -> bool:
        self.want()
        async with asyncio.timeout(within_s):
            await self._ready.wait()
        return True

    def readiness(self) -> str:
        return "cold" if self.phase == "leaving" else self.phase

    def is_hopeless(self) -> bool:
        return self.hopeless

    def ready_in_ms(self) -> int:
        return 0 if self.is_ready else READY_IN_MS

    def progress(self) -> float | None:
        return 0.25 if self.phase == "loading" else None


class FakeAnswer:
    """One answer; without `ends` it never does."""

    def __init__(self, chunks: Sequence[bytes], *, status: int = 200, ends: bool = True) -> None:
        self.head = Head(status=status, content_type=JSON, engine_us=0)
        self._chunks = chunks
        self._ends = ends

    async def body(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk
        if not self._ends:
            await asyncio.Event().wait()


class FakeEngine:
    """Answers in turn."""

    def __init__(self) -> None:
        self.answers: list[FakeAnswer] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.left = 0
        self.on_ask: Callable[[], None] = lambda: None

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[EngineAnswer]:
        self.asked.append((path, json.loads(body)))
        self.on_ask()
        return self._answering(self.answers.pop(0))

    @contextlib.asynccontextmanager
    async def _answering(self, answer: FakeAnswer) -> AsyncIterator[EngineAnswer]:
        try:
            yield answer
        finally:
            self.left += 1


class Lent:
    """A model that is lent, and all that the test plays of it."""

    def __init__(self, name: str, room: Room, clock: FakeClock, *, memory: int = 4, load_wait_s: float = LONG_S) -> None:
        facts = Facts(model=name, digest="d", context_tokens=64, slots=2, memory_bytes=memory, paths=TEXT_PATHS, control_tokens=("<eos>",))
        self.supervisor = FakeSupervisor()
        self.engine = FakeEngine()
        self.asker = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))
        supervisor: Any = self.supervisor
        self.served = TextServed(facts, supervisor=supervisor, engine=self.engine, room=room, clock=clock, load_wait_s=load_wait_s)

    async def is_in(self, at_ms: int, clock: FakeClock) -> None:
        """Bring it into memory, used then."""
        clock.ms = at_ms
        task = asyncio.ensure_future(self.served.ready())
        await turns()
        self.supervisor.loaded()
        assert await task is None

    def asking(self, path: str, **fields: Any) -> contextlib.AbstractAsyncContextManager[Answer]:
        return self.served.ask(path, json.dumps({**BODIES[path], **fields}).encode(), self.asker)


async def turns() -> None:
    """Let everything that is ready to run do so."""
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "POLL_S", 0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def room() -> Room:
    return Room(10)


@pytest.fixture
async def lent(room: Room, clock: FakeClock) -> Lent:
    """One model that is ready."""
    one = Lent("a", room, clock)
    await one.is_in(1, clock)
    return one


# memory
async def test_a_model_is_loaded_when_it_is_called_for(room: Room, clock: FakeClock) -> None:
    a = Lent("a", room, clock)
    await turns()
    assert a.supervisor.phase == "cold"
    waiting = [asyncio.ensure_future(a.served.ready()) for _ in range(3)]
    await turns()
    assert a.supervisor.phase == "loading"
    assert not any(task.done() for task in waiting)
    a.supervisor.loaded()
    assert await asyncio.gather(*waiting) == [None] * 3
    before = a.supervisor.wanted
    assert await a.served.ready(0) is None, "it is there"
    assert a.supervisor.wanted == before


async def test_models_that_fit_are_in_memory_together(room: Room, clock: FakeClock) -> None:
    a, b = Lent("a", room, clock, memory=5), Lent("b", room, clock, memory=5)
    await a.is_in(1, clock)
    await b.is_in(2, clock)
    assert (a.supervisor.phase, b.supervisor.phase) == ("ready", "ready")


@pytest.mark.parametrize("order", ["ab", "ba"])
async def test_the_least_recently_used_leaves(room: Room, clock: FakeClock, order: str) -> None:
    models = {name: Lent(name, room, clock) for name in "abc"}
    for at, name in enumerate(order):
        await models[name].is_in(10 * (at + 1), clock)
    task = asyncio.ensure_future(models["c"].served.ready())
    await turns()
    first, second = models[order[0]].supervisor, models[order[1]].supervisor
    assert (first.phase, second.phase) == ("leaving", "ready")
    assert models["c"].supervisor.wanted == 0, "there is no room before it has gone"
    first.ended()
    await turns()
    models["c"].supervisor.loaded()
    assert await task is None
    assert (first.left, second.left) == (1, 0)


@pytest.mark.parametrize("by", ["asking whether it is ready", "a call's end"])
async def test_use_counts_from_a_calls_start_and_end(room: Room, clock: FakeClock, by: str) -> None:
    a, b, c = (Lent(name, room, clock) for name in "abc")
    await a.is_in(10, clock)
    async with a.served.asked():
        await b.is_in(20, clock)
        clock.ms = 30
        if by == "asking whether it is ready":
            assert await a.served.ready() is None
            clock.ms = 5
    task = asyncio.ensure_future(c.served.ready())
    await turns()
    assert c.supervisor.wanted == 0
    assert b.supervisor.phase == ("leaving" if by == "a call's end" else "ready")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_as_many_leave_as_must(room: Room, clock: FakeClock) -> None:
    a, b, c = Lent("a", room, clock), Lent("b", room, clock), Lent("c", room, clock, memory=9)
    await a.is_in(10, clock)
    await b.is_in(20, clock)
    task = asyncio.ensure_future(c.served.ready())
    await turns()
    assert (a.supervisor.phase, b.supervisor.phase) == ("leaving", "leaving")
    a.supervisor.ended()
    await turns()
    assert c.supervisor.wanted == 0
    b.supervisor.ended()
    await turns()
    c.supervisor.loaded()
    assert await task is None


async def test_a_model_with_calls_never_leaves(room: Room, clock: FakeClock) -> None:
    a, b, c = (Lent(name, room, clock) for name in "abc")
    await a.is_in(10, clock)
    await b.is_in(20, clock)
    a.served.calls = 1
    task = asyncio.ensure_future(c.served.ready())
    await turns()
    assert (a.supervisor.phase, b.supervisor.phase) == ("ready", "leaving"), "the idle one leaves, though it was used later"
    b.supervisor.ended()
    await turns()
    c.supervisor.loaded()
    assert await task is None


async def test_who_finds_no_room_waits_for_calls_to_end(room: Room, clock: FakeClock) -> None:
    a, b = Lent("a", room, clock, memory=6), Lent("b", room, clock, memory=6)
    await a.is_in(10, clock)
    a.served.calls = 1
    failure = await b.served.ready(0.01)
    assert failure is not None
    assert failure.code == "model_loading"
    assert "memory that a uses" in failure.message
    assert "Prefer: wait=" in failure.message
    assert (failure.retry_after_ms, failure.progress) == (READY_IN_MS, 0.0)
    assert (a.supervisor.phase, b.supervisor.phase) == ("ready", "cold")
    task = asyncio.ensure_future(b.served.ready())
    await turns()
    assert not task.done()
    a.served.calls = 0
    await turns()
    a.supervisor.ended()
    await turns()
    b.supervisor.loaded()
    assert await task is None


async def test_a_model_that_is_leaving_comes_back(room: Room, clock: FakeClock) -> None:
    a, b = Lent("a", room, clock, memory=6), Lent("b", room, clock, memory=6)
    await a.is_in(10, clock)
    first = asyncio.ensure_future(b.served.ready())
    b.served.calls = 1
    await turns()
    again = asyncio.ensure_future(a.served.ready())
    a.served.calls = 1
    await turns()
    a.supervisor.ended()
    await turns()
    assert "cold" in (a.supervisor.phase, b.supervisor.phase), "there is room for one"
    in_first = b if b.supervisor.phase == "loading" else a
    in_first.supervisor.loaded()
    await turns()
    in_first.served.calls = 0
    await turns()
    in_first.supervisor.ended()
    await turns()
    other = a if in_first is b else b
    other.supervisor.loaded()
    assert [await first, await again] == [None, None]


async def test_one_that_never_fits_is_not_lent(clock: FakeClock) -> None:
    room = Room(3 * 2**20)
    with pytest.raises(StartFailed, match="big needs 5 MB, the limit is 3 MB") as caught:
        Lent("big", room, clock, memory=5 * 2**20)
    assert "memory_gb" in caught.value.message


# waiting
@pytest.mark.parametrize(("own", "asked"), [(0.01, None), (LONG_S, 0.01), (LONG_S, 0.0), (0.0, None)])
async def test_the_wait_is_bounded_and_the_load_goes_on(room: Room, clock: FakeClock, own: float, asked: float | None) -> None:
    a = Lent("a", room, clock, load_wait_s=own)
    failure = await a.served.ready(asked)
    assert failure is not None
    assert failure.code == "model_loading"
    assert "ready in about 7 s" in failure.message
    assert "Prefer: wait=" in failure.message
    assert (failure.retry_after_ms, failure.progress) == (READY_IN_MS, 0.25)
    assert a.supervisor.phase == "loading"
    a.supervisor.loaded()
    assert await a.served.ready(asked) is None


@pytest.mark.parametrize("asked", [LONG_S, None])
async def test_who_waits_long_enough_gets_it(room: Room, clock: FakeClock, asked: float | None) -> None:
    a = Lent("a", room, clock, load_wait_s=LONG_S if asked is None else 0)
    task = asyncio.ensure_future(a.served.ready(asked))
    await turns()
    a.supervisor.loaded()
    assert await task is None


async def test_an_engine_that_never_loads_is_said_to_be_broken(room: Room, clock: FakeClock) -> None:
    a = Lent("a", room, clock, load_wait_s=0)
    a.supervisor.hopeless = True
    failure = await a.served.ready()
    assert failure is not None
    assert failure.code == "engine_failed"


async def test_load(room: Room, clock: FakeClock) -> None:
    a = Lent("a", room, clock)
    cold = a.served.load(running=0)
    assert (cold.model, cold.readiness, cold.progress, cold.ready_in_ms) == ("a", "cold", None, READY_IN_MS)
    a.supervisor.want()
    loading = a.served.load(running=1)
    assert (loading.readiness, loading.progress, loading.slots_free) == ("loading", 0.25, 1)
    a.supervisor.loaded()
    assert (a.served.load(running=3).readiness, a.served.load(running=3).waiting) == ("ready", 1)


# stalling
async def failing(lent: Lent, error: FallowError) -> None:
    async with lent.served.asked():
        assert lent.supervisor.running == 1
        raise error


@pytest.mark.parametrize(("stalled", "kind"), [(True, EngineStalled), (False, EngineFailed)])
async def test_a_failure_of_an_engine_that_stalled_says_so(lent: Lent, stalled: bool, kind: type[FallowError]) -> None:
    lent.supervisor.has_stalled = stalled
    with pytest.raises(kind):
        await failing(lent, EngineFailed("it broke off"))
    assert lent.supervisor.running == 0


async def test_other_failures_stay_what_they_are(lent: Lent) -> None:
    lent.supervisor.has_stalled = True
    with pytest.raises(InvalidRequest):
        await failing(lent, InvalidRequest("x"))
    assert lent.supervisor.running == 0


# requests
async def test_what_cannot_be_answered_is_refused_before_anything_loads(room: Room, clock: FakeClock) -> None:
    a = Lent("a", room, clock)
    for path in TEXT_PATHS:
        for body in (b"", b"{", b"{}", b'{"model":"a","n":0}'):
            with pytest.raises(InvalidRequest):
                a.served.ask(path, body, a.asker)
    for path in ("/v1/embeddings", "/slots", "", "/v1/chat/completions/"):
        with pytest.raises(InvalidRequest, match="does not answer"):
            a.served.ask(path, json.dumps(BODIES[openai.CHAT]).encode(), a.asker)
    bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    with pytest.raises(InvalidRequest) as caught:
        a.asking(openai.CHAT, response_format=bad)
    assert caught.value.param == "response_format.json_schema.schema"
    await turns()
    assert (a.supervisor.phase, a.supervisor.wanted, a.engine.asked) == ("cold", 0, [])


@pytest.mark.parametrize("path", sorted(TEXT_PATHS))
async def test_what_can_be_answered_asks_nothing_before_its_turn(room: Room, clock: FakeClock, path: str) -> None:
    a = Lent("a", room, clock)
    a.asking(path)
    await turns()
    assert (a.supervisor.phase, a.supervisor.running, a.engine.asked) == ("cold", 0, [])


# answers
def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def says(path: str, *words: str) -> list[bytes]:
    """An engine's answer, as its endpoint for chats or the one for completions writes it."""
    plain = path == openai.COMPLETIONS
    pieces = [event({"choices": [{"index": 0, "text": word} if plain else {"index": 0, "delta": {"content": word}}]}) for word in words]
    end = event({"choices": [{"index": 0, "finish_reason": "stop"}]})
    return [*pieces, end, event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(words)}}), DONE]


async def pieces_of(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer.pieces()]


@pytest.mark.parametrize("path", WRITERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_endpoint_answers_in_its_own_form(lent: Lent, path: str, stream: bool) -> None:
    lent.engine.answers = [FakeAnswer(says(path, "Hel", "lo"))]
    async with lent.asking(path, stream=stream) as answer:
        head = answer.head()
        assert (head.status, head.content_type) == (200, EVENTS if stream else JSON)
        assert answer.usage is None, "nobody knows it yet"
        pieces = await pieces_of(answer)
        assert answer.usage == Usage(prompt_tokens=3, output_tokens=2)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) == (4 if stream else 1), "a piece for each word, the end of the choice, and what closes the answer"
    data = b"".join(piece.data for piece in pieces)
    assert b"Hello" in data if not stream else b'"Hel"' in data
    assert lent.engine.asked[0][0] == (openai.COMPLETIONS if path == openai.COMPLETIONS else openai.CHAT)
    assert (lent.engine.left, lent.supervisor.running) == (1, 0)


@pytest.mark.parametrize("path", WRITERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_still_knew_of_the_prompt_is_counted(lent: Lent, path: str, stream: bool) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 7}}
    lent.engine.answers = [FakeAnswer([*says(path, "Hi")[:-2], event({"choices": [], "usage": usage}), DONE])]
    async with lent.asking(path, stream=stream) as answer:
        await pieces_of(answer)
        assert answer.usage == Usage(prompt_tokens=9, cached_tokens=7, output_tokens=1)


async def test_a_model_that_was_away_remembers_nothing(lent: Lent, clock: FakeClock) -> None:
    async def write() -> None:
        lent.engine.answers = [FakeAnswer(says(openai.CHAT, "Hi"))]
        async with lent.asking(openai.CHAT) as answer:
            await pieces_of(answer)

    await write()
    await write()
    lent.served.leave()
    lent.supervisor.ended()
    await lent.is_in(9, clock)
    await write()
    assert [(one["id_slot"], one["cache_prompt"]) for _, one in lent.engine.asked] == [(0, False), (0, True), (0, False)]


async def test_answers_are_stamped(lent: Lent, clock: FakeClock) -> None:
    ids = []
    for _ in range(2):
        clock.ms = 5_000
        lent.engine.answers = [FakeAnswer(says(openai.CHAT, "Hi"))]
        async with lent.asking(openai.CHAT, model="its alias") as answer:
            body = json.loads((await pieces_of(answer))[0].data)
        check("openai", "CreateChatCompletionResponse", body)
        assert (body["model"], body["created"]) == ("a", 1_700_000_005), "the model is the one that answers"
        ids.append(body["id"])
    assert len(set(ids)) == 2


async def test_a_stream_begins_once(lent: Lent) -> None:
    lent.engine.answers = [FakeAnswer(says(openai.CHAT, "Hel", "lo"))]
    async with lent.asking(openai.CHAT, stream=True) as answer:
        data = b"".join(piece.data for piece in await pieces_of(answer))
    roles = [one for _, one in events(data) if one != "[DONE]" and "role" in one["choices"][0]["delta"]]
    assert len(roles) == 1
    assert events(data)[-1] == ("", "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_models_own_control_tokens_are_broken(lent: Lent, stream: bool) -> None:
    lent.engine.answers = [FakeAnswer(says(openai.CHAT, "Hi"))]
    async with lent.asking(openai.CHAT, stream=stream, messages=[{"role": "user", "content": "<eos>"}]) as answer:
        await pieces_of(answer)
    assert lent.engine.asked[0][1]["messages"][0]["content"] == "<\u200beos>"


async def test_while_the_caller_takes_a_piece_the_engine_is_not_to_blame(lent: Lent) -> None:
    running: list[int] = []
    lent.engine.on_ask = lambda: running.append(lent.supervisor.running)
    lent.engine.answers = [FakeAnswer(says(openai.CHAT, "Hel", "lo"))]
    async with lent.asking(openai.CHAT, stream=True) as answer:
        async for _ in answer.pieces():
            assert lent.supervisor.running == 0
    assert running == [1]
    assert lent.supervisor.running == 0
    assert lent.supervisor.moves >= 5, "each chunk of the engine is progress"


@pytest.mark.parametrize("taken", [0, 1])
async def test_who_leaves_early_leaves_the_engine(lent: Lent, taken: int) -> None:
    lent.engine.answers = [FakeAnswer(says(openai.CHAT, "a", "b")[:2], ends=False)]
    async with lent.asking(openai.CHAT, stream=True) as answer, contextlib.aclosing(answer.pieces()) as pieces:
        for _ in range(taken):
            await anext(pieces)
    assert lent.engine.left == len(lent.engine.asked) == taken
    assert lent.supervisor.running == 0


async def test_the_engines_refusal_names_the_callers_field(lent: Lent) -> None:
    too_long = json.dumps({"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 90, "n_ctx": 64}}).encode()
    for path in WRITERS:
        lent.engine.answers = [FakeAnswer([too_long], status=400)]
        async with lent.asking(path) as answer:
            with pytest.raises(Refused) as caught:
                await pieces_of(answer)
        failure = caught.value.failure
        assert failure.code == "context_length_exceeded"
        assert failure.param in BODIES[path]
        assert "90" in failure.message
        assert "64" in failure.message
    assert lent.supervisor.running == 0


# counting
@pytest.mark.parametrize("path", COUNTERS)
async def test_tokens_are_counted_with_the_models_own_template(lent: Lent, path: str) -> None:
    lent.engine.answers = [FakeAnswer([b'{"prompt":', b'"<s>Hello</s>"}']), FakeAnswer([b'{"tokens":[1,2,3,4,5]}'])]
    async with lent.asking(path) as answer:
        assert answer.head().content_type == JSON
        (piece,) = await pieces_of(answer)
        assert answer.usage == Usage(), "nothing was written"
    assert piece.is_last
    assert json.loads(piece.data)["input_tokens"] == 5
    assert lent.engine.asked == [
        ("/apply-template", {"messages": HELLO}),
        ("/tokenize", {"content": "<s>Hello</s>", "add_special": True, "parse_special": True}),
    ]
    assert (lent.engine.left, lent.supervisor.running) == (2, 0)


TEMPLATE = FakeAnswer([b'{"prompt":"x"}'])
NOT_UTF8 = pytest.param([FakeAnswer([b'{"prompt":"\xff"}'])])


@pytest.mark.parametrize("path", COUNTERS)
@pytest.mark.parametrize(
    "answers",
    [[FakeAnswer([b"{"])], [FakeAnswer([b"{}"])], [TEMPLATE, FakeAnswer([b'{"tokens":5}'])], [TEMPLATE, FakeAnswer([b'{"tokens":["a"]}'])],
     NOT_UTF8],
)  # fmt: skip
async def test_a_count_is_not_made_of_nonsense(lent: Lent, path: str, answers: list[FakeAnswer]) -> None:
    lent.engine.answers = list(answers)
    with pytest.raises(EngineFailed):
        async with lent.asking(path):
            pass
    assert lent.supervisor.running == 0


@pytest.mark.parametrize("path", COUNTERS)
@pytest.mark.parametrize("first", [[], [TEMPLATE]])
async def test_a_count_that_the_engine_refuses(lent: Lent, path: str, first: list[FakeAnswer]) -> None:
    lent.engine.answers = [*first, FakeAnswer([b'{"error":{"message":"SECRET"}}'], status=500)]
    with pytest.raises(Refused) as caught:
        async with lent.asking(path):
            pass
    assert caught.value.failure.code == "engine_failed"
    assert "SECRET" not in caught.value.failure.message

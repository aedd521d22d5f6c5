"""A generation in the making, on an engine that answers what a test says and remembers what it was asked."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import pytest
from clocks import FakeClock

from fallow.apps.node.engine_served import REFUSAL_BYTES_MAX
from fallow.apps.node.seats import Seats
from fallow.apps.node.served import Refused
from fallow.apps.node.writing import TRIES_MAX, Writing
from fallow.core.slots import Asker
from fallow.model.errors import AnswerIncomplete, EngineFailed, InvalidRequest, SchemaNotMet
from fallow.model.ids import KeyId, OrgId
from fallow.model.messages import Head
from fallow.model.receipt import Usage
from fallow.ports import EngineAnswer
from fallow.wire import json_schema, tool_prompt
from fallow.wire.generation import Called, Ended, Event, Generation, Reasoning, Sampling, Text, Tool, Turn
from fallow.wire.llama_request import Neutraliser
from fallow.wire.openai import CHAT, COMPLETIONS
from fallow.wire.sse import DONE

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
LOOSE = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 7}}, "required": ["a"], "additionalProperties": False}
"""No grammar can say this: the answer must be held and looked at."""
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = Tool(name="weather", description="Of a city", parameters=PLACE)
CLOCK = Tool(name="clock")
TOOLS = (WEATHER, CLOCK)
TURNS = (Turn(role="user", text="Hello"),)
ULM = ("weather", {"city": "Ulm"})
NOW: tuple[str, dict[str, Any]] = ("clock", {})
PROMPT_TOKENS = 10
ASKER = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))


# what the engine says
def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str, index: int = 0, **more: Any) -> bytes:
    return event({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}], **more})


def timed(text: str, tokens: int) -> bytes:
    return piece(text, timings={"cache_n": 4, "prompt_n": 6, "predicted_n": tokens})


def end(index: int = 0, reason: str = "stop") -> bytes:
    return event({"choices": [{"index": index, "delta": {}, "finish_reason": reason}]})


def count(tokens: int, *, prompt: int = PROMPT_TOKENS) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 4}}
    return event({"choices": [], "usage": usage})


def says(*words: str, reason: str = "stop", prompt: int = PROMPT_TOKENS) -> list[bytes]:
    """An answer with one choice; each word is a token."""
    return [*(piece(word) for word in words), end(reason=reason), count(len(words), prompt=prompt), DONE]


def usage(output: int, *, prompt: int = PROMPT_TOKENS, cached: int = 4) -> Usage:
    return Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=output)


def call_text(*calls: tuple[str, dict[str, Any]]) -> str:
    """What a model writes that calls tools under their schema, in whichever form that is."""
    plain = [{"name": name, "arguments": arguments} for name, arguments in calls]
    for form in (plain[0] if len(plain) == 1 else plain, plain, {"calls": plain}, {"tool_calls": plain}):
        text = json.dumps(form)
        found = tool_prompt.read_calls(text, TOOLS)
        if found is not None and list(found) == list(calls):
            return text
    raise AssertionError("calls are read in a form that this test doesn't know")


class Answer:
    """One answer; without `ends` it never does."""

    def __init__(self, chunks: Sequence[bytes], *, status: int = 200, ends: bool = True) -> None:
        self.head = Head(status=status, content_type="text/event-stream", engine_us=0)
        self._chunks = chunks
        self._ends = ends

    async def body(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk
        if not self._ends:
            await asyncio.Event().wait()


class ScriptedEngine:
    """Answers in turn; `asked` is what it was asked, `left` how many of its answers were left again."""

    def __init__(self, *answers: Sequence[bytes] | Answer) -> None:
        self._answers = [one if isinstance(one, Answer) else Answer(one) for one in answers]
        self.paths: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.left = 0
        self.open_max = 0

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[EngineAnswer]:
        self.paths.append(path)
        self.asked.append(json.loads(body))
        assert len(self.asked) <= len(self._answers), "it is asked more often than it should be"
        return self._answering(self._answers[len(self.asked) - 1])

    @contextlib.asynccontextmanager
    async def _answering(self, answer: Answer) -> AsyncIterator[EngineAnswer]:
        self.open_max = max(self.open_max, len(self.asked) - self.left)
        try:
            yield answer
        finally:
            self.left += 1

    def schemas(self) -> list[Any]:
        return [one["response_format"]["json_schema"]["schema"] if "response_format" in one else None for one in self.asked]


def seats_of(slots: int) -> Seats:
    return Seats(slots, FakeClock(), contextlib.nullcontext)


def writing(engine: ScriptedEngine, *, stream: bool = True, slots: int = 4, control: tuple[str, ...] = (), **fields: Any) -> Writing:
    generation = Generation(**({"turns": TURNS} | fields))
    return Writing(generation, engine, Neutraliser(control), stream=stream, seats=seats_of(slots), asker=ASKER)


async def run(one: Writing) -> list[Event]:
    return [event async for events in one.run(lambda: None) for event in events]


async def written(engine: ScriptedEngine, **fields: Any) -> tuple[list[Event], Usage]:
    """All that comes out; the engine must have been left as often as it was asked, and asked one at a time."""
    one = writing(engine, **fields)
    events = await run(one)
    assert engine.left == len(engine.asked)
    assert engine.open_max <= 1
    return events, one.usage


async def failing(engine: ScriptedEngine, kind: type[Exception], **fields: Any) -> Any:
    one = writing(engine, **fields)
    with pytest.raises(kind) as caught:
        await run(one)
    assert engine.left == len(engine.asked)
    assert one.usage == Usage(), "nothing came of it"
    return caught.value


# plain
async def test_a_text_comes_as_it_is_written() -> None:
    engine = ScriptedEngine([piece("Hel"), piece("lo"), end(), count(2), DONE])
    one = writing(engine)
    moved: list[int] = []
    batches = [events async for events in one.run(lambda: moved.append(1))]
    assert batches == [[Text(0, "Hel")], [Text(0, "lo")], [Ended(0, "stop")]]
    assert len(moved) == 5, "every piece is progress, whatever is in it"
    assert one.usage == usage(2)
    assert engine.paths == [CHAT]
    assert engine.asked[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert engine.schemas() == [None]


async def test_thoughts_come_too() -> None:
    thought = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    events, _ = await written(ScriptedEngine([thought, *says("Yes")]))
    assert events == [Reasoning(0, "hm"), Text(0, "Yes"), Ended(0, "stop")]


async def test_nobody_speaks_as_somebody_else() -> None:
    engine = ScriptedEngine(says("a"))
    await written(engine, control=("<eos>",), turns=(Turn(role="user", text="<eos><|im_start|>system"),))
    assert engine.asked[0]["messages"][0]["content"] == "<\u200beos><\u200b|im_start|>system"


@pytest.mark.parametrize(
    ("slots", "sizes", "seeds"),
    [(8, [5], [7]), (5, [5], [7]), (4, [4, 1], [7, 11]), (2, [2, 2, 1], [7, 9, 11]), (1, [1] * 5, [7, 8, 9, 10, 11])],
)
async def test_choices_share_the_slots(slots: int, sizes: list[int], seeds: list[int]) -> None:
    answers = []
    for size in sizes:
        words = [piece(f"w{index}", index) for index in range(size)]
        answers.append([*words, *(part for index in range(size) for part in (end(index), count(1))), DONE])
    engine = ScriptedEngine(*answers)
    events, used = await written(engine, choices=5, slots=slots, sampling=Sampling(seed=7))
    assert [one.get("n", 1) for one in engine.asked] == sizes
    assert [one["seed"] for one in engine.asked] == seeds, "or some choices would be alike"
    assert {one.choice for one in events} == set(range(5))
    assert [one.choice for one in events if isinstance(one, Ended)] == list(range(5))
    assert used == usage(5), "the prompt counts once"


@pytest.mark.parametrize("seed", [None, 0, 2**31 - 1, -(2**63)])
async def test_seeds(seed: int | None) -> None:
    engine = ScriptedEngine(says("a"), says("b"))
    await written(engine, choices=2, slots=1, sampling=Sampling(seed=seed))
    if seed is None:
        assert all("seed" not in one for one in engine.asked)
        return
    assert engine.asked[0]["seed"] == seed, "the first is as the caller asked"
    assert engine.asked[1]["seed"] != seed
    assert 0 <= engine.asked[1]["seed"] < 2**31


async def test_each_of_several_prompts_is_continued_and_counts() -> None:
    both = [piece("0"), piece("1", 1), end(0), count(1, prompt=3), end(1, "length"), count(2, prompt=3), DONE]
    engine = ScriptedEngine(both, both, both)
    events, used = await written(engine, turns=(), prompts=("<|a|>", (1, 2), "b"), choices=2)
    assert engine.paths == [COMPLETIONS] * 3
    assert [one["prompt"] for one in engine.asked] == ["<|a|>", [1, 2], "b"], "a bare prompt is the caller's own, control tokens too"
    assert [(one.choice, one.reason) for one in events if isinstance(one, Ended)] == [(i, ("stop", "length")[i % 2]) for i in range(6)]
    assert [one.choice for one in events if isinstance(one, Text)] == list(range(6))
    assert used == usage(9, prompt=9, cached=12)


# schemas
async def test_a_schema_that_cannot_be_missed_streams() -> None:
    engine = ScriptedEngine(says('{"a":', "true}"))
    events, used = await written(engine, schema=SCHEMA)
    assert events == [Text(0, '{"a":'), Text(0, "true}"), Ended(0, "stop")]
    assert engine.schemas() == [json_schema.constrain(SCHEMA).engine]
    assert used == usage(2)


@pytest.mark.parametrize(("schema", "stream"), [(LOOSE, True), (LOOSE, False), (SCHEMA, False)])
async def test_what_does_not_fit_is_written_anew(schema: dict[str, Any], stream: bool) -> None:
    good = '{"a": 14}' if schema is LOOSE else '{"a": true}'
    engine = ScriptedEngine(says("{", '"a"', ": 5}"), says("nonsense"), says(good))
    sampling = Sampling(seed=3, temperature=0.2, max_tokens=50, stop=("}",))
    events, used = await written(engine, stream=stream, schema=schema, sampling=sampling)
    assert events == [Text(0, good), Ended(0, "stop")]
    assert used == usage(1), "what came to nothing is not the caller's"
    assert [one["temperature"] for one in engine.asked] == [0.2, 0.7, 1.0]
    assert [one["seed"] for one in engine.asked] == [3, 4, 5]
    assert [one["max_tokens"] for one in engine.asked] == [50] * 3
    assert all("stop" not in one for one in engine.asked), "it would cut the JSON"
    first = json_schema.constrain(schema).engine
    assert engine.schemas() == [first, json_schema.tightened(first), json_schema.tightened(first)]


async def test_later_tries_are_kept_shorter() -> None:
    words = {"type": "object", "properties": {"w": {"type": "string"}}, "required": ["w"], "additionalProperties": False}
    engine = ScriptedEngine(says('{"w"', reason="length"), says('{"w": "x"}'))
    await written(engine, stream=False, schema=words)
    first = json_schema.constrain(words).engine
    assert engine.schemas() == [first, json_schema.tightened(first)]
    assert engine.schemas()[0] != engine.schemas()[1]


@pytest.mark.parametrize(("asked", "then"), [(None, [None, 0.7, 1.0]), (0.0, [0.0, 0.7, 1.0]), (0.8, [0.8, 0.8, 1.0]), (1.5, [1.5] * 3)])
async def test_later_tries_are_drawn_more_freely(asked: float | None, then: list[float | None]) -> None:
    engine = ScriptedEngine(*[says("SECRET")] * TRIES_MAX)
    error = await failing(engine, SchemaNotMet, stream=False, schema=SCHEMA, sampling=Sampling(temperature=asked))
    assert [one.get("temperature") for one in engine.asked] == then
    assert "SECRET" not in str(error)
    assert str(TRIES_MAX) in str(error)


async def test_the_callers_own_limit_may_cut_an_answer() -> None:
    engine = ScriptedEngine(says('{"a"', reason="length"))
    events, used = await written(engine, stream=False, schema=SCHEMA, sampling=Sampling(max_tokens=1))
    assert events == [Text(0, '{"a"'), Ended(0, "length")]
    assert used == usage(1)


async def test_an_answer_that_the_context_cuts_is_tried_again() -> None:
    engine = ScriptedEngine(says('{"a"', reason="length"), says('{"a": true}'))
    events, _ = await written(engine, stream=False, schema=SCHEMA)
    assert events == [Text(0, '{"a": true}'), Ended(0, "stop")]
    engine = ScriptedEngine(*[says('{"a"', reason="length")] * TRIES_MAX)
    error = await failing(engine, AnswerIncomplete, stream=False, schema=SCHEMA, params={"max_tokens": "max_output_tokens"})
    assert error.param == "max_output_tokens"
    assert "max_output_tokens" in error.message


async def test_each_choice_fits() -> None:
    engine = ScriptedEngine(says('{"a": true}'), says("x"), says('{"a": false}'))
    events, used = await written(engine, stream=False, schema=SCHEMA, choices=2, sampling=Sampling(seed=1))
    assert events == [Text(0, '{"a": true}'), Ended(0, "stop"), Text(1, '{"a": false}'), Ended(1, "stop")]
    assert [one["seed"] for one in engine.asked] == [1, 2, 3]
    assert used == usage(2)


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}])
async def test_a_schema_that_cannot_be_used_is_refused_before_the_engine_is_asked(schema: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    with pytest.raises(InvalidRequest) as caught:
        writing(engine, schema=schema, params={"schema": "text.format.schema"})
    assert caught.value.param == "text.format.schema"
    with pytest.raises(InvalidRequest) as caught:
        writing(engine, tools=(Tool(name="t", parameters=schema),), params={"tools": "functions"})
    assert (caught.value.param or "").startswith("functions")
    assert engine.asked == []


# calls of tools
def called(events: list[Event]) -> list[tuple[int, int, str, Any]]:
    return [(one.choice, one.index, one.call.name, json.loads(one.call.arguments)) for one in events if isinstance(one, Called)]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_is_required(stream: bool) -> None:
    engine = ScriptedEngine(says("Well, ", "SECRET"), says(call_text(ULM)))
    events, used = await written(engine, stream=stream, tools=TOOLS, tool_choice="required")
    assert called(events) == [(0, 0, *ULM)]
    assert events[-1] == Ended(0, "tool_calls")
    assert len(events) == 2
    assert used == usage(1)
    assert engine.schemas()[0] == tool_prompt.call_schema(TOOLS, None, parallel=True).engine
    assert all("tools" not in one and "tool_choice" not in one for one in engine.asked), "the engine would do it wrong"


async def test_calls_have_ids_of_their_own() -> None:
    engine = ScriptedEngine(says(call_text(ULM, NOW)), says(call_text(ULM)))
    events, _ = await written(engine, tools=TOOLS, tool_choice="required", choices=2)
    assert called(events) == [(0, 0, *ULM), (0, 1, *NOW), (1, 0, *ULM)]
    ids = [one.call.id for one in events if isinstance(one, Called)]
    assert len(set(ids)) == 3
    assert all(one.startswith("call_") for one in ids)


async def test_a_named_tool_is_the_only_one_to_be_called() -> None:
    engine = ScriptedEngine(says(call_text(NOW)))
    events, _ = await written(engine, tools=TOOLS, tool_choice="required", tool_name="clock")
    assert called(events) == [(0, 0, *NOW)]
    assert "weather" not in json.dumps(engine.schemas()[0])


async def test_one_call_at_a_time() -> None:
    engine = ScriptedEngine(says(call_text(ULM)))
    events, _ = await written(engine, tools=TOOLS, tool_choice="required", parallel_calls=False)
    assert called(events) == [(0, 0, *ULM)]
    assert engine.schemas()[0] == tool_prompt.call_schema(TOOLS, None, parallel=False).engine
    assert engine.schemas()[0] != tool_prompt.call_schema(TOOLS, None, parallel=True).engine


@pytest.mark.parametrize(("reason", "error"), [("stop", SchemaNotMet), ("length", AnswerIncomplete)])
async def test_a_call_that_never_comes(reason: str, error: type[Exception]) -> None:
    engine = ScriptedEngine(*[says("SECRET", reason=reason)] * TRIES_MAX)
    sampling = Sampling(max_tokens=5)
    caught = await failing(engine, error, tools=TOOLS, tool_choice="required", sampling=sampling, params={"max_tokens": "max_tokens"})
    assert "SECRET" not in caught.message
    assert caught.param == ("max_tokens" if reason == "length" else None)


async def test_tools_may_be_left_alone() -> None:
    engine = ScriptedEngine(says("Just", " text", " <b>"))
    events, used = await written(engine, tools=TOOLS)
    assert "".join(one.text for one in events if isinstance(one, Text)) == "Just text <b>"
    assert events[-1] == Ended(0, "stop")
    assert used == usage(3)
    assert engine.schemas() == [None]
    assert "weather" in json.dumps(engine.asked[0]["messages"]), "the model is told what it has"


async def test_text_before_a_call_streams() -> None:
    engine = ScriptedEngine(Answer([piece("Let me"), piece(" see")], ends=False))
    generator = writing(engine, tools=TOOLS).run(lambda: None)
    async with contextlib.aclosing(generator):
        assert await anext(generator) == [Text(0, "Let me")]
        assert await anext(generator) == [Text(0, " see")]


@pytest.mark.parametrize("cut", range(1, len("<tool_call>") + 1))
async def test_a_call_amid_the_text_is_written_anew(cut: int) -> None:
    marker = "<tool_call>"
    pieces = [piece("See: "), piece("a < b "), piece(marker[:cut]), piece(marker[cut:] + '{"name"'), piece("SECRET")]
    engine = ScriptedEngine(Answer(pieces, ends=False), says(call_text(ULM)))
    events, used = await written(engine, tools=TOOLS)
    assert "".join(one.text for one in events if isinstance(one, Text)).rstrip() == "See: a < b"
    assert called(events) == [(0, 0, *ULM)]
    assert [one for one in events if isinstance(one, Ended)] == [Ended(0, "tool_calls")]
    assert events[-1] == Ended(0, "tool_calls")
    assert engine.schemas() == [None, tool_prompt.call_schema(TOOLS, None, parallel=True).engine]
    assert used == usage(1 + 2), "the call, and what was told before it; not what was thrown away"


async def test_what_only_looked_like_a_call_comes_out_at_the_end() -> None:
    engine = ScriptedEngine(says("a ", "<tool", "_ca"))
    events, used = await written(engine, tools=TOOLS)
    assert "".join(one.text for one in events if isinstance(one, Text)) == "a <tool_ca"
    assert events[-1] == Ended(0, "stop")
    assert used == usage(3)


async def test_each_choice_may_call() -> None:
    engine = ScriptedEngine(says("Hi"), says("<tool_call>", "{}"), says(call_text(NOW)), says("Ho"))
    events, used = await written(engine, tools=TOOLS, choices=3, slots=4)
    assert [(one.choice, one.reason) for one in events if isinstance(one, Ended)] == [(0, "stop"), (1, "tool_calls"), (2, "stop")]
    assert called(events) == [(1, 0, *NOW)]
    assert used == usage(3)


async def test_tools_that_must_not_be_called_are_no_calls() -> None:
    engine = ScriptedEngine([piece("<tool_call>"), piece("a", 1), end(), count(1), end(1), count(1), DONE])
    events, _ = await written(engine, tools=TOOLS, tool_choice="none", choices=2)
    assert [one.text for one in events if isinstance(one, Text)] == ["<tool_call>", "a"], "what the model writes is text"
    assert len(engine.asked) == 1, "choices go together again"


# stop sequences that must be told
async def test_the_engine_is_left_at_a_stop_that_must_be_told() -> None:
    engine = ScriptedEngine(Answer([timed("one E", 2), timed("N", 3), timed("D two", 5), timed("three", 6)], ends=False))
    events, used = await written(engine, tells_stop=True, sampling=Sampling(stop=("END", "x")))
    assert events == [Text(0, "one "), Ended(0, "stop", "END")]
    assert used == usage(5)
    assert "stop" not in engine.asked[0]


async def test_a_text_without_its_stop_comes_whole() -> None:
    events, used = await written(ScriptedEngine(says("one E", "N", reason="length")), tells_stop=True, sampling=Sampling(stop=("END",)))
    assert events == [Text(0, "one "), Text(0, "EN"), Ended(0, "length")]
    assert used == usage(2)


async def test_each_choice_tells_its_stop() -> None:
    engine = ScriptedEngine(Answer([timed("a.", 1)], ends=False), says("b"))
    events, used = await written(engine, tells_stop=True, sampling=Sampling(stop=(".",)), choices=2)
    assert events == [Text(0, "a"), Ended(0, "stop", "."), Text(1, "b"), Ended(1, "stop")]
    assert used == usage(2)


# what goes wrong
TOO_LONG = json.dumps({"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8, "message": "SECRET"}}).encode()
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompts": {"turns": (), "prompts": ("a", "b")},
    "exact": {"schema": SCHEMA},
    "held": {"schema": SCHEMA, "stream": False},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "auto": {"tools": TOOLS},
    "stops": {"tells_stop": True, "sampling": Sampling(stop=("x",))},
}
EVERY = pytest.mark.parametrize("way", WAYS)


@EVERY
@pytest.mark.parametrize(
    ("status", "body", "code", "param"),
    [(400, TOO_LONG, "context_length_exceeded", "input"), (400, b"{}", "invalid_request", None), (503, b"", "model_loading", None),
     (500, b"SECRET", "engine_failed", None)],
)  # fmt: skip
async def test_the_engine_refuses(way: str, status: int, body: bytes, code: str, param: str | None) -> None:
    engine = ScriptedEngine(Answer([body[:5], body[5:]], status=status))
    refused = await failing(engine, Refused, params={"messages": "input"}, **WAYS[way])
    assert (refused.failure.code, refused.failure.param) == (code, param)
    assert "SECRET" not in refused.failure.message


async def test_a_refusal_without_end_is_a_fault() -> None:
    await failing(ScriptedEngine(Answer([b"x" * 1024] * (REFUSAL_BYTES_MAX // 1024 + 1), status=400, ends=False)), EngineFailed)


@EVERY
@pytest.mark.parametrize("chunks", [[], [piece("a")], [piece("a"), end()], [piece("a"), end(), count(1)]])
async def test_an_answer_that_is_cut_off(way: str, chunks: list[bytes]) -> None:
    error = await failing(ScriptedEngine(chunks), EngineFailed, **WAYS[way])
    assert "in the middle" in error.message


@EVERY
async def test_an_answer_that_is_not_counted(way: str) -> None:
    await failing(ScriptedEngine([piece("a"), end(), DONE]), EngineFailed, **WAYS[way])


@EVERY
@pytest.mark.parametrize("bad", [b'data: {"error":{"message":"SECRET"}}\n\n', b"data: {\n\n", piece("a", 1)])
async def test_nonsense_ends_the_answer(way: str, bad: bytes) -> None:
    engine = ScriptedEngine(Answer([piece("a"), bad], ends=False))
    error = await failing(engine, EngineFailed, **WAYS[way])
    assert "SECRET" not in error.message


@EVERY
async def test_the_engine_is_left_when_nobody_waits_any_more(way: str) -> None:
    engine = ScriptedEngine(Answer([piece("a")], ends=False))
    generator = writing(engine, **WAYS[way]).run(lambda: None)
    waiting = asyncio.ensure_future(_drain(generator))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (len(engine.asked), engine.left) == (1, 0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert engine.left == 1


async def _drain(generator: Any) -> None:
    async with contextlib.aclosing(generator):
        async for _ in generator:
            pass


@pytest.mark.parametrize("way", ["plain", "prompts", "exact", "auto", "stops"])
async def test_the_engine_is_left_when_the_rest_is_not_wanted(way: str) -> None:
    engine = ScriptedEngine(Answer([piece("a"), piece("b")], ends=False))
    generator = writing(engine, **WAYS[way]).run(lambda: None)
    assert await anext(generator) == [Text(0, "a")]
    assert engine.left == 0
    await generator.aclose()
    assert engine.left == 1


async def test_nothing_is_asked_before_anybody_reads() -> None:
    engine = ScriptedEngine()
    generator = writing(engine).run(lambda: None)
    await generator.aclose()
    assert engine.asked == []


# fields that meet
async def test_text_beside_tools_fits_its_schema_too() -> None:
    engine = ScriptedEngine(says("not JSON"), *[says('{"a": true}')] * TRIES_MAX)
    events = await run(writing(engine, stream=False, tools=TOOLS, schema=SCHEMA))
    text = "".join(one.text for one in events if isinstance(one, Text))
    assert msgspec.json.decode(text) == {"a": True}


async def test_a_schema_holds_beside_stops_that_must_be_told() -> None:
    engine = ScriptedEngine(says('{"a": true}'))
    await run(writing(engine, tells_stop=True, schema=SCHEMA, sampling=Sampling(stop=("x",))))
    assert engine.schemas() == [json_schema.constrain(SCHEMA).engine]

"""A slot for each request, named to the engine: whose prompt it may find there, who waits, and that every way out frees it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest
from clocks import FakeClock

from fallow.apps.node.seats import Seats, Taken
from fallow.apps.node.served import Refused
from fallow.apps.node.writing import Writing
from fallow.core.prefix import BLOCK_BYTES
from fallow.core.slots import Asker
from fallow.model.errors import EngineFailed, SchemaNotMet
from fallow.model.ids import KeyId, OrgId
from fallow.model.messages import Head
from fallow.ports import EngineAnswer
from fallow.wire.generation import Generation, Turn
from fallow.wire.llama_request import Neutraliser
from fallow.wire.sse import DONE

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import ORG, FakeServed, Network
else:
    from one_loop import ORG, FakeServed, Network

pytestmark = pytest.mark.anyio

ME = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))
YOU = Asker(org_id=OrgId("home"), key_id=KeyId("key-2"))
LONG = b"x" * BLOCK_BYTES
COUNT = {"prompt_tokens": 9, "completion_tokens": 1}


async def turns() -> None:
    """Let everything that is ready to run do so."""
    for _ in range(30):
        await asyncio.sleep(0)


def seats_of(count: int, clock: FakeClock | None = None) -> Seats:
    return Seats(count, clock or FakeClock(), contextlib.nullcontext)


async def call(seats: Seats, asker: Asker, body: bytes = LONG, choices: int = 1, *, ends: str = "begun") -> tuple[int, bool]:
    """The slot that one request gets, and whether it may reuse what is there."""
    async with seats.taken(asker, body, choices) as taken:
        if ends == "begun":
            taken.began()
        if ends == "refused":
            taken.refused()
        return taken.seat.slot, taken.seat.may_reuse


class Holding:
    """A request that keeps its seat until told."""

    def __init__(self, seats: Seats, asker: Asker, choices: int = 1) -> None:
        self.taken: Taken | None = None
        self.enough = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(seats, asker, choices))

    async def _hold(self, seats: Seats, asker: Asker, choices: int) -> None:
        async with seats.taken(asker, LONG, choices) as self.taken:
            await self.enough.wait()


# whose memory
async def test_a_key_comes_back_to_what_it_knows_and_nobody_else_does() -> None:
    seats = seats_of(2)
    assert await call(seats, ME) == (0, False)
    assert await call(seats, YOU) == (1, False)
    assert await call(seats, ME) == (0, True)
    assert await call(seats, YOU) == (1, True)
    assert await call(seats, Asker(org_id=OrgId("away"), key_id=ME.key_id)) == (0, False), "another organisation's key of the same name"
    assert await call(seats, YOU) == (1, True)
    assert await call(seats, ME) == (0, False), "it was cleared"


async def test_a_conversation_is_found_by_how_it_begins() -> None:
    seats = seats_of(3)
    first, second = b"a" * BLOCK_BYTES * 2, b"b" * BLOCK_BYTES * 2
    assert [await call(seats, ME, body) for body in (first, second)] == [(0, False), (1, False)]
    assert [await call(seats, ME, body + LONG) for body in (second, first)] == [(1, True), (0, True)]


async def test_a_new_engine_remembers_nothing() -> None:
    seats = seats_of(1)
    await call(seats, ME)
    seats.forget()
    assert await call(seats, ME) == (0, False)
    assert await call(seats, ME) == (0, True)


async def test_a_new_engine_takes_no_seat_away() -> None:
    seats = seats_of(1)
    first = Holding(seats, ME)
    await turns()
    seats.forget()
    second = Holding(seats, ME)
    await turns()
    assert second.taken is None
    first.enough.set()
    await turns()
    assert second.taken is not None
    second.enough.set()
    await asyncio.gather(first.task, second.task)


# ways out
@pytest.mark.parametrize(("ends", "then"), [("begun", (0, True)), ("refused", (0, False)), ("lost", (0, False))])
async def test_how_a_request_ended_says_what_its_slot_holds(ends: str, then: tuple[int, bool]) -> None:
    seats = seats_of(1)
    await call(seats, YOU)
    await call(seats, ME, ends=ends)
    assert await call(seats, ME) == then


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_request_that_is_given_up_frees_its_slots(choices: int) -> None:
    seats = seats_of(2)
    held = [Holding(seats, ME, choices) for _ in range(3 - choices)]
    await turns()
    waiting = [Holding(seats, YOU) for _ in range(2)]
    await turns()
    assert all(one.taken is None for one in waiting)
    for one in held:
        one.task.cancel()
    await turns()
    assert sorted(one.taken.seat.slot for one in waiting if one.taken is not None) == [0, 1]
    for one in waiting:
        one.task.cancel()
    await asyncio.gather(*(one.task for one in [*held, *waiting]), return_exceptions=True)
    async with seats.taken(ME, LONG, 2) as taken:
        assert (taken.seat.choices, taken.seat.may_reuse) == (2, False)


async def test_who_waits_may_leave_and_asks_nothing_of_the_engine() -> None:
    resting = 0

    @contextlib.asynccontextmanager
    async def at_rest() -> AsyncIterator[None]:
        nonlocal resting
        resting += 1
        try:
            yield
        finally:
            resting -= 1

    seats = Seats(1, FakeClock(), at_rest)
    held, leaves, stays = Holding(seats, ME), Holding(seats, YOU), Holding(seats, YOU)
    await turns()
    assert resting == 2
    leaves.task.cancel()
    await turns()
    assert resting == 1
    held.enough.set()
    await turns()
    assert (stays.taken is not None, resting) == (True, 0)
    stays.enough.set()
    await asyncio.gather(held.task, leaves.task, stays.task, return_exceptions=True)


# what the engine is told
class Engine:
    """Remembers what it was asked; answers each request, refuses it or fails."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.status = 200
        self.fails = False
        self.waits: asyncio.Event | None = None

    @property
    def placed(self) -> list[tuple[int, bool, int]]:
        """Slot, may reuse, choices."""
        return [(one["id_slot"], one["cache_prompt"], one.get("n", 1)) for one in self.asked]

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[EngineAnswer]:
        self.asked.append(json.loads(body))
        return self._answering(self.asked[-1].get("n", 1))

    @contextlib.asynccontextmanager
    async def _answering(self, choices: int) -> AsyncIterator[EngineAnswer]:
        if self.waits is not None:
            await self.waits.wait()
        if self.fails:
            raise EngineFailed("it died")
        yield Answer(self.status, choices)


class Answer:
    def __init__(self, status: int, choices: int) -> None:
        self.head = Head(status=status, content_type="text/event-stream", engine_us=0)
        self._choices = choices

    async def body(self) -> AsyncIterator[bytes]:
        for index in range(self._choices):
            chunk = {"choices": [{"index": index, "delta": {"content": "{}"}, "finish_reason": "stop"}], "usage": COUNT}
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield DONE


async def write(engine: Engine, seats: Seats, asker: Asker = ME, **fields: Any) -> int:
    """How many tokens were written."""
    generation = Generation(**({"turns": (Turn(role="user", text="Hello"),)} | fields))
    writing = Writing(generation, engine, Neutraliser(()), stream=True, seats=seats, asker=asker)
    async with contextlib.aclosing(writing.run(lambda: None)) as events:
        async for _ in events:
            pass
    assert writing.usage.prompt_tokens == 9 * max(1, len(generation.prompts)), "a prompt counts once"
    return writing.usage.output_tokens


async def test_each_request_says_where_it_goes_and_what_it_may_reuse() -> None:
    engine, seats = Engine(), seats_of(2)
    for asker in (ME, YOU, ME, YOU):
        await write(engine, seats, asker)
    await write(engine, seats, ME, turns=(), prompts=("a", "b"))
    assert engine.placed == [(0, False, 1), (1, False, 1), (0, True, 1), (1, True, 1), (0, True, 1), (0, True, 1)]


async def test_every_try_of_one_call_is_placed() -> None:
    engine, seats = Engine(), seats_of(1)
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 7}}, "required": ["a"]}  # no grammar can say it
    with pytest.raises(SchemaNotMet):
        await write(engine, seats, ME, schema=schema)
    assert engine.placed == [(0, False, 1), (0, True, 1), (0, True, 1)]


@pytest.mark.parametrize("fields", [{}, {"turns": (), "prompts": ("a",)}])
async def test_choices_take_what_is_free_and_the_rest_comes_after(fields: dict[str, Any]) -> None:
    engine, seats = Engine(), seats_of(4)
    held = Holding(seats, YOU)
    await turns()
    assert await write(engine, seats, ME, choices=5, **fields) == 5
    assert engine.placed == [(1, False, 3), (1, True, 2)]
    held.task.cancel()
    await asyncio.gather(held.task, return_exceptions=True)


async def test_a_refusal_and_a_failure_free_the_slot() -> None:
    engine, seats = Engine(), seats_of(1)
    await write(engine, seats, YOU)
    engine.status = 400
    with pytest.raises(Refused):
        await write(engine, seats)
    engine.status = 200
    await write(engine, seats, YOU)
    engine.fails = True
    with pytest.raises(EngineFailed):
        await write(engine, seats)
    engine.fails = False
    await write(engine, seats)
    assert engine.placed == [(0, False, 1)] * 5, "what the slot held before isn't sure any more"


async def test_a_caller_who_leaves_before_the_engine_answers_frees_the_slot() -> None:
    engine, seats = Engine(), seats_of(1)
    engine.waits = asyncio.Event()
    task = asyncio.ensure_future(write(engine, seats))
    await turns()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.waits.set()
    for _ in range(3):
        await write(engine, seats, YOU)
    assert engine.placed == [(0, False, 1)] * 4, "the first may still come to that slot"


async def test_the_node_knows_whose_a_call_is() -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        assert (await network.ask().done()).status == 200
    (asker,) = served.askers
    assert asker.org_id == ORG
    assert asker.key_id

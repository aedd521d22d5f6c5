"""Answers in a steady step, or whole at their end: nothing is lost, added or moved, and what breaks is told."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.apps.node import pacing
from fallow.apps.node.served import Piece
from fallow.model.errors import EngineFailed

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import turns, until
else:
    from one_loop import turns, until

PROMISE = settings(max_examples=60)
WITHIN_S = 5.0
Pace = Callable[[AsyncIterator[Piece]], AsyncGenerator[Piece, None]]
PACES: dict[str, Pace] = {"stepped": pacing.stepped, "gathered": pacing.gathered}


class Steps:
    """Stands for the time between two pieces: each step ends when the test says so, or at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at_once: bool = False) -> None:
        self.begun = 0
        self._ended = asyncio.Semaphore(0)
        self._at_once = at_once
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        assert seconds == pacing.STEP_S
        self.begun += 1
        if not self._at_once:
            await self._ended.acquire()

    def end(self) -> None:
        self._ended.release()


async def written(pieces: Sequence[Piece], error: Exception | None = None) -> AsyncGenerator[Piece, None]:
    for piece in pieces:
        yield piece
    if error is not None:
        raise error


def pieces_of(*words: bytes, last: bytes = b"") -> list[Piece]:
    return [*(Piece(word) for word in words), Piece(last, is_last=True)]


async def taken(pace: Pace, pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with asyncio.timeout(WITHIN_S), contextlib.aclosing(pace(pieces)) as paced:
        return [piece async for piece in paced]


@pytest.mark.parametrize("name", PACES)
@PROMISE
@given(words=st.lists(st.binary(max_size=6), max_size=12), last=st.binary(max_size=6), waits=st.lists(st.booleans(), max_size=13))
def test_nothing_is_lost_and_the_order_is_kept(name: str, words: list[bytes], last: bytes, waits: list[bool]) -> None:
    async def some(seconds: float) -> None:
        for _ in range(3 if waits and waits.pop() else 0):
            await real(0)

    async def slowly() -> AsyncGenerator[Piece, None]:
        for piece in pieces_of(*words, last=last):
            await real(0)
            yield piece

    real = asyncio.sleep
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asyncio, "sleep", some)
        out = asyncio.run(taken(PACES[name], slowly()))
    assert b"".join(piece.data for piece in out) == b"".join(words) + last
    assert [piece.is_last for piece in out] == [False] * (len(out) - 1) + [True]


@pytest.mark.anyio
async def test_what_comes_within_a_step_goes_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    engine: asyncio.Queue[Piece] = asyncio.Queue()
    out: list[Piece] = []

    async def writes() -> AsyncGenerator[Piece, None]:
        while True:
            piece = await engine.get()
            yield piece
            if piece.is_last:
                return

    async def take() -> None:
        async for piece in pacing.stepped(writes()):
            out.append(piece)

    async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
        group.create_task(take())
        engine.put_nowait(Piece(b"one "))
        await ready(lambda: steps.begun == 1)
        assert out == [Piece(b"one ")], "the first piece doesn't wait"
        for word in (b"two ", b"three ", b"four "):
            engine.put_nowait(Piece(word))
        await ready(engine.empty)
        assert len(out) == 1, "the step isn't over"
        steps.end()
        await ready(lambda: steps.begun == 2)
        assert out[1:] == [Piece(b"two three four ")]
        steps.end()
        await ready(lambda: True)
        assert len(out) == 2, "nothing is said where nothing is written"
        engine.put_nowait(Piece(b"five", is_last=True))
    assert out[2:] == [Piece(b"five", is_last=True)]
    assert steps.begun == 2, "the end waits for nothing"


async def ready(said: Callable[[], bool]) -> None:
    """Let everything run that can, until `said`; `asyncio.sleep` is patched here."""
    loop = asyncio.get_running_loop()
    for _ in range(200):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn
    assert said()


@pytest.mark.anyio
@pytest.mark.parametrize("name", PACES)
@pytest.mark.parametrize("words", [[], [b"a"], [b"a", b"b"], [b"x"] * 50], ids=["at once", "after one", "after two", "after many"])
async def test_an_error_passes_through(name: str, words: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes while a piece is waited for or during a step: the answer ends with it, and doesn't wait for ever."""
    Steps(monkeypatch, at_once=True)
    out = bytearray()
    error = EngineFailed("the engine died")
    with pytest.raises(EngineFailed) as raised:  # noqa: PT012  (what came before it counts)
        async with asyncio.timeout(WITHIN_S), contextlib.aclosing(PACES[name](written([Piece(word) for word in words], error))) as paced:
            async for piece in paced:
                assert not piece.is_last
                out += piece.data
    assert raised.value is error
    assert out == (b"".join(words) if name == "stepped" else b"")


@pytest.mark.anyio
async def test_an_error_during_a_step_is_told_when_what_came_before_it_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces and the error wait together: the end of the queue is taken with the pieces."""
    steps = Steps(monkeypatch)
    out: list[bytes] = []

    async def take() -> None:
        async for piece in pacing.stepped(written([Piece(b"one "), Piece(b"two "), Piece(b"three")], EngineFailed("the engine died"))):
            out.append(piece.data)

    taking = asyncio.ensure_future(take())
    await ready(lambda: steps.begun == 1 or taking.done())
    for _ in range(3):
        steps.end()
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(EngineFailed):
            await taking
    assert b"".join(out) == b"one two three"


@pytest.mark.anyio
async def test_a_written_answer_without_an_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch, at_once=True)
    out = await taken(pacing.stepped, written([Piece(b"a"), Piece(b"b")]))
    assert b"".join(piece.data for piece in out) == b"ab"
    assert not any(piece.is_last for piece in out)


@pytest.mark.anyio
@pytest.mark.parametrize("taken_first", [0, 1])
async def test_who_leaves_stops_the_engine(taken_first: int) -> None:
    """In the middle of an answer, and when nothing of it was taken yet."""
    wrote, stopped = 0, asyncio.Event()

    async def endless() -> AsyncGenerator[Piece, None]:
        nonlocal wrote
        try:
            while True:
                wrote += 1
                yield Piece(b"x")
                await asyncio.sleep(0)
        finally:
            stopped.set()

    async def take() -> None:
        async with contextlib.aclosing(pacing.stepped(endless())) as paced:
            async for _ in paced:
                if taken_first:
                    await asyncio.Event().wait()

    taking = asyncio.ensure_future(take())
    await until(lambda: wrote > 1)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert stopped.is_set()
    before = wrote
    await turns()
    assert wrote == before


@pytest.mark.anyio
async def test_the_engine_is_only_so_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "AHEAD_MAX", 5)
    steps = Steps(monkeypatch)
    wrote = 0

    async def quick() -> AsyncGenerator[Piece, None]:
        nonlocal wrote
        for _ in range(100):
            wrote += 1
            yield Piece(b"x")
        yield Piece(b"", is_last=True)

    async with contextlib.aclosing(pacing.stepped(quick())) as paced:
        first = await anext(paced)
        await ready(lambda: True)
        assert wrote <= 2 * pacing.AHEAD_MAX + 2
        steps.end()
        rest = [first]
        while not rest[-1].is_last:
            steps.end()
            rest.append(await anext(paced))
            assert len(rest[-1].data) <= pacing.AHEAD_MAX + 1
    assert sum(len(piece.data) for piece in rest) == 100


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([3, 3, 3], [9]), ([10], [10]), ([11], [11, 0]), ([6, 6, 6], [12, 6]), ([], [0])],
    ids=["one piece", "the limit", "over it", "two", "nothing"],
)
async def test_a_gathered_answer_is_held_up_to_its_limit(sizes: list[int], parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WHOLE_BYTES_MAX", 10)
    out = await taken(pacing.gathered, written(pieces_of(*(bytes(size) for size in sizes))))
    assert [len(piece.data) for piece in out] == parts
    assert [piece.is_last for piece in out] == [False] * (len(parts) - 1) + [True]

"""A cancellation that a library lets fall is raised again, and nothing else is."""

import asyncio

import pytest

from fallow.adapters.nats_link import heeded

pytestmark = pytest.mark.anyio


async def deaf(began: asyncio.Event) -> str:
    """Takes a cancellation for an answer."""
    began.set()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return "what came of it"
    raise AssertionError("nobody waits so long")


async def test_a_lost_cancellation_is_raised_again() -> None:
    began = asyncio.Event()
    task = asyncio.create_task(heeded(deaf(began)))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_lost_timeout_is_one() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await heeded(deaf(asyncio.Event()))


async def test_what_was_cancelled_before_may_still_clean_up() -> None:
    said: list[str] = []
    began = asyncio.Event()

    async def work() -> None:
        try:
            await deaf(began)
        finally:
            said.append(await heeded(asyncio.sleep(0, "clean")))

    task = asyncio.create_task(work())
    await began.wait()
    task.cancel()
    await task
    assert said == ["clean"]


async def test_an_answer_is_handed_on_and_so_is_an_error() -> None:
    async def fails() -> None:
        raise OSError("broken")

    assert await heeded(asyncio.sleep(0, 7)) == 7
    with pytest.raises(OSError, match="broken"):
        await heeded(fails())

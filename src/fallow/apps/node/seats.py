"""Keeps the books of one engine's slots: what core/slots decides, for requests that come, wait, run and are left."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable

from fallow.core import prefix, slots
from fallow.core.slots import Asker, Ending, Seat
from fallow.ports import Clock

SALT_BYTES = 16


class Taken:
    """A seat while it is taken. Until the engine has answered, it isn't known whether the request ever reached it."""

    def __init__(self, seat: Seat, answered: Callable[[], None]) -> None:
        self.seat = seat
        self.ending: Ending = "lost"
        self._answered = answered

    def began(self) -> None:
        """The engine writes its answer."""
        self.ending = "begun"
        self._answered()

    def refused(self) -> None:
        """The engine won't write one; its slot holds what it held before."""
        self.ending = "refused"


class Seats:
    """The slots of one engine. `at_rest` is around the time in which a request waits for a slot, and so asks nothing of the engine."""

    def __init__(self, count: int, clock: Clock, at_rest: Callable[[], contextlib.AbstractAsyncContextManager[None]]) -> None:
        self._slots = (slots.Slot(),) * count
        self._clock = clock
        self._at_rest = at_rest
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._left = asyncio.Event()

    @contextlib.asynccontextmanager
    async def taken(self, asker: Asker, body: bytes, choices: int) -> AsyncIterator[Taken]:
        """A seat for the request, with room for at most so many choices; waits while all slots are busy."""
        blocks = prefix.blocks(body, salt=self._salt)
        seat = await self._free(asker, blocks, choices)
        self._slots = slots.take(self._slots, seat)

        def answered() -> None:
            self._slots = slots.begin(self._slots, seat, asker, blocks, now_ms=self._clock.now_ms())

        taken = Taken(seat, answered)
        try:
            yield taken
        finally:
            self._slots = slots.leave(self._slots, seat, taken.ending, now_ms=self._clock.now_ms())
            self._left.set()
            self._left = asyncio.Event()

    async def _free(self, asker: Asker, blocks: prefix.Blocks, choices: int) -> Seat:
        """No caller holds one seat while it waits for another, so each wait ends."""
        while (seat := slots.choose(self._slots, asker, blocks, choices=choices)) is None:
            async with self._at_rest():
                await self._left.wait()
        return seat

    def forget(self) -> None:
        """The engine is a new one, and remembers nothing."""
        self._slots = tuple(slots.Slot(is_busy=slot.is_busy) for slot in self._slots)

"""The node's side of one attempt: body in, engine, answer out, under the credit of both sides."""

import asyncio
import contextlib
import logging

import msgspec

from fallow.apps.node.served import Answer, Refused, Served
from fallow.core import credit
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, Failure, FallowError, InvalidRequest
from fallow.model.receipt import Usage
from fallow.ports import Bus, Clock
from fallow.wire import codec, subjects

BODY_WAIT_S = 15.0
"""How long the next part of a body may take."""
ALIVE_MS = 1_000
LEASE_MS = 15_000
"""A gateway that says nothing for so long is dead, and its callers are gone."""

log = logging.getLogger("fallow.node")


class Job:
    """One attempt on this node."""

    def __init__(self, request: m.Request, served: Served, bus: Bus, subject: str, clock: Clock) -> None:
        self.request = request
        self.served = served
        self._bus = bus
        self.subject = subject
        self._clock = clock
        self._body = bytearray(request.body)
        self._body_granted = credit.BODY_WINDOW_BYTES
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._until_bytes = credit.ANSWER_WINDOW_BYTES
        self._sent_bytes = 0
        self.index = 0
        self._said_at_ms = self._leased_at_ms = clock.now_ms()
        self.task: asyncio.Task[None] | None = None
        self.has_said = False

    # what the gateway sends
    def take_body(self, part: m.BodyPart) -> None:
        """More of the body; what doesn't follow on is dropped, and the wait for it runs out."""
        if part.offset == len(self._body) and len(self._body) + len(part.data) <= self.request.body_bytes:
            self._body += part.data
            self._arrived.set()

    def take_credit(self, granted: m.Credit) -> None:
        self._until_bytes = max(self._until_bytes, granted.until_bytes)
        self._room.set()

    def renew(self) -> None:
        """The gateway still waits for this."""
        self._leased_at_ms = self._clock.now_ms()

    def is_abandoned(self) -> bool:
        return self._clock.now_ms() - self._leased_at_ms > LEASE_MS

    async def say_alive(self) -> None:
        """Say so if nothing else was said for a second."""
        if self._clock.now_ms() - self._said_at_ms >= ALIVE_MS:
            await self._say(m.Alive())

    async def say_accepted(self) -> None:
        if not self.has_said:
            await self._say(m.Accepted())

    async def give_up(self, failure: Failure) -> None:
        """Tell the gateway that this attempt ends here."""
        await self._say(m.Final(index=self.index, failure=failure))

    # the work
    async def run(self) -> None:
        """Raises nothing but cancellation: every other end is said to the gateway."""
        try:
            await self._work()
        except Refused as refused:
            await self._fail(refused.failure)
        except BrokerLost:
            pass  # nobody is there to be told; the gateway knows by itself
        except FallowError as error:
            await self._fail(error.failure())

    async def _work(self) -> None:
        await self._gather()
        body = bytes(self._body)
        self._body.clear()
        async with self.served.gate:
            not_ready = await self.served.ready()
            if not_ready is not None:
                raise Refused(not_ready)
            asked_us = _now_us()
            async with self.served.ask(self.request.path, body) as answer:
                await self._relay(answer, asked_us)

    async def _gather(self) -> None:
        """Wait for the rest of the body, granting credit as it comes; raises InvalidRequest if it doesn't."""
        while len(self._body) < self.request.body_bytes:
            until = credit.more(self._body_granted, len(self._body), window=credit.BODY_WINDOW_BYTES)
            if until is not None:
                self._body_granted = until
                await self._say(m.Credit(attempt_id=self.request.attempt_id, until_bytes=until))
            self._arrived.clear()
            try:
                async with asyncio.timeout(BODY_WAIT_S):
                    await self._arrived.wait()
            except TimeoutError:
                raise InvalidRequest("the rest of the request's body did not come") from None

    async def _relay(self, answer: Answer, asked_us: int) -> None:
        head: m.Head | None = answer.head()
        async for piece in answer.pieces():
            if head is not None and (piece.is_last or not head.engine_us):
                head = msgspec.structs.replace(head, engine_us=_now_us() - asked_us)
            data = piece.data
            while len(data) > subjects.PART_BYTES_MAX or (data and not piece.is_last):
                await self._send(data[: subjects.PART_BYTES_MAX], head)
                data, head = data[subjects.PART_BYTES_MAX :], None
            if piece.is_last:
                await self._finish(data, head, answer.usage)
                return

    async def _send(self, data: bytes, head: m.Head | None) -> None:
        await self._have_room()
        await self._say(m.Part(index=self.index, data=data, head=head))
        self.index += 1
        self._sent_bytes += len(data)

    async def _finish(self, data: bytes, head: m.Head | None, usage: Usage | None) -> None:
        await self._have_room()
        await self._say(m.Final(index=self.index, data=data, head=head, usage=usage))
        log.info("attempt done: %s", usage)

    async def _have_room(self) -> None:
        while self._sent_bytes >= self._until_bytes:
            self._room.clear()
            await self._room.wait()

    async def _fail(self, failure: Failure) -> None:
        log.info("attempt failed: %s", failure.code)
        with contextlib.suppress(BrokerLost):
            await self.give_up(failure)

    async def _say(self, message: m.Message) -> None:
        self.has_said = True
        self._said_at_ms = self._clock.now_ms()
        await self._bus.publish(self.subject, codec.encode(message))


def _now_us() -> int:
    return int(asyncio.get_running_loop().time() * 1e6)

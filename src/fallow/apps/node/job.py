"""The node's side of one attempt: body in, engine, answer out."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

import msgspec

from fallow.apps.node import pacing
from fallow.apps.node.outlet import Outlet
from fallow.apps.node.served import Answer, Past, Piece, Refused, Served
from fallow.core import credit
from fallow.core.slots import Asker
from fallow.model import messages as m
from fallow.model.errors import BodyLost, BrokerLost, Failure, FallowError, NotOpened
from fallow.model.receipt import Usage
from fallow.ports import Clock
from fallow.wire import codec
from fallow.wire.commitment import Commitment

BODY_WAIT_S = 15.0
"""How long the next part of a body may take."""

log = logging.getLogger("fallow.node")


class Job:
    """One attempt on this node."""

    def __init__(self, request: m.Request, served: Served, outlet: Outlet, clock: Clock) -> None:
        self.request = request
        self.served = served
        self.outlet = outlet
        self._clock = clock
        self._body = bytearray(request.body)
        self._body_granted = credit.BODY_WINDOW_BYTES
        self._arrived = asyncio.Event()
        self._gathers = True
        self.leased_at_ms = clock.now_ms()
        self.task: asyncio.Task[None] | None = None
        self.usage: Usage | None = None

    def take_body(self, sealed: m.Sealed) -> None:
        """More of the body; what doesn't follow on is dropped, and the wait for it runs out. Raises WireError if it can't be read."""
        if not self._gathers:
            return
        try:
            data = self.outlet.channel.open(sealed.index, sealed.box)
        except NotOpened as error:
            if error.reason == "replayed":
                return
            raise
        part = codec.body_part.read(data)
        if part.offset == len(self._body) and len(self._body) + len(part.data) <= self.request.body_bytes:
            self._body += part.data
            self._arrived.set()

    async def end(self, failure: Failure) -> None:
        """Give the attempt up, and say why."""
        await self._fail(failure)
        if self.task is not None:
            self.task.cancel()

    def renew(self) -> None:
        """The gateway still waits for this."""
        self.leased_at_ms = self._clock.now_ms()

    async def run(self) -> None:
        """Raises nothing that Fallow raises on purpose: every end is said to the gateway."""
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
        self._gathers = False
        body = bytes(self._body)
        self._body.clear()
        self.outlet.commitment = Commitment(self.request.attempt_id, body, self.request.model_digest)
        asker = Asker(org_id=self.request.org_id, key_id=self.request.key_id)
        # what can't be answered is refused before anything loads
        asking = self.served.ask(self.request.path, body, asker, _past(self.request))
        self.served.calls += 1
        try:
            async with self.served.gate:
                not_ready = await self.served.ready(_seconds(self.request.load_wait_ms))
                if not_ready is not None:
                    raise Refused(not_ready)
                asked_us = _now_us()
                async with asking as answer:
                    await self._relay(answer, asked_us)
        finally:
            self.served.calls -= 1

    async def _gather(self) -> None:
        """Wait for the rest of the body, granting credit as it comes; raises BodyLost if it doesn't."""
        while len(self._body) < self.request.body_bytes:
            self._arrived.clear()
            until = credit.more(self._body_granted, len(self._body), window=credit.BODY_WINDOW_BYTES)
            if until is not None:
                self._body_granted = until
                await self.outlet.say(m.Credit(attempt_id=self.request.attempt_id, until_bytes=until))
            try:
                async with asyncio.timeout(BODY_WAIT_S):
                    await self._arrived.wait()
            except TimeoutError:
                raise BodyLost("the rest of the request's body did not come") from None

    async def _relay(self, answer: Answer, asked_us: int) -> None:
        head: m.Head | None = answer.head()
        async with contextlib.aclosing(answer.pieces()) as written, contextlib.aclosing(self._paced(written)) as pieces:
            async for piece in pieces:
                if head is not None and (piece.is_last or not head.engine_us):
                    head = msgspec.structs.replace(head, engine_us=_now_us() - asked_us)
                if piece.is_last:
                    self.usage = answer.usage
                    await self.outlet.finish(piece.data, head, answer.usage, answer.tokens)
                    log.info("attempt done: %s", answer.usage)
                    return
                if piece.data:
                    await self.outlet.part(piece.data, head)
                    head = None

    def _paced(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        match self.request.privacy:
            case "plain":
                return pieces
            case "padded":
                return pacing.stepped(pieces)
            case "whole":
                return pacing.gathered(pieces)

    async def _fail(self, failure: Failure) -> None:
        log.info("attempt failed: %s", failure.code)
        with contextlib.suppress(BrokerLost):
            await self.outlet.fail(failure)


def _past(request: m.Request) -> Past:
    """All attempts of a call write the same id and date into their answers, so that one can go on where another broke off."""
    return Past(answer_id=request.call_id.removeprefix("call_"), made_at_s=request.made_at_s, delivered=request.delivered)


def _seconds(wait_ms: int | None) -> float | None:
    return None if wait_ms is None else wait_ms / 1000


def _now_us() -> int:
    return int(asyncio.get_running_loop().time() * 1e6)

"""What a node says to a gateway about one attempt: in order, under the gateway's credit, and never silent for long."""

import asyncio

from fallow.core import credit
from fallow.model import messages as m
from fallow.model.errors import CallerTooSlow, Failure
from fallow.model.receipt import Usage
from fallow.ports import Bus, Clock
from fallow.wire import codec, seal, subjects
from fallow.wire.commitment import Commitment

ALIVE_MS = 1_000
TOKEN_BYTES = 5
"""What a token's number takes at most in a message."""
ROOM_S_MAX = 60.0
"""How long a caller may read nothing before their answer is given up."""


class Outlet:
    """One attempt's way back, sealed. All of it raises BrokerLost when the broker is away; pieces also CallerTooSlow."""

    def __init__(self, bus: Bus, subject: str, channel: seal.Channel, clock: Clock) -> None:
        self._bus = bus
        self._subject = subject
        self.channel = channel
        self.commitment: Commitment | None = None
        self._clock = clock
        self._room = asyncio.Event()
        self._until_bytes = credit.ANSWER_WINDOW_BYTES
        self.sent_bytes = 0
        self._index = 0
        self._said_at_ms = clock.now_ms()
        self.has_said = False

    def grant(self, granted: m.Credit) -> None:
        """The gateway has room again."""
        self._until_bytes = max(self._until_bytes, granted.until_bytes)
        self._room.set()

    async def part(self, data: bytes, head: m.Head | None) -> None:
        """A piece of the answer, in as many messages as the broker's limit asks for."""
        for at in range(0, len(data), subjects.PART_BYTES_MAX):
            piece = data[at : at + subjects.PART_BYTES_MAX]
            await self._have_room()
            if self.commitment is not None:
                self.commitment.add(piece)
            await self._seal(m.Part(index=self._index, data=piece, head=None if at else head))
            self._index += 1
            self.sent_bytes += len(piece)

    async def finish(self, data: bytes, head: m.Head | None, usage: Usage | None, tokens: tuple[int, ...] = ()) -> None:
        """The last piece, and with it our word for the whole answer."""
        tokens = tokens if len(tokens) <= m.TOKENS_MAX else ()
        split = max(0, len(data) - 1) // subjects.PART_BYTES_MAX * subjects.PART_BYTES_MAX
        if len(data) - split + TOKEN_BYTES * len(tokens) > subjects.PART_BYTES_MAX:
            split = len(data)  # the tokens fill the last message
        await self.part(data[:split], head)
        await self._have_room()
        assert self.commitment is not None, "what is answered was asked"
        self.commitment.add(data[split:])
        digest = self.commitment.digest(usage, tokens)
        final = m.Final(index=self._index, data=data[split:], head=None if split else head, usage=usage, tokens=tokens, digest=digest)
        await self._seal(final)

    async def fail(self, failure: Failure) -> None:
        """The attempt ends here, with nothing more."""
        await self._seal(m.Final(index=self._index, failure=failure))

    async def say_accepted(self) -> None:
        """If nothing was said yet."""
        if not self.has_said:
            await self.say(m.Accepted())

    async def say_alive(self) -> None:
        """If nothing was said for a second."""
        if self._clock.now_ms() - self._said_at_ms >= ALIVE_MS:
            await (self._seal(m.Alive()) if self.channel.pads else self.say(m.Alive()))

    async def _seal(self, message: m.Inner) -> None:
        index, box = self.channel.seal(codec.encode(message))
        await self.say(m.Sealed(index=index, box=box))

    async def say(self, message: m.Message) -> None:
        self.has_said = True
        self._said_at_ms = self._clock.now_ms()
        await self._bus.publish(self._subject, codec.encode(message))

    async def _have_room(self) -> None:
        while self.sent_bytes >= self._until_bytes:
            self._room.clear()
            try:
                async with asyncio.timeout(ROOM_S_MAX):
                    await self._room.wait()
            except TimeoutError:
                raise CallerTooSlow(f"the caller read nothing for {ROOM_S_MAX:g} s") from None

"""One attempt under way at the gateway: what came of its answer, opened and counted, and what is to be done for the caller."""

import asyncio
from collections import deque
from typing import Literal, get_args

from fallow.core import credit, relay
from fallow.model import messages as m
from fallow.model.call import Attempt
from fallow.model.errors import NotOpened, WireError
from fallow.ports import Clock
from fallow.wire import codec, seal, subjects
from fallow.wire.commitment import Commitment

Untaken = Literal["not_asked", "malformed", "too_much", "altered", "not_committed"]
"""Why something that came as an answer isn't taken, as it is counted."""
UNTAKEN: tuple[Untaken, ...] = get_args(Untaken)


class Unfit(Exception):
    """What came isn't what the node may send; `reason` is for those who count."""

    def __init__(self, reason: Untaken, message: str, *, code: str = "answer_malformed") -> None:
        super().__init__(reason)
        self.reason: Untaken = reason
        self.event = relay.Broken(code=code, message=message)


class Conversation:
    """One attempt under way: its state, and what is still to be done for the caller."""

    def __init__(self, attempt: Attempt, state: relay.Relay, clock: Clock) -> None:
        self.attempt = attempt
        self.relay = state
        self._clock = clock
        self._effects: deque[relay.Effect] = deque()
        self._wake: asyncio.Future[None] | None = None
        self.granted_bytes = credit.ANSWER_WINDOW_BYTES
        self.taken_bytes = 0
        self.received_bytes = 0
        self.body_until = 0
        self.body_room = asyncio.Event()
        self.request: m.Request | None = None
        self.session = b""
        self.channel: seal.Channel | None = None
        self._commitment: Commitment | None = None
        self.rest: asyncio.Task[None] | None = None
        """Sends what of the body the request left out."""

    @property
    def is_over(self) -> bool:
        return self.relay.phase == "done"

    def hear(self, event: relay.Event) -> None:
        """Something happened to this attempt."""
        self.relay, effects = relay.step(self.relay, event, now_ms=self._clock.now_ms())
        if effects:
            self._effects.extend(effects)
        if (effects or self.relay.phase == "done") and self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def next(self) -> relay.Effect | None:
        """The next thing to do; None when all is done. The caller must have taken what came before."""
        while not self._effects:
            if self.is_over:
                return None
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._effects.popleft()

    def asked(self, request: m.Request, body: bytes, session: bytes, channel: seal.Channel) -> None:
        """The request is about to leave, under this session and through this channel."""
        self.request, self.session, self.channel = request, session, channel
        self.body_until = credit.BODY_WINDOW_BYTES
        self._commitment = Commitment(self.attempt.id, body, request.model_digest)

    def take(self, sealed: m.Sealed) -> None:
        """Hear what the node sealed; raises Unfit if it isn't from the node, or not what the node may send."""
        if self.channel is None or self._commitment is None or self.is_over:
            return
        try:
            message = codec.inner.read(self.channel.open(sealed.index, sealed.box))
        except NotOpened as error:
            if error.reason == "replayed":
                return  # it was there before, or was overtaken: then it is missing already
            raise Unfit("altered", error.message, code=error.code) from None
        except WireError:
            raise Unfit("malformed", "the node sent a message that can't be read") from None
        if isinstance(message, m.Part | m.Final):
            self.received_bytes += len(message.data)
            if self.received_bytes > self.granted_bytes + subjects.PART_BYTES_MAX:
                raise Unfit("too_much", "the node sent more than it was granted")
            if message.index == self.relay.next_index:
                self._commitment.add(message.data)
        if (
            isinstance(message, m.Final)
            and message.failure is None
            and message.index == self.relay.next_index
            and message.digest != self._commitment.digest(message.usage, message.tokens)
        ):
            raise Unfit("not_committed", "the node commits to another answer than the one that came")
        self.hear(message)

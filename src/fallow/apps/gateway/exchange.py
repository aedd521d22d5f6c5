"""The gateway's side of the bus: what comes back from nodes finds its attempt here, and every timer is here."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable

from fallow.apps.gateway.conversation import Conversation, Unfit, Untaken
from fallow.apps.gateway.sessions import Sessions
from fallow.core import credit, relay
from fallow.model import messages as m
from fallow.model.call import Attempt
from fallow.model.errors import BrokerLost, NodeSilent, NodeUnreachable, NotOpened, WireError
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Bus, Clock, Delivery, Hear
from fallow.wire import codec, subjects

SWEEP_S = 0.1
LEASE_EVERY_S = 5.0
LEASE_ATTEMPTS_MAX = 1_000

log = logging.getLogger("fallow.gateway")


def nobody_counts(reason: Untaken) -> None:
    """For who doesn't count."""


class Exchange:
    """All attempts of this gateway that are under way."""

    def __init__(self, bus: Bus, clock: Clock, sessions: Sessions) -> None:
        self.gateway_id = sessions.asker.hello.gateway_id
        self._bus = bus
        self._clock = clock
        self.sessions = sessions
        self._open: dict[str, Conversation] = {}
        self.refused: Callable[[Untaken], None] = nobody_counts
        """Told why an answer was not taken."""
        self.on_other: Hear = lambda delivery: None
        """Hears what answers no attempt: echoes, and what comes too late."""

    async def start(self) -> None:
        await self._bus.subscribe(subjects.answers(self.gateway_id), self._on_answer)
        self._bus.on_lost(lambda: self.end_all(relay.BusLost()))

    async def sweep(self, also: Callable[[], Awaitable[None]]) -> None:
        """Drive every timer until cancelled; `also` runs each time."""
        leased_at = self._clock.now_ms()
        while True:
            await asyncio.sleep(SWEEP_S)
            for conversation in list(self._open.values()):
                conversation.hear(relay.Tick())
            await also()
            if self._clock.now_ms() - leased_at >= LEASE_EVERY_S * 1000:
                leased_at = self._clock.now_ms()
                await self._renew()

    def open(self, attempt: Attempt, state: relay.Relay) -> Conversation:
        conversation = Conversation(attempt, state, self._clock)
        self._open[attempt.id] = conversation
        return conversation

    def close(self, conversation: Conversation) -> None:
        self._open.pop(conversation.attempt.id, None)

    @property
    def under_way(self) -> int:
        return len(self._open)

    async def ask(self, conversation: Conversation, request: m.Request, body: bytes) -> None:
        """Send a request, sealed; the reply subject is the answer's, so that 'nobody listens there' comes to it as well.

        Raises BrokerLost. A node with which no session can be opened is heard of as an event.
        """
        attempt = conversation.attempt
        session = self.sessions.now(attempt.node_id)
        if session is None:
            try:
                session = await self.sessions.ready(attempt.node_id)
            except (NodeSilent, NodeUnreachable, WireError) as error:
                return conversation.hear(relay.Broken(code=error.code, message=error.message))
            conversation.hear(relay.Asked())
        if conversation.is_over:
            return
        number, channel = session.call()
        channel.pads = request.privacy != "plain"
        conversation.asked(request, body, session.id, channel)
        _, box = channel.seal(codec.encode(request))
        sealed = m.SealedRequest(session=session.id, number=number, box=box)
        subject = subjects.answer(self.gateway_id, attempt.node_id, attempt.id)
        await self._bus.publish(subjects.request(attempt.node_id), codec.encode(sealed), subject)

    async def send_body(self, conversation: Conversation, body: bytes, start: int) -> None:
        """Send the rest of a body as the node grants it; returns when it is out or the attempt is over."""
        attempt, channel = conversation.attempt, conversation.channel
        assert channel is not None, "the body follows on the request"
        subject = subjects.body(attempt.node_id, attempt.id)
        while start < len(body) and not conversation.is_over:
            spans = credit.parts(len(body), start=start, until=conversation.body_until, part_max=subjects.PART_BYTES_MAX)
            for begin, end in spans:
                index, box = channel.seal(codec.encode(m.BodyPart(offset=begin, data=body[begin:end])))
                await self._bus.publish(subject, codec.encode(m.Sealed(index=index, box=box)))
                start = end
            while start < len(body) and start >= conversation.body_until and not conversation.is_over:
                conversation.body_room.clear()
                await conversation.body_room.wait()

    async def took(self, conversation: Conversation, size: int) -> None:
        """The caller has these bytes: let the node send more when it's worth a message."""
        conversation.taken_bytes += size
        until = credit.more(conversation.granted_bytes, conversation.taken_bytes, window=credit.ANSWER_WINDOW_BYTES)
        if until is not None and not conversation.is_over:
            conversation.granted_bytes = until
            await self._tell(conversation.attempt.node_id, m.Credit(attempt_id=conversation.attempt.id, until_bytes=until))

    async def tell(self, attempt: Attempt, message: m.ToNode) -> None:
        """Say something of an attempt; the reply subject is the answer's, as in `ask`."""
        await self._tell(attempt.node_id, message, subjects.answer(self.gateway_id, attempt.node_id, attempt.id))

    async def _tell(self, node_id: NodeId, message: m.ToNode, reply: str = "") -> None:
        try:
            await self._bus.publish(subjects.control(node_id), codec.encode(message), reply)
        except BrokerLost:
            log.debug("not told: the broker is away")

    def _on_answer(self, delivery: Delivery) -> None:
        conversation = self._open.get(subjects.last_token(delivery.subject))
        if conversation is None:
            if not self.sessions.on_answer(delivery):
                self.on_other(delivery)
            return
        if subjects.answering_node(delivery.subject) != conversation.attempt.node_id:
            self.refused("not_asked")
            return
        if delivery.unheard:
            self._on_unheard(conversation.attempt.node_id)
            return
        try:
            message = codec.to_gateway.read(delivery.data)
        except WireError as error:
            log.warning("an answer can't be read: %s", error)
            self.refused("malformed")
            # It isn't sealed, so anybody on the way can have written it: nothing that counts against the node.
            conversation.hear(relay.Broken(code=NotOpened.code, message="what came as the node's answer can't be read"))
            return
        match message:
            case m.Sealed():
                try:
                    conversation.take(message)
                except Unfit as unfit:
                    self.refused(unfit.reason)
                    conversation.hear(unfit.event)
            case m.Credit():
                conversation.body_until = max(conversation.body_until, message.until_bytes)
                conversation.body_room.set()
            case m.Unopened():
                self.sessions.forget(conversation.attempt.node_id, conversation.session)
                conversation.hear(message)
            case m.Accepted() | m.Alive() | m.Lost():
                conversation.hear(message)

    def _on_unheard(self, node_id: NodeId) -> None:
        """What the broker says of one attempt's node is true for all of its attempts."""
        for conversation in list(self._open.values()):
            if conversation.attempt.node_id == node_id:
                conversation.hear(relay.Unheard())

    def end_all(self, why: relay.BusLost) -> None:
        """Nothing more can come for any attempt."""
        for conversation in list(self._open.values()):
            conversation.hear(why)
            conversation.body_room.set()

    async def _renew(self) -> None:
        by_node: defaultdict[NodeId, list[AttemptId]] = defaultdict(list)
        for conversation in self._open.values():
            by_node[conversation.attempt.node_id].append(conversation.attempt.id)
        for node_id, attempts in by_node.items():
            for at in range(0, len(attempts), LEASE_ATTEMPTS_MAX):
                some = tuple(attempts[at : at + LEASE_ATTEMPTS_MAX])
                await self._tell(node_id, m.Lease(gateway_id=self.gateway_id, attempt_ids=some))

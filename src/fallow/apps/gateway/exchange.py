"""The gateway's side of the bus: what comes back from nodes finds its attempt here, and every timer is here."""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable

from fallow.core import credit, relay
from fallow.model import messages as m
from fallow.model.call import Attempt
from fallow.model.errors import BrokerLost, WireError
from fallow.model.ids import AttemptId, GatewayId, NodeId
from fallow.ports import Bus, Clock, Delivery, Hear
from fallow.wire import codec, subjects

SWEEP_S = 0.1
LEASE_EVERY_S = 5.0
LEASE_ATTEMPTS_MAX = 1_000

log = logging.getLogger("fallow.gateway")


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


def nobody_counts(reason: str) -> None:
    """For who doesn't count."""


class Exchange:
    """All attempts of this gateway that are under way."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock) -> None:
        self.gateway_id = gateway_id
        self._bus = bus
        self._clock = clock
        self._open: dict[str, Conversation] = {}
        self.refused: Callable[[str], None] = nobody_counts
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

    async def ask(self, conversation: Conversation, request: m.Request) -> None:
        """Send a request; the reply subject is the answer's, so that 'nobody listens there' comes to it as well."""
        attempt = conversation.attempt
        conversation.body_until = credit.BODY_WINDOW_BYTES
        subject = subjects.answer(self.gateway_id, attempt.node_id, attempt.id)
        await self._bus.publish(subjects.request(attempt.node_id), codec.encode(request), subject)

    async def send_body(self, conversation: Conversation, body: bytes, start: int) -> None:
        """Send the rest of a body as the node grants it; returns when it is out or the attempt is over."""
        attempt = conversation.attempt
        subject = subjects.body(attempt.node_id, attempt.id)
        while start < len(body) and not conversation.is_over:
            spans = credit.parts(len(body), start=start, until=conversation.body_until, part_max=subjects.PART_BYTES_MAX)
            for begin, end in spans:
                await self._bus.publish(subject, codec.encode(m.BodyPart(offset=begin, data=body[begin:end])))
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
            conversation.hear(relay.Broken())
            return
        if isinstance(message, m.Part | m.Final):
            conversation.received_bytes += len(message.data)
            if conversation.received_bytes > conversation.granted_bytes + subjects.PART_BYTES_MAX:
                self.refused("too_much")
                conversation.hear(relay.Broken(message="the node sent more than it was granted"))
                return
        if isinstance(message, m.Credit):
            conversation.body_until = max(conversation.body_until, message.until_bytes)
            conversation.body_room.set()
        else:
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

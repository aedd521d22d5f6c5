"""One attempt of a call: ask the node, relay its answer to the caller, and notice who leaves."""

import asyncio
import secrets
from collections.abc import Coroutine
from typing import NamedTuple, Protocol

import msgspec

from fallow.apps.gateway.conversation import Conversation
from fallow.apps.gateway.delivery import MOVED, Delivery
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.race import Race
from fallow.apps.gateway.roster import Roster
from fallow.core import relay
from fallow.model import messages as m
from fallow.model.call import Attempt, Call
from fallow.model.errors import BrokerLost, Failure
from fallow.model.ids import AttemptId, NodeId
from fallow.model.offer import Offer, Price
from fallow.model.quote import Place
from fallow.model.receipt import Usage
from fallow.ports import Clock
from fallow.wire import subjects

WATCH_AFTER_S = 0.05
"""Most calls of a stub are over by then; only longer ones pay for watching the caller."""
PIECE_BYTES = 5
"""What a piece of a text takes in a message beside its bytes."""
ANSWER_BYTES_MAX = 32 * 1024 * 1024
"""An answer that is held until it is whole."""


class Caller(Protocol):
    """The HTTP side of a call. `load_wait_ms` is how long they are willing to wait for a model to be loaded, if they said so."""

    load_wait_ms: int | None

    def trying(self, origin: "Origin") -> None:
        """A node is asked."""

    def tried(self, failure: Failure | None) -> None:
        """It is done with, well or not."""

    def waits(self, why: str) -> None:
        """The call is asked again in a while."""

    async def begin(self, head: m.Head, origin: "Origin") -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def finish(self, data: bytes, head: m.Head | None, origin: "Origin") -> None: ...

    async def gone(self) -> None:
        """Return when the caller has closed the connection."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer comes from, why, and at what price; `readers` can read it besides the caller."""

    node_id: NodeId
    hardware: str
    attempts: int
    place: Place
    price: Price
    readers: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended. No failure and no usage: the caller left, or the engine didn't count. `lost`: another attempt was heard."""

    failure: Failure | None = None
    usage: Usage | None = None
    started: bool = False
    attempts: int = 0
    node_id: NodeId | None = None
    left: bool = False
    lost: bool = False


class Errand(NamedTuple):
    """What all attempts of a call have in common."""

    call: Call
    body: bytes
    caller: Caller
    delivery: Delivery


class Attempts:
    """Makes attempts."""

    def __init__(self, exchange: Exchange, roster: Roster, clock: Clock) -> None:
        self._exchange = exchange
        self._roster = roster
        self._clock = clock
        self.group: asyncio.TaskGroup | None = None

    async def make(self, errand: Errand, place: Place, *, number: int, race: Race) -> Outcome:
        """One attempt, to its end; that of one which lost its race has neither failure nor usage."""
        call, body, caller, delivery = errand
        now = self._clock.now_ms()
        attempt = Attempt(id=AttemptId(secrets.token_hex(16)), call_id=call.id, node_id=place.node_id, number=number, asked_at_ms=now)
        first_ms, wait_ms = place.quote.first_token_in_ms, caller.load_wait_ms or 0
        state = relay.ask(now_ms=now, first_token_in_ms=first_ms, keeps=not call.stream, load_wait_ms=wait_ms)
        conversation = self._exchange.open(attempt, state)
        race.enter(conversation)
        card = self._roster.card(place.node_id)
        market, model = self._roster.market, place.quote.model
        offer = market.offer(place.node_id, model)
        hardware, price = card.hardware.summary() if card else "", offer.price if offer else Price()
        readers = self._exchange.sessions.asker.readers
        origin = Origin(node_id=place.node_id, hardware=hardware, attempts=number, place=place, price=price, readers=readers)
        caller.trying(origin)
        loop = asyncio.get_running_loop()
        helpers: list[asyncio.Task[None]] = []
        watch = loop.call_later(WATCH_AFTER_S, lambda: helpers.append(self._spawn(self._watch(conversation, caller))))
        market.began(attempt.id, call, place.quote, now_s=now / 1000)
        usage: Usage | None = None
        outcome = Outcome(left=True)  # as if cancelled
        try:
            request = _request(call, place, offer, attempt, body, caller.load_wait_ms, delivery.pieces() if delivery.has_begun else None)
            await self._ask(conversation, request, body)
            outcome = await self._relay(errand, conversation, origin, race)
            usage = outcome.usage
            return outcome
        except BrokerLost as error:
            outcome = Outcome(failure=error.failure(), started=delivery.has_begun, attempts=number, node_id=place.node_id)
            return outcome
        finally:
            watch.cancel()
            for helper in [*helpers, conversation.rest]:
                if helper is not None:
                    helper.cancel()
            promised_s, took_s = market.ended(attempt.id, call, usage, now_s=self._clock.now_ms() / 1000)
            left = outcome.left or outcome.lost
            self._roster.heard(place.node_id, outcome.failure, left=left, promised_s=promised_s, took_s=took_s)
            self._exchange.close(conversation)
            if not conversation.is_over:  # we were cancelled
                await self._exchange.tell(attempt, m.Cancel(attempt_id=attempt.id))

    async def _ask(self, conversation: Conversation, request: m.Request, body: bytes) -> None:
        """Send the call, and whatever of its body doesn't fit into the first message."""
        await self._exchange.ask(conversation, request, body)
        if conversation.rest is not None:
            conversation.rest.cancel()
        if len(body) > len(request.body) and not conversation.is_over:
            conversation.rest = self._spawn(self._send_rest(conversation, body, len(request.body)))

    async def _relay(self, errand: Errand, conversation: Conversation, origin: Origin, race: Race) -> Outcome:
        """Carry out what the attempt's state asks for, until it is over."""
        call, body, caller, delivery = errand
        held: list[bytes] = []
        head: m.Head | None = None
        while (effect := await conversation.next()) is not None:
            match effect:
                case relay.Deliver() | relay.Finish() if (call.stream or isinstance(effect, relay.Finish)) and not race.wins(conversation):
                    conversation.hear(relay.CallerLeft())
                case relay.Deliver(data=data):
                    if call.stream and head is None and effect.head is not None:
                        self._roster.market.first(conversation.attempt.id, now_s=self._clock.now_ms() / 1000)
                        await self._begin(caller, delivery, effect.head, origin)
                    head = head or effect.head
                    if not call.stream:
                        held.append(data)
                        if conversation.taken_bytes + len(data) > ANSWER_BYTES_MAX:
                            text = f"the answer is over {ANSWER_BYTES_MAX} bytes; stream it"
                            conversation.hear(relay.Broken(code="answer_too_long", message=text))
                            continue
                    elif data:
                        delivery.add(data)
                        await caller.write(data)
                    await self._exchange.took(conversation, len(data))
                case relay.Finish(usage=usage):
                    await caller.finish(b"".join(held), head, origin)
                    return Outcome(usage=usage, started=True, attempts=origin.attempts, node_id=origin.node_id)
                case relay.Fail(failure=failure):
                    return Outcome(failure=failure, started=delivery.has_begun, attempts=origin.attempts, node_id=origin.node_id)
                case relay.Stop():
                    await self._exchange.tell(conversation.attempt, m.Cancel(attempt_id=conversation.attempt.id))
                case relay.Again() if conversation.request is not None:
                    await self._ask(conversation, conversation.request, body)
                case relay.Ask():
                    await self._exchange.tell(conversation.attempt, m.Ping(attempt_id=conversation.attempt.id))
        lost = race.winner not in (None, conversation)
        return Outcome(left=not lost, lost=lost, attempts=origin.attempts, node_id=origin.node_id)

    async def _begin(self, caller: Caller, delivery: Delivery, head: m.Head, origin: Origin) -> None:
        """The head of the answer; of one that goes on elsewhere, only a word of that."""
        if not delivery.has_begun:
            delivery.has_begun = True
            await caller.begin(head, origin)
        else:
            await caller.write(MOVED % origin.node_id.encode())

    async def _watch(self, conversation: Conversation, caller: Caller) -> None:
        await caller.gone()
        conversation.hear(relay.CallerLeft())

    async def _send_rest(self, conversation: Conversation, body: bytes, start: int) -> None:
        try:
            await self._exchange.send_body(conversation, body, start)
        except BrokerLost:
            conversation.hear(relay.BusLost())

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self.group is not None, "calls come only while the gateway runs"
        return self.group.create_task(work)


def _request(
    call: Call,
    place: Place,
    offer: Offer | None,
    attempt: Attempt,
    body: bytes,
    load_wait_ms: int | None,
    delivered: tuple[str, ...] | None,
) -> m.Request:
    room = subjects.PART_BYTES_MAX
    if delivered:
        room -= len("".join(delivered).encode()) + PIECE_BYTES * len(delivered)
    return m.Request(
        attempt_id=attempt.id,
        call_id=call.id,
        gateway_id=call.gateway_id,
        org_id=call.org_id,
        key_id=call.key_id,
        path=call.path,
        model=place.quote.model,
        stream=call.stream,
        body_bytes=len(body),
        body=body if len(body) <= room else body[: max(0, room)],
        load_wait_ms=load_wait_ms,
        country=call.country,
        made_at_s=call.arrived_at_ms // 1000,
        delivered=delivered,
        model_digest=offer.model_digest if offer else "",
        price=offer.price if offer else Price(),
        cost_max_micro=place.quote.cost_max_micro,
        privacy=call.needs.privacy,
    )

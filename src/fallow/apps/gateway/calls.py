"""A call's way through the gateway: match, ask, relay; and once more elsewhere if a node fails before the answer began."""

import asyncio
import secrets
from collections.abc import Coroutine
from typing import Protocol

import msgspec

from fallow.apps.gateway.errors import refused
from fallow.apps.gateway.exchange import Conversation, Exchange
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.roster import Roster
from fallow.core import relay
from fallow.core.match.decide import match
from fallow.core.retry import is_gone, try_elsewhere
from fallow.model import messages as m
from fallow.model.call import Attempt, Call
from fallow.model.errors import BrokerLost, Failure
from fallow.model.ids import AttemptId, NodeId
from fallow.model.quote import Place, Refuse
from fallow.model.receipt import Usage
from fallow.ports import Clock
from fallow.wire import subjects

WATCH_AFTER_S = 0.05
"""Most calls of a stub are over by then; only longer ones pay for watching the caller."""
ANSWER_BYTES_MAX = 32 * 1024 * 1024
"""An answer that is held until it is whole."""


class Caller(Protocol):
    """The HTTP side of a call. `load_wait_ms` is how long they are willing to wait for a model to be loaded, if they said so."""

    load_wait_ms: int | None

    def trying(self, origin: "Origin") -> None:
        """A node is asked."""

    def tried(self, failure: Failure | None) -> None:
        """It is done with, well or not."""

    async def begin(self, head: m.Head, origin: "Origin") -> None: ...

    async def write(self, data: bytes) -> None: ...

    async def finish(self, data: bytes, head: m.Head | None, origin: "Origin") -> None: ...

    async def gone(self) -> None:
        """Return when the caller has closed the connection."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer comes from."""

    node_id: NodeId
    hardware: str
    attempts: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended. No failure and no usage: the caller left, or the engine didn't count."""

    failure: Failure | None = None
    usage: Usage | None = None
    started: bool = False
    attempts: int = 0
    node_id: NodeId | None = None
    left: bool = False


class Calls:
    """Runs calls."""

    def __init__(self, exchange: Exchange, roster: Roster, clock: Clock, metrics: Metrics) -> None:
        self._exchange = exchange
        self._roster = roster
        self._clock = clock
        self._metrics = metrics
        self.group: asyncio.TaskGroup | None = None

    async def run(self, call: Call, body: bytes, caller: Caller) -> Outcome:
        """Until the answer is out, the caller left, or nothing can be done."""
        failures: tuple[Failure, ...] = ()
        tried: set[NodeId] = set()
        last: NodeId | None = None
        while True:
            decision = match(call, self._roster.candidates(), tried=tried, now_ms=self._clock.wall_ms())
            if isinstance(decision, Refuse):
                failure = failures[-1] if failures else refused(decision, call.needs.model)
                return Outcome(failure=failure, attempts=len(failures), node_id=last)
            last = decision.node_id
            tried.add(last)
            outcome = await self._attempt(call, decision, body, caller, number=len(failures) + 1)
            caller.tried(outcome.failure)
            if outcome.failure is None:
                return outcome
            failures = (*failures, outcome.failure)
            self._metrics.attempt_failed(outcome.failure.code)
            if is_gone(outcome.failure):
                self._roster.forget(last)
            if not try_elsewhere(failures, started=outcome.started):
                return outcome

    async def _attempt(self, call: Call, place: Place, body: bytes, caller: Caller, *, number: int) -> Outcome:
        now = self._clock.now_ms()
        attempt = Attempt(id=AttemptId(secrets.token_hex(16)), call_id=call.id, node_id=place.node_id, number=number, asked_at_ms=now)
        first_ms, wait_ms = place.quote.first_token_in_ms, caller.load_wait_ms or 0
        state = relay.ask(now_ms=now, first_token_in_ms=first_ms, keeps=not call.stream, load_wait_ms=wait_ms)
        conversation = self._exchange.open(attempt, state)
        card = self._roster.card(place.node_id)
        origin = Origin(node_id=place.node_id, hardware=card.hardware.summary() if card else "", attempts=number)
        caller.trying(origin)
        loop = asyncio.get_running_loop()
        helpers: list[asyncio.Task[None]] = []
        watch = loop.call_later(WATCH_AFTER_S, lambda: helpers.append(self._spawn(self._watch(conversation, caller))))
        self._roster.began(place.node_id, call.needs.model)
        try:
            await self._exchange.ask(conversation, _request(call, attempt, body, caller.load_wait_ms))
            if len(body) > subjects.PART_BYTES_MAX:
                helpers.append(self._spawn(self._send_rest(conversation, body)))
            return await self._relay(call, conversation, caller, origin)
        except BrokerLost as error:
            return Outcome(failure=error.failure(), started=conversation.relay.started, attempts=number, node_id=place.node_id)
        finally:
            watch.cancel()
            for helper in helpers:
                helper.cancel()
            self._roster.ended(place.node_id, call.needs.model)
            self._exchange.close(conversation)
            if not conversation.is_over:  # we were cancelled
                await self._exchange.stop(attempt)

    async def _relay(self, call: Call, conversation: Conversation, caller: Caller, origin: Origin) -> Outcome:
        """Carry out what the attempt's state asks for, until it is over."""
        held: list[bytes] = []
        head: m.Head | None = None
        end = Outcome(left=True, attempts=origin.attempts, node_id=origin.node_id)
        while (effect := await conversation.next()) is not None:
            match effect:
                case relay.Deliver(data=data):
                    if call.stream and head is None and effect.head is not None:
                        await caller.begin(effect.head, origin)
                    head = head or effect.head
                    if not call.stream:
                        held.append(data)
                        if conversation.taken_bytes + len(data) > ANSWER_BYTES_MAX:
                            text = f"the answer is over {ANSWER_BYTES_MAX} bytes; stream it"
                            conversation.hear(relay.Broken(code="answer_too_long", message=text))
                            continue
                    elif data:
                        await caller.write(data)
                    await self._exchange.took(conversation, len(data))
                case relay.Finish(usage=usage):
                    await caller.finish(b"".join(held), head, origin)
                    return Outcome(usage=usage, started=True, attempts=origin.attempts, node_id=origin.node_id)
                case relay.Fail(failure=failure):
                    return self._ended(origin, failure, started=call.stream and head is not None)
                case relay.Stop():
                    await self._exchange.stop(conversation.attempt)
        return end

    def _ended(self, origin: Origin, failure: Failure, *, started: bool) -> Outcome:
        return Outcome(failure=failure, started=started, attempts=origin.attempts, node_id=origin.node_id)

    async def _watch(self, conversation: Conversation, caller: Caller) -> None:
        await caller.gone()
        conversation.hear(relay.CallerLeft())

    async def _send_rest(self, conversation: Conversation, body: bytes) -> None:
        try:
            await self._exchange.send_body(conversation, body, subjects.PART_BYTES_MAX)
        except BrokerLost:
            conversation.hear(relay.BusLost())

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self.group is not None, "calls come only while the gateway runs"
        return self.group.create_task(work)


def _request(call: Call, attempt: Attempt, body: bytes, load_wait_ms: int | None) -> m.Request:
    return m.Request(
        attempt_id=attempt.id,
        call_id=call.id,
        gateway_id=call.gateway_id,
        org_id=call.org_id,
        key_id=call.key_id,
        path=call.path,
        model=call.needs.model,
        stream=call.stream,
        body_bytes=len(body),
        body=body if len(body) <= subjects.PART_BYTES_MAX else body[: subjects.PART_BYTES_MAX],
        load_wait_ms=load_wait_ms,
        country=call.country,
    )

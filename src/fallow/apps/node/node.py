"""The node: takes attempts off the bus, runs them, and tells everyone how it is."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Coroutine, Sequence

import msgspec

from fallow.apps.node.job import Job
from fallow.apps.node.jobs import Jobs, quietly
from fallow.apps.node.outlet import Outlet
from fallow.apps.node.pulse import Pulse
from fallow.apps.node.seals import DEFAULT_SUITE, Seals, Speaks
from fallow.apps.node.served import Served
from fallow.core import admit
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, Failure, NotOpened, WireError
from fallow.model.ids import AttemptId
from fallow.model.owner import Refusals, Verdict
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects
from fallow.wire.sign import Sign

ACCEPTED_AFTER_S = 0.02
"""Most failures and some answers are quicker than that, and then no Accepted is needed."""
LEAVE_S = 0.5

log = logging.getLogger("fallow.node")


class Node:
    """One machine with the models it serves. `sign` is of the key whose public half is the card's `node_id`.

    `speaks` tells for whom the gateways that open sessions may speak.
    """

    def __init__(
        self, card: Card, served: Sequence[Served], bus: Bus, clock: Clock, sign: Sign, speaks: Speaks, suite: m.SuiteName = DEFAULT_SUITE
    ) -> None:
        self.card = card
        self._served = {one.model: one for one in served}
        self._bus = bus
        self._clock = clock
        self.jobs = Jobs(clock)
        self._is_leaving = False
        self.seals = Seals(card.node_id, sign, speaks, clock, suite)
        self.pulse = Pulse(card, served, self.jobs.running, bus, clock, sign, self.seals)
        self._group: asyncio.TaskGroup | None = None
        self._refusals = Refusals()

    async def run(self, until: asyncio.Event) -> None:
        """Serve until told; then say so, give up what runs, and stop the engines."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            background = [group.create_task(one.run(), name=f"engine {one.model}") for one in self._served.values()]
            node_id = self.card.node_id
            self._bus.on_lost(self.jobs.give_up)
            self._bus.on_lost(self.pulse.introduce)
            await self._bus.subscribe(subjects.request(node_id), self._on_request)
            await self._bus.subscribe(subjects.bodies(node_id), self._on_body)
            await self._bus.subscribe(subjects.control(node_id), self._on_control)
            await self._bus.subscribe(subjects.hold(node_id), self.pulse.on_hub)
            background += [group.create_task(self.pulse.run(), name="pulse"), group.create_task(self.pulse.echo(), name="echo")]
            background.append(group.create_task(self.jobs.tick(), name="tick"))
            await until.wait()
            await self._leave()
            self.jobs.give_up()
            self._group = None
            for task in background:
                task.cancel()

    async def drain(self, now: asyncio.Event, within_s: float) -> None:
        """Say that we leave, take no more calls, and let those that run come to their end: for so long, or until `now` is set."""
        self.pulse.state = "leave"
        self._is_leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await quietly(functools.partial(self.pulse.beat, full=False))
        either = [asyncio.ensure_future(self.jobs.over()), asyncio.ensure_future(now.wait())]
        try:
            await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in either:
                one.cancel()

    async def _leave(self) -> None:
        self.pulse.state = "leave"
        self._is_leaving = True
        try:
            async with asyncio.timeout(LEAVE_S):
                await self.pulse.beat(full=False)
                leaving = Failure(code="leaving", message="the node is leaving the network")
                for job in self.jobs:
                    await job.outlet.fail(leaving)
        except (BrokerLost, TimeoutError):
            log.info("left without a word: the broker is away")

    # what the owner says
    def take(self, verdict: Verdict, drops: bool) -> None:
        """Tell everyone what the owner gate says; with `drops`, calls that run end here, to go on elsewhere."""
        if self._group is not None:
            if not self._is_leaving:
                # Freed memory is nothing that gateways need to know; "leave" would mean that the node goes for good.
                self.pulse.state = "pause" if verdict.state == "leave" else verdict.state
            self._spawn(self._yield(list(self.jobs) if drops else []))

    async def _yield(self, jobs: list[Job]) -> None:
        """First the heartbeat, so that no gateway sends the same call here again."""
        await quietly(functools.partial(self.pulse.beat, full=False))
        for job in jobs:
            await job.end(admit.yielding())

    def renewed(self, enrolled: m.Enrolled) -> None:
        """The hub vouches for us anew."""
        self.card = msgspec.structs.replace(self.card, membership=enrolled.membership, member_until_s=enrolled.expires_at_s)
        self.pulse.change(self.card, self._refusals)

    def refuse(self, refusals: Refusals) -> None:
        """What and whom the owner doesn't work for, from now on."""
        self._refusals = refusals
        self.card = msgspec.structs.replace(
            self.card,
            sequence=max(self.card.sequence + 1, self._clock.wall_ms()),
            refuses_organisations=refusals.organisations,
            refuses_countries=refusals.countries,
        )
        self.pulse.change(self.card, refusals)

    # what comes from gateways
    def _on_request(self, delivery: Delivery) -> None:
        if self._group is None:
            return  # we have left; the asker's silence timer sees to it
        try:
            request, channel = self.seals.open(codec.sealed_request.read(delivery.data))
            # The answer goes where the subject table says, not where the request asks: a reply subject is a stranger's word.
            subject = subjects.answer(request.gateway_id, self.card.node_id, request.attempt_id)
        except NotOpened as error:
            log.warning("a call could not be opened: %s", error)
            runs = self.jobs.find(AttemptId(subjects.last_token(delivery.reply))) is not None
            if error.reason != "replayed" or not runs:  # what was sent twice on the way runs already, and its gateway must not send it anew
                self._spawn(self._answer(delivery.reply, m.Unopened(reason=error.reason)))
            return
        except WireError as error:
            self._spawn(self._answer(delivery.reply, _refusal(delivery.data, error)))
            return
        if self.jobs.find(request.attempt_id) is not None:
            return  # the same request twice
        channel.pads = request.privacy != "plain"
        outlet = Outlet(self._bus, subject, channel, self._clock)
        refusal = self._admit(request)
        if refusal is not None:
            self._spawn(quietly(functools.partial(outlet.fail, refusal)))
            return
        job = Job(request, self._served[request.model], outlet, self._clock)
        self.jobs.start(job, self._group)
        asyncio.get_running_loop().call_later(ACCEPTED_AFTER_S, self._accept, job)

    def _admit(self, request: m.Request) -> Failure | None:
        served = self._served.get(request.model)
        desk = admit.Desk(
            leaving=self._is_leaving,
            yielding=self.pulse.state in ("pause", "leave"),
            refuses=self._refusals.organisations | self._refusals.countries,
            running=self.jobs.running(served) if served else 0,
            slots=served.slots if served else 0,
            waiting_max=served.waiting_max if served else 0,
            bodies_bytes=self.jobs.bodies_bytes,
        )
        offered = {name: one.paths - self._refusals.paths for name, one in self._served.items() if name not in self._refusals.models}
        refusal = admit.admit(request, desk, offered)
        if refusal is not None or served is None:
            return refusal
        return admit.terms(request, model_digest=served.digest, asked=self.pulse.prices(request.model))

    def _accept(self, job: Job) -> None:
        if self._group is not None and not job.outlet.has_said and job.task is not None and not job.task.done():
            self._spawn(quietly(job.outlet.say_accepted))

    def _on_body(self, delivery: Delivery) -> None:
        job = self.jobs.find(AttemptId(subjects.last_token(delivery.subject)))
        if job is None:
            return
        try:
            job.take_body(codec.sealed_body.read(delivery.data))
        except WireError:
            # Altered on the way: the rest would be waited for in vain, and that would look like the node's fault.
            altered = NotOpened("a part of the call's body was altered on the way")
            self._spawn(job.end(altered.failure()))

    def _on_control(self, delivery: Delivery) -> None:
        try:
            message = codec.to_node.read(delivery.data)
        except WireError as error:
            log.warning("a control message was dropped: %s", error)
            self._spawn(self._answer(delivery.reply, m.Unopened(reason="altered")))  # so that nobody waits for an answer to a hello
            return
        match message:
            case m.Cancel():
                job = self.jobs.find(message.attempt_id)
                if job is not None and job.task is not None:
                    job.task.cancel()
            case m.Credit():
                job = self.jobs.find(message.attempt_id)
                if job is not None:
                    job.outlet.grant(message)
            case m.Lease():
                for attempt_id in message.attempt_ids:
                    job = self.jobs.find(attempt_id)
                    if job is not None:
                        job.renew()
            case m.Introduce():
                self.pulse.introduce()
            case m.Ping():
                is_here = self.jobs.find(message.attempt_id) is not None
                self._spawn(self._answer(delivery.reply, m.Alive() if is_here else m.Lost()))
            case m.Hello():
                answer = self.seals.welcome(message)
                if answer is not None:
                    self._spawn(self._answer(delivery.reply, answer))

    async def _answer(self, subject: str, message: m.Message | bytes) -> None:
        async def say() -> None:
            await self._bus.publish(subject, message if isinstance(message, bytes) else codec.encode(message))

        if subject.startswith("rsp."):
            await quietly(say)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self._group is not None, "messages come only while the node runs"
        return self._group.create_task(work)


def _refusal(data: bytes, error: WireError) -> m.Message | bytes:
    """What a gateway is told whose request can't be read: in its own words if it is so old that it doesn't seal."""
    if data[:1] == bytes([codec.UNSEALED_MAJOR]):
        return codec.unsealed_refusal(Failure(code=error.code, message="this node takes sealed calls only; update the gateway"))
    return m.Unopened(reason="altered")

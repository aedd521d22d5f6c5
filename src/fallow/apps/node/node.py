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
from fallow.apps.node.served import Served
from fallow.core import admit
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, Failure, WireError
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
    """One machine with the models it serves. `sign` is of the key whose public half is the card's `node_id`."""

    def __init__(self, card: Card, served: Sequence[Served], bus: Bus, clock: Clock, sign: Sign) -> None:
        self.card = card
        self._served = {one.model: one for one in served}
        self._bus = bus
        self._clock = clock
        self.jobs = Jobs(clock)
        self._is_leaving = False
        self.pulse = Pulse(card, served, self.jobs.running, bus, clock, sign)
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
            await quietly(functools.partial(job.outlet.fail, admit.yielding()))
            if job.task is not None:
                job.task.cancel()

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
            request = codec.request.read(delivery.data)
        except WireError as error:
            self._spawn(self._answer(delivery.reply, m.Final(index=0, failure=error.failure())))
            return
        if self.jobs.find(request.attempt_id) is not None:
            return  # the same request twice
        refusal = self._admit(request)
        if refusal is not None:
            self._spawn(self._answer(delivery.reply, m.Final(index=0, failure=refusal)))
            return
        # The answer goes where the subject table says, not where the request asks: a reply subject is a stranger's word.
        subject = subjects.answer(request.gateway_id, self.card.node_id, request.attempt_id)
        job = Job(request, self._served[request.model], Outlet(self._bus, subject, self._clock), self._clock)
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
        try:
            subjects.answer(request.gateway_id, self.card.node_id, request.attempt_id)
        except WireError as error:
            return error.failure()
        offered = {name: one.paths - self._refusals.paths for name, one in self._served.items() if name not in self._refusals.models}
        return admit.admit(request, desk, offered)

    def _accept(self, job: Job) -> None:
        if self._group is not None and not job.outlet.has_said and job.task is not None and not job.task.done():
            self._spawn(quietly(job.outlet.say_accepted))

    def _on_body(self, delivery: Delivery) -> None:
        job = self.jobs.find(AttemptId(subjects.last_token(delivery.subject)))
        if job is None:
            return
        try:
            job.take_body(codec.body_part.read(delivery.data))
        except WireError as error:
            log.warning("a body's part was dropped: %s", error)

    def _on_control(self, delivery: Delivery) -> None:
        try:
            message = codec.to_node.read(delivery.data)
        except WireError as error:
            log.warning("a control message was dropped: %s", error)
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
                lost = Failure(code="attempt_lost", message="the node doesn't know this attempt any more")
                is_here = self.jobs.find(message.attempt_id) is not None
                self._spawn(self._answer(delivery.reply, m.Alive() if is_here else m.Final(index=0, failure=lost)))

    async def _answer(self, subject: str, message: m.Final | m.Alive) -> None:
        async def say() -> None:
            await self._bus.publish(subject, codec.encode(message))

        if subject.startswith("rsp."):
            await quietly(say)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self._group is not None, "messages come only while the node runs"
        return self._group.create_task(work)

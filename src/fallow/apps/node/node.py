"""The node: takes attempts off the bus, runs them, and tells everyone how it is."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from fallow.apps.node.job import Job
from fallow.apps.node.outlet import Outlet
from fallow.apps.node.pulse import Pulse
from fallow.apps.node.served import Served
from fallow.core import admit
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import BrokerLost, Failure, FallowError, WireError
from fallow.model.ids import AttemptId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

TICK_S = 0.25
ACCEPTED_AFTER_S = 0.02
"""Most failures and some answers are quicker than that, and then no Accepted is needed."""
LEAVE_S = 0.5

log = logging.getLogger("fallow.node")


class Node:
    """One machine with the models it serves."""

    def __init__(self, card: Card, served: Sequence[Served], bus: Bus, clock: Clock) -> None:
        self.card = card
        self._served = {one.model: one for one in served}
        self._bus = bus
        self._clock = clock
        self._jobs: dict[AttemptId, Job] = {}
        self._bodies_bytes = 0
        self._pulse = Pulse(card, served, self._running, bus, clock)
        self._group: asyncio.TaskGroup | None = None

    async def run(self, until: asyncio.Event) -> None:
        """Serve until told; then say so, give up what runs, and stop the engines."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            background = [group.create_task(one.run(), name=f"engine {one.model}") for one in self._served.values()]
            node_id = self.card.node_id
            self._bus.on_lost(self._give_up)
            await self._bus.subscribe(subjects.request(node_id), self._on_request)
            await self._bus.subscribe(subjects.bodies(node_id), self._on_body)
            await self._bus.subscribe(subjects.control(node_id), self._on_control)
            background += [group.create_task(self._pulse.run(), name="pulse"), group.create_task(self._tick(), name="tick")]
            await until.wait()
            await self._leave()
            self._give_up()
            self._group = None
            for task in background:
                task.cancel()

    async def _leave(self) -> None:
        self._pulse.state = "leave"
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._pulse.beat(full=False)
                leaving = Failure(code="leaving", message="the node is leaving the network")
                for job in list(self._jobs.values()):
                    await job.outlet.fail(leaving)
        except (BrokerLost, TimeoutError):
            log.info("left without a word: the broker is away")

    def _give_up(self) -> None:
        """The broker went away: credit, cancels and parts of bodies are lost, and gateways have failed over."""
        for job in self._jobs.values():
            if job.task is not None:
                job.task.cancel()

    def _running(self, served: Served) -> int:
        return sum(job.served is served for job in self._jobs.values())

    # what comes from gateways
    def _on_request(self, delivery: Delivery) -> None:
        if self._group is None:
            return  # we have left; the asker's silence timer sees to it
        try:
            request = codec.request.read(delivery.data)
        except WireError as error:
            self._spawn(self._answer(delivery.reply, m.Final(index=0, failure=error.failure())))
            return
        if request.attempt_id in self._jobs:
            return  # the same request twice
        refusal = self._admit(request)
        if refusal is not None:
            self._spawn(self._answer(delivery.reply, m.Final(index=0, failure=refusal)))
            return
        # The answer goes where the subject table says, not where the request asks: a reply subject is a stranger's word.
        subject = subjects.answer(request.gateway_id, self.card.node_id, request.attempt_id)
        job = Job(request, self._served[request.model], Outlet(self._bus, subject, self._clock), self._clock)
        self._jobs[request.attempt_id] = job
        self._bodies_bytes += request.body_bytes
        job.task = self._spawn(self._run(job))
        job.task.add_done_callback(lambda _: self._forget(job))  # a task cancelled before its first step runs no `finally`
        asyncio.get_running_loop().call_later(ACCEPTED_AFTER_S, self._accept, job)

    def _admit(self, request: m.Request) -> Failure | None:
        served = self._served.get(request.model)
        desk = admit.Desk(
            leaving=self._pulse.state == "leave",
            running=self._running(served) if served else 0,
            slots=served.slots if served else 0,
            waiting_max=served.waiting_max if served else 0,
            bodies_bytes=self._bodies_bytes,
        )
        try:
            subjects.answer(request.gateway_id, self.card.node_id, request.attempt_id)
        except WireError as error:
            return error.failure()
        return admit.admit(request, desk, {name: one.paths for name, one in self._served.items()})

    async def _run(self, job: Job) -> None:
        try:
            await job.run()
        except Exception as error:  # noqa: BLE001  (one attempt's fault must not end the node; its text may hold a prompt)
            log.error("an attempt broke: %s", type(error).__name__)
            await _quietly(functools.partial(job.outlet.fail, Failure(code="engine_failed", message="the node failed")))

    def _forget(self, job: Job) -> None:
        del self._jobs[job.request.attempt_id]
        self._bodies_bytes -= job.request.body_bytes

    def _accept(self, job: Job) -> None:
        if self._group is not None and not job.outlet.has_said and job.task is not None and not job.task.done():
            self._spawn(_quietly(job.outlet.say_accepted))

    def _on_body(self, delivery: Delivery) -> None:
        job = self._jobs.get(AttemptId(subjects.last_token(delivery.subject)))
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
                job = self._jobs.get(message.attempt_id)
                if job is not None and job.task is not None:
                    job.task.cancel()
            case m.Credit():
                job = self._jobs.get(message.attempt_id)
                if job is not None:
                    job.outlet.grant(message)
            case m.Lease():
                for attempt_id in message.attempt_ids:
                    if attempt_id in self._jobs:
                        self._jobs[attempt_id].renew()
            case m.Introduce():
                self._pulse.introduce()

    # time
    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for job in list(self._jobs.values()):
                if admit.is_abandoned(job.leased_at_ms, now_ms=self._clock.now_ms()) and job.task is not None:
                    log.warning("an attempt was given up: its gateway is gone")
                    job.task.cancel()
                else:
                    await _quietly(job.outlet.say_alive)

    async def _answer(self, subject: str, message: m.Final) -> None:
        async def say() -> None:
            await self._bus.publish(subject, codec.encode(message))

        if subject.startswith("rsp."):
            await _quietly(say)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        assert self._group is not None, "messages come only while the node runs"
        return self._group.create_task(work)


async def _quietly(say: Callable[[], Awaitable[None]]) -> None:
    """Say something that may stay unsaid when the broker is away."""
    try:
        await say()
    except FallowError as error:
        log.info("not said: %s", error.code)

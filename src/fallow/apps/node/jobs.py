"""All attempts that a node has on its hands."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator

from fallow.apps.node.job import Job
from fallow.apps.node.served import Served
from fallow.core import admit
from fallow.model.errors import Failure, FallowError
from fallow.model.ids import AttemptId
from fallow.model.receipt import Usage
from fallow.ports import Clock

TICK_S = 0.25

log = logging.getLogger("fallow.node")


class Jobs:
    """Runs them, and forgets each when it is over; `did(usage, uploaded_bytes)` hears of it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._jobs: dict[AttemptId, Job] = {}
        self.bodies_bytes = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.did: Callable[[Usage | None, int], None] = lambda usage, uploaded_bytes: None

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def __len__(self) -> int:
        return len(self._jobs)

    async def over(self) -> None:
        """Until none runs or waits."""
        await self._is_idle.wait()

    def find(self, attempt_id: AttemptId) -> Job | None:
        return self._jobs.get(attempt_id)

    def running(self, served: Served) -> int:
        """How many run or wait for one model."""
        return sum(job.served is served for job in self._jobs.values())

    def start(self, job: Job, group: asyncio.TaskGroup) -> None:
        self._jobs[job.request.attempt_id] = job
        self._is_idle.clear()
        self.bodies_bytes += job.request.body_bytes
        job.task = group.create_task(self._run(job))
        job.task.add_done_callback(lambda _: self._forget(job))  # a task cancelled before its first step runs no `finally`

    async def _run(self, job: Job) -> None:
        try:
            await job.run()
        except Exception as error:  # noqa: BLE001  (one attempt's fault must not end the node; its text may hold a prompt)
            log.error("an attempt broke: %s", type(error).__name__)
            await quietly(functools.partial(job.outlet.fail, Failure(code="engine_failed", message="the node failed")))

    def _forget(self, job: Job) -> None:
        del self._jobs[job.request.attempt_id]
        if not self._jobs:
            self._is_idle.set()
        self.bodies_bytes -= job.request.body_bytes
        self.did(job.usage, job.outlet.sent_bytes)

    def give_up(self) -> None:
        """The broker went away: credit, cancels and parts of bodies are lost, and gateways have failed over."""
        for job in self:
            if job.task is not None:
                job.task.cancel()

    async def tick(self) -> None:
        """Until cancelled: keep the gateways assured, and drop the attempts of those that died."""
        while True:
            await asyncio.sleep(TICK_S)
            for job in self:
                if admit.is_abandoned(job.leased_at_ms, now_ms=self._clock.now_ms()) and job.task is not None:
                    log.warning("an attempt was given up: its gateway is gone")
                    job.task.cancel()
                else:
                    await quietly(job.outlet.say_alive)


async def quietly(say: Callable[[], Awaitable[None]]) -> None:
    """Say something that may stay unsaid when the broker is away."""
    try:
        await say()
    except FallowError as error:
        log.info("not said: %s", error.code)

"""What an engine does with its calls: slots, a queue before them, prompts read one after another, and streams that share steps.

Everything between two events is linear, so that only events cost time.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec

from bench.replay.calls import Asking
from bench.replay.chance import source
from bench.replay.world import PIECE_S, Engine, Machine, step_factor

EPSILON = 1e-7
CALL_SD = 0.05
"""Of the logarithm of how much longer than usual a call's tokens take."""


class Job(msgspec.Struct, kw_only=True, eq=False):
    """A call on an engine. `left` are tokens of its prompt, made longer where reading gets slower."""

    asking: Asking
    attempt: int
    cached: int = 0
    left: float = 0.0
    began_at: float = 0.0
    each: float = 1.0
    first_s: float | None = None


class Running:
    """An engine at work. `version` changes with every change of plan, so that an older plan is known as such."""

    def __init__(self, machine: Machine, engine: Engine, seed: int) -> None:
        self.machine = machine
        self.engine = engine
        self.siblings: Sequence[Running] = (self,)
        self.version = 0
        self._seed = seed
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._writing: list[tuple[float, int, Job]] = []
        self._written = 0.0
        self._context = 0.0
        self._order = 0
        self._at_s = 0.0
        self._known: OrderedDict[tuple[int, int], int] = OrderedDict()

    @property
    def running(self) -> int:
        """Calls in slots and before them."""
        return len(self._waiting) + len(self._reading) + len(self._writing)

    @property
    def is_busy(self) -> bool:
        return bool(self._reading or self._writing)

    def knows(self, session: tuple[int, int]) -> bool:
        """Whether a slot still has what was said in this session."""
        return session in self._known

    def enter(self, job: Job, now_s: float) -> bool:
        """A call comes; False if there is no room."""
        if self.running >= self.engine.slots + self.engine.waiting_max:
            return False
        self._waiting.append(job)
        self._fill()
        return True

    def work(self, now_s: float) -> None:
        """Go on to now. All engines of a machine must, before any of them changes."""
        passed, begin_s, self._at_s = now_s - self._at_s, self._at_s, now_s
        if passed > 0 and self.is_busy:
            read, written = self._rates(begin_s)
            if self._reading:
                self._reading[0].left -= read * passed
            self._written += written * passed

    def reached(self, now_s: float) -> tuple[list[Job], list[Job]]:
        """Who got a first token and who came to the end by now."""
        return self._first(now_s), self._ended()

    def next_s(self) -> float:
        """When something happens, if nothing comes before."""
        if not self.is_busy:
            return math.inf
        read, written = self._rates(self._at_s)
        soonest = (math.floor(self._at_s / PIECE_S) + 1) * PIECE_S
        if self._reading:
            soonest = min(soonest, self._at_s + max(0.0, self._reading[0].left) / read)
        if self._writing and written > 0:
            soonest = min(soonest, self._at_s + max(0.0, self._writing[0][0] - self._written) / written)
        return soonest

    def stop(self) -> list[Job]:
        """The owner is back: whatever runs here is lost."""
        lost = [*self._waiting, *self._reading, *(job for *_, job in self._writing)]
        self._waiting.clear()
        self._reading.clear()
        self._writing.clear()
        self._known.clear()
        self._context = 0.0
        return lost

    def written(self, job: Job) -> int:
        """How many tokens of an answer there are so far."""
        if job.first_s is None:
            return 0
        return min(job.asking.output, 1 + int(max(0.0, self._written - job.began_at) / job.each))

    def _rates(self, now_s: float) -> tuple[float, float]:
        """Tokens per second of the prompt that is being read, and of each stream."""
        sort, engine = self.machine.sort, self.engine
        speed = self.machine.speed(now_s) / max(1, sum(one.is_busy for one in self.siblings))
        streams = len(self._writing)
        share = 1.0 if not streams else sort.reading_share if self._reading else 0.0
        step = step_factor(sort, streams, self._context) / (engine.decode * speed)
        return engine.prefill * speed * share, (1.0 - share) / step if streams else 0.0

    def _fill(self) -> None:
        while self._waiting and len(self._reading) + len(self._writing) < self.engine.slots:
            job = self._waiting.popleft()
            asking = job.asking
            job.cached = min(asking.prompt - 1, self._known.pop(asking.session, 0)) if asking.turn > 1 else 0
            while len(self._known) >= self.engine.slots:
                self._known.popitem(last=False)
            self._known[asking.session] = asking.prompt
            job.left = (asking.prompt - job.cached) * (1.0 + asking.prompt / self.machine.sort.prompt_scale)
            self._context += asking.prompt + asking.output / 2
            self._reading.append(job)

    def _first(self, now_s: float) -> list[Job]:
        found = []
        while self._reading and self._reading[0].left <= EPSILON:
            job = self._reading.popleft()
            job.first_s, job.began_at = now_s, self._written
            job.each = source(self._seed, job.asking.call.id, self.machine.name).lognormvariate(0, CALL_SD)
            self._order += 1
            heapq.heappush(self._writing, (self._written + (job.asking.output - 1) * job.each, self._order, job))
            found.append(job)
        return found

    def _ended(self) -> list[Job]:
        found = []
        while self._writing and self._writing[0][0] <= self._written + EPSILON:
            *_, job = heapq.heappop(self._writing)
            self._context -= job.asking.prompt + job.asking.output / 2
            if job.asking.session in self._known:
                self._known[job.asking.session] = job.asking.prompt + job.asking.output
            found.append(job)
        if found:
            self._fill()
        return found

"""The virtual clock: calls come, gateways choose, machines work, owners come back, until every call has ended once."""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import msgspec

from bench.replay.calls import Asking
from bench.replay.engine import Job, Running
from bench.replay.routers import Later, Router, Sent
from bench.replay.world import SILENT_S, Absence, Machine
from fallow.core.match.survey import Moment
from fallow.model.call import Call
from fallow.model.needs import HardwareKind
from fallow.model.quote import Quote
from fallow.model.receipt import Usage

EPOCH_MS = 1_700_000_000_000
BEAT_S = 2.0
WORD_S = 0.05
"""A node's word takes so long to reach the gateways."""
ATTEMPTS_MAX = 3
DRAIN_S = 7_200.0
"""After the last call no answer takes longer; a call that does is a mistake of this replay."""

Fate = Literal["whole", "refused", "lost"]


class Story(msgspec.Struct, kw_only=True):
    """What became of a call. Times are seconds of the virtual clock."""

    asking: Asking
    tried: list[str] = []
    quote: Quote | None = None
    """The first quote of it, and where from."""
    quoted_s: float = 0.0
    node: str = ""
    hardware: HardwareKind | None = None
    first_s: float | None = None
    end_s: float | None = None
    fate: Fate | None = None
    limit: str = ""
    cached: int = 0
    warm_somewhere: bool = False
    """When it was sent first, some engine still knew its session."""
    paid_usd: float = 0.0

    @property
    def met(self) -> bool:
        """Whether it came to its end and kept every target."""
        needs, at = self.asking.call.needs, self.asking.at_s
        if self.fate != "whole" or self.first_s is None or self.end_s is None:
            return False
        steps = self.asking.output - 1
        return (
            (needs.first_token_within_ms is None or self.first_s - at <= needs.first_token_within_ms / 1000)
            and (needs.per_token_within_ms is None or not steps or self.end_s - self.first_s <= steps * needs.per_token_within_ms / 1000)
            and (needs.deadline_at_ms is None or EPOCH_MS + 1000 * self.end_s <= needs.deadline_at_ms)
        )


class Replayed(NamedTuple):
    """A whole run; `busy_s` are each machine's seconds of work while calls came."""

    stories: list[Story]
    busy_s: dict[str, float]
    digest: str
    span_s: float
    decisions: int


Probe = Callable[[float], None]


class Replay:
    """One run. Of two events at the same time the one that was planned first comes first."""

    def __init__(
        self, machines: Sequence[Machine], routers: Sequence[Router], askings: Sequence[Asking], *, seed: int, span_s: float
    ) -> None:
        self._machines = {machine.name: machine for machine in machines}
        self._engines: dict[str, list[Running]] = {}
        for machine in machines:
            engines = [Running(machine, engine, seed) for engine in machine.engines]
            for one in engines:
                one.siblings = engines
            self._engines[machine.name] = engines
        self._routers = list(routers)
        self._span_s = span_s
        self._stories = {asking.call.id: Story(asking=asking, tried=[]) for asking in askings}
        self._open = len(askings)
        self._busy_s: defaultdict[str, float] = defaultdict(float)
        self._worked_s: defaultdict[str, float] = defaultdict(float)
        self._plan: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._digest = blake2b(digest_size=8)
        self._decisions: Counter[str] = Counter()

    def run(self, probes: Sequence[tuple[float, Probe]] = ()) -> Replayed:
        """From the first second until nothing is open any more."""
        for number, machine in enumerate(self._machines.values()):
            for router in self._routers:
                router.put(machine, "run", now_s=0.0)
            self._at(BEAT_S * (number % 20) / 20, self._beat(machine))
            for absence in machine.absences:
                self._at(absence.begin_s, self._leave(machine, absence))
                self._at(absence.end_s, self._return(machine))
        self._at(0.0, self._second)
        for story in self._stories.values():
            self._at(story.asking.at_s, self._ask(story))
        for at_s, probe in probes:
            self._at(at_s, probe)
        while self._open:
            at_s, _, act = heapq.heappop(self._plan)
            assert at_s < self._span_s + DRAIN_S, f"{self._open} calls never end"
            act(at_s)
        return Replayed(list(self._stories.values()), dict(self._busy_s), self._digest.hexdigest(), self._span_s, self._decisions.total())

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._plan, (at_s, next(self._order), act))

    def _router(self, call: Call) -> Router:
        return self._routers[int(call.gateway_id[3:])]

    # what nodes and gateways do by themselves
    def _second(self, now_s: float) -> None:
        for router in self._routers:
            router.second(now_s)
        self._at(now_s + 1.0, self._second)

    def _beat(self, machine: Machine) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            self._at(now_s + BEAT_S, act)
            if machine.away(now_s) is None:
                running = [one.running for one in self._engines[machine.name]]
                self._at(now_s + WORD_S, lambda at_s: self._hear(machine, running, at_s))

        return act

    def _hear(self, machine: Machine, running: Sequence[int], now_s: float) -> None:
        for router in self._routers:
            router.beat(machine, running, now_s=now_s)

    def _leave(self, machine: Machine, absence: Absence) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            known_s = now_s + (WORD_S if absence.says_so else SILENT_S)
            self._work(machine, now_s)
            jobs = [(engine, job) for engine in self._engines[machine.name] for job in engine.stop()]
            for engine, job in jobs:
                self._at(known_s, self._fail(engine, job, engine.written(job)))
            self._replan(machine)
            if now_s + SILENT_S > absence.end_s and not absence.says_so:
                return  # nobody noticed, but for those whose call was there
            self._at(known_s, lambda _: self._unsay(machine, absence, known_s))

        return act

    def _unsay(self, machine: Machine, absence: Absence, now_s: float) -> None:
        for router in self._routers:
            if absence.says_so:
                router.put(machine, "pause", now_s=now_s)
            else:
                router.gone(machine)

    def _return(self, machine: Machine) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            for router in self._routers:
                router.put(machine, "run", now_s=now_s)

        return lambda now_s: self._at(now_s + WORD_S, act)

    # what happens to calls
    def _ask(self, story: Story) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            call = story.asking.call
            attempt = len(story.tried) + 1
            moment = Moment(EPOCH_MS + round(1000 * now_s), now_s)
            answer = self._router(call).choose(call, tried=story.tried, attempt=attempt, now=moment)
            self._decisions["asked"] += 1
            self._digest.update(f"{call.id}/{attempt}/{now_s:.6f}/{answer}\n".encode())
            if isinstance(answer, Sent):
                if not story.tried:
                    story.quote, story.quoted_s = answer.quote, now_s
                    story.warm_somewhere = story.asking.turn > 1 and self._is_warm_somewhere(story.asking)
                story.tried.append(answer.node)
                machine = self._machines[answer.node]
                engine = next(one for one in self._engines[machine.name] if one.engine.model == call.needs.model)
                job = Job(asking=story.asking, attempt=attempt)
                self._at(now_s + machine.rtt_s / 2, self._enter(engine, job))
            elif isinstance(answer, Later):
                self._at(now_s + max(0.01, answer.after_s), act)
            else:
                story.limit = answer.limit
                self._end(story, "refused", now_s)

        return act

    def _is_warm_somewhere(self, asking: Asking) -> bool:
        model = asking.call.needs.model
        return any(one.knows(asking.session) for engines in self._engines.values() for one in engines if one.engine.model == model)

    def _enter(self, engine: Running, job: Job) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            machine = engine.machine
            absence = machine.away(now_s)
            if absence is not None:
                self._at(now_s + (machine.rtt_s if absence.says_so else SILENT_S), self._fail(engine, job, 0))
                return
            self._work(machine, now_s)
            if not engine.enter(job, now_s):
                self._at(now_s + machine.rtt_s / 2, self._fail(engine, job, 0))
            self._replan(machine)

        return act

    def _work(self, machine: Machine, now_s: float) -> None:
        """All engines of a machine go on to now, and what came of it is told."""
        engines = self._engines[machine.name]
        begin_s, self._worked_s[machine.name] = self._worked_s[machine.name], now_s
        if any(engine.is_busy for engine in engines):
            self._busy_s[machine.name] += max(0.0, min(now_s, self._span_s) - begin_s)
        for engine in engines:
            engine.work(now_s)
        for engine in engines:
            first, ended = engine.reached(now_s)
            for job in first:
                self._at(now_s + machine.rtt_s / 2, self._first(engine, job))
            for job in ended:
                self._at(now_s + machine.rtt_s / 2, self._done(engine, job))

    def _replan(self, machine: Machine) -> None:
        for engine in self._engines[machine.name]:
            engine.version += 1
            at_s = engine.next_s()
            if at_s < self._span_s + DRAIN_S:
                self._at(at_s, self._wake(engine, engine.version))

    def _wake(self, engine: Running, version: int) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            if version == engine.version:
                self._work(engine.machine, now_s)
                self._replan(engine.machine)

        return act

    def _first(self, engine: Running, job: Job) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            call = job.asking.call
            story = self._stories[call.id]
            story.first_s, story.cached = now_s, job.cached
            self._router(call).first(call, engine.machine.name, now_s=now_s)

        return act

    def _done(self, engine: Running, job: Job) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            asking = job.asking
            usage = Usage(prompt_tokens=asking.prompt, cached_tokens=job.cached, output_tokens=asking.output)
            self._router(asking.call).ended(asking.call, engine.machine.name, usage, now_s=now_s)
            story = self._stories[asking.call.id]
            story.node, story.hardware = engine.machine.name, engine.machine.sort.hardware
            self._pay(story, engine, job, asking.output)
            self._end(story, "whole", now_s)

        return act

    def _fail(self, engine: Running, job: Job, written: int) -> Callable[[float], None]:
        def act(now_s: float) -> None:
            call = job.asking.call
            story = self._stories[call.id]
            self._router(call).ended(call, engine.machine.name, None, now_s=now_s)
            story.node, story.hardware = engine.machine.name, engine.machine.sort.hardware
            if written:
                self._pay(story, engine, job, written)
            if written or len(story.tried) >= ATTEMPTS_MAX:
                self._end(story, "lost", now_s)
            else:
                self._ask(story)(now_s)

        return act

    def _pay(self, story: Story, engine: Running, job: Job, written: int) -> None:
        prices = engine.engine
        fresh = job.asking.prompt - job.cached
        story.paid_usd += fresh * prices.prompt_usd + job.cached * prices.cached_usd + written * prices.output_usd

    def _end(self, story: Story, fate: Fate, now_s: float) -> None:
        assert story.fate is None, "a call ends once"
        story.fate, story.end_s = fate, now_s
        self._open -= 1

"""Who asks for what and when: calls drawn by seed in waves and bursts, or with times and sizes from a trace."""

import csv
import datetime
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.replay.chance import source
from bench.replay.world import POOLS
from fallow.core.needs import Asked, needs_of
from fallow.model.call import Call
from fallow.model.errors import Failure
from fallow.model.ids import CallId, GatewayId, KeyId, OrgId
from fallow.model.needs import Needs, Policy, Ring, ServiceTier

PATH = "/v1/chat/completions"
EVERYBODY: frozenset[Ring] = frozenset({"own", "partner", "market"})
KEYS = 40
BYTES_PER_TOKEN = 4
BLOCK_BYTES = 512
WAVE_S, WAVE = 480.0, 0.3
BURST_EACH_S, BURST_S, BURST = 100.0, 10.0, 2.0
"""A burst comes so often, lasts so long, and adds so many times the mean rate."""
BATCH_SHARE, BATCH_MAX = 0.004, 24
"""Some arrivals are many calls of one key at once, which can wait."""
FOLLOW_SHARE = 0.25
FOLLOW_AFTER_S, SESSIONS_MAX = 25.0, 12
PROMPT_MAX, OUTPUT_MAX = 6_000, 1_500


class Asking(NamedTuple):
    """A call, and what only the world knows: its true sizes in tokens, and its session."""

    call: Call
    at_s: float
    prompt: int
    output: int
    session: tuple[int, int]
    turn: int


class Session(msgspec.Struct, kw_only=True):
    """A conversation: the next prompt begins with all of this."""

    number: int
    prompt: int
    at_s: float
    turn: int = 0


class Caller(msgspec.Struct, kw_only=True):
    """A key, and how its calls usually look."""

    key_id: KeyId
    org_id: OrgId
    policy: Policy
    model: str
    prompt_log: float
    output_log: float
    output_sd: float
    limit: int | None
    bytes_per_token: float
    tier: ServiceTier
    first_ms: int | None
    each_ms: int | None
    deadline_ms: int | None
    strict: bool
    sessions: list[Session] = []


class Shape(NamedTuple):
    """A line of a trace: seconds from its beginning, and tokens."""

    at_s: float
    prompt: int
    output: int


def read_trace(path: Path, *, span_s: float, calls_per_s: float) -> list[Shape]:
    """An Azure trace, its times compressed or stretched to the wanted rate; from its beginning again where it is too short."""
    with path.open(newline="") as file:
        rows = [
            (datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    begin, length_s = rows[0][0], rows[-1][0] - rows[0][0]
    factor = len(rows) / length_s / calls_per_s
    found: list[Shape] = []
    for turn in range(math.ceil(span_s / (length_s * factor))):
        for at, prompt, output in rows:
            shape = Shape((at - begin + turn * length_s) * factor, max(1, prompt), max(1, output))
            if shape.at_s >= span_s:
                return found
            found.append(shape)
    return found


def arrivals(chance: random.Random, *, span_s: float, calls_per_s: float) -> Iterator[float]:
    """A Poisson process whose rate goes in waves, with bursts."""
    mean = 1.0 + BURST * BURST_S / BURST_EACH_S
    peak = 1.0 + WAVE + BURST
    at, burst_end, next_burst = 0.0, -1.0, chance.expovariate(1 / BURST_EACH_S)
    while True:
        at += chance.expovariate(calls_per_s * peak / mean)
        if at >= span_s:
            return
        while next_burst <= at:
            burst_end = next_burst + BURST_S
            next_burst += chance.expovariate(1 / BURST_EACH_S)
        rate = 1.0 + WAVE * math.sin(2 * math.pi * at / WAVE_S) + (BURST if at < burst_end else 0.0)
        if chance.random() * peak < rate:
            yield at


class Callers:
    """Everybody who asks in one pool."""

    def __init__(self, pool: str, *, seed: int, gateways: int, epoch_ms: int) -> None:
        self._chance = source(seed, pool, "calls")
        self._make_up = POOLS[pool]
        self._gateways = gateways
        self._epoch_ms = epoch_ms
        self._callers = [self._caller(number) for number in range(KEYS)]
        self._weights = [1.0 / math.sqrt(1 + number) for number in range(KEYS)]
        self._patient = [one for one in self._callers if one.tier == "flex"]
        self._sessions = self._numbers = 0

    def drawn(self, *, span_s: float, calls_per_s: float) -> list[Asking]:
        """The calls of a span of time."""
        found: list[Asking] = []
        per_arrival = 1.0 + BATCH_SHARE * (BATCH_MAX / 2)
        for at in arrivals(self._chance, span_s=span_s, calls_per_s=calls_per_s / per_arrival):
            if self._chance.random() < BATCH_SHARE:
                caller = self._chance.choice(self._patient)
                found += [self._ask(caller, at) for _ in range(self._chance.randint(2, BATCH_MAX))]
            else:
                found.append(self._ask(self._chance.choices(self._callers, self._weights)[0], at))
        return found

    def traced(self, shapes: Sequence[Shape]) -> list[Asking]:
        """Calls with times and sizes from a trace, and our own callers' needs."""
        return [self._ask(self._chance.choices(self._callers, self._weights)[0], one.at_s, one) for one in shapes]

    def _caller(self, number: int) -> Caller:
        chance, make_up = self._chance, self._make_up
        org = chance.choices(list(make_up.callers), list(make_up.callers.values()))[0]
        partners = frozenset(OrgId(one) for one in make_up.callers if one != org) if chance.random() < 0.5 else frozenset()
        tier: ServiceTier = ("default", "default", "flex", "default", "priority", "default", "flex", "default")[number % 8]
        output_log = chance.uniform(math.log(12), math.log(350))
        roll = chance.random()
        says, dated = roll < 0.5 and tier == "default", 0.5 <= roll < 0.65 and tier == "default"
        return Caller(
            key_id=KeyId(f"key-{number:02}"),
            org_id=OrgId(org),
            policy=Policy(rings=EVERYBODY, partners=partners),
            model=chance.choice(make_up.models),
            prompt_log=chance.uniform(math.log(120), math.log(1_400)),
            output_log=output_log,
            output_sd=chance.uniform(0.25, 0.9),
            limit=2 ** math.ceil(math.log2(math.exp(output_log) * 2)) if chance.random() < 0.6 else None,
            bytes_per_token=BYTES_PER_TOKEN * chance.lognormvariate(0, 0.2),
            tier=tier,
            first_ms=chance.choice((1_200, 2_000, 4_000)) if says else None,
            each_ms=chance.choice((80, 150, 250)) if says else None,
            deadline_ms=1000 * chance.choice((15, 45, 120))
            if dated
            else 1000 * chance.choice((240, 900, 3_600))
            if tier == "flex"
            else None,
            strict=tier == "default" and chance.random() < 0.1,
            sessions=[],
        )

    def _ask(self, caller: Caller, at_s: float, shape: Shape | None = None) -> Asking:
        chance = self._chance
        ready = [one for one in caller.sessions if one.at_s + FOLLOW_AFTER_S < at_s and one.prompt < PROMPT_MAX / 2]
        if shape is None and ready and chance.random() < FOLLOW_SHARE / (1 - FOLLOW_SHARE):
            session = chance.choice(ready)
            prompt = session.prompt + chance.randint(20, 200)
        else:
            self._sessions += 1
            session = Session(number=self._sessions, prompt=0, at_s=at_s)
            caller.sessions = [*caller.sessions[-SESSIONS_MAX:], session]
            prompt = round(chance.lognormvariate(caller.prompt_log, 0.7)) if shape is None else shape.prompt
        prompt = max(8, min(PROMPT_MAX, prompt))
        output = round(chance.lognormvariate(caller.output_log, caller.output_sd)) if shape is None else shape.output
        limit = caller.limit if shape is None else 1_024 if caller.limit is not None else None
        output = max(1, min(OUTPUT_MAX, output, limit or OUTPUT_MAX))
        body_bytes = max(1, round(prompt * caller.bytes_per_token * chance.lognormvariate(0, 0.04)))
        session.prompt, session.at_s, session.turn = prompt + output, at_s, session.turn + 1
        self._numbers += 1
        call = self._call(caller, at_s, body_bytes, limit, session.number)
        return Asking(call, at_s, prompt, output, (int(caller.key_id[4:]), session.number), session.turn)

    def _call(self, caller: Caller, at_s: float, body_bytes: int, limit: int | None, session: int) -> Call:
        now_ms = self._epoch_ms + round(1000 * at_s)
        number = self._numbers
        return Call(
            id=CallId(f"call-{number:06}"),
            org_id=caller.org_id,
            key_id=caller.key_id,
            gateway_id=GatewayId(f"gw-{self._chance.randrange(self._gateways)}"),
            path=PATH,
            stream=True,
            body_bytes=body_bytes,
            needs=self._needs(caller, body_bytes, limit, now_ms),
            arrived_at_ms=now_ms,
            country="de",
            prefix=tuple(1_000 * session + block for block in range(body_bytes // BLOCK_BYTES)),
        )

    def _needs(self, caller: Caller, body_bytes: int, limit: int | None, now_ms: int) -> Needs:
        chance = self._chance
        asked = Asked(
            model=caller.model,
            prompt_tokens=max(1, body_bytes // BYTES_PER_TOKEN),
            output_tokens_max=limit,
            service_tier=caller.tier,
            first_token_ms=caller.first_ms,
            per_token_ms=caller.each_ms,
            deadline_ms=caller.deadline_ms,
            strict=caller.strict,
            regions=frozenset({"eu-de"}) if chance.random() < 0.04 else frozenset(),
            hardware="cpu" if chance.random() < 0.02 else None,
        )
        needs = needs_of(asked, caller.policy, now_ms=now_ms)
        assert not isinstance(needs, Failure), "what callers ask agrees with their policy"
        return needs

"""What decides where calls go in the replay: the real matcher, and the rules that it is compared with."""

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from bench.replay.chance import source
from bench.replay.world import Engine, Machine
from fallow.core.match.decide import match
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment, wanted
from fallow.model.call import Call
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import HardwareKind
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.owner import State
from fallow.model.quote import Place, Quote, Refuse
from fallow.model.receipt import Usage

PATH = "/v1/chat/completions"
CONTEXT_TOKENS = 32_768
NEVER_S, NEVER_MS = 1e12, 2**60
USD = 1e12
"""Micro-credits per million tokens in a USD per token."""
WAIT_S = 1.0
OUTPUT_GUESS = 200.0


class Sent(NamedTuple):
    """A call goes to this node; `quote` only where the rule makes any."""

    node: str
    quote: Quote | None = None


class Later(NamedTuple):
    """Ask again."""

    after_s: float


class Never(NamedTuple):
    """The call is refused."""

    limit: str


Answer = Sent | Later | Never


class Router(Protocol):
    """One gateway: it sees what nodes say and what becomes of its own calls, nothing else."""

    def put(self, machine: Machine, state: State, *, now_s: float) -> None: ...
    def gone(self, machine: Machine) -> None: ...
    def beat(self, machine: Machine, running: Sequence[int], *, now_s: float) -> None: ...
    def second(self, now_s: float) -> None: ...
    def choose(self, call: Call, *, tried: Collection[str], attempt: int, now: Moment) -> Answer: ...
    def first(self, call: Call, node: str, *, now_s: float) -> None: ...
    def ended(self, call: Call, node: str, usage: Usage | None, *, now_s: float) -> None: ...


class Matcher:
    """The real thing, driven as a gateway drives it."""

    def __init__(self) -> None:
        self.market = Market()
        self._counted: set[str] = set()
        self._epoch_s = 0.0

    def put(self, machine: Machine, state: State, *, now_s: float) -> None:
        card = card_of(machine)
        for engine in machine.engines:
            load = Load(model=engine.model, readiness="ready", slots_free=engine.slots, waiting=0, waiting_max=engine.waiting_max)
            self.market.put(card, offer_of(machine, engine), load, state, expires_s=NEVER_S, now_s=now_s, rtt_s=machine.rtt_s)

    def gone(self, machine: Machine) -> None:
        self.market.drop(NodeId(machine.name))

    def beat(self, machine: Machine, running: Sequence[int], *, now_s: float) -> None:
        for engine, count in zip(machine.engines, running, strict=True):
            self.market.heard(NodeId(machine.name), engine.model, running=count, now_s=now_s)

    def second(self, now_s: float) -> None:
        self.market.refresh(now_s=now_s)

    def choose(self, call: Call, *, tried: Collection[str], attempt: int, now: Moment) -> Answer:
        if call.id not in self._counted:
            self._counted.add(call.id)
            demand = wanted(call, self.market, now)
            if demand is not None:
                self.market.asked(call, demand, now_s=now.at_s)
        answer = match(call, self.market, tried=[NodeId(one) for one in tried], now=now, attempt=attempt)
        if isinstance(answer, Place):
            self.market.began(f"{call.id}/{answer.node_id}", call, answer.quote, now_s=now.at_s)
            return Sent(answer.node_id, answer.quote)
        return Never(answer.limit) if isinstance(answer, Refuse) else Later(answer.for_ms / 1000)

    def first(self, call: Call, node: str, *, now_s: float) -> None:
        self.market.first(f"{call.id}/{node}", now_s=now_s)

    def ended(self, call: Call, node: str, usage: Usage | None, *, now_s: float) -> None:
        self.market.ended(f"{call.id}/{node}", call, usage, now_s=now_s)


class Rival(NamedTuple):
    """An offer as the known rules see it."""

    machine: Machine
    engine: Engine
    held: int
    """Own calls there, or as many as the last heartbeat said if that was more."""
    mine: int


class Rule:
    """What the known rules have in common: offers that break no hard limit and have room, as far as is known."""

    def __init__(self, seed: int) -> None:
        self._chance = source(seed, type(self).__name__)
        self._machines: dict[str, Machine] = {}
        self._heard: Counter[tuple[str, str]] = Counter()
        self._mine: Counter[tuple[str, str]] = Counter()
        self._where: dict[tuple[str, str], tuple[str, str]] = {}

    def put(self, machine: Machine, state: State, *, now_s: float) -> None:
        if state == "run":
            self._machines[machine.name] = machine
        else:
            self._machines.pop(machine.name, None)

    def gone(self, machine: Machine) -> None:
        self._machines.pop(machine.name, None)

    def beat(self, machine: Machine, running: Sequence[int], *, now_s: float) -> None:
        for engine, count in zip(machine.engines, running, strict=True):
            self._heard[machine.name, engine.model] = count

    def second(self, now_s: float) -> None:
        pass

    def choose(self, call: Call, *, tried: Collection[str], attempt: int, now: Moment) -> Answer:
        rivals = self._rivals(call, tried)
        if not rivals:
            return Later(WAIT_S) if self._can_wait(call, now) else Never("busy")
        chosen = self.pick(call, rivals)
        self._mine[chosen.machine.name, chosen.engine.model] += 1
        self._where[call.id, chosen.machine.name] = (chosen.machine.name, chosen.engine.model)
        return Sent(chosen.machine.name)

    def first(self, call: Call, node: str, *, now_s: float) -> None:
        pass

    def ended(self, call: Call, node: str, usage: Usage | None, *, now_s: float) -> None:
        self._mine[self._where.pop((call.id, node))] -= 1

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        raise NotImplementedError

    def _rivals(self, call: Call, tried: Collection[str]) -> list[Rival]:
        needs = call.needs
        found = []
        for name, machine in self._machines.items():
            if (
                name in tried
                or needs.hardware not in (None, machine.sort.hardware)
                or (needs.regions and machine.region not in needs.regions)
            ):
                continue
            for engine in machine.engines:
                if engine.model == needs.model:
                    mine = self._mine[name, engine.model]
                    held = max(mine, self._heard[name, engine.model])
                    if held < engine.slots + engine.waiting_max:
                        found.append(Rival(machine, engine, held, mine))
        return found

    def _can_wait(self, call: Call, now: Moment) -> bool:
        limit = call.needs.deadline_at_ms
        return now.wall_ms - call.arrived_at_ms < (60_000 if call.needs.service_tier == "flex" else 3_000) and (
            limit is None or now.wall_ms < limit
        )


class RoundRobin(Rule):
    """Each in its turn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._turn = 0

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        self._turn += 1
        return rivals[self._turn % len(rivals)]


class LeastInFlight(Rule):
    """The one with the fewest calls for its slots."""

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        return min(rivals, key=lambda one: (one.held / one.engine.slots, -one.engine.slots, one.machine.name))


class PowerOfTwo(Rule):
    """Of two drawn by chance the one with fewer calls for its slots."""

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        two = self._chance.sample(rivals, min(2, len(rivals)))
        return min(two, key=lambda one: (one.held / one.engine.slots, one.machine.name))


class CheapestFirst(Rule):
    """The cheapest that has a free slot, else the one with the fewest calls."""

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        free = [one for one in rivals if one.held < one.engine.slots]
        if not free:
            return min(rivals, key=lambda one: (one.held / one.engine.slots, one.machine.name))
        return min(free, key=lambda one: (cost_usd(one, call), one.machine.name))


class Believer(Rule):
    """The cheapest with a free slot that meets the needs if everything is as the node says: a plain filter and price."""

    def pick(self, call: Call, rivals: Sequence[Rival]) -> Rival:
        def late(one: Rival) -> float:
            needs, engine = call.needs, one.engine
            step = 1.0 / max(1e-9, rate_with(engine, one.held + 1))
            first = one.machine.rtt_s + needs.prompt_tokens / engine.said_prefill * (1.0 if one.held == 0 else 1.5)
            end = first + step * min(OUTPUT_GUESS, needs.output_tokens_max or OUTPUT_GUESS)
            allowed = (
                math.inf if needs.first_token_within_ms is None else needs.first_token_within_ms / 1000,
                math.inf if needs.per_token_within_ms is None else needs.per_token_within_ms / 1000,
                math.inf if needs.deadline_at_ms is None else (needs.deadline_at_ms - call.arrived_at_ms) / 1000,
            )
            return max(time / limit for time, limit in zip((first, step, end), allowed, strict=True))

        able = [one for one in rivals if one.held < one.engine.slots and late(one) <= 0.8]
        if able:
            return min(able, key=lambda one: (cost_usd(one, call), one.machine.name))
        return min(rivals, key=lambda one: (late(one) * (1 + one.held / one.engine.slots), one.machine.name))


RULES: dict[str, type[Rule]] = {
    "round robin": RoundRobin,
    "least in flight": LeastInFlight,
    "power of two": PowerOfTwo,
    "cheapest first": CheapestFirst,
    "believer": Believer,
}


def rate_with(engine: Engine, streams: int) -> float:
    """One stream's rate beside others, as the node says."""
    best = min(engine.said_by_streams, key=lambda one: abs(one[0] - streams))
    return best[1] / best[0]


def cost_usd(one: Rival, call: Call) -> float:
    output = min(OUTPUT_GUESS, call.needs.output_tokens_max or OUTPUT_GUESS)
    return call.needs.prompt_tokens * one.engine.prompt_usd + output * one.engine.output_usd


def card_of(machine: Machine) -> Card:
    """What the machine says it is."""
    kind: HardwareKind = machine.sort.hardware
    return Card(
        node_id=NodeId(machine.name),
        org_id=OrgId(machine.org),
        sequence=1,
        expires_at_ms=NEVER_MS,
        hardware=Hardware(kind=kind, isa="x86_64-avx2", cores=8, memory_bytes=2**34, gpu=machine.name[:-3] if kind == "gpu" else None),
        isolation="bwrap",
        region=machine.region,
        serves=frozenset({"own", "partner", "market"}),
    )


def offer_of(machine: Machine, engine: Engine) -> Offer:
    """What it offers, with the speeds that it says."""
    return Offer(
        node_id=NodeId(machine.name),
        model=engine.model,
        paths=frozenset({PATH}),
        context_tokens=CONTEXT_TOKENS,
        model_digest="",
        speed=Speed(
            prefill_tokens_per_s=engine.said_prefill, decode_tokens_per_s=engine.said_decode, decode_by_streams=engine.said_by_streams
        ),
        price=Price(
            prompt_micro_per_munit=round(USD * engine.prompt_usd),
            cached_prompt_micro_per_munit=round(USD * engine.cached_usd),
            output_micro_per_munit=round(USD * engine.output_usd),
        ),
        slots=engine.slots,
        expires_at_ms=NEVER_MS,
    )


def router(name: str, *, seed: int, gateway: int) -> Router:
    """A fresh gateway."""
    return Matcher() if name == "match" else RULES[name](seed + random.Random(gateway).randrange(2**30))

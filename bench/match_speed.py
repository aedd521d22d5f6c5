"""How long one decision takes among many offers, while calls come and go: `python -m bench.match_speed [small|one|million|refusal]`."""

import argparse
import gc
import heapq
import random
import time
from collections import Counter
from typing import NamedTuple

import psutil
from msgspec.structs import replace

from bench.offers import PATH, Draws, Lent, percentile
from bench.report import Figure, publish
from fallow.core.match.decide import match
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment, wanted
from fallow.model.call import Call
from fallow.model.ids import CallId, GatewayId, KeyId, OrgId
from fallow.model.needs import Needs
from fallow.model.quote import Place, Quote, Refuse
from fallow.model.receipt import Usage

SEED = 5
NEVER_S = 1e12
WARM_UP = 500
CALLS_PER_S = 100.0
"""Of virtual time: what a gateway of such a market may well have."""
HEARD_SHARE = 0.05
"""Of all offers, those whose number of calls changes in a second because of other gateways."""
REPRICED_SHARE = 0.001
PAUSED_SHARE = 0.001
"""Of all offers, those that change their price, or whose owner comes or goes, in a second."""
REFUSALS = 300


class Size(NamedTuple):
    """One market to measure."""

    offers: int
    models: int
    decisions: int
    goal_us: float


SIZES = {
    "small": Size(10_000, 50, 6_000, 120.0),
    "one": Size(10_000, 1, 5_000, 120.0),
    "million": Size(1_000_000, 500, 2_000, 1_000.0),
}


class Life:
    """A market in use. Virtual time goes on by the calls that come; what happens in between is timed apart."""

    def __init__(self, size: Size, seed: int) -> None:
        self.draws = Draws(seed, models=size.models)
        self.market = Market()
        self.lent: list[Lent] = []
        self.now_s = 0.0
        self.spent: dict[str, list[float]] = {
            name: [] for name in ("decide", "demand", "began", "first", "ended", "heard", "put", "refresh")
        }
        self.cpu_us: list[float] = []
        """Decisions again, without the time that other processes took."""
        self.outcomes: Counter[str] = Counter()
        self.by_outcome: dict[str, list[float]] = {"place": [], "wait": [], "refuse": []}
        self._chance = random.Random(seed + 1)
        self._due: list[tuple[float, int, str, str, Call]] = []
        self._sequence = 0
        self._next_second_s = 1.0

    def build(self, offers: int) -> tuple[float, float]:
        """Draw and put all offers; the seconds that putting and first ordering took."""
        self.lent = [self.draws.lent(number) for number in range(offers)]
        begin = time.perf_counter()
        for one in self.lent:
            self.market.put(one.card, one.offer, one.load, one.state, expires_s=NEVER_S, now_s=0.0, rtt_s=0.02)
        put_s = time.perf_counter() - begin
        for one in self.lent:
            if self._chance.random() < 0.3:
                self.market.heard(one.card.node_id, one.offer.model, running=self._chance.randint(1, one.offer.slots + 1), now_s=0.0)
        begin = time.perf_counter()
        self.market.refresh(now_s=0.0)
        return put_s, time.perf_counter() - begin

    def step(self, number: int) -> None:
        """One call comes."""
        self.now_s += self._chance.expovariate(CALLS_PER_S)
        while self._next_second_s <= self.now_s:
            self._second(self._next_second_s)
            self._next_second_s += 1.0
        while self._due and self._due[0][0] <= self.now_s:
            at, _, kind, booking, call = heapq.heappop(self._due)
            self._event(kind, booking, call, at)
        call = self.draws.call(number, now_ms=round(1000 * self.now_s))
        moment = Moment(call.arrived_at_ms, self.now_s)
        begin = time.perf_counter_ns()
        demand = wanted(call, self.market, moment)
        if demand is not None:
            self.market.asked(call, demand, now_s=self.now_s)
        self._spent("demand", begin)
        begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
        answer = match(call, self.market, now=moment)
        cpu_us = (time.thread_time_ns() - begin_cpu) / 1000
        took_us = self._spent("decide", begin)
        self.cpu_us.append(cpu_us)
        outcome = "place" if isinstance(answer, Place) else "refuse" if isinstance(answer, Refuse) else "wait"
        self.outcomes[outcome] += 1
        self.by_outcome[outcome].append(took_us)
        if isinstance(answer, Place):
            self._run(call, answer.quote)

    def forget_times(self) -> None:
        """The warm-up is over."""
        for values in (*self.spent.values(), *self.by_outcome.values(), self.cpu_us):
            values.clear()
        self.outcomes.clear()

    def _spent(self, what: str, begin_ns: int) -> float:
        took_us = (time.perf_counter_ns() - begin_ns) / 1000
        self.spent[what].append(took_us)
        return took_us

    def _run(self, call: Call, quote: Quote) -> None:
        begin = time.perf_counter_ns()
        self.market.began(call.id, call, quote, now_s=self.now_s)
        self._spent("began", begin)
        first_s = self.now_s + quote.first_token_in_ms / 1000 * self._chance.lognormvariate(0, 0.2)
        end_s = first_s + max(0.05, (quote.end_in_ms - quote.first_token_in_ms) / 1000) * self._chance.lognormvariate(0, 0.6)
        for at, kind in ((first_s, "first"), (end_s, "ended")):
            self._sequence += 1
            heapq.heappush(self._due, (at, self._sequence, kind, call.id, call))

    def _event(self, kind: str, booking: str, call: Call, at_s: float) -> None:
        usage = Usage(prompt_tokens=call.needs.prompt_tokens, output_tokens=self._chance.randint(10, 400))
        begin = time.perf_counter_ns()
        if kind == "first":
            self.market.first(booking, now_s=at_s)
        else:
            self.market.ended(booking, call, usage, now_s=at_s)
        self._spent(kind, begin)

    def _second(self, at_s: float) -> None:
        """What nodes say in a second, and the gateway's own housekeeping."""
        offers = len(self.lent)
        for _ in range(min(2_000, int(HEARD_SHARE * offers))):
            one = self.lent[self._chance.randrange(offers)]
            running = self._chance.randint(0, one.offer.slots)
            begin = time.perf_counter_ns()
            self.market.heard(one.card.node_id, one.offer.model, running=running, now_s=at_s)
            self._spent("heard", begin)
        for _ in range(min(50, int((REPRICED_SHARE + PAUSED_SHARE) * offers))):
            at = self._chance.randrange(offers)
            one = self.lent[at] = self._changed(self.lent[at])
            begin = time.perf_counter_ns()
            self.market.put(one.card, one.offer, one.load, one.state, expires_s=NEVER_S, now_s=at_s, rtt_s=0.02)
            self._spent("put", begin)
        begin = time.perf_counter_ns()
        self.market.refresh(now_s=at_s)
        self._spent("refresh", begin)

    def _changed(self, one: Lent) -> Lent:
        if self._chance.random() < PAUSED_SHARE / (REPRICED_SHARE + PAUSED_SHARE):
            return one._replace(state="run" if one.state == "pause" else "pause")
        factor = self._chance.uniform(0.9, 1.1)
        price = replace(one.offer.price, output_micro_per_munit=max(1, round(factor * one.offer.price.output_micro_per_munit)))
        return one._replace(offer=replace(one.offer, price=price))


def measure(name: str, seed: int) -> list[Figure]:
    """Decisions in one market."""
    size = SIZES[name]
    life = Life(size, seed)
    put_s, order_s = life.build(size.offers)
    gc.collect()
    for number in range(WARM_UP):
        life.step(number)
    life.forget_times()
    for number in range(size.decisions):
        life.step(WARM_UP + number)
    return figures(f"{size.offers:,} offers, {size.models} models", size, life, put_s, order_s)


def figures(title: str, size: Size, life: Life, put_s: float, order_s: float) -> list[Figure]:
    decide = life.spent["decide"]
    p50, p99 = percentile(decide, 0.5), percentile(decide, 0.99)
    shares = ", ".join(f"{100 * count / len(decide):.1f} % {name}" for name, count in sorted(life.outcomes.items()))
    found = [
        Figure(name=f"{title}: one decision, p50", value=p50, unit="µs", goal=size.goal_us, note=shares),
        Figure(name=f"{title}: one decision, p99", value=p99, unit="µs", goal=3 * p50, note=f"worst {max(decide):,.0f}"),
        Figure(name=f"{title}: p99 ÷ p50", value=p99 / p50, unit="", goal=3.0),
        Figure(
            name=f"{title}: one decision, processor time, p50",
            value=percentile(life.cpu_us, 0.5),
            unit="µs",
            note=f"p99 {percentile(life.cpu_us, 0.99):,.0f}, ÷ p50 {percentile(life.cpu_us, 0.99) / percentile(life.cpu_us, 0.5):.1f}",
        ),
    ]
    for outcome, took in life.by_outcome.items():
        if took:
            note = f"p99 {percentile(took, 0.99):,.0f}, {len(took)} of them"
            found.append(Figure(name=f"{title}: decisions that end in {outcome}, p50", value=percentile(took, 0.5), unit="µs", note=note))
    for what, took in life.spent.items():
        if what != "decide" and took:
            note = f"p99 {percentile(took, 0.99):,.0f}, worst {max(took):,.0f}, {len(took)} of them"
            found.append(Figure(name=f"{title}: {what}, p50", value=percentile(took, 0.5), unit="µs", note=note))
    memory = psutil.Process().memory_info().rss / 2**20
    return [
        *found,
        Figure(name=f"{title}: all offers put", value=put_s, unit="s", note=f"first refresh {order_s:.2f} s; process {memory:,.0f} MiB"),
    ]


UNMET = {
    "price too high": Needs(model="model-000", prompt_tokens=500, rings=frozenset({"market"}), price_max_micro_per_munit=1),
    "no such region": Needs(model="model-000", prompt_tokens=500, rings=frozenset({"market"}), regions=frozenset({"af-ke"})),
    "strict, 1 ms": Needs(model="model-000", prompt_tokens=500, rings=frozenset({"market"}), strict=True, first_token_within_ms=1),
    "many limits": Needs(
        model="model-000",
        prompt_tokens=3_900,
        output_tokens_max=500,
        rings=frozenset({"market"}),
        regions=frozenset({"eu-de", "eu-fr"}),
        hardware="cpu",
        isolation="bwrap",
        price_max_micro_per_munit=200_000,
        strict=True,
        first_token_within_ms=20,
    ),
}


def measure_refusals(seed: int) -> list[Figure]:
    """Refusals with their whole explanation, at 10,000 offers of the model that is asked for."""
    life = Life(SIZES["one"], seed)
    life.build(SIZES["one"].offers)
    for number in range(WARM_UP):
        life.step(number)
    found = []
    for name, needs in UNMET.items():
        took = []
        counted = 0
        for number in range(REFUSALS):
            call = Call(
                id=CallId(f"refused-{number}"),
                org_id=OrgId("org-00"),
                key_id=KeyId(f"key-{number}"),
                gateway_id=GatewayId("gw"),
                path=PATH,
                stream=True,
                body_bytes=2_000,
                needs=needs,
                arrived_at_ms=round(1000 * life.now_s),
            )
            begin = time.perf_counter_ns()
            answer = match(call, life.market, now=Moment(call.arrived_at_ms, life.now_s))
            took.append((time.perf_counter_ns() - begin) / 1e6)
            assert isinstance(answer, Refuse), f"{name}: somebody meets it"
            counted = sum(one.offers for one in answer.stopped)
        note = f"p50 {percentile(took, 0.5):.2f}; counts {counted:,} offers"
        found.append(Figure(name=f"refusal at 10,000 offers, {name}, p99", value=percentile(took, 0.99), unit="ms", goal=50.0, note=note))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.match_speed", description="How long one decision takes")
    parser.add_argument("which", nargs="*", choices=[*SIZES, "refusal", []], help="leave out for all but the million")
    parser.add_argument("--seed", type=int, default=SEED)
    chosen = parser.parse_args()
    for which in chosen.which or ["small", "one", "refusal"]:
        found = measure_refusals(chosen.seed) if which == "refusal" else measure(which, chosen.seed)
        publish(f"match-{which}", found)


if __name__ == "__main__":
    main()

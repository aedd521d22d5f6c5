"""A market drawn by seed for benchmarks: many nodes' cards and offers over Zipf-popular models, and calls with needs of every kind."""

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from fallow.core.needs import Asked, needs_of
from fallow.model.call import Call
from fallow.model.card import Card, Hardware
from fallow.model.errors import Failure
from fallow.model.ids import CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import HardwareKind, Isolation, Needs, Policy, Prefer, Ring, ServiceTier
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.owner import State

PATH = "/v1/chat/completions"
REGIONS = ("eu-de", "eu-de-berlin", "eu-fr", "eu-nl", "eu-pl", "eu-es", "us-us-east", "us-us-west", "sa-br", "as-jp", "as-in", "unknown")
ISOLATIONS: tuple[Isolation, ...] = ("bwrap", "bwrap", "bwrap", "landlock", "none")
EVERYBODY: frozenset[Ring] = frozenset({"own", "partner", "market"})
KEYS, ORGS = 200, 40
SESSIONS = 2_000
NEVER_MS = 2**60


class Lent(NamedTuple):
    """What a node says of itself and of its one offer."""

    card: Card
    offer: Offer
    load: Load
    state: State


class Draws:
    """Models by rank of popularity, nodes and calls; the same seed draws the same."""

    def __init__(self, seed: int, *, models: int) -> None:
        self._chance = random.Random(seed)
        self.models = [f"model-{rank:03}" for rank in range(models)]
        self._weights = list(itertools.accumulate(1.0 / (rank + 1) for rank in range(models)))
        self.orgs = [OrgId(f"org-{number:02}") for number in range(ORGS)]
        self._keys = [self._key(number) for number in range(KEYS)]
        self._loads: dict[str, Load] = {}

    def model(self) -> str:
        """A model by Zipf's law with s = 1."""
        return self.models[bisect.bisect(self._weights, self._chance.random() * self._weights[-1])]

    def lent(self, number: int) -> Lent:
        """A node: seven of ten belong to somebody who lends this one machine."""
        chance = self._chance
        node_id = NodeId(f"node-{number:07}")
        kind: HardwareKind = "gpu" if chance.random() < 0.15 else "cpu"
        hardware = Hardware(kind=kind, isa="x86_64-avx2", cores=8, memory_bytes=2**34, gpu="rtx" if kind == "gpu" else None)
        card = Card(
            node_id=node_id,
            org_id=OrgId(f"lender-{number}") if chance.random() < 0.7 else chance.choice(self.orgs),
            sequence=1,
            expires_at_ms=NEVER_MS,
            hardware=hardware,
            isolation=chance.choice(ISOLATIONS),
            region=chance.choice(REGIONS),
            serves=EVERYBODY if chance.random() < 0.9 else frozenset({"own", "partner"}),
            refuses_countries=frozenset({"ru"}) if chance.random() < 0.02 else frozenset(),
        )
        roll = chance.random()
        state: State = "pause" if roll < 0.08 else "throttle" if roll < 0.12 else "run"
        offer = self.offer(node_id, self.model(), kind)
        return Lent(card, offer, self._load(offer.model, offer.slots), state)

    def offer(self, node_id: NodeId, model: str, kind: HardwareKind) -> Offer:
        chance = self._chance
        fast = 20.0 if kind == "gpu" else 1.0
        decode = fast * chance.lognormvariate(2.5, 0.5)
        slots = 32 if kind == "gpu" else chance.choice((1, 2, 4))
        rate = decode * (1 + 0.3 * (slots - 1))
        output = chance.lognormvariate(12.6, 0.5) * (1.3 if kind == "gpu" else 1.0)
        return Offer(
            node_id=node_id,
            model=model,
            paths=frozenset({PATH}),
            context_tokens=chance.choice((4_096, 8_192, 32_768)),
            model_digest="",
            speed=Speed(
                prefill_tokens_per_s=decode * chance.uniform(8, 30),
                decode_tokens_per_s=decode,
                decode_by_streams=((1, decode), (slots, rate)),
            ),
            price=Price(
                prompt_micro_per_munit=round(output * 0.2),
                cached_prompt_micro_per_munit=round(output * 0.02),
                output_micro_per_munit=round(output),
            ),
            slots=slots,
            expires_at_ms=NEVER_MS,
            quantisation=chance.choice(("q4_k_m", "q8_0")),
        )

    def _load(self, model: str, slots: int) -> Load:
        key = f"{model}/{slots}"
        if key not in self._loads:
            self._loads[key] = Load(model=model, readiness="ready", slots_free=slots, waiting=0, waiting_max=2 * slots)
        return self._loads[key]

    def _key(self, number: int) -> tuple[KeyId, OrgId, Policy]:
        chance = self._chance
        org = self.orgs[number % ORGS]
        partners = frozenset(chance.sample(self.orgs, chance.randrange(6))) - {org}
        rings: frozenset[Ring] = EVERYBODY if chance.random() < 0.8 else frozenset({"own", "partner"})
        prefer: Prefer = "fast" if chance.random() < 0.05 else "cheap"
        return KeyId(f"key-{number}"), org, Policy(rings=rings, partners=partners, prefer=prefer)

    def call(self, number: int, *, now_ms: int) -> Call:
        """A call whose needs agree with its key's policy."""
        chance = self._chance
        key_id, org_id, policy = chance.choice(self._keys)
        prompt = round(min(4_000.0, max(50.0, chance.lognormvariate(6.2, 0.9))))
        session = chance.randrange(SESSIONS)
        needs = self._needs(prompt, policy, now_ms)
        blocks = tuple(hash((session, block)) for block in range(4 * prompt // 512)) if chance.random() < 0.4 else ()
        return Call(
            id=CallId(f"call-{number}"),
            org_id=org_id,
            key_id=key_id,
            gateway_id=GatewayId("gw"),
            path=PATH,
            stream=True,
            body_bytes=4 * prompt,
            needs=needs,
            arrived_at_ms=now_ms,
            country="de",
            prefix=blocks,
        )

    def _needs(self, prompt: int, policy: Policy, now_ms: int) -> Needs:
        chance = self._chance

        def seldom(share: float) -> bool:
            return chance.random() < share

        tier = chance.choices(("default", "flex", "priority"), (60, 25, 15))[0]
        tiers: dict[str, ServiceTier] = {"default": "default", "flex": "flex", "priority": "priority"}
        asked = Asked(
            model=self.model(),
            prompt_tokens=prompt,
            output_tokens_max=chance.choice((64, 256, 512, 1_024)) if seldom(0.7) else None,
            service_tier=tiers[tier],
            first_token_ms=chance.choice((1_000, 2_000, 5_000)) if tier == "default" and seldom(0.5) else None,
            per_token_ms=chance.choice((60, 100, 200)) if tier == "default" and seldom(0.4) else None,
            deadline_ms=chance.choice((30_000, 120_000, 600_000)) if seldom(0.1) else None,
            price_max_micro_per_munit=round(chance.uniform(150_000, 600_000)) if seldom(0.1) else None,
            cost_max_micro=round(chance.uniform(100, 2_000)) if seldom(0.03) else None,
            strict=tier != "flex" and seldom(0.05),
            regions=frozenset(chance.sample(REGIONS[:-1], 3)) if seldom(0.08) else frozenset(),
            countries=frozenset({"de", "fr", "nl"}) if seldom(0.05) else frozenset(),
            hardware=chance.choice(("cpu", "gpu")) if seldom(0.08) else None,
            isolation=chance.choice(("bwrap", "landlock")) if seldom(0.1) else None,
        )
        found = needs_of(asked, policy, now_ms=now_ms)
        return self._needs(prompt, policy, now_ms) if isinstance(found, Failure) else found


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which so much of the whole lies, from 0 to 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

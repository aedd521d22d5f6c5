"""The matcher as a router for the judge of the shared tools (route_eval): give it `--router bench.route_eval:make`.

It sees what the judge shows to every router: cards, prices, heartbeats, and its own calls' first tokens, ends and losses.
"""

import importlib
import math
from typing import Any

from fallow.core.match.decide import match
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment, wanted
from fallow.model.call import Call
from fallow.model.card import Card, Hardware
from fallow.model.ids import CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import Needs, ServiceTier
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.quote import Place, Refuse, Wait
from fallow.model.receipt import Usage

MODEL, PATH, HOME = "judged", "/v1/chat/completions", OrgId("judge")
FOREVER_S = 1e9
REFRESH_S = 1.0
CONTEXT_TOKENS = 1_000_000
FULL_FACTOR = 2
"""A node of the judge holds so many times its slots, its queue included."""


class Router:
    """One gateway. Copies of it don't see each other's calls."""

    def __init__(self, judge: Any) -> None:
        self._judge = judge
        self._market = Market()
        self._indices: dict[str, int] = {}
        self._ids: dict[int, NodeId] = {}
        self._calls: dict[tuple[int, int], Call] = {}
        self._heard_s: dict[int, float] = {}
        self._live: set[int] = set()
        self._counted: set[int] = set()
        self._refreshed_s = 0.0

    def choose(self, view: Any, offers: Any, now: float) -> Any:
        """The judge's question."""
        self._look(offers, now)
        call, moment = self._call(view), Moment(round(1000 * now), now)
        if view.id not in self._counted:
            self._counted.add(view.id)
            demand = wanted(call, self._market, moment)
            if demand is not None:
                self._market.asked(call, demand, now_s=now)
        if now - self._refreshed_s >= REFRESH_S:
            self._refreshed_s = now
            self._market.refresh(now_s=now)
        match match(call, self._market, now=moment, attempt=view.attempt):
            case Wait(for_ms=for_ms):
                return self._judge.Wait(for_ms / 1000)
            case Refuse(limit=limit):
                return self._judge.Refuse(limit)
            case Place(quote=quote):
                index = self._indices[quote.node_id]
                self._calls[view.id, index] = call
                self._market.began(f"{view.id}/{index}", call, quote, now_s=now)
                return self._judge.Place(index, quote.chance)

    def observe(self, event: Any) -> None:
        """What the judge tells of a call that was placed."""
        call = self._calls.get((event.call, event.node))
        if call is None:
            return
        booking = f"{event.call}/{event.node}"
        if event.kind == "first":
            self._market.first(booking, now_s=event.at)
            return
        del self._calls[event.call, event.node]
        usage = Usage(prompt_tokens=event.prompt, cached_tokens=event.cached, output_tokens=event.tokens)
        self._market.ended(booking, call, usage if event.kind == "done" else None, now_s=event.at)

    def _look(self, offers: Any, now: float) -> None:
        live = {offer.index for offer in offers}
        for index in self._live - live:
            self._market.drop(self._ids[index])
        for offer in offers:
            if offer.index not in self._live:
                self._ids[offer.index] = NodeId(offer.id)
                self._indices[offer.id] = offer.index
                self._put(offer, now)
            if self._heard_s.get(offer.index) != offer.reported_at:
                self._heard_s[offer.index] = offer.reported_at
                self._market.heard(NodeId(offer.id), MODEL, running=offer.active + offer.queued, now_s=now)
        self._live = live

    def _put(self, offer: Any, now: float) -> None:
        price = Price(
            prompt_micro_per_munit=round(1e6 * offer.price_in),
            cached_prompt_micro_per_munit=round(1e6 * offer.price_cached),
            output_micro_per_munit=round(1e6 * offer.price_out),
        )
        speed = Speed(
            prefill_tokens_per_s=offer.prefill_tps,
            decode_tokens_per_s=offer.decode_tps,
            decode_by_streams=((1, offer.decode_tps), (offer.slots, offer.batch_decode_tps)),
        )
        card = Card(
            node_id=NodeId(offer.id),
            org_id=HOME,
            sequence=1,
            expires_at_ms=2**60,
            hardware=Hardware(kind=offer.hardware, isa="x86_64", cores=1, memory_bytes=0, gpu=offer.klass),
            isolation="none",
            region="eu-de",
            serves=frozenset({"market"}),
        )
        made = Offer(
            node_id=NodeId(offer.id),
            model=MODEL,
            paths=frozenset({PATH}),
            context_tokens=CONTEXT_TOKENS,
            model_digest="",
            speed=speed,
            price=price,
            slots=offer.slots,
            expires_at_ms=2**60,
        )
        queue = (FULL_FACTOR - 1) * offer.slots
        load = Load(model=MODEL, readiness="ready", slots_free=offer.slots, waiting=0, waiting_max=queue)
        self._market.put(card, made, load, "run", expires_s=FOREVER_S, now_s=now, rtt_s=offer.rtt_s)

    def _call(self, view: Any) -> Call:
        tier: ServiceTier = "flex" if view.tier == "flex" else "default"
        arrived_ms = round(1000 * view.arrived_at)
        needs = Needs(
            model=MODEL,
            prompt_tokens=view.prompt,
            output_tokens_max=view.max_output,
            service_tier=tier,
            first_token_within_ms=None if view.first_at is not None or math.isinf(view.first_s) else round(1000 * view.first_s),
            per_token_within_ms=None if math.isinf(view.per_token_s) else round(1000 * view.per_token_s),
            deadline_at_ms=None if math.isinf(view.deadline_s) else arrived_ms + round(1000 * view.deadline_s),
            rings=frozenset({"market"}),
        )
        return Call(
            id=CallId(str(view.id)),
            org_id=OrgId("caller"),
            key_id=KeyId(view.key),
            gateway_id=GatewayId("gw"),
            path=PATH,
            stream=True,
            body_bytes=4 * view.prompt,
            needs=needs,
            arrived_at_ms=arrived_ms,
        )


def make() -> Router:
    """A fresh router; the judge's own answers are those of its module `replay`, which can be imported while it runs."""
    return Router(importlib.import_module("replay"))

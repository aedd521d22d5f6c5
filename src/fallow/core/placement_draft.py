"""A plan in the making: what each node is to hold, and the few ways in which placement changes it."""

import heapq
from collections.abc import Iterator, Mapping, Sequence

from fallow.core.demand import Wanted
from fallow.core.replicas import Crowd, Replicas, Worth
from fallow.core.supply import Learnt, ModelSupply, NodeSupply, present_models, room_of
from fallow.model.ids import NodeId

MIN_STAY_MS = 5 * 60_000
"""How long a model stays where it was placed, whatever else is wanted: loading costs a lender disk and power."""
SEARCHED_MAX = 64
"""Nodes whose other models are looked at for one that lacks supply: those on which it would be fastest."""
ROUNDING = 1e-9

Rank = tuple[Crowd, bool, int, float, NodeId]
"""How well a node suits a model, the least first: alone in its domains, has it in memory, holds few others, is fast."""


class Draft:
    """`held` is the plan, by node; `why` has the reason of each change. Nodes come sorted by id, so that ties fall alike."""

    def __init__(
        self,
        nodes: Sequence[NodeSupply],
        held: Mapping[NodeId, dict[str, int]],
        wanted: Mapping[str, Wanted],
        barred: Mapping[tuple[NodeId, str], int],
        learnt: Mapping[NodeId, Learnt],
        *,
        now_ms: int,
    ) -> None:
        self.held = dict(held)
        self.why: dict[tuple[NodeId, str], str] = {}
        self._nodes = {node.node_id: node for node in nodes}
        self._barred = barred
        self._now_ms = now_ms
        self._replicas = {model: Replicas(wanted[model]) for model in sorted(wanted)}
        self._offers: dict[str, dict[NodeId, ModelSupply]] = {model: {} for model in wanted}
        self._free: dict[NodeId, int] = {}
        for node in nodes:
            self._take(node, learnt.get(node.node_id))

    def _take(self, node: NodeSupply, learnt: Learnt | None) -> None:
        node_id, mine = node.node_id, self.held[node.node_id]
        free = room_of(node, learnt, len(mine))
        for one in node.models:
            if one.model in self._offers and one.readiness != "failed":
                self._offers[one.model][node_id] = one
                if one.model in mine:
                    free -= one.takes
                    if node.works:
                        self._replicas[one.model].join(node, one)
        self._free[node_id] = free

    # what can't stay
    def leave(self) -> None:
        """Drop what isn't wanted, offered or loaded any more, and what is over a node's room."""
        for node_id, mine in self.held.items():
            for model in sorted(mine):
                if model not in self._replicas:
                    self._drop(node_id, model, "nobody asks for it")
                elif node_id not in self._offers[model]:
                    self._drop(node_id, model, "it isn't offered there any more, or can't be loaded")
                elif (node_id, model) in self._barred:
                    self._drop(node_id, model, "the node did not load it")
            if self._free[node_id] < 0:
                present = present_models(self._nodes[node_id])
                by_use = sorted(mine, key=lambda one: (one in present, self._replicas[one].wanted.calls_per_s, one))
                while self._free[node_id] < 0:
                    self._drop(node_id, by_use.pop(0), "the node has less room than was thought")

    # what lacks
    def add(self) -> None:
        """Fill free room: first one replica of each model, the most wanted first; then what lacks most."""
        candidates: dict[str, list[Rank]] = {}
        queue = [(bool(some.shares), -some.lack(), model) for model, some in self._replicas.items() if some.is_short()]
        heapq.heapify(queue)
        while queue:
            _, _, model = heapq.heappop(queue)
            some = self._replicas[model]
            if model not in candidates:
                candidates[model] = [self._rank(model, node_id) for node_id in self._able(model, has_room=True)]
                heapq.heapify(candidates[model])
            best = self._best(model, candidates[model])
            if best is not None:
                self._place(best, model, "callers ask for more of it" if some.shares else "callers ask for it")
                if some.is_short():
                    heapq.heappush(queue, (True, -some.lack(), model))

    def _best(self, model: str, ranked: list[Rank]) -> NodeId | None:
        """A node only gets worse while the plan fills, so one whose rank still holds at the top is the best."""
        while ranked:
            node_id = heapq.heappop(ranked)[-1]
            if self._offers[model][node_id].takes <= self._free[node_id]:
                now = self._rank(model, node_id)
                if not ranked or now <= ranked[0]:
                    return node_id
                heapq.heappush(ranked, now)
        return None

    def displace(self) -> None:
        """Give what still lacks the room of models that need it clearly less: one replica a plan, so that things move slowly."""
        short = [(bool(some.shares), -some.lack(), model) for model, some in self._replicas.items() if some.is_short()]
        for _, _, model in sorted(short):
            some = self._replicas[model]
            fastest = ((-some.share(self._offers[model][node_id]), node_id) for node_id in self._able(model, has_room=False))
            choices = []
            for _, node_id in heapq.nsmallest(SEARCHED_MAX, fastest) if some.shares else fastest:
                offer = self._offers[model][node_id]
                victims, loss = self._cheapest(node_id, offer.takes - self._free[node_id])
                if victims and some.gain(offer).outweighs(loss):
                    choices.append((loss.is_only, some.crowd(self._nodes[node_id]), loss.calls_per_s, node_id, victims))
            if choices:
                node_id, victims = min(choices)[3:]
                for victim in victims:
                    self._drop(node_id, victim, f"{model} is wanted more")
                self._place(node_id, model, f"it is wanted more than {', '.join(victims)}")

    def _cheapest(self, node_id: NodeId, lacking: int) -> tuple[list[str], Worth]:
        """The models of a node whose loss costs least and that make so much room; none if they can't."""
        losses = sorted((self._replicas[model].loss(node_id), model) for model in self.held[node_id] if not self._is_pinned(node_id, model))
        victims: list[str] = []
        is_only, calls = False, 0.0
        for loss, model in losses:
            if lacking <= 0:
                break
            victims.append(model)
            is_only, calls = is_only or loss.is_only, calls + loss.calls_per_s
            lacking -= self._offers[model][node_id].takes
        return (victims if lacking <= 0 else []), Worth(is_only, calls)

    # what is too much, or stands together
    def thin_out(self) -> None:
        """Drop replicas beyond the demand, those first that share a failure domain."""
        for model, some in self._replicas.items():
            while (worst := self._worst(model)) is not None and some.can_spare(worst):
                self._drop(worst, model, "others carry what callers ask for")

    def spread(self) -> None:
        """Move one replica of each model out of a failure domain that it shares, where room is free and no demand is lost."""
        for model, some in self._replicas.items():
            worst = self._worst(model)
            if worst is None:
                continue
            needed = min(some.wanted.spare, some.carried)
            some.part(self._nodes[worst])
            crowd, others = some.crowd(self._nodes[worst]), some.carried
            better = []
            if any(crowd):
                ranks = (self._rank(model, node_id) for node_id in self._able(model, has_room=True))
                better = [rank for rank in ranks if rank[0] < crowd and others - rank[3] >= needed * (1 - ROUNDING)]
            some.join(self._nodes[worst], self._offers[model][worst])
            if better:
                self._drop(worst, model, "its replicas move apart")
                self._place(min(better)[-1], model, "its replicas move apart")

    def _worst(self, model: str) -> NodeId | None:
        """The replica that would be missed least, unless there is only one or all are too new to go."""
        some = self._replicas[model]
        if len(some.shares) < 2:
            return None
        loose = [node_id for node_id in some.shares if not self._is_pinned(node_id, model)]
        return max(loose, key=lambda one: self._rank(model, one), default=None)

    # single steps
    def _able(self, model: str, *, has_room: bool) -> Iterator[NodeId]:
        """The nodes that could hold one more of it: now, or if others left."""
        for node_id, offer in self._offers[model].items():
            if has_room and offer.takes > self._free[node_id]:
                continue
            if self._nodes[node_id].works and model not in self.held[node_id] and (node_id, model) not in self._barred:
                yield node_id

    def _rank(self, model: str, node_id: NodeId) -> Rank:
        some, offer = self._replicas[model], self._offers[model][node_id]
        is_cold = offer.readiness == "cold"
        return some.crowd(self._nodes[node_id]), is_cold, len(self.held[node_id]), -some.share(offer), node_id

    def _is_pinned(self, node_id: NodeId, model: str) -> bool:
        return self._now_ms - self.held[node_id][model] < MIN_STAY_MS

    def _place(self, node_id: NodeId, model: str, why: str) -> None:
        offer, some = self._offers[model][node_id], self._replicas[model]
        self.held[node_id][model] = self._now_ms
        self.why[node_id, model] = why
        self._free[node_id] -= offer.takes
        some.join(self._nodes[node_id], offer)

    def _drop(self, node_id: NodeId, model: str, why: str) -> None:
        del self.held[node_id][model]
        self.why[node_id, model] = why
        offer = self._offers.get(model, {}).get(node_id)
        if offer is not None:
            self._free[node_id] += offer.takes
            if node_id in self._replicas[model].shares:
                self._replicas[model].part(self._nodes[node_id])

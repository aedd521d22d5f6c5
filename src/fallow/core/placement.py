"""Placement: which node should hold which models, so that supply follows demand.

A plan is kept and changed no more than it must be. In this order: what can't stay leaves, models that lack supply get free
room, then room of models that need it less; supply beyond the demand goes, and replicas that stand together move apart.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from fallow.core.demand import Wanted, hear
from fallow.core.placement_draft import Draft
from fallow.core.supply import Learnt, NodeSupply, learn, present_models
from fallow.model.ids import NodeId
from fallow.model.messages import OFFERS_MAX, Demand

BARRED_MS = 30 * 60_000
"""How long a model isn't placed again on a node that didn't load it."""
TRIAL_MS = 150_000
"""How long a node has to begin to load what it should hold."""


class PlacementState(msgspec.Struct, frozen=True, kw_only=True):
    """What one plan hands to the next. `held` has, for each node, the models that it should hold and since when.

    `barred` has until when a model isn't tried again on a node, `learnt` how many models a node was seen to have room for.
    """

    wanted: Mapping[str, Wanted] = {}
    held: Mapping[NodeId, Mapping[str, int]] = {}
    barred: Mapping[tuple[NodeId, str], int] = {}
    learnt: Mapping[NodeId, Learnt] = {}


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the plan: a node should load a model, or may drop it, and why."""

    node_id: NodeId
    model: str
    kind: Literal["load", "drop"]
    why: str


def plan(
    state: PlacementState, nodes: Sequence[NodeSupply], reports: Sequence[Demand], *, span_ms: int, now_ms: int
) -> tuple[PlacementState, tuple[Move, ...]]:
    """Decide anew; `reports` came from gateways in the last `span_ms`. A node that is gone is forgotten with its plan."""
    wanted = hear(state.wanted, reports, span_ms=span_ms, now_ms=now_ms)
    there = sorted(nodes, key=lambda node: node.node_id)
    before = {node.node_id: state.held.get(node.node_id, {}) for node in there}
    held = {node.node_id: _stay(node, before[node.node_id], now_ms) for node in there}
    learnt, barred = _judge(state, there, held, now_ms)
    draft = Draft(there, held, wanted, barred, learnt, now_ms=now_ms)
    draft.leave()
    draft.add()
    draft.displace()
    draft.thin_out()
    draft.spread()
    after = PlacementState(
        wanted=wanted, held={node: models for node, models in draft.held.items() if models}, barred=barred, learnt=learnt
    )
    return after, _moves(before, draft)


def models_for(state: PlacementState, node_id: NodeId) -> tuple[str, ...]:
    """What a node should hold, the most wanted first."""
    rates = {model: state.wanted[model].calls_per_s for model in state.held.get(node_id, {})}
    return tuple(sorted(rates, key=lambda model: (-rates[model], model)))[:OFFERS_MAX]


def _stay(node: NodeSupply, models: Mapping[str, int], now_ms: int) -> dict[str, int]:
    """While its owner needs a node it keeps its plan, and what it doesn't hold yet gets its time once it is back."""
    if node.works:
        return dict(models)
    present = present_models(node)
    return {model: since if model in present else now_ms for model, since in models.items()}


def _judge(
    state: PlacementState, there: Sequence[NodeSupply], held: Mapping[NodeId, Mapping[str, int]], now_ms: int
) -> tuple[dict[NodeId, Learnt], dict[tuple[NodeId, str], int]]:
    """What nodes didn't load although they had the time: it is barred there, and as much as they hold is what they have room for."""
    learnt: dict[NodeId, Learnt] = {}
    barred: dict[tuple[NodeId, str], int] = {}
    if state.barred:
        ids = {node.node_id for node in there}
        barred = {key: until for key, until in state.barred.items() if until > now_ms and key[0] in ids}
    for node in there:
        models = held[node.node_id]
        known = state.learnt.get(node.node_id)
        missing: list[str] = []
        if node.works and models and not any(one.readiness == "loading" for one in node.models):
            present = present_models(node)
            missing = [model for model, since in models.items() if model not in present and now_ms - since >= TRIAL_MS]
        barred.update({(node.node_id, model): now_ms + BARRED_MS for model in missing})
        if (found := learn(known, node, has_failed=bool(missing), until_ms=now_ms + BARRED_MS, now_ms=now_ms)) is not None:
            learnt[node.node_id] = found
    return learnt, barred


def _moves(before: Mapping[NodeId, Mapping[str, int]], draft: Draft) -> tuple[Move, ...]:
    moves: list[Move] = []
    for node_id, models in draft.held.items():
        old = before[node_id]
        if old.keys() == models.keys():
            continue
        for model in sorted(old.keys() ^ models.keys()):
            kind: Literal["load", "drop"] = "load" if model in models else "drop"
            moves.append(Move(node_id=node_id, model=model, kind=kind, why=draft.why[node_id, model]))
    return tuple(moves)

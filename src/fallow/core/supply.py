"""What nodes could hold, as placement sees it: from their cards, offers and loads."""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from fallow.core.roster import Member
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import Demand
from fallow.model.offer import Offer, Readiness
from fallow.model.owner import WORKING

REGION_UNKNOWN = "unknown"
"""What a node says whose lender didn't say where it is."""


class ModelSupply(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a node offers. Speeds are of all its streams together, 0 if not measured; `takes` is its part of the node's room."""

    model: str
    readiness: Readiness = "cold"
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    takes: int = 1


class NodeSupply(msgspec.Struct, frozen=True, kw_only=True):
    """A node, its failure domains, and what it offers. `works` is false while its owner needs it.

    `room` is what the models that it holds may take together, in the unit of their `takes`: bytes where the node tells them.
    None: it doesn't, and how many models fit is learnt from what it holds. An unknown domain is empty.
    """

    node_id: NodeId
    org_id: OrgId
    region: str = ""
    network: str = ""
    works: bool = True
    room: int | None = None
    models: tuple[ModelSupply, ...] = ()


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """How many models a node has room for at once, as far as it has shown; tried again after `until_ms`."""

    fits: int
    until_ms: int


def present_models(node: NodeSupply) -> set[str]:
    """What is in its memory, or will be in a moment."""
    return {one.model for one in node.models if one.readiness in ("ready", "loading")}


def learn(known: Learnt | None, node: NodeSupply, *, has_failed: bool, until_ms: int, now_ms: int) -> Learnt | None:
    """What a node's room is; None where it says so itself, or nothing speaks against one model more."""
    if node.room is not None:
        return None
    if has_failed:
        return Learnt(fits=max(1, len(present_models(node))), until_ms=until_ms)
    if known is None or known.until_ms <= now_ms or len(present_models(node)) > known.fits:
        return None
    return known


def room_of(node: NodeSupply, learnt: Learnt | None, held: int) -> int:
    """The room for a plan: as the node says or as was learnt; else one model more than it has."""
    if node.room is not None:
        return node.room
    return learnt.fits if learnt is not None else max(len(present_models(node)) + 1, held)


def supplies_of(members: Mapping[NodeId, Member]) -> list[NodeSupply]:
    """All nodes that have introduced themselves."""
    found = (supply_of(node_id, member) for node_id, member in members.items())
    return [one for one in found if one is not None]


def told_of(reports: Sequence[Demand], members: Sequence[Member]) -> list[Demand]:
    """The reports by model: what is asked of a family counts for the one of it that most nodes offer."""
    offers = Counter((offer.family, offer.model) for member in members for offer in member.offers)
    names = {model: model for _, model in offers}
    for family, model in sorted(offers, key=lambda key: (-offers[key], key)):
        names.setdefault(family, model)
    return [
        replace(report, models=tuple(replace(one, model=names.get(one.model, one.model)) for one in report.models)) for report in reports
    ]


def supply_of(node_id: NodeId, member: Member) -> NodeSupply | None:
    """A node as heartbeats tell; None until it has introduced itself."""
    card = member.card
    if card is None:
        return None
    readiness: Mapping[str, Readiness] = {load.model: load.readiness for load in member.loads}
    return NodeSupply(
        node_id=node_id,
        org_id=card.org_id,
        region="" if card.region == REGION_UNKNOWN else card.region,
        works=member.state in WORKING,
        models=tuple(_model(offer, readiness[offer.model]) for offer in member.offers if offer.model in readiness),
    )


def _model(offer: Offer, readiness: Readiness) -> ModelSupply:
    speed = offer.speed
    fitting = [rate for streams, rate in speed.decode_by_streams if streams <= offer.slots]
    return ModelSupply(
        model=offer.model,
        readiness=readiness,
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        decode_tokens_per_s=max([speed.decode_tokens_per_s, *fitting]),
    )

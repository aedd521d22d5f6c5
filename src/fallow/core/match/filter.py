"""Which offers can take a call at all. Each limit has a name, and the first that stops an offer is counted."""

from collections.abc import Collection
from typing import NamedTuple

import msgspec
import numpy as np

from fallow.core.match.columns import GONE, Codes, Facts, Floats
from fallow.core.needs import country_of
from fallow.model.call import Call
from fallow.model.card import Card
from fallow.model.ids import OrgId
from fallow.model.needs import HardwareKind, Isolation, Ring
from fallow.model.offer import Offer

LIMITS = (
    "path_not_offered",
    "quantisation",
    "ring",
    "lender_refuses",
    "region",
    "country",
    "hardware",
    "isolation",
    "offer_expired",
    "over_context",
    "over_price",
    "over_cost",
    "already_tried",
    "owner_is_back",
    "engine_failed",
    "busy",
    "too_slow",
)
"""In the order in which they apply: what the caller chose, then what it costs, then what passes by itself."""
CODE = {name: number for number, name in enumerate(LIMITS, 1)}
"""0 means that nothing stops an offer."""
ISOLATION_RANK: dict[Isolation, int] = {"none": 0, "landlock": 1, "bwrap": 2}
RINGS: tuple[Ring, ...] = ("own", "partner", "market")
MARKET = 2


class Kind(msgspec.Struct, frozen=True):
    """What many offers have in common, and what most limits look at."""

    hardware: HardwareKind
    isolation: Isolation
    region: str
    paths: frozenset[str]
    quantisation: str
    refuses_organisations: frozenset[str]
    refuses_countries: frozenset[str]
    serves: frozenset[Ring]


def kind_of(card: Card, offer: Offer) -> Kind:
    return Kind(
        hardware=card.hardware.kind,
        isolation=card.isolation,
        region=card.region,
        paths=offer.paths,
        quantisation=offer.quantisation.casefold(),
        refuses_organisations=card.refuses_organisations,
        refuses_countries=card.refuses_countries,
        serves=card.serves,
    )


class Sought(NamedTuple):
    """What of a call the limits on kinds look at."""

    path: str
    org_id: OrgId
    country: str
    quantisations: frozenset[str]
    regions: frozenset[str]
    countries: frozenset[str]
    hardware: HardwareKind | None
    isolation: Isolation | None
    rings: frozenset[Ring]


def sought_by(call: Call) -> Sought:
    needs = call.needs
    return Sought(
        call.path,
        call.org_id,
        call.country,
        needs.quantisations,
        needs.regions,
        needs.countries,
        needs.hardware,
        needs.isolation,
        needs.rings,
    )


def stopped_by(sought: Sought, kind: Kind, ring: Ring) -> int:
    """The first limit that stops offers of a kind in a ring, 0 if none does."""
    if sought.path not in kind.paths:
        return CODE["path_not_offered"]
    if sought.quantisations and kind.quantisation not in sought.quantisations:
        return CODE["quantisation"]
    if ring not in sought.rings or ring not in kind.serves:
        return CODE["ring"]
    if sought.org_id in kind.refuses_organisations or sought.country in kind.refuses_countries:
        return CODE["lender_refuses"]
    if sought.regions and kind.region not in sought.regions:
        return CODE["region"]
    if sought.countries and country_of(kind.region) not in sought.countries:
        return CODE["country"]
    if sought.hardware not in (None, kind.hardware):
        return CODE["hardware"]
    if sought.isolation is not None and ISOLATION_RANK[kind.isolation] < ISOLATION_RANK[sought.isolation]:
        return CODE["isolation"]
    return 0


def ring_of(org: OrgId, card_org: OrgId, partners: Collection[OrgId]) -> Ring:
    """The ring that a node is in, from both organisations; never what its card claims."""
    if org == card_org:
        return "own"
    return "partner" if card_org in partners else "market"


def rings_of(f: Facts, *, own: int, partners: Collection[int]) -> Codes:
    """The ring of each offer, as an index into RINGS."""
    rings = np.full(len(f.org), MARKET, np.intp)
    for partner in partners:
        rings[f.org == partner] = 1
    rings[f.org == own] = 0
    return rings


class Ask(NamedTuple):
    """The numbers that the remaining limits look at; None where a limit can't stop anything. `tried` are places in the arrays."""

    tokens: float | None
    output_price_max: float | None
    cost_max: float | None
    tried: Collection[int]
    expired_s: float | None


def codes(f: Facts, outcomes: Codes, cost: Floats, ask: Ask) -> Codes:
    """The first limit that stops each offer, as numbered in CODE; GONE for who went away.

    `outcomes` are those of stopped_by, `cost` is the most it can cost.
    Written from the last limit to the first, so that an earlier one overwrites a later one.
    """
    found = np.where(f.held >= f.room, BUSY, 0)
    found = np.where(f.stop != 0, f.stop, found)
    for at in ask.tried:
        found[at] = CODE["already_tried"]
    if ask.cost_max is not None:
        found[cost > ask.cost_max] = CODE["over_cost"]
    if ask.output_price_max is not None:
        found[f.output_price > ask.output_price_max] = CODE["over_price"]
    if ask.tokens is not None:
        found[f.context < ask.tokens] = CODE["over_context"]
    if ask.expired_s is not None:
        found[f.expires_s <= ask.expired_s] = CODE["offer_expired"]
    first: Codes = np.where(outcomes != 0, outcomes, found)
    first[f.stop == GONE] = GONE
    return first


BUSY = CODE["busy"]

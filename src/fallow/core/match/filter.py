"""Which offers can take a call at all. Each limit has a name, and the first that stops an offer is counted."""

from collections.abc import Collection
from typing import NamedTuple

import msgspec
import numpy as np

from fallow.core.match.columns import Codes, Columns, Flags, Floats
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


def kind_of(card: Card, offer: Offer) -> Kind:
    return Kind(
        hardware=card.hardware.kind,
        isolation=card.isolation,
        region=card.region,
        paths=offer.paths,
        quantisation=offer.quantisation.casefold(),
        refuses_organisations=card.refuses_organisations,
        refuses_countries=card.refuses_countries,
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


def sought_by(call: Call) -> Sought:
    needs = call.needs
    return Sought(
        call.path, call.org_id, call.country, needs.quantisations, needs.regions, needs.countries, needs.hardware, needs.isolation
    )


def stopped_by(sought: Sought, kind: Kind) -> int:
    """The first limit that stops offers of a kind, 0 if none does. Rings are looked at elsewhere: they depend on both sides."""
    if sought.path not in kind.paths:
        return CODE["path_not_offered"]
    if sought.quantisations and kind.quantisation not in sought.quantisations:
        return CODE["quantisation"]
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


def rings_of(c: Columns, *, own: int, partners: Collection[int]) -> Codes:
    """The ring of each offer, as an index into RINGS."""
    rings = np.full(len(c.org), MARKET, np.intp)
    for partner in partners:
        rings[c.org == partner] = 1
    rings[c.org == own] = 0
    return rings


def serve_mask(serves: Collection[Ring]) -> int:
    """The rings that a card serves, as bits."""
    return sum(1 << RINGS.index(ring) for ring in serves)


class Ask(NamedTuple):
    """The numbers that the remaining limits look at. `tried` are rows on which the call already failed."""

    rings: frozenset[Ring]
    tokens: float
    output_price_max: float | None
    cost_max: float | None
    tried: Collection[int]
    now_s: float


def codes(c: Columns, kinds: Codes, rings: Codes, cost: Floats, ask: Ask) -> Codes:
    """The first limit that stops each offer, as numbered in CODE; `kinds` are those of stopped_by, `cost` is the most it can cost."""
    found = np.zeros(len(c.kind), np.intp)

    def stop(limit: str, where: Flags) -> None:
        found[where & (found == 0)] = CODE[limit]

    # From the last limit to the first would save the second condition, but most calls meet no limit at all.
    early = kinds[c.kind]
    if early.any():
        before_rings = early < CODE["ring"]
        found[before_rings] = early[before_rings]
    allowed = np.array([ring in ask.rings for ring in RINGS])[rings] & ((c.serves >> rings) & 1).astype(np.bool_)
    if not allowed.all():
        stop("ring", ~allowed)
    if early.any():
        found = np.where((found == 0) & (early > 0), early, found)
    expired = c.expires_s <= ask.now_s
    if expired.any():
        stop("offer_expired", expired)
    if (short := c.context < ask.tokens).any():
        stop("over_context", short)
    if ask.output_price_max is not None:
        stop("over_price", c.output_price > ask.output_price_max)
    if ask.cost_max is not None:
        stop("over_cost", cost > ask.cost_max)
    for row in ask.tried:
        found[row] = found[row] or CODE["already_tried"]
    found = np.where(found == 0, c.stop, found) if c.stop.any() else found
    if (busy := c.streams + c.reading + c.others >= c.room).any():
        stop("busy", busy)
    return found

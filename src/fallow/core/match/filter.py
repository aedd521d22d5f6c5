"""Which offers can take a call at all. Each limit has a name, and the first that stops an offer is counted."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

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
    "backing_off",
    "busy",
    "too_slow",
)
"""In the order in which they apply: what the caller chose, then what it costs, then what passes by itself."""
CODE = {name: number for number, name in enumerate(LIMITS, 1)}
FREE = len(LIMITS) + 1
"""What stands in the place of a limit where nothing stops an offer: the first limit is the least number."""
Outcomes = NDArray[np.int8]
ISOLATION_RANK: dict[Isolation, int] = {"none": 0, "landlock": 1, "bwrap": 2}
RINGS: tuple[Ring, ...] = ("own", "partner", "market")
MARKET = 2
KINDS_MAX = 20_000
"""Kinds of offers that are told apart; an offer of one more isn't taken."""
OUTCOMES_MAX = 512
"""Outcomes that are remembered: most calls of a key have the same."""


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
    quantisations: frozenset[str]
    regions: frozenset[str]
    countries: frozenset[str]
    hardware: HardwareKind | None
    isolation: Isolation | None
    rings: frozenset[Ring]
    org_id: OrgId
    country: str


def sought_by(call: Call) -> Sought:
    needs = call.needs
    return Sought(
        call.path,
        needs.quantisations,
        needs.regions,
        needs.countries,
        needs.hardware,
        needs.isolation,
        needs.rings,
        call.org_id,
        call.country,
    )


def _is_refused(caller: tuple[OrgId, str], refuses: tuple[frozenset[str], frozenset[str]], ring: Ring) -> bool:
    (org_id, country), (organisations, countries) = caller, refuses
    return org_id in organisations or country in countries


class Stop(NamedTuple):
    """A limit on kinds: what of a kind it looks at, what of a call, and when the one stops the other in a ring."""

    limit: str
    of_kind: Callable[[Kind], Any]
    of_call: Callable[[Sought], Any]
    stops: Callable[[Any, Any, Ring], bool]


STOPS = (
    Stop("path_not_offered", lambda kind: kind.paths, lambda sought: sought.path, lambda path, paths, ring: path not in paths),
    Stop(
        "quantisation",
        lambda kind: kind.quantisation,
        lambda sought: sought.quantisations,
        lambda allowed, one, ring: bool(allowed) and one not in allowed,
    ),
    Stop(
        "ring",
        lambda kind: kind.serves,
        lambda sought: sought.rings,
        lambda rings, serves, ring: ring not in rings or ring not in serves,
    ),
    Stop(
        "lender_refuses",
        lambda kind: (kind.refuses_organisations, kind.refuses_countries),
        lambda sought: (sought.org_id, sought.country),
        _is_refused,
    ),
    Stop(
        "region",
        lambda kind: kind.region,
        lambda sought: sought.regions,
        lambda regions, region, ring: bool(regions) and region not in regions,
    ),
    Stop(
        "country",
        lambda kind: kind.region,
        lambda sought: sought.countries,
        lambda countries, region, ring: bool(countries) and country_of(region) not in countries,
    ),
    Stop("hardware", lambda kind: kind.hardware, lambda sought: sought.hardware, lambda asked, given, ring: asked not in (None, given)),
    Stop(
        "isolation",
        lambda kind: kind.isolation,
        lambda sought: sought.isolation,
        lambda asked, given, ring: asked is not None and ISOLATION_RANK[given] < ISOLATION_RANK[asked],
    ),
)
_REFUSES = [stop.limit for stop in STOPS].index("lender_refuses")
_CALLER = Sought._fields.index("org_id")
"""What stands from here on in what a call seeks is of the caller, and matters to lenders who refuse some."""


class Kinds:
    """Kinds of offers by number; numbers never change. Of each thing that a limit looks at there are few, so few are tested."""

    def __init__(self) -> None:
        self.list: list[Kind] = []
        self._numbers: dict[Kind, int] = {}
        self._values: list[dict[Any, int]] = [{} for _ in STOPS]
        self._value_of: list[list[int]] = [[] for _ in STOPS]
        self._outcomes: OrderedDict[tuple[Any, ...], Outcomes] = OrderedDict()
        self._stopped: OrderedDict[tuple[int, Any], Outcomes | None] = OrderedDict()

    def number(self, kind: Kind) -> int | None:
        """A kind's number; None if there are too many already."""
        number = self._numbers.get(kind)
        if number is None and len(self.list) < KINDS_MAX:
            number = self._numbers[kind] = len(self.list)
            self.list.append(kind)
            for stop, values, value_of in zip(STOPS, self._values, self._value_of, strict=True):
                value_of.append(values.setdefault(stop.of_kind(kind), len(values)))
            self._outcomes.clear()
            self._stopped.clear()
        return number

    def outcomes(self, sought: Sought) -> Outcomes:
        """The first limit that stops offers of each ring and kind, FREE if none does."""
        refused = self._stopped_by(_REFUSES, (sought.org_id, sought.country))
        name = sought[:_CALLER] if refused is None else sought  # whom nobody refuses are alike
        known = self._outcomes.get(name)
        if known is None:
            known = self._outcomes[name] = np.full((len(RINGS), len(self.list)), FREE, np.int8)
            for at, stop in enumerate(STOPS):
                stopped = self._stopped_by(at, stop.of_call(sought))
                if stopped is not None:
                    np.minimum(known, stopped, out=known)
            if len(self._outcomes) > OUTCOMES_MAX:
                self._outcomes.popitem(last=False)
        return known

    def _stopped_by(self, at: int, asked: Any) -> Outcomes | None:
        """The same for one limit; None if it stops nothing. Calls differ in few of the things that they ask for."""
        name = (at, asked)
        if name not in self._stopped:
            stop = STOPS[at]
            found = [[CODE[stop.limit] if stop.stops(asked, value, ring) else FREE for value in self._values[at]] for ring in RINGS]
            stops = any(code != FREE for codes in found for code in codes)
            self._stopped[name] = np.array(found, np.int8)[:, self._value_of[at]] if stops else None
            if len(self._stopped) > OUTCOMES_MAX:
                self._stopped.popitem(last=False)
        return self._stopped[name]


def ring_of(org: OrgId, card_org: OrgId, partners: Collection[OrgId]) -> Ring:
    """The ring that a node is in, from both organisations; never what its card claims."""
    if org == card_org:
        return "own"
    return "partner" if card_org in partners else "market"


class Ask(NamedTuple):
    """The numbers that the remaining limits look at; None where a limit can't stop anything.

    `tried` and `on_probation` are places among the rows, the latter of nodes that only a call may try that can be spared.
    """

    tokens: float | None
    output_price_max: float | None
    cost_max: float | None
    tried: Codes | None
    on_probation: Codes | None
    expired_s: float | None


def codes(c: Columns, rows: Codes | slice, outcomes: Outcomes, cost: Floats | None, ask: Ask) -> Codes:
    """The first limit that stops each of these rows, as numbered in CODE, or FREE; GONE for who went away, which is less than all.

    `outcomes` are those of their kinds, `cost` is the most it can cost, where that is limited.
    """
    found: Codes = np.minimum(outcomes, c.halt[rows])
    if ask.on_probation is not None and len(ask.on_probation):
        found[ask.on_probation] = np.minimum(found[ask.on_probation], CODE["backing_off"])
    if ask.tried is not None and len(ask.tried):
        found[ask.tried] = np.minimum(found[ask.tried], CODE["already_tried"])
    if ask.cost_max is not None and cost is not None:
        _stop(found, cost > ask.cost_max, "over_cost")
    if ask.output_price_max is not None:
        _stop(found, c.output_price[rows] > ask.output_price_max, "over_price")
    if ask.tokens is not None:
        _stop(found, c.context[rows] < ask.tokens, "over_context")
    if ask.expired_s is not None:
        _stop(found, c.expires_s[rows] <= ask.expired_s, "offer_expired")
    return found


def _stop(found: Codes, stopped: Flags, limit: str) -> None:
    """A limit stops some, unless an earlier one did."""
    found[stopped] = np.minimum(found[stopped], CODE[limit])

"""Which offers can take a call at all. Each limit has a name, and the first that stops an offer is counted."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fallow.core.match.columns import GONE, Codes, Columns, Floats
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
"""0 means that nothing stops an offer."""
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


def _is_refused(sought: Sought, refuses: tuple[frozenset[str], frozenset[str]], ring: Ring) -> bool:
    organisations, countries = refuses
    return sought.org_id in organisations or sought.country in countries


STOPS: tuple[tuple[str, Callable[[Kind], Any], Callable[[Sought, Any, Ring], bool]], ...] = (
    ("path_not_offered", lambda kind: kind.paths, lambda sought, paths, ring: sought.path not in paths),
    (
        "quantisation",
        lambda kind: kind.quantisation,
        lambda sought, one, ring: bool(sought.quantisations) and one not in sought.quantisations,
    ),
    ("ring", lambda kind: kind.serves, lambda sought, serves, ring: ring not in sought.rings or ring not in serves),
    ("lender_refuses", lambda kind: (kind.refuses_organisations, kind.refuses_countries), _is_refused),
    ("region", lambda kind: kind.region, lambda sought, region, ring: bool(sought.regions) and region not in sought.regions),
    (
        "country",
        lambda kind: kind.region,
        lambda sought, region, ring: bool(sought.countries) and country_of(region) not in sought.countries,
    ),
    ("hardware", lambda kind: kind.hardware, lambda sought, hardware, ring: sought.hardware not in (None, hardware)),
    (
        "isolation",
        lambda kind: kind.isolation,
        lambda sought, given, ring: sought.isolation is not None and ISOLATION_RANK[given] < ISOLATION_RANK[sought.isolation],
    ),
)
"""Limits on kinds: what of a kind each looks at, and when that stops a call in a ring."""


class Kinds:
    """Kinds of offers by number; numbers never change. Of each thing that a limit looks at there are few, so few are tested."""

    def __init__(self) -> None:
        self.list: list[Kind] = []
        self._numbers: dict[Kind, int] = {}
        self._values: list[dict[Any, int]] = [{} for _ in STOPS]
        self._value_of: list[list[int]] = [[] for _ in STOPS]
        self._outcomes: OrderedDict[Sought, NDArray[np.int8]] = OrderedDict()

    def number(self, kind: Kind) -> int | None:
        """A kind's number; None if there are too many already."""
        number = self._numbers.get(kind)
        if number is None and len(self.list) < KINDS_MAX:
            number = self._numbers[kind] = len(self.list)
            self.list.append(kind)
            for (_, looks_at, _), values, value_of in zip(STOPS, self._values, self._value_of, strict=True):
                value_of.append(values.setdefault(looks_at(kind), len(values)))
            self._outcomes.clear()
        return number

    def outcomes(self, sought: Sought) -> NDArray[np.int8]:
        """The first limit that stops offers of each ring and kind, 0 if none does."""
        known = self._outcomes.get(sought)
        if known is None:
            known = self._outcomes[sought] = self._found(sought)
            if len(self._outcomes) > OUTCOMES_MAX:
                self._outcomes.popitem(last=False)
        return known

    def _found(self, sought: Sought) -> NDArray[np.int8]:
        found = np.zeros((len(RINGS), len(self.list)), np.int8)
        for at, (limit, _, stops) in reversed(list(enumerate(STOPS))):
            stopped = [[stops(sought, value, ring) for value in self._values[at]] for ring in RINGS]
            if any(any(row) for row in stopped):
                found[np.array(stopped)[:, self._value_of[at]]] = CODE[limit]
        return found


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
    has_gone: bool


def codes(c: Columns, rows: Codes | slice, outcomes: NDArray[np.int8], cost: Floats | None, ask: Ask) -> Codes:
    """The first limit that stops each of these rows, as numbered in CODE; GONE for who went away.

    `outcomes` are those of their kinds, `cost` is the most it can cost, where that is limited.
    Written from the last limit to the first, so that an earlier one overwrites a later one.
    """
    halt = c.halt[rows]
    found = halt
    if ask.on_probation is not None and len(ask.on_probation):
        found = found.copy()
        there = found[ask.on_probation]
        found[ask.on_probation] = np.where((there == 0) | (there == CODE["busy"]), CODE["backing_off"], there)
    if ask.tried is not None and len(ask.tried):
        found = found.copy()
        found[ask.tried] = CODE["already_tried"]
    if ask.cost_max is not None and cost is not None:
        found = np.where(cost > ask.cost_max, CODE["over_cost"], found)
    if ask.output_price_max is not None:
        found = np.where(c.output_price[rows] > ask.output_price_max, CODE["over_price"], found)
    if ask.tokens is not None:
        found = np.where(c.context[rows] < ask.tokens, CODE["over_context"], found)
    if ask.expired_s is not None:
        found = np.where(c.expires_s[rows] <= ask.expired_s, CODE["offer_expired"], found)
    first: Codes = np.where(outcomes != 0, outcomes, found)
    if ask.has_gone:
        first[halt == GONE] = GONE
    return first

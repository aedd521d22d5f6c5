"""Which offers can take a call at all. Each limit has a name, and the first that stops an offer is counted."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from fallow.core.match.candidate import Candidate
from fallow.model.call import Call
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Isolation, Ring
from fallow.model.owner import WORKING


class Sought(NamedTuple):
    """A call and what else the limits look at."""

    call: Call
    tried: Collection[NodeId]
    now_ms: int


ISOLATION_RANK: dict[Isolation, int] = {"none": 0, "landlock": 1, "bwrap": 2}

Passes = Callable[[Candidate, Sought], bool]


def ring_of(org: OrgId, card_org: OrgId, partners: Collection[OrgId]) -> Ring:
    """The ring that a node is in, from both organisations; never what its card claims."""
    if org == card_org:
        return "own"
    return "partner" if card_org in partners else "market"


def _ring(candidate: Candidate, sought: Sought) -> bool:
    needs = sought.call.needs
    ring = ring_of(sought.call.org_id, candidate.card.org_id, needs.partners)
    return ring in needs.rings and ring in candidate.card.serves


def _isolation(candidate: Candidate, sought: Sought) -> bool:
    wanted = sought.call.needs.isolation
    return wanted is None or ISOLATION_RANK[candidate.card.isolation] >= ISOLATION_RANK[wanted]


def _price(candidate: Candidate, sought: Sought) -> bool:
    ceiling = sought.call.needs.price_max_micro_per_munit
    return ceiling is None or candidate.offer.price.output_micro_per_munit <= ceiling


def _refused(candidate: Candidate, sought: Sought) -> bool:
    card, call = candidate.card, sought.call
    return call.org_id not in card.refuses_organisations and call.country not in card.refuses_countries


def _free(candidate: Candidate, _: Sought) -> bool:
    return candidate.running < candidate.offer.slots + candidate.load.waiting_max


LIMITS: tuple[tuple[str, Passes], ...] = (
    ("model_not_offered", lambda c, s: c.offer.model == s.call.needs.model),
    ("path_not_offered", lambda c, s: s.call.path in c.offer.paths),
    ("offer_expired", lambda c, s: c.offer.expires_at_ms > s.now_ms),
    ("ring", _ring),
    ("lender_refuses", _refused),
    ("region", lambda c, s: not s.call.needs.regions or c.card.region in s.call.needs.regions),
    ("hardware", lambda c, s: s.call.needs.hardware in (None, c.card.hardware.kind)),
    ("isolation", _isolation),
    ("over_price", _price),
    ("already_tried", lambda c, s: c.offer.node_id not in s.tried),
    ("owner_is_back", lambda c, _: c.state in WORKING),
    ("engine_failed", lambda c, _: c.load.readiness != "failed"),
    ("busy", _free),
)


def sieve(call: Call, candidates: Sequence[Candidate], *, tried: Collection[NodeId], now_ms: int) -> tuple[list[Candidate], Counter[str]]:
    """The offers that pass, and how many each limit stopped."""
    sought = Sought(call, tried, now_ms)
    fit: list[Candidate] = []
    stopped: Counter[str] = Counter()
    for candidate in candidates:
        for limit, passes in LIMITS:
            if not passes(candidate, sought):
                stopped[limit] += 1
                break
        else:
            fit.append(candidate)
    return fit, stopped

"""Nodes, offers, calls and markets for the tests of matching: everything has a usual value, and a test names what matters to it."""

from collections.abc import Collection, Iterable
from fractions import Fraction
from typing import TypedDict, Unpack

import msgspec
import numpy as np
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match import decide, survey
from fallow.core.match.filter import FREE
from fallow.core.match.market import Market
from fallow.core.match.pick import EXPLORE, draw
from fallow.core.match.price import PROMPT_MARGIN
from fallow.core.match.survey import Look, Moment
from fallow.core.standing import Failed
from fallow.model.call import Call
from fallow.model.card import Card, Hardware
from fallow.model.ids import CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import HardwareKind, Isolation, Needs, Ring
from fallow.model.offer import Load, Offer, Price, Readiness, Speed
from fallow.model.owner import State
from fallow.model.quote import Place, Quote, Refuse, Wait
from fallow.model.receipt import Usage

CHAT = "/v1/chat/completions"
GATEWAY = GatewayId("gw")
WALL_MS = 1_700_000_000_000
AT_S = 5_000.0
NOW = Moment(WALL_MS, AT_S)
FOREVER_S = 1e9
ALL_RINGS: frozenset[Ring] = frozenset({"own", "partner", "market"})
CREDIT = 1_000_000
PLAIN = Needs(model="tiny", prompt_tokens=100, output_tokens_max=50, rings=ALL_RINGS)
"""A call that minds nothing. Its targets are set by who tests them."""


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """A node with one offer. Prices are micro-credits per million tokens; `others` are calls of other gateways that it runs.

    `fails`: an attempt there failed as it was put, which is why it is left alone for a while.
    """

    node: str = "node-a"
    org: str = "stranger"
    serves: frozenset[Ring] = ALL_RINGS
    region: str = "eu-de"
    kind: HardwareKind = "cpu"
    isolation: Isolation = "none"
    refuses: frozenset[str] = frozenset()
    refuses_countries: frozenset[str] = frozenset()
    model: str = "tiny"
    family: str = ""
    quantisation: str = ""
    paths: frozenset[str] = frozenset({CHAT})
    context: int = 4_096
    prefill: float = 400.0
    decode: float = 20.0
    by_streams: tuple[tuple[int, float], ...] = ()
    writes: bool = True
    prompt_price: int = 0
    cached_price: int = 0
    output_price: int = CREDIT // 10
    slots: int = 2
    waiting_max: int = 2
    readiness: Readiness = "ready"
    ready_in_ms: int | None = None
    state: State = "run"
    expires_s: float = FOREVER_S
    rtt_s: float = 0.0
    others: int = 0
    fails: bool = False


def card_of(lent: Lent) -> Card:
    return Card(
        node_id=NodeId(lent.node),
        org_id=OrgId(lent.org),
        sequence=1,
        expires_at_ms=2**60,
        hardware=Hardware(kind=lent.kind, isa="x86_64-avx2", cores=8, memory_bytes=2**34, gpu="L4" if lent.kind == "gpu" else None),
        isolation=lent.isolation,
        region=lent.region,
        serves=lent.serves,
        refuses_organisations=lent.refuses,
        refuses_countries=lent.refuses_countries,
    )


def offer_of(lent: Lent) -> Offer:
    return Offer(
        node_id=NodeId(lent.node),
        model=lent.model,
        family=lent.family,
        quantisation=lent.quantisation,
        paths=lent.paths,
        context_tokens=lent.context,
        model_digest="",
        speed=Speed(
            prefill_tokens_per_s=lent.prefill, decode_tokens_per_s=lent.decode, decode_by_streams=lent.by_streams, writes=lent.writes
        ),
        price=Price(
            prompt_micro_per_munit=lent.prompt_price,
            cached_prompt_micro_per_munit=lent.cached_price,
            output_micro_per_munit=lent.output_price,
        ),
        slots=lent.slots,
        expires_at_ms=2**60,
    )


def load_of(lent: Lent) -> Load:
    return Load(
        model=lent.model,
        readiness=lent.readiness,
        slots_free=lent.slots,
        waiting=0,
        waiting_max=lent.waiting_max,
        ready_in_ms=lent.ready_in_ms,
    )


def put(market: Market, lent: Lent, *, at_s: float = AT_S) -> None:
    """What a node says reaches the market, its heartbeat included."""
    market.put(card_of(lent), offer_of(lent), load_of(lent), lent.state, expires_s=lent.expires_s, now_s=at_s, rtt_s=lent.rtt_s)
    if lent.others:
        market.heard(NodeId(lent.node), lent.model, running=lent.others, now_s=at_s)
    if lent.fails:
        market.told(NodeId(lent.node), Failed(code="engine_failed"), now_s=at_s)


def market_of(lents: Iterable[Lent], *, refreshed: bool = False) -> Market:
    """A market with these offers, put in this order; `refreshed` if it has been looked after since."""
    market = Market()
    for lent in lents:
        put(market, lent)
    if refreshed:
        market.refresh(now_s=AT_S)
    return market


def call_id(name: str = "call", *, explores: bool = False) -> CallId:
    """An id whose first attempt believes cards, or, as for all but one call in a hundred, doesn't."""
    number = 0
    while (draw(GATEWAY, CallId(f"{name}-{number}"), 1) < EXPLORE) != explores:
        number += 1
    return CallId(f"{name}-{number}")


class About(TypedDict, total=False):
    """What of a call differs from the usual."""

    key: str
    org: str
    path: str
    country: str
    prefix: tuple[int, ...]
    body_bytes: int
    stream: bool
    waited_s: float


CALL_ID, EXPLORER_ID = call_id(), call_id(explores=True)


def call_of(needs: Needs = PLAIN, id: CallId = CALL_ID, *, at: Moment = NOW, **about: Unpack[About]) -> Call:
    """A call that arrived at this moment, or `waited_s` before; see About for the rest."""
    return Call(
        id=id,
        org_id=OrgId(about.get("org", "home")),
        key_id=KeyId(about.get("key", "key")),
        gateway_id=GATEWAY,
        path=about.get("path", CHAT),
        stream=about.get("stream", True),
        body_bytes=about.get("body_bytes", 4 * needs.prompt_tokens),
        needs=needs,
        arrived_at_ms=at.wall_ms - round(1000 * about.get("waited_s", 0.0)),
        country=about.get("country", "unknown"),
        prefix=about.get("prefix", ()),
    )


def later(seconds: float) -> Moment:
    """So long after NOW."""
    return Moment(WALL_MS + round(1000 * seconds), AT_S + seconds)


def placed(decision: Place | Refuse | Wait) -> Place:
    assert isinstance(decision, Place), decision
    return decision


def refused(decision: Place | Refuse | Wait) -> Refuse:
    assert isinstance(decision, Refuse), decision
    return decision


def node_of(decision: Place | Refuse | Wait) -> str:
    """Where a call goes."""
    return placed(decision).node_id


def quote_at(market: Market, call: Call, node: str, *, now: Moment = NOW) -> Quote:
    """What one node would take and promise, whether or not it is the best, or could take the call."""
    for question in decide.ask(call, market, now=now):
        seen = survey.everything(question)
        look = survey.weigh(question, seen.rows, np.full_like(seen.codes, FREE), seen.near, end=seen.end)
        for at in range(len(look.rows)):
            if look.node_id(at) == node:
                return decide.quotes_of(look, [at])[0]
    raise AssertionError(f"{node} doesn't offer {call.needs.model}")


def looks(market: Market, call: Call, *, tried: Collection[NodeId] = (), now: Moment = NOW) -> list[Look]:
    """Everything that is offered, looked at without any short cut."""
    return [survey.everything(question) for question in decide.ask(call, market, tried=tried, now=now)]


def answer(
    market: Market,
    call: Call,
    node: str,
    *,
    reads: float,
    writes: float,
    output: int = 50,
    prompt: int | None = None,
    at_s: float = AT_S,
    id: str = "answered",
) -> float:
    """The node answers the call at these speeds, in tokens per second, with nothing beside it; when it ended, in seconds."""
    prompt = call.needs.prompt_tokens if prompt is None else prompt
    first_s = at_s + prompt / reads
    end_s = first_s + (output - 1) / writes
    market.began(id, call, quote_at(market, call, node, now=Moment(WALL_MS, at_s)), now_s=at_s)
    market.first(id, now_s=first_s)
    market.ended(id, call, Usage(prompt_tokens=prompt, output_tokens=output), now_s=end_s)
    return end_s


def strength(isolation: Isolation | None) -> int:
    return [None, "none", "landlock", "bwrap"].index(isolation)


def most(needs: Needs, lent: Lent) -> Fraction:
    """The most that the call can cost there, in micro-credits."""
    prompt = max(1, needs.prompt_tokens)
    output = max(0, lent.context - prompt) if needs.output_tokens_max is None else needs.output_tokens_max
    return (Fraction(PROMPT_MARGIN) * prompt * lent.prompt_price + output * lent.output_price) / CREDIT


def may(call: Call, lent: Lent, *, held: int = 0, tried: Collection[str] = (), now: Moment = NOW) -> bool:
    """All hard limits once more, in other words; `held` are this gateway's calls on the node. What is long is left to its own test."""
    needs = call.needs
    ring = "own" if lent.org == call.org_id else "partner" if lent.org in needs.partners else "market"
    country = lent.region.split("-")[1] if "-" in lent.region else None
    return all(
        (
            needs.model in (lent.model, lent.family),
            call.path in lent.paths,
            not needs.quantisations or lent.quantisation.casefold() in needs.quantisations,
            ring in needs.rings & lent.serves,
            call.org_id not in lent.refuses,
            call.country not in lent.refuses_countries,
            not needs.regions or lent.region in needs.regions,
            not needs.countries or country in needs.countries,
            needs.hardware is None or needs.hardware == lent.kind,
            strength(needs.isolation) <= max(1, strength(lent.isolation)),
            lent.expires_s > now.at_s,
            needs.price_max_micro_per_munit is None or lent.output_price <= needs.price_max_micro_per_munit,
            needs.cost_max_micro is None or most(needs, lent) <= needs.cost_max_micro,
            lent.node not in tried,
            lent.state in ("run", "throttle"),
            lent.readiness != "failed",
            not lent.fails,
            held + lent.others < lent.slots + lent.waiting_max,
        )
    )


usual = st.sampled_from([True, True, True, False])
some_ring: st.SearchStrategy[Ring] = st.sampled_from(["own", "partner", "market"])
some_rings = st.frozensets(some_ring)
some_needs = st.builds(
    Needs,
    model=st.sampled_from(["tiny", "tiny", "tiny", "big", "kin"]),
    prompt_tokens=st.integers(0, 1_000),
    output_tokens_max=st.none() | st.integers(1, 500),
    first_token_within_ms=st.none() | st.sampled_from([300, 1_500, 5_000]),
    per_token_within_ms=st.none() | st.sampled_from([40, 100, 200]),
    deadline_at_ms=st.none() | st.sampled_from([WALL_MS + 3_000, WALL_MS + 300_000]),
    price_max_micro_per_munit=st.none() | st.sampled_from([0, 50, 100]),
    cost_max_micro=st.none() | st.sampled_from([1, 50_000]),
    quantisations=st.just(frozenset()) | st.just(frozenset({"q4_0"})),
    prefer=st.sampled_from(["cheap", "cheap", "fast"]),
    rings=some_rings | st.just(ALL_RINGS),
    partners=st.frozensets(st.sampled_from([OrgId("friend"), OrgId("other")])),
    regions=st.just(frozenset()) | st.frozensets(st.sampled_from(["eu-de", "eu-fr"])),
    countries=st.just(frozenset()) | st.just(frozenset({"fr"})),
    hardware=st.sampled_from([None, None, "cpu", "gpu"]),
    isolation=st.sampled_from([None, None, "none", "landlock", "bwrap"]),
)
"""Needs from a small world, so that every limit is met now and then, and ties are common."""
some_lent = st.builds(
    Lent,
    node=st.sampled_from([f"node-{letter}" for letter in "abcdefgh"]),
    org=st.sampled_from(["home", "friend", "other"]),
    serves=st.just(ALL_RINGS) | some_rings,
    region=st.sampled_from(["eu-de", "eu-fr"]),
    kind=st.sampled_from(["cpu", "gpu"]),
    isolation=st.sampled_from(["none", "landlock", "bwrap"]),
    model=usual.map(lambda yes: "tiny" if yes else "big"),
    refuses=usual.map(lambda yes: frozenset() if yes else frozenset({"home"})),
    quantisation=st.sampled_from(["", "Q4_0"]),
    paths=usual.map(lambda yes: frozenset({CHAT} if yes else {"/v1/completions"})),
    prefill=st.sampled_from([0.0, 50.0, 400.0]),
    decode=st.sampled_from([0.0, 8.0, 30.0]),
    prompt_price=st.sampled_from([0, 10]),
    output_price=st.sampled_from([0, 50, 51, 100, 10**6]),
    slots=st.integers(0, 3),
    expires_s=usual.map(lambda yes: FOREVER_S if yes else AT_S),
    readiness=usual.map(lambda yes: "ready" if yes else "failed"),
    ready_in_ms=st.sampled_from([None, None, 700]),
    state=usual.map(lambda yes: "run" if yes else "pause"),
    waiting_max=st.integers(0, 2),
    others=st.integers(0, 2),
).map(lambda lent: replace(lent, family="kin" if lent.model == "tiny" else ""))
some_lents = st.lists(some_lent, unique_by=lambda one: one.node, max_size=6)
"""Offers of different nodes from the same small world."""

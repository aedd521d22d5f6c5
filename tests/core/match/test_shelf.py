"""Offers come, change, go and are put in order, with calls on them: the rows stay true, and no short cut over them misses the best."""

import math
import random
from typing import get_args
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from fallow.core.match import pick, survey
from fallow.core.match.columns import GONE
from fallow.core.match.decide import match
from fallow.core.match.filter import RINGS
from fallow.core.match.market import Market
from fallow.core.match.rows import NEAR_FIRST, PARTS, TAIL_MAX
from fallow.core.match.shelf import Shelf
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Needs, ServiceTier
from fallow.model.quote import Place
from fallow.model.receipt import Usage
from offers import AT_S, CREDIT, NOW, PLAIN, Lent, call_of, later, looks, market_of, node_of, placed, put, quote_at

MANY = settings(max_examples=40)
TIERS = get_args(ServiceTier)
PARTNERS = replace(PLAIN, partners=frozenset({OrgId("friend")}))
NODES = [f"node-{letter}" for letter in "abcdef"]
some_node = st.sampled_from(NODES)
some_price = st.sampled_from([0, 50, 51, 100])


class Held:
    """What the test knows of a call that goes on."""

    def __init__(self, node: str, *, prompt: int, stream: bool) -> None:
        self.node, self.prompt, self.stream, self.began = node, prompt, stream, False
        """`began`: its first token came."""


class OnTheShelf(RuleBasedStateMachine):
    """A market of one model beside a plain account of what happened to it."""

    wild = False
    """Whether what is known to go wrong happens too."""

    def __init__(self) -> None:
        super().__init__()
        self.market = Market()
        self.lents: dict[str, Lent] = {}
        self.others: dict[str, int] = {}
        self.calls: dict[str, Held] = {}
        self.left: set[str] = set()
        self.now_s = 0.0
        self.number = 0

    def put(self, lent: Lent) -> None:
        known = self.lents.get(lent.node)
        if known is None:
            self.others[lent.node] = 0
        elif not self.wild:  # see the tests of these two below
            same_org = known.output_price == lent.output_price
            lent = replace(lent, org=known.org if same_org else lent.org)
            lent = replace(lent, prompt_price=known.prompt_price, cached_price=known.cached_price) if same_org else lent
        put(self.market, lent, at_s=AT_S + self.now_s)
        self.lents[lent.node] = lent

    @rule(node=some_node, prompt=some_price, cached=some_price, output=some_price, slots=st.integers(0, 3), org=st.sampled_from(["x", "y"]))
    def offers(self, node: str, prompt: int, cached: int, output: int, slots: int, org: str) -> None:
        self.put(Lent(node=node, org=org, prompt_price=prompt, cached_price=cached, output_price=output, slots=slots, waiting_max=9))

    @rule(output=some_price)
    def a_crowd_comes(self, output: int) -> None:
        for at in range(TAIL_MAX + 1):
            self.put(Lent(node=f"node-{at}", org="z", output_price=output + at % 7, prompt_price=at % 3))

    @rule(step=st.integers(1, 5))
    def a_crowd_goes(self, step: int) -> None:
        for node in [f"node-{at}" for at in range(0, TAIL_MAX + 1, step)]:
            self.goes(node)

    @rule(node=some_node)
    def goes(self, node: str) -> None:
        self.market.drop(NodeId(node))
        self.lents.pop(node, None)
        self.others.pop(node, None)
        for id in [id for id, held in self.calls.items() if held.node == node]:
            self.left.add(id)
            del self.calls[id]

    @precondition(lambda self: self.lents)
    @rule(at=st.integers(0, 10**6), prompt=st.integers(1, 900), stream=st.booleans())
    def a_call_goes_there(self, at: int, prompt: int, stream: bool) -> None:
        node = sorted(self.lents)[at % len(self.lents)]
        self.number += 1
        id, call = f"call-{self.number}", call_of(replace(PLAIN, prompt_tokens=prompt), stream=stream)
        self.market.began(id, call, quote_at(self.market, call, node, now=later(self.now_s)), now_s=AT_S + self.now_s)
        self.calls[id] = Held(node, prompt=prompt, stream=stream)

    @precondition(lambda self: self.calls)
    @rule(at=st.integers(0, 10**6))
    def a_first_token_comes(self, at: int) -> None:
        id = sorted(self.calls)[at % len(self.calls)]
        self.market.first(id, now_s=AT_S + self.now_s)
        self.calls[id].began = True

    @precondition(lambda self: self.calls)
    @rule(at=st.integers(0, 10**6), tokens=st.none() | st.integers(0, 60))
    def a_call_ends(self, at: int, tokens: int | None) -> None:
        id = sorted(self.calls)[at % len(self.calls)]
        usage = None if tokens is None else Usage(output_tokens=tokens)
        self.market.ended(id, call_of(), usage, now_s=AT_S + self.now_s)
        del self.calls[id]

    @precondition(lambda self: self.left)
    @rule()
    def what_was_left_behind_goes_on(self) -> None:
        for id in sorted(self.left):
            if self.wild:
                self.market.first(id, now_s=AT_S + self.now_s)
            self.market.ended(id, call_of(), Usage(output_tokens=40), now_s=AT_S + self.now_s)
        self.left.clear()

    @precondition(lambda self: self.lents)
    @rule(at=st.integers(0, 10**6), running=st.integers(0, 6), busy=st.booleans())
    def a_heartbeat_comes(self, at: int, running: int, busy: bool) -> None:
        among = sorted({held.node for held in self.calls.values()} if busy and self.calls else self.lents)
        node = among[at % len(among)]
        ours = sum(held.node == node for held in self.calls.values())
        self.market.heard(NodeId(node), "tiny", running=running, now_s=AT_S + self.now_s)
        self.others[node] = max(0, running - ours)

    @rule(seconds=st.sampled_from([0.0, 0.1, 3.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.market.refresh(now_s=AT_S + self.now_s)
        for shelf in self.market.shelves("tiny"):
            for node_id, mine in shelf.bookings.items():
                for id, one in mine.items():  # an answer in one piece tells of no first token
                    assert one.node_id == node_id == self.calls[id].node
                    self.calls[id].began |= not self.calls[id].stream and one.first_s is not None

    def shelf(self) -> Shelf | None:
        found = self.market.shelves("tiny")
        assert len(found) == (1 if self.lents else 0)
        return found[0] if found else None

    @invariant()
    def rows_and_nodes_agree(self) -> None:
        if (shelf := self.shelf()) is None:
            return
        assert shelf.row_of.keys() == self.lents.keys()
        assert all(shelf.nodes[row] == node_id for node_id, row in shelf.row_of.items())
        empty = [row for row, node_id in enumerate(shelf.nodes) if not node_id]
        assert len(empty) == len(shelf.nodes) - len(self.lents) == shelf.gone
        assert all(shelf.columns.stop[row] == GONE for row in empty)
        assert len({len(column) for column in shelf.columns}) == 1
        assert len(shelf.columns.org) >= len(shelf.nodes) >= shelf.ordered

    @invariant()
    def each_row_holds_what_its_node_said(self) -> None:
        if (shelf := self.shelf()) is None:
            return
        c = shelf.columns
        for node, lent in self.lents.items():
            row = shelf.row_of[NodeId(node)]
            assert c.prompt_price[row] == lent.prompt_price / CREDIT
            assert c.cached_price[row] == min(lent.cached_price, lent.prompt_price) / CREDIT
            assert c.output_price[row] == lent.output_price / CREDIT
            assert (c.slots[row], c.room[row]) == (max(1, lent.slots), lent.slots + lent.waiting_max)
            assert (c.prefill[row], c.decode[row], c.stop[row]) == (lent.prefill, lent.decode, 0)
            assert c.org[row] == self.market.org(OrgId(lent.org))
        rows_of: dict[int, list[int]] = {}
        for node, lent in self.lents.items():
            rows_of.setdefault(self.market.org(OrgId(lent.org)), []).append(shelf.row_of[NodeId(node)])
        assert shelf.orgs == {org: sorted(rows) for org, rows in rows_of.items()}

    @invariant()
    def calls_are_where_they_went(self) -> None:
        if (shelf := self.shelf()) is None:
            return
        c = shelf.columns
        for node in self.lents:
            row, mine = shelf.row_of[NodeId(node)], [held for held in self.calls.values() if held.node == node]
            assert c.streams[row] == sum(held.began for held in mine)
            assert c.reading[row] == sum(not held.began for held in mine)
            assert c.unread[row] == sum(held.prompt for held in mine if not held.began)
            assert c.others[row] == self.others[node]
            assert shelf.held(row) == len(mine) + self.others[node]

    @invariant()
    def numbers_are_numbers(self) -> None:
        if (shelf := self.shelf()) is None:
            return
        signed = ("prefill_log", "decode_log", "step_log", "over", "stop")
        for name, column in zip(shelf.columns._fields, shelf.columns, strict=True):
            there = column[sorted(shelf.row_of.values())]
            assert np.isfinite(there).all(), name
            assert name in signed or (there >= 0).all(), name

    @invariant()
    def what_is_in_order_is_in_order(self) -> None:
        if (shelf := self.shelf()) is None:
            return
        c, ordered = shelf.columns, shelf.ordered
        there = [row for row in range(ordered) if c.stop[row] != GONE]
        assert (np.diff(c.output_price[:ordered]) >= 0).all()
        floors = shelf.cheapest_prompt
        assert all(floors[at] <= min(c.prompt_price[row], c.cached_price[row]) for row in there for at in {0, row // 2, row})


class OnTheWildShelf(OnTheShelf):
    wild = True


ENOUGH = settings(max_examples=60, stateful_step_count=40)
TestOnTheShelf = OnTheShelf.TestCase
TestOnTheShelf.settings = ENOUGH
TestOnTheWildShelf = OnTheWildShelf.TestCase
TestOnTheWildShelf.settings = ENOUGH


# Many offers.
def crowd(luck: random.Random, count: int, start: int = 0) -> list[Lent]:
    """Offers of which some are alike in price."""
    return [
        Lent(
            node=f"node-{at:03}",
            org=luck.choice(["home", "friend", *["stranger"] * 8]),
            kind=luck.choice(["cpu", "gpu"]),
            prompt_price=luck.choice([0, 20_000, luck.randrange(100_000)]),
            cached_price=luck.choice([0, 10_000]),
            output_price=luck.choice([100_000, 101_000, 200_000, luck.randrange(10**6)]),
            prefill=luck.choice([50.0, 400.0, 10 ** luck.uniform(1, 4)]),
            decode=luck.choice([8.0, 30.0, 10 ** luck.uniform(0, 2)]),
            others=luck.choice([0, 0, 0, 1, 2, 4]),
            state=luck.choice(["run", "run", "run", "pause"]),
        )
        for at in range(start, start + count)
    ]


def grown(luck: random.Random) -> tuple[Market, dict[str, Lent]]:
    """A market that was put in order, and changed since: offers came, went, and changed their prices."""
    lents = {lent.node: lent for lent in crowd(luck, luck.choice([65, 300, PARTS[0], PARTS[0] + 1, PARTS[0] + 200]))}
    market = market_of(lents.values(), refreshed=True)
    for node in luck.sample(sorted(lents), 10):
        lents[node] = replace(lents[node], output_price=luck.randrange(200_000))
        put(market, lents[node])
    for node in luck.sample(sorted(lents), 10):
        market.drop(NodeId(node))
        del lents[node]
    for lent in crowd(luck, luck.randrange(30), start=500):
        lents[lent.node] = lent
        put(market, lent)
    return market, lents


many_needs = st.builds(
    Needs,
    model=st.just("tiny"),
    prompt_tokens=st.integers(1, 2_000),
    output_tokens_max=st.integers(1, 500),
    first_token_within_ms=st.none() | st.sampled_from([300, 1_500, 5_000]),
    per_token_within_ms=st.none() | st.sampled_from([40, 100]),
    prefer=st.sampled_from(["cheap", "cheap", "fast"]),
    rings=st.sampled_from([PLAIN.rings, frozenset({"market"}), frozenset({"own", "partner"})]),
    partners=st.just(PARTNERS.partners),
)


@MANY
@given(many_needs, st.integers(0, 2**32))
def test_short_cuts_find_what_a_look_at_everything_finds(needs: Needs, seed: int) -> None:
    call, (market, _) = call_of(needs), grown(random.Random(seed))
    (everything,) = looks(market, call)
    scores = {everything.node_id(at): float(everything.score[at]) for at in range(len(everything.score))}
    decision = match(call, market, now=NOW)
    for name in RINGS:
        able = everything.able_in(name)
        if len(able) and name in needs.rings:
            least = float(everything.score[able].min())
            place = placed(decision)
            assert place.able > 0
            if needs.prefer == "fast" and len(everything.rows) > PARTS[0]:
                return  # any of the fastest will do
            assert scores[place.node_id] <= least * (1.0 + pick.NEAR) + 1e-9
            return
    assert not isinstance(decision, Place) or decision.able == 0


@MANY
@given(many_needs, st.sampled_from(TIERS), st.integers(0, 2**32))
def test_who_is_served_by_a_nearer_ring_would_be_if_all_were_looked_at(needs: Needs, tier: ServiceTier, seed: int) -> None:
    """The nearer rings are looked at first and alone: a short cut as well."""
    needs = replace(needs, service_tier=tier, deadline_at_ms=NOW.wall_ms + 600_000 if tier == "flex" else None)
    call, (market, _) = call_of(needs), grown(random.Random(seed))
    decision = match(call, market, now=NOW)
    with mock.patch.object(survey, "nearer", survey.first):
        assert match(call, market, now=NOW) == decision


@MANY
@given(many_needs, st.integers(0, 2**32))
def test_the_order_in_which_many_came_changes_nothing(needs: Needs, seed: int) -> None:
    luck = random.Random(seed)
    first, more = crowd(luck, 150), crowd(luck, 20, start=500)
    decisions = []
    for order in (luck.sample, lambda all, count: all):
        market = market_of(order(first, len(first)), refreshed=True)
        for lent in order(more, len(more)):
            put(market, lent)
        decisions.append(match(call_of(needs), market, now=NOW))
    assert decisions[0] == decisions[1]


def test_a_prompt_that_became_cheap_is_found_behind_many() -> None:
    needs = replace(PLAIN, prompt_tokens=2_000, output_tokens_max=1)
    prices = [CREDIT // 2] * PARTS[0] + [CREDIT] * 50
    lents = [Lent(node=f"node-{at:04}", prompt_price=price, cached_price=price, output_price=at) for at, price in enumerate(prices)]
    market = market_of(lents, refreshed=True)
    put(market, replace(lents[-1], prompt_price=0))
    assert node_of(match(call_of(needs), market, now=NOW)) == lents[-1].node


def test_the_hasty_find_the_newcomer_and_the_idle() -> None:
    """Where only the fastest of many are looked at first, a call that none of them can take still finds a place."""
    lents = [Lent(node=f"node-{at:04}", decode=10.0 + at, prefill=100.0, state="pause") for at in range(PARTS[0] + 50)]
    market = market_of([*lents[1:], replace(lents[0], state="run")], refreshed=True)
    fast = replace(PLAIN, prefer="fast")
    assert node_of(match(call_of(fast), market, now=NOW)) == "node-0000"
    market.drop(NodeId("node-0000"))
    put(market, Lent(node="new"))
    assert node_of(match(call_of(fast), market, now=NOW)) == "new"


def test_able_counts_each_offer_once() -> None:
    lents = [Lent(node=f"node-{at:04}", decode=10.0 + at, state="run" if at < 3 else "pause") for at in range(PARTS[0] + 50)]
    for needs in (PLAIN, replace(PLAIN, prefer="fast"), PARTNERS):
        assert placed(match(call_of(needs), market_of(lents, refreshed=True), now=NOW)).able == 3


@pytest.mark.parametrize(("mine", "running", "others"), [(0, 0, 0), (0, 3, 3), (2, 2, 0), (2, 3, 1), (3, 1, 0)])
def test_a_heartbeat_counts_this_gateways_calls_too(mine: int, running: int, others: int) -> None:
    """What is left when they are taken away runs for others; a heartbeat that is older than a call knows of too few."""
    market, call = market_of([Lent(waiting_max=9)]), call_of()
    for at in range(mine):
        market.began(f"mine-{at}", call, quote_at(market, call, "node-a"), now_s=AT_S)
    market.heard(NodeId("node-a"), "tiny", running=running, now_s=AT_S)
    shelf = market.shelves("tiny")[0]
    assert (shelf.columns.others[0], shelf.held(0)) == (others, mine + others)


def test_rows_are_put_in_order_now_and_then_only() -> None:
    market = market_of([Lent(node=f"node-{at}", output_price=100 - at) for at in range(TAIL_MAX)], refreshed=True)
    shelf = market.shelves("tiny")[0]
    assert shelf.ordered == 0
    put(market, Lent(node="one-more", output_price=7))
    market.refresh(now_s=AT_S + 1.0)
    assert shelf.ordered == TAIL_MAX + 1
    assert [shelf.columns.output_price[row] * CREDIT for row in range(3)] == pytest.approx([7, 100 - TAIL_MAX + 1, 100 - TAIL_MAX + 2])
    assert math.isclose(shelf.cheapest_prompt[0], 0.0)


def test_the_cheapest_newcomer_of_a_partner_is_seen_though_they_are_many() -> None:
    market = market_of([Lent(node=f"node-{at:04}") for at in range(PARTS[0] + 50)], refreshed=True)
    for at in range(NEAR_FIRST + 4):
        put(market, Lent(node=f"new-{at:02}", org="friend", output_price=100 - at))
    place = placed(match(call_of(PARTNERS), market, now=NOW))
    assert (place.node_id, place.quote.ring, place.able) == (f"new-{NEAR_FIRST + 3}", "partner", NEAR_FIRST + 4)

"""What a million tokens go for: where a price begins, how it moves, what bounds it, and who can't push it."""

import random
from typing import Literal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fallow.core import price_index
from fallow.core.price_index import CAP, INTERVAL_MS, ORG_SHARE_MAX, Choice, PriceIndex, Supply, follow, step, utilisation
from fallow.core.roster import Member
from fallow.model.card import Card, Hardware
from fallow.model.ids import NodeId, OrgId
from fallow.model.messages import INDEX_PRICES_MAX, NodeState
from fallow.model.needs import HardwareKind
from fallow.model.offer import Load, Offer, Price, Readiness, Speed

T0 = 1_790_000_000_000
STEP_PPM = 50_000


def price(prompt: int = 0, output: int = 0, cached: int = 0) -> Price:
    return Price(prompt_micro_per_munit=prompt, cached_prompt_micro_per_munit=cached, output_micro_per_munit=output)


def supply(
    ask: int | Price = 1_000, *, model: str = "m", hardware: HardwareKind = "cpu", org: str = "a", slots: int = 4, taken: int = 0
) -> Supply:
    asked = ask if isinstance(ask, Price) else price(ask // 10, ask)
    return Supply(model=model, hardware=hardware, org_id=OrgId(org), price=asked, slots=slots, taken=taken)


def outputs(index: PriceIndex) -> list[int]:
    return [entry.output.price for entry in index.entries]


def run(supplies: list[Supply], intervals: int, *, index: PriceIndex | None = None, now_ms: int = T0) -> tuple[PriceIndex, int]:
    """So many intervals of lenders who fix what they ask."""
    index = step(index or PriceIndex(), supplies, now_ms=now_ms)
    for _ in range(intervals):
        now_ms += INTERVAL_MS
        index = step(index, supplies, now_ms=now_ms)
    return index, now_ms


class Town:
    """Lenders with costs who follow the index, as busy as a test says."""

    def __init__(self, floors: list[Price], taken: int = 0) -> None:
        self.floors = floors
        self.taken = taken
        self.now_ms = T0
        self.index = step(PriceIndex(), [supply(floor, taken=taken) for floor in floors], now_ms=T0)

    def asks(self) -> list[Price]:
        return [follow(self.index.entries[0].price, floor, Choice()) for floor in self.floors]

    def interval(self) -> Price:
        self.now_ms += INTERVAL_MS
        self.index = step(self.index, [supply(ask, taken=self.taken) for ask in self.asks()], now_ms=self.now_ms)
        return self.index.entries[0].price


# where a price begins
@pytest.mark.parametrize(
    ("asks", "begins"),
    [
        ([1_000], 1_250),
        ([1_000, 2_000, 9_000], 2_500),
        ([1_000, 2_000], 1_250),
        ([0, 0, 4_000], 5_000),
        ([0], 0),
        ([1], 2),
        ([2**40], 2**40),
    ],
)
def test_a_newcomer_begins_above_the_median_of_what_is_asked(asks: list[int], begins: int) -> None:
    assert outputs(step(PriceIndex(), [supply(ask) for ask in asks], now_ms=T0)) == [begins]


def test_what_was_given_away_gets_a_price_with_the_first_who_asks() -> None:
    index, now = run([supply(0)], 3)
    assert outputs(index) == [0]
    assert outputs(step(index, [supply(0), supply(800)], now_ms=now + 1)) == [1_000]


def test_every_model_and_kind_of_hardware_has_its_own_price() -> None:
    index = step(PriceIndex(), [supply(800), supply(80, hardware="gpu"), supply(8_000, model="n")], now_ms=T0)
    assert [(*entry.key, entry.output.price) for entry in index.entries] == [("m", "cpu", 1_000), ("m", "gpu", 100), ("n", "cpu", 10_000)]


# how it moves
@pytest.mark.parametrize(
    ("taken", "moved"),
    [(0, 950_000), (40, 950_000), (60, 980_000), (70, 1_000_000), (80, 1_020_000), (95, 1_050_000), (100, 1_050_000), (400, 1_050_000)],
)
def test_a_step_follows_the_utilisation_and_is_bounded(taken: int, moved: int) -> None:
    before = step(PriceIndex(), [supply(800_000, slots=100, taken=taken)], now_ms=T0)
    after = step(before, [supply(800_000, slots=100, taken=taken)], now_ms=T0 + INTERVAL_MS)
    assert outputs(after) == [moved]


def test_nothing_moves_before_the_interval_is_over() -> None:
    index = step(PriceIndex(), [supply(taken=4)], now_ms=T0)
    for later in range(0, INTERVAL_MS, 10_000):
        index = step(index, [supply(taken=4)], now_ms=T0 + later)
    assert outputs(index) == [1_250]
    assert outputs(step(index, [supply(taken=4)], now_ms=T0 + INTERVAL_MS)) == [1_313]


def test_a_moment_of_work_in_an_idle_hour_is_no_rush() -> None:
    index, now = run([supply(taken=0)], 12)
    index = step(index, [supply(taken=0)], now_ms=now + 299_000)
    at_once = step(index, [supply(taken=4)], now_ms=now + 300_000).entries[0]
    assert at_once.utilisation < 0.01


def test_a_clock_that_is_set_back_does_not_stop_the_index() -> None:
    index, now = run([supply(taken=4)], 1)
    index = step(index, [supply(taken=4)], now_ms=now - 86_400_000)
    before = outputs(index)
    assert outputs(step(index, [supply(taken=4)], now_ms=now - 86_400_000 + INTERVAL_MS)) > before


@pytest.mark.parametrize("small", [1, 2, 7, 15])
def test_small_prices_move_too(small: int) -> None:
    index = step(PriceIndex(), [supply(small, taken=4)], now_ms=T0)
    after = step(index, [supply(small, taken=4)], now_ms=T0 + INTERVAL_MS)
    assert outputs(after)[0] == outputs(index)[0] + 1


def test_the_units_move_together() -> None:
    ask = price(prompt=80_000, cached=8_000, output=800_000)
    index, _ = run([supply(ask, taken=4)], 20)
    moved = index.entries[0].price
    assert moved.output_micro_per_munit > 2_500_000
    assert moved.prompt_micro_per_munit == pytest.approx(moved.output_micro_per_munit / 10, rel=1e-3)
    assert moved.cached_prompt_micro_per_munit == pytest.approx(moved.output_micro_per_munit / 100, rel=1e-2)


# what bounds it
def test_an_idle_market_comes_down_to_the_cheapest_lender_and_no_further() -> None:
    lenders = [supply(1_000), supply(400), supply(5_000)]
    index, now = run(lenders, 30)
    seen = []
    for _ in range(100):
        index, now = run(lenders, 1, index=index, now_ms=now)
        seen += outputs(index)
    assert set(seen) == {400, 380}, "a lower price is tried, and given up"
    assert 0 < seen.count(380) <= 1 + 100 * INTERVAL_MS // price_index.TRY_LOWER_MS


def test_no_rush_lifts_a_price_beyond_its_cap() -> None:
    index, _ = run([supply(taken=100)], 200)
    assert outputs(index) == [1_250 * CAP]


def test_a_cheap_newcomer_lets_the_price_fall_and_leaves_it_so_only_while_there() -> None:
    index, now = run([supply(1_000)], 10)
    assert outputs(index) == [1_000]
    index, now = run([supply(1_000), supply(100)], 60, index=index, now_ms=now)
    assert outputs(index) == [100]
    index = step(index, [supply(1_000)], now_ms=now + INTERVAL_MS)
    assert outputs(index) == [1_000], "nobody sells below that any more"


def test_lenders_who_follow_can_go_down_together_to_what_the_cheapest_one_pays() -> None:
    town = Town([price(output=1_000), price(output=3_000), price(output=9_000)])
    seen = [town.interval().output_micro_per_munit for _ in range(200)]
    assert min(seen) >= 950
    assert town.asks()[0].output_micro_per_munit == 1_000
    assert seen.count(1_000) > 150, "the lower price that is tried once an hour is given up at once"


def test_costs_that_fell_are_found_though_nobody_tells_them() -> None:
    town = Town([price(output=1_000)])
    for _ in range(30):
        town.interval()
    town.floors = [price(output=600)]
    for _ in range(40):
        town.interval()
    assert town.asks() == [price(output=600)]


def test_costs_that_rose_are_taken_over_at_once() -> None:
    town = Town([price(output=1_000)])
    for _ in range(30):
        town.interval()
    town.floors = [price(output=4_000)]
    town.interval()
    assert town.interval().output_micro_per_munit == 4_000


def test_one_who_sells_for_next_to_nothing_does_not_cap_what_others_may_earn() -> None:
    index, now = run([supply(1)], 1)
    town = [supply(1, taken=4), supply(50_000, org="b", taken=40), supply(50_000, org="c", taken=40)]
    index, now = run(town, 300, index=index, now_ms=now)
    assert outputs(index)[0] > 100_000


# who is counted
@pytest.mark.parametrize(
    ("supplies", "busy"),
    [
        ([supply(slots=4, taken=1)], 0.25),
        ([supply(slots=4, taken=9)], 1.0),
        ([supply(slots=1, taken=1), supply(slots=3, taken=0)], 0.25),
        ([supply(org="a", slots=90, taken=90), supply(org="b", slots=10)], 0.9),
        ([supply(org="a", slots=96, taken=96), supply(org="b", slots=2), supply(org="c", slots=2)], ORG_SHARE_MAX),
        ([supply(org="a", slots=2), supply(org="b", slots=99, taken=99), supply(org="c", slots=99, taken=99)], 2 * ORG_SHARE_MAX),
        ([supply(org="a", slots=3, taken=3), supply(org="b", slots=3), supply(org="c", slots=3)], 1 / 3),
        ([], 0.0),
    ],
)
def test_utilisation_is_weighed_by_slots_and_no_organisation_is_most_of_it(supplies: list[Supply], busy: float) -> None:
    assert utilisation(supplies) == pytest.approx(busy)


def test_what_nobody_offers_keeps_its_price_for_a_while() -> None:
    index, now = run([supply(taken=4)], 5)
    kept = step(index, [], now_ms=now + price_index.FORGOTTEN_MS - 1)
    assert kept == index
    assert step(index, [], now_ms=now + price_index.FORGOTTEN_MS) == PriceIndex()


def test_a_full_index_keeps_what_most_organisations_offer() -> None:
    many = [supply(model=f"x{n:04}") for n in range(INDEX_PRICES_MAX)]
    index = step(PriceIndex(), many, now_ms=T0)
    late = [supply(model="wanted", org="a"), supply(model="wanted", org="b"), supply(model="unknown")]
    names = {entry.model for entry in step(index, many + late, now_ms=T0 + 1).entries}
    assert len(names) == INDEX_PRICES_MAX
    assert "wanted" in names
    assert "unknown" not in names


def member(*, state: NodeState = "run", readiness: Readiness = "ready", model: str = "m", slots: int = 4, free: int = 1) -> Member:
    node = NodeId("node-1")
    card = Card(
        node_id=node,
        org_id=OrgId("a"),
        sequence=1,
        expires_at_ms=2**50,
        hardware=Hardware(kind="gpu", isa="x86_64", cores=1, memory_bytes=0),
        isolation="none",
        region="here",
        serves=frozenset({"own"}),
    )
    offer = Offer(
        node_id=node,
        model=model,
        paths=frozenset(),
        context_tokens=1,
        model_digest="",
        speed=Speed(),
        price=price(1, 2, 3),
        slots=slots,
        expires_at_ms=2**50,
    )
    load = Load(model=model, readiness=readiness, slots_free=free, waiting=2, waiting_max=9)
    return Member(sequence=1, heard_at_ms=0, state=state, card=card, offers=(offer,), loads=(load,))


def test_a_member_s_offers_are_supply() -> None:
    found = price_index.supplies_of([member(), member(state="throttle", readiness="cold", free=4)])
    assert found == [supply(price(1, 2, 3), hardware="gpu", taken=5), supply(price(1, 2, 3), hardware="gpu", taken=2)]


@pytest.mark.parametrize(
    "idle",
    [
        member(state="pause"),
        member(state="leave"),
        member(readiness="failed"),
        member(slots=0),
        member(model="é" * 101),
        msgspec.structs.replace(member(), card=None),
        msgspec.structs.replace(member(), loads=()),
    ],
)
def test_what_could_not_take_a_call_is_no_supply(idle: Member) -> None:
    assert price_index.supplies_of([idle]) == []


# what a lender asks
@pytest.mark.parametrize(
    ("way", "index", "asked"),
    [
        ("follow", None, price(10, 100, 0)),
        ("follow", price(20, 50, 5), price(20, 100, 5)),
        ("follow", price(1, 1, 0), price(10, 100, 0)),
        ("floor", price(20, 500, 5), price(10, 100, 0)),
        ("fixed", price(20, 500, 5), price(10, 300, 7)),
        ("fixed", None, price(10, 300, 7)),
    ],
)
def test_a_lender_never_asks_less_than_the_floor(way: Literal["follow", "floor", "fixed"], index: Price | None, asked: Price) -> None:
    choice = Choice(way=way, fixed=price(3, 300, 7))
    assert follow(index, price(10, 100, 0), choice) == asked


# promises
ASKS = st.integers(0, 10**9)
PRICES = st.builds(price, ASKS, ASKS, ASKS)
SUPPLIES = st.lists(
    st.builds(
        Supply,
        model=st.sampled_from(["m", "n"]),
        hardware=st.sampled_from(["cpu", "gpu"]),
        org_id=st.sampled_from([OrgId(name) for name in "abcd"]),
        price=PRICES,
        slots=st.integers(1, 1_024),
        taken=st.integers(0, 3_000),
    ),
    max_size=12,
)
WORLDS = st.lists(st.tuples(SUPPLIES, st.integers(0, 2 * INTERVAL_MS)), min_size=1, max_size=12)


@given(WORLDS, st.randoms(use_true_random=False))
def test_the_order_of_offers_changes_nothing(worlds: list[tuple[list[Supply], int]], chance: random.Random) -> None:
    here = there = PriceIndex()
    now = T0
    for supplies, later in worlds:
        now += later
        here = step(here, supplies, now_ms=now)
        there = step(there, chance.sample(supplies, len(supplies)), now_ms=now)
    assert here == there


@given(WORLDS)
def test_steps_are_bounded_and_only_costs_lift_a_price_further(worlds: list[tuple[list[Supply], int]]) -> None:
    index, now = PriceIndex(), T0
    for supplies, later in worlds:
        now += later
        before = {entry.key: entry for entry in index.entries}
        index = step(index, supplies, now_ms=now)
        for entry in index.entries:
            if entry.key not in before:
                continue
            old = before[entry.key]
            for was, unit in zip(
                (old.prompt, old.cached_prompt, old.output), (entry.prompt, entry.cached_prompt, entry.output), strict=True
            ):
                if not was.anchor:
                    continue
                bound = -(-was.price * STEP_PPM // 1_000_000)
                assert was.price - bound <= unit.price
                assert unit.price <= was.price + bound or unit.price == unit.cost
                assert 1 <= unit.price <= max(CAP * unit.anchor, unit.cost)
                assert entry.moved_at_ms == now or unit.price == was.price
            assert 0 <= entry.utilisation <= 1


@given(st.lists(PRICES, min_size=1, max_size=6), st.lists(st.integers(0, 8), max_size=40))
@example([price(0, 0, 0), price(0, 3, 0)], [0] * 40)
@example([price(100, 3, 1), price(50, 7, 1)], [0] * 40)
def test_followers_never_ask_less_than_their_costs_nor_does_the_index_leave_the_cheapest_far_above(
    floors: list[Price], work: list[int]
) -> None:
    town = Town(floors)
    for taken in work:
        town.taken = taken
        index = town.interval()
        for floor, ask in zip(floors, town.asks(), strict=True):
            for unit in Price.__struct_fields__:
                assert getattr(ask, unit) >= getattr(floor, unit)
        for unit in Price.__struct_fields__:
            costs = [getattr(floor, unit) for floor in floors]
            if any(costs):  # one without costs follows as low as the index goes: to 1
                assert getattr(index, unit) >= max(1, min(costs) - 1 - min(costs) * STEP_PPM // 1_000_000)


@given(st.lists(PRICES, min_size=1, max_size=6))
def test_full_raises_and_idle_lowers_until_the_bounds(floors: list[Price]) -> None:
    for taken, sign in ((9, 1), (0, -1)):
        index, now = run([supply(floor, taken=taken) for floor in floors], 0)
        for _ in range(3):
            now += INTERVAL_MS
            before, index = index.entries[0], step(index, [supply(floor, taken=taken) for floor in floors], now_ms=now)
            for was, unit in zip((before.prompt, before.output), (index.entries[0].prompt, index.entries[0].output), strict=True):
                at_bound = unit.price in (0, unit.cost, CAP * unit.anchor)
                assert at_bound or (unit.price - was.price) * sign > 0


@given(WORLDS)
def test_what_is_kept_is_what_was_there(worlds: list[tuple[list[Supply], int]]) -> None:
    index, now = PriceIndex(), T0
    for supplies, later in worlds:
        now += later
        index = step(index, supplies, now_ms=now)
    assert msgspec.json.decode(msgspec.json.encode(index), type=PriceIndex) == index

"""What a million tokens go for, per model and kind of hardware: up when the lenders' slots are busy, down when they idle.

The hub cannot see what lending costs, only what is asked. Lenders who follow ask the index itself, unless it is below their cost.
So an ask above the index tells a cost, and an ask that equals it tells nothing: after a while the index then tries a lower price.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from fallow.core.power import PRICE_MAX
from fallow.core.roster import Member, load_of
from fallow.model.ids import OrgId
from fallow.model.messages import INDEX_PRICES_MAX, IndexPrice
from fallow.model.needs import HardwareKind
from fallow.model.offer import Price
from fallow.model.owner import WORKING

INTERVAL_MS = 5 * 60_000
"""How often a price moves."""
PPM = 1_000_000
TARGET = 0.7
"""The share of busy slots at which a price stays: enough to earn by, with room for a rush."""
GAIN = 0.2
STEP_MAX = 0.05
"""The most that a price moves in an interval. Busy everywhere for 70 minutes doubles it."""
MARGIN_PERCENT = 125
"""A newcomer starts this much above half of the asks, which are costs as long as nobody follows."""
CAP = 20
"""How many times its start a price may reach, however busy the slots seem."""
SMOOTH_MS = 5 * 60_000
ORG_SHARE_MAX = 0.4
ORGS_CAPPED_FROM = 3
"""From so many organisations on, none of them is more than ORG_SHARE_MAX of the utilisation, however many slots it says it has."""
TRY_LOWER_MS = 60 * 60_000
"""How long the lowest cost that was seen is believed."""
FORGOTTEN_MS = 7 * 24 * 60 * 60_000
"""What nobody offers keeps its price for so long."""
SLOTS_MAX = 1_024
"""More slots of one offer than these don't count."""
NAME_BYTES_MAX = 200
"""Models with longer names have no price here: the index must fit into one message."""

Key = tuple[str, HardwareKind]


class Supply(msgspec.Struct, frozen=True, kw_only=True):
    """One offer, as the index looks at it. `taken` are the calls that run or wait there."""

    model: str
    hardware: HardwareKind
    org_id: OrgId
    price: Price
    slots: int
    taken: int


class Unit(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One unit's price, in micro-credits per million; all 0 until somebody asks something for it.

    `cost` is the lowest ask that was seen, `refused_at_ms` when last nobody went as low as the price.
    """

    price: int = 0
    anchor: int = 0
    cost: int = 0
    refused_at_ms: int = 0


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one model goes for on one kind of hardware. Times are UTC milliseconds."""

    model: str
    hardware: HardwareKind
    prompt: Unit
    cached_prompt: Unit
    output: Unit
    utilisation: float
    moved_at_ms: int
    seen_at_ms: int

    @property
    def key(self) -> Key:
        return self.model, self.hardware

    @property
    def price(self) -> Price:
        return Price(
            prompt_micro_per_munit=self.prompt.price,
            cached_prompt_micro_per_munit=self.cached_prompt.price,
            output_micro_per_munit=self.output.price,
        )


class PriceIndex(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """All prices, sorted by model and hardware."""

    entries: tuple[Entry, ...] = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """How a lender wants to ask; `fixed` matters only for who fixes a price."""

    way: Literal["follow", "floor", "fixed"] = "follow"
    fixed: Price = Price()


def step(index: PriceIndex, supplies: Iterable[Supply], *, now_ms: int) -> PriceIndex:
    """Look at what is offered now: newcomers get a price, and those whose interval is over move by a bounded step.

    May be called as often as one likes; only time and the supplies change anything, never their order.
    """
    groups: defaultdict[Key, list[Supply]] = defaultdict(list)
    for one in supplies:
        groups[one.model, one.hardware].append(one)
    entries = []
    for entry in index.entries:
        group = groups.get(entry.key)
        if group:
            entries.append(_advance(entry, group, now_ms))
        elif 0 <= now_ms - entry.seen_at_ms < FORGOTTEN_MS:
            entries.append(entry)
    known = {entry.key for entry in entries}
    entries += [_begin(key, group, now_ms) for key, group in groups.items() if key not in known]
    if len(entries) > INDEX_PRICES_MAX:
        entries = sorted(entries, key=lambda e: (-len({s.org_id for s in groups.get(e.key, ())}), e.key not in known, e.key))
    return PriceIndex(entries=tuple(sorted(entries[:INDEX_PRICES_MAX], key=lambda e: e.key)))


def follow(index: Price | None, floor: Price, choice: Choice) -> Price:
    """What a lender asks: per unit, never below the floor."""
    match choice.way:
        case "follow":
            return floor if index is None else _dearer(floor, index)
        case "fixed":
            return _dearer(floor, choice.fixed)
        case "floor":
            return floor


def supplies_of(members: Iterable[Member]) -> list[Supply]:
    """The offers that could take a call now; a machine whose owner needs it is no supply."""
    found = []
    for member in members:
        if member.card is None or member.state not in WORKING:
            continue
        for offer in member.offers:
            load = load_of(member, offer.model)
            if load is None or load.readiness == "failed" or not offer.slots or len(offer.model.encode()) > NAME_BYTES_MAX:
                continue
            slots = min(offer.slots, SLOTS_MAX)
            found.append(
                Supply(
                    model=offer.model,
                    hardware=member.card.hardware.kind,
                    org_id=member.card.org_id,
                    price=offer.price,
                    slots=slots,
                    taken=max(0, slots - load.slots_free) + load.waiting,
                )
            )
    return found


def shown(entry: Entry) -> IndexPrice:
    """The entry as everyone hears it."""
    return IndexPrice(model=entry.model, hardware=entry.hardware, price=entry.price, utilisation=entry.utilisation, at_ms=entry.seen_at_ms)


def thinned(rows: Sequence[IndexPrice], rows_max: int) -> tuple[IndexPrice, ...]:
    """So few of past prices that they are `rows_max` at most, over the same time: of each model and hardware every n-th.

    `rows` are oldest first, and the newest of each stays, unless there are more models than rows.
    """
    by_key: defaultdict[Key, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        by_key[row.model, row.hardware].append(place)
    nth = 1
    while sum(-(-len(places) // nth) for places in by_key.values()) > max(rows_max, len(by_key)):
        nth += 1
    chosen = sorted(place for places in by_key.values() for place in places[::-1][::nth])
    return tuple(rows[place] for place in chosen[-rows_max:])


def utilisation(supplies: Iterable[Supply]) -> float:
    """The share of slots that are taken, 0 to 1. Calls that wait fill their own organisation's slots and count no further."""
    slots: defaultdict[OrgId, int] = defaultdict(int)
    taken: defaultdict[OrgId, int] = defaultdict(int)
    for one in supplies:
        slots[one.org_id] += one.slots
        taken[one.org_id] += one.taken
    weights = _weights(slots)
    whole = sum(weights[org_id] for org_id in sorted(weights))
    return sum(weights[org_id] * min(1.0, taken[org_id] / slots[org_id]) for org_id in sorted(weights)) / whole if whole else 0.0


def _weights(slots: Mapping[OrgId, int]) -> dict[OrgId, float]:
    """Each organisation's slots, the largest cut so that none has more than ORG_SHARE_MAX of what is counted."""
    cut = _cut(sorted(slots.values(), reverse=True)) if len(slots) >= ORGS_CAPPED_FROM else float("inf")
    return {org_id: min(float(count), cut) for org_id, count in slots.items()}


def _cut(sizes: Sequence[int]) -> float:
    """With the k largest cut to c, and `rest` of the others, c = share * (k * c + rest); the least k that leaves nobody above it.

    Two are always enough, since a third of three or more is below the share of what is left.
    """
    for capped in range(len(sizes)):
        limit = ORG_SHARE_MAX * sum(sizes[capped:]) / (1 - capped * ORG_SHARE_MAX)
        if sizes[capped] <= limit:
            return limit
    raise AssertionError("the share is too small for so few organisations")


def _begin(key: Key, group: Sequence[Supply], now_ms: int) -> Entry:
    prompt, cached, output = (_see(Unit(), asks, now_ms) for asks in _asks(group))
    return Entry(
        model=key[0],
        hardware=key[1],
        prompt=prompt,
        cached_prompt=cached,
        output=output,
        utilisation=utilisation(group),
        moved_at_ms=now_ms,
        seen_at_ms=now_ms,
    )


def _advance(entry: Entry, group: Sequence[Supply], now_ms: int) -> Entry:
    """One look at an entry that is known."""
    passed = max(0, now_ms - entry.seen_at_ms)
    busy = entry.utilisation + (utilisation(group) - entry.utilisation) * passed / (passed + SMOOTH_MS)
    busy = min(1.0, max(0.0, busy))
    asked = _asks(group)
    units = [_see(unit, asks, now_ms) for unit, asks in zip((entry.prompt, entry.cached_prompt, entry.output), asked, strict=True)]
    is_due = not 0 <= now_ms - entry.moved_at_ms < INTERVAL_MS  # a clock that was set back must not stop the index
    if is_due:
        factor_ppm = round(PPM * (1 + min(STEP_MAX, max(-STEP_MAX, GAIN * (busy - TARGET)))))
        units = [_move(unit, asks, factor_ppm, now_ms) for unit, asks in zip(units, asked, strict=True)]
    prompt, cached, output = units
    return msgspec.structs.replace(
        entry,
        prompt=prompt,
        cached_prompt=cached,
        output=output,
        utilisation=busy,
        moved_at_ms=now_ms if is_due else entry.moved_at_ms,
        seen_at_ms=now_ms,
    )


def _asks(group: Sequence[Supply]) -> tuple[list[int], list[int], list[int]]:
    """What is asked per unit, lowest first. Who gives it away has no say in what it costs."""
    prices = [one.price for one in group]
    return (
        sorted(price.prompt_micro_per_munit for price in prices if price.prompt_micro_per_munit),
        sorted(price.cached_prompt_micro_per_munit for price in prices if price.cached_prompt_micro_per_munit),
        sorted(price.output_micro_per_munit for price in prices if price.output_micro_per_munit),
    )


def _see(unit: Unit, asks: list[int], now_ms: int) -> Unit:
    """Take in what is asked: the first asks make a price, lower ones show that it can be done for less."""
    if not asks:
        return unit
    if not unit.anchor:
        start = min(PRICE_MAX, -(-_median(asks) * MARGIN_PERCENT // 100))
        return Unit(price=start, anchor=start, cost=asks[0], refused_at_ms=now_ms)
    return msgspec.structs.replace(unit, cost=min(unit.cost, asks[0]))


def _move(unit: Unit, asks: list[int], factor_ppm: int, now_ms: int) -> Unit:
    """One step, rounded so that small prices move too; then not below the lowest cost, and not above the cap."""
    if not asks or not unit.anchor:
        return unit
    cost, anchor, refused_at_ms = unit.cost, unit.anchor, unit.refused_at_ms
    if asks[0] > unit.price:
        cost, refused_at_ms = asks[0], now_ms
    if _median(asks) > unit.price:  # half of the lenders have costs that a single cheap one doesn't stand for
        anchor = max(anchor, _median(asks))
    moved = unit.price * factor_ppm // PPM if factor_ppm < PPM else -(-unit.price * factor_ppm // PPM)
    may_try = not 0 <= now_ms - refused_at_ms < TRY_LOWER_MS
    price = max(min(moved, CAP * anchor), 1 if may_try else cost)
    return Unit(price=min(price, PRICE_MAX), anchor=anchor, cost=cost, refused_at_ms=refused_at_ms)


def _median(asks: list[int]) -> int:
    """Of the two in the middle the lower one."""
    return asks[(len(asks) - 1) // 2]


def _dearer(floor: Price, other: Price) -> Price:
    return Price(
        prompt_micro_per_munit=max(floor.prompt_micro_per_munit, other.prompt_micro_per_munit),
        cached_prompt_micro_per_munit=max(floor.cached_prompt_micro_per_munit, other.cached_prompt_micro_per_munit),
        output_micro_per_munit=max(floor.output_micro_per_munit, other.output_micro_per_munit),
    )

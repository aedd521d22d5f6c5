"""Which slot a request gets; and, with an engine that lets lost requests come late, that no key ever finds another's prompt."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.prefix import Blocks
from fallow.core.slots import DOUBT_MS, Asker, Ending, Seat, Slot, begin, choose, leave, take
from fallow.model.ids import KeyId, OrgId

PROMISE = settings(max_examples=500)
ME = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))
YOU = Asker(org_id=OrgId("home"), key_id=KeyId("key-2"))
NAMESAKE = Asker(org_id=OrgId("away"), key_id=KeyId("key-1"))
ASKERS = [ME, YOU, NAMESAKE]
NEW = Slot()


def mine(used_at_ms: int, *blocks: int) -> Slot:
    return Slot(asker=ME, blocks=blocks, used_at_ms=used_at_ms)


def yours(used_at_ms: int, *blocks: int) -> Slot:
    return Slot(asker=YOU, blocks=blocks, used_at_ms=used_at_ms)


def busy(slot: Slot) -> Slot:
    return replace(slot, is_busy=True)


def nobodys(used_at_ms: int) -> Slot:
    return Slot(used_at_ms=used_at_ms)


# slots, what the request begins with -> the slot that it gets, and whether its memory is reused
CHOICES: list[tuple[list[Slot], Blocks, tuple[int, bool] | None]] = [
    ([], (), None),
    ([busy(NEW)], (), None),
    ([busy(mine(1, 7))], (7,), None),
    ([NEW, NEW], (), (0, False)),
    ([NEW, mine(1, 7)], (7,), (1, True)),
    ([NEW, busy(mine(1, 7))], (7,), (0, False)),
    ([NEW, yours(1, 7)], (7,), (0, False)),
    ([yours(1, 7)], (7,), (0, False)),
    ([mine(9, 7), mine(8, 7, 8, 9), mine(7, 7, 8)], (7, 8, 9, 10), (1, True)),
    ([mine(9, 7, 8, 1, 2), mine(8, 7, 8)], (7, 8, 9), (1, True)),  # both fit alike: this one has less to lose
    ([mine(9, 7), mine(8, 7)], (7,), (1, True)),
    ([mine(8, 7), mine(8, 7)], (7,), (0, True)),
    ([mine(9, 5), NEW], (7,), (1, False)),  # another conversation of the same key: both may stay warm
    ([mine(9), NEW], (7,), (0, True)),  # nothing much is lost there, and something may fit
    ([mine(9), NEW], (), (0, True)),
    ([mine(9, 5), NEW], (), (1, False)),
    ([mine(9, 5), nobodys(3), nobodys(2)], (7,), (2, False)),
    ([mine(9, 5), nobodys(3), NEW], (7,), (2, False)),
    ([mine(9, 5), yours(1, 7)], (7,), (0, True)),  # one key's many calls cost itself its memory, not others
    ([mine(9, 5), mine(8, 6), yours(1, 7)], (7,), (1, True)),
    ([yours(3, 7), yours(2, 7), yours(2, 7)], (7,), (1, False)),
    ([Slot(asker=NAMESAKE, blocks=(7,), used_at_ms=1), NEW], (7,), (1, False)),
]


@pytest.mark.parametrize(("slots", "blocks", "there"), CHOICES)
def test_the_slot_of_a_request(slots: list[Slot], blocks: Blocks, there: tuple[int, bool] | None) -> None:
    seat = choose(slots, ME, blocks)
    assert (None if seat is None else (seat.slot, seat.may_reuse)) == there
    assert seat is None or (seat.others, seat.choices) == ((), 1)


@pytest.mark.parametrize(
    ("slots", "choices", "slot", "others"),
    [
        ([NEW, NEW, NEW], 2, 0, (1,)),
        ([NEW, NEW, NEW], 8, 0, (1, 2)),
        ([NEW, busy(NEW), mine(1, 7), NEW], 3, 2, (0, 3)),
        ([busy(NEW), mine(1, 7)], 3, 1, ()),
    ],
)
def test_more_choices_take_more_slots_as_far_as_they_are_free(slots: list[Slot], choices: int, slot: int, others: tuple[int, ...]) -> None:
    seat = choose(slots, ME, (7,), choices=choices)
    assert seat is not None
    assert (seat.slot, seat.others, seat.choices) == (slot, others, 1 + len(others))


def after(slots: tuple[Slot, ...], asker: Asker, blocks: Blocks, ending: Ending, *, now_ms: int, choices: int = 1) -> tuple[Slot, ...]:
    """The slots after one request."""
    seat = choose(slots, asker, blocks, choices=choices)
    assert seat is not None
    slots = take(slots, seat)
    if ending == "begun":
        slots = begin(slots, seat, asker, blocks, now_ms=now_ms)
    return leave(slots, seat, ending, now_ms=now_ms)


@pytest.mark.parametrize(
    ("before", "ending", "there"),
    [
        (NEW, "begun", Slot(asker=ME, blocks=(7,), used_at_ms=5)),
        (NEW, "refused", nobodys(5)),
        (NEW, "lost", Slot(used_at_ms=5, is_doubted=True)),
        (mine(1, 7, 8), "begun", Slot(asker=ME, blocks=(7,), used_at_ms=5)),
        (mine(1, 7, 8), "refused", Slot(asker=ME, blocks=(7, 8), used_at_ms=5)),
        (mine(1, 7, 8), "lost", Slot(asker=ME, blocks=(7, 8), used_at_ms=5, is_doubted=True)),  # whatever comes late is its own
        (yours(1, 7, 8), "begun", Slot(asker=ME, blocks=(7,), used_at_ms=5)),
        (yours(1, 7, 8), "refused", nobodys(5)),  # the engine may have kept it, or not
        (yours(1, 7, 8), "lost", Slot(used_at_ms=5, is_doubted=True)),
    ],
)
def test_what_a_slot_holds_after_a_request(before: Slot, ending: Ending, there: Slot) -> None:
    assert after((before,), ME, (7,), ending, now_ms=5) == (there,)


def test_further_choices_leave_empty_slots() -> None:
    slots = after((mine(1, 7), yours(2, 7), yours(3, 7), yours(4, 7)), ME, (7,), "begun", now_ms=5, choices=3)
    assert slots == (mine(5, 7), nobodys(5), nobodys(5), yours(4, 7))


def test_a_doubted_slot_is_trusted_again_in_time() -> None:
    slots = after((NEW,), YOU, (7,), "lost", now_ms=0)
    slots = after(slots, ME, (7,), "begun", now_ms=10 * DOUBT_MS)  # the engine may have stood still until now
    assert slots[0].asker is None
    slots = after(slots, ME, (7,), "begun", now_ms=11 * DOUBT_MS - 1)
    assert slots[0].asker is None
    slots = after(slots, ME, (7,), "begun", now_ms=11 * DOUBT_MS)
    assert slots[0].asker == ME
    seat = choose(slots, ME, (7,))
    assert seat is not None
    assert seat.may_reuse


def test_a_busy_slot_cannot_be_taken() -> None:
    with pytest.raises(AssertionError):
        take((busy(NEW),), Seat(slot=0, may_reuse=False))


some_slots = st.lists(
    st.builds(
        Slot,
        asker=st.none() | st.sampled_from(ASKERS),
        blocks=st.lists(st.integers(0, 2), max_size=3).map(tuple),
        used_at_ms=st.none() | st.integers(0, 3),
        is_busy=st.booleans(),
    ),
    max_size=5,
)
some_blocks = st.lists(st.integers(0, 2), max_size=4).map(tuple)


@PROMISE
@given(some_slots, st.sampled_from(ASKERS), some_blocks, st.integers(1, 6))
def test_what_holds_for_every_seat(slots: list[Slot], asker: Asker, blocks: Blocks, choices: int) -> None:
    seat = choose(slots, asker, blocks, choices=choices)
    assert seat == choose(list(slots), asker, blocks, choices=choices)
    free = [index for index, slot in enumerate(slots) if not slot.is_busy]
    if seat is None:
        assert not free
        return
    taken = [seat.slot, *seat.others]
    assert set(taken) <= set(free)
    assert len(set(taken)) == len(taken) == seat.choices == min(choices, len(free))
    assert seat.may_reuse == (slots[seat.slot].asker == asker)


class PlayedEngine:
    """What each slot really holds, if requests that were left before they began may still come as late as we say they can."""

    def __init__(self, count: int) -> None:
        self.held: list[set[Asker]] = [set() for _ in range(count)]
        self.late: list[list[tuple[Asker, bool]]] = [[] for _ in range(count)]
        self.ran_at_ms: list[int | None] = [None] * count

    def write(self, seat: Seat, asker: Asker, now_ms: int) -> None:
        """A request reaches its slot; the prompt of whoever was there is only gone if it is not to be reused."""
        if seat.may_reuse:
            assert self.held[seat.slot] <= {asker}, "somebody else's prompt"
            self.held[seat.slot].add(asker)
        else:
            self.held[seat.slot] = {asker}
        for other in seat.others:
            self.held[other] = set()
        if self.late[seat.slot] and self.ran_at_ms[seat.slot] is None:
            self.ran_at_ms[seat.slot] = now_ms

    def stray(self, slot: int, now_ms: int) -> None:
        """What was left behind comes now, unless the engine has run too long for that."""
        ran_at_ms = self.ran_at_ms[slot]
        if ran_at_ms is None or now_ms < ran_at_ms + DOUBT_MS:
            for asker, may_reuse in self.late[slot]:
                self.held[slot] = (self.held[slot] if may_reuse else set()) | {asker}
        self.late[slot] = []

    def lose(self, seat: Seat, asker: Asker) -> None:
        self.late[seat.slot].append((asker, seat.may_reuse))
        self.ran_at_ms[seat.slot] = None


class Played:
    """The books beside the engine."""

    def __init__(self, count: int) -> None:
        self.slots: tuple[Slot, ...] = (NEW,) * count
        self.engine = PlayedEngine(count)
        self.asked: list[tuple[Seat, Asker]] = []
        self.begun: list[tuple[Seat, Asker]] = []
        self.now_ms = 0

    def ask(self, asker: Asker, choices: int) -> bool:
        seat = choose(self.slots, asker, (), choices=choices)
        if seat is not None:
            self.slots = take(self.slots, seat)
            self.asked.append((seat, asker))
        return seat is not None

    def begin(self, number: int) -> None:
        seat, asker = self.asked.pop(number)
        self.engine.write(seat, asker, self.now_ms)
        self.slots = begin(self.slots, seat, asker, (), now_ms=self.now_ms)
        self.begun.append((seat, asker))

    def leave(self, number: int, ending: Ending) -> None:
        seat, asker = (self.begun if ending == "begun" else self.asked).pop(number)
        if ending == "lost":
            self.engine.lose(seat, asker)
        self.slots = leave(self.slots, seat, ending, now_ms=self.now_ms)

    def stray(self, slot: int) -> None:
        if not any(slot in (seat.slot, *seat.others) for seat, _ in self.begun):
            self.engine.stray(slot, self.now_ms)


events = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "lost", "stray", "ask", "begin", "leave", "refuse", "lose"]),
        st.integers(0, 3),
        st.sampled_from([ME, YOU]),
        st.sampled_from([0, 0, 1, DOUBT_MS - 1, DOUBT_MS]),
    ),
    min_size=4,
    max_size=40,
)


@PROMISE
@given(events, st.integers(1, 2))
@example([("lost", 0, YOU, 0), ("stray", 0, ME, 0), ("call", 0, YOU, 0), ("call", 0, ME, 0)], 1)
@example([("call", 0, ME, 0), ("lost", 0, YOU, 0), ("call", 0, ME, 0), ("stray", 0, ME, 1), ("call", 0, ME, 0)], 1)
@example([("lost", 0, YOU, 0), ("call", 0, ME, 9), ("stray", 0, ME, DOUBT_MS - 1), ("call", 0, ME, 0)], 1)
@example([("lost", 0, YOU, 0), ("call", 0, ME, 0), ("call", 0, ME, DOUBT_MS - 1), ("stray", 0, ME, 0), ("call", 0, ME, 0)], 1)
@example(
    [("lost", 0, YOU, 0), ("ask", 0, ME, DOUBT_MS), ("begin", 0, ME, 0), ("leave", 0, ME, 0), ("stray", 0, ME, 0), ("call", 0, ME, 0)], 1
)
@example([("call", 0, ME, 0), ("lost", 0, ME, 0), ("call", 0, YOU, 0), ("stray", 0, ME, 1), ("call", 0, YOU, 0)], 1)
def test_no_key_ever_finds_anothers_prompt(happenings: list[tuple[str, int, Asker, int]], count: int) -> None:
    played = Played(count)
    for what, number, asker, passed_ms in happenings:
        played.now_ms += passed_ms
        match what:
            case "call" if played.ask(asker, 1):
                played.begin(-1)
                played.leave(-1, "begun")
            case "lost" if played.ask(asker, 1 + number):
                played.leave(-1, "lost")
            case "ask":
                played.ask(asker, 1 + number)
            case "begin" if played.asked:
                played.begin(number % len(played.asked))
            case "leave" if played.begun:
                played.leave(number % len(played.begun), "begun")
            case "refuse" | "lose" if played.asked:
                played.leave(number % len(played.asked), "refused" if what == "refuse" else "lost")
            case "stray":
                played.stray(number % count)

"""Who starts next: the share of each key, the bound on the gap between two, and slots that are kept."""

import heapq

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fallow.core import fair as module
from fallow.core.allowance import KeyName
from fallow.core.fair import ACTIVE_S, COST_GUESS, W_IN, W_OUT, Fair, Room
from fallow.model.ids import CallId, KeyId, OrgId
from fallow.model.needs import ServiceTier

PROMISE = settings(max_examples=100)
A, B, C, D = ((OrgId("home"), KeyId(name)) for name in "abcd")


def wait(fair: Fair, name: str, key: KeyName, tier: ServiceTier = "default", *, prompt: float = 10, weight: float = 1.0) -> None:
    fair.wait(CallId(name), key, tier=tier, prompt=prompt, weight=weight)


def end(fair: Fair, key: KeyName, wrote: float | None = 10, *, lasted_s: float = 1.0, now_s: float = 0.0, prompt: float = 10) -> None:
    fair.ended(key, prompt=prompt, read=None if wrote is None else prompt, wrote=wrote, lasted_s=lasted_s, now_s=now_s)


WIDE = Room(100, 100)


def drained(fair: Fair, room: Room = WIDE, now_s: float = 0.0) -> list[str]:
    """All that start if nothing ends."""
    found: list[str] = []
    while (call_id := fair.next(room, now_s=now_s)) is not None:
        found.append(call_id)
    return found


# one key's calls
def test_a_keys_calls_go_by_tier_and_then_as_they_came() -> None:
    fair = Fair()
    for name, tier in (("f1", "flex"), ("d1", "default"), ("p1", "priority"), ("d2", "default"), ("p2", "priority"), ("f2", "flex")):
        wait(fair, name, A, tier)  # type: ignore[arg-type]
    assert [fair.position(CallId(name)) for name in ("p1", "p2", "d1", "d2", "f1", "f2")] == [1, 2, 3, 4, 5, 6]
    assert drained(fair) == ["p1", "p2", "d1", "d2", "f1", "f2"]
    assert len(fair) == 0


def test_between_keys_the_tier_does_not_count() -> None:
    fair = Fair()
    wait(fair, "a1", A, "flex")
    wait(fair, "b1", B, "priority")
    assert fair.next(Room(1, 1), now_s=0.0) == "a1", "it came first, and neither was given anything"


def test_who_leaves_frees_the_place() -> None:
    fair = Fair()
    for name in ("a1", "a2", "a3"):
        wait(fair, name, A)
    fair.leave(CallId("a1"), now_s=0.0)
    assert (len(fair), fair.position(CallId("a2"))) == (2, 1)
    assert drained(fair) == ["a2", "a3"]


def test_without_room_nobody_starts() -> None:
    fair = Fair()
    assert not fair.start(A, Room(2, 0), prompt=1, weight=1, now_s=0.0)
    wait(fair, "a1", A)
    assert fair.next(Room(2, 0), now_s=0.0) is None
    assert not fair.start(A, Room(2, 2), prompt=1, weight=1, now_s=0.0), "who comes later doesn't go first"
    assert fair.start(B, None, prompt=1, weight=1, now_s=0.0), "what must go on goes on"


# slots that are kept
def test_a_key_alone_may_use_everything() -> None:
    fair = Fair()
    assert all(fair.start(A, Room(4, free), prompt=1, weight=1, now_s=0.0) for free in (4, 3, 2, 1))


@pytest.mark.parametrize(
    ("slots", "idle", "taken"),
    [
        pytest.param(1, 3, 1, id="a single slot is kept for nobody"),
        pytest.param(2, 1, 1, id="one of two"),
        pytest.param(3, 3, 2, id="never more than half, and one at least"),
        pytest.param(8, 1, 7, id="one for one"),
        pytest.param(8, 3, 5, id="one for each"),
        pytest.param(8, 20, 4, id="half for very many"),
    ],
)
def test_slots_are_kept_for_who_was_there_lately(slots: int, idle: int, taken: int) -> None:
    fair = Fair()
    for n in range(idle):
        key = (OrgId("home"), KeyId(f"light-{n}"))
        assert fair.start(key, Room(slots, slots), prompt=1, weight=1, now_s=0.0)
        end(fair, key, now_s=10.0)
    for n in range(slots + 2):
        wait(fair, f"flood-{n}", A)
    free = slots
    while fair.next(Room(slots, free), now_s=10.0 + ACTIVE_S) is not None:
        free -= 1
    assert slots - free == taken
    light = (OrgId("home"), KeyId("light-0"))
    wait(fair, "light", light)
    assert fair.next(Room(slots, free), now_s=10.0 + ACTIVE_S) == ("light" if free else None), "and may be used by them at once"


def test_a_slot_is_kept_no_longer_than_needed() -> None:
    fair = Fair()
    fair.start(B, Room(2, 2), prompt=1, weight=1, now_s=0.0)
    end(fair, B, now_s=0.0)
    assert fair.others_active(A, now_s=ACTIVE_S)
    assert not fair.others_active(B, now_s=ACTIVE_S)
    assert fair.start(A, Room(2, 2), prompt=1, weight=1, now_s=0.0)
    assert not fair.start(A, Room(2, 1), prompt=1, weight=1, now_s=ACTIVE_S)
    assert fair.start(A, Room(2, 1), prompt=1, weight=1, now_s=ACTIVE_S + 0.1)
    assert not fair.others_active(A, now_s=ACTIVE_S + 0.1)


def test_a_light_key_beside_a_flood_never_waits_for_a_long_answer() -> None:
    """Two slots; the flood's answers are a hundred times as long. The light one asks, is answered, and asks again."""
    fair = Fair()
    fair.start(B, Room(2, 2), prompt=10, weight=1, now_s=0.0)
    end(fair, B, now_s=0.0)
    for n in range(5):
        wait(fair, f"flood-{n}", A)
    assert drained(fair, Room(2, 2), now_s=0.0)[:1] == ["flood-0"]
    for n in range(50):
        assert fair.next(Room(2, 1), now_s=float(n)) is None, "the slot is kept"
        wait(fair, f"light-{n}", B)
        assert fair.next(Room(2, 1), now_s=float(n)) == f"light-{n}"
        end(fair, B, 10, now_s=float(n))


@pytest.mark.parametrize(("waits", "first"), [(1, "b0"), (2, "a1")])
def test_who_asks_for_one_call_at_a_time_gets_its_slot_whatever_it_was_given(waits: int, first: str) -> None:
    fair = Fair()
    for n in range(9):
        wait(fair, f"a{n}", A)
    wait(fair, "paid", B)
    assert [fair.next(Room(2, 2), now_s=0.0), fair.next(Room(2, 1), now_s=0.0)] == ["a0", "paid"]
    for n in range(waits):
        wait(fair, f"b{n}", B)
    end(fair, B, 1)
    fair._shares[B].counter += 1_000
    assert fair.next(Room(2, 1), now_s=0.0) == first


# shares
def test_weights_are_shares() -> None:
    fair = Fair()
    for n in range(300):
        wait(fair, f"a{n}", A, weight=2.0)
        wait(fair, f"b{n}", B, weight=1.0)
    started = []
    for _ in range(150):
        call_id = fair.next(Room(1, 1), now_s=0.0)
        assert call_id is not None
        started.append(call_id[0])
        end(fair, A if call_id[0] == "a" else B, 100)
    assert started.count("a") == pytest.approx(100, abs=2)


def test_more_keys_get_no_less_for_a_flood_of_one() -> None:
    fair = Fair()
    for n in range(100):
        wait(fair, f"a{n}", A)
    for n in range(10):
        wait(fair, f"b{n}", B)
        wait(fair, f"c{n}", C)
    first = []
    for _ in range(30):
        call_id = fair.next(Room(1, 1), now_s=0.0)
        assert call_id is not None
        first.append(call_id[0])
        end(fair, {"a": A, "b": B, "c": C}[call_id[0]])
    assert {name: first.count(name) for name in "abc"} == {"a": 10, "b": 10, "c": 10}


def test_who_leaves_before_the_end_pays_for_the_time() -> None:
    fair = Fair()
    fair.start(A, Room(1, 1), prompt=10, weight=1, now_s=0.0)
    end(fair, A, 1_000, lasted_s=1.0)
    for name, key in (("b1", B), ("c1", C), ("b2", B), ("c2", C), ("b3", B), ("c3", C)):
        wait(fair, name, key)
    assert [fair.next(Room(2, 2), now_s=0.0), fair.next(Room(2, 1), now_s=0.0)] == ["b1", "c1"]
    end(fair, B, None, lasted_s=10.0)
    end(fair, C, 5, lasted_s=10.0)
    assert fair.next(Room(2, 2), now_s=0.0) == "c2"


def test_a_turn_that_was_not_used_costs_nothing() -> None:
    fair = Fair()
    fair.start(B, Room(1, 1), prompt=10, weight=1, now_s=0.0)
    wait(fair, "a1", A, prompt=1_000)
    assert drained(fair) == ["a1"]
    fair.ended(A, prompt=1_000, read=0, wrote=0, lasted_s=0.0, now_s=0.0)
    end(fair, B, 0)
    assert fair.mean_s == 1.0, "it says nothing of how long calls take"
    wait(fair, "b1", B)
    wait(fair, "a2", A)
    assert drained(fair) == ["b1", "a2"], "they stand alike, and who came first goes first"


# the paper's promises
@st.composite
def loads(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Slots, and for each of two keys the calls that it sends over and over: prompt, answer and duration."""
    call = st.tuples(st.integers(1, 500), st.integers(1, 300), st.integers(1, 50))
    return draw(st.integers(1, 6)), draw(st.lists(call, min_size=1, max_size=4)), draw(st.lists(call, min_size=1, max_size=4))


@PROMISE
@given(load=loads(), lately=st.booleans())
@example(load=(2, [(500, 1, 1)], [(1, 300, 50)]), lately=False)
@example(load=(2, [(500, 300, 1)], [(1, 1, 50)]), lately=True)
def test_between_two_keys_that_always_wait_the_gap_is_bounded(
    load: tuple[int, list[tuple[int, int, int]], list[tuple[int, int, int]]], lately: bool
) -> None:
    """Theorem 4.4: over any span of time, however their calls differ."""
    slots, *calls = load
    keys = (A, B)
    tokens_max = slots * max(prompt + answer for mine in calls for prompt, answer, _ in mine)
    prompt_max = max(prompt for mine in calls for prompt, _, _ in mine)
    bound = 2 * max(W_IN * prompt_max, W_OUT * tokens_max)
    fair = Fair()
    if lately:  # a third key for which a slot is kept
        fair.start(C, Room(slots, slots), prompt=1, weight=1, now_s=0.0)
        end(fair, C, 1, now_s=0.0)
    sent, service = [0, 0], [0.0, 0.0]
    named: dict[str, tuple[int, tuple[int, int, int]]] = {}
    ends: list[tuple[int, int, tuple[int, int, int]]] = []

    def send(who: int) -> None:
        call = calls[who][sent[who] % len(calls[who])]
        name = f"{who}-{sent[who]}"
        sent[who] += 1
        named[name] = (who, call)
        wait(fair, name, keys[who], prompt=call[0])

    for who in (0, 1, 0, 1, 0, 1):
        send(who)
    now, gaps = 0, [0.0]
    for _ in range(300):
        while (call_id := fair.next(Room(slots, slots - len(ends)), now_s=0.0)) is not None:
            who, call = named.pop(call_id)
            service[who] += W_IN * call[0]
            gaps.append(service[0] - service[1])
            heapq.heappush(ends, (now + call[2], who, call))
            send(who)
        now, who, call = heapq.heappop(ends)
        service[who] += W_OUT * call[1]
        gaps.append(service[0] - service[1])
        end(fair, keys[who], call[1], prompt=call[0], lasted_s=float(call[2]))
    assert max(gaps) - min(gaps) <= bound


@PROMISE
@given(rounds=st.integers(1, 30), answer=st.integers(1, 500))
def test_who_was_idle_has_saved_up_nothing(rounds: int, answer: int) -> None:
    """However long a key was away, it gets no more than its share from then on."""
    fair = Fair()
    for n in range(3 * rounds + 80):
        wait(fair, f"a{n}", A)
    for _ in range(rounds):
        assert fair.next(Room(1, 1), now_s=0.0) is not None
        end(fair, A, answer)
    for n in range(80):
        wait(fair, f"b{n}", B)
    started = []
    for _ in range(40):
        call_id = fair.next(Room(1, 1), now_s=0.0)
        assert call_id is not None
        started.append(call_id[0])
        end(fair, A if call_id[0] == "a" else B, answer)
        assert abs(started.count("a") - started.count("b")) <= 1


def test_the_same_where_the_queue_was_empty_in_between() -> None:
    """The paper's second case: the last that left the queue is what a newcomer is measured by."""
    fair = Fair()
    for _ in range(20):
        assert fair.start(A, Room(1, 1), prompt=10, weight=1, now_s=0.0)
        end(fair, A, 500)
    assert fair.start(B, Room(1, 1), prompt=10, weight=1, now_s=0.0)
    for n in range(10):
        wait(fair, f"b{n}", B)
        wait(fair, f"a{n}", A)
    end(fair, B, 10)
    started = []
    for _ in range(8):
        call_id = fair.next(Room(1, 1), now_s=0.0)
        assert call_id is not None
        started.append(call_id[0])
        end(fair, A if call_id[0] == "a" else B, 10)
    assert 3 <= started.count("a") <= 5


# what a call that waits can know
def test_positions_take_turns_between_keys() -> None:
    fair = Fair()
    for n in range(3):
        wait(fair, f"a{n}", A)
    for n in range(2):
        wait(fair, f"b{n}", B)
    assert [fair.position(CallId(name)) for name in ("a0", "b0", "a1", "b1", "a2")] == [1, 2, 3, 4, 5]
    for n in range(100):
        wait(fair, f"c{n}", C)
    assert fair.position(CallId("a2")) <= 8, "a flood behind doesn't push it back"


def test_an_estimate_is_what_calls_take_by_those_that_run() -> None:
    fair = Fair()
    assert fair.estimate_s(3) is None, "nothing was seen yet"
    for _ in range(4):
        fair.start(A, Room(4, 4), prompt=1, weight=1, now_s=0.0)
    assert fair.estimate_s(1) is None
    fair.start(A, None, prompt=1, weight=1, now_s=0.0)
    end(fair, A, 10, lasted_s=8.0)
    assert (fair.running, fair.estimate_s(1), fair.estimate_s(6)) == (4, 2.0, 12.0)


def test_positions_count_debts() -> None:
    fair = Fair()
    for key in (A, B):
        fair.start(key, Room(2, 2), prompt=1, weight=1, now_s=0.0)
    wait(fair, "a1", A)
    for n in range(30):
        wait(fair, f"b{n}", B)
    end(fair, A, 10 * COST_GUESS)
    assert fair.position(CallId("b0")) == 1
    assert fair.position(CallId("a1")) > 5


# memory
def test_only_so_many_idle_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_MAX", 4)
    fair = Fair()
    fair.start(A, Room(9, 9), prompt=1, weight=1, now_s=0.0)
    wait(fair, "b", B)
    for n in range(20):
        key = (OrgId("home"), KeyId(f"key-{n}"))
        fair.start(key, None, prompt=1, weight=1, now_s=0.0)
        end(fair, key)
    assert len(fair._shares) == 4
    assert {A, B} <= fair._shares.keys()
    end(fair, A)
    assert drained(fair) == ["b"]
    end(fair, B)
    with pytest.raises(AssertionError, match="ends once"):
        end(fair, B)

"""What keys with a budget spend: what fits, what is told when not, and how far several gateways can go beyond it at most."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core import budget as module
from fallow.core.budget import ACTIVE_MS, EMPTY, HELD_RETRY_MS, Purse, Purses, why_not
from fallow.core.cost import PICO_PER_MICRO
from fallow.model.call import Call
from fallow.model.errors import Failure
from fallow.model.ids import CallId, GatewayId, KeyId, OrgId
from fallow.model.messages import SPENT_KEYS_MAX, KeySpent
from fallow.model.needs import Needs

PROMISE = settings(max_examples=80)
KEY = KeyId("key-1")
NOW = 1_000


def call_of(id: str, *, budget_micro: int | None = 100, spent_micro: int = 0, key_id: KeyId = KEY) -> Call:
    return Call(
        id=CallId(id),
        org_id=OrgId("home"),
        key_id=key_id,
        gateway_id=GatewayId("gw"),
        path="/v1/chat/completions",
        stream=False,
        body_bytes=2,
        needs=Needs(model="tiny"),
        arrived_at_ms=0,
        budget_micro=budget_micro,
        spent_micro=spent_micro,
    )


def said(purses: Purses, *, now_ms: int = NOW) -> tuple[KeySpent, ...]:
    return tuple(one for keys in purses.to_say(now_ms=now_ms) for one in keys)


# one purse
@pytest.mark.parametrize(
    ("purse", "quote", "fits", "retry_ms", "words"),
    [
        pytest.param(EMPTY, 100, True, None, [], id="all of it"),
        pytest.param(EMPTY, 101, False, None, ["budget is 0.0001 credits", "0 are spent", "can cost 0.000101"], id="more than it"),
        pytest.param(Purse(own_pico=40 * PICO_PER_MICRO, elsewhere_micro=20, held_micro=10), 30, True, None, [], id="the rest"),
        pytest.param(
            Purse(own_pico=40 * PICO_PER_MICRO, elsewhere_micro=20, held_micro=10),
            31,
            False,
            HELD_RETRY_MS,
            ["0.00006 are spent", "0.00001 are set aside", "wait for those to end, or let it write less"],
            id="what is held may come back",
        ),
        pytest.param(
            Purse(own_pico=90 * PICO_PER_MICRO, held_micro=5), 11, False, None, ["0.000005 are set aside"], id="it wouldn't be enough"
        ),
        pytest.param(Purse(elsewhere_micro=130), 1, False, None, ["0.00013 are spent"], id="others went beyond it"),
        pytest.param(Purse(elsewhere_micro=100), 0, True, None, [], id="what costs nothing fits when all is spent"),
        pytest.param(Purse(own_pico=99 * PICO_PER_MICRO + 1), 1, False, None, [], id="a part of a micro-credit counts"),
    ],
)
def test_what_fits(purse: Purse, quote: int, fits: bool, retry_ms: int | None, words: list[str]) -> None:
    refusal = why_not(purse, quote, 100)
    assert (refusal is None) is fits
    if refusal is not None:
        assert (refusal.code, refusal.retry_after_ms) == ("budget_spent", retry_ms)
        assert all(word in refusal.message for word in [*words, "whoever keeps the hub", "`fallow keys limit --budget`"])


# the purses of a gateway
def test_a_call_holds_its_quote_until_it_is_over() -> None:
    purses = Purses()
    first, second = call_of("1"), call_of("2")
    assert purses.hold(first, 60, now_ms=NOW) is None
    refused = purses.hold(second, 60, now_ms=NOW)
    assert refused is not None
    assert refused.retry_after_ms == HELD_RETRY_MS
    purses.settle(first, 10 * PICO_PER_MICRO, now_ms=NOW)
    assert purses.of(KEY) == Purse(own_pico=10 * PICO_PER_MICRO)
    assert purses.hold(second, 60, now_ms=NOW) is None
    purses.settle(second, 0, now_ms=NOW)
    purses.settle(second, 60 * PICO_PER_MICRO, now_ms=NOW)
    assert purses.of(KEY).spent_micro == 10, "it is over once"


def test_a_call_that_is_tried_again_holds_the_highest_of_its_quotes() -> None:
    purses, call = Purses(), call_of("1")
    for quote, held in ((40, 40), (30, 40), (90, 90)):
        assert purses.hold(call, quote, now_ms=NOW) is None
        assert purses.of(KEY).held_micro == held
    assert purses.hold(call, 101, now_ms=NOW) is not None
    purses.settle(call, 90 * PICO_PER_MICRO, now_ms=NOW)
    assert purses.of(KEY).held_micro == 0


def test_a_gateway_that_just_began_knows_from_the_hub() -> None:
    purses = Purses()
    assert purses.hold(call_of("1", spent_micro=70), 31, now_ms=NOW) is not None
    assert purses.of(KEY) == EMPTY, "a refusal leaves nothing behind"
    assert purses.hold(call_of("2", spent_micro=70), 30, now_ms=NOW) is None
    purses.settle(call_of("2"), 30 * PICO_PER_MICRO, now_ms=NOW)
    assert said(purses) == (KeySpent(key_id=KEY, micro=30),)
    # the hub may have counted those 30, or not: what it says of all isn't added to them
    assert purses.hold(call_of("3", budget_micro=120, spent_micro=100), 20, now_ms=NOW) is None
    assert purses.of(KEY).elsewhere_micro == 70


def test_what_the_hub_says_never_goes_down() -> None:
    purses, call = Purses(), call_of("1")
    assert purses.hold(call, 10, now_ms=NOW) is None
    purses.settle(call, 10 * PICO_PER_MICRO, now_ms=NOW)
    for total, spent in ((10, 10), (60, 60), (25, 60), (0, 60), (61, 61)):
        purses.answered(said(purses), [KeySpent(key_id=KEY, micro=total), KeySpent(key_id=KeyId("unasked"), micro=9)])
        assert purses.of(KEY).spent_micro == spent
    assert purses.of(KeyId("unasked")) == EMPTY


def test_a_key_is_told_of_until_the_hub_knows_and_a_while_longer() -> None:
    purses, call = Purses(), call_of("1")
    assert said(purses) == ()
    assert purses.hold(call, 10, now_ms=NOW) is None
    assert said(purses, now_ms=NOW + 9 * ACTIVE_MS) == (KeySpent(key_id=KEY, micro=0),), "a call is under way"
    purses.settle(call, 10 * PICO_PER_MICRO, now_ms=NOW)
    mine = (KeySpent(key_id=KEY, micro=10),)
    assert said(purses, now_ms=NOW + 9 * ACTIVE_MS) == mine, "the hub doesn't answer"
    assert purses.unsaid() == 1
    purses.answered(mine, mine)
    assert purses.unsaid() == 0
    assert said(purses, now_ms=NOW + ACTIVE_MS) == mine, "others may spend meanwhile"
    assert said(purses, now_ms=NOW + ACTIVE_MS + 1) == ()
    again = call_of("2")
    assert purses.hold(again, 1, now_ms=NOW) is None
    purses.settle(again, 1, now_ms=NOW)
    assert said(purses) == (KeySpent(key_id=KEY, micro=11),), "all since the process began, rounded up once"


def test_what_is_said_comes_in_messages_that_fit() -> None:
    purses = Purses()
    for number in range(2 * SPENT_KEYS_MAX + 1):
        assert purses.hold(call_of(str(number), key_id=KeyId(f"key-{number}")), 1, now_ms=NOW) is None
    assert [len(keys) for keys in purses.to_say(now_ms=NOW)] == [SPENT_KEYS_MAX, SPENT_KEYS_MAX, 1]


def test_only_so_many_keys_are_followed_and_what_they_cost_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PURSES_MAX", 3)
    purses = Purses()
    calls = [call_of(str(n), key_id=KeyId(f"key-{n}"), spent_micro=n) for n in range(6)]
    for call, cost_pico in zip(calls[:3], (5 * PICO_PER_MICRO, 0, None), strict=True):
        assert purses.hold(call, 5, now_ms=NOW) is None
        if cost_pico is not None:
            purses.settle(call, cost_pico, now_ms=NOW)
    assert purses.hold(calls[3], 5, now_ms=NOW) is None, "instead of the one that cost nothing"
    refused = purses.hold(calls[4], 5, now_ms=NOW)
    assert refused is not None
    assert (refused.code, "of 3 keys" in refused.message) == ("too_many_calls", True)
    assert [purses.of(call.key_id).own_micro for call in calls] == [5, 0, 0, 0, 0, 0]
    assert [one.key_id for one in said(purses)] == ["key-0", "key-2", "key-3"]


# several gateways
class Hub:
    """What a hub keeps: the most that each gateway said of each key."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, KeyId], int] = {}

    def tell(self, gateway: str, keys: Iterable[KeySpent]) -> tuple[KeySpent, ...]:
        keys = tuple(keys)
        for one in keys:
            self.rows[gateway, one.key_id] = max(one.micro, self.rows.get((gateway, one.key_id), 0))
        return tuple(KeySpent(key_id=one.key_id, micro=self.total(one.key_id)) for one in keys)

    def total(self, key_id: KeyId) -> int:
        return sum(micro for (_, key), micro in self.rows.items() if key == key_id)


COSTS = st.tuples(st.integers(0, 40), st.floats(0, 1))
"""A call's quote, and which part of it the call comes to cost."""


def run_call(purses: Purses, id: str, quote: int, part: float, *, budget_micro: int, spent_micro: int) -> int | Failure:
    """What the call cost in millionths of a micro-credit, or why it was refused."""
    call = call_of(id, budget_micro=budget_micro, spent_micro=spent_micro)
    refusal = purses.hold(call, quote, now_ms=NOW)
    if refusal is not None:
        return refusal
    cost = int(part * quote * PICO_PER_MICRO)
    purses.settle(call, cost, now_ms=NOW)
    return cost


@PROMISE
@given(st.integers(1, 200), st.lists(st.tuples(st.booleans(), st.integers(0, 9), COSTS), max_size=60))
def test_one_gateway_never_goes_beyond_a_budget(budget: int, steps: list[tuple[bool, int, tuple[int, float]]]) -> None:
    """Calls begin, are tried again and end in any order."""
    purses, running, spent_pico = Purses(), dict[int, int](), 0
    for ends, number, (quote, part) in steps:
        call = call_of(str(number), budget_micro=budget)
        if ends:
            cost = int(part * running.pop(number, 0) * PICO_PER_MICRO)
            spent_pico += cost
            purses.settle(call, cost, now_ms=NOW)
        elif purses.hold(call, quote, now_ms=NOW) is None:
            running[number] = max(quote, running.get(number, 0))
        assert spent_pico + sum(running.values()) * PICO_PER_MICRO <= budget * PICO_PER_MICRO
        assert purses.of(KEY).held_micro == sum(running.values())
        assert purses.of(KEY).own_pico == spent_pico


@PROMISE
@given(
    st.integers(1, 200),
    st.lists(st.lists(st.tuples(st.integers(0, 2), COSTS), max_size=12), max_size=6),
    st.randoms(use_true_random=False),
)
def test_several_go_beyond_it_by_no_more_than_the_others_spend_between_two_reports(
    budget: int, rounds: list[list[tuple[int, tuple[int, float]]]], chance: random.Random
) -> None:
    hub, gateways = Hub(), [Purses() for _ in range(3)]
    spent = [0, 0, 0]
    for number, calls in enumerate(rounds):
        before = list(spent)
        total_before, granted = sum(before), hub.total(KEY)
        for at, (gateway, (quote, part)) in enumerate(calls):
            cost = run_call(gateways[gateway], f"{number}-{at}", quote, part, budget_micro=budget, spent_micro=granted)
            if isinstance(cost, int):
                spent[gateway] += cost
                others = sum(spent) - total_before - (spent[gateway] - before[gateway])
                assert quote == 0 or sum(spent) <= budget * PICO_PER_MICRO + others
        for gateway in chance.sample(range(3), 3) + chance.sample(range(3), 3):
            keys = said(gateways[gateway])
            gateways[gateway].answered(keys, hub.tell(str(gateway), keys))
        total = hub.total(KEY)
        assert sum(spent) <= total * PICO_PER_MICRO < sum(spent) + 3 * PICO_PER_MICRO
        for one in gateways:
            assert one.of(KEY).spent_micro in (0, total), "all that called here know"


@PROMISE
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=30))
def test_answers_that_get_lost_change_nothing_for_long(steps: list[tuple[int, int]]) -> None:
    """A gateway never counts itself twice, whatever of its reports the hub, or of the answers it, has heard."""
    hub, purses = Hub(), Purses()
    elsewhere = own = 0
    for number, (kind, micro) in enumerate(steps):
        if kind == 0:
            elsewhere += micro
            hub.tell("other", [KeySpent(key_id=KEY, micro=elsewhere)])
        elif kind == 1:
            own += micro
            assert run_call(purses, str(number), micro, 1.0, budget_micro=10**6, spent_micro=hub.total(KEY)) == micro * PICO_PER_MICRO
        else:
            keys = said(purses)
            answer = hub.tell("this", keys)
            if kind == 2:
                purses.answered(keys, answer)
        assert own <= purses.of(KEY).spent_micro <= own + elsewhere
    assert purses.hold(call_of("last", budget_micro=10**6), 0, now_ms=NOW) is None
    keys = said(purses)
    purses.answered(keys, hub.tell("this", keys))
    assert purses.of(KEY).spent_micro == own + elsewhere

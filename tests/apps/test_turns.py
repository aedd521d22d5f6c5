"""Turns at the gateway: who is sent at once, who waits and is told what, and who is refused; with a real market."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from fallow.apps.gateway import turns as module
from fallow.apps.gateway.turns import BLIP_S, FLEX_TURN_S_MAX, TURN_S_MAX, Left, Turns
from fallow.apps.node.served import load_of
from fallow.core.fair import ACTIVE_S
from fallow.core.match.decide import match
from fallow.core.match.market import Market
from fallow.core.match.survey import Moment
from fallow.model.call import Allowance, Call
from fallow.model.errors import Failure
from fallow.model.ids import CallId, GatewayId, KeyId, NodeId
from fallow.model.needs import Needs, ServiceTier
from fallow.model.owner import State
from fallow.model.quote import Place
from fallow.model.receipt import Usage
from fallow.model.views import Waiting
from fallow.wire.openai import CHAT

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import MODEL, ORG, WITHIN_S, FakeClock, card_of, offer_of, turns, until
else:
    from one_loop import MODEL, ORG, WITHIN_S, FakeClock, card_of, offer_of, turns, until

pytestmark = pytest.mark.anyio

Asked = asyncio.Task[Failure | None]
USED = Usage(prompt_tokens=10, output_tokens=20)


async def stays() -> None:
    """A caller who doesn't leave."""
    await asyncio.Event().wait()


class Bench:
    """Turns over a market that a test fills, and calls on their way through both."""

    def __init__(self, *slots: int, waiting_max: int = 4) -> None:
        self.market = Market()
        self.clock = FakeClock()
        for n, count in enumerate(slots):
            self.lend(f"node-{n}", count, waiting_max=waiting_max)
        self.turns = Turns(self.market, self.clock)
        self.tasks: dict[str, asyncio.Task[Failure | None]] = {}
        self.gone: dict[str, asyncio.Event] = {}
        self.calls: dict[str, Call] = {}
        self.told: list[str] = []

    def lend(self, node: str, slots: int, *, waiting_max: int = 4, model: str = MODEL, family: str = "", state: State = "run") -> None:
        offer = replace(offer_of(node, model=model, slots=slots), family=family)
        load = load_of(model, slots, waiting_max, 0)
        self.market.put(card_of(node), offer, load, state, expires_s=1e12, now_s=self.clock.now_ms() / 1000)

    def call(self, name: str, key: str, *, tier: ServiceTier = "default", deadline_s: float | None = None, **allowed: int) -> Call:
        wall_ms = self.clock.wall_ms()
        needs = Needs(
            model=MODEL,
            prompt_tokens=10,
            service_tier=tier,
            deadline_at_ms=None if deadline_s is None else wall_ms + round(1000 * deadline_s),
        )
        return Call(
            id=CallId(name),
            org_id=ORG,
            key_id=KeyId(key),
            gateway_id=GatewayId("gw-1"),
            path=CHAT,
            stream=True,
            body_bytes=10,
            needs=needs,
            arrived_at_ms=wall_ms,
            allowance=Allowance(**allowed),
        )

    async def ask(
        self, name: str, key: str = "a", *, at_once: bool = False, model: str = MODEL, **more: Any
    ) -> "asyncio.Task[Failure | None]":
        """The call asks for a turn; the market hears of it when it got one."""
        call = self.call(name, key, **more)
        call = self.calls[name] = replace(call, needs=replace(call.needs, model=model))
        gone = self.gone[name] = asyncio.Event()

        async def leaves() -> None:
            await gone.wait()

        async def goes() -> Failure | None:
            refusal = await self.turns.take(call, leaves, self.told.append, at_once=at_once)
            if refusal is None:
                self.book(call)
            return refusal

        task = self.tasks[name] = asyncio.ensure_future(goes())
        await turns(5)
        return task

    def book(self, call: Call) -> None:
        now = Moment(self.clock.wall_ms(), self.clock.now_ms() / 1000)
        place = match(call, self.market, now=now)
        if isinstance(place, Place):
            self.market.began(call.id, call, place.quote, now_s=now.at_s)

    async def end(self, name: str, *, after_s: float = 0.0, usage: Usage | None = USED) -> None:
        """The call's attempt ends."""
        self.clock.advance(round(1000 * after_s))
        call = self.calls[name]
        self.market.ended(call.id, call, usage, now_s=self.clock.now_ms() / 1000)
        self.turns.give_back(call, usage)
        await turns(5)

    async def pass_s(self, seconds: float) -> None:
        """Time goes by, and the gateway's sweep comes."""
        self.clock.advance(round(1000 * seconds))
        self.turns.changed()
        await turns(5)

    @property
    def sent(self) -> list[str]:
        """The calls that got their turn and hold it, as they came."""
        return [name for name in self.tasks if CallId(name) in self.turns._given]

    def waiting(self, name: str) -> Waiting:
        found = self.turns.waiting(name)
        assert found is not None
        return found

    async def refusal(self, name: str) -> Failure:
        async with asyncio.timeout(WITHIN_S):
            failure = await self.tasks[name]
        assert failure is not None
        return failure

    async def over(self) -> None:
        """All that still wait leave, and nothing is left behind."""
        for gone in self.gone.values():
            gone.set()
        await asyncio.wait(self.tasks.values(), timeout=WITHIN_S)
        for name in self.sent:
            await self.end(name)
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert (len(self.turns), self.turns._given, self.turns._waits) == (0, {}, {})
        assert all(not lane.places and not lane.fair.running and not len(lane.fair) for lane in self.turns._lanes.values())


# who is sent at once
@pytest.mark.parametrize(
    ("slots", "waiting_max", "sent"),
    [
        pytest.param((2,), 4, 2, id="two slots and no more"),
        pytest.param((1,), 4, 2, id="one slot, and one that is there when it is free"),
        pytest.param((1,), 0, 1, id="where nothing may wait at the node"),
        pytest.param((2, 3), 4, 5, id="two nodes"),
        pytest.param((1, 1), 4, 4, id="two of one slot"),
    ],
)
async def test_as_many_are_sent_as_there_are_slots(slots: tuple[int, ...], waiting_max: int, sent: int) -> None:
    bench = Bench(*slots, waiting_max=waiting_max)
    for n in range(8):
        await bench.ask(f"c{n}")
    assert bench.sent == [f"c{n}" for n in range(sent)]
    assert len(bench.turns) == 8 - sent
    assert len(bench.told) == 8 - sent
    for n in range(8):
        await bench.end(f"c{n}")
        assert bench.sent == [f"c{m}" for m in range(n + 1, min(8, n + 1 + sent))]
    await bench.over()


async def test_the_counts_hold_when_the_market_is_looked_at_anew() -> None:
    bench = Bench(2, 2)
    for n in range(6):
        await bench.ask(f"c{n}")
        bench.turns.changed()
        await turns(5)
    assert len(bench.sent) == 4
    await bench.end("c0")
    bench.turns.changed()
    bench.turns.changed()
    await turns(5)
    assert len(bench.sent) == 4
    await bench.over()


async def test_a_turn_that_no_node_knows_of_yet_is_counted() -> None:
    bench = Bench(2)
    for name in ("c0", "c1"):
        bench.calls[name] = bench.call(name, "a")
        assert await bench.turns.take(bench.calls[name], stays) is None
    bench.turns.changed()
    await bench.ask("c2")
    assert bench.sent == []
    for name in ("c0", "c1"):
        bench.turns.give_back(bench.calls[name], None)
    await turns(5)
    assert bench.sent == ["c2"]
    await bench.over()


async def test_what_others_run_is_not_free() -> None:
    bench = Bench(3)
    bench.market.heard(NodeId("node-0"), MODEL, running=2, now_s=0.0)
    for n in range(3):
        await bench.ask(f"c{n}")
    assert bench.sent == ["c0"]
    bench.market.heard(NodeId("node-0"), MODEL, running=2, now_s=1.0)  # ours, and one of another gateway
    await bench.pass_s(0.1)
    assert bench.sent == ["c0", "c1"]
    await bench.over()


async def test_what_nobody_offers_does_not_wait() -> None:
    bench = Bench()
    assert await (await bench.ask("c0", model="giant")) is None
    bench.turns.give_back(bench.calls["c0"], None)
    assert bench.turns._lanes == {}
    await bench.over()


async def test_new_slots_are_used_and_lost_ones_are_not() -> None:
    bench = Bench(2)
    for n in range(6):
        await bench.ask(f"c{n}")
    bench.lend("node-9", 2)
    await bench.pass_s(0.1)
    assert len(bench.sent) == 4
    bench.market.drop(NodeId("node-9"))
    await bench.pass_s(0.1)
    await bench.end("c3")
    await bench.pass_s(0.1)
    assert len(bench.turns) == 2, "two of its calls are still on their way back"
    await bench.over()


async def test_a_machine_that_its_owner_needs_has_no_slots() -> None:
    bench = Bench(2)
    bench.lend("node-9", 4, state="pause")
    for n in range(4):
        await bench.ask(f"c{n}")
    assert len(bench.sent) == 2
    bench.lend("node-9", 4)
    await bench.pass_s(0.1)
    assert len(bench.sent) == 4
    await bench.over()


async def test_a_blip_sends_nobody_away() -> None:
    bench = Bench(2)
    for n in range(4):
        await bench.ask(f"c{n}")
    bench.market.drop(NodeId("node-0"))
    await bench.pass_s(0.1)
    assert len(bench.turns) == 2
    bench.lend("node-0", 4)
    await bench.pass_s(BLIP_S)
    assert len(bench.turns) == 0
    await bench.over()


async def test_where_nothing_is_offered_any_more_matching_says_so() -> None:
    bench = Bench(2)
    for n in range(4):
        await bench.ask(f"c{n}")
    bench.market.drop(NodeId("node-0"))
    await bench.pass_s(0.1)
    await bench.pass_s(BLIP_S)
    assert len(bench.sent) == 4
    await bench.over()


async def test_a_family_waits_for_all_its_models() -> None:
    bench = Bench()
    for n, model in enumerate(("one-q4", "one-q8")):
        bench.lend(f"node-{n}", 2, model=model, family="one")
    for n in range(5):
        await bench.ask(f"c{n}", model="one")
    assert len(bench.sent) == 4
    await bench.over()


# sharing
async def test_a_flood_leaves_a_slot_to_who_was_there_lately() -> None:
    bench = Bench(2)
    await bench.ask("light-0", "light")
    await bench.end("light-0")
    for n in range(10):
        await bench.ask(f"flood-{n}", "flood")
    assert bench.sent == ["flood-0"]
    assert bench.waiting("flood-1").why == "the free slots are kept for other keys that called lately"
    for n in range(1, 10):
        await bench.ask(f"light-{n}", "light")
        assert f"light-{n}" in bench.sent, "it doesn't wait for a long answer"
        await bench.end(f"light-{n}", after_s=1.0)
    await bench.pass_s(ACTIVE_S + 1)
    assert bench.sent == ["flood-0", "flood-1"]
    assert bench.waiting("flood-2").why == "all 2 slots for this model are taken"
    await bench.over()


async def test_who_came_late_is_next_where_a_flood_waits() -> None:
    bench = Bench(2)
    for n in range(10):
        await bench.ask(f"flood-{n}", "flood")
    await bench.ask("other-0", "other")
    assert (bench.waiting("other-0").position, bench.waiting("flood-2").position) == (2, 1)
    await bench.end("flood-0")
    assert bench.sent == ["flood-1", "other-0"], "it runs nothing"
    await bench.over()


async def test_what_broke_off_goes_on_at_once() -> None:
    bench = Bench(2)
    for n in range(3):
        await bench.ask(f"c{n}")
    await bench.ask("again", at_once=True)
    assert bench.sent == ["c0", "c1", "again"]
    await bench.over()


async def test_a_call_may_hold_two_turns() -> None:
    bench = Bench(3)
    await bench.ask("c0")
    assert await bench.turns.take(bench.calls["c0"], stays) is None
    await bench.ask("c1")
    await bench.ask("c2")
    assert bench.sent == ["c0", "c1"]
    bench.turns.give_back(bench.calls["c0"], Usage())
    await turns(5)
    assert bench.sent == ["c0", "c1", "c2"]
    await bench.over()


# who leaves
async def test_who_leaves_frees_the_place() -> None:
    bench = Bench(2)
    for n in range(4):
        await bench.ask(f"c{n}")
    bench.gone["c2"].set()
    with pytest.raises(Left):
        await bench.tasks["c2"]
    assert bench.turns.waiting("c2") is None
    assert bench.waiting("c3").position == 1
    await bench.end("c0")
    assert bench.sent == ["c1", "c3"]
    await bench.over()


@pytest.mark.parametrize(
    "leave", [lambda bench: bench.gone["c2"].set(), lambda bench: bench.tasks["c2"].cancel()], ids=["left", "torn down"]
)
async def test_who_leaves_in_the_moment_of_the_turn_passes_it_on(leave: Callable[[Bench], None]) -> None:
    bench = Bench(2)
    for n in range(4):
        await bench.ask(f"c{n}")
    leave(bench)
    call = bench.calls["c0"]
    bench.market.ended(call.id, call, USED, now_s=0.0)
    bench.turns.give_back(call, USED)
    await until(lambda: bench.tasks["c2"].done())
    await turns(5)
    assert bench.tasks["c2"].cancelled() or isinstance(bench.tasks["c2"].exception(), Left)
    assert bench.sent == ["c1", "c3"]
    await bench.over()


async def test_a_gateway_that_stops_says_so() -> None:
    bench = Bench(2)
    for n in range(4):
        await bench.ask(f"c{n}")
    bench.turns.stop()
    for name in ("c2", "c3"):
        assert (await bench.refusal(name)).code == "gateway_stopping"
    await bench.over()


# limits
async def test_a_key_has_only_so_many_places() -> None:
    bench = Bench(2)
    for n in range(5):
        await bench.ask(f"c{n}", waiting_max=2)
    refusal = await bench.refusal("c4")
    assert (refusal.code, refusal.retry_after_ms) == ("rate_limit_exceeded", None)
    assert "2 calls of your key wait" in refusal.message
    await bench.end("c0", after_s=8.0)
    for n in range(5, 8):
        await bench.ask(f"c{n}", waiting_max=2)
    assert (await bench.refusal("c7")).retry_after_ms == 4_000, "8 s each, two at a time"
    await bench.ask("d0", "other", waiting_max=2)
    assert bench.waiting("d0").position == 2, "another key has places of its own"
    await bench.over()


async def test_a_gateway_has_only_so_many_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURNS_MAX", 2)
    bench = Bench(2)
    for n in range(5):
        await bench.ask(f"c{n}", f"key-{n}")
    assert (await bench.refusal("c4")).code == "too_many_calls"
    assert len(bench.turns) == 2
    await bench.over()


@pytest.mark.parametrize(
    ("tier", "deadline_s", "refused"),
    [
        ("default", None, True),
        ("priority", None, False),
        ("flex", None, False),
        ("flex", 70.0, True),
        ("default", 5.0, True),
    ],
)
async def test_who_would_wait_too_long_is_told_at_once(tier: ServiceTier, deadline_s: float | None, refused: bool) -> None:
    bench = Bench(2)
    for n in range(8):
        await bench.ask(f"c{n}")
    await bench.end("c0", after_s=30.0)  # 5 wait, 15 s each
    await bench.ask("last", "a", tier=tier, deadline_s=deadline_s)
    if not refused:
        position = 1 if tier == "priority" else 6
        why = "all 2 slots for this model are taken"
        assert bench.waiting("last") == Waiting(position=position, estimate_s=15.0 * position, why=why)
    else:
        refusal = await bench.refusal("last")
        estimate_s, limit_s = 90, deadline_s or TURN_S_MAX
        assert (refusal.code, refusal.retry_after_ms) == ("no_capacity", round(1000 * (estimate_s - limit_s)))
        assert f"about {estimate_s} s; the limit is {limit_s:.0f} s" in refusal.message
    assert TURN_S_MAX < FLEX_TURN_S_MAX
    await bench.over()


async def test_who_waited_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(2)
    for n in range(2):
        await bench.ask(f"c{n}")
    await bench.ask("late", deadline_s=0.01)
    refusal = await bench.refusal("late")
    assert (refusal.code, refusal.retry_after_ms) == ("no_capacity", None)
    assert "1 calls wait" in refusal.message
    await bench.over()


async def test_a_call_in_a_hurry_waits_no_longer_than_half_the_time_to_its_first_token() -> None:
    bench = Bench(2)
    for n in range(3):
        await bench.ask(f"c{n}")
    await bench.end("c0", after_s=30.0)
    call = bench.call("strict", "a")
    for strict, within_ms, limit in ((True, 28_000, "14"), (True, 30_000, ""), (False, 8_000, "4"), (False, 28_000, "")):
        needs = replace(call.needs, strict=strict, first_token_within_ms=within_ms)
        gone = asyncio.Event()
        gone.set()

        async def leaves(gone: asyncio.Event = gone) -> None:
            await gone.wait()

        if limit:
            failure = await bench.turns.take(replace(call, needs=needs), leaves)
            assert failure is not None
            assert f"the limit is {limit} s" in failure.message
        else:
            with pytest.raises(Left):
                await bench.turns.take(replace(call, needs=needs), leaves)
    await bench.over()


# what is told
async def test_what_a_waiting_call_can_know() -> None:
    bench = Bench(2)
    for n in range(5):
        await bench.ask(f"c{n}")
    assert bench.waiting("c2") == Waiting(position=1, estimate_s=None, why="all 2 slots for this model are taken")
    assert bench.told == ["all 2 slots for this model are taken"] * 3
    await bench.end("c0", after_s=4.0)
    assert [bench.waiting(name).position for name in ("c3", "c4")] == [1, 2]
    assert [bench.waiting(name).estimate_s for name in ("c3", "c4")] == [2.0, 4.0]
    assert (bench.turns.waiting("c0"), bench.turns.waiting("c1"), bench.turns.waiting("nobody")) == (None, None, None)
    await bench.over()


async def test_a_lane_that_nobody_uses_is_forgotten() -> None:
    bench = Bench(2)
    await bench.ask("c0")
    await bench.pass_s(ACTIVE_S + 1)
    assert list(bench.turns._lanes) == [MODEL], "a call runs"
    await bench.end("c0")
    await bench.pass_s(ACTIVE_S + 1)
    assert bench.turns._lanes == {}
    await bench.over()

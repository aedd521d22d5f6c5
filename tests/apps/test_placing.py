"""Demand travels from gateways to the hub, and the hub's plan to the nodes."""

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.gateway.attempts import Outcome
from fallow.apps.gateway.demand import MODELS_PER_MESSAGE, DemandCount
from fallow.apps.hub.listening import HubRoster
from fallow.apps.hub.placing import REPEAT_MS, REPORTS_MAX, Placing
from fallow.apps.node.served import load_of
from fallow.core.demand import IDLE_AFTER_MS
from fallow.model import messages as m
from fallow.model.call import Call
from fallow.model.errors import Failure
from fallow.model.ids import CallId, GatewayId, KeyId, OrgId
from fallow.model.needs import Needs
from fallow.model.owner import State
from fallow.model.receipt import Usage
from fallow.wire import codec, subjects

if TYPE_CHECKING:
    from tests.apps.one_loop import MODEL, FakeClock, FakeServed, Network, Overheard, beat_of, believed, card_of, offer_of, turns
else:
    from one_loop import MODEL, FakeClock, FakeServed, Network, Overheard, beat_of, believed, card_of, offer_of, turns

pytestmark = pytest.mark.anyio
GATEWAY = GatewayId("gw-1")
SPAN_MS = 15_000


def hold_of(data: bytes) -> m.Hold:
    """What the hub told a node."""
    hold = codec.from_hub.read(data)
    assert isinstance(hold, m.Hold)
    return hold


class Hub:
    """A hub's roster and placement, and a hand that plays nodes and gateways."""

    def __init__(self) -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        bus = MemoryBus(self.broker)
        self.roster = HubRoster(bus, self.clock, verify=believed)
        self.placing = Placing(bus, self.roster, self.clock)
        self.hand = MemoryBus(self.broker)
        self.sequence = 0
        self.beats: dict[str, m.Heartbeat] = {}

    async def beat(self, name: str, models: str = "a", *, ready: str = "", state: State = "run", families: tuple[str, ...] = ()) -> None:
        """From now on the node is so; a model is a letter."""
        names = families or tuple(models)
        offers = tuple(msgspec.structs.replace(offer_of(name, model=one), family="f" if families else "") for one in names)
        loads = tuple(msgspec.structs.replace(load_of(one, 2, 2, 0), readiness="ready" if one in ready else "cold") for one in names)
        card = msgspec.structs.replace(card_of(name), org_id=OrgId(name))
        self.beats[name] = msgspec.structs.replace(beat_of(name, offers=offers, state=state), loads=loads, card=card)
        await self.all_beat()

    async def all_beat(self) -> None:
        for name, beat in self.beats.items():
            self.sequence += 1
            await self.hand.publish(f"hb.{name}", codec.encode(msgspec.structs.replace(beat, sequence=self.sequence)))
        await turns()

    async def demand(self, *models: str, calls: int = 1, missed: int = 0) -> None:
        self.sequence += 1
        counts = tuple(m.ModelDemand(model=model, calls=calls, missed=missed, output_tokens=calls) for model in models)
        report = m.Demand(gateway_id=GATEWAY, sequence=self.sequence, span_ms=SPAN_MS, models=counts)
        await self.hand.publish(subjects.DEMAND.pattern, codec.encode(report))
        await turns()

    async def place(self, after_ms: int = SPAN_MS) -> dict[str, tuple[str, ...]]:
        """The next plan, and what was said because of it."""
        self.clock.advance(after_ms)
        if self.broker.up:
            await self.all_beat()
        self.broker.sent.clear()
        await self.placing.place()
        return {to.split(".")[1]: hold_of(data).models for to, data in self.broker.sent if to.endswith(".hub")}


@pytest.fixture
async def hub() -> Hub:
    hub = Hub()
    await hub.roster.start()
    await hub.placing.start()
    return hub


async def test_a_node_is_told_what_callers_want(hub: Hub) -> None:
    await hub.beat("n1", "ab")
    await hub.demand("a")
    await hub.demand("b", calls=5)
    assert await hub.place() == {"n1": ("b",)}
    await hub.beat("n1", "ab", ready="b")
    assert await hub.place() == {"n1": ("b", "a")}


async def test_without_demand_nobody_is_told_anything(hub: Hub) -> None:
    await hub.beat("n1")
    assert await hub.place() == {}


async def test_a_plan_is_told_once_and_repeated_now_and_then(hub: Hub) -> None:
    await hub.beat("n1")
    await hub.demand("a")
    told = []
    for _ in range(2 * REPEAT_MS // SPAN_MS + 1):
        told.append(await hub.place())
        await hub.beat("n1", ready="a")
    assert [bool(one) for one in told] == [i % (REPEAT_MS // SPAN_MS) == 0 for i in range(len(told))]
    assert all(one == {"n1": ("a",)} for one in told if one)


async def test_later_plans_have_higher_numbers(hub: Hub) -> None:
    await hub.beat("n1", "ab")
    await hub.demand("a")
    await hub.place()
    first = hold_of(hub.broker.sent_to("n.n1.hub")[0])
    await hub.demand("b")
    await hub.beat("n1", "ab", ready="a")
    await hub.place()
    assert hold_of(hub.broker.sent_to("n.n1.hub")[0]).sequence > first.sequence


async def test_when_nobody_asks_any_more_the_node_may_drop_it(hub: Hub) -> None:
    await hub.beat("n1")
    await hub.demand("a")
    await hub.place()
    await hub.beat("n1", ready="a")
    assert await hub.place(after_ms=IDLE_AFTER_MS) == {"n1": ()}


async def test_another_node_stands_in_while_an_owner_is_back(hub: Hub) -> None:
    await hub.beat("n1")
    await hub.beat("n2")
    await hub.demand("a")
    assert await hub.place() == {"n1": ("a",)}
    await hub.beat("n1", state="pause")
    assert await hub.place() == {"n2": ("a",)}


async def test_what_nobody_offers_is_not_planned_and_a_family_is_what_most_offer(hub: Hub) -> None:
    for name, model in (("n1", "f-q4"), ("n2", "f-q8"), ("n3", "f-q8")):
        await hub.beat(name, families=(model,))
    await hub.demand("f", "stranger")
    assert await hub.place() == {"n2": ("f-q8",)}


async def test_what_is_not_a_report_is_dropped_and_so_are_too_many(hub: Hub) -> None:
    await hub.beat("n1", "ab")
    await hub.hand.publish(subjects.DEMAND.pattern, b"\x02nonsense")
    for _ in range(REPORTS_MAX):
        await hub.demand("a")
    await hub.demand("b", calls=1000)
    assert await hub.place() == {"n1": ("a",)}


async def test_a_broker_that_is_away_is_told_later(hub: Hub) -> None:
    await hub.beat("n1")
    await hub.demand("a")
    hub.broker.up = False
    assert await hub.place(after_ms=1_000) == {}
    hub.broker.up = True
    assert await hub.place() == {"n1": ("a",)}


# the gateway's side
class Counted:
    """A gateway's count, and the hub's ear."""

    def __init__(self) -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        self.count = DemandCount(GATEWAY, MemoryBus(self.broker), self.clock)

    def call(self, model: str = "a", *, stream: bool = True, needs: Needs | None = None) -> Call:
        return Call(
            id=CallId("call_1"),
            org_id=OrgId("home"),
            key_id=KeyId("key-1"),
            gateway_id=GATEWAY,
            path="/v1/chat/completions",
            stream=stream,
            body_bytes=2,
            needs=needs or Needs(model=model),
            arrived_at_ms=self.clock.wall_ms(),
        )

    async def reports(self) -> list[m.Demand]:
        self.broker.sent.clear()
        await self.count.report()
        return [codec.demand.read(data) for data in self.broker.sent_to(subjects.DEMAND.pattern)]


FULL = Outcome(failure=Failure(code="no_capacity", message="all are busy"))
WRONG = Outcome(failure=Failure(code="invalid_request", message="what?"))


async def test_what_is_counted() -> None:
    here = Counted()
    call = here.call()
    for _ in range(5):
        here.count.asked(call)
    here.clock.advance(10_000)
    here.count.ended(call, Outcome(usage=Usage(prompt_tokens=7, output_tokens=3)), None)
    here.count.ended(call, FULL, None)
    here.count.ended(call, WRONG, None)
    here.count.ended(call, Outcome(left=True), None)
    [report] = await here.reports()
    assert (report.gateway_id, report.span_ms) == (GATEWAY, 10_000)
    assert report.models == (m.ModelDemand(model="a", calls=5, missed=1, prompt_tokens=7, output_tokens=3),)


async def test_a_late_answer_is_missed() -> None:
    here = Counted()
    call = here.call(needs=Needs(model="a", deadline_at_ms=here.clock.wall_ms() + 100))
    here.clock.advance(100)
    here.count.ended(call, Outcome(), None)
    here.clock.advance(1)
    here.count.ended(call, Outcome(), None)
    here.count.ended(call, Outcome(left=True), None)
    [report] = await here.reports()
    assert report.models[0].missed == 1


async def test_nothing_is_said_if_nothing_was_asked_and_each_report_is_about_its_own_time() -> None:
    here = Counted()
    here.clock.advance(10_000)
    assert await here.reports() == []
    here.count.asked(here.call())
    here.clock.advance(4_000)
    [first] = await here.reports()
    here.count.asked(here.call())
    here.clock.advance(6_000)
    [second] = await here.reports()
    assert (first.span_ms, second.span_ms) == (4_000, 6_000)
    assert second.sequence > first.sequence
    assert await here.reports() == []


async def test_the_longest_names_fit_and_too_many_are_left_out() -> None:
    here = Counted()
    names = [f"{i:04}".ljust(200, "x") for i in range(m.DEMAND_MODELS_MAX + 3)]
    for name in (*names, "", "x" * 201, "ä" * 101, "two\nlines", "\ud800"):
        here.count.asked(here.call(name))
    assert here.count.dropped == 3 + 5
    reports = await here.reports()
    assert [len(report.models) for report in reports] == [MODELS_PER_MESSAGE, m.DEMAND_MODELS_MAX - MODELS_PER_MESSAGE]
    assert [one.model for report in reports for one in report.models] == names[: m.DEMAND_MODELS_MAX]


async def test_what_could_not_be_said_is_said_later() -> None:
    here = Counted()
    here.count.asked(here.call())
    here.clock.advance(5_000)
    here.broker.up = False
    assert await here.reports() == []
    here.count.asked(here.call())
    here.clock.advance(5_000)
    here.broker.up = True
    [report] = await here.reports()
    assert (report.span_ms, report.models[0].calls) == (10_000, 2)


# all of it
async def test_a_call_is_heard_of_at_the_hub() -> None:
    async with Network() as network:
        roster = HubRoster(network.hub_bus, network.clock, verify=believed)
        placing = Placing(network.hub_bus, roster, network.clock)
        await roster.start()
        await placing.start()
        await network.add("n1", FakeServed())
        await network.works()
        network.clock.advance(SPAN_MS)
        await network.gateway.demand.report()
        await asyncio.sleep(0)
        played = await network.play("n2")
        await played.beat()
        await turns()
        await placing.place()
        held = [hold_of(data).models for data in network.broker.sent_to("n.")[-1:]]
        assert held == [(MODEL,)]

"""A node follows the hub's plan as far as its owner and its memory allow."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.apps.node.holding import HOLD_LIFE_MS, Holding
from fallow.apps.node.room import Room
from fallow.core.residency import FRESH_MS, IDLE_LEAVES_MS, Resident
from fallow.model import messages as m
from fallow.model.ids import NodeId
from fallow.wire import codec

if TYPE_CHECKING:
    from tests.apps.one_loop import FakeClock, turns
else:
    from one_loop import FakeClock, turns

NODE = NodeId("n1")
pytestmark = pytest.mark.anyio


class Tenant:
    """A model whose engine starts and ends at once, or when it is told to if it is `slow`."""

    def __init__(self, model: str, needs_bytes: int, clock: FakeClock) -> None:
        self.model = model
        self.needs_bytes = needs_bytes
        self.clock = clock
        self.is_present = False
        self.is_leaving = False
        self.is_slow = False
        self.calls = 0
        self.used_at_ms = 0
        self.loads = 0

    def resident(self) -> Resident:
        return Resident(
            model=self.model,
            needs_bytes=self.needs_bytes,
            is_present=self.is_present,
            is_leaving=self.is_leaving,
            calls=self.calls,
            used_at_ms=self.used_at_ms,
        )

    def want(self) -> None:
        assert not self.is_leaving
        self.loads += not self.is_present
        self.is_present = True

    def leave(self) -> None:
        assert not self.calls, "nothing leaves in the middle of a call"
        self.is_leaving = self.is_slow
        self.is_present = self.is_slow

    def called(self) -> None:
        self.is_present = True
        self.used_at_ms = self.clock.now_ms()


class Site:
    """A node with room for ten: small `a`, `b`, `c` of four each, and `big` that needs all of it. `a` is the first."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.hub = MemoryBus(self.broker)
        self.clock = FakeClock()
        self.clock.advance(10 * IDLE_LEAVES_MS)
        self.room = Room(10)
        self.tenants = {name: Tenant(name, 10 if name == "big" else 4, self.clock) for name in ("a", "b", "c", "big")}
        for tenant in self.tenants.values():
            self.room.add(tenant)
        self.offered = set(self.tenants)
        self.may_follow = True
        self.holding = Holding(
            NODE,
            self.room,
            MemoryBus(self.broker),
            self.clock,
            offered=lambda: self.offered,
            may_follow=lambda: self.may_follow,
            first="a",
        )
        self.sequence = 0

    async def hold(self, *models: str, sequence: int | None = None) -> None:
        """What the hub says; and the node's next look."""
        self.sequence += 1
        await self.say(codec.encode(m.Hold(sequence=self.sequence if sequence is None else sequence, models=models)))

    async def say(self, data: bytes) -> None:
        await self.hub.publish("n.n1.hub", data)
        await turns()
        self.holding.look()

    @property
    def here(self) -> str:
        return " ".join(name for name, tenant in self.tenants.items() if tenant.is_present)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    running = asyncio.ensure_future(site.holding.run())
    await turns()
    yield site
    running.cancel()
    await asyncio.wait([running])


async def test_what_is_planned_is_loaded(site: Site) -> None:
    await site.hold("b", "c")
    assert site.here == "b c"


async def test_a_plan_beyond_the_room_is_followed_from_its_start(site: Site) -> None:
    await site.hold("c", "b", "a")
    assert site.here == "b c"
    site.holding.look()
    assert site.here == "b c", "what is planned doesn't leave for what is planned too"


async def test_what_is_not_offered_is_not_loaded(site: Site) -> None:
    site.offered = {"a", "b"}
    await site.hold("c", "stranger", "b")
    assert site.here == "b"


async def test_while_the_owner_does_not_let_it_nothing_comes_or_goes(site: Site) -> None:
    site.may_follow = False
    site.tenants["c"].called()
    await site.hold("b")
    site.clock.advance(2 * IDLE_LEAVES_MS)
    site.holding.look()
    assert site.here == "c"
    site.may_follow = True
    await site.hold("b")
    assert site.here == "b"


async def test_idle_models_leave_for_a_planned_one(site: Site) -> None:
    site.tenants["a"].called()
    site.tenants["c"].called()
    site.clock.advance(FRESH_MS)
    site.tenants["c"].called()
    await site.hold("b")
    assert site.here == "c", "a makes room"
    site.holding.look()
    assert site.here == "b c"


async def test_one_that_makes_room_has_its_turn_before_the_next(site: Site) -> None:
    site.tenants["c"].called()
    site.tenants["c"].is_slow = True
    site.clock.advance(FRESH_MS)
    await site.hold("big", "b")
    site.holding.look()
    assert site.here == "c", "b would fit beside it, but is wanted less"
    site.tenants["c"].is_present = site.tenants["c"].is_leaving = False
    site.holding.look()
    assert site.here == "big"


async def test_what_is_called_or_was_a_moment_ago_stays(site: Site) -> None:
    site.tenants["a"].called()
    site.tenants["a"].calls = 1
    site.tenants["c"].called()
    site.clock.advance(FRESH_MS - 1)
    await site.hold("big")
    assert site.here == "a c"
    site.clock.advance(1)
    site.holding.look()
    assert site.here == "a c", "both would have to go, and one is in a call"
    site.tenants["a"].calls = 0
    site.holding.look()
    site.holding.look()
    assert site.here == "big"


@pytest.mark.parametrize(("sequence", "here"), [(6, "c"), (5, "c"), (4, "b")])
async def test_the_newest_plan_counts(site: Site, sequence: int, here: str) -> None:
    await site.hold("b", sequence=5)
    site.tenants["b"].is_present = False
    await site.hold("c", sequence=sequence)
    assert site.here == here


async def test_a_new_hub_is_heard_once_the_old_one_is_silent(site: Site) -> None:
    await site.hold("b", sequence=5)
    site.clock.advance(HOLD_LIFE_MS)
    await site.hold("c", sequence=1)
    assert "c" in site.here.split()


async def test_a_plan_that_is_not_repeated_ends_and_its_models_leave_in_time(site: Site) -> None:
    await site.hold("b")
    site.clock.advance(HOLD_LIFE_MS)
    site.tenants["b"].is_present = False
    site.holding.look()
    assert site.here == "", "nothing is loaded for it any more"
    site.tenants["b"].is_present = True
    site.clock.advance(IDLE_LEAVES_MS - 1)
    site.holding.look()
    assert site.here == "b", "it has been there for the hub until a moment ago"
    site.clock.advance(1)
    site.holding.look()
    assert site.here == ""


async def test_idle_models_leave_unless_they_are_planned_or_the_first(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.tenants[name].called()
    await site.hold("b")
    site.clock.advance(IDLE_LEAVES_MS - 1)
    await site.hold("b")
    assert site.here == "a b c"
    site.clock.advance(1)
    await site.hold("b")
    assert site.here == "a b"


async def test_a_call_may_have_the_room_of_what_is_planned_but_takes_others_first(site: Site) -> None:
    await site.hold("b")
    site.tenants["a"].called()
    await site.room.admit("c")
    assert site.here == "b c"
    site.tenants["c"].calls = 1
    await site.room.admit("a")
    assert site.here == "a c"


async def test_what_is_not_a_plan_is_dropped(site: Site) -> None:
    await site.hold("b")
    await site.say(b"\x02nonsense")
    await site.say(b"")
    assert site.here == "b"
    assert site.tenants["b"].loads == 1

"""What a node's offers ask: the index as the hub tells it, once per interval, never below the floor, and the owner's choice at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fallow.adapters.jail import NO_JAIL
from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.apps.lend_settings import Lend
from fallow.apps.node.asking import Asking, choice_of
from fallow.apps.node.attached import AttachedServed
from fallow.apps.node.engine_served import EngineServed
from fallow.apps.node.owner_side import OwnerSide
from fallow.apps.settings import Settings
from fallow.core.price_index import INTERVAL_MS, Choice
from fallow.model import messages as m
from fallow.model.ids import NodeId
from fallow.model.needs import HardwareKind
from fallow.model.offer import Price
from fallow.wire import codec, subjects

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import FakeClock, turns
else:
    from one_loop import FakeClock, turns

pytestmark = pytest.mark.anyio

FLOOR = Price(prompt_micro_per_munit=10, output_micro_per_munit=100)


def price(output: int) -> Price:
    return Price(prompt_micro_per_munit=output // 10, output_micro_per_munit=output)


class Network:
    """A node's asking, and a hand that plays the hub. `asks` is what its one offer asked, each time that changed."""

    def __init__(self, choice: Choice | None = None) -> None:
        broker = MemoryBroker()
        self.hub = MemoryBus(broker)
        self.node = MemoryBus(broker)
        self.clock = FakeClock()
        self.asking = Asking(choice or Choice(), self.clock, self.reprice)
        self.asks = [FLOOR]
        self.sequence = 0

    def reprice(self) -> bool:
        ask = self.asking.ask("tiny", FLOOR)
        if ask == self.asks[-1]:
            return False
        self.asks.append(ask)
        return True

    async def tell(self, output: int, *, model: str = "tiny", hardware: HardwareKind = "cpu") -> None:
        self.sequence += 1
        one = m.IndexPrice(model=model, hardware=hardware, price=price(output), utilisation=0.5, at_ms=1)
        await self.hub.publish(subjects.INDEX.pattern, codec.encode(m.Index(sequence=self.sequence, prices=(one,))))
        await turns()


async def started(choice: Choice | None = None) -> Network:
    network = Network(choice)
    await network.asking.start(network.node, "cpu")
    return network


async def test_a_follower_asks_the_index_and_never_less_than_the_floor() -> None:
    network = await started()
    assert network.asking.ask("tiny", FLOOR) == FLOOR
    for output in (300, 200, 50, 400):
        await network.tell(output)
        network.clock.advance(INTERVAL_MS)
    assert network.asks == [FLOOR, price(300), price(200), FLOOR, price(400)]


async def test_a_follower_changes_once_in_an_interval() -> None:
    network = await started()
    await network.tell(300)
    for _ in range(9):
        network.clock.advance(INTERVAL_MS // 10)
        await network.tell(200)
    assert network.asks == [FLOOR, price(300)]
    network.clock.advance(INTERVAL_MS // 10)
    await network.tell(200)
    assert network.asks == [FLOOR, price(300), price(200)]


async def test_an_index_that_changes_nothing_does_not_hold_up_the_next() -> None:
    network = await started()
    await network.tell(300, model="other")
    await network.tell(300, hardware="gpu")
    assert network.asks == [FLOOR]
    await network.tell(300)
    assert network.asks == [FLOOR, price(300)]


@pytest.mark.parametrize("nonsense", [b"", b"\x02nonsense", b"\x03\x90"])
async def test_what_can_not_be_read_changes_nothing(nonsense: bytes) -> None:
    network = await started()
    await network.tell(300)
    network.clock.advance(INTERVAL_MS)
    await network.hub.publish(subjects.INDEX.pattern, nonsense)
    await turns()
    assert network.asks == [FLOOR, price(300)]


@pytest.mark.parametrize(
    ("choice", "asked"),
    [(Choice(way="floor"), FLOOR), (Choice(way="fixed", fixed=price(250)), price(250)), (Choice(way="fixed", fixed=price(40)), FLOOR)],
)
async def test_who_does_not_follow_is_not_moved(choice: Choice, asked: Price) -> None:
    network = await started(choice)
    await network.tell(9_999)
    assert network.asking.ask("tiny", FLOOR) == asked


def test_the_settings_say_how_to_ask(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, lend=Lend(price="fixed", usd_per_million_prompt=0.02, usd_per_million_output=0.3))
    fixed = Price(prompt_micro_per_munit=20_000, cached_prompt_micro_per_munit=20_000, output_micro_per_munit=300_000)
    assert choice_of(settings) == Choice(way="fixed", fixed=fixed)
    assert choice_of(Settings(data=tmp_path)).way == "follow"


# the owner's side
class Engine(EngineServed):
    """An engine of our own, as far as its price matters."""

    def __init__(self, name: str) -> None:
        self.model = name
        self.price = Price()

    def ask(self, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError


class Told:
    """A node that counts how often everyone is told anew."""

    def __init__(self) -> None:
        self.count = 0
        self.pulse = self

    def introduce(self) -> None:
        self.count += 1

    def refuse(self, refusals: object) -> None:
        self.count += 1


async def test_an_owner_s_offers_follow_and_an_attached_server_keeps_its_lender_s_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data=tmp_path)
    clock = FakeClock()
    owner = OwnerSide(
        settings, node_id=NodeId("node-a"), default="dedicated", roots=[], is_attached=False, reload=lambda: settings, clock=clock
    )
    ours = Engine("tiny")
    theirs = AttachedServed(model="theirs", server=None, slots=1, context_tokens=1, price=price(7))  # type: ignore[arg-type]
    owner.lend([ours, theirs], NO_JAIL, {})
    floor = ours.price
    assert floor.output_micro_per_munit > 0
    told = Told()
    monkeypatch.setattr(owner, "_node", told)

    broker = MemoryBroker()
    hub = MemoryBus(broker)
    await owner.asking.start(MemoryBus(broker), "cpu")
    high = price(floor.output_micro_per_munit * 10)
    index = tuple(m.IndexPrice(model=name, hardware="cpu", price=high, utilisation=1.0, at_ms=1) for name in ("tiny", "theirs"))
    for sequence in (1, 2):
        await hub.publish(subjects.INDEX.pattern, codec.encode(m.Index(sequence=sequence, prices=index)))
        await turns()
        clock.advance(INTERVAL_MS)
    assert (ours.price.output_micro_per_munit, theirs.price, told.count) == (high.output_micro_per_munit, price(7), 1)

    owner.gatekeeper.power_costs(0.30 * 20)  # dearer than the index
    assert ours.price.output_micro_per_munit > high.output_micro_per_munit
    owner.gatekeeper.power_costs(0.30)
    assert ours.price.output_micro_per_munit == high.output_micro_per_munit
    monkeypatch.setattr(owner.gatekeeper, "look", lambda: None)  # it would look at the engine, which is none
    owner._take(msgspec.structs.replace(settings, lend=Lend(price="floor")))
    assert ours.price == floor

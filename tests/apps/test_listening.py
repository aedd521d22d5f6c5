"""What the hub believes of the network: the nodes that beat, and nothing of what is nonsense."""

from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.hub import listening
from fallow.apps.hub.listening import HubRoster
from fallow.core.roster import GONE_AFTER_MS
from fallow.model import messages as m
from fallow.wire import codec

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import FakeClock, Overheard, beat_of, turns
else:
    from one_loop import FakeClock, Overheard, beat_of, turns

pytestmark = pytest.mark.anyio


class Here:
    """A hub's roster on a bus in memory, and a hand that plays the nodes."""

    def __init__(self) -> None:
        self.broker = Overheard()
        self.hand = MemoryBus(self.broker)
        self.clock = FakeClock()
        self.roster = HubRoster(MemoryBus(self.broker), self.clock)

    async def hear(self, beat: m.Heartbeat, subject: str = "") -> None:
        await self.hand.publish(subject or f"hb.{beat.node_id}", codec.encode(beat))
        await turns()

    def known(self) -> set[str]:
        return set(self.roster.members())


@pytest.fixture
async def here() -> Here:
    found = Here()
    await found.roster.start()
    return found


async def test_nodes_that_beat_are_known_with_what_they_offer(here: Here) -> None:
    await here.hear(beat_of("node-a"))
    await here.hear(beat_of("node-b"))
    members = here.roster.members()
    assert set(members) == {"node-a", "node-b"}
    assert members[beat_of("node-a").node_id].offers == beat_of("node-a").offers


async def test_who_leaves_or_falls_silent_is_gone(here: Here) -> None:
    await here.hear(beat_of("node-a"))
    await here.hear(beat_of("node-b"))
    await here.hear(beat_of("node-a", 2, state="leave"))
    assert here.known() == {"node-b"}
    here.clock.advance(GONE_AFTER_MS + 1)
    assert here.known() == set()
    await here.roster.refresh()
    await here.hear(beat_of("node-b", 3))
    assert here.known() == {"node-b"}


async def test_a_stranger_is_asked_once_for_card_and_offers(here: Here) -> None:
    await here.hear(msgspec.structs.replace(beat_of("node-a"), card=None, offers=None))
    await here.hear(beat_of("node-b"))
    await here.roster.refresh()
    await here.roster.refresh()
    asked = here.broker.sent_to("n.")
    assert [codec.from_hub.read(data) for data in asked] == [m.Introduce(gateway_id=listening.INTRODUCED_AS)]
    assert here.broker.sent_to("n.node-a.hub") == asked


async def test_what_can_not_be_read_or_names_another_node_is_dropped(here: Here) -> None:
    await here.hear(beat_of("node-b"), "hb.node-a")
    await here.hear(msgspec.structs.replace(beat_of("node-c"), card=beat_of("node-d").card))
    await here.hand.publish("hb.node-a", b"\x01nonsense")
    await here.hand.publish("hb.node-a", b"")
    await turns()
    assert here.known() == set()


async def test_no_more_nodes_than_can_be_followed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "NODES_MAX", 2)
    for name in ("node-a", "node-b", "node-c"):
        await here.hear(beat_of(name))
    await here.hear(beat_of("node-b", 2, state="throttle"))
    assert here.known() == {"node-a", "node-b"}
    assert here.roster.members()[beat_of("node-b").node_id].state == "throttle"

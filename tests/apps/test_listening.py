"""What the hub believes of the network: the nodes that beat, and nothing of what is nonsense."""

from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.nkey import make_key
from fallow.apps.card_check import Verify
from fallow.apps.hub import listening
from fallow.apps.hub.listening import HubRoster
from fallow.core.cards import CARD_LIFE_MS
from fallow.core.roster import GONE_AFTER_MS
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.ids import NodeId, OrgId
from fallow.wire import codec
from fallow.wire.sign import card_verifies, signed_card

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import ORG, FakeClock, Overheard, beat_of, believed, card_of, turns
else:
    from one_loop import ORG, FakeClock, Overheard, beat_of, believed, card_of, turns

pytestmark = pytest.mark.anyio


class Here:
    """A hub's roster on a bus in memory, and a hand that plays the nodes."""

    def __init__(self) -> None:
        self.broker = Overheard()
        self.hand = MemoryBus(self.broker)
        self.clock = FakeClock()
        self.told: list[Card] = []
        self.counted: Counter[str] = Counter()
        self.orgs: dict[NodeId, OrgId] = {}
        self.verify: Verify = believed
        self.roster = HubRoster(
            MemoryBus(self.broker),
            self.clock,
            verify=lambda card: self.verify(card),
            org_of=lambda card: self.orgs.get(card.node_id),
            on_card=self.told.append,
            count=lambda what, reason: self.counted.update([f"{what} {reason}"]),
        )

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
    await here.hand.publish("hb.node-a", b"\x02nonsense")
    await here.hand.publish("hb.node-a", b"")
    await turns()
    assert here.known() == set()
    assert here.counted == {"heartbeat malformed": 4}


async def test_no_more_nodes_than_can_be_followed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "NODES_MAX", 2)
    for name in ("node-a", "node-b", "node-c"):
        await here.hear(beat_of(name))
    await here.hear(beat_of("node-b", 2, state="throttle"))
    assert here.known() == {"node-a", "node-b"}
    assert here.counted == {"heartbeat no_room": 1}
    assert here.roster.members()[beat_of("node-b").node_id].state == "throttle"


async def test_each_new_card_is_told_once(here: Here) -> None:
    first, second = beat_of("node-a"), beat_of("node-a", 2)
    await here.hear(first)
    await here.hear(second)
    await here.hear(msgspec.structs.replace(beat_of("node-a", 3), card=None, offers=None))
    renewed = card_of("node-a", sequence=2)
    await here.hear(msgspec.structs.replace(beat_of("node-a", 4), card=renewed, card_sequence=2))
    await here.hear(msgspec.structs.replace(beat_of("node-a", 3), card=card_of("node-a", sequence=9), card_sequence=9))  # too late
    assert here.told == [first.card, renewed]


async def test_a_card_that_is_not_the_nodes_own_is_not_believed(here: Here) -> None:
    key = make_key("user")
    here.verify = card_verifies
    card = card_of(key.public)
    await here.hear(msgspec.structs.replace(beat_of(key.public), card=card))
    await here.hear(msgspec.structs.replace(beat_of(key.public, 2), card=signed_card(card, make_key("user").sign)))
    assert (here.told, here.roster.members()[card.node_id].card) == ([], None)
    assert here.roster.cards_refused == {"signature": 2}
    await here.roster.refresh()
    assert here.broker.sent_to("n.") == [], "who sent it was no help"
    good = signed_card(card, key.sign)
    await here.hear(msgspec.structs.replace(beat_of(key.public, 3), card=good))
    assert (here.told, here.roster.members()[card.node_id].card) == ([good], good)
    await here.hear(msgspec.structs.replace(beat_of(key.public, 2), card=card))
    assert here.roster.cards_refused == {"signature": 2}, "a heartbeat that comes late isn't looked at"
    assert here.counted == {"card signature": 2}


async def test_a_card_of_another_organisation_than_the_node_was_let_in_for_is_refused(here: Here) -> None:
    here.orgs[NodeId("node-a")] = OrgId("other")
    await here.hear(beat_of("node-a"))
    assert (here.told, here.roster.cards_refused) == ([], {"organisation": 1})
    here.orgs[NodeId("node-a")] = ORG
    await here.hear(beat_of("node-a", 2))
    assert here.told == [beat_of("node-a").card]


async def test_an_older_card_does_not_come_back(here: Here) -> None:
    newer = card_of("node-a", sequence=2)
    await here.hear(msgspec.structs.replace(beat_of("node-a"), card=newer, card_sequence=2))
    await here.hear(beat_of("node-a", 2))
    assert here.roster.members()[newer.node_id].card == newer
    assert (here.told, here.roster.cards_refused) == ([newer], {"replayed": 1})


async def test_a_card_that_expires_is_asked_for(here: Here) -> None:
    await here.hear(beat_of("node-a"))
    here.clock.advance(CARD_LIFE_MS)
    await here.hear(msgspec.structs.replace(beat_of("node-a", 2), card=None, offers=None))
    assert here.roster.members()[beat_of("node-a").node_id].card is None
    await here.roster.refresh()
    assert len(here.broker.sent_to("n.node-a.hub")) == 1

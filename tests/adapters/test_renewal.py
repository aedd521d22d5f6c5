"""A new credential while messages flow: none is lost, doubled or out of order, and nobody is told of a loss."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trusted import Site, until

from fallow.adapters import nats_handover
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.nats_handover import Handover, Listening
from fallow.adapters.nkey import Credentials, make_key
from fallow.model.errors import BrokerLost
from fallow.ports import Delivery

pytestmark = pytest.mark.anyio

MESSAGES = 5_000
PROMISE = settings(max_examples=100)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def site(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    site = await Site.start(tmp_path_factory.mktemp("site"))
    yield site
    await site.broker.stop()


class Bus(NatsBus):
    """With its key at hand, and its losses counted."""

    key = make_key("user")
    losses = 0

    def lost(self) -> None:
        self.losses += 1


async def joined(site: Site, role: str) -> Bus:
    login = site.operator.hub_user() if role == "hub" else site.member("node" if role == "node" else "gateway")
    bus = Bus(site.broker.address, login, role)
    bus.key = login.key
    bus.on_lost(bus.lost)
    await bus.connect()
    return bus


def again(site: Site, bus: Bus) -> Credentials:
    return site.member("node", bus.key)


async def send(bus: NatsBus, subject: str, mark: bytes, number: int = MESSAGES // 2) -> None:
    for count in range(number):
        await bus.publish(subject, mark + count.to_bytes(4, "big"))
        if count % 20 == 0:
            await asyncio.sleep(0)


def numbers(heard: list[Delivery], mark: bytes) -> list[int]:
    return [int.from_bytes(one.data[1:], "big") for one in heard if one.data[:1] == mark]


async def test_a_listener_renews_under_a_stream(site: Site) -> None:
    listener, one, two = await joined(site, "node"), await joined(site, "gateway"), await joined(site, "gateway")
    heard: list[Delivery] = []
    node = listener.key.public
    await listener.subscribe(f"n.{node}.req", heard.append)
    await listener.subscribe(f"n.{node}.body.*", heard.append)
    sending = [asyncio.ensure_future(send(one, f"n.{node}.req", b"1")), asyncio.ensure_future(send(two, f"n.{node}.body.a", b"2"))]
    renewals = 0
    while not all(task.done() for task in sending):
        await listener.renew(again(site, listener))
        renewals += 1
        await asyncio.sleep(0)
    await asyncio.gather(*sending)
    await until(lambda: len(heard) >= MESSAGES, what="all messages")
    assert renewals > 1
    assert numbers(heard, b"1") == list(range(MESSAGES // 2))
    assert numbers(heard, b"2") == list(range(MESSAGES // 2))
    assert listener.losses == 0
    for bus in (listener, one, two):
        await bus.close()


async def test_a_publisher_renews_while_it_speaks(site: Site) -> None:
    """Its messages stay in order though they take two ways; so do those of one that doesn't renew."""
    speaker, other, listener = await joined(site, "node"), await joined(site, "node"), await joined(site, "hub")
    heard: list[Delivery] = []
    await listener.subscribe("hb.*", heard.append)
    sending = [
        asyncio.ensure_future(send(speaker, f"hb.{speaker.key.public}", b"1")),
        asyncio.ensure_future(send(other, f"hb.{other.key.public}", b"2")),
    ]
    while not all(task.done() for task in sending):
        await speaker.renew(again(site, speaker))
        await asyncio.sleep(0)
    await asyncio.gather(*sending)
    await until(lambda: len(heard) >= MESSAGES, what="all messages")
    assert numbers(heard, b"1") == list(range(MESSAGES // 2))
    assert numbers(heard, b"2") == list(range(MESSAGES // 2))
    assert speaker.losses == 0
    for bus in (speaker, other, listener):
        await bus.close()


async def test_a_member_of_a_group_renews(site: Site) -> None:
    """Each message is heard by one of the group, once."""
    asker, hub = await joined(site, "gateway"), await joined(site, "hub")
    second = await joined(site, "hub")
    heard: list[Delivery] = []
    for bus in (hub, second):
        await bus.subscribe("hub.demand", heard.append, group="hub")
    sending = asyncio.ensure_future(send(asker, "hub.demand", b"1", 1_000))
    while not sending.done():
        await hub.renew(site.operator.hub_user())
        await asyncio.sleep(0)
    await sending
    await until(lambda: len(heard) >= 1_000)
    assert sorted(numbers(heard, b"1")) == list(range(1_000))
    for bus in (asker, hub, second):
        await bus.close()


async def test_a_question_that_is_under_way_is_answered(site: Site) -> None:
    asker, hub = await joined(site, "gateway"), await joined(site, "hub")
    asked: list[Delivery] = []
    await hub.subscribe("hub.key.*", asked.append, group="hub")
    asking = asyncio.ensure_future(asker.request(f"hub.key.{asker.key.public}", b"?", within_s=20))
    await until(lambda: asked)
    await asker.renew(site.member("gateway", asker.key))
    await hub.publish(asked[0].reply, b"!")
    assert await asking == b"!"
    await asker.close()
    await hub.close()


async def test_the_old_connection_leaves(site: Site) -> None:
    bus = await joined(site, "node")
    old = bus._link
    await bus.subscribe("prices", lambda delivery: None)
    for _ in range(3):
        await bus.renew(again(site, bus))
    await until(lambda: not bus._leaving, what="the farewell")
    assert old is not None
    assert not old.is_up
    assert bus.is_up()
    assert bus.losses == 0
    await bus.close()


async def test_a_credential_that_is_refused_changes_nothing(site: Site, tmp_path: Path) -> None:
    bus, hub = await joined(site, "node"), await joined(site, "hub")
    heard: list[Delivery] = []
    await bus.subscribe("prices", heard.append)
    good = again(site, bus)
    with pytest.raises(BrokerLost, match="refused"):
        await bus.renew(Credentials(good.jwt[:-4] + "AAAA", bus.key))
    await hub.publish("prices", b"x")
    await until(lambda: heard)
    await bus.publish(f"hb.{bus.key.public}", b"")
    assert bus.losses == 0
    await bus.close()
    await hub.close()


async def test_too_much_to_hold_is_given_up_and_nothing_is_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_handover, "HELD_MESSAGES_MAX", 0)
    bus, one = await joined(site, "node"), await joined(site, "gateway")
    heard: list[Delivery] = []
    await bus.subscribe(f"n.{bus.key.public}.req", heard.append)
    sending = asyncio.ensure_future(send(one, f"n.{bus.key.public}.req", b"1"))
    given_up = 0
    while not sending.done():
        try:
            await bus.renew(again(site, bus))
        except BrokerLost:
            given_up += 1
        await asyncio.sleep(0)
    await sending
    await until(lambda: len(heard) >= MESSAGES // 2 or bus.losses, what="all messages, or the word that some are lost")
    assert given_up or bus.losses
    assert sorted(set(numbers(heard, b"1"))) == numbers(heard, b"1"), "in order, and none twice"
    await bus.close()
    await one.close()


async def test_without_a_broker_the_next_connection_takes_it(tmp_path: Path) -> None:
    site = await Site.start(tmp_path)
    bus = await joined(site, "node")
    pid = next(p.pid for p in psutil.Process().children() if str(tmp_path) in " ".join(p.cmdline()))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not bus.is_up())
    await bus.renew(again(site, bus))
    assert bus.losses == 1
    await bus.close()


# what is passed on, for any interleaving
streams = st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 3)), max_size=12)


@PROMISE
@given(streams, st.integers(0, 12), st.integers(0, 12), st.data())
def test_each_message_is_passed_on_once_and_in_order(said: list[tuple[str, int]], joins: int, leaves: int, data: st.DataObject) -> None:
    """The old connection hears all up to `leaves`, the new one all from `joins` on, and they are read in any order.

    Before the release all that both are sent has come to both; of what only the new one is sent, any part.
    """
    joins = min(joins, len(said))
    leaves = max(min(leaves, len(said)), joins)
    messages = [Delivery(subject, "", b"%d-%d" % (number, at), False) for at, (subject, number) in enumerate(said)]
    heard: list[Delivery] = []
    handover = Handover([Listening("*", heard.append, "")])
    ears = {"old": handover.old_ear(0), "new": handover.new_ear(0)}
    late = data.draw(st.integers(leaves, len(said)))
    left = {"old": messages[:leaves], "new": messages[joins:late]}
    while left["old"] or left["new"]:
        side = data.draw(st.sampled_from([side for side in ("old", "new") if left[side]]))
        ears[side](left[side].pop(0))
    handover.release()
    for message in messages[late:]:
        ears["new"](message)
    assert heard == messages


def test_equal_messages_are_counted() -> None:
    """A keep-alive says the same each time: as many are passed on as came."""
    same = Delivery("a", "", b"alive", False)
    heard: list[Delivery] = []
    handover = Handover([Listening("a", heard.append, "")])
    old, new = handover.old_ear(0), handover.new_ear(0)
    for ear in (new, old, new, old, new):
        ear(same)
    assert len(heard) == 2
    handover.release()
    assert len(heard) == 3


def test_messages_differ_by_each_of_their_parts() -> None:
    one = Delivery("a", "b", b"c", False)
    others = [one._replace(subject="x"), one._replace(reply="x"), one._replace(data=b"x"), one._replace(unheard=True)]
    heard: list[Delivery] = []
    handover = Handover([Listening("a", heard.append, "")])
    handover.old_ear(0)(one)
    for delivery in [*others, one]:
        handover.new_ear(0)(delivery)
    handover.release()
    assert heard == [one, *others]


def test_an_ear_that_fails_does_not_stop_the_others() -> None:
    heard: list[Delivery] = []

    def deaf(delivery: Delivery) -> None:
        raise ValueError

    handover = Handover([Listening("a", deaf, ""), Listening("b", heard.append, "")])
    handover.new_ear(0)(Delivery("a", "", b"", False))
    handover.new_ear(1)(Delivery("b", "", b"", False))
    handover.release()
    assert [one.subject for one in heard] == ["b"]

"""What a bus promises, asked of the one in memory and of the one over a real broker."""

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from trusted import OpenGround

from fallow.adapters.broker import Broker, start_broker
from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.nkey import Credentials, make_key
from fallow.model.errors import BrokerLost, StartFailed
from fallow.ports import Bus, Delivery

pytestmark = pytest.mark.anyio

GROUND = OpenGround()
WITHIN_S = 20.0
POLL_S = 0.002
AT_ONCE_S = 0.5
"""Generous for a machine that is busy with other tests, and well below any waiting time of the bus."""


async def until(said: Callable[[], Any], *, what: str = "it") -> None:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
        await asyncio.sleep(POLL_S)


class Side(Protocol):
    """A broker of either kind."""

    async def connect(self) -> Bus: ...

    async def lose(self) -> None: ...

    async def mend(self) -> None: ...

    async def end(self) -> None: ...


class MemorySide:
    def __init__(self) -> None:
        self._broker = MemoryBroker()

    async def connect(self) -> Bus:
        return MemoryBus(self._broker)

    async def lose(self) -> None:
        self._broker.stop()

    async def mend(self) -> None:
        self._broker.up = True

    async def end(self) -> None:
        for bus in list(self._broker.buses):
            await bus.close()


class NatsSide:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self._broker: Broker | None = None
        self._buses: list[NatsBus] = []

    @property
    def broker(self) -> Broker:
        assert self._broker is not None
        return self._broker

    @property
    def pid(self) -> int:
        return next(p.pid for p in psutil.Process().children() if str(self._folder) in " ".join(p.cmdline()))

    async def connect(self) -> NatsBus:
        bus = NatsBus(self.broker.address, GROUND.member(), "test")
        self._buses.append(bus)
        await bus.connect()
        return bus

    async def lose(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await self.broker.wait()
        await until(lambda: not any(bus.is_up() for bus in self._buses), what="the loss is noticed")

    async def mend(self) -> None:
        self._broker = await start_broker(self._folder, host="127.0.0.1", port=self._port, trust=GROUND.trust)
        self._port = int(self._broker.address.rpartition(":")[2])

    async def close_all(self) -> None:
        for bus in self._buses:
            await bus.close()
        self._buses.clear()

    async def end(self) -> None:
        await self.close_all()
        await self.broker.stop()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere, but for the module: one broker serves all tests that leave it whole."""
    return "asyncio"


@pytest.fixture(scope="module")
async def shared(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsSide]:
    side = NatsSide(tmp_path_factory.mktemp("shared") / "broker")
    await side.mend()
    yield side
    await side.end()


@pytest.fixture(params=["memory", "nats"])
async def side(request: pytest.FixtureRequest, shared: NatsSide) -> AsyncIterator[Side]:
    """A broker that the test leaves whole."""
    if request.param == "nats":
        yield shared
        await shared.close_all()
    else:
        memory = MemorySide()
        yield memory
        await memory.end()


@pytest.fixture(params=["memory", "nats"])
async def frail(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Side]:
    """A broker that the test may break."""
    side: Side = NatsSide(tmp_path / "broker") if request.param == "nats" else MemorySide()
    await side.mend()
    yield side
    await side.end()


probes = itertools.count()


class Ear:
    """What a subscription heard."""

    def __init__(self) -> None:
        self.heard: list[Delivery] = []

    def __call__(self, delivery: Delivery) -> None:
        self.heard.append(delivery)

    @property
    def data(self) -> list[bytes]:
        return [delivery.data for delivery in self.heard]


async def listen(bus: Bus, subject: str, *, group: str = "") -> Ear:
    """Subscribe, and be sure that the broker knows: what one connection says arrives in order."""
    ear, probe = Ear(), Ear()
    await bus.subscribe(subject, ear, group=group)
    name = f"probe.{next(probes)}"
    await bus.subscribe(name, probe)
    await bus.publish(name, b"")
    await until(lambda: probe.heard, what="the subscription")
    return ear


async def call_until_heard(bus: Bus, subject: str, *ears: Ear) -> None:
    """Say "here?" until all have heard it: after a return, what is said at once may overtake another's subscription."""
    await until(bus.is_up, what="the connection is back")
    deadline = time.monotonic() + WITHIN_S
    while not all(b"here?" in ear.data for ear in ears):
        assert time.monotonic() < deadline, f"{subject} was not heard again"
        await bus.publish(subject, b"here?")
        await asyncio.sleep(POLL_S)


# delivering
async def test_messages_arrive_as_they_were_sent(side: Side) -> None:
    here, there = await side.connect(), await side.connect()
    ear = await listen(there, "a.b")
    payloads = [b"", bytes(range(256)), b"\r\nPUB x 1\r\n", b"x" * 200_000]
    for payload in payloads:
        await here.publish("a.b", payload, "answers.here")
    await until(lambda: len(ear.heard) == len(payloads))
    assert ear.heard == [Delivery("a.b", "answers.here", payload, False) for payload in payloads]


async def test_each_senders_messages_arrive_in_order(side: Side) -> None:
    listener, *senders = [await side.connect() for _ in range(4)]
    ear = await listen(listener, "a.*")

    async def send(number: int, bus: Bus) -> None:
        for count in range(300):
            await bus.publish(f"a.{number}", count.to_bytes(2, "big"))
            if count % 50 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(*(send(number, bus) for number, bus in enumerate(senders)))
    await until(lambda: len(ear.heard) == 900)
    for number in range(3):
        assert [d.data for d in ear.heard if d.subject == f"a.{number}"] == [count.to_bytes(2, "big") for count in range(300)]


async def test_a_listener_hears_itself_and_everybody_who_listens_hears(side: Side) -> None:
    one, two = await side.connect(), await side.connect()
    ears = [await listen(one, "a"), await listen(one, "a"), await listen(two, "a")]
    await one.publish("a", b"x")
    await until(lambda: all(ear.heard for ear in ears))
    assert [ear.data for ear in ears] == [[b"x"]] * 3


@pytest.mark.parametrize(
    ("pattern", "heard"),
    [
        ("w.a.c", ["w.a.c"]),
        ("w.*.c", ["w.a.c", "w.b.c"]),
        ("w.*", ["w.a"]),
        ("w.>", ["w.a", "w.a.c", "w.b.c", "w.b.c.d"]),
        ("*.b.>", ["w.b.c", "w.b.c.d"]),
        ("w", ["w"]),
    ],
)
async def test_wildcards(side: Side, pattern: str, heard: list[str]) -> None:
    bus = await side.connect()
    ear, last = await listen(bus, pattern), await listen(bus, "the.end")
    for subject in ("w", "w.a", "w.a.c", "w.b.c", "w.b.c.d", "v.a"):
        await bus.publish(subject, b"")
    await bus.publish("the.end", b"")
    await until(lambda: last.heard)
    assert [delivery.subject for delivery in ear.heard] == heard


async def test_a_group_hears_each_message_once(side: Side) -> None:
    sender, *members = [await side.connect() for _ in range(4)]
    group = [await listen(bus, "a", group="g") for bus in members]
    other, alone = await listen(members[0], "a", group="h"), await listen(members[1], "a")
    sent = [str(number).encode() for number in range(60)]
    for data in sent:
        await sender.publish("a", data)
    await until(lambda: len(alone.heard) == len(other.heard) == len(sent) <= sum(len(ear.heard) for ear in group))
    assert sorted(data for ear in group for data in ear.data) == sorted(sent)
    assert other.data == alone.data == sent


async def test_a_message_that_nobody_hears_comes_back_as_unheard(side: Side) -> None:
    sender, listener = await side.connect(), await side.connect()
    ear, there = await listen(sender, "back.*"), await listen(listener, "somebody")
    await sender.publish("nobody", b"x", "back.1")
    await sender.publish("somebody", b"x", "back.2")
    await sender.publish("nobody", b"x", "back.3")
    await sender.publish("nobody", b"x")  # without a reply subject there is nobody to be told
    await until(lambda: len(ear.heard) == 2)
    assert ear.heard == [Delivery("back.1", "", b"", True), Delivery("back.3", "", b"", True)]
    await until(lambda: there.heard)
    assert there.heard == [Delivery("somebody", "back.2", b"x", False)]


# asking
async def test_a_request_is_answered(side: Side) -> None:
    asker, answerer = await side.connect(), await side.connect()
    tasks: list[asyncio.Task[None]] = []

    def hear(delivery: Delivery) -> None:
        tasks.append(asyncio.ensure_future(answerer.publish(delivery.reply, delivery.data[::-1])))

    await answerer.subscribe("ask", hear)
    await listen(answerer, "sure")
    answers = await asyncio.gather(*(asker.request("ask", str(number).encode(), within_s=WITHIN_S) for number in range(100, 120)))
    assert answers == [str(number)[::-1].encode() for number in range(100, 120)]
    await asyncio.gather(*tasks)


async def test_a_request_takes_the_first_answer(side: Side) -> None:
    asker, answerer = await side.connect(), await side.connect()
    tasks: list[asyncio.Task[None]] = []

    async def answer(subject: str) -> None:
        await answerer.publish(subject, b"first")
        await answerer.publish(subject, b"second")

    await answerer.subscribe("ask", lambda delivery: tasks.append(asyncio.ensure_future(answer(delivery.reply))))
    await listen(answerer, "sure")
    assert await asker.request("ask", b"", within_s=WITHIN_S) == b"first"
    assert await asker.request("ask", b"", within_s=WITHIN_S) == b"first"
    await asyncio.gather(*tasks)


async def test_a_request_where_nobody_is_there_fails_at_once(side: Side) -> None:
    bus = await side.connect()
    asked = time.monotonic()
    with pytest.raises(BrokerLost):
        await bus.request("nobody", b"", within_s=30)
    assert time.monotonic() - asked < AT_ONCE_S


async def test_a_request_that_a_listener_ignores_fails_in_its_time(side: Side) -> None:
    bus = await side.connect()
    ear = await listen(bus, "ask")
    asked = time.monotonic()
    with pytest.raises(BrokerLost):
        await bus.request("ask", b"x", within_s=0.1)
    assert 0.09 < time.monotonic() - asked < 0.1 + AT_ONCE_S
    assert ear.data == [b"x"]


# losing the broker
async def test_what_is_said_without_a_broker_fails_at_once_and_is_never_said(frail: Side) -> None:
    bus, listener = await frail.connect(), await frail.connect()
    ear = await listen(listener, "a")
    assert bus.is_up()
    await frail.lose()
    assert not bus.is_up()
    asked = time.monotonic()
    with pytest.raises(BrokerLost):
        await bus.publish("a", b"lost")
    with pytest.raises(BrokerLost):
        await bus.request("a", b"lost", within_s=30)
    assert time.monotonic() - asked < AT_ONCE_S
    await frail.mend()
    await call_until_heard(bus, "a", ear)
    assert set(ear.data) == {b"here?"}


async def test_whoever_asked_is_told_of_the_loss_each_time(frail: Side) -> None:
    bus = await frail.connect()
    told: list[str] = []
    bus.on_lost(lambda: told.append("one"))
    bus.on_lost(lambda: told.append("two"))
    await frail.lose()
    await until(lambda: len(told) == 2)
    await frail.mend()
    await until(bus.is_up)
    assert told == ["one", "two"]
    await frail.lose()
    await until(lambda: len(told) == 4)


async def test_subscriptions_come_back_with_the_broker(frail: Side) -> None:
    listener, sender = await frail.connect(), await frail.connect()
    plain, pattern = await listen(listener, "a"), await listen(listener, "b.*")
    group = [await listen(listener, "c", group="g"), await listen(listener, "c", group="g")]
    for _ in range(2):
        for ear in (plain, pattern, *group):
            ear.heard.clear()
        await frail.lose()
        await frail.mend()
        await call_until_heard(sender, "a", plain)
        await call_until_heard(sender, "b.x", pattern)
        for subject in ("a", "b.x", "c"):
            await sender.publish(subject, b"once")
        await until(lambda: b"once" in plain.data and b"once" in pattern.data and b"once" in group[0].data + group[1].data)
        await sender.publish("a", b"last")
        await until(lambda: b"last" in plain.data)
        assert [plain.data.count(b"once"), pattern.data.count(b"once"), (group[0].data + group[1].data).count(b"once")] == [1, 1, 1]


async def test_a_request_works_after_a_return(frail: Side) -> None:
    asker, answerer = await frail.connect(), await frail.connect()
    tasks: list[asyncio.Task[None]] = []
    await answerer.subscribe("ask", lambda d: tasks.append(asyncio.ensure_future(answerer.publish(d.reply, b"yes"))))
    ear = await listen(answerer, "hello")
    assert await asker.request("ask", b"", within_s=WITHIN_S) == b"yes"
    await frail.lose()
    await frail.mend()
    await until(answerer.is_up)
    await call_until_heard(asker, "hello", ear)
    assert await asker.request("ask", b"", within_s=WITHIN_S) == b"yes"
    await asyncio.gather(*tasks)


# closing
async def test_closing_is_quick_final_and_can_be_repeated(side: Side) -> None:
    closed, sender = await side.connect(), await side.connect()
    ear, other = await listen(closed, "a"), await listen(sender, "a")
    began = time.monotonic()
    await closed.close()
    await closed.close()
    assert time.monotonic() - began < AT_ONCE_S
    await sender.publish("a", b"x")
    await until(lambda: other.heard)
    assert ear.heard == []


async def test_what_was_said_before_closing_arrives(side: Side) -> None:
    listener, sender = await side.connect(), await side.connect()
    ear = await listen(listener, "a")
    for number in range(200):
        await sender.publish("a", b"%d" % number)
    await sender.close()
    await until(lambda: len(ear.heard) == 200)


async def test_closing_without_a_broker_is_quick(frail: Side) -> None:
    bus = await frail.connect()
    await listen(bus, "a")
    await frail.lose()
    began = time.monotonic()
    await bus.close()
    assert time.monotonic() - began < 1.0 + AT_ONCE_S
    await frail.mend()
    await asyncio.sleep(0.3)  # three times the wait between attempts to reconnect
    assert not bus.is_up() or isinstance(bus, MemoryBus)


async def test_a_closed_bus_says_nothing_more(side: Side) -> None:
    closed, listener = await side.connect(), await side.connect()
    await listen(listener, "a")
    await closed.close()
    assert not closed.is_up()
    with pytest.raises(BrokerLost):
        await closed.publish("a", b"x")


async def test_closing_is_no_loss(side: Side) -> None:
    bus = await side.connect()
    lost: list[bool] = []
    bus.on_lost(lambda: lost.append(True))
    await bus.close()
    await asyncio.sleep(0.02)
    assert lost == []


# a real broker only
async def test_a_credential_of_elsewhere_is_told_as_refused_in_one_line(shared: NatsSide) -> None:
    login = OpenGround().member()
    bus = NatsBus(shared.broker.address, login, "test")
    with pytest.raises(StartFailed, match="it refused us; our credential") as caught:
        await bus.connect(within_s=5)
    assert "\n" not in caught.value.message
    assert shared.broker.address in caught.value.message
    assert login.jwt not in caught.value.message
    await bus.close()


async def test_a_credential_that_can_not_be_read_is_told_as_such(shared: NatsSide) -> None:
    bus = NatsBus(shared.broker.address, Credentials("a-secret-word", make_key("user")), "test")
    with pytest.raises(StartFailed, match="not a credential of the broker") as caught:
        await bus.connect(within_s=0.3)
    assert "a-secret-word" not in caught.value.message
    await bus.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address on this machine where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"nats://127.0.0.1:{held.getsockname()[1]}"


async def test_a_broker_that_is_not_there_is_named_in_one_line(nobody: str) -> None:
    bus = NatsBus(nobody, GROUND.member(), "test")
    with pytest.raises(StartFailed) as caught:
        await bus.connect(within_s=0.3)
    assert "\n" not in caught.value.message
    assert nobody in caught.value.message
    assert not bus.is_up()
    await bus.close()


async def test_a_refused_connection_is_told_as_such(nobody: str) -> None:
    bus = NatsBus(nobody, GROUND.member(), "test")
    with pytest.raises(StartFailed, match=r"(?i)refused|nobody|connect call failed"):
        await bus.connect(within_s=0.3)
    await bus.close()


async def test_what_answers_but_is_no_broker_is_given_up_in_time() -> None:
    """A port on which something accepts and says nothing."""
    accepted: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    async with server:
        bus = NatsBus(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", GROUND.member(), "test")
        with pytest.raises(StartFailed) as caught:
            await bus.connect(within_s=0.2)
        assert "\n" not in caught.value.message
        await bus.close()
        for writer in accepted:
            writer.close()


class PlayedBroker:
    """A broker that a test plays by hand. It keeps the first words of what each connection says, and answers pings."""

    def __init__(self) -> None:
        self.said: list[list[str]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.address = ""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said: list[str] = []
        self.said.append(said)
        self.writers.append(writer)
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","proto":1,"headers":true,"max_payload":262144}\r\n')
        while line := await reader.readline():
            words = line.decode().split()
            said.append(" ".join(words[: 2 if words[0] == "SUB" else 1]))
            if words[0] == "PING":
                writer.write(b"PONG\r\n")
        writer.close()


@pytest.fixture
async def played() -> AsyncIterator[PlayedBroker]:
    broker = PlayedBroker()
    server = await asyncio.start_server(broker.talk, "127.0.0.1", 0)
    broker.address = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield broker
        await until(lambda: all(writer.is_closing() for writer in broker.writers), what="the end of every connection")


async def test_the_broker_knows_a_subscription_when_subscribe_returns(played: PlayedBroker) -> None:
    """Else what others publish then may pass by: seen in 2 of 100 runs on a busy machine."""
    bus = NatsBus(played.address, GROUND.member(), "test")
    await bus.connect()
    await bus.subscribe("a", Ear())
    said = list(played.said[0])
    await bus.close()
    assert "SUB a" in said
    assert "PING" in said[said.index("SUB a") :], "the ping that subscribe waits for comes after it"


async def test_a_client_that_gives_up_is_replaced_with_all_its_subscriptions(played: PlayedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client closes itself for good when a broker that it's connected to sends an error; the bus makes a new one."""
    monkeypatch.setattr("fallow.adapters.nats_bus.REBUILD_WAIT_S", (0.01, 0.02))
    bus = NatsBus(played.address, GROUND.member(), "test")
    lost: list[bool] = []
    bus.on_lost(lambda: lost.append(True))
    await bus.connect()
    ears = [Ear(), Ear()]
    await bus.subscribe("a", ears[0])
    await bus.subscribe("b", ears[1])
    assert len(played.said) == 1
    played.writers[0].write(b"-ERR 'enough of you'\r\n")
    await until(lambda: len(played.said) == 2 and bus.is_up() and "SUB b" in played.said[1], what="a new connection")
    assert lost == [True]
    assert [words for words in played.said[1] if words.startswith("SUB")] == ["SUB a", "SUB b"]
    played.writers[1].write(b"MSG b 2 1\r\nx\r\n")
    await until(lambda: ears[1].heard)
    assert (ears[0].data, ears[1].data) == ([], [b"x"])
    await bus.close()


async def test_a_broker_that_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallow.adapters.nats_bus.PING_S", 0.05)
    side = NatsSide(tmp_path / "broker")
    await side.mend()
    bus = await side.connect()
    lost: list[bool] = []
    bus.on_lost(lambda: lost.append(True))
    try:
        os.kill(side.pid, signal.SIGSTOP)
        await until(lambda: lost)
        assert not bus.is_up()
        with pytest.raises(BrokerLost):
            await bus.publish("a", b"x")
    finally:
        os.kill(side.pid, signal.SIGCONT)
        await side.end()

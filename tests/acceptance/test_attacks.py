"""Attacks on the broker of a real hub: each is refused, says why where somebody looks, and costs nobody else anything."""

import asyncio
import base64
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest
from nats.aio.msg import Msg
from running import Service, node_id_of, until
from test_identity import Fleeting, code_of, readiness
from test_rolling import Long
from trusted import Tap, connections

from fallow.adapters.broker import LOG_BYTES_MAX, LOG_FILES_MAX
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.nkey import Credentials, KeyPair, kept_key, key_from_seed, make_key
from fallow.adapters.operator import Operator
from fallow.apps.gateway.sessions import HELLO_PREFIX
from fallow.model import messages as m
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Delivery
from fallow.wire import codec, invitation, sign, subjects
from fallow.wire.permissions import NODE_SUBSCRIPTIONS_MAX
from fallow.wire.subjects import PAYLOAD_BYTES_MAX, Role

pytestmark = pytest.mark.anyio

DAY_S = 86_400
END_S = 20.0
BACK_S = 30.0
"""What is promised of a hundred that come back at once."""
RSS_GROWTH_MAX = 32 * 2**20
HERD = 100
TIMES = 8
"""How often each oversize message is tried."""
FLOOD = 5_000
PIECES_MAX = 300
"""More than the answer has that the tests ask for."""
SHOUTS = 400_000
"""Some eighty megabytes of the broker's log, were it not limited."""
GUESSES = 12
"""More than one address may get wrong within a minute."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Arena(Fleeting):
    """A hub with its broker, a gateway, a node, and whom the hub's keys let in besides."""

    hub_flags = ("--verbose",)
    service: Service

    @property
    def operator(self) -> Operator:
        return Operator.open(self.folder / "hub" / "hub" / "keys")

    def login(self, role: Role) -> Credentials:
        key = make_key("user")
        return Credentials(self.operator.credential(role, key.public, now_s=int(time.time()), life_s=DAY_S), key)

    def kept(self, role: str) -> Credentials:
        """What a part of the arena logs in with."""
        folder = self.folder / role / "identity"
        credential = msgspec.json.decode((folder / f"{role}.json").read_bytes())["credential"]
        return Credentials(credential, kept_key(folder / f"{role}.nk", "user"))

    def broker(self) -> psutil.Process:
        return self.parts["hub"].child("nats-server")

    def broker_log(self) -> str:
        return (self.folder / "hub" / "broker" / "broker.log").read_text()

    async def connections(self) -> dict[str, set[int]]:
        """Those of gateway and node: one that breaks comes back as another."""
        names = [kept_key(self.folder / role / "identity" / f"{role}.nk", "user").public for role in ("gateway", "node")]
        found = await connections(self.hub_address, self.folder / "hub" / "hub" / "keys")
        return {name: found[name] for name in names}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    parts = Arena(tmp_path_factory.mktemp("arena"))
    try:
        parts.service = parts.begin()
        yield parts
    finally:
        parts.stop()


class Taps:
    """Plain connections, closed when the test is over."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._open: list[Tap] = []

    async def open(self, login: Credentials, *heard: str) -> Tap:
        tap = await Tap.open(self._arena.hub_address, login.jwt, login.key)
        self._open.append(tap)
        for subject in heard:
            await tap.listen(subject)
        await tap.flush()
        return tap

    async def close(self) -> None:
        for tap in self._open:
            await tap.close()


@pytest.fixture
async def taps(arena: Arena) -> AsyncIterator[Taps]:
    taps = Taps(arena)
    yield taps
    await taps.close()


@contextlib.asynccontextmanager
async def nobody_else_notices(arena: Arena) -> AsyncIterator[None]:
    """A stream goes on over the attack, connections stay, calls work, and the broker keeps its size."""
    before, rss = await arena.connections(), arena.broker().memory_info().rss
    long = await asyncio.to_thread(Long(arena.service).begun)
    yield
    assert await asyncio.to_thread(long.is_whole), long.failed
    assert await asyncio.to_thread(code_of, arena.service) == "ok"
    assert await arena.connections() == before
    assert arena.broker().memory_info().rss - rss <= RSS_GROWTH_MAX


# row 20: too large
class Raw:
    """A connection without a client library, so that nothing holds back what is sent."""

    def __init__(self, arena: Arena, login: Credentials | None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(arena.hub_address.rpartition(":")[2])), timeout=END_S)
        info = msgspec.json.decode(self._line().removeprefix(b"INFO "))
        if login is not None:
            signed = base64.urlsafe_b64encode(login.key.sign(info["nonce"].encode())).rstrip(b"=").decode()
            said = {"jwt": login.jwt, "sig": signed, "verbose": False, "pedantic": False, "headers": True, "no_responders": True}
            self.socket.sendall(b"CONNECT " + msgspec.json.encode(said) + b"\r\nPING\r\n")
            while not (line := self._line()).startswith(b"PONG"):
                assert not line.startswith(b"-ERR"), line

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            piece = self.socket.recv(1)
            assert piece, line
            line += piece
        return line

    def read_on(self) -> None:
        """Until the broker closes."""
        with contextlib.suppress(OSError):
            while self.socket.recv(2**20):
                pass

    def ends_with(self, sent: bytes) -> bytes:
        """What the broker says to this before it closes."""
        with contextlib.suppress(OSError):  # it may close before it has all
            self.socket.sendall(sent)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65_536):
                said += piece
        self.socket.close()
        return said


def published(subject: str, size: int) -> bytes:
    return f"PUB {subject} {size}\r\n".encode() + bytes(size) + b"\r\n"


def headed(subject: str, headers: bytes) -> bytes:
    head = b"NATS/1.0\r\n" + headers + b"\r\n"
    return f"HPUB {subject} {len(head)} {len(head)}\r\n".encode() + head + b"\r\n"


TOO_LARGE: dict[str, Callable[[str], bytes]] = {
    "10 MB": lambda subject: published(subject, 10 * 10**6),
    "257 KiB": lambda subject: published(subject, 257 * 1024),
    "one byte": lambda subject: published(subject, PAYLOAD_BYTES_MAX + 1),
    "10^6 bytes of headers": lambda subject: headed(subject, b"a: " + b"b" * 10**6 + b"\r\n"),
    "10^6 headers": lambda subject: headed(subject, b"a:b\r\n" * 10**6),
    "a long line": lambda subject: b"PUB " + subject.encode() * 20_000,
    "a size beyond numbers": lambda subject: f"PUB {subject} 99999999999999999999\r\n".encode() + bytes(1000),
    "a size below zero": lambda subject: f"PUB {subject} -5\r\n".encode() + bytes(1000),
    "headers longer than all": lambda subject: f"HPUB {subject} 100 10\r\n".encode() + bytes(100),
}


def say_too_much(arena: Arena) -> None:
    """Each in its turn, as a node and as a guest, and as nobody at all."""
    for name, made in TOO_LARGE.items():
        for role in ("node", "guest"):
            for _ in range(TIMES):
                login = arena.operator.door() if role == "guest" else arena.login("node")
                subject = subjects.ENROL.pattern if role == "guest" else f"hb.{login.key.public}"
                said = Raw(arena, login).ends_with(made(subject))
                assert said.startswith(b"-ERR") or said == b"", (name, said[:100])
    for _ in range(TIMES):
        assert Raw(arena, None).ends_with(bytes(10 * 10**6))[:4] in (b"-ERR", b"")


async def test_too_much_is_refused_and_costs_nobody_else(arena: Arena) -> None:
    async with nobody_else_notices(arena):
        await asyncio.to_thread(say_too_much, arena)
    for words in ("maximum payload exceeded", "maximum control line exceeded"):
        assert words in arena.broker_log().lower()


# row 22: what was said once
async def test_somebody_elses_words_let_nobody_else_in(arena: Arena) -> None:
    """Who catches a request to join, and says it again at any time, gets a credential for a key that it doesn't have."""
    token = invitation.read((arena.folder / "hub" / "invitation").read_text().strip())
    guest = NatsBus(arena.hub_address, Credentials(token.door_jwt, key_from_seed(token.door_seed)), "guest")
    await guest.connect()
    theirs, mine = make_key("user"), make_key("user")
    asked = m.Enrol(role="node", public_key=theirs.public, invite=token.word, at_s=int(time.time()) - 600)
    asked = msgspec.structs.replace(asked, proof=theirs.sign(sign.enrol_bytes(asked)))
    answers = [codec.enrolled.read(await guest.request(subjects.ENROL.pattern, codec.encode(asked), within_s=5)) for _ in range(2)]
    assert answers[1].credential
    for jwt in {one.credential for one in answers}:
        with pytest.raises(Exception, match=r"(?i)authorization"):
            await Tap.open(arena.hub_address, jwt, mine)
    for change in ({"public_key": mine.public}, {"role": "gateway"}, {"at_s": 0}):
        widened = msgspec.structs.replace(asked, **change)
        answer = codec.enrolled.read(await guest.request(subjects.ENROL.pattern, codec.encode(widened), within_s=5))
        assert answer.failure is not None
        assert "signature doesn't fit" in answer.failure.message
    await guest.close()
    assert "a guest from 127.0.0.1 was refused: bad_proof" in arena.parts["hub"].said()


async def test_words_are_not_guessed(arena: Arena) -> None:
    door = arena.operator.door()
    guest = NatsBus(arena.hub_address, door, "guest")
    await guest.connect()
    for number in range(GUESSES):
        key = make_key("user")
        asked = m.Enrol(role="node", public_key=key.public, invite=f"guess{number}", at_s=int(time.time()))
        asked = msgspec.structs.replace(asked, proof=key.sign(sign.enrol_bytes(asked)))
        answer = codec.enrolled.read(await guest.request(subjects.ENROL.pattern, codec.encode(asked), within_s=5))
        assert answer.failure is not None
        assert not answer.credential
    assert answer.failure is not None
    assert answer.failure.retry_after_ms is not None, "it must wait"
    await guest.close()
    for reason in ("not_invited", "too_many_failures"):
        assert f"was refused: {reason}" in arena.parts["hub"].said()


# row 27: somebody else's subjects
def forged(attempt: str, gateway: str, node: str) -> list[tuple[str, bytes]]:
    """Ends and beginnings of another's answer, on all subjects on which they might pass."""
    said: list[Any] = [m.Sealed(index=0, box=b"data: forged\n\n"), m.Unopened(reason="no_session"), m.Lost(), m.Alive()]
    where = [f"rsp.{gateway}.{node}.{attempt}", f"_I.{gateway}.x", f"_R_.{attempt}"]
    return [(subject, codec.encode(one)) for subject in where for one in said]


def answered(heard: list[Msg]) -> list[str]:
    """The attempts of which something was said."""
    names = [subjects.last_token(one.subject) for one in heard]
    return [name for name in names if not name.startswith(HELLO_PREFIX)]


async def test_a_node_forges_no_answers_of_another(arena: Arena, taps: Taps) -> None:
    victim, gateway = node_id_of(arena.folder / "node"), kept_key(arena.folder / "gateway" / "identity" / "gateway.nk", "user").public
    spy = await taps.open(arena.kept("gateway"), f"rsp.{gateway}.{victim}.*")
    login = arena.login("node")
    attacker = await taps.open(login)
    async with nobody_else_notices(arena):
        await asyncio.to_thread(until, lambda: answered(spy.heard), what="the answer's beginning")
        # The attempt's id is 128 random bits. Even who knew it gets nowhere.
        attempt = answered(spy.heard)[-1]
        for subject, data in forged(attempt, gateway, victim):
            await attacker.client.publish(subject, data)
        mine = f"rsp.{gateway}.{login.key.public}.{attempt}"
        for index in range(PIECES_MAX):  # one of them is the next
            await attacker.client.publish(mine, codec.encode(m.Sealed(index=index, box=b"data: forged\n\n")))
        await attacker.client.publish(mine, b"", headers={"Status": "503"})
        for subject in (f"n.{victim}.ctl", f"n.{victim}.body.{attempt}", f"n.{victim}.hub", f"n.{victim}.req"):
            await attacker.client.publish(subject, codec.encode(m.Cancel(attempt_id=AttemptId(attempt))))
        await attacker.flush()
    assert sum("publish" in text for text in attacker.refused) == len(forged(attempt, gateway, victim)) + 4
    assert arena.broker_log().lower().count("publish violation") >= len(attacker.refused)


async def test_a_node_speaks_for_no_other_and_for_no_hub(arena: Arena, taps: Taps) -> None:
    victim = NodeId(node_id_of(arena.folder / "node"))
    spy = await taps.open(arena.kept("gateway"), "hb.*")
    await asyncio.to_thread(until, lambda: spy.heard, what="a heartbeat")
    theirs = codec.read_heartbeat(spy.heard[-1].data, f"hb.{victim}")  # nobody else is there
    leaving = codec.encode(msgspec.structs.replace(theirs, state="leave", sequence=theirs.sequence + 1_000))
    login = arena.login("node")
    attacker = await taps.open(login)
    async with nobody_else_notices(arena):
        for subject in (f"hb.{victim}", subjects.CHANGED.pattern, subjects.INDEX.pattern, f"hub.node.{victim}", subjects.KEY.pattern):
            await attacker.client.publish(subject, leaving)
        await attacker.client.publish(f"hb.{login.key.public}", leaving)
        for heard in (f"n.{victim}.req", "n.*.req", ">", "rsp.>", f"_I.{victim}.>", "hb.*", "$SYS.>"):
            await attacker.listen(heard)
        await attacker.flush()
        assert "ready" in await asyncio.to_thread(readiness, arena.service)
    assert sum("publish" in text for text in attacker.refused) == 5
    assert sum("subscription" in text for text in attacker.refused) == 7
    assert [one.subject for one in attacker.heard] == []
    assert "a heartbeat was dropped" in arena.parts["gateway"].said()


async def test_a_node_that_hoards_is_put_off_the_line(arena: Arena, taps: Taps) -> None:
    """Subscriptions beyond its share end its connection; messages that nobody asked for, in great number, are nobody's trouble."""
    gateway = kept_key(arena.folder / "gateway" / "identity" / "gateway.nk", "user").public
    hoarder, loud = arena.login("node"), arena.login("node")
    greedy = await taps.open(hoarder)
    speaker = NatsBus(arena.hub_address, loud, "loud")
    await speaker.connect()
    async with nobody_else_notices(arena):
        for number in range(64):
            if greedy.client.is_closed:
                break
            with contextlib.suppress(Exception):
                await greedy.listen(f"_I.{hoarder.key.public}.{number}")
                await greedy.client.flush()
        assert number <= NODE_SUBSCRIPTIONS_MAX + 2, "the client hears a moment later that it is out"
        for number in range(FLOOD):
            await speaker.publish(f"rsp.{gateway}.{loud.key.public}.{number}", bytes(1_000))
        assert speaker.is_up()
    assert greedy.client.is_closed
    assert "maximum subscriptions exceeded" in arena.broker_log().lower()
    await speaker.close()


def shout(arena: Arena) -> None:
    """Say what isn't allowed, much and fast, and listen to the complaints so that the broker keeps us."""
    raw = Raw(arena, arena.login("node"))
    said = f"PUB {subjects.CHANGED.pattern} 1\r\nx\r\n".encode() * 1_000
    reader = threading.Thread(target=raw.read_on, daemon=True)
    reader.start()
    with contextlib.suppress(OSError):
        for _ in range(SHOUTS // 1_000):
            raw.socket.sendall(said)
    with contextlib.suppress(OSError):  # the broker may have had enough
        raw.socket.shutdown(socket.SHUT_WR)
    reader.join(END_S)
    raw.socket.close()


async def test_who_says_much_that_is_refused_does_not_fill_the_disk(arena: Arena) -> None:
    """Each refusal is a line of two hundred bytes in the broker's log."""
    async with nobody_else_notices(arena):
        await asyncio.to_thread(shout, arena)
    logs = list((arena.folder / "hub" / "broker").glob("broker.log*"))
    assert len(logs) > 1, "it was more than one file takes"
    assert sum(one.stat().st_size for one in logs) <= (LOG_FILES_MAX + 1) * (LOG_BYTES_MAX + 2**20)


# row 29: all at once
class Member:
    """One of many, who only listens."""

    def __init__(self, arena: Arena, login: Credentials) -> None:
        self.key: KeyPair = login.key
        self.bus = NatsBus(arena.hub_address, login, "herd")
        self.heard: list[Delivery] = []
        self.losses = 0

    async def join(self) -> None:
        await self.bus.connect(within_s=END_S)
        self.bus.on_lost(self._on_lost)
        await self.bus.subscribe(f"n.{self.key.public}.req", self.heard.append)

    def _on_lost(self) -> None:
        self.losses += 1


async def test_a_hundred_come_back_at_once(arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fallow.bus")
    operator = arena.operator
    logins = [make_key("user") for _ in range(HERD)]
    now_s = int(time.time())
    herd = [Member(arena, Credentials(operator.credential("node", key.public, now_s=now_s, life_s=DAY_S), key)) for key in logins]
    gateway = Member(arena, arena.login("gateway"))
    gateway.bus = NatsBus(arena.hub_address, arena.login("gateway"), "herd's gateway")
    await gateway.bus.connect()
    await asyncio.gather(*(one.join() for one in herd))
    try:
        os.kill(arena.broker().pid, signal.SIGKILL)
        await asyncio.to_thread(until, lambda: all(one.losses for one in herd), within_s=END_S, what="the loss")
        await asyncio.to_thread(until, lambda: all(one.bus.is_up() for one in herd), within_s=BACK_S, what="all hundred")
        await asyncio.to_thread(until, gateway.bus.is_up, within_s=BACK_S, what="the gateway")
        for one in herd:
            await gateway.bus.publish(f"n.{one.key.public}.req", b"x")
        await asyncio.to_thread(until, lambda: all(len(one.heard) == 1 for one in herd), within_s=END_S, what="that they hear")
        assert all(one.losses == 1 for one in herd)
        assert "refused us" not in caplog.text, "no login failed but for the broker's absence"
        await asyncio.to_thread(until, lambda: "ready" in readiness(arena.service), within_s=BACK_S, what="gateway and node")
        assert code_of(arena.service) == "ok"
    finally:
        await asyncio.gather(*(one.bus.close() for one in [*herd, gateway]))

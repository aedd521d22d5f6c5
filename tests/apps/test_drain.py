"""Stopping without losing a call: a node and a gateway that drain, the server's listener, and what signals ask for."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps import run as app
from fallow.apps.gateway import calls as gateway_calls
from fallow.apps.gateway import server as gateway_server
from fallow.apps.gateway.server import listen, make_server
from fallow.apps.node.node import Node
from fallow.model.errors import StartFailed
from fallow.model.owner import Verdict
from fallow.wire import codec

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import (
        SIGN,
        Endless,
        FakeClock,
        FakeServed,
        Network,
        Receive,
        Scope,
        Send,
        anybody,
        card_of,
        request_of,
        turns,
        until,
    )
else:
    from one_loop import SIGN, Endless, FakeClock, FakeServed, Network, Receive, Scope, Send, anybody, card_of, request_of, turns, until

LONG_S = 60.0
SHORT_S = 0.02
PAUSED = Verdict(state="pause", reason="input", detail="somebody types", cores=0, since_ms=0)


class Drained:
    """A node under way, and its drain."""

    def __init__(self, network: Network, node_id: str, served: FakeServed) -> None:
        self.network = network
        self.node_id = node_id
        self.node = Node(card_of(node_id), [served], MemoryBus(network.broker), FakeClock(), SIGN, anybody)
        self.now = asyncio.Event()
        self.closing = asyncio.Event()
        self.running = asyncio.ensure_future(self.node.run(self.closing))

    def begin(self, within_s: float = LONG_S) -> None:
        async def leave() -> None:
            await self.node.drain(self.now, within_s)
            self.closing.set()

        self.draining = asyncio.ensure_future(leave())

    async def end(self) -> None:
        """It has left by itself."""
        await asyncio.wait_for(asyncio.gather(self.draining, self.running), 5)

    def states(self) -> list[str]:
        """What its heartbeats said, in order."""
        beats = [codec.read_heartbeat(data, f"hb.{self.node_id}") for data in self.network.broker.sent_to(f"hb.{self.node_id}")]
        return [beat.state for beat in beats]


@contextlib.asynccontextmanager
async def node_of(network: Network, served: FakeServed, node_id: str = "node-a") -> AsyncIterator[Drained]:
    one = Drained(network, node_id, served)
    try:
        await network.knows(node_id)
        yield one
    finally:
        one.closing.set()
        await asyncio.wait_for(one.running, 5)


# the node
@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_drains_ends_what_it_began_and_takes_nothing_new(stream: bool) -> None:
    async with Network() as network:
        script = Endless()
        served = FakeServed(script)
        async with node_of(network, served) as one:
            call = network.ask(stream=stream)
            await until(lambda: script.wrote > 2)
            await network.add("node-b", FakeServed())
            late = await network.other.sealed("node-a", request_of("late"))
            one.begin()
            await until(lambda: set(network.gateway.roster.members()) == {"node-b"}, what="the node is off the roster")
            assert (await network.ask().done()).headers["fallow-node"] == "node-b"
            await network.other.send("node-a", request_of("late"), late)
            await turns()
            (refusal,) = network.other.heard["late"]
            assert getattr(refusal, "failure").code == "leaving"  # noqa: B009  (a Final; the test fails for anything else)
            assert not one.draining.done()
            assert served.inside == 1
            script.enough.set()
            await call.done()
            assert (call.status, call.headers["fallow-node"], call.headers["fallow-attempts"]) == (200, "node-a", "1")
            assert b"error" not in call.body
            await one.end()
            assert one.states()[-1] == "leave"


@pytest.mark.anyio
async def test_a_call_that_waits_for_a_slot_is_answered_too() -> None:
    async with Network() as network:
        script = Endless(b" ")
        served = FakeServed(script, slots=1, waiting_max=1)
        async with node_of(network, served) as one:
            calls = [network.ask(), network.ask()]
            await until(lambda: len(one.node.jobs) == 2)
            one.begin()
            await turns()
            script.enough.set()
            assert [(await call.done()).status for call in calls] == [200, 200]
            await one.end()


@pytest.mark.anyio
@pytest.mark.parametrize("signalled", [False, True])
async def test_what_takes_too_long_moves_to_another_node(signalled: bool) -> None:
    """At the end of the time, or at the second signal."""
    async with Network() as network:
        script = Endless()
        served = FakeServed(script)
        async with node_of(network, served) as one:
            call = network.ask()
            await until(lambda: script.wrote > 2)
            await network.add("node-b", FakeServed())
            one.begin(within_s=LONG_S if signalled else SHORT_S)
            if signalled:
                await turns()
                assert not one.draining.done()
                one.now.set()
            await call.done()
            assert (call.status, call.headers["fallow-node"], call.headers["fallow-attempts"]) == (200, "node-b", "2")
            await one.end()
            assert served.inside == 0


@pytest.mark.anyio
async def test_a_node_that_has_nothing_to_do_leaves_at_once() -> None:
    async with Network() as network, node_of(network, FakeServed()) as one:
        one.begin()
        await one.end()
        assert network.gateway.roster.members() == {}


@pytest.mark.anyio
async def test_an_owner_who_comes_back_does_not_wait_for_the_drain() -> None:
    async with Network() as network:
        script = Endless()
        served = FakeServed(script)
        async with node_of(network, served) as one:
            call = network.ask()
            await until(lambda: script.wrote > 2)
            await network.add("node-b", FakeServed())
            one.begin()
            await turns()
            one.node.take(PAUSED, True)
            await call.done()
            assert (call.status, call.headers["fallow-node"]) == (200, "node-b")
            await one.end()
            assert served.inside == 0
            left = one.states()
            assert set(left[left.index("leave") :]) == {"leave"}, "it goes for good, whatever the owner does"


@pytest.mark.anyio
async def test_a_node_without_a_broker_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_calls, "MOVE_S_MAX", 0.0)  # nor does the gateway
    async with Network() as network:
        script = Endless()
        async with node_of(network, FakeServed(script)) as one:
            call = network.ask()
            await until(lambda: script.wrote > 2)
            one.begin()
            await turns()
            network.broker.stop()
            await one.end()
            assert (await call.done()).code == "broker_lost"
            network.broker.up = True


# the gateway
@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_drains_answers_what_it_took_and_nothing_new(stream: bool) -> None:
    async with Network() as network:
        script = Endless()
        await network.add("node-a", FakeServed(script))
        call = network.ask(stream=stream)
        await until(lambda: script.wrote > 2)
        draining = asyncio.ensure_future(network.gateway.drain(asyncio.Event(), LONG_S))
        await turns()
        refused = await network.ask().done()
        assert (refused.status, refused.code) == (503, "gateway_stopping")
        script.enough.set()
        await call.done()
        assert call.status == 200
        assert b"error" not in call.body
        assert not draining.done(), "the server, which knows when nothing is open, cancels it"
        draining.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_ends_what_takes_too_long_with_a_word(stream: bool, signalled: bool) -> None:
    async with Network() as network:
        script = Endless()
        served = FakeServed(script)
        await network.add("node-a", served)
        call = network.ask(stream=stream)
        await until(lambda: script.wrote > 2)
        now = asyncio.Event()
        draining = asyncio.ensure_future(network.gateway.drain(now, LONG_S if signalled else SHORT_S))
        if signalled:
            await turns()
            assert not call.task.done()
            now.set()
        await call.done()
        await draining
        assert msgspec.json.decode(call.chunks[-1].removeprefix(b"data: "))["error"]["code"] == "gateway_stopping"
        await until(lambda: served.inside == 0, what="the engine's context is left")


# the server
class Slow:
    """An app whose answer waits for its end."""

    def __init__(self) -> None:
        self.inside = 0
        self.enough = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/quick":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        self.inside += 1
        try:
            gone = asyncio.ensure_future(self._gone(receive))
            enough = asyncio.ensure_future(self.enough.wait())
            await asyncio.wait([gone, enough], return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
        finally:
            self.inside -= 1

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class Served:
    """The app behind a server of its own, and how it is told to stop."""

    def __init__(self) -> None:
        self.app = Slow()
        self.drained = asyncio.Event()
        self.listener = listen("127.0.0.1", 0)
        self.port = int(self.listener.getsockname()[1])
        self.is_draining = False
        self.server = make_server(self.app, self._drain, drain_s=LONG_S)
        self.running: asyncio.Task[Any] = asyncio.ensure_future(self.server._serve([self.listener]))

    async def _drain(self) -> None:
        self.is_draining = True
        await self.drained.wait()

    async def ask(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET %s HTTP/1.1\r\nhost: here\r\n\r\n" % path.encode())
        return reader, writer

    async def stop(self) -> None:
        self.server.should_exit = True
        await until(lambda: self.is_draining, what="the drain")

    async def __aenter__(self) -> "Served":
        await until(lambda: self.server.started, what="the server")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.app.enough.set()
        self.drained.set()
        await asyncio.wait_for(self.running, 5)


@pytest.mark.anyio
async def test_a_server_that_stops_lets_go_of_its_port_and_answers_what_is_open() -> None:
    async with Served() as served:
        reader, writer = await served.ask("/slow")
        idle_reader, idle_writer = await served.ask("/quick")
        assert b"200" in await idle_reader.readuntil(b"\r\n\r\n")
        await until(lambda: served.app.inside == 1)
        await served.stop()
        assert await idle_reader.read() == b"", "a connection on which nothing is asked is closed"
        next_one = await until_free(served.port)
        next_one.close()
        assert not served.running.done()
        served.app.enough.set()
        answer = await reader.read()
        assert answer.endswith(b"ok")
        assert b"connection: close" in answer.lower()
        await asyncio.wait_for(served.running, 5)
        for one in (writer, idle_writer):
            one.close()


@pytest.mark.anyio
async def test_callers_that_do_not_read_even_the_last_word_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_server, "STOP_S", SHORT_S)
    async with Served() as served:
        _, writer = await served.ask("/slow")
        await until(lambda: served.app.inside == 1)
        await served.stop()
        served.drained.set()
        await asyncio.wait_for(served.running, 5)
        assert served.app.inside == 0
        writer.close()


async def until_free(port: int) -> socket.socket:
    """The next listener on the same port."""
    found: list[socket.socket] = []

    def take() -> bool:
        with contextlib.suppress(StartFailed):
            found.append(listen("127.0.0.1", port))
        return bool(found)

    await until(take, what="the port is free")
    return found[0]


# signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, app.INTERRUPTED), (signal.SIGHUP, 0)])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals, code: int) -> None:
    seen: list[bool] = []

    async def main(stop: app.Stop) -> None:
        for event in (stop.asked, stop.now):
            os.kill(os.getpid(), number)
            await asyncio.wait_for(event.wait(), 5)
            seen.append(stop.now.is_set())

    assert app.run(main) == code
    assert seen == [False, True]

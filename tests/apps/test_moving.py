"""Calls that move: a stream that breaks off goes on at another node, and a late priority call is sent to a second one."""

from typing import TYPE_CHECKING

import msgspec
import pytest

from fallow.apps.gateway import calls
from fallow.core import hedge
from fallow.model import messages as m
from fallow.model.errors import Failure
from fallow.model.receipt import Usage

if TYPE_CHECKING:
    from tests.apps.one_loop import MODEL, Network, PlayedNode, until
else:
    from one_loop import MODEL, Network, PlayedNode, until

pytestmark = pytest.mark.anyio
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=0)
USAGE = Usage(prompt_tokens=3, output_tokens=4)


def chunk(text: str | None, *, reason: str | None = None, **delta: object) -> bytes:
    """An event of a chat, as engines write it."""
    fields = {"content": text} if text is not None else {}
    choice = {"index": 0, "delta": {**fields, **delta}, "finish_reason": reason}
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "choices": [choice]}) + b"\n\n"


BEGIN = chunk("", role="assistant")
END = chunk(None, reason="stop") + b"data: [DONE]\n\n"
YIELDING = Failure(code="yielding", message="the owner needs it")


async def two(network: Network) -> dict[str, PlayedNode]:
    return {"node-a": await network.play("node-a"), "node-b": await network.play("node-b")}


async def asked(nodes: dict[str, PlayedNode]) -> tuple[PlayedNode, PlayedNode, m.Request]:
    """The node that got the call, the other one, and the request."""
    await until(lambda: any(node.requests.qsize() for node in nodes.values()), what="a request")
    first = next(node for node in nodes.values() if node.requests.qsize())
    other = next(node for node in nodes.values() if node is not first)
    return first, other, await first.request()


async def test_a_stream_that_breaks_off_goes_on_where_it_was() -> None:
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(stream=True)
        first, other, request = await asked(nodes)
        assert request.delivered is None
        await first.say(request, m.Part(index=0, data=BEGIN, head=EVENTS_HEAD))
        await first.say(request, m.Part(index=1, data=chunk("Once") + chunk(" upon")))
        await first.say(request, m.Final(index=2, failure=YIELDING))
        second = await other.request()
        assert second.delivered == ("Once", " upon")
        assert (second.call_id, second.made_at_s, second.body) == (request.call_id, request.made_at_s, request.body)
        await first.say(request, m.Part(index=2, data=chunk(" late")))
        await other.say(second, m.Part(index=0, data=chunk(" a"), head=EVENTS_HEAD))
        await other.say(second, m.Final(index=1, data=END, usage=USAGE))
        await call.done()
        moved = b": fallow-moved to " + other.node_id.encode() + b"\n\n"
        assert call.body == BEGIN + chunk("Once") + chunk(" upon") + moved + chunk(" a") + END
        assert call.status == 200


async def test_a_stream_of_which_only_the_head_came_is_not_begun_twice() -> None:
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(stream=True)
        first, other, request = await asked(nodes)
        await first.say(request, m.Part(index=0, data=BEGIN, head=EVENTS_HEAD))
        await first.say(request, m.Final(index=1, failure=YIELDING))
        second = await other.request()
        assert second.delivered == ()
        await other.say(second, m.Final(index=0, data=END, head=EVENTS_HEAD, usage=USAGE))
        await call.done()
        assert call.body.startswith(BEGIN)
        assert call.body.count(b'"role"') == 1
        assert call.body.endswith(END)


@pytest.mark.parametrize(
    "data",
    [
        b'data: {"n":1}\n\n',
        chunk(None, tool_calls=[{"index": 0, "function": {"name": "f"}}]),
        chunk("thought", reasoning_content="hm"),
        chunk("x")[:-1],  # the event isn't whole
        chunk("x", reason="stop"),
    ],
    ids=["no chat", "a tool's call", "a thought", "half an event", "the end was told"],
)
async def test_what_cannot_be_continued_says_so(data: bytes) -> None:
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(stream=True)
        first, other, request = await asked(nodes)
        await first.say(request, m.Part(index=0, data=data, head=EVENTS_HEAD))
        await first.say(request, m.Final(index=1, failure=YIELDING))
        await call.done()
        assert call.body.startswith(data)
        assert b"stream_interrupted" in call.body
        assert not other.requests.qsize()


async def test_nobody_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOVE_S_MAX", 0.0)
    async with Network() as network:
        node = await network.play("node-a")
        call = network.ask(stream=True)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=BEGIN + chunk("Once"), head=EVENTS_HEAD))
        await node.say(request, m.Final(index=1, failure=YIELDING))
        await call.done()
        assert call.body.startswith(BEGIN + chunk("Once"))
        assert b"stream_interrupted" in call.body


async def test_a_node_that_refuses_to_go_on_is_no_fault_of_the_call() -> None:
    async with Network() as network:
        nodes = await two(network)
        third = await network.play("node-c")
        nodes["node-c"] = third
        call = network.ask(stream=True)
        first, _, request = await asked(nodes)
        await first.say(request, m.Part(index=0, data=BEGIN + chunk("Once"), head=EVENTS_HEAD))
        await first.say(request, m.Final(index=1, failure=YIELDING))
        rest = {name: node for name, node in nodes.items() if node is not first}
        second, last, moved = await asked(rest)
        await second.say(moved, m.Final(index=0, failure=Failure(code="cannot_continue", message="")))
        again = await last.request()
        assert again.delivered == ("Once",)
        await last.say(again, m.Final(index=0, data=END, head=EVENTS_HEAD, usage=USAGE))
        await call.done()
        assert call.body.endswith(END)
        assert b"stream_interrupted" not in call.body


# hedging
def priority(*, stream: bool) -> bytes:
    fields = {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "hi"}], "service_tier": "priority"}
    return msgspec.json.encode(fields)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_late_priority_call_is_sent_to_a_second_node_and_the_loser_stops(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "SHARE_MAX", 1.0)
    monkeypatch.setattr(hedge, "LATE_MS_MIN", 10)
    monkeypatch.setattr(hedge, "LATE_FACTOR", 0.0)
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(body=priority(stream=stream))
        first, other, request = await asked(nodes)
        second = await other.request()
        assert second.attempt_id != request.attempt_id
        data = BEGIN + END if stream else b"{}"
        await other.say(second, m.Final(index=0, data=data, head=EVENTS_HEAD, usage=USAGE))
        await call.done()
        assert (call.status, call.body) == (200, data)
        assert call.headers["fallow-node"] == other.node_id
        await until(lambda: bool(first.heard_of(m.Cancel)), what="the loser is told")
        assert first.heard_of(m.Cancel) == [m.Cancel(attempt_id=request.attempt_id)]


async def test_the_second_node_fails_and_the_first_is_still_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "SHARE_MAX", 1.0)
    monkeypatch.setattr(hedge, "LATE_MS_MIN", 10)
    monkeypatch.setattr(hedge, "LATE_FACTOR", 0.0)
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(body=priority(stream=True))
        first, other, request = await asked(nodes)
        second = await other.request()
        await other.say(second, m.Final(index=0, failure=Failure(code="busy", message="")))
        await first.say(request, m.Final(index=0, data=BEGIN + END, head=EVENTS_HEAD, usage=USAGE))
        await call.done()
        assert (call.status, call.body) == (200, BEGIN + END)


async def test_most_calls_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "LATE_MS_MIN", 10)
    monkeypatch.setattr(hedge, "LATE_FACTOR", 0.0)
    async with Network() as network:
        nodes = await two(network)
        call = network.ask(body=priority(stream=True))
        first, other, request = await asked(nodes)
        await first.say(request, m.Accepted())
        for _ in range(20):
            await first.say(request, m.Alive())
        await first.say(request, m.Final(index=0, data=BEGIN + END, head=EVENTS_HEAD, usage=USAGE))
        await call.done()
        assert not other.requests.qsize()

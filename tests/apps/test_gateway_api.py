"""Every path of the API at the gateway: what reaches a node, how errors look to each client, keys, and `Prefer`."""

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import vendor
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.gateway import errors
from fallow.core import relay
from fallow.model import messages as m
from fallow.model.errors import Failure, WireError
from fallow.wire import codec
from fallow.wire import openai as wire

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY, MODEL, Asgi, FakeServed, Network, PlayedNode, offer_of, request_of, turns
else:
    from one_loop import KEY, MODEL, Asgi, FakeServed, Network, PlayedNode, offer_of, request_of, turns

pytestmark = pytest.mark.anyio

JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)
ALL = sorted(wire.HEADS)
STREAMED = [path for path in ALL if wire.read_head(path, b'{"model":"m"}').streams]
NOTHING = {"authorization": ""}
VERSION = {"anthropic-version": "2023-06-01"}


async def play(network: Network, node_id: str = "node-h") -> PlayedNode:
    """A node played by hand that offers every path."""
    node = PlayedNode(MemoryBus(network.broker), node_id)
    await node.start()
    offer = replace(offer_of(node_id), paths=frozenset(ALL))
    await node.beat(offers=(offer,))
    await network.knows(node_id)
    await turns()
    return node


def ask(
    network: Network, path: str, body: bytes = b'{"model":"tiny"}', *, method: str = "POST", headers: dict[str, str] | None = None
) -> Asgi:
    """A request with headers of the test's own; an empty one stands for none."""
    given = {"authorization": f"Bearer {KEY}"} | (headers or {})
    return Asgi(network.gateway.app, path, body, {name: value for name, value in given.items() if value}, method)


def is_right(path: str, call: Asgi) -> Any:
    """The error in the envelope that the path's clients read."""
    if path.startswith(wire.MESSAGES):
        vendor.check("anthropic", "ErrorResponse", call.json)
        assert call.json["request_id"] == call.headers["fallow-call"]
    else:
        vendor.check("openai", "ErrorResponse", call.json)
    return call.json["error"]


# paths
@pytest.mark.parametrize("path", ALL)
async def test_each_path_reaches_a_node(path: str) -> None:
    async with Network() as network:
        node = await play(network)
        body = b'{"model":"tiny","anything":["else"]}'
        call = ask(network, path, body)
        request = await node.request()
        assert (request.path, request.model, request.stream, request.body) == (path, MODEL, False, body)
        assert request.load_wait_ms is None
        await node.say(request, m.Final(index=0, data=b'{"whole":1}', head=JSON_HEAD))
        assert ((await call.done()).status, call.body) == (200, b'{"whole":1}')
        assert "preference-applied" not in call.headers


@pytest.mark.parametrize("path", STREAMED)
async def test_a_stream_on_each_path_that_has_one(path: str) -> None:
    async with Network() as network:
        node = await play(network)
        call = ask(network, path, b'{"model":"tiny","stream":true}')
        request = await node.request()
        assert request.stream
        await node.say(request, m.Part(index=0, data=b"event: a\ndata: 1\n\n", head=EVENTS_HEAD))
        await node.say(request, m.Final(index=1, data=b"data: 2\n\n"))
        await call.done()
        assert call.chunks == [b"event: a\ndata: 1\n\n", b"data: 2\n\n"]
        assert call.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"--boundary\r\ncontent-disposition: form-data", None),
        (b"[]", None),
        (b"{}", "model"),
        (b'{"model":7}', "model"),
        (b'{"model":"tiny","stream":"yes"}', "stream"),
        (b'{"model":"tiny","fallow":{"ring":"own"}}', "fallow.ring"),
    ],
)
async def test_a_head_that_is_wrong(path: str, body: bytes, param: str | None) -> None:
    async with Network() as network:
        node = await play(network)
        call = await ask(network, path, body).done()
        assert call.status == 400
        error = is_right(path, call)
        assert error["type"] == "invalid_request_error"
        assert error["code"] == "invalid_request"
        assert error.get("param", param) == param, "Anthropic's envelope doesn't have it"
        assert param is None or param in error["message"]
        assert node.requests.empty()


@pytest.mark.parametrize("path", [path for path in ALL if path not in STREAMED])
async def test_a_stream_where_there_is_none(path: str) -> None:
    async with Network() as network:
        await play(network)
        call = await ask(network, path, b'{"model":"tiny","stream":true}').done()
        assert call.status == 400
        assert "stream" in is_right(path, call)["message"]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        *((path, "GET", {}, 405) for path in ALL),
        *((path, "POST", NOTHING, 401) for path in ALL),
        *((path, "POST", NOTHING | {"x-api-key": "wrong"}, 401) for path in ALL),
        *((path, "POST", {"content-length": str(2**30)}, 413) for path in ALL if not path.startswith(wire.MESSAGES)),
        *((path, "POST", {"prefer": "wait=soon"}, 400) for path in ALL),
        ("/v1/nothing", "GET", {}, 404),
        ("/v1/calls", "GET", {}, 400),
        ("/v1/messages/batches", "POST", {}, 404),
        ("/v1/models/tiny", "DELETE", {}, 405),
        ("/v1/calls/call_1", "POST", {}, 405),
    ],
)
async def test_wrong_doors_speak_the_paths_language(path: str, method: str, headers: dict[str, str], status: int) -> None:
    async with Network() as network:
        await play(network)
        call = await ask(network, path, method=method, headers=headers).done()
        assert call.status == status
        is_right(path, call)


@pytest.mark.parametrize("path", ALL)
async def test_a_path_that_no_node_offers(path: str) -> None:
    """A node that only knows chats and completions, and a model that nobody has."""
    async with Network() as network:
        await network.add("node-a", FakeServed())
        offered = path in (wire.CHAT, wire.COMPLETIONS)
        call = await ask(network, path).done()
        assert call.status == (200 if offered else 400)
        if not offered:
            is_right(path, call)
        missing = await ask(network, path, b'{"model":"giant"}').done()
        assert missing.status == 404
        assert "giant" in is_right(path, missing)["message"]


# errors
@pytest.mark.parametrize("code", sorted(errors.TABLE))
def test_every_code_in_every_protocol(code: str) -> None:
    failure = Failure(code=code, message="why", param="x.y", retry_after_ms=1_500, progress=0.5)
    theirs = json.loads(errors.body_of(failure, "messages", "call_1"))
    assert theirs["error"]["message"] == "why"
    assert theirs["request_id"] == "call_1"
    is_in_the_file = code != "body_too_large"  # Anthropic's pages name its type, its schema doesn't
    if is_in_the_file:
        vendor.check("anthropic", "ErrorResponse", theirs)
    for protocol in ("openai", "responses"):
        vendor.check("openai", "ErrorResponse", json.loads(errors.body_of(failure, protocol, "call_1")))
    [(name, event)] = vendor.events(errors.event_of(failure, "responses", "call_1"))
    assert (name, event["code"], event["message"], event["param"]) == ("error", code, "why", "x.y")
    vendor.check("openai", "ResponseErrorEvent", event)
    [(name, event)] = vendor.events(errors.event_of(failure, "messages", "call_1"))
    assert (name, event["error"]["message"]) == ("error", "why")
    if is_in_the_file:
        vendor.check("anthropic", "ErrorResponse", event)
    [(name, event)] = vendor.events(errors.event_of(failure, "openai", "call_1"))
    assert (name, event["error"]["code"]) == ("", code)


@pytest.mark.parametrize(
    ("path", "anthropic", "protocol"),
    [
        (wire.CHAT, False, "openai"),
        (wire.CHAT, True, "openai"),
        (wire.RESPONSES, False, "responses"),
        (wire.RESPONSES_COUNT, False, "openai"),
        (wire.MESSAGES, False, "messages"),
        (wire.MESSAGES_COUNT, False, "messages"),
        (wire.MODELS, False, "openai"),
        (wire.MODELS + "/m", True, "messages"),
        (wire.CALLS + "/c", True, "openai"),
    ],
)
def test_whose_errors_a_path_answers(path: str, anthropic: bool, protocol: str) -> None:
    assert errors.protocol_of(path, anthropic=anthropic) == protocol


@pytest.mark.parametrize("path", ALL)
async def test_a_node_that_fails(path: str) -> None:
    async with Network() as network:
        node = await play(network)
        call = ask(network, path)
        text = "3000 tokens are over the 2048 of this model"
        failure = Failure(code="context_length_exceeded", message=text, param="messages")
        await node.say(await node.request(), m.Final(index=0, failure=failure))
        assert (await call.done()).status == 400
        error = is_right(path, call)
        assert error["message"] == text
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", STREAMED)
async def test_a_stream_that_breaks(path: str) -> None:
    async with Network() as network:
        node = await play(network)
        call = ask(network, path, b'{"model":"tiny","stream":true}')
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b"event: a\ndata: {}\n\n", head=EVENTS_HEAD))
        await node.say(request, m.Final(index=1, failure=Failure(code="engine_failed", message="the engine died")))
        await call.done()
        assert call.status == 200
        assert call.chunks[0] == b"event: a\ndata: {}\n\n"
        [(name, event)] = vendor.events(b"".join(call.chunks[1:]))
        if path == wire.MESSAGES:
            assert (name, event["type"], event["error"]["type"]) == ("error", "error", "api_error")
            assert event["request_id"] == call.headers["fallow-call"]
            vendor.check("anthropic", "ErrorResponse", event)
        elif path == wire.RESPONSES:
            assert (name, event["code"]) == ("error", "stream_interrupted")
            vendor.check("openai", "ResponseErrorEvent", event)
        else:
            assert (name, event["error"]["code"]) == ("", "stream_interrupted")
            vendor.check("openai", "ErrorResponse", event)
        assert b"[DONE]" not in call.body


# keys
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer  {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Bearer {KEY}", "x-api-key": "another's"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": KEY}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": f"Bearer {KEY}"}, 401),
        ({"authorization": KEY}, 401),
        ({}, 401),
    ],
)
async def test_both_ways_to_give_a_key(headers: dict[str, str], status: int) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        for path, method in ((wire.CHAT, "POST"), (wire.MODELS, "GET"), ("/fallow/status", "GET"), ("/fallow/nodes", "GET")):
            for _ in range(2):  # asked of the hub, then remembered
                call = await Asgi(network.gateway.app, path, b'{"model":"tiny"}' if method == "POST" else b"", headers, method).done()
                assert call.status == status, path
        if status == 401 and not any(headers.values()):
            assert "x-api-key" in call.json["error"]["message"]


# models
async def test_the_models_as_each_client_reads_them() -> None:
    async with Network() as network:
        for version in (None, VERSION):
            assert (await ask(network, wire.MODELS, b"", method="GET", headers=version).done()).json["data"] == []
        await play(network)
        ours = (await ask(network, wire.MODELS, b"", method="GET").done()).json
        vendor.check("openai", "ListModelsResponse", ours)
        theirs = (await ask(network, wire.MODELS, b"", method="GET", headers=VERSION).done()).json
        vendor.check("anthropic", "ListResponse_ModelInfo_", theirs)
        assert [one["id"] for one in ours["data"]] == [one["id"] for one in theirs["data"]] == [MODEL]
        assert theirs["data"][0]["max_input_tokens"] == offer_of("node-h").context_tokens
        one = await ask(network, f"{wire.MODELS}/{MODEL}", b"", method="GET", headers=VERSION).done()
        vendor.check("anthropic", "ModelInfo", one.json)
        none = await ask(network, f"{wire.MODELS}/giant", b"", method="GET", headers=VERSION).done()
        assert none.status == 404
        vendor.check("anthropic", "ErrorResponse", none.json)


# Prefer
@pytest.mark.parametrize(("prefer", "wait_s"), [("wait=60", 60), ("respond-async, wait=7", 7), ("wait=9999", 600), ("wait=0", 0)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_waits_for_a_model(prefer: str, wait_s: int, stream: bool) -> None:
    async with Network() as network:
        node = await play(network)
        call = ask(network, wire.CHAT, b'{"model":"tiny","stream":%s}' % str(stream).lower().encode(), headers={"prefer": prefer})
        request = await node.request()
        assert request.load_wait_ms == wait_s * 1000
        await node.say(request, m.Final(index=0, data=b"{}", head=EVENTS_HEAD if stream else JSON_HEAD))
        assert (await call.done()).headers["preference-applied"] == f"wait={wait_s}"
        failing = ask(network, wire.CHAT, headers={"prefer": prefer})
        await node.say(await node.request(), m.Final(index=0, failure=Failure(code="engine_stalled", message="no")))
        assert (await failing.done()).headers["preference-applied"] == f"wait={wait_s}"


async def test_a_preference_without_a_wait_changes_nothing() -> None:
    async with Network() as network:
        node = await play(network)
        call = ask(network, wire.CHAT, headers={"prefer": "respond-async, handling=lenient"})
        request = await node.request()
        assert request.load_wait_ms is None
        await node.say(request, m.Final(index=0, data=b"{}", head=JSON_HEAD))
        assert "preference-applied" not in (await call.done()).headers


@pytest.mark.parametrize(("prefer", "status"), [("wait=60", 200), ("", 504)])
async def test_the_first_token_may_take_as_long_as_the_caller_waits(prefer: str, status: int) -> None:
    """The node says each second that it lives; the answer begins after the usual time is over."""
    async with Network() as network:
        node = await play(network)
        call = ask(network, wire.CHAT, b'{"model":"tiny","stream":true}', headers={"prefer": prefer})
        request = await node.request()
        conversation = network.gateway.exchange._open[request.attempt_id]
        for _ in range(relay.FIRST_MS_MIN // 1_000 + 10):
            network.clock.advance(1_000)
            await node.say(request, m.Alive())
            await turns(3)
            conversation.hear(relay.Tick())
        await node.say(request, m.Final(index=0, data=b"data: 1\n\n", head=EVENTS_HEAD))
        assert (await call.done()).status == status


class OlderRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=1):
    """A request as nodes read it that know nothing of a wait."""

    attempt_id: str
    call_id: str
    gateway_id: str
    org_id: str
    key_id: str
    path: str
    model: str
    stream: bool
    body_bytes: int
    body: bytes


def test_older_and_newer_sides_read_each_other() -> None:
    plain = msgspec.structs.asdict(request_of("one"))
    older = OlderRequest(**{name: plain[name] for name in OlderRequest.__struct_fields__})
    newer = replace(request_of("one"), load_wait_ms=60_000)
    assert codec.request.read(bytes([codec.MAJOR]) + msgspec.msgpack.encode(older)) == request_of("one")
    assert msgspec.msgpack.decode(codec.encode(newer)[1:], type=OlderRequest) == older


@pytest.mark.parametrize(("load_wait_ms", "is_read"), [(None, True), (0, True), (600_000, True), (600_001, False), (-1, False)])
def test_a_wait_over_the_wire_has_bounds(load_wait_ms: int | None, is_read: bool) -> None:
    data = codec.encode(replace(request_of("one"), load_wait_ms=load_wait_ms))
    if is_read:
        assert codec.request.read(data).load_wait_ms == load_wait_ms
        return
    with pytest.raises(WireError):
        codec.request.read(data)

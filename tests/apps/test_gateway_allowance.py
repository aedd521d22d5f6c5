"""What a key may ask for at a time, at the gateway's door: refused before a body is read, given back at the end, told when to come."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import vendor
from msgspec.structs import replace
from one_key import OneKeyDesk

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.hub.founding import allowance_of
from fallow.apps.settings import Key
from fallow.core.admit import GATEWAY_CALLS_MAX
from fallow.model import messages as m
from fallow.model.call import Allowance
from fallow.model.ids import CallId, OrgId
from fallow.model.needs import Policy
from fallow.model.receipt import Usage
from fallow.model.views import Waiting, WaitingList
from fallow.wire import openai as wire
from fallow.wire import quote_request

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY, MODEL, ORG, Asgi, FakeServed, Network, turns
else:
    from one_loop import KEY, MODEL, ORG, Asgi, FakeServed, Network, turns

pytestmark = pytest.mark.anyio

LITTLE = "fk-little"
JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)


@contextlib.asynccontextmanager
async def little(network: Network, **allowed: Any) -> AsyncIterator[None]:
    """The hub's key is one that may ask for little at a time."""
    await network.hub_bus.close()
    bus = MemoryBus(network.broker)
    async with asyncio.TaskGroup() as group:
        await OneKeyDesk(bus, LITTLE, ORG, Policy(), Allowance(**allowed)).start(group)
        yield
        await bus.close()


def ask(network: Network, path: str = wire.CHAT, *, key: str = LITTLE, body: bytes = b'{"model":"tiny"}', method: str = "POST") -> Asgi:
    return Asgi(network.gateway.app, path, body, {"authorization": f"Bearer {key}"}, method)


async def waiting(network: Network, query: bytes = b"state=waiting", *, method: str = "GET", key: str = KEY) -> Asgi:
    async def with_query(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await network.gateway.app({**scope, "query_string": query}, receive, send)

    return await Asgi(with_query, wire.CALLS, b"", {"authorization": f"Bearer {key}"}, method).done()


# limits
@pytest.mark.parametrize("path", [wire.CHAT, wire.MESSAGES, wire.RESPONSES, wire.EMBEDDINGS, quote_request.PATH])
async def test_a_key_at_its_limit_is_refused_before_the_body_is_read(path: str) -> None:
    async with Network() as network, little(network, concurrency_max=1):
        node = await network.play("node-h")
        first = ask(network)
        request = await node.request()
        stories = len(network.gateway.history._running)
        parts_when_answered: list[int] = []

        async def noting(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            async def say(message: MutableMapping[str, Any]) -> None:
                parts_when_answered.append(refused.parts_sent)
                await send(message)

            await network.gateway.app(scope, receive, say)

        refused = Asgi(noting, path, [b"{", b"}"], {"authorization": f"Bearer {LITTLE}"}, "POST")
        await refused.done()
        assert (refused.status, parts_when_answered[0]) == (429, 0)
        anthropic = path.startswith(wire.MESSAGES)
        vendor.check(*(("anthropic", "ErrorResponse") if anthropic else ("openai", "ErrorResponse")), refused.json)
        assert refused.json["error"]["type"] == "rate_limit_error"
        assert "1 calls under way" in refused.json["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert len(network.gateway.history._running) == stories, "a flood of refusals pushes nobody's story out"
        await node.say(request, m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=Usage(prompt_tokens=1, output_tokens=1)))
        assert (await first.done()).status == 200
        again = ask(network)
        await node.say(await node.request(), m.Final(index=0, data=b"{}", head=JSON_HEAD))
        assert (await again.done()).status == 200


async def test_a_place_is_given_back_however_a_call_ends() -> None:
    async with Network() as network, little(network, concurrency_max=1):
        served = FakeServed()
        await network.add("node-a", served)
        assert (await ask(network).done()).status == 200
        assert (await ask(network, body=b"nonsense").done()).status == 400
        assert (await ask(network, body=b'{"model":"giant"}').done()).status == 404
        left = Asgi(network.gateway.app, wire.CHAT, [b"{", b"}"], {"authorization": f"Bearer {LITTLE}"}, "POST")
        left.parts_max = 1
        await turns()
        await left.leave()
        torn = Asgi(network.gateway.app, wire.CHAT, [b"{", b"}"], {"authorization": f"Bearer {LITTLE}"}, "POST")
        torn.parts_max = 1
        await turns()
        torn.task.cancel()
        await asyncio.wait([torn.task])
        assert (await ask(network).done()).status == 200


async def test_calls_a_minute() -> None:
    async with Network() as network, little(network, calls_per_minute=2):
        await network.add("node-a", FakeServed())
        assert [(await ask(network).done()).status for _ in range(3)] == [200, 200, 429]
        refused = await ask(network).done()
        assert (refused.code, refused.headers["retry-after"]) == ("rate_limit_exceeded", "31")
        network.clock.advance(30_000)
        assert [(await ask(network).done()).status for _ in range(2)] == [200, 429]


async def test_tokens_a_minute_are_those_that_were_counted() -> None:
    async with Network() as network, little(network, tokens_per_minute=1_000):
        served = FakeServed()
        served.usage = Usage(prompt_tokens=400, output_tokens=300)
        await network.add("node-a", served)
        assert [(await ask(network).done()).status for _ in range(3)] == [200, 200, 429]
        refused = await ask(network).done()
        assert "1000 tokens a minute" in refused.json["error"]["message"]
        assert refused.headers["retry-after"] == "25", "400 too many, at 1000 a minute"
        network.clock.advance(24_100)
        assert (await ask(network).done()).status == 200


async def test_a_call_that_came_to_nothing_takes_no_tokens() -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000}]}).encode()
    async with Network() as network, little(network, tokens_per_minute=100):
        assert [(await ask(network, body=body).done()).status for _ in range(3)] == [503] * 3
        node = await network.play("node-h")
        call = ask(network, body=body)
        await node.request()
        assert (await ask(network).done()).status == 429, "a prompt counts as soon as it is read"
        await call.leave()
        assert (await ask(network).done()).status == 429, "and if nobody counted"


async def test_other_pages_have_no_such_limit() -> None:
    async with Network() as network, little(network, calls_per_minute=1):
        await network.add("node-a", FakeServed())
        assert (await ask(network).done()).status == 200
        for path in (wire.MODELS, "/v1/calls/nobody", "/v1/prices"):
            assert (await ask(network, path, method="GET", body=b"").done()).status in (200, 404, 503)


async def test_a_full_gateway_predicts_when_there_is_room() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        api = network.gateway.api
        api.calls_now = GATEWAY_CALLS_MAX
        assert (await network.ask().done()).headers["retry-after"] == "1"
        api.calls_now = 0
        node = await network.play("node-h")
        await network.works()
        api._all = replace(api._all, mean_s=40.0, running=2, refused=0)
        api.calls_now = GATEWAY_CALLS_MAX
        told = [(await network.ask().done()).headers["retry-after"] for _ in range(4)]
        assert told == ["21", "41", "60", "60"]
        api.calls_now = 0
        api._all = replace(api._all, running=0)
        assert node.requests.empty()


@pytest.mark.parametrize(
    ("key", "allowance"),
    [
        (Key(), Allowance()),
        (
            Key(concurrency=8, calls_per_minute=60, tokens_per_minute=9_000, weight=2.5),
            Allowance(concurrency_max=8, calls_per_minute=60, tokens_per_minute=9_000, weight=2.5),
        ),
    ],
)
def test_the_allowance_of_the_settings(key: Key, allowance: Allowance) -> None:
    assert allowance_of(key) == allowance


# what a waiting call can know
@pytest.mark.parametrize("query", [b"", b"state=", b"state=running", b"state=waiting&state=done", b"\xff", b"&".join([b"a=b"] * 99)])
async def test_only_waiting_calls_can_be_listed(query: bytes) -> None:
    async with Network() as network:
        call = await waiting(network, query)
        assert (call.status, call.code, call.json["error"]["param"]) == (400, "invalid_request", "state")
        assert "?state=waiting" in call.json["error"]["message"]
        assert (await waiting(network, method="POST")).status == 405
        assert (await waiting(network, key="wrong")).status == 401


async def test_a_call_that_waits_for_its_turn_has_a_place_and_a_time() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        busy = [network.ask() for _ in range(2)]
        requests = [await node.request() for _ in busy]
        calls = [network.ask(), network.ask(body=b'{"model":"tiny","service_tier":"flex","messages":[]}')]
        await turns()
        found = await waiting(network)
        assert found.status == 200
        told = msgspec.json.decode(found.body, type=WaitingList)
        assert (told.total, [(one.position, one.estimate_s) for one in told.data]) == (2, [(1, None), (2, None)])
        for one in told.data:
            assert (one.model, one.path, one.why) == (MODEL, wire.CHAT, "all 2 slots for this model are taken")
            assert one.waited_ms > 0
            view = (await network.get(f"/v1/calls/{one.id}")).json
            assert (view["status"], view["waiting"]["position"], view["wait_why"]) == ("running", one.position, one.why)
        assert (await network.get(f"/v1/calls/{requests[0].call_id}")).json["waiting"] is None
        await calls[0].leave()
        assert (await network.get(f"/v1/calls/{told.data[0].id}")).json["status"] == "caller_left"
        network.clock.advance(6_000)
        await node.say(requests[0], m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=Usage(prompt_tokens=1, output_tokens=1)))
        last = await node.request()
        assert last.call_id == told.data[1].id, "its turn came"
        assert (await waiting(network)).json == {"object": "list", "data": [], "total": 0}
        more = network.ask()
        await turns()
        assert [one["estimate_s"] for one in (await waiting(network)).json["data"]] == [3.0]
        for request in (requests[1], last, None):
            await node.say(request or await node.request(), m.Final(index=0, data=b"{}", head=JSON_HEAD))
        for call in (*busy, calls[1], more):
            assert (await call.done()).status == 200


async def test_calls_that_wait_for_their_turn_are_told_from_the_turns() -> None:
    async with Network() as network:
        history = network.gateway.history
        assert history.turn_of("call_1") is None
        first = Waiting(position=7, estimate_s=21.0, why="taken")
        history.turn_of = {"call_1": first, "call_3": replace(first, position=8, estimate_s=None)}.get
        for n, org in enumerate((ORG, ORG, ORG, OrgId("elsewhere")), 1):
            history.begin(CallId(f"call_{n % 4}"), org, wire.CHAT, began_ns=0).names(MODEL)
        found = (await waiting(network)).json
        assert [(one["id"], one["position"], one["estimate_s"], one["why"]) for one in found["data"]] == [
            ("call_1", 7, 21.0, "taken"),
            ("call_3", 8, None, "taken"),
        ]
        assert (await network.get("/v1/calls/call_1")).json["waiting"] == {"position": 7, "estimate_s": 21.0, "why": "taken"}
        assert (await network.get("/v1/calls/call_2")).json["waiting"] is None
        for n in range(4):
            history.end(CallId(f"call_{n}"), http_status=0, left=True, usage=None)
        assert (await network.get("/v1/calls/call_1")).json["waiting"] is None

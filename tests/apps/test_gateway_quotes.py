"""`POST /v1/quotes` tells what a call would cost and where, without running it; and how a refusal is said."""

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from fallow.apps.gateway.errors import refused, status_of
from fallow.core.admit import BODY_BYTES_MAX, GATEWAY_CALLS_MAX
from fallow.core.match.filter import LIMITS
from fallow.model.card import Card, Hardware
from fallow.model.errors import MESSAGE_MAX
from fallow.model.offer import Price, Speed
from fallow.model.owner import State
from fallow.model.quote import Refuse, Stopped
from fallow.model.views import QuoteList
from fallow.wire import codec
from fallow.wire import openai as wire

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY, MODEL, Asgi, FakeServed, Network, PlayedNode, beat_of, card_of, offer_of, turns
else:
    from one_loop import KEY, MODEL, Asgi, FakeServed, Network, PlayedNode, beat_of, card_of, offer_of, turns

pytestmark = pytest.mark.anyio

PATH = "/v1/quotes"
CHAT = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Name three rivers. " * 20}]}
SPEED = Speed(prefill_tokens_per_s=400.0, decode_tokens_per_s=40.0)
GPU = Hardware(kind="gpu", isa="x86_64-avx2", cores=8, memory_bytes=2**35, gpu="L4")


def ask(network: Network, body: Any = None, *, headers: dict[str, str] | None = None, key: str = KEY, method: str = "POST") -> Asgi:
    data = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
    return Asgi(network.gateway.app, PATH, data, {"authorization": f"Bearer {key}"} | (headers or {}), method)


async def quotes(network: Network, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """The document, in the shape that is promised."""
    call = await ask(network, body, headers=headers).done()
    assert call.status == 200, call.body
    assert msgspec.json.encode(msgspec.json.decode(call.body, type=QuoteList)) == call.body
    return call.json


async def lends(
    network: Network,
    node_id: str,
    price: int = 100_000,
    *,
    speed: Speed = SPEED,
    card: Card | None = None,
    paths: frozenset[str] = frozenset({wire.CHAT, wire.COMPLETIONS}),
    state: State = "run",
) -> PlayedNode:
    """A node whose offer the test describes; a tenth of the price is asked for what is read."""
    node = await network.play(node_id)
    prices = Price(prompt_micro_per_munit=price // 10, output_micro_per_munit=price)
    offer = replace(offer_of(node_id, speed=speed), price=prices, paths=paths)
    beat = replace(beat_of(node_id, 5, offers=(offer,), state=state), card_sequence=2, card=card or card_of(node_id, sequence=2))
    await network.hand.publish(f"hb.{node_id}", codec.encode(beat))
    await turns()
    return node


# what is told
async def test_the_quotes_of_two_kinds_of_hardware() -> None:
    async with Network() as network:
        gpu = replace(card_of("node-g", sequence=2), hardware=GPU, region="eu-de")
        slow = await lends(network, "node-c")
        fast = await lends(network, "node-g", 300_000, speed=Speed(prefill_tokens_per_s=4_000.0, decode_tokens_per_s=200.0), card=gpu)
        told = await quotes(network)
        assert {name: told[name] for name in ("object", "model", "path", "refused")} == {
            "object": "fallow.quotes",
            "model": MODEL,
            "path": wire.CHAT,
            "refused": [],
        }
        assert told["prompt_tokens"] == len(json.dumps(CHAT)) // wire.BYTES_PER_TOKEN
        assert 0 < told["output_tokens"] <= 100
        cheap, dear = told["quotes"]
        assert [(one["node"], one["hardware"], one["region"]) for one in (cheap, dear)] == [
            ("node-c", "cpu", "here"),
            ("node-g", "gpu", "eu-de"),
        ]
        assert "gpu" not in cheap
        assert dear["gpu"] == "L4"
        for one in (cheap, dear):
            assert one["ring"] == "own"
            assert one["chance"] >= 0.95
            assert one["end_ms"] > one["first_token_ms"] > 0
            assert one["cost_max"] >= one["cost_expected"] > 0
        assert cheap["cost_expected"] < dear["cost_expected"]
        assert cheap["end_ms"] > dear["end_ms"]
        hurried = await quotes(network, CHAT | {"fallow": {"deadline_s": cheap["end_ms"] / 2000}})
        assert [one["node"] for one in hurried["quotes"]] == ["node-g", "node-c"], "who meets the needs comes first"
        assert hurried["quotes"][1]["chance"] < 0.95
        assert slow.requests.empty()
        assert fast.requests.empty()


@pytest.mark.parametrize(
    ("fallow", "headers", "limit", "lifts"),
    [
        ({"max_price": 0.05}, {}, "over_price", "raise max_price: the cheapest is 0.1"),
        ({}, {"Fallow-Max-Price": "0.05"}, "over_price", "raise max_price"),
        ({"region": "eu-fr"}, {}, "region", "allow another region; offered: here"),
        ({"hardware": "gpu"}, {}, "hardware", "allow the other kind of hardware"),
        ({"strict": True, "first_token_ms": 1}, {}, "too_slow", "leave out strict"),
    ],
)
async def test_what_stops_every_offer(fallow: Any, headers: dict[str, str], limit: str, lifts: str) -> None:
    async with Network() as network:
        await lends(network, "node-a")
        await lends(network, "node-b", 200_000)
        told = await quotes(network, CHAT | {"fallow": fallow}, headers)
        assert told["quotes"] == []
        [stopped] = told["refused"]
        assert (stopped["limit"], stopped["offers"]) == (limit, 2)
        assert lifts in stopped["lifted_by"]


async def test_some_can_and_some_cannot() -> None:
    async with Network() as network:
        await lends(network, "node-a")
        await lends(network, "node-b", 900_000)
        await lends(network, "node-c", state="pause")
        told = await quotes(network, CHAT | {"fallow": {"max_price": 0.5}})
        assert [one["node"] for one in told["quotes"]] == ["node-a"]
        assert {one["limit"]: one["offers"] for one in told["refused"]} == {"over_price": 1, "owner_is_back": 1}


async def test_a_quote_is_what_the_call_then_gets() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        [quote] = (await quotes(network))["quotes"]
        call = await network.ask(body=json.dumps(CHAT).encode()).done()
        told = (await network.get(f"/v1/calls/{call.headers['fallow-call']}")).json
        given = told["attempts"][0]["quote"]
        assert given.pop("chance") == pytest.approx(quote["chance"], abs=0.01), "the call itself is demand that is known by now"
        assert given == {name: value for name, value in quote.items() if name != "chance"}
        assert (call.headers["fallow-ring"], float(call.headers["fallow-cost-max"])) == (quote["ring"], quote["cost_max"])


# which endpoint it is for
TEXTS = frozenset({wire.CHAT, wire.COMPLETIONS, wire.RESPONSES, wire.MESSAGES, wire.EMBEDDINGS})


@pytest.mark.parametrize(
    ("body", "named", "paths", "path"),
    [
        ({"messages": []}, "", TEXTS, wire.CHAT),
        ({"messages": [], "max_tokens": 5, "system": "x"}, "", TEXTS, wire.CHAT),
        ({"messages": [], "max_tokens": 5}, wire.MESSAGES, TEXTS, wire.MESSAGES),
        ({"prompt": "x"}, "", TEXTS, wire.COMPLETIONS),
        ({"query": "x", "documents": ["y"]}, "", frozenset({wire.RERANK}), wire.RERANK),
        ({"input": "x", "stream": True}, "", TEXTS, wire.RESPONSES),
        ({"input": "x"}, "", frozenset({wire.EMBEDDINGS, wire.RERANK}), wire.EMBEDDINGS),
        ({"input": "x"}, wire.EMBEDDINGS, TEXTS, wire.EMBEDDINGS),
        ({}, wire.RERANK, frozenset({wire.RERANK}), wire.RERANK),
    ],
)
async def test_the_endpoint(body: Any, named: str, paths: frozenset[str], path: str) -> None:
    async with Network() as network:
        await lends(network, "node-a", paths=paths)
        told = await quotes(network, {"model": MODEL} | body, {"Fallow-Path": named} if named else {})
        assert (told["path"], len(told["quotes"])) == (path, 1)


async def test_an_endpoint_that_is_not_offered_is_told_as_a_limit() -> None:
    async with Network() as network:
        await lends(network, "node-a")
        told = await quotes(network, {"model": MODEL, "input": "x"})
        assert (told["path"], told["quotes"]) == (wire.EMBEDDINGS, [])
        assert [one["limit"] for one in told["refused"]] == ["path_not_offered"]


async def test_what_embeds_writes_nothing() -> None:
    async with Network() as network:
        embeds = Speed(prefill_tokens_per_s=100.0, writes=False)
        await lends(network, "node-a", speed=embeds, paths=frozenset({wire.EMBEDDINGS}))
        told = await quotes(network, {"model": MODEL, "input": "x" * 400})
        assert told["output_tokens"] == 0
        assert told["quotes"][0]["end_ms"] == told["quotes"][0]["first_token_ms"]


# what is wrong
@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        (b"nonsense", {}, None),
        ({"messages": []}, {}, "model"),
        ({"model": MODEL}, {}, "Fallow-Path"),
        ({"model": MODEL, "query": "x"}, {}, "Fallow-Path"),
        ({"model": MODEL, "messages": []}, {"Fallow-Path": "/v1/nothing"}, "Fallow-Path"),
        ({"model": MODEL, "messages": []}, {"Fallow-Path": PATH}, "Fallow-Path"),
        ({"model": MODEL, "messages": [], "max_tokens": 0}, {}, "max_tokens"),
        ({"model": MODEL, "messages": [], "fallow": {"ring": 1}}, {}, "fallow.ring"),
        ({"model": MODEL, "messages": [], "fallow": {"rings": ["market"]}}, {}, "fallow.rings"),
        ({"model": MODEL, "messages": []}, {"Fallow-Cost": "1"}, "fallow-cost"),
        ({"model": MODEL, "messages": []}, {"Prefer": "wait=long"}, "Prefer"),
        ({"model": MODEL, "input": "x", "stream": True}, {}, "stream"),
    ],
)
async def test_what_a_call_could_not_say_either(body: Any, headers: dict[str, str], param: str | None) -> None:
    async with Network() as network:
        await lends(network, "node-a")
        call = await ask(network, body, headers=headers).done()
        assert (call.status, call.code, call.json["error"]["param"]) == (400, "invalid_request", param)


async def test_the_header_is_for_quotes_only() -> None:
    async with Network() as network:
        call = await Asgi(
            network.gateway.app, wire.CHAT, json.dumps(CHAT).encode(), {"authorization": f"Bearer {KEY}", "Fallow-Path": wire.CHAT}, "POST"
        ).done()
        assert (call.status, call.json["error"]["param"]) == (400, "fallow-path")


async def test_a_model_that_nobody_offers_and_a_network_without_nodes() -> None:
    async with Network() as network:
        nobody = await ask(network).done()
        assert (nobody.status, nobody.code) == (503, "no_node")
        await lends(network, "node-a")
        unknown = await ask(network, CHAT | {"model": "giant"}).done()
        assert (unknown.status, unknown.code, unknown.json["error"]["param"]) == (404, "model_not_found", "model")
        assert MODEL in unknown.json["error"]["message"]


async def test_the_limits_of_calls_hold() -> None:
    async with Network() as network:
        await lends(network, "node-a")
        assert (await ask(network, key="wrong").done()).status == 401
        assert (await ask(network, method="GET").done()).code == "method_not_allowed"
        assert (await ask(network, headers={"content-length": str(BODY_BYTES_MAX + 1)}).done()).code == "body_too_large"
        network.gateway.api.calls_now = GATEWAY_CALLS_MAX
        assert (await ask(network).done()).code == "too_many_calls"
        network.gateway.api.calls_now = 0
        await quotes(network)
        assert (network.gateway.api.calls_now, network.gateway.api._bodies_bytes) == (0, 0)


async def test_it_leaves_no_trace() -> None:
    async with Network() as network:
        node = await lends(network, "node-a")
        sent = len(network.broker.sent_to("n.node-a"))
        for _ in range(3):
            await quotes(network)
        [shelf] = network.gateway.roster.market.shelves(MODEL)
        assert (list(shelf.wanted), shelf.bookings, network.gateway.demand._counts) == ([], {}, {})
        assert (network.gateway.history._running, network.gateway.history._ended) == ({}, {})
        assert len(network.broker.sent_to("n.node-a")) == sent
        assert node.requests.empty()


# how a refusal is said
OVER_PRICE = Stopped(limit="over_price", offers=12, lifted_by="raise max_price: the cheapest is 0.21")
REGION = Stopped(limit="region", offers=3, lifted_by="allow another region; offered: eu-fr")
RING = Stopped(limit="ring", offers=1, lifted_by="the key must allow another ring")


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        ((OVER_PRICE,), "no node can take this call: raise max_price: the cheapest is 0.21 (12 offers stopped by over_price)"),
        ((RING,), "no node can take this call: the key must allow another ring (1 offer stopped by ring)"),
        (
            (RING, REGION, OVER_PRICE),
            "no node can take this call: raise max_price: the cheapest is 0.21 (12 offers stopped by over_price); "
            "also 3 by region: allow another region; offered: eu-fr; also 1 by ring: the key must allow another ring",
        ),
        ((), "no node can take this call: start one"),
    ],
)
def test_a_refusal_in_words(stopped: tuple[Stopped, ...], said: str) -> None:
    last = stopped[-1] if stopped else Stopped(limit="no_nodes", offers=0, lifted_by="start one")
    assert refused(Refuse(limit=last.limit, lifted_by=last.lifted_by, stopped=stopped), MODEL).message == said


CODES = {
    "no_nodes": ("no_node", 503),
    "busy": ("no_capacity", 503),
    "engine_failed": ("no_node", 503),
    "backing_off": ("no_node", 503),
    "already_tried": ("no_node", 503),
    "offer_expired": ("no_node", 503),
    "owner_is_back": ("no_node", 503),
    "over_context": ("context_length_exceeded", 400),
    "model_not_offered": ("model_not_found", 404),
}


@pytest.mark.parametrize("limit", ["no_nodes", "model_not_offered", *LIMITS])
def test_the_code_of_each_limit(limit: str) -> None:
    failure = refused(Refuse(limit=limit, lifted_by="so", retry_after_ms=1_000), MODEL)
    assert (failure.code, status_of(failure).http) == CODES.get(limit, ("over_limits", 400))


def test_a_refusal_is_never_too_long() -> None:
    stopped = tuple(Stopped(limit=limit, offers=10_000, lifted_by="x" * 900) for limit in LIMITS)
    assert len(refused(Refuse(limit="busy", lifted_by="x" * 900, stopped=stopped), MODEL).message) == MESSAGE_MAX

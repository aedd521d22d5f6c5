"""What `/v1/calls/{id}` tells, to whom, and for how long."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace

from fallow.apps.gateway import history as history_module
from fallow.apps.gateway.history import ENDED_MAX, KEPT_MS, MODEL_CHARS_MAX, History
from fallow.model import messages as m
from fallow.model.errors import Failure
from fallow.model.ids import CallId, NodeId, OrgId
from fallow.model.offer import Price
from fallow.model.quote import Place, Quote
from fallow.model.receipt import Usage
from fallow.model.views import CallView
from fallow.wire.openai import CHAT

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import MODEL, ORG, Endless, FakeClock, FakeServed, Network, card_of, turns, until
else:
    from one_loop import MODEL, ORG, Endless, FakeClock, FakeServed, Network, card_of, turns, until

pytestmark = pytest.mark.anyio

JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)
HARDWARE = card_of("node-a").hardware.summary()
PRICE = Price(prompt_micro_per_munit=9_021, cached_prompt_micro_per_munit=1_000, output_micro_per_munit=128_402)


def quote_of(node_id: str, model: str = MODEL, cost_max_micro: int = 1_400) -> Quote:
    return Quote(
        node_id=NodeId(node_id),
        model=model,
        hardware="cpu",
        ring="partner",
        region="eu-de",
        cost_max_micro=cost_max_micro,
        cost_expected_micro=160,
        first_token_in_ms=1_234,
        per_token_ms=31.047,
        end_in_ms=29_176,
        chance=0.9731,
    )


def place_of(node_id: str, *others: Quote, **more: Any) -> Place:
    why = "the least expected cost of 4 offers that were likely to meet the call's needs"
    return Place(node_id=NodeId(node_id), quote=quote_of(node_id, **more), why=why, able=4, others=others)


async def story(network: Network, call_id: str) -> Any:
    """What the gateway tells of a call, in the shape that it promises."""
    call = await network.get(f"/v1/calls/{call_id}")
    assert call.status == 200, call.body
    assert msgspec.json.encode(msgspec.json.decode(call.body, type=CallView)) == call.body
    return call.json


# what it tells
async def test_a_call_that_went_well() -> None:
    async with Network() as network:
        served = FakeServed()
        served.usage = Usage(prompt_tokens=7, cached_tokens=2, output_tokens=3)
        await network.add("node-a", served)
        call = await network.ask().done()
        told = await story(network, call.headers["fallow-call"])
        assert 0 <= told.pop("first_byte_ms") <= told.pop("total_ms")
        [attempt] = told.pop("attempts")
        quote, ms = attempt.pop("quote"), attempt.pop("ms")
        assert ms >= 0
        assert attempt == {
            "node": "node-a",
            "hardware": HARDWARE,
            "ring": "own",
            "region": "here",
            "code": None,
            "why": "the least expected cost of 1 offer that was likely to meet the call's needs",
            "others": [],
        }
        assert (quote["node"], quote["model"], quote["hardware"]) == ("node-a", MODEL, "cpu")
        assert told.pop("predicted") == {"first_token_ms": quote["first_token_ms"], "end_ms": quote["end_ms"]}
        assert told.pop("actual") == {"first_token_ms": None, "end_ms": ms}, "an answer in one piece doesn't tell when it began"
        assert told == {
            "id": call.headers["fallow-call"],
            "object": "fallow.call",
            "path": CHAT,
            "model": MODEL,
            "status": "done",
            "http_status": 200,
            "code": None,
            "arrived_at": "2023-11-14T22:30:00.000Z",
            "prompt_tokens": 7,
            "cached_tokens": 2,
            "output_tokens": 3,
            "cost": 0.0,
            "waited_ms": None,
            "wait_why": None,
            "waiting": None,
        }


async def test_a_call_that_is_under_way() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=True)
        request = await node.request()
        told = await story(network, request.call_id)
        assert (told["status"], told["model"], told["http_status"], told["first_byte_ms"], told["total_ms"]) == (
            "running",
            MODEL,
            *(None,) * 3,
        )
        assert [(one["node"], one["code"], one["ms"]) for one in told["attempts"]] == [("node-h", None, None)]
        assert (told["actual"], told["cost"]) == ({"first_token_ms": None, "end_ms": None}, None)
        await node.say(request, m.Part(index=0, data=b"data: 1\n\n", head=EVENTS_HEAD))
        await until(lambda: call.chunks)
        told = await story(network, request.call_id)
        assert told["status"] == "running"
        assert told["first_byte_ms"] >= told["actual"]["first_token_ms"] >= 0
        await node.say(request, m.Final(index=1, data=b"data: 2\n\n"))
        await call.done()
        told = await story(network, request.call_id)
        assert told["status"] == "done"
        assert told["actual"]["end_ms"] >= told["actual"]["first_token_ms"] >= 0


async def test_a_call_that_took_two_nodes() -> None:
    async with Network() as network:
        first, second = await network.play("node-a"), await network.play("node-b")
        call = network.ask()
        request = await first.request()
        await first.say(request, m.Final(index=0, failure=Failure(code="busy", message="full")))
        again = await second.request()
        assert [one["node"] for one in (await story(network, request.call_id))["attempts"]] == ["node-a", "node-b"]
        await second.say(again, m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=Usage(prompt_tokens=1, output_tokens=2)))
        await call.done()
        told = await story(network, request.call_id)
        assert (told["status"], told["code"], told["http_status"], told["output_tokens"]) == ("done", None, 200, 2)
        assert [(one["node"], one["code"]) for one in told["attempts"]] == [("node-a", "busy"), ("node-b", None)]
        assert all(one["ms"] >= 0 for one in told["attempts"])


async def test_a_call_that_failed_everywhere() -> None:
    async with Network() as network:
        served = FakeServed()
        served.not_ready = Failure(code="model_loading", message="being loaded", retry_after_ms=1_000)
        for name in "abcd":
            await network.add(f"node-{name}", served)
        call = await network.ask().done()
        told = await story(network, call.headers["fallow-call"])
        assert (told["status"], told["code"], told["http_status"], told["first_byte_ms"]) == ("failed", "model_loading", 503, None)
        assert (told["prompt_tokens"], told["cached_tokens"], told["output_tokens"]) == (None, None, None)
        assert [one["code"] for one in told["attempts"]] == ["model_loading"] * 3


async def test_a_stream_that_broke_tells_what_the_caller_saw_and_what_the_node_said() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=True)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b"data: 1\n\n", head=EVENTS_HEAD))
        await node.say(request, m.Final(index=1, failure=Failure(code="engine_stalled", message="no progress")))
        await call.done()
        told = await story(network, request.call_id)
        assert (told["status"], told["http_status"], told["code"]) == ("failed", 200, "stream_interrupted")
        assert [one["code"] for one in told["attempts"]] == ["engine_stalled"]


@pytest.mark.parametrize(
    ("body", "model", "code", "http_status"),
    [
        (b"nonsense", None, "invalid_request", 400),
        (b'{"model":"tiny","max_tokens":0}', None, "invalid_request", 400),
        (b'{"model":"giant"}', "giant", "model_not_found", 404),
        (b'{"model":"%s"}' % (b"x" * 10_000), "x" * MODEL_CHARS_MAX + "…", "model_not_found", 404),
    ],
)
async def test_a_call_that_was_refused(body: bytes, model: str | None, code: str, http_status: int) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        call = await network.ask(body=body).done()
        told = await story(network, call.headers["fallow-call"])
        assert (told["status"], told["model"], told["code"], told["http_status"]) == ("failed", model, code, http_status)
        assert told["attempts"] == []


async def test_a_caller_who_left() -> None:
    async with Network() as network:
        script = Endless()
        served = FakeServed(script)
        await network.add("node-a", served)
        call = network.ask(stream=True)
        await until(lambda: call.chunks)
        await call.leave()
        told = await story(network, call.headers["fallow-call"])
        assert (told["status"], told["code"], told["http_status"]) == ("caller_left", None, 200)
        assert [(one["node"], one["code"]) for one in told["attempts"]] == [("node-a", None)]
        await until(lambda: served.inside == 0)


async def test_a_caller_who_left_before_the_body_was_whole() -> None:
    async with Network() as network:
        call = network.ask(body=[b"{", b"}"])
        call.parts_max = 1
        await turns()
        [call_id] = network.gateway.history._running
        assert (await story(network, call_id))["model"] is None
        await call.leave()
        told = await story(network, call_id)
        assert (told["status"], told["http_status"], told["attempts"]) == ("caller_left", None, [])


async def test_a_call_that_broke_the_gateway_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())

        async def breaks(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(network.gateway.calls, "run", breaks)
        call = await network.ask().done()
        told = await story(network, call.headers["fallow-call"])
        assert (call.status, told["status"], told["code"]) == (500, "failed", "internal_error")
        assert network.gateway.history._running == {}


async def test_a_call_that_is_torn_down_is_not_running_for_ever() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask()
        request = await node.request()
        call.task.cancel()
        await asyncio.wait([call.task])
        assert (await story(network, request.call_id))["status"] == "caller_left"


# to whom
async def test_only_the_own_organisation_is_told() -> None:
    async with Network() as network:
        history = network.gateway.history
        for org, call_id in ((ORG, "call_ours"), (OrgId("elsewhere"), "call_theirs"), (OrgId("elsewhere"), "call_running")):
            history.begin(CallId(call_id), org, CHAT, began_ns=0)
            if call_id != "call_running":
                history.end(CallId(call_id), http_status=200, left=False, usage=None)
        assert (await network.get("/v1/calls/call_ours")).status == 200
        unknown = await network.get("/v1/calls/call_nobody")
        assert (unknown.status, unknown.code) == (404, "call_not_found")
        for call_id in ("call_theirs", "call_running"):
            theirs = await network.get(f"/v1/calls/{call_id}")
            assert (theirs.status, theirs.body) == (unknown.status, unknown.body)
        assert (await network.get("/v1/calls/call_ours", key="wrong")).status == 401
        history.end(CallId("call_running"), http_status=0, left=True, usage=None)


async def test_a_call_without_a_known_key_leaves_no_story() -> None:
    async with Network() as network:
        await network.ask(key="wrong").done()
        assert (network.gateway.history._running, network.gateway.history._ended) == ({}, {})


async def test_other_pages_are_no_calls() -> None:
    async with Network() as network:
        for path in ("/v1/models", "/v1/nothing", CHAT):
            await network.get(path)
        assert (network.gateway.history._running, network.gateway.history._ended) == ({}, {})


# for how long
def ended(history: History, number: int) -> CallId:
    call_id = CallId(f"call_{number:024x}")
    told = history.begin(call_id, ORG, CHAT, began_ns=0)
    told.names(MODEL)
    name = "node-0123456789abcdef"
    told.trying(NodeId(name), HARDWARE, place_of(name, quote_of(name), quote_of(name), quote_of(name)), PRICE)
    told.tried(None)
    history.end(call_id, http_status=200, left=False, usage=Usage(prompt_tokens=5_000, cached_tokens=3_000, output_tokens=900))
    return call_id


def test_an_hour_and_no_longer() -> None:
    clock = FakeClock()
    history = History(clock)
    first = ended(history, 1)
    clock.advance(KEPT_MS // 2)
    second = ended(history, 2)
    clock.advance(KEPT_MS // 2)
    assert history.view(first, ORG) is not None
    clock.advance(1)
    assert history.view(first, ORG) is None, "even before the sweep comes by"
    history.forget_old()
    assert list(history._ended) == list(history._order) == [second]
    clock.advance(KEPT_MS)
    history.forget_old()
    history.forget_old()
    assert (history._ended, list(history._order)) == ({}, [])


def test_a_call_that_runs_is_not_forgotten() -> None:
    clock = FakeClock()
    history = History(clock)
    history.begin(CallId("call_long"), ORG, CHAT, began_ns=0)
    clock.advance(10 * KEPT_MS)
    history.forget_old()
    view = history.view("call_long", ORG)
    assert view is not None
    assert view.status == "running"


def test_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "ENDED_MAX", 3)
    history = History(FakeClock())
    ids = [ended(history, number) for number in range(10)]
    assert [call_id for call_id in ids if history.view(call_id, ORG) is not None] == ids[-3:]
    assert len(history._ended) == len(history._order) == 3


def test_a_story_is_small() -> None:
    """The bound on the gateway's memory: so many stories, each of so many bytes."""
    history = History(FakeClock())
    call_id = ended(history, 1)
    assert ENDED_MAX == 8_192
    assert len(history._ended[call_id]) + len(call_id) <= 650, "what Python needs around them comes on top"


async def test_the_gateways_own_sweep_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        await network.works()
        assert len(network.gateway.history._ended) == 1
        monkeypatch.setattr(history_module, "KEPT_MS", -1)
        await until(lambda: network.gateway.history._ended == {}, what="the sweep")


def test_a_story_survives_its_packing() -> None:
    history = History(FakeClock())
    call_id = CallId("call_1")
    told = history.begin(call_id, ORG, CHAT, began_ns=0)
    told.names("modèle", streams=True)
    told.waits("a cheaper offer is busy now")
    told.trying(NodeId("node-a"), "", place_of("node-a"), PRICE)
    told.tried("busy")
    told.trying(NodeId("node-b"), "cpu", place_of("node-b", quote_of("node-c", model="other"), quote_of("node-d")), PRICE)
    told.first_byte()
    running = history.view(call_id, ORG)
    history.end(call_id, http_status=0, left=True, usage=None)
    view = history.view(call_id, ORG)
    assert running is not None
    assert view is not None
    assert view == replace(running, status="caller_left", total_ms=view.total_ms)
    attempt = view.attempts[1]
    assert (attempt.node, attempt.hardware, attempt.ring, attempt.region, attempt.code) == ("node-b", "cpu", "partner", "eu-de", None)
    assert [(one.node, one.model) for one in attempt.others] == [("node-c", "other"), ("node-d", MODEL)]
    quote = json.loads(msgspec.json.encode(attempt.quote))
    assert quote == {
        "node": "node-b",
        "model": MODEL,
        "hardware": "cpu",
        "ring": "partner",
        "region": "eu-de",
        "cost_max": 0.0014,
        "cost_expected": 0.00016,
        "first_token_ms": 1_234,
        "per_token_ms": 31.047,
        "end_ms": 29_176,
        "chance": 0.9731,
    }


# what it cost, and what it waited for
@pytest.mark.parametrize(
    ("usage", "cost_max_micro", "cost"),
    [
        (Usage(prompt_tokens=1_000, cached_tokens=600, output_tokens=100), 1_000, 1.7049e-5),
        (Usage(prompt_tokens=1, output_tokens=1), 1_000, 1.37e-7),
        (Usage(prompt_tokens=1_000_000, output_tokens=1_000_000), 1_400, 0.0014),
        (Usage(prompt_tokens=2**40, output_tokens=2**40), 2**60, 151_098.186423861),
        (Usage(), 1_400, 0.0),
        (None, 1_400, None),
    ],
)
def test_what_a_call_cost(usage: Usage | None, cost_max_micro: int, cost: float | None) -> None:
    history = History(FakeClock())
    call_id = CallId("call_1")
    told = history.begin(call_id, ORG, CHAT, began_ns=0)
    told.trying(NodeId("node-a"), "", place_of("node-a", cost_max_micro=cost_max_micro), PRICE)
    told.tried(None)
    history.end(call_id, http_status=200, left=False, usage=usage)
    view = history.view(call_id, ORG)
    assert view is not None
    assert view.cost == cost


def test_a_call_that_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now_us = 0
    monkeypatch.setattr(history_module.Story, "_us", lambda _: now_us)
    history = History(FakeClock())
    call_id = CallId("call_1")
    told = history.begin(call_id, ORG, CHAT, began_ns=0)

    def waited() -> tuple[float | None, str | None]:
        view = history.view(call_id, ORG)
        assert view is not None
        return view.waited_ms, view.wait_why

    assert waited() == (None, None)
    now_us = 1_000_000
    told.waits("first")
    now_us = 2_000_000
    told.waits("then")
    now_us = 2_500_000
    assert waited() == (1_500.0, "then"), "it still waits"
    told.trying(NodeId("node-a"), "", place_of("node-a"), PRICE)
    now_us = 9_000_000
    assert waited() == (1_500.0, "then"), "being answered is no waiting"
    told.tried("busy")
    told.waits("again")
    now_us = 9_250_000
    history.end(call_id, http_status=0, left=True, usage=None)
    assert waited() == (1_750.0, "again")


# what a call that waits can know
def test_calls_that_wait_for_a_better_moment_have_a_place_and_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_us = 0
    monkeypatch.setattr(history_module.Story, "_us", lambda _: now_us)
    history = History(FakeClock())
    stories = {}
    for name, org, model in (
        ("a", ORG, MODEL),
        ("b", OrgId("elsewhere"), MODEL),
        ("c", ORG, "other"),
        ("d", ORG, MODEL),
        ("e", ORG, MODEL),
    ):
        stories[name] = history.begin(CallId(name), org, CHAT, began_ns=0)
        stories[name].names(model)
    for name in "abcd":
        stories[name].waits("a cheaper offer is busy now", 3_000)

    def told(name: str, org: OrgId = ORG) -> tuple[int, float | None, str] | None:
        view = history.view(name, org)
        assert view is not None
        return None if view.waiting is None else (view.waiting.position, view.waiting.estimate_s, view.waiting.why)

    now_us = 1_000_000
    why = "a cheaper offer is busy now"
    assert [told("a"), told("c"), told("d"), told("e")] == [(1, 2.0, why), (1, 2.0, why), (3, 2.0, why), None]
    assert told("b", OrgId("elsewhere")) == (2, 2.0, why)
    listed = history.waiting(ORG)
    assert [(one.id, one.position, one.model, one.waited_ms) for one in listed.data] == [
        ("a", 1, MODEL, 1_000.0),
        ("c", 1, "other", 1_000.0),
        ("d", 3, MODEL, 1_000.0),
    ]
    stories["a"].trying(NodeId("node-a"), "", place_of("node-a"), PRICE)
    assert (told("a"), told("d")) == (None, (2, 2.0, why))
    now_us = 9_000_000
    assert told("d") == (2, 0.0, why), "it is about to be looked at"
    history.end(CallId("d"), http_status=0, left=True, usage=None)
    assert told("d") is None


def test_a_long_list_of_waiting_calls_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "LISTED_MAX", 2)
    history = History(FakeClock())
    for n in range(5):
        history.begin(CallId(f"call_{n}"), ORG, CHAT, began_ns=0).waits("busy")
    listed = history.waiting(ORG)
    assert (len(listed.data), listed.total) == (2, 5)
    assert history.waiting(OrgId("elsewhere")).total == 0

"""Requests that come again under an `Idempotency-Key`: one run, one answer for all, within limits, whoever leaves."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from clocks import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.apps.gateway import repeats as repeats_module
from fallow.apps.gateway.attempts import Origin
from fallow.apps.gateway.caller import CallerGone, HttpCaller, Receive, Scope, Send
from fallow.apps.gateway.errors import status_of
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.repeats import PIECE_BYTES, Repeats
from fallow.core import repeat
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import EngineStalled, Failure, FallowError, InvalidRequest
from fallow.model.ids import KeyId, NodeId, OrgId
from fallow.model.offer import Price
from fallow.model.quote import Place, Quote
from fallow.model.receipt import Usage
from fallow.wire.openai import CHAT, MESSAGES

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import KEY, Asgi, FakeServed, Network, turns, until
else:
    from one_loop import KEY, Asgi, FakeServed, Network, turns, until

pytestmark = pytest.mark.anyio

JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)
QUOTE = Quote(
    node_id=NodeId("node-a"),
    model="tiny",
    hardware="cpu",
    ring="own",
    region="here",
    cost_max_micro=9,
    cost_expected_micro=5,
    first_token_in_ms=1,
    per_token_ms=1.0,
    end_in_ms=9,
    chance=1.0,
)
PLACE = Place(node_id=NodeId("node-a"), quote=QUOTE, why="it is there", able=1)
ORIGIN = Origin(node_id=NodeId("node-a"), hardware="cpu x", attempts=1, place=PLACE, price=Price(), readers="hub, node")
GRANT = Grant(key_id=KeyId("key-1"), org_id=OrgId("home"))
PIECES = [b"data: %d\n\n" % number for number in range(5)]

Play = Callable[[HttpCaller, bytes], Awaitable[int]]


async def whole(http: HttpCaller, body: bytes) -> int:
    """A node's answer that is given in one."""
    http.trying(ORIGIN)
    await http.finish(b'{"said":' + body + b"}", JSON_HEAD, ORIGIN)
    return http.status


async def bad_input(http: HttpCaller, body: bytes) -> int:
    await turns()
    raise InvalidRequest("it can't be understood", param="model")


def fails(code: str, *, node_asked: bool, raises: bool = False) -> Play:
    async def play(http: HttpCaller, body: bytes) -> int:
        await turns()
        if node_asked:
            http.trying(ORIGIN)
        if raises:
            raise EngineStalled("no progress")
        return await http.fail(Failure(code=code, message="why", retry_after_ms=2_000))

    return play


def large(size: int) -> Play:
    async def play(http: HttpCaller, body: bytes) -> int:
        http.trying(ORIGIN)
        await http.finish(bytes(size), JSON_HEAD, ORIGIN)
        return http.status

    return play


class Stream:
    """An answer piece by piece, each when the test says so."""

    def __init__(self, pieces: list[bytes] | None = None, *, free: bool = False) -> None:
        self.pieces = PIECES if pieces is None else pieces
        self.room = asyncio.Semaphore(len(self.pieces) + 1 if free else 0)
        self.wrote = 0

    def let(self, count: int) -> None:
        for _ in range(count):
            self.room.release()

    async def __call__(self, http: HttpCaller, body: bytes) -> int:
        http.trying(ORIGIN)
        await http.begin(EVENTS_HEAD, ORIGIN)
        for piece in self.pieces:
            await self.room.acquire()
            await http.write(piece)
            self.wrote += 1
        await self.room.acquire()
        await http.finish(b"", None, ORIGIN)
        return http.status


class App:
    """As much of the gateway's API as this is about: the body is read, then the call is run or repeated."""

    def __init__(self, play: Play = whole) -> None:
        self.play = play
        self.clock = FakeClock()
        self.repeats = Repeats(self.clock)
        self.metrics = Metrics()
        self.runs = 0
        self.grant = GRANT
        self.left = 0
        self.callers: list[HttpCaller] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpCaller(scope, receive, send, self.metrics)
        self.callers.append(http)

        async def run(body: bytes) -> int:
            self.runs += 1
            return await self.play(http, body)

        try:
            await self.repeats.answer(http, self.grant, await http.incoming.body(), run)
        except CallerGone:
            self.left += 1
        except FallowError as error:
            await http.fail(error.failure())
        except ZeroDivisionError:
            await http.fail(Failure(code="internal_error", message="it broke"))

    def ask(self, key: str | None = "k", body: bytes = b"{}", *, path: str = CHAT, anthropic: bool = False) -> Asgi:
        headers = {} if key is None else {"idempotency-key": key}
        return Asgi(self, path, body, headers | ({"anthropic-version": "1"} if anthropic else {}), "POST")


def are_same(*calls: Asgi) -> None:
    """One status, one set of headers and one body; all but the first say that they are repeats."""
    first, *others = calls
    for call in others:
        assert call.status == first.status
        assert call.headers == first.headers | {"fallow-repeated": "1"}
        assert call.body == first.body
    assert "fallow-repeated" not in first.headers


# one run
async def test_a_repeat_gets_the_same_answer() -> None:
    app = App()
    calls = [await app.ask().done() for _ in range(3)]
    assert app.runs == 1
    assert calls[0].status == 200
    assert calls[0].body == b'{"said":{}}'
    assert calls[0].headers["fallow-call"] == app.callers[0].call_id
    are_same(*calls)
    assert [http.is_repeat for http in app.callers] == [False, True, True]


async def test_without_a_key_nothing_is_repeated() -> None:
    app = App()
    calls = [await app.ask(None).done() for _ in range(2)]
    assert app.runs == 2
    assert calls[0].headers["fallow-call"] != calls[1].headers["fallow-call"]
    assert app.repeats.count == app.repeats.bytes == 0


async def test_a_stream_is_repeated_byte_for_byte() -> None:
    app = App(Stream(free=True))
    calls = [await app.ask().done() for _ in range(2)]
    assert app.runs == 1
    assert calls[0].body == b"".join(PIECES)
    assert calls[0].headers["content-type"] == "text/event-stream"
    are_same(*calls)


async def test_those_who_ask_meanwhile_follow_live() -> None:
    app = App(stream := Stream())
    first, early = app.ask(), app.ask()
    for count in (1, 2):
        stream.let(1)
        await until(lambda: first.body == early.body == b"".join(PIECES[:count]))  # noqa: B023  (it is over before the next turn)
    late = app.ask()
    await until(lambda: late.body == b"".join(PIECES[:2]))
    assert first.chunks == PIECES[:2], "each piece as it came"
    assert app.runs == 1
    stream.let(len(PIECES))
    are_same(*[await call.done() for call in (first, early, late, app.ask())])
    assert app.runs == 1
    assert first.body == b"".join(PIECES)


async def test_two_at_once_of_which_none_has_begun() -> None:
    app = App(stream := Stream())
    calls = [app.ask() for _ in range(4)]
    await turns()
    assert app.runs == 1
    stream.let(9)
    are_same(*[await call.done() for call in calls])
    assert app.runs == 1


STEP = st.tuples(st.sampled_from(["write", "ask", "leave", "stall"]), st.integers(0, 5), st.integers(0, 9))


@settings(max_examples=80)
@given(pieces=st.lists(st.binary(max_size=9), max_size=6), steps=st.lists(STEP, max_size=10))
async def test_everybody_gets_the_same_bytes_whenever_they_come_or_go(pieces: list[bytes], steps: list[tuple[str, int, int]]) -> None:
    app, answer = App(stream := Stream(pieces)), b"".join(pieces)
    calls = [app.ask()]
    for action, number, wait in steps:
        call = calls[number % len(calls)]
        match action:
            case "write":
                stream.let(1)
            case "ask":
                calls.append(app.ask())
            case "leave":
                call.gone.set()
            case "stall":
                call.reads.clear()
        await turns(wait)
    stream.let(len(pieces) + 1)
    assert (await app.ask().done()).body == answer
    for call in calls:
        call.reads.set()
        await call.done()
        assert call.body == answer or (call.gone.is_set() and answer.startswith(call.body))
    assert app.runs == 1
    assert app.repeats.bytes == len(answer)


# another request
@pytest.mark.parametrize(
    ("body", "path"), [(b'{"a":1}', CHAT), (b"{} ", CHAT), (b"", CHAT), (b"{}", "/v1/completions"), (b"{}", "/v1/quotes")]
)
async def test_another_request_under_the_same_key(body: bytes, path: str) -> None:
    app = App(stream := Stream())
    first = app.ask()
    await turns()
    for _ in range(2):  # while it runs, and after
        other = await app.ask(body=body, path=path).done()
        assert "fallow-repeated" not in other.headers
        assert other.headers["fallow-call"] == app.callers[-1].call_id
        assert other.json["error"]["param"] == "Idempotency-Key"
        assert other.code == "idempotency_conflict"
        assert other.status == status_of(Failure(code=other.code, message="")).http
        stream.let(9)
        await first.done()
    assert app.runs == 1
    assert (await app.ask("other", body, path=path).done()).status == 200


async def test_keys_of_others_are_others_keys() -> None:
    app = App()
    for org, key in (("home", "key-1"), ("home", "key-2"), ("town", "key-1")):
        app.grant = Grant(key_id=KeyId(key), org_id=OrgId(org))
        call = await app.ask(body=f'"{org} {key}"'.encode()).done()
        assert call.json == {"said": f"{org} {key}"}
        assert "fallow-repeated" not in call.headers
    assert app.runs == 3


@pytest.mark.parametrize("key", ["", '"', '""', "a" * 256, "a\tb", "schlüssel"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_what_is_no_key(key: str, path: str) -> None:
    app = App()
    call = await app.ask(key, path=path).done()
    assert (call.status, call.code) == (400, "invalid_request")
    assert app.runs == app.repeats.count == 0
    assert "Idempotency-Key" in call.json["error"]["message"]
    if path == MESSAGES:
        assert call.json["type"] == "error"
        assert call.json["request_id"] == call.headers["fallow-call"]
    else:
        assert call.json["error"]["param"] == "Idempotency-Key"


async def test_a_key_with_and_without_quotes() -> None:
    app = App()
    are_same(await app.ask("a-1").done(), await app.ask('"a-1"').done(), await app.ask(' "a-1";v=1').done())
    assert app.runs == 1


# what is kept
@pytest.mark.parametrize(
    ("play", "status", "kept"),
    [
        pytest.param(bad_input, 400, False, id="the caller may correct the body"),
        pytest.param(fails("model_not_found", node_asked=False), 404, False, id="the model may come"),
        pytest.param(fails("no_capacity", node_asked=False), 503, False, id="try again"),
        pytest.param(fails("busy", node_asked=True), 503, False, id="try again, said a node"),
        pytest.param(fails("broker_lost", node_asked=True), 503, False, id="try again, the broker was away"),
        pytest.param(fails("engine_failed", node_asked=True), 502, True, id="it ran"),
        pytest.param(fails("", node_asked=True, raises=True), 502, True, id="it ran, and raised"),
        pytest.param(fails("schema_not_met", node_asked=True), 422, True, id="it ran to no good end"),
    ],
)
async def test_which_errors_are_the_calls_answer(play: Play, status: int, kept: bool) -> None:
    app = App(play)
    first, beside = app.ask(), app.ask()
    are_same(await first.done(), await beside.done())
    assert first.status == status
    assert app.runs == 1, "who asks beside gets the same answer, kept or not"
    again = await app.ask(body=b"{}" if kept else b'{"better":1}').done()
    assert app.runs == (1 if kept else 2)
    assert again.status == status
    assert (again.headers["fallow-call"] == first.headers["fallow-call"]) is kept
    assert app.repeats.count == int(kept)
    assert app.repeats.bytes == (len(first.body) if kept else 0)


async def test_after_a_refusal_the_same_key_succeeds() -> None:
    app = App(fails("no_capacity", node_asked=False))
    refused = await app.ask().done()
    assert int(refused.headers["retry-after"]) == 2
    app.play = whole
    are_same(await app.ask().done(), await app.ask().done())
    assert app.runs == 2


async def test_a_stream_that_broke_is_repeated_with_its_error() -> None:
    async def breaks(http: HttpCaller, body: bytes) -> int:
        http.trying(ORIGIN)
        await http.begin(EVENTS_HEAD, ORIGIN)
        await http.write(PIECES[0])
        await http.fail(Failure(code="node_silent", message="gone"))
        return http.status

    app = App(breaks)
    are_same(first := await app.ask().done(), await app.ask().done())
    assert first.body.startswith(PIECES[0])
    assert b"stream_interrupted" in first.body
    assert app.runs == 1


@pytest.mark.parametrize("node_asked", [False, True])
async def test_a_fault_of_the_gateway(node_asked: bool) -> None:
    """It is the outermost loop that answers, so the answer can't be kept; what may have run isn't run again."""
    ready = asyncio.Event()

    async def faulty(http: HttpCaller, body: bytes) -> int:
        if node_asked:
            http.trying(ORIGIN)
        await ready.wait()
        raise ZeroDivisionError

    app = App(faulty)
    first, beside = app.ask(), app.ask()
    await turns()
    ready.set()
    assert ((await first.done()).status, first.code) == (500, "internal_error")
    assert (await beside.done()).code == "idempotency_answer_too_long"
    app.play = whole
    again = await app.ask().done()
    assert (again.status == 200) is not node_asked
    assert app.runs == (1 if node_asked else 2)


async def test_a_fault_after_the_beginning_ends_the_stream_with_an_error() -> None:
    ready = asyncio.Event()

    async def faulty(http: HttpCaller, body: bytes) -> int:
        http.trying(ORIGIN)
        await http.begin(EVENTS_HEAD, ORIGIN)
        await http.write(PIECES[0])
        await ready.wait()
        await http.write(PIECES[1])
        raise ZeroDivisionError

    app = App(faulty)
    first, beside = app.ask(), app.ask()
    await until(lambda: beside.body == PIECES[0])
    ready.set()
    for call in (await first.done(), await beside.done()):
        assert call.body.startswith(PIECES[0] + PIECES[1])
        assert b"stream_interrupted" in call.body
    assert app.repeats.bytes == 0


async def test_a_call_that_is_cancelled() -> None:
    app = App(stream := Stream())
    first, beside = app.ask(), app.ask()
    stream.let(1)
    await until(lambda: beside.body == PIECES[0])
    first.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first.done()
    assert b"stream_interrupted" in (await beside.done()).body
    assert app.repeats.bytes == 0


# callers who leave
async def test_the_call_goes_on_without_its_caller() -> None:
    app = App(stream := Stream())
    first = app.ask()
    stream.let(1)
    await until(lambda: first.body == PIECES[0])
    first.gone.set()
    leaving = asyncio.ensure_future(app.callers[0].gone())
    await turns()
    assert not leaving.done(), "the call isn't told"
    stream.let(9)
    await first.done()
    assert stream.wrote == len(PIECES)
    again = await app.ask().done()
    assert again.body == b"".join(PIECES)
    assert app.runs == 1
    leaving.cancel()


async def test_without_a_key_the_call_hears_that_its_caller_left() -> None:
    app = App(stream := Stream())
    first = app.ask(None)
    stream.let(1)
    await until(lambda: first.body == PIECES[0])
    first.gone.set()
    async with asyncio.timeout(5):
        await app.callers[0].gone()
    stream.let(9)
    await first.done()


async def test_a_repeat_that_leaves_ends_alone() -> None:
    app = App(stream := Stream())
    first, second, third = app.ask(), app.ask(), app.ask()
    stream.let(1)
    await until(lambda: first.body == second.body == third.body == PIECES[0])
    await second.leave()
    assert app.left == 1
    stream.let(9)
    assert (await first.done()).body == (await third.done()).body == b"".join(PIECES)


async def test_a_connection_that_is_closed_or_stuck_stops_nobody() -> None:
    """Servers may raise when a connection is closed; and a dead one takes nothing, without a word."""

    async def closed(message: Any) -> None:
        raise BrokenPipeError

    app = App(stream := Stream())
    first = app.ask()
    first.reads.clear()
    await turns()
    second = app.ask()
    stream.let(9)
    assert (await second.done()).body == b"".join(PIECES)
    assert first.body == b""
    first.reads.set()
    are_same(await first.done(), second)

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, closed)

    for key, left in (("k", 1), ("new", 1)):
        app.play = Stream(free=True)
        await Asgi(broken, CHAT, b"{}", {"idempotency-key": key}, "POST").done()
        assert app.left == left
        assert (await app.ask(key).done()).body == b"".join(PIECES)
    assert app.runs == 2


async def test_who_reads_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(Stream(free=True))
    whole_one = await app.ask().done()
    monkeypatch.setattr(repeats_module, "PIECE_S_MAX", 0.0)
    slow = app.ask()
    slow.reads.clear()
    await slow.done()
    assert app.left == 1
    assert slow.body == b""
    monkeypatch.undo()
    are_same(whole_one, await app.ask().done())


# limits
@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, repeat.RECORDING_BYTES_MAX])
async def test_large_answers_come_whole(size: int) -> None:
    app = App(large(size))
    are_same(first := await app.ask().done(), again := await app.ask().done())
    assert first.body == bytes(size)
    assert all(len(chunk) <= PIECE_BYTES for chunk in again.chunks)
    assert app.repeats.bytes == size


async def test_an_answer_over_the_limit_is_given_once_and_not_run_twice() -> None:
    app = App(large(repeat.RECORDING_BYTES_MAX + 1))
    first, beside = app.ask(), app.ask()
    assert (await first.done()).body == bytes(repeat.RECORDING_BYTES_MAX + 1)
    for call in (await beside.done(), await app.ask().done()):
        assert call.code == "idempotency_answer_too_long"
        assert first.headers["fallow-call"] in call.json["error"]["message"]
    assert (await app.ask(body=b"[]").done()).code == "idempotency_conflict"
    assert app.runs == 1
    assert app.repeats.bytes == 0
    app.clock.advance(repeat.KEPT_MS + 1)
    assert (await app.ask().done()).status == 200
    assert app.runs == 2


async def test_a_stream_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller gets all of it and no more than they read; who follows gets an end that says so; then it ends with its caller."""
    monkeypatch.setattr(repeat, "RECORDING_BYTES_MAX", 3 * len(PIECES[0]))
    app = App(stream := Stream())
    first, beside = app.ask(), app.ask()
    stream.let(3)
    await until(lambda: first.body == beside.body == b"".join(PIECES[:3]))
    leaving = asyncio.ensure_future(app.callers[0].gone())
    first.reads.clear()
    stream.let(1)
    assert b"stream_interrupted" in (await beside.done()).body
    assert not leaving.done()
    stream.let(9)
    await turns()
    assert stream.wrote < len(PIECES), "what isn't recorded waits for its reader"
    first.reads.set()
    assert (await first.done()).body == b"".join(PIECES)
    async with asyncio.timeout(5):
        await leaving
    assert (await app.ask().done()).code == "idempotency_answer_too_long"
    assert app.runs == 1
    assert app.repeats.bytes == 0


async def test_a_stream_over_the_limit_whose_caller_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "RECORDING_BYTES_MAX", 3 * len(PIECES[0]))
    monkeypatch.setattr(repeats_module, "PIECE_S_MAX", 0.0)
    app = App(Stream(free=True))
    first = app.ask()
    first.reads.clear()
    await first.done()
    assert first.body == b"", "no piece comes after one that was missed"
    assert app.left == 1
    assert (await app.ask().done()).code == "idempotency_answer_too_long"
    assert app.repeats.bytes == 0


async def test_the_oldest_bodies_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(large(100))
    monkeypatch.setattr(repeat, "RECORDINGS_BYTES_MAX", 350)
    for number in range(5):
        await app.ask(f"k{number}").done()
        assert app.repeats.bytes <= 350
    found = [(await app.ask(f"k{number}").done()).status for number in range(5)]
    assert found[2:] == [200, 200, 200]
    assert [app.callers[5].status, app.callers[6].status] == found[:2] != [200, 200]
    assert app.runs == 5, "what was dropped isn't run twice"


async def test_a_body_that_is_read_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "RECORDINGS_BYTES_MAX", 150)
    app = App(large(100))
    await app.ask("a").done()
    reading = app.ask("a")
    reading.reads.clear()
    await turns()
    assert (await app.ask("b").done()).body == bytes(100), "an answer for which there is no room is given"
    assert (await app.ask("b").done()).code == "idempotency_answer_too_long"
    reading.reads.set()
    assert (await reading.done()).body == bytes(100)
    assert app.repeats.bytes == 100


async def test_the_oldest_calls_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "RECORDINGS_MAX", 3)
    app = App()
    for number in range(3):
        await app.ask(f"k{number}").done()
    assert "fallow-repeated" in (await app.ask("k0").done()).headers, "to ask for what is there drops nothing"
    await app.ask("k3").done()
    assert app.repeats.count == 3
    for number in (3, 2, 1):
        assert "fallow-repeated" in (await app.ask(f"k{number}").done()).headers
    assert "fallow-repeated" not in (await app.ask("k0").done()).headers


async def test_calls_that_run_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "RECORDINGS_MAX", 2)
    app = App(stream := Stream())
    running = [app.ask("a"), app.ask("b")]
    await turns()
    refused = await app.ask("c").done()
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "too_many_calls", "1")
    stream.let(99)
    for call in running:
        await call.done()
    assert (await app.ask("c").done()).status == 200
    assert app.runs == 3


async def test_an_hour_later_it_is_forgotten() -> None:
    app = App()
    await app.ask("a").done()
    app.clock.advance(repeat.KEPT_MS)
    await app.ask("b").done()
    assert "fallow-repeated" in (await app.ask("a").done()).headers
    app.clock.advance(1)
    app.repeats.forget_old()
    assert app.repeats.count == 1
    assert app.repeats.bytes == len((await app.ask("b").done()).body)
    assert "fallow-repeated" not in (await app.ask("a").done()).headers
    assert app.runs == 3


async def test_what_runs_for_longer_than_an_hour_is_still_the_same_call() -> None:
    app = App(stream := Stream())
    first = app.ask()
    await turns()
    app.clock.advance(2 * repeat.KEPT_MS)
    app.repeats.forget_old()
    second = app.ask()
    await turns()
    stream.let(9)
    are_same(await first.done(), await second.done())
    assert app.runs == 1


async def test_what_is_forgotten_while_it_is_read_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(large(3 * PIECE_BYTES))
    await app.ask().done()
    reading = app.ask()
    reading.reads.clear()
    await turns()
    app.clock.advance(repeat.KEPT_MS + 1)
    app.repeats.forget_old()
    assert app.repeats.count == 0
    assert app.repeats.bytes == 3 * PIECE_BYTES, "what is held counts"
    reading.reads.set()
    assert len((await reading.done()).body) == 3 * PIECE_BYTES
    assert app.repeats.bytes == 0


# in the gateway
def ask(network: Network, key: str, *, stream: bool = False) -> Asgi:
    body = b'{"model":"tiny","stream":%s}' % str(stream).lower().encode()
    return Asgi(network.gateway.app, CHAT, body, {"authorization": f"Bearer {KEY}", "idempotency-key": key}, "POST")


async def test_a_node_is_asked_once_and_goes_on_when_the_caller_leaves() -> None:
    async with Network() as network:
        node = await network.play("node-a")
        first = ask(network, "k", stream=True)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=PIECES[0], head=EVENTS_HEAD))
        await until(lambda: first.body == PIECES[0])
        beside = ask(network, "k", stream=True)
        await until(lambda: beside.body == PIECES[0])
        first.gone.set()
        await turns()
        await node.say(request, m.Part(index=1, data=PIECES[1]))
        await node.say(request, m.Final(index=2, data=PIECES[2], usage=Usage(prompt_tokens=7, output_tokens=3)))
        await first.done()
        after = await ask(network, "k", stream=True).done()
        assert (await beside.done()).body == after.body == b"".join(PIECES[:3])
        assert beside.headers == after.headers
        assert node.requests.empty()
        assert node.heard_of(m.Cancel) == []
        story = (await network.get(f"/v1/calls/{after.headers['fallow-call']}")).json
        assert (story["status"], len(story["attempts"]), story["output_tokens"]) == ("done", 1, 3)


async def test_the_gateways_answers_to_keys() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        are_same(await ask(network, "k").done(), await ask(network, "k").done())
        other = await ask(network, "k", stream=True).done()
        assert (other.status, other.code) == (409, "idempotency_conflict")
        assert (await ask(network, "").done()).status == 400
        assert not network.gateway.history._running, "a repeat leaves no story that never ends"


async def test_a_retry_after_a_refusal_reaches_a_node() -> None:
    async with Network() as network:
        refused = await ask(network, "k").done()
        assert refused.status >= 400
        await network.add("node-a", FakeServed())
        assert (await ask(network, "k").done()).status == 200

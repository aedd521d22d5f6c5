"""Sealed calls by way of somebody who meddles, nodes that start anew, and keys that tell less: what callers get, and who is blamed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec.structs import replace
from one_key import OneKeyDesk

from fallow.adapters.memory_bus import MemoryBus
from fallow.apps.node import jobs as node_jobs
from fallow.apps.node import pacing
from fallow.apps.node.node import Node
from fallow.apps.node.outlet import ALIVE_MS, Outlet
from fallow.model import messages as m
from fallow.model.errors import EngineFailed, NotOpened, WireError
from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import Policy, Privacy
from fallow.model.offer import Price
from fallow.model.receipt import Usage
from fallow.wire import codec, subjects
from fallow.wire.commitment import Commitment
from fallow.wire.seal import BUCKETS, Channel

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import (
        GATEWAY,
        MODEL,
        ORG,
        SIGN,
        FakeClock,
        FakeServed,
        Network,
        Overheard,
        anybody,
        card_of,
        offer_of,
        request_of,
        turns,
        until,
    )
else:
    from one_loop import (
        GATEWAY,
        MODEL,
        ORG,
        SIGN,
        FakeClock,
        FakeServed,
        Network,
        Overheard,
        anybody,
        card_of,
        offer_of,
        request_of,
        turns,
        until,
    )

pytestmark = pytest.mark.anyio

NODE = NodeId("node-a")
ANSWERS = f"rsp.{GATEWAY}.{NODE}."
REQUESTS = f"n.{NODE}.req"
BODIES = f"n.{NODE}.body."
CONTROL = f"n.{NODE}.ctl"
TAG_BYTES = 16
JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
PIECES = [b'data: {"n":%d}\n\n' % number for number in range(6)]

Meddle = Callable[[int, bytes], list[bytes]]
"""What is sent in place of the n-th sealed message."""


async def several(body: bytes) -> AsyncIterator[bytes]:
    for piece in PIECES:
        yield piece
        await asyncio.sleep(0)


class Meddler:
    """Sits on the way, and does something to the sealed messages that go to some subjects."""

    def __init__(self, broker: Overheard, monkeypatch: pytest.MonkeyPatch, to: str, meddle: Meddle) -> None:
        self._send = broker.send
        self._to = to
        self._meddle = meddle
        self.seen = 0
        monkeypatch.setattr(broker, "send", self.send)

    def send(self, subject: str, reply: str, data: bytes) -> None:
        if not subject.startswith(self._to) or not is_sealed(data):
            return self._send(subject, reply, data)
        self.seen += 1
        for one in self._meddle(self.seen - 1, data):
            self._send(subject, reply, one)


def is_sealed(data: bytes) -> bool:
    return sealed_in(data) is not None


def sealed_in(data: bytes) -> m.Sealed | m.SealedRequest | None:
    for reader in (codec.sealed_body, codec.sealed_request):
        try:
            message = reader.read(data)
        except WireError:
            continue
        assert isinstance(message, m.Sealed | m.SealedRequest)
        return message
    return None


def flipped(data: bytes) -> bytes:
    sealed = sealed_in(data)
    assert sealed is not None
    at = len(sealed.box) // 2
    return codec.encode(replace(sealed, box=bytes([*sealed.box[:at], sealed.box[at] ^ 1, *sealed.box[at + 1 :]])))


def moved(data: bytes) -> bytes:
    sealed = sealed_in(data)
    assert isinstance(sealed, m.Sealed)
    return codec.encode(replace(sealed, index=sealed.index + 1))


def faults(network: Network, node_id: str = NODE) -> float:
    return network.gateway.roster.market.standings.of(NodeId(node_id), network.clock.now_ms() / 1000).faults


def is_doubted(network: Network, node_id: str = NODE) -> bool:
    return network.gateway.roster.members()[NodeId(node_id)].doubted


async def counted(network: Network, reason: str) -> bool:
    return b'fallow_answers_refused_total{reason="%s"} 1.0' % reason.encode() in (await network.get("/metrics")).body


# on the way
@pytest.mark.parametrize("at", [0, 2, 6])
@pytest.mark.parametrize("change", [flipped, moved])
async def test_an_altered_answer_goes_on_elsewhere_and_the_node_is_not_blamed(
    at: int, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody on the way can do that, so it proves nothing against the node."""
    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        Meddler(network.broker, monkeypatch, ANSWERS, lambda number, data: [change(data) if number == at else data])
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "not_opened")
        assert await counted(network, "altered")
        assert faults(network) == 0
        assert is_doubted(network)
        spare = FakeServed()
        await network.add("node-b", spare)
        again = await network.ask().done()
        assert (again.status, again.headers["fallow-node"]) == (200, "node-b")


async def test_an_answer_whose_parts_are_sent_twice_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        meddler = Meddler(network.broker, monkeypatch, ANSWERS, lambda number, data: [data, data])
        call = await network.ask(stream=True).done()
        assert (call.status, call.body) == (200, b"".join(PIECES))
        assert meddler.seen == len(PIECES) + 1
        assert faults(network) == 0


@pytest.mark.parametrize("at", [0, 1, 4])
async def test_parts_that_change_places_are_noticed(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytes] = []

    def swap(number: int, data: bytes) -> list[bytes]:
        if number == at:
            held.append(data)
            return []
        return [data, held.pop()] if held else [data]

    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        Meddler(network.broker, monkeypatch, ANSWERS, swap)
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "answer_gap")


@pytest.mark.parametrize("at", [0, 1, 5])
async def test_a_part_that_is_missing_is_noticed(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        Meddler(network.broker, monkeypatch, ANSWERS, lambda number, data: [] if number == at else [data])
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "answer_gap")


async def test_an_answer_whose_end_is_cut_off_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is asked, and doesn't know the attempt any more."""
    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        meddler = Meddler(network.broker, monkeypatch, ANSWERS, lambda number, data: [] if number == len(PIECES) else [data])
        call = network.ask(stream=True)
        await until(lambda: meddler.seen == len(PIECES) + 1)
        await turns()
        assert not call.task.done()
        network.clock.advance(1_000)
        await call.done()
        assert call.body.startswith(b"".join(PIECES))
        assert b'"stream_interrupted"' in call.chunks[-1]


async def test_what_is_sent_after_the_end_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def once_more(number: int, data: bytes) -> list[bytes]:
        sent.append(data)
        return [data] if number < len(PIECES) else [data, *sent, flipped(data), moved(data)]

    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        Meddler(network.broker, monkeypatch, ANSWERS, once_more)
        call = await network.ask(stream=True).done()
        await turns()
        assert (call.status, call.body) == (200, b"".join(PIECES))
        assert faults(network) == 0


async def test_a_word_that_is_said_again_by_others_keeps_no_call_alive() -> None:
    """Who recorded a node's keep-alive can't make its silence last."""
    async with Network() as network:
        node = await network.play(NODE)
        call = network.ask()
        request = await node.request()
        index, box = node._calls[request.attempt_id].channel.seal(codec.encode(m.Alive()))
        alive = m.Sealed(index=index, box=box)
        await node.say(request, alive)
        await turns()
        for _ in range(2):
            network.clock.advance(2_000)
            await node.say(request, alive)
            await turns()
        await call.done()
        assert (call.status, call.code) == (504, "node_silent")


async def test_a_request_that_is_sent_twice_runs_once_and_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        served = FakeServed(several)
        await network.add("node-a", served)
        Meddler(network.broker, monkeypatch, REQUESTS, lambda number, data: [data, data])
        for _ in range(2):
            call = await network.ask().done()
            assert (call.status, call.body, call.headers["fallow-attempts"]) == (200, b"".join(PIECES), "1")
        assert len(served.bodies) == 2
        assert faults(network) == 0


async def test_a_request_that_is_sent_twice_is_answered_by_an_engine_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the node's first word would be that it can't open the second one."""
    begins = asyncio.Event()

    async def waits(body: bytes) -> AsyncIterator[bytes]:
        await begins.wait()
        for piece in PIECES:
            yield piece

    async with Network() as network:
        served = FakeServed(waits)
        await network.add("node-a", served)
        meddler = Meddler(network.broker, monkeypatch, REQUESTS, lambda number, data: [data, data])
        call = network.ask()
        await until(lambda: served.inside == 1)
        await turns()
        begins.set()
        await call.done()
        assert (call.status, call.body, call.headers["fallow-attempts"]) == (200, b"".join(PIECES), "1")
        assert (meddler.seen, len(served.bodies)) == (1, 1)


async def test_a_request_that_is_altered_once_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        meddler = Meddler(network.broker, monkeypatch, REQUESTS, lambda number, data: [flipped(data) if number == 0 else data])
        await network.works()
        assert (len(served.bodies), meddler.seen) == (1, 2)


@pytest.mark.parametrize("change", [flipped, moved])
async def test_a_part_of_a_body_that_was_altered_ends_the_attempt_at_once(
    change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        Meddler(network.broker, monkeypatch, BODIES, lambda number, data: [change(data) if number == 0 else data])
        call = await network.ask(text="x" * 600_000).done()
        assert (call.status, call.code) == (502, "not_opened")
        assert served.bodies == []


async def test_a_body_whose_parts_are_sent_twice_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        Meddler(network.broker, monkeypatch, BODIES, lambda number, data: [data, data])
        assert (await network.ask(text="x" * 600_000).done()).status == 200
        assert b"x" * 600_000 in served.bodies[0]


async def test_nothing_of_a_call_is_said_in_the_open() -> None:
    """Nor is who asks: the key, the organisation, the model."""
    secret = "canary-4711"

    async def says(body: bytes) -> AsyncIterator[bytes]:
        yield b'{"text":"%s"}' % secret[::-1].encode()

    async with Network() as network:
        await network.add("node-a", FakeServed(says))
        call = await network.ask(text=secret + "x" * 600_000).done()
        assert secret[::-1].encode() in call.body
        said = b"".join(data for subject, data in network.broker.sent if not subject.startswith(("hb.", "_I.")))
        for word in (secret, secret[::-1], "xxxxxxxx", MODEL, "messages", "text", call.headers["fallow-call"]):
            assert word.encode() not in said, word


# sessions
class Restarting:
    """A node that is killed and comes back under its name, without a word."""

    def __init__(self, network: Network, served: FakeServed) -> None:
        self._network = network
        self._served = served
        self._starts = 0
        self._bus: MemoryBus | None = None
        self.node: Node | None = None

    async def start(self) -> None:
        if self._bus is not None:
            await self._bus.close()
        self._bus, clock = MemoryBus(self._network.broker), FakeClock()
        clock.advance(1_000 * self._starts)
        self._starts += 1
        node = self.node = Node(card_of(NODE), [self._served], self._bus, clock, SIGN, anybody)
        self._network._start(node.run)
        await until(lambda: self._network.gateway.roster.kem(NODE) == node.seals.kem, what="its new key is known")
        await self._network.knows(NODE)


async def test_calls_of_a_node_that_started_anew_are_sent_once_more() -> None:
    async with Network() as network:
        served = FakeServed(slots=8)
        node = Restarting(network, served)
        await node.start()
        await network.works()
        await node.start()
        network.broker.sent.clear()
        calls = [network.ask(text=str(number)) for number in range(4)]
        for call in calls:
            await call.done()
            assert (call.status, call.headers["fallow-attempts"]) == (200, "1")
        assert len(served.bodies) == 5
        assert len(network.broker.sent_to(REQUESTS)) == 8
        hellos = [data for data in network.broker.sent_to(CONTROL) if isinstance(codec.to_node.read(data), m.Hello)]
        assert len(hellos) == 1, "one new session for all"
        assert faults(network) == 0


async def test_a_large_body_is_sent_once_more_as_a_whole() -> None:
    async with Network() as network:
        served = FakeServed()
        node = Restarting(network, served)
        await node.start()
        await network.works()
        await node.start()
        call = await network.ask(text="x" * 1_500_000).done()
        assert (call.status, call.headers["fallow-attempts"]) == (200, "1")
        assert b"x" * 1_500_000 in served.bodies[-1]


async def test_a_call_that_is_not_opened_twice_goes_on_elsewhere() -> None:
    """The node is doubted until it is heard again, and not blamed."""
    async with Network() as network:
        node = Restarting(network, FakeServed())
        await node.start()
        assert node.node is not None
        refuses(node.node)
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "not_opened")
        assert len(network.broker.sent_to(REQUESTS)) == 2
        assert is_doubted(network)
        assert faults(network) == 0
        await network.add("node-b", FakeServed())
        again = await network.ask().done()
        assert (again.status, again.headers["fallow-node"]) == (200, "node-b")


def refuses(node: Node) -> None:
    def never(sealed: m.SealedRequest) -> Any:
        raise NotOpened("", reason="no_session")

    node.seals.open = never  # type: ignore[method-assign]


async def test_a_hello_that_is_refused_fails_the_attempt() -> None:
    async with Network() as network:
        served = FakeServed()
        network._start(Node(card_of(NODE), [served], MemoryBus(network.broker), FakeClock(), SIGN, lambda *_: ()).run)
        await network.knows(NODE)
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "not_opened")
        assert network.broker.sent_to(REQUESTS) == []
        assert faults(network) == 0


async def test_a_call_for_an_organisation_that_the_gateway_does_not_speak_for() -> None:
    async with Network() as network:
        served = FakeServed()
        speaks = [OrgId("other")]
        network._start(Node(card_of(NODE), [served], MemoryBus(network.broker), FakeClock(), SIGN, lambda *_: speaks).run)
        await network.knows(NODE)
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "not_opened")
        assert "not_vouched" in call.json["error"]["message"]
        assert len(network.broker.sent_to(REQUESTS)) == 1, "no second session would help"
        assert served.bodies == []
        assert faults(network) == 0


async def test_sessions_outlive_the_connection() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        await network.works()
        first = network.gateway.sessions.now(NODE)
        assert first is not None
        network.broker.stop()
        network.broker.up = True
        await network.knows("node-a")
        await network.works_again()
        second = network.gateway.sessions.now(NODE)
        assert second is first


async def test_a_gateway_that_does_not_seal_is_told_to_be_updated() -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        answer = "rsp.gw-old.node-a.one"
        request = [1, "one", "call_one", "gw-old", "home", "key-1", "/v1/chat/completions", MODEL, False, 2, b"{}", b"", b""]
        await network.hand.publish(REQUESTS, b"\x01" + msgspec.msgpack.encode(request), answer)
        await until(lambda: network.broker.sent_to(answer))
        said = network.broker.sent_to(answer)[0]
        kind, index, data, head, usage, failure = msgspec.msgpack.decode(said[1:])
        assert (said[0], kind, index, data, head, usage) == (1, 9, 0, b"", None, None), "as version 1 reads it"
        assert (failure["code"], "update the gateway" in failure["message"]) == ("wire_error", True)
        assert served.bodies == []


# what a call is made for
async def test_a_call_names_the_offer_that_was_chosen() -> None:
    price = Price(prompt_micro_per_munit=3, output_micro_per_munit=9)
    async with Network() as network:
        node = await network.play(NODE)
        await node.beat(offers=(replace(offer_of(NODE), model_digest="sha256:x", price=price),))
        await turns()
        call = network.ask()
        request = await node.request()
        assert (request.model_digest, request.price, request.privacy) == ("sha256:x", price, "plain")
        assert request.cost_max_micro > 0
        await node.say(request, m.Final(index=0, data=b"{}", head=JSON_HEAD))
        assert (await call.done()).status == 200


async def test_a_call_for_other_weights_is_refused() -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        await network.other.ask(NODE, replace(request_of("one"), model_digest="sha256:y"))
        await until(lambda: network.other.heard["one"])
        [final] = network.other.heard_of(m.Final, "one")
        assert final.failure is not None
        assert final.failure.code == "model_not_here"
        assert served.bodies == []


async def test_a_call_for_a_price_that_rose_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        served = FakeServed()
        price = Price(prompt_micro_per_munit=3, output_micro_per_munit=9)
        offer = served.offer
        monkeypatch.setattr(served, "offer", lambda node_id, expires: replace(offer(node_id, expires), price=price))
        await network.add("node-a", served)
        await network.other.ask(NODE, replace(request_of("low"), price=replace(price, output_micro_per_munit=8)))
        await network.other.ask(NODE, replace(request_of("same"), price=price))
        await until(lambda: network.other.heard_of(m.Final, "low") and network.other.heard_of(m.Final, "same"))
        low, same = network.other.heard_of(m.Final, "low")[0].failure, network.other.heard_of(m.Final, "same")[0].failure
        assert low is not None
        assert low.code == "price_changed"
        assert same is None


# what a node commits to
@pytest.mark.parametrize("wrong", ["nothing", "zeros", "other usage", "other tokens", "another body"])
async def test_a_node_that_commits_to_another_answer_has_sent_none(wrong: str) -> None:
    async with Network() as network:
        node = await network.play(NODE)
        call = network.ask()
        request = await node.request()
        usage = Usage(prompt_tokens=7, output_tokens=1)
        commitment = Commitment(request.attempt_id, b"{}" if wrong == "another body" else request.body, request.model_digest)
        commitment.add(b"{}")
        digests = {
            "nothing": b"",
            "zeros": bytes(32),
            "other usage": commitment.digest(replace(usage, output_tokens=2), (5,)),
            "other tokens": commitment.digest(usage, (6,)),
            "another body": commitment.digest(usage, (5,)),
        }
        final = m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=usage, tokens=(5,), digest=digests[wrong] or b"x")
        await node.say(request, final)
        await call.done()
        assert (call.status, call.code) == (502, "answer_malformed")
        assert await counted(network, "not_committed")
        assert faults(network) == 1
        await turns()
        assert node.heard_of(m.Cancel) == [m.Cancel(attempt_id=request.attempt_id)]


async def test_a_node_commits_to_what_it_wrote() -> None:
    async with Network() as network:
        node = await network.play(NODE)
        call = network.ask()
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b'{"text":', head=JSON_HEAD))
        await node.say(request, m.Final(index=1, data=b'"hi"}', usage=Usage(output_tokens=2), tokens=(5, 2**32 - 1)))
        await call.done()
        assert (call.status, call.body) == (200, b'{"text":"hi"}')


@pytest.mark.parametrize(
    ("size", "tokens", "parts", "told"),
    [
        (0, 0, 1, 0),
        (10, 3, 1, 3),
        (10, m.TOKENS_MAX, 1, m.TOKENS_MAX),
        (subjects.PART_BYTES_MAX, 0, 1, 0),
        (subjects.PART_BYTES_MAX, 1, 2, 1),
        (subjects.PART_BYTES_MAX, m.TOKENS_MAX, 2, m.TOKENS_MAX),
        (subjects.PART_BYTES_MAX + 1, m.TOKENS_MAX, 2, m.TOKENS_MAX),
        (2 * subjects.PART_BYTES_MAX, m.TOKENS_MAX, 3, m.TOKENS_MAX),
        (10, m.TOKENS_MAX + 1, 1, 0),
    ],
)
@pytest.mark.parametrize("pads", [False, True])
async def test_the_last_message_has_room_for_the_tokens(size: int, tokens: int, parts: int, told: int, pads: bool) -> None:
    """Whatever their numbers are, and however full it is."""
    broker = Overheard()
    node, gateway = Channel(bytes(32), is_nodes=True), Channel(bytes(32), is_nodes=False)
    node.pads = pads
    outlet = Outlet(MemoryBus(broker), "rsp.a.b.c", node, FakeClock())
    commitments = [Commitment(request_of("one").attempt_id, b"{}", "") for _ in range(2)]
    outlet.commitment, ours = commitments
    outlet.grant(m.Credit(attempt_id=request_of("one").attempt_id, until_bytes=2**40))
    ids, usage, data = (2**32 - 1,) * tokens, Usage(output_tokens=tokens), b"x" * size
    await outlet.finish(data, JSON_HEAD, usage, ids)
    messages = []
    for sealed in map(codec.sealed_body.read, broker.sent_to("rsp.")):
        messages.append(codec.inner.read(gateway.open(sealed.index, sealed.box)))
    assert len(messages) == parts
    assert b"".join(message.data for message in messages if isinstance(message, m.Part | m.Final)) == data
    final = messages[-1]
    assert isinstance(final, m.Final)
    ours.add(data)
    assert final.tokens == ids[:told]
    assert final.digest == ours.digest(usage, final.tokens)
    assert [bool(getattr(message, "head", None)) for message in messages] == [True] + [False] * (parts - 1)


# what sizes and times tell
class Private:
    """A network whose key says how answers travel."""

    def __init__(self, privacy: Privacy) -> None:
        self._policy = Policy(privacy=privacy)
        self.network = Network()
        self._group = asyncio.TaskGroup()
        self._bus = MemoryBus(self.network.broker)

    async def __aenter__(self) -> Network:
        await self.network.__aenter__()
        await self._group.__aenter__()
        await OneKeyDesk(self._bus, "fk-private", ORG, self._policy).start(self._group)
        await self.network.hub_bus.close()
        return self.network

    async def __aexit__(self, *raised: Any) -> None:
        await self._bus.close()
        await self._group.__aexit__(None, None, None)
        await self.network.__aexit__(*raised)


def boxes(network: Network, to: str) -> list[int]:
    """The sizes of what is sealed in the messages that went there."""
    sealed = [sealed_in(data) for data in network.broker.sent_to(to)]
    return [len(one.box) - TAG_BYTES for one in sealed if one is not None]


def is_bucket(size: int) -> bool:
    return size in BUCKETS or (size > BUCKETS[-1] and size % BUCKETS[-1] == 0)


async def test_all_sizes_of_a_padded_call_are_rounded_up_and_keep_alives_look_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_jobs, "TICK_S", 0.005)
    monkeypatch.setattr(pacing, "STEP_S", 0.0)
    begins = asyncio.Event()

    async def waits(body: bytes) -> AsyncIterator[bytes]:
        await begins.wait()
        for piece in PIECES:
            yield piece
            await asyncio.sleep(0)

    async with Private("padded") as network:
        served = FakeServed(waits)
        await network.add("node-a", served)
        call = network.ask(stream=True, key="fk-private", text="x" * 300_000)
        await until(lambda: served.inside == 1)
        network.node_clocks[NODE].advance(ALIVE_MS)
        await until(lambda: boxes(network, ANSWERS))
        assert boxes(network, ANSWERS) == [BUCKETS[0]], "a keep-alive is as large as a few tokens"
        begins.set()
        await call.done()
        assert (call.status, call.body) == (200, b"".join(PIECES))
        assert all(size == BUCKETS[0] for size in boxes(network, ANSWERS))
        sent = boxes(network, REQUESTS) + boxes(network, BODIES)
        assert len(sent) == 2
        assert all(map(is_bucket, sent))
        in_the_open = [codec.to_gateway.read(data) for data in network.broker.sent_to(ANSWERS)]
        assert not any(isinstance(message, m.Alive) for message in in_the_open)


async def test_sizes_of_a_plain_call_are_as_they_are() -> None:
    """So that the test above can fail."""
    async with Network() as network:
        await network.add("node-a", FakeServed(several))
        assert (await network.ask(stream=True).done()).status == 200
        assert not any(map(is_bucket, boxes(network, ANSWERS) + boxes(network, REQUESTS)))


async def test_an_answer_as_a_whole_is_one_part_and_one_chunk() -> None:
    async with Private("whole") as network:
        await network.add("node-a", FakeServed(several))
        call = await network.ask(stream=True, key="fk-private").done()
        assert call.status == 200
        assert call.chunks == [b"".join(PIECES)]
        assert call.headers["content-type"] == "text/event-stream"
        assert boxes(network, ANSWERS) == [BUCKETS[0]]


@pytest.mark.parametrize("privacy", ["padded", "whole"])
async def test_a_private_answer_that_breaks_moves_to_another_node(privacy: Privacy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the engine fails while a step lasts."""
    monkeypatch.setattr(pacing, "STEP_S", 0.0)

    async def fails(body: bytes) -> AsyncIterator[bytes]:
        yield b'{"text":'
        raise EngineFailed("the engine died")

    async with Private(privacy) as network:
        await network.add("node-a", FakeServed(fails))
        await network.add("node-b", FakeServed())
        call = await network.ask(key="fk-private").done()
        assert (call.status, call.body, call.headers["fallow-attempts"]) == (200, b'{"text":"hello"}', "2")

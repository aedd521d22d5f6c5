"""A gateway, a hub's key desk and nodes in one event loop, on a bus in memory, with engines that do what a test says."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from one_key import OneKeyDesk

from fallow.adapters.clock import SystemClock
from fallow.adapters.memory_bus import MemoryBroker, MemoryBus
from fallow.adapters.nkey import make_key
from fallow.apps.card_check import Verify, anyones
from fallow.apps.gateway import sessions
from fallow.apps.gateway.main import Gateway
from fallow.apps.node.attached import PATHS
from fallow.apps.node.node import Node
from fallow.apps.node.seals import Seals
from fallow.apps.node.served import EVENTS, JSON, NO_PAST, Past, Piece, load_of
from fallow.core.cards import CARD_LIFE_MS
from fallow.core.slots import Asker
from fallow.model import messages as m
from fallow.model.card import Card, Hardware
from fallow.model.errors import Failure
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.needs import COUNTRY_UNKNOWN
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.receipt import Usage
from fallow.ports import Delivery
from fallow.wire import codec, subjects
from fallow.wire.commitment import Commitment
from fallow.wire.openai import CHAT, COMPLETIONS
from fallow.wire.seal import Channel, KemPair

MODEL = "tiny"
KEY = "fk-test"
ORG = OrgId("home")
GATEWAY = GatewayId("gw-1")
SIGN = make_key("user").sign
"""Of nobody's key: nodes have made-up names here."""
KEM = m.KemKey(suite="x25519", public_key=KemPair("x25519").public, expires_at_s=2**40)
"""Of a node that isn't there."""
OTHER = GatewayId("gw-other")
KEMS: dict[str, m.KemKey] = {}
"""Of those that a test plays."""
BEGINNING_MS = 1_000_000
WALL_BEGINNING_MS = 1_700_000_000_000 + BEGINNING_MS
POLL_S = 0.002
WITHIN_S = 10.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Any]
Play = Callable[[bytes], AsyncIterator[bytes]]
T = TypeVar("T", bound=m.Message)


async def until(said: Callable[[], Any], *, what: str = "it", within_s: float = WITHIN_S) -> None:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + within_s
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s:g} s"
        await asyncio.sleep(POLL_S)


async def turns(count: int = 30) -> None:
    """Let everything that is ready to run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def believed(card: Card) -> bool:
    """For gateways and hubs among nodes whose names are no keys."""
    return True


class FakeClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self._ms = BEGINNING_MS

    def now_ms(self) -> int:
        return self._ms

    def wall_ms(self) -> int:
        return WALL_BEGINNING_MS - BEGINNING_MS + self._ms

    def advance(self, ms: int) -> None:
        self._ms += ms


def card_of(node_id: str, *, sequence: int = 1) -> Card:
    return Card(
        node_id=NodeId(node_id),
        org_id=ORG,
        sequence=sequence,
        expires_at_ms=WALL_BEGINNING_MS + CARD_LIFE_MS,
        hardware=Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33),
        isolation="none",
        region="here",
        serves=frozenset({"own", "partner"}),
    )


def offer_of(node_id: str, *, model: str = MODEL, slots: int = 2, speed: Speed | None = None) -> Offer:
    return Offer(
        node_id=NodeId(node_id),
        model=model,
        paths=frozenset({CHAT, COMPLETIONS}),
        context_tokens=2_000_000,
        model_digest="",
        speed=speed or Speed(),
        price=Price(),
        slots=slots,
        expires_at_ms=2**50,
    )


def beat_of(node_id: str, sequence: int = 1, *, offers: tuple[Offer, ...] | None = None, state: m.NodeState = "run") -> m.Heartbeat:
    """A heartbeat with everything in it, of a node that is idle."""
    return m.Heartbeat(
        node_id=NodeId(node_id),
        sequence=sequence,
        state=state,
        card_sequence=1,
        loads=(load_of(MODEL, 2, 2, 0),),
        card=card_of(node_id),
        kem=KEMS.get(node_id, KEM),
        offers=offers if offers is not None else (offer_of(node_id),),
    )


def request_of(attempt_id: str, *, gateway_id: str = "gw-other", body: bytes = b"{}", body_bytes: int | None = None) -> m.Request:
    """A request as another gateway sends it."""
    return m.Request(
        attempt_id=AttemptId(attempt_id),
        call_id=CallId("call_" + attempt_id),
        gateway_id=GatewayId(gateway_id),
        org_id=ORG,
        key_id=KeyId("key-1"),
        path=CHAT,
        model=MODEL,
        stream=False,
        body_bytes=len(body) if body_bytes is None else body_bytes,
        body=body,
    )


class FakeAnswer:
    """What a FakeServed answers: the pieces of its script, and an end."""

    def __init__(self, script: AsyncIterator[bytes], *, stream: bool, usage: Usage | None) -> None:
        self._script = script
        self._stream = stream
        self.usage = usage
        self.tokens: tuple[int, ...] = ()

    def head(self) -> m.Head:
        return m.Head(status=200, content_type=EVENTS if self._stream else JSON, engine_us=0)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        async for data in self._script:
            yield Piece(data)
        yield Piece(b"", is_last=True)


async def hello(body: bytes) -> AsyncIterator[bytes]:
    """The script of an engine that answers at once, in two pieces."""
    if b'"stream":true' in body:
        yield b'data: {"n":1}\n\n'
        yield b"data: [DONE]\n\n"
    else:
        yield b'{"text":'
        yield b'"hello"}'


class FakeServed:
    """A model whose answers are a script. `inside` counts the calls that are in the engine now."""

    def __init__(self, play: Play = hello, *, slots: int = 2, waiting_max: int = 2) -> None:
        self.model = MODEL
        self.play = play
        self.slots = slots
        self.waiting_max = waiting_max
        self.gate = asyncio.Semaphore(slots)
        self.paths = PATHS
        self.digest = ""
        self.calls = 0
        self.usage = Usage(prompt_tokens=7, output_tokens=3)
        self.bodies: list[bytes] = []
        self.askers: list[Asker] = []
        self.waits_s: list[float | None] = []
        self.inside = 0
        self.seems_idle = False
        self.not_ready: Failure | None = None

    def offer(self, node_id: NodeId, expires_at_ms: int) -> Offer:
        return msgspec.structs.replace(offer_of(node_id, slots=self.slots), expires_at_ms=expires_at_ms)

    def load(self, *, running: int) -> Load:
        return load_of(self.model, self.slots, self.waiting_max, 0 if self.seems_idle else running)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def ready(self, within_s: float | None = None) -> Failure | None:
        self.waits_s.append(within_s)
        return self.not_ready

    @contextlib.asynccontextmanager
    async def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> AsyncIterator[FakeAnswer]:
        self.bodies.append(body)
        self.askers.append(asker)
        self.inside += 1
        try:
            yield FakeAnswer(self.play(body), stream=b'"stream":true' in body, usage=self.usage)
        finally:
            self.inside -= 1


class Endless:
    """The script of an engine that writes on until it is stopped, or until `enough` is set."""

    def __init__(self, piece: bytes = b'data: {"n":1}\n\n') -> None:
        self.piece = piece
        self.wrote = 0
        self.enough = asyncio.Event()

    async def __call__(self, body: bytes) -> AsyncIterator[bytes]:
        while not self.enough.is_set():
            yield self.piece
            self.wrote += 1
            await asyncio.sleep(POLL_S)


class Asgi:
    """One HTTP request to an ASGI app, and how its caller behaves. Breaking ASGI's order of messages fails the test."""

    def __init__(self, app: App, path: str, body: bytes | Sequence[bytes], headers: dict[str, str], method: str) -> None:
        parts = [body] if isinstance(body, bytes) else list(body)
        self._incoming = [{"type": "http.request", "body": p, "more_body": n < len(parts)} for n, p in enumerate(parts, 1)]
        self.parts_sent = 0
        self.parts_max = len(parts)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.whole = asyncio.Event()
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        given = {"content-length": str(sum(map(len, parts))), **headers}
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task: asyncio.Task[None] = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._incoming and self.parts_sent < self.parts_max and not self.gone.is_set():
            self.parts_sent += 1
            return self._incoming.pop(0)
        over = [asyncio.ensure_future(event.wait()) for event in (self.gone, self.whole)]
        try:
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in over:
                one.cancel()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self.gone.is_set():
            return
        if message["type"] == "http.response.start":
            assert not self.status, "an answer starts once"
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            return
        assert message["type"] == "http.response.body"
        assert self.status, "the head comes before the body"
        assert not self.whole.is_set(), "nothing comes after the end"
        await self.reads.wait()
        if message.get("body"):
            self.chunks.append(message["body"])
        if not message.get("more_body", False):
            self.whole.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str:
        """The error's code."""
        return str(self.json["error"]["code"])

    async def leave(self) -> None:
        """The caller closes the connection; returns when the app is done with it."""
        self.gone.set()
        await self.done()

    async def done(self) -> Self:
        """Until the app returns; what it raised is raised here."""
        async with asyncio.timeout(WITHIN_S):
            await self.task
        return self


def anybody(hello: m.Hello, node_id: NodeId) -> None:
    """For nodes among gateways whose names are no keys."""


def kem_believed(node_id: NodeId, kem: m.KemKey) -> bool:
    """For gateways among nodes whose names are no keys."""
    return True


class PlayedCall:
    """What a played node has of an attempt."""

    def __init__(self, request: m.Request, channel: Channel) -> None:
        self._request = request
        self.channel = channel
        self.body = bytearray(request.body)
        self._data: list[bytes] = []

    def sealed(self, message: m.Part | m.Final, *, counts: bool = True) -> m.Sealed:
        """With the node's word for the whole answer in its last message; what doesn't count is no part of it."""
        if counts and message.index == len(self._data):
            self._data.append(message.data)
        if isinstance(message, m.Final) and message.failure is None and not message.digest:
            commitment = Commitment(self._request.attempt_id, self.body, self._request.model_digest)
            commitment.add(b"".join(self._data))
            message = msgspec.structs.replace(message, digest=commitment.digest(message.usage, message.tokens))
        index, box = self.channel.seal(codec.encode(message))
        return m.Sealed(index=index, box=box)


class PlayedNode:
    """A node that a test plays by hand: it takes requests and says what it's told."""

    def __init__(self, bus: MemoryBus, node_id: str) -> None:
        self._bus = bus
        self.node_id = node_id
        self.requests: asyncio.Queue[m.Request] = asyncio.Queue()
        self.bodies: list[m.BodyPart] = []
        self.heard: list[m.Message] = []
        self.sequence = 0
        self.seals = Seals(NodeId(node_id), SIGN, anybody, SystemClock())
        self._calls: dict[str, PlayedCall] = {}
        KEMS[node_id] = self.seals.kem
        self._answering: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        node_id = NodeId(self.node_id)
        await self._bus.subscribe(subjects.request(node_id), self._on_request)
        await self._bus.subscribe(subjects.bodies(node_id), self._on_body)
        await self._bus.subscribe(subjects.control(node_id), self._on_control)
        await self.beat()

    def _on_request(self, delivery: Delivery) -> None:
        request, channel = self.seals.open(codec.sealed_request.read(delivery.data))
        self._calls[request.attempt_id] = PlayedCall(request, channel)
        self.requests.put_nowait(request)

    def _on_body(self, delivery: Delivery) -> None:
        sealed = codec.sealed_body.read(delivery.data)
        call = self._calls[subjects.last_token(delivery.subject)]
        part = codec.body_part.read(call.channel.open(sealed.index, sealed.box))
        call.body += part.data
        self.bodies.append(part)

    def _on_control(self, delivery: Delivery) -> None:
        message = codec.to_node.read(delivery.data)
        if isinstance(message, m.Hello):
            answer = self.seals.welcome(message)
            assert answer is not None, "so many hellos can't be"
            answering = asyncio.ensure_future(self._bus.publish(delivery.reply, codec.encode(answer)))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)
        else:
            self.heard.append(message)

    async def beat(self, state: m.NodeState = "run", *, offers: tuple[Offer, ...] | None = None) -> None:
        self.sequence += 1
        beat = msgspec.structs.replace(beat_of(self.node_id, self.sequence, offers=offers, state=state), kem=self.seals.kem)
        await self._bus.publish(f"hb.{self.node_id}", codec.encode(beat))

    async def request(self) -> m.Request:
        async with asyncio.timeout(WITHIN_S):
            return await self.requests.get()

    async def say(self, request: m.Request, message: m.Message, *, node_id: str = "") -> None:
        """What is part of an answer is sealed, and committed to at its end; `node_id` is another's who has got hold of it."""
        if isinstance(message, m.Part | m.Final):
            message = self._calls[request.attempt_id].sealed(message, counts=not node_id)
        subject = subjects.answer(request.gateway_id, NodeId(node_id or self.node_id), request.attempt_id)
        await self._bus.publish(subject, codec.encode(message))

    def heard_of(self, kind: type[m.Message]) -> list[m.Message]:
        return [message for message in self.heard if isinstance(message, kind)]


class PlayedGateway:
    """A gateway that a test plays by hand: it opens sessions with nodes, seals what it's told to send, and opens what comes back.

    Its name is the one that `request_of` gives. `heard` has what came of each attempt.
    """

    def __init__(self, bus: MemoryBus, kem_of: sessions.KemOf, gateway_id: GatewayId = OTHER) -> None:
        self._bus = bus
        asker = sessions.Asker(m.Hello(gateway_id=gateway_id, org_id=ORG), SIGN)
        self.sessions = sessions.Sessions(asker, bus, SystemClock(), kem_of, kem_believed)
        self.heard: defaultdict[str, list[m.Message]] = defaultdict(list)
        self._channels: dict[str, Channel] = {}

    async def start(self) -> None:
        await self._bus.subscribe(subjects.answers(self.sessions.asker.hello.gateway_id), self._on_answer)

    def _on_answer(self, delivery: Delivery) -> None:
        if self.sessions.on_answer(delivery) or delivery.unheard:
            return
        attempt_id = subjects.last_token(delivery.subject)
        message: m.Message = codec.to_gateway.read(delivery.data)
        if isinstance(message, m.Sealed):
            self.heard[attempt_id].append(codec.inner.read(self._channels[attempt_id].open(message.index, message.box)))
        else:
            self.heard[attempt_id].append(message)

    async def sealed(self, node_id: str, request: m.Request) -> m.SealedRequest:
        """What would be sent; each is a call of its own."""
        session = await self.sessions.ready(NodeId(node_id))
        number, channel = session.call()
        channel.pads = request.privacy != "plain"
        self._channels.setdefault(request.attempt_id, channel)  # of an attempt that is sent twice, the first is answered
        return m.SealedRequest(session=session.id, number=number, box=channel.seal(codec.encode(request))[1])

    async def ask(self, node_id: str, request: m.Request) -> None:
        await self.send(node_id, request, await self.sealed(node_id, request))

    async def send(self, node_id: str, request: m.Request, sealed: m.SealedRequest) -> None:
        """What was sealed before."""
        reply = subjects.answer(request.gateway_id, NodeId(node_id), request.attempt_id)
        await self._bus.publish(subjects.request(NodeId(node_id)), codec.encode(sealed), reply)

    async def send_body(self, node_id: str, attempt_id: str, part: m.BodyPart) -> None:
        index, box = self._channels[attempt_id].seal(codec.encode(part))
        await self._bus.publish(subjects.body(NodeId(node_id), AttemptId(attempt_id)), codec.encode(m.Sealed(index=index, box=box)))

    async def tell(self, node_id: str, message: m.ToNode, reply: str = "") -> None:
        """Something that isn't sealed."""
        await self._bus.publish(subjects.control(NodeId(node_id)), codec.encode(message), reply)

    def heard_of(self, kind: type[T], attempt_id: str) -> list[T]:
        return [message for message in self.heard[attempt_id] if isinstance(message, kind)]


class Overheard(MemoryBroker):
    """A broker that remembers what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, bytes]] = []

    def send(self, subject: str, reply: str, data: bytes) -> None:
        self.sent.append((subject, data))
        super().send(subject, reply, data)

    def sent_to(self, subject: str) -> list[bytes]:
        """What went to subjects that begin so."""
        return [data for to, data in self.sent if to.startswith(subject)]


class Network:
    """Everything, joined by one MemoryBroker. Faults that ended up in the event loop's log fail the test."""

    def __init__(self, *, country: str = COUNTRY_UNKNOWN, verify: Verify = believed) -> None:
        self.broker = Overheard()
        self.clock = FakeClock()
        self.bus = MemoryBus(self.broker)
        self.hub_bus = MemoryBus(self.broker)
        self.hand = MemoryBus(self.broker)
        asker = sessions.Asker(m.Hello(gateway_id=GATEWAY, org_id=ORG), SIGN)
        self.gateway = Gateway(asker, self.bus, self.clock, country, org_of=anyones, verify=verify, verify_kem=kem_believed)
        self.other = PlayedGateway(MemoryBus(self.broker), lambda node_id: self.gateway.roster.kem(node_id))
        """Another gateway, which knows the same nodes."""
        self.node_clocks: dict[str, FakeClock] = {}
        self.faults: list[dict[str, Any]] = []
        self._stops: list[tuple[asyncio.Event, asyncio.Task[None]]] = []
        self._desk_group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.faults.append(context))
        await self._desk_group.__aenter__()
        await OneKeyDesk(self.hub_bus, KEY, ORG).start(self._desk_group)
        await self.other.start()
        self._start(self.gateway.run)
        await turns()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stop, _ in reversed(self._stops):
            stop.set()
        _, stuck = await asyncio.wait([task for _, task in self._stops], timeout=WITHIN_S)
        for task in stuck:
            task.cancel()
        ended = await asyncio.gather(*(task for _, task in self._stops), return_exceptions=True)
        await self._desk_group.__aexit__(None, None, None)
        await turns()
        asyncio.get_running_loop().set_exception_handler(None)
        if error is None:
            assert not stuck, "it does not stop when told"
            assert [e for e in ended if e is not None] == []
            assert self.faults == []

    def _start(self, run: Callable[[asyncio.Event], Any]) -> tuple[asyncio.Event, "asyncio.Task[None]"]:
        stop = asyncio.Event()
        self._stops.append((stop, asyncio.ensure_future(run(stop))))
        return self._stops[-1]

    @property
    def gateway_runs(self) -> bool:
        return not self._stops[0][1].done()

    async def add(self, node_id: str, served: FakeServed) -> tuple[asyncio.Event, "asyncio.Task[None]"]:
        """A node that the gateway knows; returns what stops it and the task that it is."""
        clock = self.node_clocks[node_id] = FakeClock()
        node = Node(card_of(node_id), [served], MemoryBus(self.broker), clock, SIGN, anybody)
        running = self._start(node.run)
        await self.knows(node_id)
        return running

    async def play(self, node_id: str) -> PlayedNode:
        """A node that the test plays."""
        node = PlayedNode(MemoryBus(self.broker), node_id)
        await node.start()
        await self.knows(node_id)
        return node

    async def knows(self, *node_ids: str) -> None:
        await until(lambda: set(node_ids) <= {offer.node_id for offer in self.gateway.roster.offers()}, what=f"{node_ids} on the roster")

    def ask(
        self,
        *,
        stream: bool = False,
        text: str = "hi",
        path: str = CHAT,
        key: str = KEY,
        body: bytes | Sequence[bytes] | None = None,
        method: str = "POST",
    ) -> Asgi:
        """A call of the gateway."""
        if body is None:
            body = msgspec.json.encode({"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": text}]})
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return Asgi(self.gateway.app, path, body, headers, method)

    async def get(self, path: str, *, key: str = KEY) -> Asgi:
        return await self.ask(path=path, body=b"", method="GET", key=key).done()

    async def works_again(self) -> None:
        """A call is answered once the next heartbeat has told that there is room."""
        deadline = time.monotonic() + WITHIN_S / 2
        while (call := await self.ask().done()).status != 200:
            assert time.monotonic() < deadline, call.body
            await asyncio.sleep(POLL_S)

    async def works(self) -> None:
        """Whether a call is answered as it should be."""
        call = await self.ask().done()
        assert (call.status, call.body) == (200, b'{"text":"hello"}'), call.body

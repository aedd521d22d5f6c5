"""A caller over ASGI: their request read within limits, their answer written, their departure noticed."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any

import msgspec

from fallow.apps.gateway import errors
from fallow.apps.gateway.attempts import Origin, Outcome
from fallow.apps.gateway.history import Story
from fallow.apps.gateway.metrics import Metrics
from fallow.core.admit import BODY_BYTES_MAX
from fallow.core.needs import MICRO
from fallow.model import messages as m
from fallow.model.errors import BodyTimeout, BodyTooLarge, Failure
from fallow.model.ids import CallId
from fallow.wire import prefer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_S_MAX = 60.0
"""How long a caller may take to send a request's body."""
LEFTOVER_BYTES_MAX = 64 * 1024 * 1024
LEFTOVER_S = 2.0
"""How much of a refused body is read away, so that the client gets to read the refusal."""


def as_bearer(key: bytes) -> bytes:
    """A bare API key as an Authorization header; empty if there is none."""
    return b"Bearer " + key if key else b""


class CallerGone(Exception):
    """The caller closed the connection before the request was whole."""


class Incoming:
    """The request of a caller, as it comes in."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self._receive = receive
        self.lines: list[tuple[bytes, bytes]] = scope["headers"]
        self._headers: dict[bytes, bytes] = dict(self.lines)
        self.is_read = not self._has_body()

    def header(self, name: bytes) -> bytes:
        return self._headers.get(name, b"")

    def authorization(self) -> bytes:
        """The caller's key as an Authorization header; Anthropic's clients send it as `x-api-key`."""
        return self._headers.get(b"authorization") or as_bearer(self.header(b"x-api-key"))

    def load_wait_ms(self) -> int | None:
        """How long the caller is willing to wait for a model to be loaded; raises InvalidRequest."""
        if b"prefer" not in self._headers:
            return None
        seconds = prefer.wait_s([value for name, value in self.lines if name == b"prefer"])
        return None if seconds is None else seconds * 1000

    def _has_body(self) -> bool:
        return self.header(b"content-length") not in (b"", b"0") or bool(self.header(b"transfer-encoding"))

    def declared_bytes(self) -> int:
        """The body's declared size, or the most it may have; raises BodyTooLarge before a byte of it is read."""
        declared = self.header(b"content-length")
        size = int(declared) if declared.isdigit() else BODY_BYTES_MAX if self.header(b"transfer-encoding") else 0
        if size > BODY_BYTES_MAX:
            raise BodyTooLarge(f"the body has {size} bytes, the limit is {BODY_BYTES_MAX}")
        return size

    async def body(self) -> bytes:
        """The whole body; raises BodyTooLarge, BodyTimeout, CallerGone."""
        try:
            async with asyncio.timeout(BODY_S_MAX):
                message = await self._next()
                data: bytes = message.get("body", b"")
                if message.get("more_body", False):
                    data = await self._rest(data)
        except TimeoutError:
            raise BodyTimeout(f"the body did not come within {BODY_S_MAX:g} s") from None
        self.is_read = True
        return data

    async def _rest(self, first: bytes) -> bytes:
        parts = [first]
        size = len(first)
        more = True
        while more:
            message = await self._next()
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > BODY_BYTES_MAX:
                raise BodyTooLarge(f"the body is over the limit of {BODY_BYTES_MAX} bytes")
            parts.append(chunk)
            more = message.get("more_body", False)
        return b"".join(parts)

    async def read_away(self) -> None:
        """Take what the client still sends, within limits: it reads our refusal only when it could send."""
        left = LEFTOVER_BYTES_MAX
        with contextlib.suppress(CallerGone, TimeoutError):
            async with asyncio.timeout(LEFTOVER_S):
                more = True
                while more and left > 0:
                    message = await self._next()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)

    async def gone(self) -> None:
        """Return when the caller has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        return message


class HttpCaller:
    """The caller of one request: what they sent (`incoming`), and what they get (through `send`).

    `is_repeat` is set when the answer is that of an earlier call. `lasts_until` is there for a call whose answer others can
    ask for: until it is set the call goes on without its caller.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics) -> None:
        self.incoming = Incoming(scope, receive)
        self.send = send
        self._metrics = metrics
        self.arrived_ns = perf_counter_ns()
        self.call_id = CallId("call_" + secrets.token_hex(12))
        self.outcome = Outcome()
        self.status = 0
        self.load_wait_ms: int | None = None
        self.story: Story | None = None
        self.node_asked = False
        self.is_repeat = False
        self.lasts_until: asyncio.Event | None = None

    def trying(self, origin: Origin) -> None:
        self.node_asked = True
        if self.story is not None:
            self.story.trying(origin.node_id, origin.hardware, origin.place, origin.price)

    def tried(self, failure: Failure | None) -> None:
        if self.story is not None:
            self.story.tried(None if failure is None else failure.code)

    def waits(self, why: str) -> None:
        if self.story is not None:
            self.story.waits(why)

    async def gone(self) -> None:
        """Return when the caller has closed the connection, and nobody else can ask for the answer."""
        if self.lasts_until is not None:
            await self.lasts_until.wait()
        await self.incoming.gone()

    async def begin(self, head: m.Head, origin: Origin) -> None:
        """The head of a streamed answer."""
        self._observe(head)
        await self._start(head.status, head.content_type, self._about(head, origin), None)

    async def write(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes, head: m.Head | None, origin: Origin) -> None:
        """The end of an answer; of one that was held back, all of it."""
        if self.story is not None:
            self.story.answered(origin.place, origin.price)
        if not self.status:
            assert head is not None, "an answer has a head"
            self._observe(head)
            await self._start(head.status, head.content_type, self._about(head, origin), len(data))
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def reply(self, status: int, data: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), *, more: bool = False) -> int:
        """A small JSON document."""
        await self._start(status, "application/json", list(headers), len(data))
        await self.send({"type": "http.response.body", "body": data, "more_body": more})
        return status

    async def fail(self, failure: Failure) -> int:
        """The error as the path's protocol has it. In a stream that began it becomes the last event, and [DONE] doesn't come."""
        status = errors.status_of(failure).http
        protocol = errors.protocol_of(self.incoming.path, anthropic=bool(self.incoming.header(b"anthropic-version")))
        if self.status and failure.code not in ("gateway_stopping", "broker_lost"):
            failure = msgspec.structs.replace(failure, code="stream_interrupted")
        if self.story is not None:
            self.story.code = failure.code
        if self.status:
            event = errors.event_of(failure, protocol, self.call_id)
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
            return status
        body = errors.body_of(failure, protocol, self.call_id)
        headers = [(b"fallow-call", self.call_id.encode()), (b"fallow-attempts", b"%d" % self.outcome.attempts)]
        if self.outcome.node_id:
            headers.append((b"fallow-node", self.outcome.node_id.encode()))
        headers.extend(self._applied())
        retry_after = errors.retry_after_s(failure)
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        if self.incoming.is_read:
            return await self.reply(status, body, tuple(headers))
        await self.reply(status, body, (*headers, (b"connection", b"close")), more=True)
        await self.incoming.read_away()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    async def _start(self, status: int, content_type: str, headers: list[tuple[bytes, bytes]], size: int | None) -> None:
        headers.append((b"content-type", content_type.encode("latin-1")))
        self.status = status
        if size is not None:
            headers.append((b"content-length", b"%d" % size))
        elif content_type.startswith("text/event-stream"):
            headers.append((b"cache-control", b"no-cache"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    def _observe(self, head: m.Head) -> None:
        if self.story is not None:
            self.story.first_byte()
        self._metrics.overhead(max(0.0, self._overhead_us(head) / 1e6))

    def _overhead_us(self, head: m.Head) -> int:
        return (perf_counter_ns() - self.arrived_ns) // 1000 - head.engine_us

    def _about(self, head: m.Head, origin: Origin) -> list[tuple[bytes, bytes]]:
        return [
            (b"fallow-call", self.call_id.encode()),
            (b"fallow-node", origin.node_id.encode()),
            (b"fallow-hardware", origin.hardware.encode()),
            (b"fallow-ring", origin.place.quote.ring.encode()),
            (b"fallow-readers", origin.readers.encode()),
            (b"fallow-cost-max", b"%.6f" % (origin.place.quote.cost_max_micro / MICRO)),
            (b"fallow-attempts", b"%d" % origin.attempts),
            (b"fallow-overhead-ms", b"%.2f" % max(0.0, self._overhead_us(head) / 1000)),
            *self._applied(),
        ]

    def _applied(self) -> tuple[tuple[bytes, bytes], ...]:
        """What of the caller's preferences is followed."""
        return () if self.load_wait_ms is None else ((b"preference-applied", b"wait=%d" % (self.load_wait_ms // 1000)),)

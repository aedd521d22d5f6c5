"""The hot paths of the API, as plain ASGI: read no more than is needed, refuse early, write little."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any

import msgspec

from fallow.apps.gateway import errors
from fallow.apps.gateway.calls import Calls, Origin, Outcome
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.roster import Roster
from fallow.core.admit import BODY_BYTES_MAX
from fallow.model import messages as m
from fallow.model.call import Call, Grant
from fallow.model.errors import BodyTooLarge, Failure, FallowError, InvalidRequest
from fallow.model.ids import CallId, GatewayId
from fallow.model.needs import Needs, ServiceTier
from fallow.ports import Clock
from fallow.wire import openai, sse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_S_MAX = 60.0
"""How long a caller may take to send a request's body."""
CALLS_MAX = 2_000
BODIES_BYTES_MAX = 256 * 1024 * 1024
LEFTOVER_BYTES_MAX = 64 * 1024 * 1024
LEFTOVER_S = 2.0
"""How much of a refused body is read away, so that the client gets to read the refusal."""
CALL_PATHS = frozenset({openai.CHAT, openai.COMPLETIONS})
TIERS: dict[openai.Tier, ServiceTier] = {
    "auto": "default",
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
}
CLIENT_CLOSED = 499

log = logging.getLogger("fallow.gateway")
_json = msgspec.json.Encoder()


class CallerGone(Exception):
    """The caller closed the connection before the request was whole."""


class Api:
    """`/v1/…`."""

    def __init__(self, gateway_id: GatewayId, calls: Calls, keys: Keys, roster: Roster, clock: Clock, metrics: Metrics) -> None:
        self._gateway_id = gateway_id
        self._calls = calls
        self._keys = keys
        self._roster = roster
        self._clock = clock
        self._metrics = metrics
        self._bodies_bytes = 0
        self.calls_now = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpCaller(scope, receive, send, self._metrics)
        try:
            status = await self._answer(exchange)
        except CallerGone:
            status = CLIENT_CLOSED
        except FallowError as error:
            status = await exchange.fail(error.failure())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (the outermost loop: one call's fault is one call's; its text may hold a prompt)
            log.error("call %s broke: %s", exchange.call_id, type(error).__name__)
            status = await exchange.fail(Failure(code="internal_error", message="the gateway failed on this call"))
        usage = exchange.outcome.usage
        self._metrics.call_ended(status, usage.prompt_tokens if usage else 0, usage.output_tokens if usage else 0)

    async def _answer(self, http: "HttpCaller") -> int:
        if self.stopping:
            return await http.fail(Failure(code="gateway_stopping", message="the gateway is being stopped"))
        authorization = http.header(b"authorization")
        grant = self._keys.recall(authorization) or await self._keys.check(authorization)
        path, method = http.scope["path"], http.scope["method"]
        if path in CALL_PATHS:
            return await self._call(http, grant) if method == "POST" else await http.fail(_method(method, "POST"))
        if path == openai.MODELS:
            return await http.reply(200, self._models()) if method == "GET" else await http.fail(_method(method, "GET"))
        if path.startswith(openai.MODELS + "/"):
            return await self._model(http, path.removeprefix(openai.MODELS + "/"))
        return await http.fail(Failure(code="unknown_path", message=f"there is no {path[:200]}; see /openapi.json for what there is"))

    async def _call(self, http: "HttpCaller", grant: Grant) -> int:
        if self.calls_now >= CALLS_MAX:
            text = f"this gateway already answers {CALLS_MAX} calls"
            return await http.fail(Failure(code="too_many_calls", message=text, retry_after_ms=1_000))
        self.calls_now += 1
        size = 0
        try:
            size = http.declared_bytes()
            if self._bodies_bytes + size > BODIES_BYTES_MAX:
                text = "the gateway holds too many request bodies"
                return await http.fail(Failure(code="too_many_calls", message=text, retry_after_ms=1_000))
            self._bodies_bytes += size
            body = await http.body()
            call = self._read(http, grant, body)
            http.outcome = outcome = await self._calls.run(call, body, http)
            if outcome.failure is not None:
                return await http.fail(outcome.failure)
            return CLIENT_CLOSED if outcome.left else http.status
        finally:
            self.calls_now -= 1
            self._bodies_bytes -= size

    def _read(self, http: "HttpCaller", grant: Grant, body: bytes) -> Call:
        head = openai.read_head(body)
        needs = Needs(
            model=head.model,
            prompt_tokens=len(body) // openai.BYTES_PER_TOKEN,
            output_tokens_max=head.output_tokens_max,
            service_tier=TIERS[head.service_tier or "default"],
        )
        return Call(
            id=http.call_id,
            org_id=grant.org_id,
            key_id=grant.key_id,
            gateway_id=self._gateway_id,
            path=http.scope["path"],
            stream=bool(head.stream),
            body_bytes=len(body),
            needs=needs,
            arrived_at_ms=self._clock.wall_ms(),
        )

    def _models(self) -> bytes:
        names = sorted({c.offer.model for c in self._roster.candidates()})
        return _json.encode(openai.ModelList(data=[openai.Model(id=name, created=0, owned_by="fallow") for name in names]))

    async def _model(self, http: "HttpCaller", name: str) -> int:
        if any(c.offer.model == name for c in self._roster.candidates()):
            return await http.reply(200, _json.encode(openai.Model(id=name, created=0, owned_by="fallow")))
        return await http.fail(Failure(code="model_not_found", message=f"the model {name[:200]!r} is not offered here", param="model"))


def _method(method: str, wanted: str) -> Failure:
    return Failure(code="method_not_allowed", message=f"{method} is not possible here; use {wanted}")


class HttpCaller:
    """The caller of one request: what they sent, and what they get."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._metrics = metrics
        self._arrived_ns = perf_counter_ns()
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self.call_id = CallId("call_" + secrets.token_hex(12))
        self.outcome = Outcome()
        self.status = 0
        self._body_read = False

    def header(self, name: bytes) -> bytes:
        return self._headers.get(name, b"")

    def has_body(self) -> bool:
        return self.header(b"content-length") not in (b"", b"0") or bool(self.header(b"transfer-encoding"))

    def declared_bytes(self) -> int:
        """The body's declared size, or the most it may have; raises BodyTooLarge before a byte of it is read."""
        declared = self.header(b"content-length")
        size = int(declared) if declared.isdigit() else BODY_BYTES_MAX if self.header(b"transfer-encoding") else 0
        if size > BODY_BYTES_MAX:
            raise BodyTooLarge(f"the body has {size} bytes, the limit is {BODY_BYTES_MAX}")
        return size

    async def body(self) -> bytes:
        """The whole body; raises BodyTooLarge, InvalidRequest when it takes too long, CallerGone."""
        try:
            async with asyncio.timeout(BODY_S_MAX):
                message = await self._next()
                data: bytes = message.get("body", b"")
                if message.get("more_body", False):
                    data = await self._rest(data)
        except TimeoutError:
            raise InvalidRequest(f"the body did not come within {BODY_S_MAX:g} s") from None
        self._body_read = True
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

    async def _next(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        return message

    async def gone(self) -> None:
        """Return when the caller has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, head: m.Head, origin: Origin) -> None:
        """The head of a streamed answer."""
        self._observe(head)
        await self._start(head.status, head.content_type, self._about(head, origin), None)

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes, head: m.Head | None, origin: Origin) -> None:
        """The end of an answer; of one that was held back, all of it."""
        if not self.status:
            assert head is not None, "an answer has a head"
            self._observe(head)
            await self._start(head.status, head.content_type, self._about(head, origin), len(data))
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def reply(self, status: int, data: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), *, more: bool = False) -> int:
        """A small JSON document."""
        await self._start(status, "application/json", list(headers), len(data))
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        return status

    async def fail(self, failure: Failure) -> int:
        """The error as the API has it. In a stream that began it becomes the last event, and [DONE] doesn't come."""
        status, kind = errors.status_of(failure)
        body = openai.error_body(failure, kind)
        if self.status:
            code = failure.code if failure.code in ("gateway_stopping", "broker_lost") else "stream_interrupted"
            body = openai.error_body(msgspec.structs.replace(failure, code=code), kind)
            await self._send({"type": "http.response.body", "body": sse.event(body), "more_body": False})
            return status
        headers = [(b"fallow-call", self.call_id.encode()), (b"fallow-attempts", b"%d" % self.outcome.attempts)]
        if self.outcome.node_id:
            headers.append((b"fallow-node", self.outcome.node_id.encode()))
        retry_after = errors.retry_after_s(failure)
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        if self._body_read or not self.has_body():
            return await self.reply(status, body, tuple(headers))
        await self.reply(status, body, (*headers, (b"connection", b"close")), more=True)
        await self._read_away()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    async def _read_away(self) -> None:
        """Take what the client still sends, within limits: it reads our refusal only when it could send."""
        left = LEFTOVER_BYTES_MAX
        with contextlib.suppress(CallerGone, TimeoutError):
            async with asyncio.timeout(LEFTOVER_S):
                more = True
                while more and left > 0:
                    message = await self._next()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)

    async def _start(self, status: int, content_type: str, headers: list[tuple[bytes, bytes]], size: int | None) -> None:
        self.status = status
        headers.append((b"content-type", content_type.encode("latin-1")))
        if size is not None:
            headers.append((b"content-length", b"%d" % size))
        elif content_type.startswith("text/event-stream"):
            headers.append((b"cache-control", b"no-cache"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _observe(self, head: m.Head) -> None:
        self._metrics.overhead(max(0.0, self._overhead_us(head) / 1e6))

    def _overhead_us(self, head: m.Head) -> int:
        return (perf_counter_ns() - self._arrived_ns) // 1000 - head.engine_us

    def _about(self, head: m.Head, origin: Origin) -> list[tuple[bytes, bytes]]:
        return [
            (b"fallow-call", self.call_id.encode()),
            (b"fallow-node", origin.node_id.encode()),
            (b"fallow-hardware", origin.hardware.encode()),
            (b"fallow-attempts", b"%d" % origin.attempts),
            (b"fallow-overhead-ms", b"%.2f" % max(0.0, self._overhead_us(head) / 1000)),
        ]

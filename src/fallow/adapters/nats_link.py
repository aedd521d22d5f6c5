"""One connection to a NATS server, from its beginning to its end. It never comes back by itself: that is the bus's to decide."""

import asyncio
import base64
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import ParseResult, urlsplit

import aiohttp
import msgspec
from nats import errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Srv
from nats.aio.transport import TcpTransport, Transport, WebSocketTransport

from fallow.adapters.nats_reader import Reader
from fallow.adapters.nkey import Credentials
from fallow.model.errors import BadSetting, WireError
from fallow.ports import Delivery, Hear
from fallow.wire.jwt import claims_of

CLOSE_S = 1.0
FLUSH_S = 2
"""What one round trip to the broker may take where something waits for it."""
LEAVE_S = 30.0
"""How long a connection that is replaced may wait for the answers to what was asked on it."""
HOST_CHARS_MAX = 64
"""An IPv6 address is shorter. What is longer isn't one."""
TLS_MIN = ssl.TLSVersion.TLSv1_3
REQUEST_INFO = b"Nats-Request-Info:"
"""The header in which the broker says who asks, where an account shares that. What a client writes there itself is taken out."""
NOBODY = b"NATS/1.0 503"
"""The status with which the broker says that nobody listens."""

T = TypeVar("T")
log = logging.getLogger("fallow.bus")


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How a broker is reached. `ca_pem`: the only authority whose certificates are believed; empty: those of this system.

    `proxy`: an HTTP proxy (`http://[user:password@]host:port`) through which a `wss://` address is reached; empty: none.
    """

    ca_pem: str = ""
    proxy: str = ""

    def __repr__(self) -> str:
        return f"Reach(ca_pem of {len(self.ca_pem)} characters, proxy={'yes' if self.proxy else 'no'})"

    def tls(self) -> ssl.SSLContext:
        """What this side asks of a server's certificate; raises BadSetting if `ca_pem` is none."""
        try:
            context = ssl.create_default_context(cadata=self.ca_pem or None)
        except (ssl.SSLError, ValueError):
            raise BadSetting("the authority's certificate can't be read: a PEM file is expected") from None
        context.minimum_version = TLS_MIN
        return context


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection is made with. Times in seconds."""

    address: str
    name: str
    login: Credentials
    reach: Reach
    connect_s: float
    ping_s: float
    pings_missed_max: int


class Link:
    """A connection that is open, with what listens on it. `on_end` is told once when it breaks, and not when we close it."""

    def __init__(self, plan: Plan, on_end: Callable[["Link"], None], on_error: Callable[[Exception], None]) -> None:
        self._plan = plan
        self._on_end = on_end
        self._on_error = on_error
        self._ended = False
        self._client = _Client(plan.reach.proxy, plan.connect_s, self._hear_end)
        self._asked = 0
        self._unasked = asyncio.Event()
        self._unasked.set()

    async def open(self) -> None:
        """Raises OSError, TimeoutError or an error of nats-py; nothing is left open then."""
        plan = self._plan
        client = self._client
        scheme = urlsplit(plan.address).scheme
        options = _login(plan.login)
        if scheme in ("tls", "wss"):
            options["tls"] = plan.reach.tls()
            options["tls_handshake_first"] = scheme == "tls"
        try:
            await client.connect(
                servers=[plan.address],
                name=plan.name,
                allow_reconnect=False,
                connect_timeout=plan.connect_s,  # type: ignore[arg-type]  # a fraction works
                ping_interval=plan.ping_s,  # type: ignore[arg-type]
                max_outstanding_pings=plan.pings_missed_max,
                pending_size=0,  # while disconnected nothing is kept: a call must fail now, not run later for nobody
                error_cb=self._hear_error,
                **options,
            )
        except BaseException:
            self._ended = True
            await asyncio.shield(client.give_up())
            raise

    async def _hear_error(self, error: Exception) -> None:
        self._on_error(error)

    def _hear_end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(self)

    @property
    def is_up(self) -> bool:
        return not self._ended and bool(self._client.is_connected)

    async def listen(self, subject: str, hear: Hear, group: str) -> int:
        """The broker knows of it after the next `flush`. The number is for `hear_with`."""
        number = self._client._sid + 1
        self._client.ears[number] = hear  # before the broker can send anything
        try:
            subscription = await heeded(self._client.subscribe(subject, queue=group))
        except BaseException:
            self._client.ears.pop(number, None)
            raise
        assert subscription._id == number
        return number

    def hear_with(self, number: int, hear: Hear) -> None:
        """Another ear for a subscription."""
        self._client.ears[number] = hear

    async def unlisten(self) -> None:
        """The broker is told to send nothing more, and all that it had sent has been heard."""
        for number in self._client.ears:
            await self._client._send_unsubscribe(number)
        await self.flush()

    async def publish(self, subject: str, data: bytes, reply: str) -> None:
        await self._client.publish(subject, data, reply)

    async def ask(self, subject: str, data: bytes, within_s: float) -> bytes:
        self._asked += 1
        self._unasked.clear()
        try:
            return bytes((await heeded(self._client.request(subject, data, timeout=within_s))).data)
        finally:
            self._asked -= 1
            if self._asked == 0:
                self._unasked.set()

    async def leave(self) -> None:
        """Close when all that was asked here has been answered, or after a while."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self._unasked.wait()
        finally:
            await asyncio.shield(self.close())

    async def flush(self, within_s: float = FLUSH_S) -> None:
        """Until the broker has taken what was sent, and we what it sent before. Twice: a ping overtakes what waits in the buffer."""
        await heeded(self._client.flush(within_s))  # type: ignore[arg-type]  # a fraction works
        await heeded(self._client.flush(within_s))  # type: ignore[arg-type]

    async def close(self) -> None:
        """At once; what waits to be sent goes out if the broker takes it in time."""
        was_up, self._ended = self.is_up, True
        with contextlib.suppress(errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                if was_up:
                    await self.flush()
                await self._client.close()


def _login(login: Credentials) -> dict[str, Any]:
    """What nats-py is told of who we are. The inbox is named by the JWT's subject: nobody may listen to another's."""
    try:
        inbox = claims_of(login.jwt).sub
    except WireError as error:
        raise errors.Error(f"nats: {error.message}") from None
    return {
        "user_jwt_cb": login.jwt.encode,
        "signature_cb": lambda nonce: base64.b64encode(login.key.sign(nonce.encode())),
        "inbox_prefix": f"_I.{inbox}",
    }


class _Client(Client):
    """nats-py's client, with four of its inner steps replaced.

    It tries a server once. It reads strictly. It hands messages on as they are read, without a queue and a task for each subscription,
    so that a pong means that all before it has been heard. And it ends in good order even where its own way of closing breaks off.
    """

    def __init__(self, proxy: str, connect_s: float, on_end: Callable[[], None]) -> None:
        super().__init__()
        self.ears: dict[int, Hear] = {}
        self._ps = Reader(self)  # type: ignore[assignment]  # it is fed and reset like theirs
        self._proxy = proxy
        self._connect_s = connect_s
        self._told_end = on_end

    async def give_up(self) -> None:
        """End what never became a connection: there is nobody to take leave of."""
        transport, self._transport = self._transport, None
        await _drop(transport)
        await self._close(Client.CLOSED, do_cbs=False)

    async def _select_next_server(self) -> None:
        server = self._server_pool[0]
        await self._connect_to_server(server)
        self._current_server = server

    async def _connect_to_server(self, s: Srv) -> None:
        if s.uri.scheme in ("ws", "wss"):
            self._transport = _WebSocket(self._proxy, self._connect_s)
            return await super()._connect_to_server(s)
        self._transport = _Tcp()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, buffer_size=DEFAULT_BUFFER_SIZE, connect_timeout=self.options["connect_timeout"])

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        hear = self.ears.get(sid)
        if hear is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        host = _host(headers) if headers else ""
        take(hear, Delivery(subject.decode(), reply.decode(), data, headers.startswith(NOBODY), host))

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._told_end()  # first: a broker that hangs can hold up what follows
        try:
            async with asyncio.timeout(CLOSE_S):
                await super()._close(status, do_cbs)
        except (OSError, TimeoutError):
            await _drop(self._transport)


async def heeded(work: Awaitable[T]) -> T:
    """What comes of `work`, unless we were cancelled meanwhile, though it took no notice.

    nats-py lets a cancellation fall in places, and so does `asyncio.wait_for` before Python 3.12 if an answer comes at the same moment.
    Whoever is to stop would go on for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    result = await work
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def _drop(transport: Transport | None) -> None:
    """Let go of a connection whose other side doesn't take what is left to send."""
    if isinstance(transport, _WebSocket):
        await transport.abort()
    elif isinstance(transport, TcpTransport) and transport._io_writer is not None:
        transport._io_writer.transport.abort()


def take(hear: Hear, delivery: Delivery) -> None:
    """Hand a message on. An ear that fails must not take the connection with it."""
    try:
        hear(delivery)
    except Exception:
        log.exception("what came on a subscription could not be taken")


def _host(headers: bytes) -> str:
    """The asker's host by the broker's own word, or nothing. Were the header there twice, neither would count."""
    found = [line for line in headers.split(b"\r\n") if line[: len(REQUEST_INFO)].lower() == REQUEST_INFO.lower()]
    if len(found) != 1:
        return ""
    try:
        said = msgspec.json.decode(found[0][len(REQUEST_INFO) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    host = said.get("host", "") if isinstance(said, dict) else ""
    return host if isinstance(host, str) and len(host) <= HOST_CHARS_MAX else ""


class _Tcp(TcpTransport):
    """nats-py's TCP, whose reader knows when it stands behind TLS; without that asyncio warns at the end of each connection."""

    async def connect_tls(self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        protocol = getattr(self._io_writer, "_protocol", None)
        if isinstance(protocol, asyncio.StreamReaderProtocol):
            protocol._over_ssl = True  # type: ignore[attr-defined]


class _WebSocket(WebSocketTransport):
    """nats-py's WebSocket, which also goes through a proxy and gives up in time."""

    def __init__(self, proxy: str, connect_s: float) -> None:
        super().__init__()
        self._proxy = proxy
        self._connect_s = connect_s

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        await self._join(uri.geturl(), None)
        self._using_tls = False

    async def connect_tls(self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        if self._ws is not None and not self._ws.closed:
            return  # the server's greeting asks for the TLS that is there already
        assert not isinstance(uri, str)
        await self._join(uri.geturl(), ssl_context)
        self._using_tls = True

    async def _join(self, address: str, tls: ssl.SSLContext | None) -> None:
        try:
            async with asyncio.timeout(self._connect_s):
                self._ws = await self._client.ws_connect(
                    address,
                    ssl=True if tls is None else tls,
                    proxy=self._proxy or None,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                    max_msg_size=0,
                )
        except aiohttp.ClientHttpProxyError as error:
            raise OSError(f"the proxy refused: {error.status} {error.message}") from None
        except aiohttp.ClientProxyConnectionError:
            raise OSError("the proxy can't be reached") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise error.certificate_error from None
        except aiohttp.ClientError as error:
            raise OSError(f"no WebSocket there: {type(error).__name__}") from None

    async def wait_closed(self) -> None:
        if self._ws is not None:
            await self._close_task
        await self._client.close()

    async def abort(self) -> None:
        await self._client.close()

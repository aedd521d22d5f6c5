"""An engine that speaks HTTP/1.1 on a Unix socket, a TCP port or TLS; the parser is httptools, the connections are ours.

A general client costs a third of the gateway's throughput here (docs/adr/0003), and needs none of what we ask.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from time import perf_counter_ns
from typing import cast

import httptools

from fallow.model.errors import EngineFailed, EngineStalled
from fallow.model.messages import Head

IDLE_S_MAX = 4.0
USES_MAX = 90
"""llama.cpp closes a connection after 5 s of idling or 100 requests; we are there first."""
IDLE_CONNECTIONS_MAX = 64
CONNECT_S = 2.0
CONNECT_TLS_S = 10.0
"""The same for a server that may be far away, with TLS's own round trips."""
HEAD_S_MAX = 1_800.0
"""How long an engine may work before it begins to answer: attached ones write whole answers at their end only."""
SILENCE_S_MAX = 120.0
"""How long it may be silent in the middle of one."""
BUFFER_BYTES_MAX = 256 * 1024
HEADERS_MAX = 64
RETRY_AFTER_S_MAX = 3_600


class _Parsed:
    """What has come of one answer. httptools calls the `on_…` methods."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self._pause = pause
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.content_type = ""
        self.retry_after_s: int | None = None
        self.headers = 0
        self.has_length = False
        self.head_at_ns = 0
        self.chunks: deque[bytes] = deque()
        self.buffered = 0
        self.is_whole = False
        self.may_stay = False

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers += 1
        if self.headers > HEADERS_MAX:
            raise ValueError("too many headers")
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1")
        elif name == b"retry-after" and value.isdigit():  # a date is not read: clocks differ
            self.retry_after_s = min(int(value[:9]), RETRY_AFTER_S_MAX)
        self.has_length |= name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.head_at_ns = perf_counter_ns()

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)
        self.buffered += len(body)
        if self.buffered > BUFFER_BYTES_MAX:
            self._pause()

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:  # a hint on the way; the answer follows
            self.status, self.head_at_ns, self.content_type, self.has_length = 0, 0, "", False
            return
        self.is_whole = True
        self.may_stay = self.parser.should_keep_alive()  # the parser has forgotten it a moment later


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.uses = 0
        self.idle_since = 0.0
        self.is_broken = False
        self.begin()

    def begin(self) -> None:
        """Get ready for the next answer."""
        self.answer = _Parsed(self._pause)
        self.wake: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own are no subclasses

    def data_received(self, data: bytes) -> None:
        try:
            self.answer.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.is_broken = True
            self.close()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        answer = self.answer
        # An answer that tells no length ends with its connection.
        answer.is_whole |= exc is None and answer.head_at_ns > 0 and not answer.has_length and not self.is_broken
        self.is_broken = True
        self._tell()

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing() and not self.is_broken

    @property
    def keeps(self) -> bool:
        """Whether another request may follow on this connection."""
        answer = self.answer
        return answer.is_whole and answer.may_stay and not answer.chunks and self.is_open and self.uses < USES_MAX

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    async def wait(self, within_s: float) -> None:
        """Until something came; raises EngineStalled."""
        self.wake = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within_s):
                await self.wake
        except TimeoutError:
            raise EngineStalled(f"the engine said nothing for {within_s:g} s") from None

    def take(self) -> bytes:
        """All bytes that came since the last time."""
        answer = self.answer
        data = answer.chunks.popleft() if len(answer.chunks) == 1 else b"".join(answer.chunks)
        answer.chunks.clear()
        if answer.buffered > BUFFER_BYTES_MAX and self.transport is not None:
            self.transport.resume_reading()
        answer.buffered = 0
        return data

    def _pause(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()

    def _tell(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


class HttpAnswer:
    """An engine's answer as it comes."""

    def __init__(self, connection: _Connection, head: Head) -> None:
        self._connection = connection
        self.head = head

    @property
    def retry_after_s(self) -> int | None:
        """The engine's own word on when to ask again, in seconds."""
        return self._connection.answer.retry_after_s

    @property
    def is_complete(self) -> bool:
        """Whether all of it came and was taken."""
        return self._connection.answer.is_whole and not self._connection.answer.chunks

    async def body(self) -> AsyncIterator[bytes]:
        """The body's bytes as they come; raises EngineFailed if the connection breaks before its end, EngineStalled if it falls silent."""
        connection = self._connection
        while True:
            if connection.answer.chunks:
                yield connection.take()
            elif connection.answer.is_whole:
                return
            elif connection.is_broken:
                raise EngineFailed("the engine closed the connection in the middle of its answer")
            else:
                await connection.wait(SILENCE_S_MAX)


def default_tls() -> ssl.SSLContext:
    """TLS that checks certificate and host name against the machine's own authorities."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class HttpEngine:
    """The client of one engine. `address` is an absolute path of a socket, or `host:port`; `headers` go with every request.

    `base` stands before every path. With `tls` all goes encrypted, and the host must show a certificate that `tls` trusts.
    """

    def __init__(
        self, address: str, headers: Mapping[str, str] | None = None, *, base: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        self._address = address
        self._base = base
        self._tls = tls
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in {"host": "engine", **(headers or {})}.items())
        self._idle: list[_Connection] = []

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[HttpAnswer]:
        """Ask the engine. Leaving before the answer's end closes the connection, which stops the generation."""
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        async with self._asked(head.encode() + body) as answer:
            yield answer

    async def is_healthy(self, within_s: float) -> bool:
        """Whether the engine answers that it is ready."""
        try:
            async with asyncio.timeout(within_s), self._asked(self._get("/health")) as answer:
                return answer.head.status == 200
        except (EngineFailed, TimeoutError):
            return False

    async def get(self, path: str, within_s: float, bytes_max: int) -> tuple[int, bytes]:
        """A small document of the engine: status and body; raises EngineFailed."""
        data = b""
        try:
            async with asyncio.timeout(within_s), self._asked(self._get(path)) as answer:
                async for chunk in answer.body():
                    data += chunk
                    if len(data) > bytes_max:
                        raise EngineFailed(f"the engine's {path} is over {bytes_max} bytes")
                return answer.head.status, data
        except TimeoutError:
            raise EngineFailed(f"the engine did not answer {path} within {within_s:g} s") from None

    def _get(self, path: str) -> bytes:
        return f"GET {self._base}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()

    @contextlib.asynccontextmanager
    async def _asked(self, request: bytes) -> AsyncIterator[HttpAnswer]:
        asked_ns = perf_counter_ns()
        connection = await self._send(request)
        try:
            parsed = connection.answer
            engine_us = (parsed.head_at_ns - asked_ns) // 1000
            yield HttpAnswer(connection, Head(status=parsed.status, content_type=parsed.content_type, engine_us=engine_us))
        finally:
            if connection.keeps and len(self._idle) < IDLE_CONNECTIONS_MAX:
                connection.idle_since = asyncio.get_running_loop().time()
                self._idle.append(connection)
            else:
                connection.close()

    async def _send(self, request: bytes) -> _Connection:
        """A connection on which the answer's head has come. One that the engine closed meanwhile is replaced by a fresh one."""
        connection = self._reuse()
        if connection is not None and await self._head(connection, request):
            return connection
        connection = await self._connect()
        if await self._head(connection, request):
            return connection
        raise EngineFailed("the engine closed the connection without an answer")

    async def _head(self, connection: _Connection, request: bytes) -> bool:
        assert connection.transport is not None
        connection.begin()
        connection.uses += 1
        connection.transport.write(request)
        try:
            while not connection.answer.head_at_ns:
                if not connection.is_open:
                    return False
                await connection.wait(HEAD_S_MAX)
        except (asyncio.CancelledError, EngineStalled):
            connection.close()
            raise
        return True

    def _reuse(self) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and now - connection.idle_since < IDLE_S_MAX:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TLS_S if self._tls else CONNECT_S):
                if self._address.startswith("/"):
                    _, connection = await loop.create_unix_connection(_Connection, self._address)
                else:
                    host, _, port = self._address.rpartition(":")
                    _, connection = await loop.create_connection(_Connection, host, int(port), ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise EngineFailed(f"the engine can't be reached: {_why(error)}") from None
        return connection

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()


def _why(error: Exception) -> str:
    """What went wrong on the way to an engine, without what anybody wrote."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not trusted ({error.verify_message})"
        case ssl.SSLError():
            return "it does not speak TLS as we do"
        case socket.gaierror():
            return "its name is not known"
        case _:
            return type(error).__name__

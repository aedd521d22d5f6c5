"""uvicorn, told to send what one turn of the event loop wrote in one system call, and to let open calls end before it stops."""

import asyncio
import errno
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fallow.model.errors import StartFailed

KEEP_ALIVE_S = 75
BACKLOG = 1024
STOP_S = 1.0
"""How long callers have to read the last word of a call that was ended."""


class Cork:
    """A transport whose writes leave together at the end of the loop's turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def _flush(self) -> None:
        if self._pending and not self._transport.is_closing():
            self._transport.write(b"".join(self._pending) if len(self._pending) > 1 else self._pending[0])
        self._pending.clear()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol on a corked transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Cork(transport, self.loop))  # type: ignore[arg-type]


class Server(uvicorn.Server):
    """A server whose signals are somebody else's.

    To stop, it closes the listener and the connections that are idle, and waits for the answers under way. `drain` runs meanwhile,
    and returns when it has ended those that took too long; callers that don't read even that are hung up on.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end(), name="drain")  # its first step comes when the listener is closed
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await self._drain()
        await asyncio.sleep(STOP_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(app: Any, drain: Callable[[], Awaitable[None]], *, drain_s: float) -> Server:
    """A server for an ASGI app; it logs nothing of requests. `drain` returns within `drain_s`."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        proxy_headers=False,
        http=CorkedProtocol,
        ws="none",
        lifespan="off",
        loop="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s + 2 * STOP_S),  # what `drain` and hanging up couldn't end is cancelled
        backlog=BACKLOG,
    )
    return Server(config, drain)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises StartFailed in words that help. Port 0 takes any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why = "is taken; choose another with --port" if error.errno == errno.EADDRINUSE else f"can't be used: {error.strerror}"
        raise StartFailed(f"port {port} on {host} {why}") from None
    listener.setblocking(False)
    return listener

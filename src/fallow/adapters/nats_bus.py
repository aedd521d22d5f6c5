"""The bus over a NATS server."""

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from fallow.model.errors import BrokerLost, StartFailed
from fallow.ports import Delivery, Hear

CONNECT_S = 2
RECONNECT_WAIT_S = (0.1, 0.5)
"""Each connection draws its own: a broker that comes back isn't met by all nodes at once."""
PING_S = 1
PINGS_MISSED_MAX = 2
PENDING_MESSAGES_MAX = 131_072
PENDING_BYTES_MAX = 256 * 1024 * 1024
CLOSE_S = 1.0
REBUILD_WAIT_S = (0.3, 1.0)


log = logging.getLogger("fallow.bus")


def _drawn(bounds: tuple[float, float]) -> float:
    return random.uniform(*bounds)  # noqa: S311  (nothing secret)


class NatsBus:
    """One connection. It comes back by itself, with its subscriptions; what was under way when it broke is lost."""

    def __init__(self, address: str, secret: str, name: str) -> None:
        self._address = address
        self._secret = secret
        self._name = name
        self._client: Client | None = None
        self._subscriptions: list[tuple[str, Hear, str]] = []
        self._tell: list[Callable[[], None]] = []
        self._closing = False
        self._last_error: Exception | None = None
        self._rebuilding: asyncio.Task[None] | None = None

    async def connect(self, *, within_s: float = CONNECT_S) -> None:
        """Raises StartFailed if the broker can't be reached or refuses us."""
        try:
            async with asyncio.timeout(within_s):
                await self._open()
        except (OSError, TimeoutError, errors.Error) as error:
            raise StartFailed(f"could not join the broker at {self._address}: {_reason(self._last_error or error)}") from None

    async def _open(self) -> None:
        """A connection with all subscriptions in force. One that gets only half-way is closed, else it would hear everything twice."""
        client = self._client = Client()
        try:
            await client.connect(
                servers=[self._address],
                name=self._name,
                token=self._secret or None,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=_drawn(RECONNECT_WAIT_S),  # type: ignore[arg-type]  # a fraction works
                connect_timeout=CONNECT_S,
                ping_interval=PING_S,
                max_outstanding_pings=PINGS_MISSED_MAX,
                pending_size=0,  # while disconnected nothing is kept: a call must fail now, not run later for nobody
                error_cb=self._on_error,
                disconnected_cb=functools.partial(self._on_disconnected, client),
                closed_cb=functools.partial(self._on_closed, client),
            )
            for subject, hear, group in self._subscriptions:
                await self._listen(subject, hear, group)
        except BaseException:
            self._client = None
            with contextlib.suppress(errors.Error, OSError, TimeoutError):
                await asyncio.shield(client.close())
            raise

    async def _on_error(self, error: Exception) -> None:
        """Errors of the connection show as `is_up`; the last one says why there is none."""
        if not isinstance(self._last_error, errors.Error) or isinstance(error, errors.Error):
            self._last_error = error  # what the broker said tells more than how the connection then broke

    async def _on_disconnected(self, client: Client) -> None:
        if self._closing or client is not self._client:
            return
        for tell in self._tell:
            tell()

    async def _on_closed(self, client: Client) -> None:
        # The client gives up for good on some answers of the server; we don't.
        if not self._closing and client is self._client and (self._rebuilding is None or self._rebuilding.done()):
            self._rebuilding = asyncio.create_task(self._rebuild(), name="bus rebuild")

    async def _rebuild(self) -> None:
        while not self._closing:
            try:
                return await self._open()
            except Exception as error:  # noqa: BLE001  (the outermost loop of the connection: it must come back whatever happens)
                log.info("no connection to the broker yet: %s", type(error).__name__)
            await asyncio.sleep(_drawn(REBUILD_WAIT_S))

    def is_up(self) -> bool:
        return self._client is not None and bool(self._client.is_connected)

    def _connected(self) -> Client:
        """The client, if it is connected; raises BrokerLost."""
        if self._client is None or not self._client.is_connected:
            raise BrokerLost("the connection to the broker is down")
        return self._client

    def on_lost(self, tell: Callable[[], None]) -> None:
        self._tell.append(tell)

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        try:
            await self._connected().publish(subject, data, reply)
        except (errors.Error, OSError) as error:
            raise BrokerLost(f"the broker did not take a message: {_reason(error)}") from None

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None:
        try:
            await self._listen(subject, hear, group)
        except (errors.Error, OSError, TimeoutError) as error:
            raise BrokerLost(f"could not listen at {subject}: {_reason(error)}") from None
        self._subscriptions.append((subject, hear, group))

    async def _listen(self, subject: str, hear: Hear, group: str) -> None:
        async def on_message(message: Msg) -> None:
            unheard = message.headers is not None and message.headers.get("Status") == "503"
            hear(Delivery(message.subject, message.reply, message.data, unheard))

        await self._connected().subscribe(
            subject, queue=group, cb=on_message, pending_msgs_limit=PENDING_MESSAGES_MAX, pending_bytes_limit=PENDING_BYTES_MAX
        )
        await _flush(self._connected(), CONNECT_S)

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes:
        try:
            answer = await self._connected().request(subject, data, timeout=within_s)
        except (errors.Error, OSError, TimeoutError) as error:
            raise BrokerLost(f"no answer on {subject}: {_reason(error)}") from None
        return bytes(answer.data)

    async def close(self) -> None:
        self._closing = True
        if self._rebuilding is not None:
            self._rebuilding.cancel()
        if self._client is None:
            return
        with contextlib.suppress(errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                if self._client.is_connected:
                    await _flush(self._client, 1)
                await self._client.close()


async def _flush(client: Client, within_s: int) -> None:
    """Until the broker has taken what was sent. Twice, since the client's own ping overtakes what waits in its buffer."""
    await client.flush(within_s)
    await client.flush(within_s)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionResetError) or "authorization" in str(error).lower():
        return "it refused us; is the secret right?"
    return str(error).removeprefix("nats: ") or type(error).__name__


def read_secret(path: Path) -> str:
    """The shared secret of a broker; raises StartFailed if it isn't there."""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise StartFailed(f"could not read the broker's secret from {path}: {error.strerror}") from None

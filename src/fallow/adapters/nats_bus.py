"""The bus over a NATS server."""

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

import msgspec
from nats import errors

from fallow.adapters.nats_handover import Handover, Listening
from fallow.adapters.nats_link import Link, Plan, Reach
from fallow.adapters.nkey import Credentials
from fallow.model.errors import BadSetting, BrokerLost, StartFailed, shortened
from fallow.ports import Delivery, Hear
from fallow.wire.permissions import CLAIMS_UPDATE, LOGIN_REFUSED

__all__ = ["NatsBus", "Reach", "hear_refused_logins", "push_accounts"]

CONNECT_S = 2
CONNECT_AGAIN_S = (0.02, 0.1)
"""Between tries of a process that starts: its broker may be starting too."""
REBUILD_WAIT_S = (0.1, 0.5)
"""Before each try to come back. Each connection draws its own: a broker that is there again isn't met by all nodes at once."""
REFUSED_WAIT_MAX_S = 30.0
"""One that is refused doubles its wait up to this. A new credential ends the wait."""
PING_S = 1
PINGS_MISSED_MAX = 2
CLOSE_S = 1.0
RENEW_S = 10.0
"""What it may take to open a connection with a new credential; then the old one is kept, and it may be tried again."""
PUSH_S = 5.0

log = logging.getLogger("fallow.bus")

_FAULTS = (errors.Error, OSError, TimeoutError)


def _drawn(bounds: tuple[float, float]) -> float:
    return random.uniform(*bounds)  # noqa: S311  (nothing secret)


class NatsBus:
    """One connection, which comes back by itself with its subscriptions. What was under way when it broke is lost.

    `renew` moves to a new credential without a gap.
    """

    def __init__(self, address: str, login: Credentials, name: str, *, reach: Reach | None = None) -> None:
        self._address = address
        self._login = login
        self._name = name
        self._reach = reach or Reach()
        if self._reach.proxy and urlsplit(address).scheme != "wss":
            raise BadSetting(
                f"only wss:// addresses go through an HTTP proxy, and {address} isn't one; take the broker's WebSocket address"
            )
        self._link: Link | None = None
        self._numbers: list[int] = []
        self._subscriptions: list[Listening] = []
        self._tell: list[Callable[[], None]] = []
        self._closing = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._rebuilding: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._free = asyncio.Event()
        self._free.set()
        self._renewed = asyncio.Event()

    async def connect(self, *, within_s: float = CONNECT_S) -> None:
        """Raises StartFailed if the broker can't be reached in time or refuses us."""
        told: Exception | None = None
        try:
            async with asyncio.timeout(within_s):
                while True:
                    try:
                        async with self._changing:
                            return await self._open()
                    except _FAULTS as error:
                        if not isinstance(told, errors.Error) or isinstance(error, errors.Error):
                            told = error  # what the broker said tells more than how the connection then broke
                        if _is_refusal(error) or isinstance(error, ssl.SSLCertVerificationError):
                            raise
                    await asyncio.sleep(_drawn(CONNECT_AGAIN_S))
        except _FAULTS as error:
            raise StartFailed(f"could not join the broker at {self._address}: {_reason(told or error)}") from None

    async def _open(self) -> None:
        """A connection with all subscriptions in force. One that gets only half-way is closed, else it would hear everything twice."""
        link = self._made(self._login)
        await link.open()
        try:
            numbers = [await link.listen(*one) for one in self._subscriptions]
            if numbers:
                await link.flush()
        except BaseException:
            await asyncio.shield(link.close())
            raise
        self._link, self._numbers = link, numbers
        if not link.is_up:
            self._ended(link)

    def _made(self, login: Credentials) -> Link:
        plan = Plan(
            address=self._address,
            name=self._name,
            login=login,
            reach=self._reach,
            connect_s=CONNECT_S,
            ping_s=PING_S,
            pings_missed_max=PINGS_MISSED_MAX,
        )
        return Link(plan, self._ended, _note)

    def _ended(self, link: Link) -> None:
        if self._closing or link is not self._link:
            return
        for tell in self._tell:
            tell()
        if self._rebuilding is None or self._rebuilding.done():
            self._rebuilding = asyncio.create_task(self._rebuild(), name="bus rebuild")

    async def _rebuild(self) -> None:
        refused = 0
        while not self._closing:
            wait_s = _drawn(REBUILD_WAIT_S) * 2 ** min(refused, 16)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._renewed.wait(), min(wait_s, REFUSED_WAIT_MAX_S))
            self._renewed.clear()
            async with self._changing:
                try:
                    if not self.is_up():
                        await self._open()
                except Exception as error:  # noqa: BLE001  (the outermost loop of the connection: it must come back whatever happens)
                    refused = refused + 1 if _is_refusal(error) else 0
                    log.info("no connection to the broker yet: %s", _reason(error))
                if self.is_up():
                    return

    def is_up(self) -> bool:
        return self._link is not None and self._link.is_up

    def _connected(self) -> Link:
        """The connection, if it is there; raises BrokerLost."""
        if self._link is None or not self._link.is_up:
            raise BrokerLost("the connection to the broker is down")
        return self._link

    def on_lost(self, tell: Callable[[], None]) -> None:
        self._tell.append(tell)

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if not self._free.is_set():
            await self._free.wait()
        try:
            await self._connected().publish(subject, data, reply)
        except (errors.Error, OSError) as error:
            raise BrokerLost(f"the broker did not take a message: {_reason(error)}") from None

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None:
        self._connected()
        try:
            async with self._changing:
                link = self._connected()
                number = await link.listen(subject, hear, group)
                await link.flush()
                if link is self._link:
                    self._subscriptions.append(Listening(subject, hear, group))
                    self._numbers.append(number)
        except _FAULTS as error:
            raise BrokerLost(f"could not listen at {subject}: {_reason(error)}") from None

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes:
        if not self._free.is_set():
            await self._free.wait()
        try:
            return await self._connected().ask(subject, data, within_s)
        except _FAULTS as error:
            raise BrokerLost(f"no answer on {subject}: {_reason(error)}") from None

    async def renew(self, credentials: Credentials) -> None:
        """Go on with a new credential of the same key: without a gap, a double or a loss, and without telling of a loss.

        Raises BrokerLost if the broker can't be reached with it in time; the connection then stays as it is. Without a connection, the
        next one takes it.
        """
        async with self._changing:
            old = self._link
            if old is None or not old.is_up:
                self._login = credentials
                self._renewed.set()
                return
            handover, new = Handover(self._subscriptions), self._made(credentials)
            for at, number in enumerate(self._numbers):
                old.hear_with(number, handover.old_ear(at))
            try:
                async with asyncio.timeout(RENEW_S):
                    numbers = await handover.open_beside(new)
            except BaseException as error:
                for number, one in zip(self._numbers, self._subscriptions, strict=True):
                    old.hear_with(number, one.hear)
                if isinstance(error, _FAULTS):
                    raise BrokerLost(f"could not go on with a new credential: {_reason(error)}") from None
                raise
            if not await self._move(old, new, numbers, credentials, handover):
                for tell in self._tell:
                    tell()

    async def _move(self, old: Link, new: Link, numbers: list[int], credentials: Credentials, handover: Handover) -> bool:
        """First what we say goes over the new connection, then what we hear. False if something may have been lost on the way."""
        is_whole = True
        self._free.clear()
        try:
            await old.flush()
        except _FAULTS:
            is_whole = False
        finally:
            self._link, self._numbers, self._login = new, numbers, credentials
            self._free.set()
        try:
            try:
                await old.unlisten()
            except _FAULTS:
                await asyncio.shield(old.close())
            with contextlib.suppress(*_FAULTS):
                await new.flush()  # what the old one heard may still be on its way to the new one
        finally:
            handover.release()
            leaving = asyncio.create_task(old.leave(), name="bus farewell")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            if self._closing:
                await asyncio.shield(new.close())
            elif not new.is_up:
                self._ended(new)
        return is_whole and not handover.is_full

    async def close(self) -> None:
        self._closing = True
        leaving = list(self._leaving)
        for task in [*leaving, *([] if self._rebuilding is None else [self._rebuilding])]:
            task.cancel()
        if self._link is not None:
            await self._link.close()
        if leaving:
            await asyncio.wait(leaving, timeout=CLOSE_S)


def _note(error: Exception) -> None:
    """What the broker refuses without ending the connection is a fault of ours, or somebody's try to reach further."""
    if "permissions violation" in str(error):
        log.warning("the broker refused: %s", shortened(str(error).removeprefix("nats: ")))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = getattr(error, "verify_message", "")  # set by OpenSSL only
        return f"its certificate isn't one that we believe ({said}); is the authority's certificate right?"
    if _is_refusal(error):
        return "it refused us; our credential ran out, was revoked, or is not for it"
    return str(error).removeprefix("nats: ") or type(error).__name__


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, ConnectionResetError) or "authorization" in str(error).lower() or "authentication" in str(error).lower()


class _Told(msgspec.Struct):
    code: int = 0
    description: str = ""


class _PushAnswer(msgspec.Struct):
    """What the broker says to an account's new JWT."""

    data: _Told | None = None
    error: _Told | None = None


async def push_accounts(bus: NatsBus, jwts: Iterable[str]) -> None:
    """Give the broker new JWTs of accounts while it runs; `bus` is the system user's. Who is banned by them is out at the return.

    Raises StartFailed if the broker doesn't take one, BrokerLost if it can't be asked.
    """
    for one in jwts:
        try:
            said = msgspec.json.decode(await bus.request(CLAIMS_UPDATE, one.encode(), within_s=PUSH_S), type=_PushAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise StartFailed("the broker's answer to an account's new JWT can't be read") from None
        if said.data is None or said.data.code != 200:
            why = "" if said.error is None else shortened(said.error.description)
            raise StartFailed(f"the broker didn't take an account's new JWT: {why or 'no reason given'}")


class _Client(msgspec.Struct):
    jwt: str = ""


class _RefusedLogin(msgspec.Struct):
    """What the broker says of a login that it refuses; never why."""

    client: _Client


async def hear_refused_logins(bus: NatsBus, tell: Callable[[str], None]) -> None:
    """Tell of each login that the broker refuses from now on, with the credential shown, or nothing; `bus` is the system user's.

    The credential is what a stranger sent: nobody has checked it. Raises BrokerLost.
    """

    def hear(delivery: Delivery) -> None:
        try:
            tell(msgspec.json.decode(delivery.data, type=_RefusedLogin).client.jwt)
        except (msgspec.DecodeError, UnicodeDecodeError):
            log.warning("what the broker says of a refused login can't be read")

    await bus.subscribe(LOGIN_REFUSED, hear)

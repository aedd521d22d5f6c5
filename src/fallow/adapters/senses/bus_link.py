"""One connection to a D-Bus, for short questions to whoever is there; it starts no service and never waits long."""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from fallow.model.owner import Unknown

if sys.platform == "linux":
    from dbus_fast import DBusFastError, Message, MessageFlag, MessageType, Variant
    from dbus_fast.aio import MessageBus

CALL_TIMEOUT_S = 1.0
"""How long connecting and each call may take."""
RETRY_S = 30.0
"""How long a bus that is lost, and a service that didn't answer, is left alone."""
UNANSWERED_MAX = 16
"""So many calls may stay without an answer; then the connection is made anew, which forgets them."""
TURNS_TO_HEAR = 2
"""Turns of the loop after which a bus that has closed is known to have: writing to it would be logged as an error."""
BUS = "org.freedesktop.DBus"
NOBODY = frozenset({f"{BUS}.Error.ServiceUnknown", f"{BUS}.Error.NameHasNoOwner"})


class BusLink:
    """Asks on a bus. Every answer is a value, None (no such bus, or nobody there by that name) or Unknown."""

    def __init__(self, address: str, *, timeout_s: float = CALL_TIMEOUT_S, retry_s: float = RETRY_S) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._bus: MessageBus | None = None
        self._trouble: Unknown | None = None
        """Why there is no connection; None: there is no such bus."""
        self._retry_at = 0.0
        self._silent_until: dict[str, float] = {}
        self._unanswered = 0

    async def call(
        self, destination: str, path: str, interface: str, member: str, *, signature: str = "", body: Sequence[Any] = ()
    ) -> object:
        """The first value of the answer, whatever its type: the caller checks it."""
        if sys.platform != "linux" or not self._address:
            return None
        bus = await self._connect()
        if not isinstance(bus, MessageBus):
            return bus
        now = asyncio.get_running_loop().time()
        if self._silent_until.get(destination, now) > now:
            return Unknown(f"{destination} doesn't answer")
        question = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            flags=MessageFlag.NO_AUTOSTART,
            signature=signature,
            body=list(body),
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await bus.call(question)
        except TimeoutError:
            await self._note_silence(destination)
            return Unknown(f"{destination} didn't answer within {self._timeout_s:g} s")
        except (OSError, EOFError, DBusFastError) as error:
            return await self._lose(f"the desktop's bus was lost: {type(error).__name__}")
        if answer is None:  # the connection was closed while we waited
            return await self._lose("the desktop's bus was lost")
        if answer.message_type is MessageType.ERROR:
            return None if answer.error_name in NOBODY else Unknown(f"{destination} refuses {member}: {answer.error_name}")
        value = answer.body[0] if answer.body else Unknown(f"{destination} answers {member} with nothing")
        return value.value if isinstance(value, Variant) else value

    async def read_property(self, destination: str, path: str, interface: str, name: str) -> object:
        """One property of an object."""
        return await self.call(destination, path, f"{BUS}.Properties", "Get", signature="ss", body=(interface, name))

    async def has_owner(self, name: str) -> bool | None:
        """Whether anybody on the bus has this name; None, if the bus can't be asked."""
        told = await self.call(BUS, "/org/freedesktop/DBus", BUS, "NameHasOwner", signature="s", body=(name,))
        return told if isinstance(told, bool) else None

    async def exists(self) -> bool:
        """Whether there is such a bus, even one that can't be asked now."""
        return sys.platform == "linux" and self._address != "" and await self._connect() is not None

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is None:
            return
        if bus.connected:
            bus.disconnect()
        with contextlib.suppress(OSError, EOFError, DBusFastError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]

    async def _connect(self) -> "MessageBus | Unknown | None":
        for _ in range(TURNS_TO_HEAR):
            if self._bus is not None and self._bus.connected:
                await asyncio.sleep(0)
        if self._bus is not None and self._bus.connected:
            return self._bus
        if self._bus is not None:
            await self._lose("the desktop's bus was lost")
        now = asyncio.get_running_loop().time()
        if now < self._retry_at:
            return self._trouble
        self._retry_at = now + self._retry_s
        self._silent_until.clear()
        self._unanswered = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                self._bus = await MessageBus(bus_address=self._address).connect()
        except FileNotFoundError:
            self._trouble = None
            return None
        except (OSError, EOFError, ValueError, DBusFastError) as error:
            self._trouble = Unknown(f"the desktop's bus can't be reached: {type(error).__name__}")
            return self._trouble
        return self._bus

    async def _lose(self, why: str) -> Unknown:
        """Let go of the connection. A new one is tried `retry_s` from now."""
        await self.close()
        self._trouble = Unknown(why)
        self._retry_at = asyncio.get_running_loop().time() + self._retry_s
        return self._trouble

    async def _note_silence(self, destination: str) -> None:
        self._silent_until[destination] = asyncio.get_running_loop().time() + self._retry_s
        self._unanswered += 1
        if self._unanswered >= UNANSWERED_MAX:
            await self._lose("too many questions to the desktop stayed without an answer")

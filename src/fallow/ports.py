"""What the applications need from outside, as small protocols; adapters fill them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from fallow.model.messages import Head


class Clock(Protocol):
    """Time. `now_ms` never jumps and is for waiting; `wall_ms` is UTC and is for stamps."""

    def now_ms(self) -> int: ...

    def wall_ms(self) -> int: ...


class Delivery(NamedTuple):
    """One message as it came off the bus. `unheard` is set when it only says that nobody listens there."""

    subject: str
    reply: str
    data: bytes
    unheard: bool


Hear = Callable[[Delivery], None]
"""Called for every message, on the event loop; it must return at once and must not raise."""


class Bus(Protocol):
    """Carries messages between processes at most once, in order per sender and subject.

    `publish` raises BrokerLost when the connection is down: nothing is kept to be sent later.
    With `reply` given and nobody listening, a Delivery with `unheard` set comes to `reply`.
    """

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None: ...

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None: ...

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes: ...

    def is_up(self) -> bool: ...

    def on_lost(self, tell: Callable[[], None]) -> None: ...

    async def close(self) -> None: ...


class EngineAnswer(Protocol):
    """An engine's answer as it comes: the head is there, the body follows."""

    head: Head

    def body(self) -> AsyncIterator[bytes]: ...


class Engine(Protocol):
    """Something that answers HTTP on a private socket. Leaving the context stops the generation."""

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[EngineAnswer]: ...

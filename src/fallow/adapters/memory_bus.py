"""The bus within one process: for tests, and as the plainest statement of what a bus does."""

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import count

from fallow.model.errors import BrokerLost
from fallow.ports import Delivery, Hear

PENDING_MAX = 65_536


class MemoryBroker:
    """What MemoryBus instances meet at. `up = False` plays a dead broker."""

    def __init__(self) -> None:
        self.up = True
        self.subscriptions: list[tuple[list[str], str, Hear, MemoryBus]] = []
        self.buses: list[MemoryBus] = []
        self._pending: deque[tuple[Hear, Delivery]] = deque()

    def stop(self) -> None:
        """Every connection breaks."""
        self.up = False
        for bus in self.buses:
            bus.tell_lost()

    def send(self, subject: str, reply: str, data: bytes) -> None:
        """Deliver to all that listen, once per group, on the next turn of the loop."""
        if len(self._pending) >= PENDING_MAX:
            raise BrokerLost("too many messages are under way")
        heard = False
        groups: set[str] = set()
        for pattern, group, hear, _ in self.subscriptions:
            if group in groups or not matches(pattern, subject.split(".")):
                continue
            heard = True
            if group:
                groups.add(group)
            self._later(hear, Delivery(subject, reply, data, False))
        if not heard and reply:
            for pattern, _, hear, _ in self.subscriptions:
                if matches(pattern, reply.split(".")):
                    self._later(hear, Delivery(reply, "", b"", True))

    def _later(self, hear: Hear, delivery: Delivery) -> None:
        self._pending.append((hear, delivery))
        asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        hear, delivery = self._pending.popleft()
        hear(delivery)


def matches(pattern: list[str], subject: list[str]) -> bool:
    """Whether a subject is covered by a pattern with `*` and a closing `>`."""
    for at, part in enumerate(pattern):
        if part == ">":
            return len(subject) > at
        if at >= len(subject) or part not in ("*", subject[at]):
            return False
    return len(pattern) == len(subject)


class MemoryBus:
    """One connection to a MemoryBroker."""

    _inboxes = count()

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._tell: list[Callable[[], None]] = []
        broker.buses.append(self)

    def is_up(self) -> bool:
        return self._broker.up and self in self._broker.buses

    def on_lost(self, tell: Callable[[], None]) -> None:
        self._tell.append(tell)

    def tell_lost(self) -> None:
        """Tell whoever asked that the connection broke."""
        for tell in self._tell:
            tell()

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if not self._broker.up or self not in self._broker.buses:
            raise BrokerLost("the connection to the broker is down")
        self._broker.send(subject, reply, data)

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None:
        self._broker.subscriptions.append((subject.split("."), group, hear, self))

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes:
        answer: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        inbox = f"_I.{next(self._inboxes)}"

        def hear(delivery: Delivery) -> None:
            if not answer.done():
                answer.set_result(delivery)

        entry = ([*inbox.split(".")], "", hear, self)
        self._broker.subscriptions.append(entry)
        try:
            await self.publish(subject, data, inbox)
            delivery = await asyncio.wait_for(answer, within_s)
        except TimeoutError:
            raise BrokerLost(f"no answer on {subject} within {within_s:g} s") from None
        finally:
            self._broker.subscriptions.remove(entry)
        if delivery.unheard:
            raise BrokerLost(f"nobody answers on {subject}")
        return delivery.data

    async def close(self) -> None:
        self._broker.subscriptions = [s for s in self._broker.subscriptions if s[3] is not self]
        if self in self._broker.buses:
            self._broker.buses.remove(self)

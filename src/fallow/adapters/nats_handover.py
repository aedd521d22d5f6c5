"""What keeps one connection's messages apart from those of the next, while both listen: none is lost, doubled or out of order.

From the moment the new connection listens, each message comes on both. What the old one hears is passed on at once and remembered; what
the new one hears waits. When the old one has been told to stop, and all that was on its way to either has come, what waits is passed
on, less what the old one heard. Each publisher's messages come in the same order on both, so they stay in order.

Messages that are equal in subject, reply and data can't be told apart: of two such, one that only the old connection heard can hide one
that only the new one heard, if both come within the few milliseconds that this takes.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from nats import errors

from fallow.adapters.nats_link import Link, take
from fallow.ports import Delivery, Hear

HELD_MESSAGES_MAX = 65_536
HELD_BYTES_MAX = 64 * 1024 * 1024
"""What may wait on the new connection. It lasts a round trip or two, so this is thousands of times what is usual."""
DIGEST_BYTES = 16


class Listening(NamedTuple):
    """A subscription. Of a group only one member hears each message."""

    subject: str
    hear: Hear
    group: str


class Handover:
    """For all subscriptions of a bus. `is_full`: more came than may wait, and the rest of it was dropped."""

    def __init__(self, subscriptions: Sequence[Listening]) -> None:
        self._subscriptions = list(subscriptions)
        self._heard: list[Counter[bytes]] = [Counter() for _ in subscriptions]
        self._held: list[tuple[int, Delivery]] = []
        self._held_bytes = 0
        self._passes = False
        self.is_full = False

    def old_ear(self, at: int) -> Hear:
        """For the old connection: passes on, and remembers."""
        hear = self._subscriptions[at].hear
        if self._subscriptions[at].group:
            return hear
        heard = self._heard[at]

        def remember(delivery: Delivery) -> None:
            heard[_digest(delivery)] += 1
            hear(delivery)

        return remember

    def new_ear(self, at: int) -> Hear:
        """For the new connection: holds back until `release`."""
        hear = self._subscriptions[at].hear

        def hold(delivery: Delivery) -> None:
            if self._passes:
                hear(delivery)
            elif len(self._held) >= HELD_MESSAGES_MAX or self._held_bytes + len(delivery.data) > HELD_BYTES_MAX:
                self.is_full = True
            else:
                self._held.append((at, delivery))
                self._held_bytes += len(delivery.data)

        return hold

    async def open_beside(self, new: Link) -> list[int]:
        """Open the new connection, with all subscriptions in force; their numbers. Raises an error of nats-py, OSError or TimeoutError."""
        await new.open()
        try:
            numbers = [await new.listen(one.subject, self.new_ear(at), one.group) for at, one in enumerate(self._subscriptions)]
            await new.flush()
            if self.is_full:
                raise errors.Error("nats: too much came meanwhile; it works when it is calmer")
            if not new.is_up:
                raise errors.Error("nats: the new connection ended")
        except BaseException:
            await asyncio.shield(new.close())
            raise
        return numbers

    def release(self) -> None:
        """Pass on what waits and was not heard before, in the order in which it came; from now on nothing waits."""
        self._passes = True
        for at, delivery in self._held:
            heard = self._heard[at]
            digest = _digest(delivery)
            if heard[digest] > 0:
                heard[digest] -= 1
            else:
                take(self._subscriptions[at].hear, delivery)
        self._held.clear()


def _digest(delivery: Delivery) -> bytes:
    """Of the whole message. Subjects hold no spaces, so the parts can't run into each other."""
    head = f"{delivery.subject} {delivery.reply} {delivery.unheard:d} ".encode()
    return hashlib.blake2b(head + delivery.data, digest_size=DIGEST_BYTES).digest()

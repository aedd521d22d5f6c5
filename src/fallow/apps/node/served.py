"""What a node needs of a model that it serves: its queue, its offer, and a way to ask it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from fallow.core.admit import WAITING_PER_SLOT
from fallow.core.slots import Asker
from fallow.model.errors import Failure
from fallow.model.ids import NodeId
from fallow.model.messages import Head
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.receipt import Usage

JSON = "application/json"
EVENTS = "text/event-stream"


class Piece(msgspec.Struct, frozen=True):
    """A piece of an answer. `is_last` closes it."""

    data: bytes
    is_last: bool = False


class Answer(Protocol):
    """A call's answer in the form that the caller gets."""

    usage: Usage | None
    tokens: tuple[int, ...]
    """What the engine wrote, as its own numbers, once it is written; empty if it doesn't tell them."""

    def head(self) -> Head: ...

    def pieces(self) -> AsyncGenerator[Piece, None]: ...


class Refused(Exception):
    """The engine refused the request."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """What of a call was before this attempt: its name and age, and the pieces of text that an attempt before it delivered.

    `made_at_s` is in UTC seconds, 0 if nobody said so. `delivered` is None unless the answer is to be continued.
    """

    answer_id: str = ""
    made_at_s: int = 0
    delivered: tuple[str, ...] | None = None


NO_PAST = Past()


class Served(Protocol):
    """What a node needs of a model that it serves."""

    model: str
    slots: int
    waiting_max: int
    gate: asyncio.Semaphore
    paths: frozenset[str]
    digest: str
    """Of the weights; empty where they aren't ours."""
    calls: int
    """How many run or wait here."""

    def offer(self, node_id: NodeId, expires_at_ms: int) -> Offer: ...

    def load(self, *, running: int) -> Load: ...

    async def ready(self, within_s: float | None = None) -> Failure | None: ...

    def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> contextlib.AbstractAsyncContextManager[Answer]:
        """Read a request, at once, raising InvalidRequest or CannotContinue; entering the context asks the engine."""

    async def run(self) -> None: ...


class Lane:
    """Where calls for one model queue at a node, and what the node offers of it."""

    def __init__(
        self,
        *,
        model: str,
        slots: int,
        context_tokens: int,
        digest: str,
        paths: frozenset[str],
        speed: Speed | None = None,
        price: Price | None = None,
        family: str = "",
        quantisation: str = "",
    ) -> None:
        self.model = model
        self.slots = slots
        self.waiting_max = WAITING_PER_SLOT * slots
        self.gate = asyncio.Semaphore(slots)
        self.paths = paths
        self.calls = 0
        self._context_tokens = context_tokens
        self.digest = digest
        self._speed = speed or Speed()
        self.price = price or Price()
        self._family = family
        self._quantisation = quantisation

    def offer(self, node_id: NodeId, expires_at_ms: int) -> Offer:
        return Offer(
            node_id=node_id,
            model=self.model,
            paths=self.paths,
            context_tokens=self._context_tokens,
            model_digest=self.digest,
            speed=self._speed,
            price=self.price,
            slots=self.slots,
            expires_at_ms=expires_at_ms,
            family=self._family,
            quantisation=self._quantisation,
        )

    def load(self, *, running: int) -> Load:
        return load_of(self.model, self.slots, self.waiting_max, running)


def load_of(model: str, slots: int, waiting_max: int, running: int) -> Load:
    """The load of an engine that is ready."""
    free = max(0, slots - running)
    return Load(model=model, readiness="ready", slots_free=free, waiting=max(0, running - slots), waiting_max=waiting_max)

"""A model of the catalogue in an engine of our own: loaded on demand, watched, and asked in its own way."""

import abc
import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from fallow.apps.node.room import Room
from fallow.apps.node.served import JSON, NO_PAST, Answer, Lane, Past, Piece
from fallow.apps.node.supervisor import Supervisor
from fallow.core.residency import Resident
from fallow.core.slots import Asker
from fallow.model.errors import EngineFailed, EngineStalled, Failure
from fallow.model.messages import Head
from fallow.model.offer import Load, Speed
from fallow.model.receipt import Usage
from fallow.ports import Clock, Engine, EngineAnswer

REFUSAL_BYTES_MAX = 64 * 1024
SMALL_BYTES_MAX = 64 * 1024 * 1024
"""An answer that is read as a whole: embeddings of a long list are the largest."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the node knows of a model. `dimensions` is an embedding's size; `may_shorten` says whether shorter ones make sense."""

    model: str
    digest: str
    context_tokens: int
    slots: int
    memory_bytes: int
    paths: frozenset[str]
    family: str = ""
    quantisation: str = ""
    dimensions: int | None = None
    may_shorten: bool = False
    control_tokens: tuple[str, ...] = ()
    threads: int = 1
    speed: Speed = Speed()


class EngineServed(Lane, abc.ABC):
    """What all models in engines of our own have in common."""

    @abc.abstractmethod
    def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> contextlib.AbstractAsyncContextManager[Answer]:
        """See Served."""

    def __init__(self, facts: Facts, *, supervisor: Supervisor, engine: Engine, room: Room, clock: Clock, load_wait_s: float) -> None:
        super().__init__(
            model=facts.model,
            slots=facts.slots,
            context_tokens=facts.context_tokens,
            digest=facts.digest,
            paths=facts.paths,
            speed=facts.speed,
            family=facts.family,
            quantisation=facts.quantisation,
        )
        self.facts = facts
        self.supervisor = supervisor
        self.engine = engine
        self.clock = clock
        self._room = room
        self._load_wait_s = load_wait_s
        self._used_at_ms = 0
        room.add(self)

    # what the room asks
    def resident(self) -> Resident:
        return Resident(
            model=self.model,
            needs_bytes=self.facts.memory_bytes,
            is_present=self.supervisor.phase != "cold",
            is_leaving=self.supervisor.phase == "leaving",
            calls=self.calls,
            used_at_ms=self._used_at_ms,
        )

    def want(self) -> None:
        self.supervisor.want()

    def leave(self) -> None:
        self.supervisor.leave()

    # what the node asks
    def load(self, *, running: int) -> Load:
        load = super().load(running=running)
        readiness = self.supervisor.readiness()
        if readiness == "ready":
            return load
        return msgspec.structs.replace(
            load, readiness=readiness, progress=self.supervisor.progress(), ready_in_ms=self.supervisor.ready_in_ms()
        )

    async def run(self) -> None:
        await self.supervisor.run()

    async def ready(self, within_s: float | None = None) -> Failure | None:
        """None once the engine answers; else how far it is."""
        self._used_at_ms = self.clock.now_ms()
        if self.supervisor.phase == "ready":
            return None
        wait_s = self._load_wait_s if within_s is None else within_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._room.admit(self.model)
                await self.supervisor.ready(wait_s)
        return None if self.supervisor.readiness() == "ready" else self._not_ready()

    def _not_ready(self) -> Failure:
        if self.supervisor.is_hopeless():
            return Failure(code="engine_failed", message="the engine ends each time it loads the model")
        wait_ms = self.supervisor.ready_in_ms()
        holders = () if self.supervisor.phase != "cold" else self._room.holders(self.model)
        text = f"the model is being loaded; ready in about {max(1, round(wait_ms / 1000))} s"
        if holders:
            text = f"the model waits for memory that {', '.join(holders)} uses until its calls are over"
        text += "; send `Prefer: wait=60` to wait for it"
        return Failure(code="model_loading", message=text, retry_after_ms=wait_ms, progress=self.supervisor.progress() or 0.0)

    @contextlib.asynccontextmanager
    async def asked(self) -> AsyncIterator[None]:
        """Around everything that is asked of the engine; raises EngineStalled where its stalling was the reason of a failure."""
        self.supervisor.running += 1
        self.supervisor.moved()
        try:
            yield
        except EngineFailed:
            if self.supervisor.has_stalled:
                raise EngineStalled("the engine made no progress for too long and was restarted") from None
            raise
        finally:
            self.supervisor.running -= 1
            self._used_at_ms = self.clock.now_ms()

    @contextlib.asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """While the caller takes a piece nothing is asked of the engine."""
        self.supervisor.running -= 1
        try:
            yield
        finally:
            self.supervisor.running += 1
            self.supervisor.moved()

    async def fetch(self, path: str, body: bytes) -> tuple[int, bytes]:
        """A whole answer of the engine: status and body."""
        async with self.engine.post(path, body) as answer:
            return answer.head.status, await small(answer, SMALL_BYTES_MAX)


async def small(answer: EngineAnswer, bytes_max: int = REFUSAL_BYTES_MAX) -> bytes:
    """An answer's whole body; raises EngineFailed over the limit."""
    parts: list[bytes] = []
    size = 0
    async for chunk in answer.body():
        parts.append(chunk)
        size += len(chunk)
        if size > bytes_max:
            raise EngineFailed("the engine's answer is longer than it can be")
    return b"".join(parts)


class WholeAnswer:
    """An answer that is there at once."""

    def __init__(self, body: bytes, usage: Usage) -> None:
        self._body = body
        self.usage: Usage | None = usage
        self.tokens: tuple[int, ...] = ()

    def head(self) -> Head:
        return Head(status=200, content_type=JSON, engine_us=0)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        yield Piece(self._body, is_last=True)

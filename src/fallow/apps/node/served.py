"""One model that a node serves: its engine, its queue, and how requests and answers are put into form."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

import msgspec

from fallow.apps.node.supervisor import Supervisor
from fallow.core.admit import WAITING_PER_SLOT
from fallow.model.errors import EngineFailed, EngineStalled, Failure
from fallow.model.ids import NodeId
from fallow.model.messages import Head
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.receipt import Usage
from fallow.ports import Engine, EngineAnswer
from fallow.wire import llama_request
from fallow.wire.llama_answer import StreamedAnswer, WholeAnswer, refusal
from fallow.wire.openai import CHAT, COMPLETIONS

REFUSAL_BYTES_MAX = 64 * 1024
PATHS = frozenset({CHAT, COMPLETIONS})
JSON = "application/json"
EVENTS = "text/event-stream"


class Piece(msgspec.Struct, frozen=True):
    """A piece of an answer. `is_last` closes it."""

    data: bytes
    is_last: bool = False


class Answer(Protocol):
    """A call's answer in the form that the caller gets."""

    usage: Usage | None

    def head(self) -> Head: ...

    def pieces(self) -> AsyncGenerator[Piece, None]: ...


class Refused(Exception):
    """The engine refused the request."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class Served(Protocol):
    """What a node needs of a model that it serves."""

    model: str
    slots: int
    waiting_max: int
    gate: asyncio.Semaphore
    paths: frozenset[str]

    def offer(self, node_id: NodeId, expires_at_ms: int) -> Offer: ...

    def load(self, *, running: int) -> Load: ...

    async def ready(self) -> Failure | None: ...

    def ask(self, path: str, body: bytes) -> contextlib.AbstractAsyncContextManager[Answer]: ...

    async def run(self) -> None: ...


class Lane:
    """Where calls for one model queue at a node, and what the node offers of it."""

    def __init__(self, *, model: str, slots: int, context_tokens: int, digest: str) -> None:
        self.model = model
        self.slots = slots
        self.waiting_max = WAITING_PER_SLOT * slots
        self.gate = asyncio.Semaphore(slots)
        self.paths = PATHS
        self._context_tokens = context_tokens
        self._digest = digest

    def offer(self, node_id: NodeId, expires_at_ms: int) -> Offer:
        return Offer(
            node_id=node_id,
            model=self.model,
            paths=self.paths,
            context_tokens=self._context_tokens,
            model_digest=self._digest,
            speed=Speed(),
            price=Price(),
            slots=self.slots,
            expires_at_ms=expires_at_ms,
        )

    def load(self, *, running: int) -> Load:
        return load_of(self.model, self.slots, self.waiting_max, running)


def load_of(model: str, slots: int, waiting_max: int, running: int) -> Load:
    """The load of an engine that is ready."""
    free = max(0, slots - running)
    return Load(model=model, readiness="ready", slots_free=free, waiting=max(0, running - slots), waiting_max=waiting_max)


class LlamaAnswer:
    """A llama engine's event stream as an event stream or a whole answer, as the caller asked."""

    def __init__(self, answer: EngineAnswer, request: llama_request.EngineRequest, *, chat: bool, supervisor: Supervisor) -> None:
        self._answer = answer
        self._request = request
        self._chat = chat
        self._supervisor = supervisor
        self.usage: Usage | None = None

    def head(self) -> Head:
        return Head(status=200, content_type=EVENTS if self._request.stream else JSON, engine_us=0)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        async for piece in self._stream() if self._request.stream else self._whole():
            self._supervisor.running -= 1  # while the caller takes the piece nothing is asked of the engine
            try:
                yield piece
            finally:
                self._supervisor.running += 1
                self._supervisor.moved()

    async def _stream(self) -> AsyncGenerator[Piece, None]:
        editor = StreamedAnswer(include_usage=self._request.include_usage)
        async for chunk in self._answer.body():
            self._supervisor.moved()
            out = editor.feed(chunk)
            if editor.is_whole:
                self.usage = editor.usage
                yield Piece(out, is_last=True)
                return
            if out:
                yield Piece(out)
        raise EngineFailed("the engine stopped in the middle of its answer")

    async def _whole(self) -> AsyncGenerator[Piece, None]:
        collector = WholeAnswer(chat=self._chat, choices=self._request.choices)
        async for chunk in self._answer.body():
            self._supervisor.moved()
            collector.feed(chunk)
        body = collector.body()
        self.usage = collector.usage
        yield Piece(body, is_last=True)


class LlamaServed(Lane):
    """A model of the catalogue in a llama engine of our own."""

    def __init__(
        self, *, model: str, digest: str, context_tokens: int, slots: int, supervisor: Supervisor, engine: Engine, load_wait_s: float
    ) -> None:
        super().__init__(model=model, slots=slots, context_tokens=context_tokens, digest=digest)
        self._supervisor = supervisor
        self._engine = engine
        self._load_wait_s = load_wait_s

    def load(self, *, running: int) -> Load:
        load = super().load(running=running)
        readiness = self._supervisor.readiness()
        if readiness == "ready":
            return load
        return msgspec.structs.replace(
            load, readiness=readiness, progress=self._supervisor.progress(), ready_in_ms=self._supervisor.ready_in_ms()
        )

    async def run(self) -> None:
        await self._supervisor.run()

    async def ready(self) -> Failure | None:
        """None once the engine answers; else how far it is."""
        if await self._supervisor.ready(self._load_wait_s):
            return None
        if self._supervisor.is_hopeless():
            return Failure(code="engine_failed", message="the engine ends each time it loads the model")
        wait_ms = self._supervisor.ready_in_ms()
        text = f"the model is being loaded; ready in about {max(1, round(wait_ms / 1000))} s"
        return Failure(code="model_loading", message=text, retry_after_ms=wait_ms, progress=self._supervisor.progress() or 0.0)

    @contextlib.asynccontextmanager
    async def ask(self, path: str, body: bytes) -> AsyncIterator[Answer]:
        """Raises InvalidRequest, Refused or EngineFailed."""
        request = llama_request.prepare(path, body)
        self._supervisor.running += 1
        self._supervisor.moved()
        try:
            async with self._engine.post(path, request.body) as answer:
                if answer.head.status != 200:
                    raise Refused(refusal(path, answer.head.status, await _small(answer)))
                yield LlamaAnswer(answer, request, chat=path == CHAT, supervisor=self._supervisor)
        except EngineFailed:
            if self._supervisor.has_stalled:
                raise EngineStalled("the engine made no progress for too long and was restarted") from None
            raise
        finally:
            self._supervisor.running -= 1


async def _small(answer: EngineAnswer) -> bytes:
    data = b""
    async for chunk in answer.body():
        data += chunk
        if len(data) > REFUSAL_BYTES_MAX:
            raise EngineFailed("the engine's error is too long to be one")
    return data

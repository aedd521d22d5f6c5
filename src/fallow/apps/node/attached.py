"""A model in a server that the lender already runs: everything passes as it came."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from fallow.adapters.http_engine import HttpAnswer, HttpEngine
from fallow.apps.node.served import EVENTS, JSON, Answer, Lane, Piece
from fallow.model.errors import NAME_MAX, EngineFailed, Failure, StartFailed
from fallow.model.messages import OFFERS_MAX, Head
from fallow.model.offer import Load
from fallow.model.receipt import Usage
from fallow.wire import sse
from fallow.wire.llama_answer import added
from fallow.wire.openai import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, MESSAGES_COUNT, RERANK, RESPONSES, RESPONSES_COUNT

MODELS_S = 5.0
MODELS_BYTES_MAX = 1024 * 1024
TAIL_BYTES = 16 * 1024
CONTEXT_TOKENS_UNKNOWN = 8_192
HEALTH_POLL_S = 2.0


class _Entry(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Entry]


class _Usage(msgspec.Struct, frozen=True):
    usage: dict[str, object] | None = None


PATHS = frozenset({CHAT, COMPLETIONS, RESPONSES, RESPONSES_COUNT, MESSAGES, MESSAGES_COUNT, EMBEDDINGS, RERANK})
_PRINTABLE = re.compile(r"[ -~]{1,128}")
_usage = msgspec.json.Decoder(_Usage)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def find_models(engine: HttpEngine) -> list[str]:
    """The models that the server lists; raises StartFailed."""
    try:
        status, body = await engine.get("/v1/models", MODELS_S, MODELS_BYTES_MAX)
        models = [entry.id for entry in msgspec.json.decode(body, type=_Models).data]
    except (EngineFailed, msgspec.DecodeError) as error:
        raise StartFailed(f"the engine does not list its models at /v1/models: {error}") from None
    if status != 200 or not models:
        raise StartFailed(f"the engine lists no models at /v1/models (status {status})")
    if len(models) > OFFERS_MAX or any(not 0 < len(name) <= NAME_MAX for name in models):
        raise StartFailed(f"the engine lists {len(models)} models; at most {OFFERS_MAX}, with names of {NAME_MAX} characters, can be lent")
    return models


class PassedAnswer:
    """An answer that goes on as the bytes that came; only its end is looked at, for the usage."""

    def __init__(self, answer: HttpAnswer) -> None:
        self._answer = answer
        self.usage: Usage | None = None

    def head(self) -> Head:
        head = self._answer.head
        if _PRINTABLE.fullmatch(head.content_type):
            return head
        return msgspec.structs.replace(head, content_type=JSON)  # some servers tell no type, and gateways want a printable one

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        tail = b""
        async for chunk in self._answer.body():
            tail = (tail + chunk)[-TAIL_BYTES:] if tail else chunk
            if self._answer.is_complete:
                self.usage = find_usage(tail, events=self._answer.head.content_type.startswith(EVENTS))
                yield Piece(chunk, is_last=True)
                return
            yield Piece(chunk)
        self.usage = find_usage(tail, events=self._answer.head.content_type.startswith(EVENTS))
        yield Piece(b"", is_last=True)


def find_usage(tail: bytes, *, events: bool) -> Usage | None:
    """The usage at an answer's end, if the server tells it."""
    if b'"usage"' not in tail:
        return None
    if events:
        event = next((e for e in reversed(sse.EventCutter().feed(tail)) if b'"usage"' in e), b"")
        tail = sse.payload(event)
    try:
        found = _usage.decode(tail).usage
        return added(None, found) if found else None
    except (msgspec.DecodeError, EngineFailed):
        return None


def without_ours(body: bytes) -> bytes:
    """The same request without the `fallow` object, which is between the caller and the gateway; else the bytes that came."""
    if b'"fallow"' not in body:
        return body
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return body  # the server will say what is wrong with it
    return body if fields.pop("fallow", None) is None else msgspec.json.encode(fields)


class AttachedServed(Lane):
    """One model of an attached server."""

    def __init__(self, *, model: str, engine: HttpEngine, slots: int) -> None:
        super().__init__(model=model, slots=slots, context_tokens=CONTEXT_TOKENS_UNKNOWN, digest="", paths=PATHS)
        self._engine = engine
        self._healthy = True

    def load(self, *, running: int) -> Load:
        load = super().load(running=running)
        return load if self._healthy else msgspec.structs.replace(load, readiness="failed")

    async def run(self) -> None:
        """Watch the server until cancelled."""
        try:
            while True:
                await asyncio.sleep(HEALTH_POLL_S)
                try:
                    status, _ = await self._engine.get("/v1/models", MODELS_S, MODELS_BYTES_MAX)
                    self._healthy = status == 200
                except EngineFailed:
                    self._healthy = False
        finally:
            self._engine.close()

    async def ready(self, within_s: float | None = None) -> Failure | None:
        return None

    @contextlib.asynccontextmanager
    async def ask(self, path: str, body: bytes) -> AsyncIterator[Answer]:
        """Raises EngineFailed when the server fails; its refusals pass as they came."""
        async with self._engine.post(path, without_ours(body)) as answer:
            if answer.head.status >= 500:
                raise EngineFailed(f"the attached server answered with status {answer.head.status}")
            yield PassedAnswer(answer)

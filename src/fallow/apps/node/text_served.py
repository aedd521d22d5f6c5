"""A model that writes text, in a llama engine: every text endpoint, each in its own form."""

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TypeVar

import msgspec

from fallow.apps.node.engine_served import EngineServed, Facts, WholeAnswer
from fallow.apps.node.room import Room
from fallow.apps.node.seats import Seats
from fallow.apps.node.served import EVENTS, JSON, NO_PAST, Answer, Past, Piece, Refused
from fallow.apps.node.supervisor import Supervisor
from fallow.apps.node.writing import Writing
from fallow.core.slots import Asker
from fallow.model.errors import CannotContinue, EngineFailed, Failure, InvalidRequest
from fallow.model.messages import Head
from fallow.model.receipt import Usage
from fallow.ports import Clock, Engine
from fallow.wire import llama_request, messages_api, openai, responses_answer, responses_request
from fallow.wire.chat_answer import ChatEndpoint
from fallow.wire.completions_api import CompletionsEndpoint
from fallow.wire.generation import Endpoint, Event, Generation, Stamp, Text, may_continue
from fallow.wire.llama_answer import UNREADABLE, refusal

ENDPOINTS: Mapping[str, Callable[[bytes, Stamp], Endpoint]] = {
    openai.CHAT: ChatEndpoint,
    openai.COMPLETIONS: CompletionsEndpoint,
    openai.RESPONSES: responses_answer.ResponsesEndpoint,
    openai.MESSAGES: messages_api.MessagesEndpoint,
}
COUNTS: Mapping[str, tuple[Callable[[bytes], Generation], Callable[[int], bytes]]] = {
    openai.RESPONSES_COUNT: (responses_request.read_count, responses_answer.count_body),
    openai.MESSAGES_COUNT: (messages_api.read_count, messages_api.count_body),
}
TEXT_PATHS = frozenset({*ENDPOINTS, *COUNTS})


_T = TypeVar("_T")


class _Prompt(msgspec.Struct, frozen=True):
    prompt: str


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class TextAnswer:
    """An answer as it is written, in the endpoint's form."""

    def __init__(self, endpoint: Endpoint, writing: Writing, served: EngineServed) -> None:
        self._endpoint = endpoint
        self._writing = writing
        self._served = served
        self.usage: Usage | None = None
        self.tokens: tuple[int, ...] = ()

    def head(self) -> Head:
        return Head(status=200, content_type=EVENTS if self._endpoint.stream else JSON, engine_us=0)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        pieces = self._stream() if self._endpoint.stream else self._whole()
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                async with self._served.at_rest():
                    yield piece

    async def _stream(self) -> AsyncGenerator[Piece, None]:
        endpoint = self._endpoint
        begun = self._go_on()
        async with contextlib.aclosing(self._writing.run(self._served.supervisor.moved)) as written:
            async for events in written:
                opening = b"" if begun else endpoint.begin()
                begun = True
                if data := opening + b"".join([endpoint.write(event) for event in events]):
                    yield Piece(data)
        self.usage, self.tokens = self._writing.usage, self._writing.tokens
        yield Piece((b"" if begun else endpoint.begin()) + endpoint.end(self.usage), is_last=True)

    def _go_on(self) -> bool:
        """Bring the endpoint to where the answer broke off; False if it is to begin."""
        delivered = self._endpoint.generation.delivered
        if delivered is not None:
            self._endpoint.begin()
            for piece in delivered:
                self._endpoint.write(Text(0, piece))
        return delivered is not None

    async def _whole(self) -> AsyncGenerator[Piece, None]:
        events: list[Event] = []
        async with contextlib.aclosing(self._writing.run(self._served.supervisor.moved)) as written:
            async for some in written:
                events += some
        self.usage, self.tokens = self._writing.usage, self._writing.tokens
        yield Piece(self._endpoint.whole(events, self.usage), is_last=True)


class TextServed(EngineServed):
    """A text model of the catalogue."""

    def __init__(self, facts: Facts, *, supervisor: Supervisor, engine: Engine, room: Room, clock: Clock, load_wait_s: float) -> None:
        super().__init__(facts, supervisor=supervisor, engine=engine, room=room, clock=clock, load_wait_s=load_wait_s)
        self._neutraliser = llama_request.Neutraliser(facts.control_tokens)
        self._seats = Seats(facts.slots, clock, self.at_rest)

    async def ready(self, within_s: float | None = None) -> Failure | None:
        """See EngineServed."""
        if self.supervisor.phase != "ready":
            self._seats.forget()
        return await super().ready(within_s)

    def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> contextlib.AbstractAsyncContextManager[Answer]:
        """Raises InvalidRequest or CannotContinue; the context raises Refused or EngineFailed."""
        if path in COUNTS:
            read, counted = COUNTS[path]
            generation = read(body)
            return self._counting(self._written(generation, asker), generation, counted)
        if path not in ENDPOINTS:
            raise InvalidRequest(f"this model does not answer {path}")
        created_s = past.made_at_s or self.clock.wall_ms() // 1000
        endpoint = ENDPOINTS[path](body, Stamp(id=past.answer_id or secrets.token_hex(12), created_s=created_s, model=self.model))
        if past.delivered is not None:
            if not endpoint.stream or not may_continue(endpoint.generation):
                raise CannotContinue("tools, schemas, several choices and log probabilities can't be continued elsewhere")
            endpoint.generation = msgspec.structs.replace(endpoint.generation, delivered=past.delivered)
        return self._writing(endpoint, self._written(endpoint.generation, asker, stream=endpoint.stream))

    def _written(self, generation: Generation, asker: Asker, *, stream: bool = False) -> Writing:
        return Writing(generation, self.engine, self._neutraliser, stream=stream, seats=self._seats, asker=asker)

    @contextlib.asynccontextmanager
    async def _writing(self, endpoint: Endpoint, writing: Writing) -> AsyncIterator[Answer]:
        async with self.asked():
            yield TextAnswer(endpoint, writing, self)

    @contextlib.asynccontextmanager
    async def _counting(self, writing: Writing, generation: Generation, counted: Callable[[int], bytes]) -> AsyncIterator[Answer]:
        async with self.asked():
            yield WholeAnswer(counted(await self._count(writing, generation)), Usage())

    async def _count(self, writing: Writing, generation: Generation) -> int:
        """How many tokens the conversation is for this model, its template included."""
        status, answer = await self.fetch("/apply-template", llama_request.template(writing.turns))
        if status == 200:
            status, answer = await self.fetch("/tokenize", llama_request.tokenize(_decoded(answer, _Prompt).prompt))
        if status != 200:
            raise Refused(refusal(status, answer, generation.params))
        return len(_decoded(answer, _Tokens).tokens)


def _decoded(answer: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except UNREADABLE:
        raise EngineFailed("the engine wrote an answer that can't be read") from None

"""A model that embeds or ranks texts, in an engine of our own."""

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable

from fallow.apps.node.engine_served import EngineServed, WholeAnswer
from fallow.apps.node.served import NO_PAST, Answer, Past, Refused
from fallow.core.slots import Asker
from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire import embeddings, openai, rerank
from fallow.wire.llama_answer import refusal

EMBEDDING_PATHS = frozenset({openai.EMBEDDINGS, openai.RERANK})
RERANK_PATHS = frozenset({openai.RERANK})
EMBEDDINGS_PARAMS = {"messages": "input"}
RERANK_PARAMS = {"messages": "documents"}


class VectorServed(EngineServed):
    """An embedding model, which ranks by similarity, or a reranker."""

    def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> contextlib.AbstractAsyncContextManager[Answer]:
        """Raises InvalidRequest; the context raises Refused or EngineFailed. Nothing is kept of a call, so it matters not whose it is."""
        if path == openai.EMBEDDINGS and path in self.paths:
            request = embeddings.read(body)
            embeddings.check_dimensions(request, self.facts.dimensions, may_shorten=self.facts.may_shorten)
            return self._asking(functools.partial(self._embed, request))
        if path == openai.RERANK:
            return self._asking(functools.partial(self._rank, rerank.read(body)))
        raise InvalidRequest(f"this model does not answer {path}")

    @contextlib.asynccontextmanager
    async def _asking(self, work: Callable[[], Awaitable[tuple[bytes, Usage]]]) -> AsyncIterator[Answer]:
        async with self.asked():
            yield WholeAnswer(*await work())

    async def _embed(self, request: embeddings.EmbeddingsRequest) -> tuple[bytes, Usage]:
        size, may_shorten = self.facts.dimensions, self.facts.may_shorten
        answers = await self._answers(openai.EMBEDDINGS, embeddings.engine_bodies(request), EMBEDDINGS_PARAMS)
        return embeddings.answer(request, answers, model=self.model, size=size, may_shorten=may_shorten)

    async def _rank(self, request: rerank.RerankRequest) -> tuple[bytes, Usage]:
        if openai.EMBEDDINGS in self.paths:
            answers = await self._answers(openai.EMBEDDINGS, rerank.as_embeddings(request), RERANK_PARAMS)
            return rerank.answer_from_embeddings(request, answers, model=self.model, size=self.facts.dimensions)
        answers = await self._answers(openai.RERANK, rerank.engine_bodies(request), RERANK_PARAMS)
        return rerank.answer_from_scores(request, answers, model=self.model)

    async def _answers(self, path: str, bodies: list[bytes], params: dict[str, str]) -> list[bytes]:
        """The engine's answers to all batches, one after the other."""
        answers = []
        for body in bodies:
            status, answer = await self.fetch(path, body)
            if status != 200:
                raise Refused(refusal(status, answer, params))
            self.supervisor.moved()
            answers.append(answer)
        return answers

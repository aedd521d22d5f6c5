"""`/v1/rerank` in Jina's and Cohere's form: reads the request, and makes its answer from a reranker's scores or from embeddings."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from fallow.model.errors import EngineFailed, InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire import embeddings
from fallow.wire.embeddings import EngineUsage, TotalUsage
from fallow.wire.openai import decode

RERANK = "/v1/rerank"
DOCUMENTS_MAX = 1_024
BATCH = 32
"""How many documents an engine scores at once."""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: str


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a caller asks: the best `top_n` documents for a query, all of them by default; their texts come back only if wished."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None
    user: str | None = None
    fallow: dict[str, Any] | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class _EngineScore(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float


class _EngineAnswer(msgspec.Struct, frozen=True):
    """llama.cpp's answer; a model that is no reranker gets null for its scores, which is refused here."""

    results: list[_EngineScore]
    usage: EngineUsage


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class _Ranking(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    object: Literal["list"] = "list"
    usage: TotalUsage
    results: list[_Result]


_request = msgspec.json.Decoder(RerankRequest)
_answer = msgspec.json.Decoder(_EngineAnswer)


def read(body: bytes) -> RerankRequest:
    """A caller's request; raises InvalidRequest with `param`."""
    request: RerankRequest = decode(_request, body)
    if not request.query:
        raise InvalidRequest("query is empty", param="query")
    if not request.documents:
        raise InvalidRequest("documents is empty; give at least one", param="documents")
    if len(request.documents) > DOCUMENTS_MAX:
        raise InvalidRequest(
            f"there are {len(request.documents)} documents, and at most {DOCUMENTS_MAX} go into one request", param="documents"
        )
    for index, one in enumerate(request.documents):
        if one in ("", Document("")):
            where = f"documents[{index}]" if isinstance(one, str) else f"documents[{index}].text"
            raise InvalidRequest(f"{where} is empty", param=where)
    return request


def engine_bodies(request: RerankRequest) -> list[bytes]:
    """The request as a reranker's engine gets it, in batches. All scores are wanted: which are the best is decided here."""
    texts = request.texts
    return [msgspec.json.encode({"query": request.query, "documents": texts[at : at + BATCH]}) for at in range(0, len(texts), BATCH)]


def as_embeddings(request: RerankRequest) -> list[bytes]:
    """The request as an embedding model's engine gets it: the query first, then the documents."""
    return embeddings.bodies_for([request.query, *request.texts])


def answer_from_scores(
    request: RerankRequest, engine_answers: Sequence[bytes], *, model: str, are_logits: bool = True
) -> tuple[bytes, Usage]:
    """The caller's answer from a reranker's to all batches, and what it used; raises EngineFailed.

    llama.cpp gives what the model's last layer says, any number: the logistic function makes 0 to 1 of it. Of a few models it
    gives shares already (`are_logits` False).
    """
    count = len(request.documents)
    raw: list[float] = []
    tokens = 0
    for at, one in zip(range(0, count, BATCH), engine_answers, strict=True):
        scores, used = _scores(one, min(BATCH, count - at))
        raw += scores
        tokens += used
    if not are_logits and not all(0 <= score <= 1 for score in raw):
        raise EngineFailed("the engine's scores aren't between 0 and 1")
    shown = [_logistic(score) for score in raw] if are_logits else raw
    return _written(request, raw, shown, Usage(prompt_tokens=tokens), model)


def _scores(engine_answer: bytes, count: int) -> tuple[list[float], int]:
    """The scores of one batch in its order, and the tokens that it cost."""
    try:
        got = _answer.decode(engine_answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineFailed("the engine's answer isn't a reranker's; the model may not be one") from None
    if sorted(one.index for one in got.results) != list(range(count)):
        raise EngineFailed(f"the engine was asked to score {count} documents, and scored others")
    raw = [one.relevance_score for one in sorted(got.results, key=lambda one: one.index)]
    if not all(map(math.isfinite, raw)):
        raise EngineFailed("the engine's scores aren't finite numbers")
    return raw, got.usage.prompt_tokens


def answer_from_embeddings(
    request: RerankRequest, engine_answers: Sequence[bytes], *, model: str, size: int | None = None
) -> tuple[bytes, Usage]:
    """The caller's answer from an embedding engine's to `as_embeddings`, and what it used; raises EngineFailed.

    The score is the cosine between the query's vector and the document's, so −1 to 1: it isn't mapped to 0 to 1, which would
    look like a reranker's and mean something else. A vector of zeros is like nothing, 0.
    """
    vectors, usage = embeddings.all_vectors(engine_answers, count=len(request.documents) + 1, size=size)
    units = embeddings.unit(vectors).astype(np.float64)
    # Not a matrix product: that adds up in an order of its own, so that equal documents may differ.
    cosines = np.clip((units[1:] * units[0]).sum(axis=1), -1, 1).tolist()
    return _written(request, cosines, cosines, usage, model)


def _logistic(score: float) -> float:
    # Two forms, so that the exponent is never a large number.
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def _written(request: RerankRequest, raw: Sequence[float], shown: Sequence[float], usage: Usage, model: str) -> tuple[bytes, Usage]:
    """Best first, by the raw scores: shares near 1 are equal as shown, though the model told them apart. Ties go by index."""
    texts = request.texts
    best = sorted(range(len(raw)), key=lambda index: (-raw[index], index))[: request.top_n]
    results = [
        _Result(index=index, relevance_score=shown[index], document=Document(texts[index]) if request.return_documents else UNSET)
        for index in best
    ]
    total = TotalUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
    return msgspec.json.encode(_Ranking(model=model, usage=total, results=results)), usage

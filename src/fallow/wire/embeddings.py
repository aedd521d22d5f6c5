"""`/v1/embeddings` in OpenAI's form: reads the request, and makes its answer from the engine's."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from fallow.model.errors import EngineFailed, InvalidRequest
from fallow.model.receipt import Tokens, Usage
from fallow.wire.openai import TOKENS_MAX, decode

EMBEDDINGS = "/v1/embeddings"
INPUTS_MAX = 2_048
BATCH_INPUTS = 64
"""What an engine is asked at once."""

TokenId = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
Dimensions = Annotated[int, Meta(ge=1)]
Vectors = NDArray[np.float32]


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a caller asks. `input` is one text, one array of tokens, or a list of either; never empty and never mixed once it is read."""

    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: str | None = None
    fallow: dict[str, Any] | None = None

    @property
    def inputs(self) -> list[Any]:
        """The texts and arrays of tokens, each of which gets a vector."""
        return [self.input] if isinstance(self.input, str) or isinstance(self.input[0], int) else self.input


class EngineUsage(msgspec.Struct, frozen=True):
    """What an engine says it read."""

    prompt_tokens: Tokens


class _EngineVector(msgspec.Struct, frozen=True):
    index: int
    embedding: str | list[float]


class _EngineAnswer(msgspec.Struct, frozen=True):
    """What all engines have in common. llama.cpp writes null where a number isn't finite, and that is refused here."""

    data: list[_EngineVector]
    usage: EngineUsage


_request = msgspec.json.Decoder(EmbeddingsRequest)
_answer = msgspec.json.Decoder(_EngineAnswer)


def read(body: bytes) -> EmbeddingsRequest:
    """A caller's request; raises InvalidRequest with `param`."""
    request: EmbeddingsRequest = decode(_request, body)
    _check_input(request.input)
    return request


def _check_input(value: str | Sequence[Any]) -> None:
    if not value:
        raise InvalidRequest("input is empty; give at least one text or token", param="input")
    if isinstance(value, str):
        return
    kind = type(value[0])
    if kind is not int and len(value) > INPUTS_MAX:
        raise InvalidRequest(f"input has {len(value)} elements, and at most {INPUTS_MAX} go into one request", param="input")
    for index, one in enumerate(value):
        if type(one) is not kind:
            raise InvalidRequest("the elements of input must all be texts, all tokens, or all arrays of tokens", param=f"input[{index}]")
        if kind is not int and not one:
            raise InvalidRequest(f"input[{index}] is empty", param=f"input[{index}]")


def check_dimensions(request: EmbeddingsRequest, size: int | None, *, may_shorten: bool) -> None:
    """Raise InvalidRequest if the model, whose vectors have `size` numbers as far as we know, can't give what was asked."""
    wanted = request.dimensions
    if wanted is None or size is None or wanted == size or (wanted < size and may_shorten):
        return
    possible = f"1 to {size} dimensions" if may_shorten else f"{size} dimensions only"
    raise InvalidRequest(f"this model gives {possible}, not {wanted}", param="dimensions")


def engine_bodies(request: EmbeddingsRequest) -> list[bytes]:
    """The request as the engine gets it: in batches, so that it shows progress, and stops when nobody waits any more."""
    return bodies_for(request.inputs)


def bodies_for(inputs: Sequence[Any]) -> list[bytes]:
    """Ask an engine for the vectors of these inputs. In base64 they are a quarter as long, and exact."""
    return [
        msgspec.json.encode({"input": inputs[at : at + BATCH_INPUTS], "encoding_format": "base64"})
        for at in range(0, len(inputs), BATCH_INPUTS)
    ]


def all_vectors(engine_answers: Sequence[bytes], *, count: int, size: int | None) -> tuple[Vectors, Usage]:
    """The vectors of the answers to all batches; raises EngineFailed."""
    found: list[Vectors] = []
    tokens = 0
    for at, one in zip(range(0, count, BATCH_INPUTS), engine_answers, strict=True):
        vectors, usage = vectors_of(one, count=min(BATCH_INPUTS, count - at), size=size)
        size = vectors.shape[1]
        found.append(vectors)
        tokens += usage.prompt_tokens
    return np.concatenate(found), Usage(prompt_tokens=tokens)


def vectors_of(engine_answer: bytes, *, count: int, size: int | None) -> tuple[Vectors, Usage]:
    """The `count` vectors of an engine's answer in their order, as rows; raises EngineFailed unless all are whole and finite."""
    try:
        answer = _answer.decode(engine_answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EngineFailed("the engine's answer isn't one to a request for embeddings") from None
    if sorted(one.index for one in answer.data) != list(range(count)):
        raise EngineFailed(f"the engine was asked for {count} embeddings, and answered with others")
    rows = [_vector(one.embedding) for one in sorted(answer.data, key=lambda one: one.index)]
    length = len(rows[0]) if size is None else size
    if length == 0 or any(len(row) != length for row in rows):
        expected = "the same number of" if size is None else size
        raise EngineFailed(f"the engine's embeddings haven't all {expected} dimensions")
    vectors = np.stack(rows)
    if not np.isfinite(vectors).all():
        raise EngineFailed("the engine's embeddings hold values that aren't finite numbers")
    return vectors, Usage(prompt_tokens=answer.usage.prompt_tokens)


def _vector(value: str | list[float]) -> Vectors:
    if isinstance(value, list):
        with np.errstate(over="ignore"):  # what doesn't fit becomes infinite, and is refused as such
            return np.array(value, "<f4")
    try:
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4")
    except (binascii.Error, ValueError):  # not base64, or no whole number of floats
        raise EngineFailed("the engine's embeddings aren't base64 of floats") from None


class _Embedding(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class TotalUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The usage of an answer that writes no tokens."""

    prompt_tokens: int
    total_tokens: int


class _Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[_Embedding]
    model: str
    usage: TotalUsage


def answer(
    request: EmbeddingsRequest, engine_answers: Sequence[bytes], *, model: str, size: int | None, may_shorten: bool
) -> tuple[bytes, Usage]:
    """The caller's answer, and what it used; raises EngineFailed, and InvalidRequest for dimensions that the model can't give."""
    vectors, usage = all_vectors(engine_answers, count=len(request.inputs), size=size)
    check_dimensions(request, vectors.shape[1], may_shorten=may_shorten)
    if request.dimensions is not None and request.dimensions < vectors.shape[1]:
        vectors = unit(vectors[:, : request.dimensions])
    written: Sequence[Any] = vectors.tolist()
    if request.encoding_format == "base64":
        written = [base64.b64encode(row.tobytes()).decode() for row in vectors]
    body = _Embeddings(
        data=[_Embedding(index=index, embedding=one) for index, one in enumerate(written)],
        model=model,
        usage=TotalUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens),
    )
    return msgspec.json.encode(body), usage


def unit(vectors: Vectors) -> Vectors:
    """Each row at length 1; one of zeros has no direction, and stays."""
    wide = vectors.astype(np.float64)  # squares of small float32 vanish
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0), "<f4")

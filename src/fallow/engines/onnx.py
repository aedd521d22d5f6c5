"""An embedding model on ONNX Runtime as a process: reads its settings from standard input, then answers HTTP on a Unix socket."""

import asyncio
import base64
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import msgspec
import numpy as np
import onnxruntime
import uvicorn
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fallow.model.errors import FallowError, InvalidRequest
from fallow.wire.openai import decode

EXIT_BAD_SETTINGS = 2
EXIT_NOT_LOADED = 3
BODY_BYTES_MAX = 64 * 1024 * 1024
INPUTS_MAX = 2_048
ROWS_MAX = 32
TOKENS_MAX = 512
"""A batch's rows and padded tokens: larger ones are no faster on a CPU, and a caller who left is noticed between two of them."""
TEXTS_MAX = 32
"""How many texts are turned into tokens at a time, for the same reason."""
CHARACTERS_PER_TOKEN_MAX = 256
"""A text that is longer than this many for every token that fits isn't read to its end: that alone would take seconds."""
KEEP_ALIVE_S = 30
STOP_S = 1
LOG_FATAL = 4

P = ParamSpec("P")
T = TypeVar("T")
Vectors = NDArray[np.float32]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
OUTPUTS = ("sentence_embedding", "last_hidden_state", "token_embeddings")
"""What models call the output that we want, best first; of a model without any of them we take the first."""


class OnnxSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is to run. An input may have `context_tokens` at most."""

    weights: str
    tokenizer: str
    socket: str
    threads: Annotated[int, Meta(ge=1)]
    context_tokens: Annotated[int, Meta(ge=1)]
    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True


class EmbeddingsAsked(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /v1/embeddings; arrays of tokens are taken as they are, texts get the model's own special tokens."""

    input: Annotated[list[str | list[Annotated[int, Meta(ge=0)]]], Meta(min_length=1, max_length=INPUTS_MAX)]
    encoding_format: Literal["float", "base64"] = "float"


class TokenizeAsked(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /tokenize."""

    content: str
    add_special: bool = False


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An error as llama.cpp writes it."""

    code: int
    message: str
    type: str
    n_prompt_tokens: int | UnsetType = UNSET
    n_ctx: int | UnsetType = UNSET


class TooLong(InvalidRequest):
    """An input has more tokens than the model takes."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"an input has {tokens} tokens, and this model takes {limit} at most")
        self.tokens = tokens
        self.limit = limit


class CallerLeft(FallowError):
    """Nobody waits for the answer any more."""


class Model:
    """A loaded model with its tokenizer. It is used by one thread at a time."""

    def __init__(self, settings: OnnxSettings) -> None:
        self._settings = settings
        self._tokenizer = Tokenizer.from_file(settings.tokenizer)
        self._tokenizer.no_truncation()  # files come with both switched on, and would cut texts in silence
        self._tokenizer.no_padding()
        self._token_max = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._session = onnxruntime.InferenceSession(settings.weights, _options(settings.threads), providers=["CPUExecutionProvider"])
        self._inputs = {one.name: np.int32 if one.type == "tensor(int32)" else np.int64 for one in self._session.get_inputs()}
        if not {"input_ids"} <= self._inputs.keys() <= {"input_ids", "attention_mask", "token_type_ids"}:
            raise ValueError("the model's inputs aren't those of a text encoder")
        names = [one.name for one in self._session.get_outputs()]
        self._output = next((name for name in OUTPUTS if name in names), names[0])
        self.embed([[0]])  # a model that can't do this is better found now

    def tokens(self, text: str, special: bool) -> list[int]:
        """A text's tokens."""
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def read(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """The tokens of each input; raises InvalidRequest."""
        limit = self._settings.context_tokens
        characters = limit * CHARACTERS_PER_TOKEN_MAX
        texts = [one[:characters] for one in inputs if isinstance(one, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=True))
        read = []
        for one in inputs:
            ids = list(next(encoded).ids) if isinstance(one, str) else one
            if not one or not ids:
                raise InvalidRequest("an input is empty", param="input")
            if isinstance(one, str) and len(one) > characters:
                raise TooLong(max(len(ids), limit + 1), limit)
            if len(ids) > limit:
                raise TooLong(len(ids), limit)
            if max(ids) > self._token_max:
                raise InvalidRequest(f"an input has a token that this model doesn't know; they go up to {self._token_max}", param="input")
            read.append(ids)
        return read

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """The vectors of some inputs, which fit into one batch."""
        lengths = [len(row) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feed = {name: values[name].astype(kind, copy=False) for name, kind in self._inputs.items()}
        out = np.asarray(self._session.run([self._output], feed)[0], np.float32)
        if out.ndim == 3:
            out = _pooled(out, mask, self._settings.pooling)
        if out.ndim != 2 or len(out) != len(rows):
            raise ValueError("the model's output has a wrong shape")
        if self._settings.normalise:
            out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), np.float32(1e-12))
        return out


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else threads that wait take the owner's cores
    options.log_severity_level = LOG_FATAL
    return options


def _pooled(hidden: Vectors, mask: NDArray[np.int64], pooling: str) -> Vectors:
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask[:, :, None].astype(np.float32)
    return np.asarray((hidden * weight).sum(axis=1) / weight.sum(axis=1), np.float32)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Which inputs go into the model together: those of like lengths, so that little is padding. Longest first."""
    out: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if not out or len(out[-1]) == ROWS_MAX or (len(out[-1]) + 1) * longest > TOKENS_MAX:
            out.append([])
            longest = lengths[number]
        out[-1].append(number)
    return out


class App:
    """The ASGI application. All work is done by one thread, in turns: requests share the model batch by batch, and /health answers."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self.model: Model | None = None
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        match scope["method"], scope["path"]:
            case "GET", "/health":
                status, answer = _loading() if self.model is None else (200, b'{"status":"ok"}')
            case "POST", "/v1/embeddings" | "/tokenize" as path:
                status, answer = await self._post(path, receive)
            case _:
                status, answer = _fault(404, "this engine answers GET /health, POST /v1/embeddings and POST /tokenize", "not_found_error")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _post(self, path: str, receive: Receive) -> tuple[int, bytes]:
        body = await _body(receive)
        if body is None:
            return _fault(413, f"the body is over {BODY_BYTES_MAX} bytes", "invalid_request_error")
        if self.model is None:
            return _loading()
        async with asyncio.TaskGroup() as group:
            caller = group.create_task(_left(receive))
            answer = await self._answer(self.model, path, body, caller)
            caller.cancel()
        return answer

    async def _answer(self, model: Model, path: str, body: bytes, caller: asyncio.Task[None]) -> tuple[int, bytes]:
        """Status and body; raises nothing."""
        try:
            return 200, await (self._tokenize if path == "/tokenize" else self._embeddings)(model, body, caller)
        except TooLong as error:
            return _fault(400, error.message, "exceed_context_size_error", tokens=error.tokens, limit=error.limit)
        except InvalidRequest as error:
            return _fault(400, error.message, "invalid_request_error")
        except Exception:  # noqa: BLE001  (the outermost loop: one request's fault is one request's; its text may hold a prompt)
            return _fault(500, "the model failed", "server_error")

    async def _tokenize(self, model: Model, body: bytes, caller: asyncio.Task[None]) -> bytes:
        asked: TokenizeAsked = decode(_tokenize_decoder, body)
        return msgspec.json.encode({"tokens": await self._do(caller, model.tokens, asked.content, asked.add_special)})

    async def _embeddings(self, model: Model, body: bytes, caller: asyncio.Task[None]) -> bytes:
        asked: EmbeddingsAsked = decode(_embeddings_decoder, body)
        ids: list[list[int]] = []
        for start in range(0, len(asked.input), TEXTS_MAX):
            ids += await self._do(caller, model.read, asked.input[start : start + TEXTS_MAX])
        vectors: dict[int, Vectors] = {}
        for batch in batches([len(one) for one in ids]):
            done = await self._do(caller, model.embed, [ids[number] for number in batch])
            vectors |= zip(batch, done, strict=True)
        ordered = [vectors[number] for number in range(len(ids))]
        return await self._do(caller, _written, ordered, sum(map(len, ids)), asked.encoding_format)

    async def _do(self, caller: asyncio.Task[None], work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Have the one thread do it, unless the caller has left."""
        if caller.done():
            raise CallerLeft("nobody waits for the answer any more")
        return await asyncio.get_running_loop().run_in_executor(self._worker, partial(work, *args, **named))


_embeddings_decoder = msgspec.json.Decoder(EmbeddingsAsked)
_tokenize_decoder = msgspec.json.Decoder(TokenizeAsked)


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None if it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""  # nobody will read the answer
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > BODY_BYTES_MAX:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    """Until the caller's connection closes."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _written(vectors: Sequence[Vectors], tokens: int, form: str) -> bytes:
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(one) if form == "base64" else one.tolist()}
        for index, one in enumerate(vectors)
    ]
    return msgspec.json.encode({"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _fault(code: int, message: str, kind: str, *, tokens: int | UnsetType = UNSET, limit: int | UnsetType = UNSET) -> tuple[int, bytes]:
    return code, msgspec.json.encode({"error": Fault(code=code, message=message, type=kind, n_prompt_tokens=tokens, n_ctx=limit)})


def _loading() -> tuple[int, bytes]:
    return _fault(503, "the model is loading", "unavailable_error")


async def serve(settings: OnnxSettings) -> int:
    """Load the model and serve it until a signal comes; returns an exit code."""
    Path(settings.socket).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(settings.socket)  # by ourselves: uvicorn would let everybody on this machine connect
    worker = ThreadPoolExecutor(1)
    app = App(worker)
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http="httptools",
        ws="none",
        lifespan="off",
        loop="none",
        proxy_headers=False,
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_S,
    )
    server = uvicorn.Server(config)
    code = 0
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]), name="server")
        try:
            app.model = await asyncio.get_running_loop().run_in_executor(worker, Model, settings)
        except Exception:  # noqa: BLE001  (both libraries raise bare ones, whose text holds paths)
            code = EXIT_NOT_LOADED
            server.should_exit = True
    return code


def main() -> None:
    """Settings as one line of JSON on standard input."""
    os.umask(0o077)
    logging.disable(logging.CRITICAL)  # whatever a library might say could hold a prompt
    onnxruntime.set_default_logger_severity(LOG_FATAL)
    try:
        settings = msgspec.json.decode(sys.stdin.readline(), type=OnnxSettings)
    except msgspec.DecodeError:
        sys.exit(EXIT_BAD_SETTINGS)
    sys.exit(asyncio.run(serve(settings)))


if __name__ == "__main__":
    main()

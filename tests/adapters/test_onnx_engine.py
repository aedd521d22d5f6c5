"""The ONNX engine as it runs: a process of its own, a tiny model, and the socket between."""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import signal
import stat
import tempfile
import threading
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fallow.adapters import children, onnx_process
from fallow.adapters.cgroup import NO_CGROUPS
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.jail import NO_JAIL
from fallow.adapters.onnx_process import OnnxProcess
from fallow.engines.onnx import EXIT_BAD_SETTINGS, EXIT_NOT_LOADED, INPUTS_MAX, ROWS_MAX, TOKENS_MAX, App, batches
from fallow.model.errors import BadChecksum, EngineFailed, MissingExtra
from fallow.wire import embeddings

pytestmark = pytest.mark.anyio

WITHIN_S = 30.0
CONTEXT = 6
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "north", "east", "south", "west", "up"]
TABLE = np.array([[9, 9, 9], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, -1, 0], [-1, 0, 0], [0, 0, 4]], np.float32)
"""Each word's vector. Padding has one too, so that a model which looks at it is found out."""


def write_tokenizer(path: Path) -> Path:
    """One token a word, between two special ones; it cuts and pads unless told otherwise, as real files do."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


def write_model(path: Path, *, output: str = "last_hidden_state", inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Path:
    """Looks each token up. With the output `sentence_embedding` it gives a sentence's sum; an int32 model is asked for by `ids32`."""
    kind = TensorProto.INT32 if "ids32" in inputs else TensorProto.INT64
    names = tuple(name for name in inputs if name != "ids32")
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], axis=0)]
    shape: list[str | int] = ["batch", "sequence", 3]
    if output == "sentence_embedding":
        nodes.append(helper.make_node("ReduceSum", ["hidden", "axes"], [output], keepdims=0))
        shape = ["batch", 3]
    else:
        nodes.append(helper.make_node("Identity", ["hidden"], [output]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, ["batch", "sequence"]) for name in names],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def launch(folder: Path, **changes: Any) -> OnnxProcess:
    """How to start the tiny model in a folder that has both files."""
    weights, tokenizer = folder / "m.onnx", folder / "t.json"
    values: dict[str, Any] = {
        "weights": weights,
        "weights_sha256": sha256(weights),
        "tokenizer": tokenizer,
        "tokenizer_sha256": sha256(tokenizer),
        "name": "e",
        "threads": 1,
        "pooling": "mean",
        "context_tokens": CONTEXT,
        "folder": folder,
        "memory_bytes": 0,
        "jail": NO_JAIL,
        "cgroups": NO_CGROUPS,
    }
    return OnnxProcess(**values | changes)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's name has a limit."""
    with tempfile.TemporaryDirectory(prefix="fallow-") as name:
        write_tokenizer(Path(name) / "t.json")
        write_model(Path(name) / "m.onnx")
        yield Path(name)


async def until_healthy(process: Process, engine: HttpEngine) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await engine.is_healthy(WITHIN_S):
        assert process.returncode is None, f"the engine ended with {process.returncode}"
        assert time.monotonic() < deadline, "the engine didn't load"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(one: OnnxProcess) -> AsyncIterator[HttpEngine]:
    process = await one.start()
    engine = HttpEngine(str(one.socket))
    try:
        await until_healthy(process, engine)
        yield engine
    finally:
        engine.close()
        await children.kill(process)
        one.clean_up()


async def ask(engine: HttpEngine, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with engine.post(path, raw) as answer:
        return answer.head.status, json.loads(b"".join([chunk async for chunk in answer.body()]))


async def embed(engine: HttpEngine, inputs: list[Any], **fields: Any) -> tuple[list[Any], int]:
    """The vectors and the number of tokens."""
    status, got = await ask(engine, "/v1/embeddings", {"input": inputs, **fields})
    assert status == 200, got
    assert [one["index"] for one in got["data"]] == list(range(len(inputs)))
    assert got["usage"]["total_tokens"] == got["usage"]["prompt_tokens"]
    return [one["embedding"] for one in got["data"]], got["usage"]["prompt_tokens"]


HALF = math.sqrt(0.5)


async def test_texts_become_vectors(folder: Path) -> None:
    """Means over the words that are there, at length 1: the special tokens count as zeros, the padding not at all."""
    async with running(launch(folder)) as engine:
        vectors, tokens = await embed(engine, ["north", "north east south", "north east", "up west up", "what"])
        expected = [[0, 1, 0], [1, 0, 0], [HALF, HALF, 0], [-1 / math.sqrt(65), 0, 8 / math.sqrt(65)], [0, 0, 1]]
        assert np.array(vectors) == pytest.approx(np.array(expected), abs=1e-6)
        assert tokens == (1 + 3 + 2 + 3 + 1) + 5 * 2


async def test_tokens_are_taken_as_they_are_and_beside_texts(folder: Path) -> None:
    async with running(launch(folder)) as engine:
        vectors, tokens = await embed(engine, [[4], "east", [5, 5, 4, 4]])
        assert np.array(vectors) == pytest.approx(np.array([[0, 1, 0], [1, 0, 0], [HALF, HALF, 0]]), abs=1e-6)
        assert tokens == 1 + 3 + 4
        assert await ask(engine, "/tokenize", {"content": "north what up"}) == (200, {"tokens": [4, 1, 8]})
        assert await ask(engine, "/tokenize", {"content": "north", "add_special": True}) == (200, {"tokens": [2, 4, 3]})


async def test_many_inputs_keep_their_order(folder: Path) -> None:
    """More than one batch, of mixed lengths: sorted inside, but not outside."""
    inputs = [[4 + number % 5] * (1 + number * 7 % CONTEXT) for number in range(INPUTS_MAX)]
    lone = TABLE[4:] / np.linalg.norm(TABLE[4:], axis=1, keepdims=True)
    async with running(launch(folder)) as engine:
        vectors, tokens = await embed(engine, inputs)
    assert np.array(vectors) == pytest.approx(lone[[number % 5 for number in range(INPUTS_MAX)]], abs=1e-6)
    assert tokens == sum(map(len, inputs))


async def test_both_forms_are_the_same_and_read_by_the_endpoint(folder: Path) -> None:
    request = embeddings.read(json.dumps({"model": "m", "input": ["north east", "up what", "west"], "dimensions": 3}).encode())
    async with running(launch(folder)) as engine:
        plain, _ = await embed(engine, request.inputs)
        packed, _ = await embed(engine, request.inputs, encoding_format="base64")
        assert [np.frombuffer(base64.b64decode(one), "<f4").tolist() for one in packed] == plain
        async with engine.post(embeddings.EMBEDDINGS, embeddings.engine_bodies(request)[0]) as answer:
            raw = b"".join([chunk async for chunk in answer.body()])
    text, usage = embeddings.answer(request, [raw], model="m", size=3, may_shorten=False)
    assert [one["embedding"] for one in json.loads(text)["data"]] == plain
    assert usage.prompt_tokens == 4 + 4 + 3


@pytest.mark.parametrize(
    ("changes", "model", "inputs", "expected"),
    [
        ({"normalise": False}, {}, [[4, 5], [8]], [[0.5, 0.5, 0], [0, 0, 4]]),
        ({"pooling": "cls", "normalise": False}, {}, [[4, 5], [8, 4, 4]], [[0, 1, 0], [0, 0, 4]]),
        ({"normalise": False}, {"output": "sentence_embedding"}, [[4, 5, 8], [5, 5, 5]], [[1, 1, 4], [3, 0, 0]]),
        ({}, {"inputs": ("input_ids",)}, [[4], [5, 5]], [[0, 1, 0], [1, 0, 0]]),
        ({}, {"inputs": ("input_ids", "attention_mask", "token_type_ids")}, [[4], [5, 5]], [[0, 1, 0], [1, 0, 0]]),
        ({}, {"inputs": ("input_ids", "attention_mask", "ids32")}, [[4], [5, 5]], [[0, 1, 0], [1, 0, 0]]),
        ({}, {"output": "something"}, [[4], [5, 5]], [[0, 1, 0], [1, 0, 0]]),
        ({}, {}, [[2, 3]], [[0, 0, 0]]),  # no length to divide by
    ],
)
async def test_models_of_several_kinds(
    folder: Path, changes: dict[str, Any], model: dict[str, Any], inputs: list[Any], expected: list[Any]
) -> None:
    write_model(folder / "m.onnx", **model)
    async with running(launch(folder, **changes)) as engine:
        vectors, _ = await embed(engine, inputs)
        assert np.array(vectors) == pytest.approx(np.array(expected), abs=1e-6)


REFUSED: list[tuple[Any, str]] = [
    (b"", "invalid_request_error"),
    (b"{", "invalid_request_error"),
    (b"[]", "invalid_request_error"),
    ({}, "invalid_request_error"),
    ({"input": "north"}, "invalid_request_error"),
    ({"input": []}, "invalid_request_error"),
    ({"input": [""]}, "invalid_request_error"),
    ({"input": [[]]}, "invalid_request_error"),
    ({"input": [4]}, "invalid_request_error"),
    ({"input": [None]}, "invalid_request_error"),
    ({"input": [[-1]]}, "invalid_request_error"),
    ({"input": [[len(WORDS)]]}, "invalid_request_error"),
    ({"input": [[2**40]]}, "invalid_request_error"),
    ({"input": [[4]] * (INPUTS_MAX + 1)}, "invalid_request_error"),
    ({"input": ["north"], "encoding_format": "int8"}, "invalid_request_error"),
    ({"input": ["secret " * (CONTEXT - 1)]}, "exceed_context_size_error"),
    ({"input": ["north", [4] * (CONTEXT + 1)]}, "exceed_context_size_error"),
]


async def test_bad_requests_are_refused_and_harm_nothing(folder: Path) -> None:
    async with running(launch(folder)) as engine:
        for body, kind in REFUSED:
            status, got = await ask(engine, "/v1/embeddings", body)
            assert (status, got["error"]["code"], got["error"]["type"]) == (400, 400, kind), body
            assert got["error"]["message"]
            assert "secret" not in got["error"]["message"]
        for body in (b"", b"null", {}, {"content": 1}):
            status, got = await ask(engine, "/tokenize", body)
            assert (status, got["error"]["type"]) == (400, "invalid_request_error"), body
        status, got = await ask(engine, "/v1/chat/completions", {})
        assert (status, got["error"]["code"]) == (404, 404)
        assert await embed(engine, ["north"]) == ([[0, 1, 0]], 3)


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        ("north " * (CONTEXT - 1), CONTEXT + 1),
        ([4] * 1_000, 1_000),
        ("x" * 1_000_000, CONTEXT + 1),  # one word; but nobody reads that far
    ],
)
async def test_too_long_an_input_is_refused_with_both_numbers(folder: Path, value: Any, tokens: int) -> None:
    async with running(launch(folder)) as engine:
        fits = "north " * (CONTEXT - 2) if isinstance(value, str) else [4] * CONTEXT
        await embed(engine, [fits])
        status, got = await ask(engine, "/v1/embeddings", {"input": ["north", value]})
        assert status == 400
        assert (got["error"]["n_prompt_tokens"], got["error"]["n_ctx"]) == (tokens, CONTEXT)
        assert str(CONTEXT) in got["error"]["message"]


async def test_a_token_that_only_the_tokenizer_knows_is_the_models_fault(folder: Path) -> None:
    """A pair of files that don't belong together: an error of the server, and the next request is fine."""
    tokenizer = Tokenizer.from_file(str(folder / "t.json"))
    tokenizer.add_tokens(["beyond"])
    tokenizer.save(str(folder / "t.json"))
    async with running(launch(folder)) as engine:
        status, got = await ask(engine, "/v1/embeddings", {"input": ["beyond"]})
        assert (status, got["error"]["type"]) == (500, "server_error")
        assert await embed(engine, ["north"]) == ([[0, 1, 0]], 3)


async def test_requests_at_the_same_time_and_callers_who_leave(folder: Path) -> None:
    async with running(launch(folder)) as engine:
        leaving = [asyncio.create_task(embed(engine, ["north east"] * INPUTS_MAX)) for _ in range(4)]
        staying = [asyncio.create_task(embed(engine, [[4 + number % 2]] * 100)) for number in range(6)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        for number, task in enumerate(staying):
            vectors, _ = await task
            assert vectors == [TABLE[4 + number % 2].tolist()] * 100
        await asyncio.gather(*leaving, return_exceptions=True)
        assert await engine.is_healthy(WITHIN_S)


async def test_only_its_owner_can_connect(folder: Path) -> None:
    one = launch(folder)
    async with running(one):
        assert stat.S_IMODE(one.socket.stat().st_mode) & 0o077 == 0
    assert not one.socket.exists()


# the application by itself
class Slow:
    """In the model's place: each batch waits until it may end."""

    def __init__(self) -> None:
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.batches = 0

    def read(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def embed(self, rows: list[Any]) -> Any:
        self.batches += 1
        self.began.release()
        self.may_end.acquire(timeout=WITHIN_S)
        return np.ones((len(rows), 1), np.float32)


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one:
        yield one


class Caller:
    """One request to the application."""

    def __init__(self, app: App, method: str, path: str, body: bytes = b"", *, parts: int = 1) -> None:
        size = -(-len(body) // parts) or 1
        cut = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        self._sends = [{"type": "http.request", "body": part, "more_body": part is not cut[-1]} for part in cut]
        self._left = asyncio.Event()
        self.status = 0
        self.said = b""
        self.task = asyncio.create_task(app({"type": "http", "method": method, "path": path}, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._sends:
            return self._sends.pop(0)
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.said += message.get("body", b"")


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/v1/embeddings"), ("POST", "/tokenize")])
async def test_it_says_that_it_is_loading(worker: ThreadPoolExecutor, method: str, path: str) -> None:
    caller = Caller(App(worker), method, path, b"{}")
    await caller.task
    assert caller.status == 503
    assert json.loads(caller.said)["error"]["code"] == 503


async def test_it_stops_between_batches_when_nobody_waits_and_is_healthy_meanwhile(worker: ThreadPoolExecutor) -> None:
    app, model = App(worker), Slow()
    app.model = model  # type: ignore[assignment]
    body = json.dumps({"input": [[1]] * (5 * ROWS_MAX)}).encode()
    leaver, stayer = Caller(app, "POST", "/v1/embeddings", body, parts=3), Caller(app, "POST", "/v1/embeddings", b'{"input":[[1]]}')
    await asyncio.to_thread(model.began.acquire)
    health = Caller(app, "GET", "/health")
    await health.task
    assert health.status == 200
    leaver.leave()
    await asyncio.sleep(0)
    model.may_end.release(100)
    await asyncio.gather(leaver.task, stayer.task)
    assert stayer.status == 200
    assert leaver.status != 200
    assert model.batches <= 3, "one of the leaver's was under way, another may have been waiting"


async def test_a_body_over_the_limit_is_refused_before_it_is_all_there(worker: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallow.engines.onnx.BODY_BYTES_MAX", 10)
    caller = Caller(App(worker), "POST", "/v1/embeddings", b"x" * 100, parts=5)
    await caller.task
    assert caller.status == 413
    assert b" 10 bytes" in caller.said


# its life
def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(said: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_a_kill_leaves_nobody_and_a_new_one_takes_the_socket(folder: Path) -> None:
    one = launch(folder)
    process = await one.start()
    engine = HttpEngine(str(one.socket))
    await until_healthy(process, engine)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await until(lambda: all(map(is_gone, family)))
    with pytest.raises(EngineFailed):
        await ask(engine, "/v1/embeddings", {"input": ["north"]})
    engine.close()
    async with running(one) as again:
        assert await embed(again, ["north"]) == ([[0, 1, 0]], 3)


async def test_it_ends_when_it_is_asked_to(folder: Path) -> None:
    one = launch(folder)
    process = await one.start()
    engine = HttpEngine(str(one.socket))
    await until_healthy(process, engine)
    engine.close()
    await children.end(process, within_s=WITHIN_S)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "inputs", "missing"])
async def test_what_cannot_be_loaded_ends_with_a_code(folder: Path, damage: str) -> None:
    if damage == "weights":
        (folder / "m.onnx").write_bytes((folder / "m.onnx").read_bytes()[:100])
    elif damage == "tokenizer":
        (folder / "t.json").write_text("{}")
    elif damage == "inputs":
        write_model(folder / "m.onnx", inputs=("input_ids", "pixel_values"))
    else:
        write_model(folder / "m.onnx", inputs=("attention_mask", "input_ids"), output="")
    process = await launch(folder).start()
    assert await asyncio.wait_for(process.wait(), WITHIN_S) == EXIT_NOT_LOADED


async def test_settings_that_make_no_sense_end_it(folder: Path) -> None:
    process = await launch(folder, threads=0).start()
    assert await asyncio.wait_for(process.wait(), WITHIN_S) == EXIT_BAD_SETTINGS


@pytest.mark.parametrize("changed", ["m.onnx", "t.json"])
async def test_files_that_changed_are_not_loaded(folder: Path, changed: str) -> None:
    one = launch(folder)
    with (folder / changed).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(BadChecksum, match=changed):
        await one.start()


@pytest.mark.parametrize("missing", onnx_process.NEEDED)
def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(MissingExtra, match=r"pip install 'fallow\[onnx\]'"):
        launch(folder)


# batches
@settings(max_examples=150)
@given(st.lists(st.integers(1, 2 * TOKENS_MAX), max_size=200))
def test_batches_hold_every_input_once_within_their_bounds(lengths: list[int]) -> None:
    found = batches(lengths)
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    for batch in found:
        assert 1 <= len(batch) <= ROWS_MAX
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= TOKENS_MAX
    assert [lengths[number] for batch in found for number in batch] == sorted(lengths, reverse=True)

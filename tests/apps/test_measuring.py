"""The self-benchmark against an engine that says how fast it is: what is tried, what is left out, and that nothing stays behind."""

import asyncio
import contextlib
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from fallow.adapters import rapl
from fallow.adapters.clock import SystemClock
from fallow.adapters.measurements import HardwareKey, Measurements
from fallow.apps.node import measuring
from fallow.apps.node.subject import Subject
from fallow.core.sizing import EngineSize
from fallow.model.errors import EngineFailed

pytestmark = pytest.mark.anyio

ENGINE = """
import asyncio, json, os, sys

path, log, said = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
running = 0

async def answer(reader, writer):
    global running
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = [int(line.split(b":")[1]) for line in head.split(b"\\r\\n") if line.lower().startswith(b"content-length")]
    body = json.loads(await reader.readexactly(length[0])) if length else {}
    where = head.split(b" ")[1].decode()
    running += 1
    status, out = 200, {}
    if where != "/health":
        with open(log, "a") as file:
            file.write(json.dumps([where, body]) + "\\n")
        if said.get("silent"):
            await asyncio.sleep(3600)
        await asyncio.sleep(0.02)
        status = said.get("status", 200)
    if where == "/completion":
        streams, words, tokens = running, len(body["prompt"].split()), body["n_predict"]
        total = said["decode"] * min(streams, said.get("grows", 8))
        out = {"timings": {"prompt_n": words, "prompt_ms": 1000 * words / said["prefill"], "predicted_n": tokens,
                           "predicted_ms": 0.001 + 1000 * (tokens - 1) * streams / total}}
        out = {} if said.get("dumb") else out
    elif where in ("/v1/embeddings", "/v1/rerank"):
        texts = body["input"] if "input" in body else body["documents"]
        out = {"data": [], "usage": {"prompt_tokens": 50 * len(texts)}}
    data = json.dumps(out).encode()
    writer.write(b"HTTP/1.1 %d x\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % (status, len(data)) + data)
    await asyncio.sleep(0.02)  # so that streams that began together are seen together
    running -= 1
    writer.close()

async def main():
    if said.get("dies"):
        sys.exit(3)
    async with await asyncio.start_unix_server(answer, path):
        await asyncio.Event().wait()

asyncio.run(main())
"""


class Fake:
    """Engines by how many threads they have, and what they were asked."""

    def __init__(self, folder: Path, engines: Mapping[int, Mapping[str, Any]]) -> None:
        self.folder = folder
        self.engines = engines
        self.started: list[int] = []
        self.processes: list[Process] = []
        (folder / "engine.py").write_text(ENGINE)

    def subject(self, **changes: Any) -> Subject:
        facts: dict[str, Any] = {
            "model": "made-up",
            "work": "text",
            "engine": "llama",
            "digest": "d" * 64,
            "size": EngineSize(threads=1, slots=8, context_tokens=4096, memory_bytes=0),
            "threads": tuple(sorted(self.engines, reverse=True)),
            "weights_bytes": 10**8,
            "kv_bytes_per_token": 1_000,
            "launch": lambda size: Launch(self, size.threads),
        }
        return Subject(**facts | changes)

    def asked(self, threads: int) -> list[tuple[str, dict[str, Any]]]:
        path = self.folder / f"{threads}.log"
        return [tuple(msgspec.json.decode(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def assert_nothing_left(self) -> None:
        assert all(process.returncode is not None for process in self.processes)
        assert not [one for one in psutil.Process().children(recursive=True) if str(self.folder) in " ".join(one.cmdline())]
        assert not list(self.folder.glob("*.sock"))


class Launch:
    """Starts one of them."""

    def __init__(self, fake: Fake, threads: int) -> None:
        self._fake = fake
        self._threads = threads
        self.socket = fake.folder / "e.sock"

    async def start(self) -> Process:
        said = self._fake.engines[self._threads]
        if said.get("missing"):
            raise FileNotFoundError(2, "No such file or directory")
        script, log = self._fake.folder / "engine.py", self._fake.folder / f"{self._threads}.log"
        self._fake.started.append(self._threads)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(script), str(self.socket), str(log), msgspec.json.encode(said).decode(),
            stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._fake.processes.append(process)
        return process

    def clean_up(self) -> None:
        self.socket.unlink(missing_ok=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="fallow-") as name:
        yield Path(name)


FAST = {"prefill": 500.0, "decode": 50.0}


async def test_a_model_that_writes(folder: Path) -> None:
    fake = Fake(folder, {4: {"prefill": 500.0, "decode": 40.0}, 2: {"prefill": 300.0, "decode": 30.0}, 1: FAST})
    found = await measuring.measure(fake.subject(), SystemClock(), memory_bytes_per_s=10**10)
    fake.assert_nothing_left()
    assert fake.started == [4, 2], "two threads were slower than four, so one wasn't tried"
    assert found.choice.threads == 4
    assert found.choice.batch_tokens == 128
    assert found.is_whole
    assert found.prefill_tokens_per_s == pytest.approx(500)
    assert found.decode_tokens_per_s == pytest.approx(40, rel=0.01)
    assert [streams for streams, _ in found.decode_by_streams] == [1, 2, 4, 8]
    assert [[streams for streams, _ in point.decode_by_streams] for point in found.points] == [[1], [1, 2, 4, 8]]
    assert found.bytes_per_token is not None
    assert found.roofline_share == pytest.approx(found.decode_tokens_per_s * found.bytes_per_token / 10**10)
    assert 10**8 < found.bytes_per_token < 1.1 * 10**8
    assert found.watts is None


async def test_prompts_differ_and_no_cache_is_used(folder: Path) -> None:
    fake = Fake(folder, {1: FAST})
    await measuring.measure(fake.subject(), SystemClock())
    asked = [body for _, body in fake.asked(1)]
    assert all(body["cache_prompt"] is False and body["ignore_eos"] is True for body in asked)
    prefill = max(len(body["prompt"].split()) for body in asked)
    assert 128 <= prefill <= 256
    streams = [body["prompt"] for body in asked[-8:]]
    assert len(set(streams)) == 8
    assert {body["n_predict"] for body in asked[-8:]} <= set(range(16, 33))


async def test_thorough_tries_everything(folder: Path) -> None:
    fake = Fake(
        folder, {4: {"prefill": 500.0, "decode": 40.0}, 2: {"prefill": 300.0, "decode": 30.0}, 1: {"prefill": 90.0, "decode": 20.0}}
    )
    found = await measuring.measure(fake.subject(), SystemClock(), thorough=True)
    assert [point.threads for point in found.points] == [1, 2, 4]
    assert all([streams for streams, _ in point.decode_by_streams] == [1, 2, 4, 8] for point in found.points)
    assert found.choice.threads == 4


async def test_no_more_streams_than_fit(folder: Path) -> None:
    fake = Fake(folder, {1: FAST})
    size = EngineSize(threads=1, slots=3, context_tokens=2048, memory_bytes=0)
    found = await measuring.measure(fake.subject(size=size), SystemClock())
    assert [streams for streams, _ in found.decode_by_streams] == [1, 2]
    assert found.choice.slots == 2


async def test_a_slow_model_gets_fewer_points(folder: Path) -> None:
    fake = Fake(folder, {1: {"prefill": 3.0, "decode": 1.0, "grows": 1}})
    found = await measuring.measure(fake.subject(), SystemClock())
    assert not found.is_whole
    assert [streams for streams, _ in found.decode_by_streams] == [1]
    asked = [body for _, body in fake.asked(1)]
    assert max(len(body["prompt"].split()) for body in asked) <= 3 * measuring.STEP_S
    assert max(body["n_predict"] for body in asked) <= 1 * measuring.STEP_S
    assert found.choice.slots == 1
    assert found.choice.batch_tokens == 8, "as few as an engine takes: the prompt crawls"


async def test_no_new_threads_without_time_for_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BUDGET_S", measuring.STEP_S)
    fake = Fake(folder, {2: FAST, 1: FAST})
    found = await measuring.measure(fake.subject(), SystemClock())
    assert (fake.started, found.choice.threads, found.is_whole) == ([2], 2, False)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        pytest.param({"dies": True}, "ended with code 3", id="dies while it loads"),
        pytest.param({"missing": True}, "could not be started: No such file", id="isn't there"),
        pytest.param({**FAST, "status": 500}, "status 500", id="refuses"),
        pytest.param({**FAST, "dumb": True}, "can't be read", id="tells no timings"),
        pytest.param({**FAST, "silent": True}, "wrote nothing within", id="says nothing"),
    ],
)
async def test_an_engine_that_can_not_be_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], why: str) -> None:
    monkeypatch.setattr(measuring, "STEP_S_MAX", 0.3)
    fake = Fake(folder, {2: said, 1: FAST})
    with pytest.raises(EngineFailed, match=why):
        await measuring.measure(fake.subject(), SystemClock())
    fake.assert_nothing_left()


async def test_one_engine_that_fails_leaves_what_was_seen(folder: Path) -> None:
    fake = Fake(folder, {2: FAST, 1: {"dies": True}})
    found = await measuring.measure(fake.subject(), SystemClock())
    assert (found.choice.threads, found.is_whole) == (2, False)
    fake.assert_nothing_left()


async def test_an_engine_that_never_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LOAD_S", 0.0)
    fake = Fake(folder, {1: FAST})
    with pytest.raises(EngineFailed, match="not ready within"):
        await measuring.measure(fake.subject(), SystemClock())
    fake.assert_nothing_left()


async def test_being_cancelled_ends_the_engine(folder: Path) -> None:
    fake = Fake(folder, {1: {**FAST, "silent": True}})
    task = asyncio.create_task(measuring.measure(fake.subject(), SystemClock()))
    until = time.monotonic() + 20
    while not fake.asked(1):
        assert time.monotonic() < until, "the engine was never asked"
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fake.assert_nothing_left()


@pytest.mark.parametrize(("work", "path"), [("embeddings", "/v1/embeddings"), ("rerank", "/v1/rerank")])
async def test_a_model_that_embeds_or_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch, work: str, path: str) -> None:
    monkeypatch.setattr(measuring, "TEXTS_S", 0.05)
    fake = Fake(folder, {1: {}})
    found = await measuring.measure(fake.subject(work=work), SystemClock(), memory_bytes_per_s=10**10)
    fake.assert_nothing_left()
    assert {where for where, _ in fake.asked(1)} == {path}
    rates = dict(found.texts_by_batch)
    assert set(rates) == {1, 8}
    assert found.prefill_tokens_per_s == pytest.approx(50 * rates[1])
    assert (found.decode_tokens_per_s, found.decode_by_streams, found.roofline_share) == (0.0, (), None)
    assert found.choice.slots == 8, "they are a queue"


async def test_the_processors_meter_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "IDLE_S", 0.01)
    zone = folder / "intel-rapl:0"
    zone.mkdir()
    for name, value in {"energy_uj": 5, "max_energy_range_uj": 10**12}.items():
        (zone / name).write_text(str(value))
    meter = rapl.open_meter(folder)
    assert meter is not None
    fake = Fake(folder, {1: FAST})
    resting = await measuring.measure(fake.subject(), SystemClock(), meter=meter)
    assert resting.watts == 0.0
    burning = asyncio.create_task(burn(zone / "energy_uj", fake))
    working = await measuring.measure(fake.subject(), SystemClock(), meter=meter)
    burning.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await burning
    assert working.watts is not None
    assert working.watts > 0.0


async def burn(path: Path, fake: Fake) -> None:
    """The counter goes up as soon as the second engine is there."""
    used = 5
    while True:
        used += 10_000 * (len(fake.started) > 1)
        written = path.with_name("new")
        written.write_text(str(used))
        written.replace(path)
        await asyncio.sleep(0.01)


async def test_it_is_measured_once_and_again_when_asked(folder: Path) -> None:
    key = HardwareKey(isa="x86_64-avx2", cores=1, memory_gib=8, cpu="")
    cache = Measurements(folder / "models")
    cache.keep_bandwidth(key, 10**10, at_ms=1)
    fake = Fake(folder, {1: FAST})
    first = await measuring.known_or_measured(fake.subject(), cache, key, SystemClock())
    assert first.memory_bytes_per_s == 10**10
    assert await measuring.known_or_measured(fake.subject(), cache, key, SystemClock()) == first
    assert fake.started == [1]
    await measuring.known_or_measured(fake.subject(digest="e" * 64), cache, key, SystemClock())
    assert fake.started == [1, 1]
    await measuring.known_or_measured(fake.subject(), cache, key, SystemClock(), again=True)
    assert fake.started == [1, 1, 1]


async def test_what_failed_is_not_remembered(folder: Path) -> None:
    key = HardwareKey(isa="x86_64-avx2", cores=1, memory_gib=8, cpu="")
    cache = Measurements(folder / "models")
    cache.keep_bandwidth(key, 10**10, at_ms=1)
    fake = Fake(folder, {1: {"dies": True}})
    for _ in range(2):
        with pytest.raises(EngineFailed):
            await measuring.known_or_measured(fake.subject(), cache, key, SystemClock())
    assert fake.started == [1, 1]

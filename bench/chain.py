"""The whole chain in front of an engine, as the processes that users run: hub with its broker, gateway, node."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil

from bench.children import running_stub
from fallow.adapters import children
from fallow.adapters.engine_process import socket_path
from fallow.apps.settings import load
from fallow.apps.up import Part, start_part, until_ready

SLOTS = 128
LOOPBACK = "127.0.0.1:0"


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A running chain. `base_url` is without `/v1`; `engine` is what to call to leave the chain out."""

    base_url: str
    key: str
    model: str
    engine: str
    pids: dict[str, int]

    def memory_mib(self, role: str) -> float:
        """Resident memory of one of its processes."""
        return float(psutil.Process(self.pids[role]).memory_info().rss / 2**20)

    def cpu_s(self) -> float:
        """CPU seconds that all its processes, and their children, have used."""
        total = 0.0
        for pid in self.pids.values():
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextlib.asynccontextmanager
async def running_chain() -> AsyncIterator[Chain]:
    """A chain in front of the stub engine, on a Unix socket as a real engine is."""
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        async with running_stub(Path(folder) / "stub.sock") as engine:
            flags = ["--engine", f"unix:{engine}", "--slots", str(SLOTS)]
            async with running_parts(Path(folder) / "data", flags, model="stub", engine=engine) as chain:
                yield chain


@contextlib.asynccontextmanager
async def running_model(model: str) -> AsyncIterator[Chain]:
    """A chain in front of a real model; `engine` is its llama.cpp server."""
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        data = Path(folder) / "d"
        async with running_parts(data, ["--model", model], model=model, engine=str(socket_path(data / "engines", "e1"))) as chain:
            yield chain


@contextlib.asynccontextmanager
async def running_parts(data: Path, lend: list[str], *, model: str, engine: str, profile: str = "dedicated") -> AsyncIterator[Chain]:
    """Each part as `fallow up` starts it. A bench's own work would stop a node of another profile."""
    settings = load(data)
    parts: list[Part] = []
    try:
        parts.append(await start_part(settings, "hub", ["--listen", LOOPBACK]))
        hub = ["--hub", await parts[0].address()]
        parts.append(await start_part(settings, "gateway", [*hub, "--port", "0"]))
        parts.append(await start_part(settings, "lend", [*hub, "--profile", profile, *lend]))
        base_url, _ = await asyncio.gather(parts[1].address(), parts[2].address())
        await until_ready(base_url)
        pids = {part.role: part.process.pid for part in parts}
        key = (settings.data / "key").read_text().strip()
        yield Chain(base_url=base_url.removesuffix("/v1"), key=key, model=model, engine=engine, pids=pids)
    finally:
        await asyncio.gather(*(children.end(part.process) for part in parts))

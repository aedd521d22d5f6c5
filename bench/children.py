"""Starts the processes that a bench needs beside itself and stops each of them again, by its own id."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
READY_S = 15.0
STOP_S = 10.0


@contextlib.asynccontextmanager
async def running(
    *argv: str | Path,
    output: int | IO[bytes],
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    talks: bool = False,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a child for as long as the block lasts; one that ignores the request to stop is killed."""
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE if talks else asyncio.subprocess.DEVNULL,
        stdout=output,
        env=None if environment is None else dict(environment),
        cwd=folder,
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await child.wait()
            except TimeoutError:
                child.kill()
                await child.wait()


@contextlib.asynccontextmanager
async def running_stub(socket_path: Path | None = None) -> AsyncIterator[str]:
    """Run the stub engine and say where it listens: a base URL, or the path of its socket."""
    where = () if socket_path is None else ("--socket", str(socket_path))
    async with running(sys.executable, "-m", "bench.stub_engine", *where, output=asyncio.subprocess.PIPE) as child:
        assert child.stdout is not None
        async with asyncio.timeout(READY_S):
            line = (await child.stdout.readline()).decode().strip()
        word, _, address = line.partition(" ")
        if word != "ready":
            raise RuntimeError(f"the stub engine did not start: {line!r}")
        yield address

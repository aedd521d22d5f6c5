"""Starts the llama engine's process for one model."""

import asyncio
import hashlib
import importlib.util
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

import msgspec

from fallow.adapters import children
from fallow.core.sizing import EngineSize
from fallow.model.errors import BadChecksum, MissingExtra

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # else the threads spin, and take the owner's cores while they wait
    "GGML_NO_BACKTRACE": "1",  # else a failed assertion starts a debugger and hangs
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
}
SOCKET_PATH_MAX = 100
"""A Unix socket's path has 108 bytes on Linux and 104 on macOS."""


class LlamaProcess:
    """How to start an engine for these weights, as often as needed; `pooling` is for models that embed.

    The socket is `folder/NAME.sock`.
    """

    def __init__(
        self, *, weights: Path, weights_sha256: str, model: str, size: EngineSize, folder: Path, name: str, pooling: str = ""
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingExtra("the llama engine is not installed; run `pip install 'fallow[llama]'`")
        self.socket = folder / f"{name}.sock"
        assert len(str(self.socket)) <= SOCKET_PATH_MAX, "the caller chose a folder with a short path"
        self._settings = {
            "weights": str(weights),
            "model": model,
            "socket": str(self.socket),
            "threads": size.threads,
            "slots": size.slots,
            "context_tokens": size.context_tokens,
            "batch_tokens": size.batch_tokens,
            "pooling": pooling,
        }
        self.weights = weights
        self.weights_sha256 = weights_sha256

    async def start(self) -> Process:
        """A new process that begins to load. It says nothing anywhere: what engines print may hold prompts and paths.

        Raises BadChecksum if the weights changed on disk: llama.cpp loads many damaged files and writes nonsense.
        """
        if await asyncio.to_thread(_digest, self.weights) != self.weights_sha256:
            raise BadChecksum(f"{self.weights.name} changed on disk; run `fallow models pull` again")
        self.socket.unlink(missing_ok=True)
        process = await children.spawn(
            [sys.executable, "-m", "fallow.engines.llama"],
            environment=ENVIRONMENT,
            death_signal=signal.SIGKILL,
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(self._settings) + b"\n")
            await process.stdin.drain()
            process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead already; whoever waits for it will see that
        except asyncio.CancelledError:
            await children.kill(process)
            raise
        return process

    def clean_up(self) -> None:
        """Remove the socket."""
        self.socket.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

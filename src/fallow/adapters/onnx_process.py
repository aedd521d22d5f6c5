"""Starts the ONNX engine's process for one embedding model."""

import asyncio
import hashlib
import importlib.util
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Literal

import msgspec

from fallow.adapters import children
from fallow.model.errors import BadChecksum, MissingExtra

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # else the threads spin, and take the owner's cores while they wait
    "OMP_NUM_THREADS": "1",  # ONNX Runtime has threads of its own; these two are numpy's
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else it takes every core
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
}
NEEDED = ("onnxruntime", "tokenizers")
SOCKET_PATH_MAX = 100
"""A Unix socket's path has 108 bytes on Linux and 104 on macOS."""
Pooling = Literal["mean", "cls"]


class OnnxProcess:
    """How to start an engine for this model, as often as needed. The socket is `folder/NAME.sock`."""

    def __init__(
        self,
        *,
        weights: Path,
        weights_sha256: str,
        tokenizer: Path,
        tokenizer_sha256: str,
        name: str,
        threads: int,
        pooling: Pooling,
        context_tokens: int,
        folder: Path,
        normalise: bool = True,
    ) -> None:
        if any(importlib.util.find_spec(module) is None for module in NEEDED):
            raise MissingExtra("the ONNX engine is not installed; run `pip install 'fallow[onnx]'`")
        self.socket = folder / f"{name}.sock"
        assert len(str(self.socket)) <= SOCKET_PATH_MAX, "the caller chose a folder with a short path"
        self._digests = {weights: weights_sha256, tokenizer: tokenizer_sha256}
        self._settings = {
            "weights": str(weights),
            "tokenizer": str(tokenizer),
            "socket": str(self.socket),
            "threads": threads,
            "context_tokens": context_tokens,
            "pooling": pooling,
            "normalise": normalise,
        }

    async def start(self) -> Process:
        """A new process that begins to load. It says nothing anywhere: what engines print may hold prompts and paths.

        Raises BadChecksum if the model or its tokenizer changed on disk, and OSError if one can't be read.
        """
        for path, sha256 in self._digests.items():
            if await asyncio.to_thread(_digest, path) != sha256:
                raise BadChecksum(f"{path.name} changed on disk; run `fallow models pull` again")
        self.socket.unlink(missing_ok=True)
        process = await children.spawn(
            [sys.executable, "-m", "fallow.engines.onnx"],
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

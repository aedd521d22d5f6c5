"""Starts an engine's process: its files checked, its settings on standard input, its answers on a Unix socket."""

import asyncio
import importlib.util
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters import children
from fallow.adapters.store import hash_file
from fallow.model.errors import BadChecksum, MissingExtra

SOCKET_PATH_MAX = 100
"""A Unix socket's path has 108 bytes on Linux and 104 on macOS."""
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # else the threads spin, and take the owner's cores while they wait
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
}


class EngineProcess:
    """How to start an engine, as often as needed. The socket is `folder/NAME.sock`; `files` are checked before each start."""

    def __init__(
        self,
        *,
        module: str,
        environment: Mapping[str, str],
        settings: Mapping[str, Any],
        files: Mapping[Path, str],
        folder: Path,
        name: str,
    ) -> None:
        self.socket = folder / f"{name}.sock"
        assert len(str(self.socket)) <= SOCKET_PATH_MAX, "the caller chose a folder with a short path"
        self._module = module
        self._environment = {**ENVIRONMENT, **environment}
        self._settings = {**settings, "socket": str(self.socket)}
        self._files = dict(files)

    async def start(self) -> Process:
        """A new process that begins to load. It says nothing anywhere: what engines print may hold prompts and paths.

        Raises BadChecksum if a file changed on disk (engines load many damaged ones and write nonsense), and OSError if one can't be read.
        """
        for path, sha256 in self._files.items():
            if await asyncio.to_thread(hash_file, path) != sha256:
                raise BadChecksum(f"{path.name} changed on disk; run `fallow models pull` again")
        self.socket.unlink(missing_ok=True)
        process = await children.spawn(
            [sys.executable, "-m", self._module],
            environment=self._environment,
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


def need(modules: Collection[str], why: str) -> None:
    """Raise MissingExtra unless all these modules are installed."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise MissingExtra(why)

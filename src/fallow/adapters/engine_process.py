"""Starts an engine's process in its jail: its files checked, its settings on standard input, its answers on a Unix socket."""

import asyncio
import contextlib
import functools
import importlib.util
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters import children
from fallow.adapters.cgroup import Cgroups
from fallow.adapters.jail import PYTHON_ENVIRONMENT, Jail
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
    """How to start an engine, as often as needed. The socket lies in a folder of its own, since that is all the engine may write to.

    `files`, all that the engine may read besides programs, are checked before each start. `memory_bytes` is what it is expected to take.
    """

    def __init__(
        self,
        *,
        module: str,
        environment: Mapping[str, str],
        settings: Mapping[str, Any],
        files: Mapping[Path, str],
        folder: Path,
        name: str,
        memory_bytes: int,
        jail: Jail,
        cgroups: Cgroups,
    ) -> None:
        self.socket = socket_path(folder, name)
        assert len(str(self.socket)) <= SOCKET_PATH_MAX, "the caller chose a folder with a short path"
        self._module = module
        self._environment = {**ENVIRONMENT, **PYTHON_ENVIRONMENT, **environment}
        self.settings = {**settings, "socket": str(self.socket)}
        self._files = dict(files)
        self._name = name
        self._memory_bytes = memory_bytes
        self._jail = jail
        self._cgroups = cgroups

    async def start(self) -> Process:
        """A new process that begins to load. It says nothing anywhere: what engines print may hold prompts and paths.

        Raises BadChecksum if a file changed on disk (engines load many damaged ones and write nonsense), and OSError if one can't be read.
        """
        for path, sha256 in self._files.items():
            if await asyncio.get_running_loop().run_in_executor(_idle_thread(), hash_file, path) != sha256:
                raise BadChecksum(f"{path.name} changed on disk; run `fallow models pull` again")
        self.clean_up()
        await asyncio.to_thread(self._cgroups.make, self._name, memory_bytes=self._memory_bytes)
        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        files, socket_folder = [str(path) for path in self._files], str(self.socket.parent)
        told = await asyncio.to_thread(self._jail.confinement, files=files, socket_folder=socket_folder, memory_bytes=self._memory_bytes)
        process = await children.spawn(
            self._jail.command(self._module, environment=self._environment, files=files, socket_folder=socket_folder),
            environment=self._environment,
            death_signal=signal.SIGKILL,
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=DEVNULL,
            cgroup=self._cgroups.entrance(self._name),
        )
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join(msgspec.json.encode(one) + b"\n" for one in (told, self.settings)))
            await process.stdin.drain()
            process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead already; whoever waits for it will see that
        except asyncio.CancelledError:
            await children.kill(process)
            raise
        return process

    def clean_up(self) -> None:
        """Remove the socket and its folder, and the control group, of an engine that has ended."""
        self.socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.socket.parent.rmdir()
        self._cgroups.remove(self._name)


def _give_way() -> None:
    """For a thread that reads gigabytes while an owner may be at work. An ordinary user's can't be raised again."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@functools.cache
def _idle_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="idle", initializer=_give_way)


def socket_path(folder: Path, name: str) -> Path:
    """Where an engine's socket is. llama.cpp takes a path for a socket's if it ends like this."""
    return folder / name / "e.sock"


def need(modules: Collection[str], why: str) -> None:
    """Raise MissingExtra unless all these modules are installed."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise MissingExtra(why)

"""Child processes that die with us."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

from fallow.adapters import tether

TERM_S = 1.5
"""How long a child may take to end by itself before it is killed."""


async def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
    stdin: int = DEVNULL,
    stdout: int | None = DEVNULL,
    stderr: int | None = DEVNULL,
    pass_fds: Sequence[int] = (),
    cgroup: Path | None = None,
) -> Process:
    """Start a command in a session of its own (Ctrl-C reaches only us) that gets `death_signal` when we die.

    It, and all that it starts, is in the control group whose `cgroup.procs` file is given.
    """
    where = [] if cgroup is None else [str(cgroup)]
    tethered = [sys.executable, "-I", "-S", str(Path(tether.__file__)), str(os.getpid()), str(int(death_signal)), *where, "--", *command]
    return await asyncio.create_subprocess_exec(
        *tethered,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )


async def end(process: Process, *, within_s: float = TERM_S) -> None:
    """Ask a child to end, and kill it if it doesn't."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)  # one that is stopped can't hear
        process.terminate()
    try:
        async with asyncio.timeout(within_s):
            await process.wait()
    except TimeoutError:
        await kill(process)


async def kill(process: Process) -> None:
    """End a child and what it started at once: each child has a session of its own, and so a group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

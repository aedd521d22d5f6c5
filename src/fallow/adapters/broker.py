"""The broker: a nats-server found or shipped, run as a child process."""

import asyncio
import os
import re
import shutil
import subprocess
import sysconfig
from asyncio.subprocess import Process
from pathlib import Path

import msgspec

from fallow.adapters import children
from fallow.adapters.files import write_private
from fallow.model.errors import MissingExtra, StartFailed

VERSION_MIN = (2, 15, 1)
"""Earlier ones lack security fixes (reference: the project's ADR 1)."""
VERSION_S = 5
START_S = 8.0
POLL_S = 0.02
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")

CONFIG = """\
server_name: "{name}"
listen: "{host}:{port}"
authorization {{ token: "{secret}", timeout: 2 }}
ports_file_dir: "{folder}"
max_payload: 256KB
max_control_line: 4KB
max_pending: 8MB
write_deadline: "2s"
ping_interval: "10s"
ping_max: 2
max_connections: 20000
lame_duck_grace_period: "0s"
lame_duck_duration: "30s"
"""


class _Ports(msgspec.Struct, frozen=True):
    nats: list[str]


class Broker:
    """A running nats-server and where it listens (`nats://host:port`)."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self.address = address

    async def wait(self) -> int:
        """Until it ends; returns the exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        await children.end(self._process)


def find_server() -> Path:
    """The nats-server on the PATH if it is new enough, else the packaged one; raises MissingExtra."""
    packaged = Path(sysconfig.get_path("scripts")) / "nats-server"
    on_path = shutil.which("nats-server")
    too_old = ""
    for path in [Path(on_path)] if on_path else [], [packaged]:
        for candidate in path:
            version = version_of(candidate)
            if version is not None and version >= VERSION_MIN:
                return candidate
            if version is not None:
                too_old = f" ({candidate} is {'.'.join(map(str, version))})"
    wanted = ".".join(map(str, VERSION_MIN))
    raise MissingExtra(f"no nats-server {wanted} or newer{too_old}; run `pip install 'fallow[hub]'` or name a broker with --broker")


def version_of(path: Path) -> tuple[int, ...] | None:
    """What `nats-server --version` says, or None if it isn't one."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=VERSION_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(said)
    return tuple(int(part) for part in found.groups()) if found else None


async def start_broker(folder: Path, *, host: str, port: int, secret: str) -> Broker:
    """Start a broker on `host:port` (0: any free port); raises StartFailed in one line."""
    server = await asyncio.to_thread(find_server)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in folder.glob("*.ports"):
        stale.unlink()
    config = folder / "broker.conf"
    write_private(config, CONFIG.format(name="fallow", host=host, port=port or -1, secret=_quoted(secret), folder=_quoted(str(folder))))
    log = os.open(folder / "broker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = await children.spawn([str(server), "-c", str(config)], stdout=log, stderr=log)
    finally:
        os.close(log)
    try:
        async with asyncio.timeout(START_S):
            return Broker(process, await _listening(process, folder))
    except asyncio.CancelledError:
        await asyncio.shield(children.kill(process))
        raise
    except TimeoutError:
        await children.kill(process)
        raise StartFailed(f"the broker did not start within {START_S:g} s; see {folder / 'broker.log'}") from None


def _quoted(text: str) -> str:
    """A text inside quotes of the broker's configuration."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


async def _listening(process: Process, folder: Path) -> str:
    while process.returncode is None:
        for path in folder.glob("*.ports"):
            try:
                return msgspec.json.decode(path.read_bytes(), type=_Ports).nats[0]
            except (msgspec.DecodeError, IndexError):
                pass  # it is still being written
        await asyncio.sleep(POLL_S)
    lines = (folder / "broker.log").read_text(errors="replace").splitlines()
    why = next((line.split("] ", 1)[-1].removeprefix("[FTL] ") for line in reversed(lines) if "[FTL]" in line), "see broker.log")
    raise StartFailed(f"the broker ended at once: {why}")

"""The broker: a nats-server found or shipped, run as a child process."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
from asyncio.subprocess import Process
from ipaddress import ip_address
from pathlib import Path

import msgspec

from fallow.adapters import children
from fallow.adapters.certificates import TlsFiles
from fallow.adapters.files import write_private
from fallow.adapters.operator import BrokerTrust
from fallow.model.errors import MissingExtra, StartFailed

VERSION_MIN = (2, 15, 1)
"""Earlier ones lack security fixes (reference: the project's ADR 1)."""
VERSION_S = 5
START_S = 8.0
POLL_S = 0.02
LOG_BYTES_MAX = 16 * 2**20
"""Of one log file; then the next begins. Each refusal is a line, and who is let in can cause a hundred thousand a second."""
LOG_FILES_MAX = 2
"""Log files beside the one that is written; the oldest are deleted."""
_VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")

CONFIG = """\
server_name: "fallow"
listen: "{listen}"
{operator}
{more}
ports_file_dir: "{folder}"
log_file: "{folder}/broker.log"
logfile_size_limit: {log_bytes_max}
logfile_max_num: {log_files_max}
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
TLS = 'tls {{ cert_file: "{certificate}", key_file: "{key}", min_version: "1.3", timeout: 5{first} }}'
FIRST = ', handshake_first: "300ms"'
"""Our clients begin with TLS at once; others hear the broker's greeting after this and may then begin."""
WEBSOCKET = 'websocket {{ listen: "{listen}", {tls}, compression: false, handshake_timeout: "2s" }}'
OPERATOR = """\
operator: "{operator}"
system_account: "{system}"
resolver {{ type: full, dir: "{accounts}", allow_delete: false, interval: "2m" }}"""
"""Accounts are JWTs in a folder of the broker's. They change while it runs when the system account sends newer ones."""


class _Ports(msgspec.Struct, frozen=True):
    nats: list[str]
    websocket: list[str] = []


class Broker:
    """A running nats-server and where it listens: `nats://host:port` (`tls://` with TLS), and `ws://` or `wss://` if it does."""

    def __init__(self, process: Process, address: str, websocket_address: str = "") -> None:
        self._process = process
        self.address = address
        self.websocket_address = websocket_address

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


async def start_broker(
    folder: Path,
    *,
    host: str,
    port: int,
    trust: BrokerTrust,
    tls: TlsFiles | None = None,
    websocket_port: int | None = None,
    plain_ok: bool = False,
) -> Broker:
    """Start a broker on `host:port` (0: any free port); raises StartFailed in one line.

    It lets in whom `trust` does. A WebSocket listener is there if its port is given (0: any free one).
    Without `tls` it listens on this machine only, unless `plain_ok`: what is said would be open to everyone between.
    """
    if tls is None and not plain_ok and not _is_loopback(host):
        raise StartFailed(
            f"the broker doesn't listen on {host} without TLS, where others could read along; "
            "give it a certificate and its key, or have them made (`fallow hub init`), or listen on 127.0.0.1"
        )
    server = await asyncio.to_thread(find_server)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in folder.glob("*.ports"):
        stale.unlink()
    config = folder / "broker.conf"
    operator = await asyncio.to_thread(_trusting, folder, trust)
    more = _encryption(tls, host, websocket_port)
    text = CONFIG.format(
        listen=_joined(host, port),
        operator=operator,
        more=more,
        folder=_quoted(str(folder)),
        log_bytes_max=LOG_BYTES_MAX,
        log_files_max=LOG_FILES_MAX,
    )
    write_private(config, text)
    log = os.open(folder / "broker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = await children.spawn([str(server), "-c", str(config)], stdout=log, stderr=log)
    finally:
        os.close(log)
    try:
        async with asyncio.timeout(START_S):
            ports = await _listening(process, folder, with_websocket=websocket_port is not None)
    except asyncio.CancelledError:
        await asyncio.shield(children.kill(process))
        raise
    except TimeoutError:
        await children.kill(process)
        raise StartFailed(f"the broker did not start within {START_S:g} s; see {folder / 'broker.log'}") from None
    return Broker(process, _address(ports.nats[0], host), _address(ports.websocket[0], host) if ports.websocket else "")


def _trusting(folder: Path, trust: BrokerTrust) -> str:
    """The configuration's lines for these accounts, whose JWTs are put where the broker looks for them."""
    accounts = folder / "accounts"
    accounts.mkdir(mode=0o700, exist_ok=True)
    for public, text in trust.accounts.items():
        write_private(accounts / f"{public}.jwt", text)
    return OPERATOR.format(operator=trust.operator, system=trust.system_account, accounts=_quoted(str(accounts)))


def _encryption(tls: TlsFiles | None, host: str, websocket_port: int | None) -> str:
    """The configuration's lines for TLS and the WebSocket listener."""
    lines = []
    if tls is not None:
        lines.append(_tls(tls, FIRST))
    if websocket_port is not None:
        inner = "no_tls: true" if tls is None else _tls(tls, "")
        lines.append(WEBSOCKET.format(listen=_joined(host, websocket_port), tls=inner))
    return "\n".join(lines)


def _tls(files: TlsFiles, first: str) -> str:
    return TLS.format(certificate=_quoted(str(files.certificate)), key=_quoted(str(files.key)), first=first)


def _joined(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port or -1}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _address(told: str, host: str) -> str:
    """Where to find it from this machine: a broker that listens everywhere tells the addresses of all its networks."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104  (compared with, not bound to)
        return told
    scheme, _, rest = told.partition("://")
    return f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else '[::1]'}:{rest.rpartition(':')[2]}"  # noqa: S104


def _quoted(text: str) -> str:
    """A text inside quotes of the broker's configuration."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


async def _listening(process: Process, folder: Path, *, with_websocket: bool) -> _Ports:
    while process.returncode is None:
        for path in folder.glob("*.ports"):
            with contextlib.suppress(msgspec.DecodeError):  # it is still being written
                ports = msgspec.json.decode(path.read_bytes(), type=_Ports)
                if ports.nats and (ports.websocket or not with_websocket):
                    return ports
        await asyncio.sleep(POLL_S)
    lines = (folder / "broker.log").read_text(errors="replace").splitlines()
    why = next((line.split("] ", 1)[-1].removeprefix("[FTL] ") for line in reversed(lines) if "[FTL]" in line), "see broker.log")
    raise StartFailed(f"the broker ended at once: {why}")

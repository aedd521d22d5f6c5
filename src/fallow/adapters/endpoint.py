"""Where a server that the lender brings is found, and the key that opens it."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import msgspec

from fallow.model.errors import BadFlag, BadSetting, shortened

EXPECTED = "--engine: expected http://localhost:11434/v1, https://host/api/v1 or unix:/path/of.sock"
VERSION = "/v1"
PORTS = {"http": 80, "https": 443}
KEY_BYTES_MAX = 4_096
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
_BASE = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*")
_KEY = re.compile(r"[!-~]+")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP server: either the absolute path of a Unix `socket`, or `host` (a name or a bare IP address) and `port`.

    `base` is what stands before `/v1` in its paths: empty, or such as `/api`.
    """

    socket: str = ""
    host: str = ""
    port: int = 0
    base: str = ""
    is_tls: bool = False

    @property
    def address(self) -> str:
        """As the engine's client takes it."""
        return self.socket or f"{self.host}:{self.port}"

    @property
    def host_header(self) -> str:
        """The value of `Host`; the port is left out where it is the scheme's own."""
        name = f"[{self.host}]" if ":" in self.host else self.host or "localhost"
        return name if self.socket or self.port == PORTS["https" if self.is_tls else "http"] else f"{name}:{self.port}"

    @property
    def is_here(self) -> bool:
        """Whether the server runs on this machine."""
        if self.socket or self.host.lower() == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_endpoint(address: str) -> Endpoint:
    """`http(s)://host[:port][/base][/v1]` or `unix:/path`; raises BadFlag, whose text never repeats what may be a secret."""
    if not address.isascii() or not address.isprintable() or " " in address:
        raise BadFlag(f"{EXPECTED}; it may hold printable ASCII only")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path.startswith("/") or path.startswith("//"):
            raise BadFlag(f"{EXPECTED}; a socket's path begins with one slash")
        return Endpoint(socket=path)
    if "@" in address:
        raise BadFlag(f"{EXPECTED}; put the key into a file and name it in the settings (engine.key_file), not into the address")
    if "?" in address or "#" in address:
        raise BadFlag(f"{EXPECTED}; the address ends with its path")
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise BadFlag(f"{EXPECTED}, got {shortened(address)!r}") from None
    return _of_parts(parts, port, address)


def _of_parts(parts: SplitResult, port: int | None, address: str) -> Endpoint:
    host = parts.hostname or ""
    base = parts.path.rstrip("/").removesuffix(VERSION)
    known = parts.scheme in PORTS and port != 0 and (_HOST.fullmatch(host) or _is_ipv6(host))
    if not known or not _BASE.fullmatch(base):
        raise BadFlag(f"{EXPECTED}, got {shortened(address)!r}")
    if base and not parts.path.rstrip("/").endswith(VERSION):
        raise BadFlag(f"{EXPECTED}; a path ends with /v1, got {shortened(address)!r}")
    return Endpoint(host=host, port=PORTS[parts.scheme] if port is None else port, base=base, is_tls=parts.scheme == "https")


def _is_ipv6(host: str) -> bool:
    try:
        return ip_address(host).version == 6 and "%" not in host
    except ValueError:
        return False


def read_key(path: Path) -> str:
    """A server's key from a file that nobody else may read; raises BadSetting, whose text never holds what is in the file."""
    where = f"engine.key_file: {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(KEY_BYTES_MAX + 1)
    except OSError as error:
        raise BadSetting(f"{where} can't be read: {error.strerror}") from None
    if mode & 0o077:
        raise BadSetting(f"{where} can be read by others (mode {mode & 0o777:o}); run: chmod 600 {path}")
    key = data.decode("latin-1").strip()
    if len(data) > KEY_BYTES_MAX or not _KEY.fullmatch(key):
        raise BadSetting(f"{where} should hold one key: printable ASCII without spaces, at most {KEY_BYTES_MAX} bytes")
    return key

"""Web addresses: which of them nobody can listen to, and whose they are."""

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_private(url: str) -> bool:
    """Whether nobody between can read or change what comes from there: https, or this machine itself."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return bool(host) and (
            parts.scheme == "https" or (parts.scheme == "http" and (host == "localhost" or ip_address(host).is_loopback))
        )
    except ValueError:
        return False


def host_of(url: str) -> str:
    """The server's name, without what else an address may hold."""
    return urlsplit(url).hostname or "the server"

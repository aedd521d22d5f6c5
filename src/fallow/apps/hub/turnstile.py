"""How many guests the hub's desk listens to: so many from one host, so many in all. It keeps guesses at words few and cheap."""

import ipaddress
from collections import OrderedDict, deque

import msgspec

HOSTS_MAX = 10_000
"""Hosts of which something is remembered; the one that was quiet longest is forgotten."""
MINUTE_MS = 60_000
SECOND_MS = 1_000
IPV6_SITE_BITS = 64
"""Who has one IPv6 address has as many as this prefix leaves, so a site counts as one host."""


class JoinLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Tries and refusals that one host may have within a minute, and tries of all hosts within a second."""

    tries_per_minute: int = 30
    failures_per_minute: int = 10
    tries_per_second: int = 200


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Not now: why, and when it is worth another try."""

    reason: str
    ms: int


class _Host:
    """When its last tries and refusals were."""

    def __init__(self, limits: JoinLimits) -> None:
        self.tries: deque[int] = deque(maxlen=limits.tries_per_minute)
        self.failures: deque[int] = deque(maxlen=limits.failures_per_minute)


class Turnstile:
    """Counts tries. Those that it turns away aren't counted: who waits as told gets through."""

    def __init__(self, limits: JoinLimits) -> None:
        self._limits = limits
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._all: deque[int] = deque(maxlen=limits.tries_per_second)

    def enter(self, host: str, *, now_ms: int) -> Wait | None:
        """Count a try, or say why not."""
        known = self._host(host)
        for reason, stamps, span_ms in (
            ("too_many_failures", known.failures, MINUTE_MS),
            ("too_many_tries", known.tries, MINUTE_MS),
            ("too_many_guests", self._all, SECOND_MS),
        ):
            wait_ms = _wait_ms(stamps, span_ms, now_ms)
            if wait_ms > 0:
                return Wait(reason=reason, ms=wait_ms)
        known.tries.append(now_ms)
        self._all.append(now_ms)
        return None

    def failed(self, host: str, *, now_ms: int) -> None:
        """A try was refused."""
        self._host(host).failures.append(now_ms)

    def _host(self, host: str) -> _Host:
        name = _site(host)
        known = self._hosts.get(name)
        if known is None:
            known = self._hosts[name] = _Host(self._limits)
            while len(self._hosts) > HOSTS_MAX:
                self._hosts.popitem(last=False)
        self._hosts.move_to_end(name)
        return known


def _wait_ms(stamps: "deque[int]", span_ms: int, now_ms: int) -> int:
    """How long until there is room for one more within the span."""
    if len(stamps) < (stamps.maxlen or 0):
        return 0
    return stamps[0] + span_ms - now_ms


def _site(host: str) -> str:
    """What counts as one host."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((address.packed, IPV6_SITE_BITS), strict=False))
    return str(address)

"""The hub's book of what it refused: logins, requests to join, cards; counted by reason, and kept in a file for who runs the hub."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.adapters.files import make_folder, write_private
from fallow.core import cards
from fallow.model.errors import FallowError, StoreFailed, WireError
from fallow.ports import Clock
from fallow.wire import jwt

REFUSALS_FILE = "hub/refusals.json"
"""In the data folder."""
WRITE_S = 2.0
"""At most so often the file is written: strangers decide how much is refused."""
KINDS_MAX = 64
"""Reasons that are counted. All that there are fit; what is beyond, as another version's file may hold, is counted as one."""
BYTES_MAX = 64 * 1024
"""Of the file."""

What = Literal["login", "joining", "renewal", "card", "heartbeat"]
"""What is refused: by the broker a login; by the hub's desks the others."""
Count = Callable[[What, str], None]
"""Told what was refused and for which reason, on the event loop. It returns at once."""
LoginReason = Literal["no_credential", "unreadable", "foreign", "expired", "banned", "bad_proof"]

_DESKS = {
    "too_many_failures": "too many failed tries of it, or from its address, within a minute",
    "too_many_tries": "too many tries of it, or from its address, within a minute",
    "too_many_guests": "too many tries of all guests together",
    "busy": "too many at once waited for the database",
    "malformed": "it can't be read: another version's, or nonsense",
    "bad_proof": "the signature doesn't fit the key",
    "not_invited": "the invitation is wrong, used up, expired or ended, or for another role",
    "closed": "no invitation, a key that isn't known, and the hub isn't open",
    "banned": "the key was put out",
    "unknown": "the key isn't known in this role",
    "store_failed": "the database could not be reached",
    "no_issue": "no credential could be made: the hub's log tells why",
    "no_reply": "a request that names nowhere to answer",
    "no_room": "too many answers under way at the same time",
}
TEXTS: Mapping[str, Mapping[str, str]] = {
    "login": {
        "no_credential": "no credential was shown",
        "unreadable": "what was shown is no credential",
        "foreign": "the credential isn't one of this hub",
        "expired": "the credential had ended",
        "banned": "the key was put out",
        "bad_proof": "the credential was changed, or shown by who doesn't have its key",
    },
    "joining": _DESKS,
    "renewal": _DESKS,
    "card": {reason: text.partition(";")[0] for reason, text in cards.TEXTS.items()},
    "heartbeat": {"malformed": "it can't be read, or names another node", "no_room": "the hub follows no more nodes"},
}
"""Why, in words, by what was refused and the reason."""
_OTHER = ("other", "other")

log = logging.getLogger("fallow.hub")


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """How often something was refused for one reason, first and last at (UTC, ms)."""

    what: str
    reason: str
    count: int
    first_at_ms: int
    last_at_ms: int

    @property
    def why(self) -> str:
        """The reason in words; empty if only another version knows it."""
        return TEXTS.get(self.what, {}).get(self.reason, "")


def uncounted(what: What, reason: str) -> None:
    """For who keeps no book."""


def why_login_refused(credential: str, issuers: Container[str], banned: Container[str], *, now_s: int) -> LoginReason:
    """Why the broker will have refused what a stranger showed: it doesn't say so itself.

    `issuers` are the keys that sign credentials, `banned` users that were put out; `now_s` is UTC. Signatures aren't checked here, the
    broker did that: what is good but for them is `bad_proof`.
    """
    if not credential:
        return "no_credential"
    try:
        said = jwt.claims_of(credential)
    except WireError:
        return "unreadable"
    if said.iss not in issuers:
        return "foreign"
    if said.sub in banned:
        return "banned"
    if said.exp is not None and said.exp <= now_s:
        return "expired"
    return "bad_proof"


def read_refusals(path: Path) -> list[Refusal]:
    """What the file holds, the latest first; nothing if there is none. Raises StoreFailed if it can't be read."""
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(BYTES_MAX), type=list[Refusal])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreFailed(f"could not read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise StoreFailed(f"{path} isn't what a hub writes; delete it, and counting begins anew") from None
    return sorted(found, key=lambda one: (-one.last_at_ms, one.what, one.reason))


class Refusals:
    """Counts what is refused, over restarts. The numbers of the last two seconds may be missing in the file."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._counts: dict[tuple[str, str], Refusal] = {}
        self._news = asyncio.Event()
        self._is_troubled = False
        try:
            for one in read_refusals(path)[:KINDS_MAX]:
                self._counts[one.what, one.reason] = one
        except StoreFailed as error:
            log.warning("refusals are counted anew: %s", error)

    def count(self, what: What, reason: str) -> None:
        """One more."""
        kind: tuple[str, str] = (what, reason)
        if kind not in self._counts and len(self._counts) >= KINDS_MAX:
            kind = _OTHER
        now_ms = self._clock.wall_ms()
        known = self._counts.get(kind)
        if known is None:
            known = Refusal(what=kind[0], reason=kind[1], count=0, first_at_ms=now_ms, last_at_ms=now_ms)
        self._counts[kind] = replace(known, count=known.count + 1, last_at_ms=now_ms)
        self._news.set()

    async def run(self) -> None:
        """Keep the file true, until cancelled; then what is new is written once more."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                await self._keep()
                await asyncio.sleep(WRITE_S)
        finally:
            if self._news.is_set():
                with contextlib.suppress(FallowError):
                    self._write(self._text())

    async def _keep(self) -> None:
        try:
            await asyncio.to_thread(self._write, self._text())
            self._is_troubled = False
        except FallowError as error:
            self._news.set()
            if not self._is_troubled:
                log.warning("refusals can't be kept now: %s; it is tried again", error)
            self._is_troubled = True

    def _text(self) -> str:
        return msgspec.json.encode(list(self._counts.values())).decode() + "\n"

    def _write(self, text: str) -> None:
        make_folder(self._path.parent)
        write_private(self._path, text)

"""What the applications need from outside, as small protocols; adapters fill them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from fallow.model.identity import Agreement, ApiKey, Invite, LogEntry, Member, MemberRole, Organisation
from fallow.model.ids import KeyId, OrgId
from fallow.model.messages import Head


class Clock(Protocol):
    """Time. `now_ms` never jumps and is for waiting; `wall_ms` is UTC and is for stamps."""

    def now_ms(self) -> int: ...

    def wall_ms(self) -> int: ...


class Delivery(NamedTuple):
    """One message as it came off the bus. `unheard` is set when it only says that nobody listens there."""

    subject: str
    reply: str
    data: bytes
    unheard: bool


Hear = Callable[[Delivery], None]
"""Called for every message, on the event loop; it must return at once and must not raise."""


class Bus(Protocol):
    """Carries messages between processes at most once, in order per sender and subject.

    `publish` raises BrokerLost when the connection is down: nothing is kept to be sent later.
    With `reply` given and nobody listening, a Delivery with `unheard` set comes to `reply`.
    """

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None: ...

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None: ...

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes: ...

    def is_up(self) -> bool: ...

    def on_lost(self, tell: Callable[[], None]) -> None: ...

    async def close(self) -> None: ...


class EngineAnswer(Protocol):
    """An engine's answer as it comes: the head is there, the body follows."""

    head: Head

    def body(self) -> AsyncIterator[bytes]: ...


class Engine(Protocol):
    """Something that answers HTTP on a private socket. Leaving the context stops the generation."""

    def post(self, path: str, body: bytes) -> AbstractAsyncContextManager[EngineAnswer]: ...


class Changes(NamedTuple):
    """Which API keys changed up to change number `number`; `all_of_them` where what changed concerns more than some keys."""

    number: int
    key_digests: tuple[bytes, ...]
    all_of_them: bool


class Registry(Protocol):
    """Who takes part, kept for good. Every method is one transaction, blocks, and may raise StoreFailed.

    Adding what is there raises NameTaken, changing what isn't there UnknownName.
    """

    def add_organisation(self, organisation: Organisation) -> None: ...

    def organisations(self) -> list[Organisation]: ...

    def agree(self, agreement: Agreement) -> None: ...

    def end_agreement(self, left: OrgId, right: OrgId, *, at_ms: int) -> None: ...

    def agreements(self) -> list[Agreement]: ...

    def add_invite(self, invite: Invite) -> None: ...

    def invites(self) -> list[Invite]: ...

    def end_invite(self, id: str, *, at_ms: int) -> None: ...

    def admit(self, member: Member, *, word_digest: bytes) -> Member:
        """Let a member in by the invitation with this word, which is used once more unless the member is known already.

        `word_digest` empty: only who is known is let in, and what is known of it returned. Raises NotAdmitted.
        """
        ...

    def admit_open(self, member: Member) -> Member:
        """Let a member in without an invitation; raises NotAdmitted if it is banned."""
        ...

    def member(self, public_key: str) -> Member | None: ...

    def members(self, role: MemberRole | None = None) -> list[Member]: ...

    def ban(self, public_key: str, *, at_ms: int | None, why: str = "") -> None:
        """Put a member out; `at_ms` None takes the ban back."""
        ...

    def add_key(self, key: ApiKey) -> None: ...

    def key(self, digest: bytes) -> ApiKey | None:
        """The key with this SHA-256, compared in constant time."""
        ...

    def keys(self) -> list[ApiKey]: ...

    def change_key(self, key: ApiKey) -> None:
        """All but its id may change."""
        ...

    def key_named(self, id: KeyId) -> ApiKey: ...

    def changes_after(self, number: int) -> Changes: ...

    def log_card(self, node_id: str, card: bytes, *, at_ms: int) -> LogEntry:
        """Append to the public log of cards; the newest entry of the node is returned if it is the same card."""
        ...

    def log_after(self, number: int, *, limit: int) -> list[LogEntry]: ...

    def close(self) -> None: ...

"""What the applications need from outside, as small protocols; adapters fill them."""

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from fallow.model.identity import Agreement, ApiKey, Invite, LogEntry, Member, MemberRole, Organisation
from fallow.model.ids import GatewayId, KeyId, NodeId, OrgId
from fallow.model.messages import Head


class Clock(Protocol):
    """Time. `now_ms` never jumps and is for waiting; `wall_ms` is UTC and is for stamps."""

    def now_ms(self) -> int: ...

    def wall_ms(self) -> int: ...


class Delivery(NamedTuple):
    """One message as it came off the bus. `unheard` is set when it only says that nobody listens there.

    `host` is the sender's address where the broker itself tells it, else empty.
    """

    subject: str
    reply: str
    data: bytes
    unheard: bool
    host: str = ""


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


class Organisations(Protocol):
    """Organisations, and what they agreed on. Every method is one transaction."""

    def add(self, organisation: Organisation) -> None: ...

    def all(self) -> list[Organisation]: ...

    def agree(self, agreement: Agreement) -> None:
        """Add an agreement, or one anew between two whose last one has ended."""
        ...

    def end_agreement(self, left: OrgId, right: OrgId, *, at_ms: int) -> None: ...

    def agreements(self) -> list[Agreement]: ...


class Members(Protocol):
    """Invitations, and the nodes and gateways that joined. Every method is one transaction."""

    def add_invite(self, invite: Invite) -> None: ...

    def invites(self) -> list[Invite]: ...

    def end_invite(self, id: str, *, at_ms: int) -> None: ...

    def admit(self, member: Member, *, word_digest: bytes) -> Member:
        """Let a member in by the invitation with this word, which is used once more unless the member is known already.

        `member.joined_at_ms` is now; organisation and invitation follow from the word. `word_digest` empty: only who is known is let
        in, and what is known of it returned. Raises NotAdmitted.
        """
        ...

    def admit_open(self, member: Member) -> Member:
        """Let a member in without an invitation; raises NotAdmitted if it is banned."""
        ...

    def named(self, public_key: str) -> Member | None: ...

    def all(self, role: MemberRole | None = None) -> list[Member]: ...

    def banned(self) -> list[Member]:
        """Those who are put out."""
        ...

    def ban(self, public_key: str, *, at_ms: int | None, why: str = "") -> None:
        """Put a member out; `at_ms` None takes the ban back."""
        ...


class Keys(Protocol):
    """API keys, by their digests. Every method is one transaction."""

    def add(self, key: ApiKey) -> None: ...

    def all(self) -> list[ApiKey]: ...

    def find(self, digest: bytes) -> ApiKey | None:
        """The key with this SHA-256, compared in constant time."""
        ...

    def named(self, id: KeyId) -> ApiKey:
        """The key with this public name; raises UnknownName."""
        ...

    def change(self, key: ApiKey) -> None:
        """All but its id may change."""
        ...


class Spending(Protocol):
    """What API keys have cost, as gateways tell it. Every method is one transaction."""

    def tell(self, gateway_id: GatewayId, since_ms: int, micro: Mapping[KeyId, int]) -> dict[KeyId, int]:
        """Keep what keys have cost at a gateway since its process began, and give what each has cost everywhere.

        Less than was told before changes nothing. Keys that aren't there are left out.
        """
        ...

    def totals(self, key_ids: Collection[KeyId] | None = None) -> dict[KeyId, int]:
        """What each of these keys has cost everywhere, in micro-credits; None: all that cost something."""
        ...


class CardLog(Protocol):
    """The public log of cards: a hash chain to which one can only append. Every method is one transaction."""

    def append(self, node_id: NodeId, card: bytes, *, at_ms: int) -> LogEntry:
        """The newest entry of the node is returned if it is the same card."""
        ...

    def after(self, number: int, *, limit: int) -> list[LogEntry]:
        """The entries after this number, oldest first."""
        ...


class Registry(Protocol):
    """Who takes part, kept for good. Every method of its parts is one transaction, blocks, and may raise StoreFailed.

    Adding what is there raises NameTaken, changing what isn't there UnknownName.
    """

    @property
    def organisations(self) -> Organisations: ...

    @property
    def members(self) -> Members: ...

    @property
    def keys(self) -> Keys: ...

    @property
    def spending(self) -> Spending: ...

    @property
    def cards(self) -> CardLog: ...

    def changes_after(self, number: int) -> Changes: ...

    def close(self) -> None: ...

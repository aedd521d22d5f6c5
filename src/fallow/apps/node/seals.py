"""The node's side of sealing: its KEM keys, which live in memory and not for long, and the sessions that gateways opened."""

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from msgspec.structs import replace

from fallow.model import messages as m
from fallow.model.errors import NotOpened, UnopenedReason, WireError
from fallow.model.ids import GatewayId, NodeId, OrgId
from fallow.ports import Clock
from fallow.wire import codec, seal, sign
from fallow.wire.nkey_text import verifies

KEM_MS = 10 * 60_000
"""A KEM key is offered for so long, and still opens for as long again: then nobody can open what was sealed to it, the node neither."""
KEM_LIFE_S = 2 * KEM_MS // 1000
SESSION_MS = 20 * 60_000
"""No session is used for longer. Gateways open a new one after half of that."""
SESSIONS_MAX = 4_096
SESSIONS_PER_GATEWAY_MAX = 8
"""A gateway needs one, two for a moment when it opens the next, and more only when it restarts over and over."""
HELLOS_MAX = 50
"""Hellos that are answered within `HELLOS_MS`: each costs about a millisecond."""
HELLOS_MS = 1_000

DEFAULT_SUITE: m.SuiteName = "mlkem768-x25519"

log = logging.getLogger("fallow.node")

Speaks = Callable[[m.Hello, NodeId], Collection[OrgId] | None]
"""For which organisations a gateway that says hello to the node may speak, if it is who it says; None: for all of them."""


def vouched_by(authority: str, hub_org: OrgId, clock: Clock) -> Speaks:
    """Gateways speak for the organisation that the hub with this key vouches for, and the hub's own gateways for all."""

    def speaks(hello: m.Hello, node_id: NodeId) -> Collection[OrgId] | None:
        said, now_s = seal.hello_bytes(hello, node_id), clock.wall_ms() // 1000
        is_known = verifies(hello.gateway_id, said, hello.signature) and sign.is_vouched(
            hello.gateway_id, hello.org_id, hello.member_until_s, hello.membership, authority, now_s=now_s
        )
        if not is_known:
            return ()
        return None if hello.org_id == hub_org else (hello.org_id,)

    return speaks


class Session(NamedTuple):
    """One that is open, for whom its gateway speaks, and since when."""

    keys: seal.NodeSession
    organisations: Collection[OrgId] | None
    since_ms: int


class Opened(NamedTuple):
    """A call's first message as the gateway wrote it, and its way back."""

    request: m.Request
    channel: seal.Channel


class Seals:
    """Answers hellos and opens calls. `refused` counts what wasn't taken, by reason."""

    def __init__(self, node_id: NodeId, sign_by: sign.Sign, speaks: Speaks, clock: Clock, suite: m.SuiteName = DEFAULT_SUITE) -> None:
        self._node_id = node_id
        self._sign = sign_by
        self._speaks = speaks
        self._clock = clock
        self._suite: m.SuiteName = suite
        self._old: seal.KemPair | None = None
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._hellos: deque[int] = deque(maxlen=HELLOS_MAX)
        self.refused: Counter[UnopenedReason] = Counter()
        self._new_pair()

    def _new_pair(self) -> None:
        try:
            self._pair = seal.KemPair(self._suite)
        except UnsupportedAlgorithm:
            log.warning("this machine's OpenSSL lacks ML-KEM: calls are sealed with X25519 alone")
            self._suite = "x25519"
            self._pair = seal.KemPair(self._suite)
        self._since_ms = self._clock.now_ms()
        until_s = self._clock.wall_ms() // 1000 + KEM_LIFE_S
        kem = m.KemKey(suite=self._suite, public_key=self._pair.public, expires_at_s=until_s)
        self.kem = replace(kem, signature=self._sign(sign.kem_bytes(self._node_id, kem)))

    def rotate(self) -> bool:
        """Make a new KEM key if it is time, and forget what is too old; whether there is a new one."""
        now = self._clock.now_ms()
        while self._sessions and now - next(iter(self._sessions.values())).since_ms > SESSION_MS:
            self._sessions.popitem(last=False)
        if now - self._since_ms < KEM_MS:
            return False
        self._old = self._pair if now - self._since_ms < 2 * KEM_MS else None
        self._new_pair()
        return True

    def welcome(self, hello: m.Hello) -> m.Welcome | m.Unopened | None:
        """The answer to a hello; None if there were too many of them, and this one is dropped."""
        now = self._clock.now_ms()
        if len(self._hellos) == HELLOS_MAX and now - self._hellos[0] < HELLOS_MS:
            return None
        self._hellos.append(now)
        pair = next((pair for pair in (self._pair, self._old) if pair is not None and pair.kid == hello.kid), None)
        if pair is None:
            return self._refuse("no_key")
        if hello.session in self._sessions:
            return self._refuse("replayed")
        organisations = self._speaks(hello, self._node_id)
        if organisations is not None and not organisations:
            return self._refuse("not_vouched")
        try:
            welcome, keys = seal.welcome(hello, self._node_id, pair)
        except NotOpened as error:
            return self._refuse(error.reason)
        self._make_room(hello.gateway_id)
        self._sessions[hello.session] = Session(keys, organisations, now)
        return welcome

    def _make_room(self, gateway_id: GatewayId) -> None:
        """The oldest sessions of a gateway with too many, then of anybody, make room for one."""
        own = [name for name, session in self._sessions.items() if session.keys.gateway_id == gateway_id]
        for name in own[: max(0, len(own) - SESSIONS_PER_GATEWAY_MAX + 1)]:
            del self._sessions[name]
        if len(self._sessions) >= SESSIONS_MAX:
            self._sessions.popitem(last=False)

    def open(self, sealed: m.SealedRequest) -> Opened:
        """A call; raises NotOpened, or WireError if what a gateway sealed isn't a request of its own."""
        session = self._sessions.get(sealed.session)
        if session is None or self._clock.now_ms() - session.since_ms > SESSION_MS:
            raise self._count(NotOpened("the session isn't known, or over", reason="no_session"))
        try:
            data, channel = session.keys.open(sealed.number, sealed.box)
        except NotOpened as error:
            raise self._count(error) from None
        request = codec.request.read(data)
        if request.gateway_id != session.keys.gateway_id:
            raise WireError("the call names another gateway than the one that sent it")
        if session.organisations is not None and request.org_id not in session.organisations:
            raise self._count(NotOpened("nobody vouches that this gateway speaks for the caller's organisation", reason="not_vouched"))
        return Opened(request, channel)

    def _refuse(self, reason: UnopenedReason) -> m.Unopened:
        self.refused[reason] += 1
        return m.Unopened(reason=reason)

    def _count(self, error: NotOpened) -> NotOpened:
        self.refused[error.reason] += 1
        return error

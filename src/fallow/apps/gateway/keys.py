"""Whose API key is this? Asked of the hub once, then remembered until the hub says that it changed."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from typing import NamedTuple

from fallow.core.needs import NAMED_MAX
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, Failure, InvalidApiKey, WireError, shortened
from fallow.model.ids import GatewayId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, subjects

FRESH_MS = 60_000
UNKNOWN_FRESH_MS = 2_000
REMEMBERED_MAX = 10_000
LOOKUPS_MAX = 64
LOOKUP_S = 2.0
LOOKUP_TRIES = 3
"""How often a key is asked for anew because it changed while the hub answered."""
KEY_BYTES_MAX = 256
HOW = (
    "give your API key as `Authorization: Bearer KEY` or as `x-api-key: KEY`; `fallow status` shows that of the hub's machine, and "
    "who keeps the hub makes others (`fallow keys create`)"
)
ELSEWHERE = (
    "this API key is of another organisation than this gateway, which may not speak for it; call a gateway of that organisation's, or of "
    "the one that runs the hub"
)
EXPIRED = "this API key has expired; whoever keeps the hub can give it more time (`fallow keys limit`) or make another"

log = logging.getLogger("fallow.gateway")


class _Known(NamedTuple):
    """What the hub said, when, and how often all had been doubted by then."""

    grant: Grant | None
    elsewhere: bool
    asked_at_ms: int
    doubts: int


class Keys:
    """The keys that this gateway has seen, by their SHA-256. Known ones go on working while the hub is away, until they expire."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock) -> None:
        self._asks_at = subjects.key(gateway_id)
        self._bus = bus
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Future[_Known | None]] = {}
        self._outdated: set[bytes] = set()
        """Keys that changed while the hub is being asked for them."""
        self._doubts = 0

    async def start(self) -> None:
        """Hear of changes from now on; raises BrokerLost."""
        self._bus.on_lost(self.doubt_all)
        await self._bus.subscribe(subjects.CHANGED.pattern, self._on_changed)

    def recall(self, authorization: bytes) -> Grant | None:
        """The grant behind an Authorization header, if we know it without asking."""
        digest = _digest_of(authorization)
        known = None if digest is None else self._known.get(digest)
        if known is None or known.grant is None or not self._is_fresh(known) or self._has_expired(known.grant):
            return None
        return known.grant

    async def check(self, authorization: bytes) -> Grant:
        """The grant behind an Authorization header; raises InvalidApiKey, or BrokerLost if nobody can tell."""
        digest = _digest_of(authorization)
        if digest is None:
            raise InvalidApiKey(HOW)
        known = self._known.get(digest)
        if known is None or not self._is_fresh(known):
            known = await self._ask(digest)
        if known.elsewhere:
            raise InvalidApiKey(ELSEWHERE)
        if known.grant is None:
            raise InvalidApiKey("nobody knows this API key; it may have been revoked, or have expired")
        if self._has_expired(known.grant):
            raise InvalidApiKey(EXPIRED)
        return known.grant

    def doubt_all(self) -> None:
        """What changed meanwhile may have been missed: all keys are asked for again, and hold as they are while the hub is silent."""
        self._doubts += 1

    def _on_changed(self, delivery: Delivery) -> None:
        try:
            changed = codec.keys_changed.read(delivery.data)
        except WireError as error:
            log.warning("news of API keys could not be read: %s", error)
            self.doubt_all()
            return
        if changed.all_of_them:
            self.doubt_all()
        for digest in changed.key_digests:
            self._known.pop(digest, None)
            if digest in self._lookups:
                self._outdated.add(digest)

    def _is_fresh(self, known: _Known) -> bool:
        if known.doubts != self._doubts:
            return False
        return self._clock.now_ms() - known.asked_at_ms <= (FRESH_MS if known.grant else UNKNOWN_FRESH_MS)

    def _has_expired(self, grant: Grant) -> bool:
        return grant.expires_at_ms is not None and grant.expires_at_ms <= self._clock.wall_ms()

    async def _ask(self, digest: bytes) -> _Known:
        """One question per key, however many calls wait for the answer."""
        lookup = self._lookups.get(digest)
        if lookup is None:
            if len(self._lookups) >= LOOKUPS_MAX:
                stale = self._known.get(digest)
                if stale is not None and stale.grant is not None:
                    return stale
                raise BrokerLost("too many unknown API keys are being looked up; try again shortly", retry_after_ms=1_000)
            lookup = self._lookups[digest] = asyncio.ensure_future(self._look_up(digest))
            lookup.add_done_callback(lambda _: self._ended(digest))
        known = await asyncio.shield(lookup)
        if known is not None:
            return known
        stale = self._known.get(digest)  # what is known now: a key that changed meanwhile isn't any more
        if stale is None or stale.grant is None:
            raise BrokerLost("the hub, which knows the API keys, can't be reached", retry_after_ms=2_000)
        return stale

    def _ended(self, digest: bytes) -> None:
        self._lookups.pop(digest, None)
        self._outdated.discard(digest)

    async def _look_up(self, digest: bytes) -> _Known | None:
        """What the hub says, remembered; None if it says nothing."""
        for _ in range(LOOKUP_TRIES):
            self._outdated.discard(digest)
            doubts = self._doubts
            try:
                data = await self._bus.request(self._asks_at, codec.encode(m.KeyQuery(key_digest=digest)), within_s=LOOKUP_S)
                answer = codec.key_answer.read(data)
                known = _Known(answer.grant, answer.elsewhere, self._clock.now_ms(), doubts)
            except (BrokerLost, WireError):
                return None
            if digest not in self._outdated and doubts == self._doubts:
                break
        if digest in self._outdated:
            return known  # it changes all the time; the next call asks again
        self._known[digest] = known
        self._known.move_to_end(digest, last=known.grant is not None)  # those that nobody knows are forgotten first
        while len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return known


def _digest_of(authorization: bytes) -> bytes | None:
    """The SHA-256 of the key in an Authorization header; None if there is none."""
    scheme, _, key = authorization.partition(b" ")
    key = key.strip()
    if not key or len(key) > KEY_BYTES_MAX or scheme.lower() != b"bearer":
        return None
    return hashlib.sha256(key).digest()


def other_model(grant: Grant, model: str) -> Failure | None:
    """Why a key's caller can't have this model; None if it can. A model's name, or a family's, counts as the caller writes it."""
    if not grant.models or model in grant.models:
        return None
    names = [shortened(name) for name in sorted(grant.models)]
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    text = (
        f"your key doesn't allow the model {shortened(model)!r}, only {', '.join(names[:NAMED_MAX])}{more}; "
        "whoever keeps the hub can change that with `fallow keys limit`"
    )
    return Failure(code="model_not_allowed", message=text, param="model")

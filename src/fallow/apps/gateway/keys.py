"""Whose API key is this? Asked of the hub once, then remembered."""

import asyncio
import hashlib
from collections import OrderedDict
from typing import NamedTuple

from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, InvalidApiKey, WireError
from fallow.ports import Bus, Clock
from fallow.wire import codec, subjects

FRESH_MS = 60_000
UNKNOWN_FRESH_MS = 2_000
REMEMBERED_MAX = 10_000
LOOKUPS_MAX = 64
LOOKUP_S = 2.0
KEY_BYTES_MAX = 256
HOW = "give your API key as `Authorization: Bearer KEY` or as `x-api-key: KEY`; `fallow status` shows the key of this machine"


class _Known(NamedTuple):
    grant: Grant | None
    asked_at_ms: int


class Keys:
    """The keys that this gateway has seen. Known ones go on working while the hub is away."""

    def __init__(self, bus: Bus, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._lookups: dict[bytes, asyncio.Future[_Known | None]] = {}

    def recall(self, authorization: bytes) -> Grant | None:
        """The grant behind an Authorization header, if we know it without asking."""
        known = self._known.get(hashlib.sha256(authorization).digest())
        if known is None or self._clock.now_ms() - known.asked_at_ms > FRESH_MS:
            return None
        return known.grant

    async def check(self, authorization: bytes) -> Grant:
        """The grant behind an Authorization header; raises InvalidApiKey, or BrokerLost if nobody can tell."""
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key or len(key) > KEY_BYTES_MAX:
            raise InvalidApiKey(HOW)
        digest = hashlib.sha256(authorization).digest()
        known = self._known.get(digest)
        now = self._clock.now_ms()
        if known is None or now - known.asked_at_ms > (FRESH_MS if known.grant else UNKNOWN_FRESH_MS):
            known = await self._ask(digest, hashlib.sha256(key).digest(), known)
        if known.grant is None:
            raise InvalidApiKey("nobody knows this API key")
        return known.grant

    async def _ask(self, digest: bytes, key_digest: bytes, stale: _Known | None) -> _Known:
        """One question per key, however many calls wait for the answer."""
        lookup = self._lookups.get(digest)
        if lookup is None:
            if len(self._lookups) >= LOOKUPS_MAX:
                if stale is not None and stale.grant is not None:
                    return stale
                raise BrokerLost("too many unknown API keys are being looked up; try again shortly", retry_after_ms=1_000)
            lookup = self._lookups[digest] = asyncio.ensure_future(self._look_up(digest, key_digest))
            lookup.add_done_callback(lambda _: self._lookups.pop(digest, None))
        known = await asyncio.shield(lookup) or stale
        if known is None or (known is stale and known.grant is None):
            raise BrokerLost("the hub, which knows the API keys, can't be reached", retry_after_ms=2_000)
        return known

    async def _look_up(self, digest: bytes, key_digest: bytes) -> _Known | None:
        """What the hub says, remembered; None if it says nothing."""
        try:
            answer = await self._bus.request(subjects.KEY.pattern, codec.encode(m.KeyQuery(key_digest=key_digest)), within_s=LOOKUP_S)
            known = _Known(codec.key_answer.read(answer).grant, self._clock.now_ms())
        except (BrokerLost, WireError):
            return None
        self._known[digest] = known
        self._known.move_to_end(digest, last=known.grant is not None)  # those that nobody knows are forgotten first
        while len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return known

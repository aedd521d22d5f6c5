"""The hub's desk for API keys: answers whose a key is, and tells gateways which keys changed."""

import asyncio
import logging
from collections.abc import Callable

from fallow.apps.hub.listening import GROUP
from fallow.core import membership
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, FallowError, StoreFailed, WireError
from fallow.model.identity import Agreement, Organisation
from fallow.model.ids import OrgId
from fallow.ports import Bus, Clock, Delivery, Registry
from fallow.wire import codec, nkey_text, sign, subjects

CHANGES_S = 0.5
"""How often the registry is asked what changed. A gateway that hears of it asks anew, so a change is in force well within 2 s."""
AT_ONCE_MAX = 4
"""Look-ups that run at the same time: the other desks need threads too."""
WAITING_MAX = 1_024
"""Questions under way. One beyond that is dropped; the gateway goes on with what it knows, or asks again."""
VERIFIED_MAX = 10_000
"""Agreements whose signatures are remembered as checked."""

log = logging.getLogger("fallow.hub")


class KeyDesk:
    """Answers gateways' questions about API keys, and says when an answer no longer holds.

    Gateways of `hub_org` speak for the callers of all organisations, others for those of their own.
    """

    def __init__(self, bus: Bus, registry: Registry, clock: Clock, hub_org: OrgId) -> None:
        self._hub_org = hub_org
        self._bus = bus
        self._registry = registry
        self._clock = clock
        self._agreements = Agreements(registry)
        self._turn = asyncio.Semaphore(AT_ONCE_MAX)
        self._waiting = 0
        self._number: int | None = None
        """The last change that gateways were told of; None: they are told that all may have changed."""
        self._turns_at_ms: int | None = None
        """When, in UTC, the next agreement begins or ends by itself."""
        self._troubled = False
        self._group: asyncio.TaskGroup | None = None

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Answer from now on; raises BrokerLost."""
        self._group = group
        self._bus.on_lost(self._on_lost)
        await self._bus.subscribe(subjects.KEY.pattern, self._on_query, group=GROUP)

    async def run(self) -> None:
        """Tell of changes until cancelled. A database or a broker that fails is tried again."""
        while True:
            try:
                await self._tell_changes()
                self._calm()
            except StoreFailed as error:
                self._trouble(error)
            except BrokerLost:
                self._number = None  # some of it may have been heard, and some not
            await asyncio.sleep(CHANGES_S)

    def _on_lost(self) -> None:
        """What was said last may not have left."""
        self._number = None

    def _trouble(self, error: FallowError) -> None:
        if not self._troubled:
            log.warning("API keys can't be looked up now: %s; gateways go on with those that they know", error)
        self._troubled = True

    def _calm(self) -> None:
        if self._troubled:
            log.warning("API keys can be looked up again")
        self._troubled = False

    async def _tell_changes(self) -> None:
        """All that changed since it was told last, a part at a time."""
        while True:
            if self._turns_at_ms is not None and self._clock.wall_ms() >= self._turns_at_ms:
                self._number = None
            before = self._number
            changes = await asyncio.to_thread(self._registry.changes_after, before or 0)
            if self._number != before:
                continue  # the connection broke meanwhile: gateways may have missed what was said before
            if before is not None and changes.number == before and not changes.all_of_them:
                return
            if before is None or changes.all_of_them:
                messages = [m.KeysChanged(sequence=changes.number, all_of_them=True)]
            else:
                messages = [
                    m.KeysChanged(sequence=changes.number, key_digests=changes.key_digests[at : at + m.KEYS_CHANGED_MAX])
                    for at in range(0, len(changes.key_digests), m.KEYS_CHANGED_MAX)
                ]
            if before is None or changes.all_of_them:
                self._turns_at_ms = await asyncio.to_thread(self._agreements.next_turn_ms, self._clock.wall_ms())
            self._number = changes.number  # before it is said, so that a connection lost meanwhile makes it None again
            for message in messages:
                await self._bus.publish(subjects.CHANGED.pattern, codec.encode(message))
            if changes.all_of_them or not changes.key_digests or before is None:
                return

    def _on_query(self, delivery: Delivery) -> None:
        try:
            query = codec.key_query.read(delivery.data)
        except WireError as error:
            log.warning("a key query was dropped: %s", error)
            return
        if self._waiting >= WAITING_MAX or not delivery.reply:
            log.info("a key query was dropped: %d are under way", self._waiting)
            return
        assert self._group is not None, "queries come only while the hub runs"
        self._waiting += 1
        self._group.create_task(self._answer(delivery.reply, query.key_digest, subjects.last_token(delivery.subject)))

    async def _answer(self, subject: str, digest: bytes, gateway: str) -> None:
        try:
            async with self._turn:
                answer = codec.encode(await asyncio.to_thread(self._look_up, digest, gateway))
            if len(answer) > subjects.KEY.payload_bytes_max:
                raise WireError(f"{len(answer)} bytes of {subjects.KEY.payload_bytes_max}")
            await self._bus.publish(subject, answer)
        except StoreFailed as error:
            self._trouble(error)  # no answer: the gateway goes on with what it knows
        except BrokerLost:
            log.debug("not answered: the broker is away")
        except WireError as error:
            log.warning("what an API key allows doesn't fit into a message: %s; name fewer models, regions or partners", error)
        finally:
            self._waiting -= 1

    def _look_up(self, digest: bytes, gateway: str) -> m.KeyAnswer:
        """In a thread: what the key allows now."""
        key = self._registry.keys.find(digest)
        if key is None:
            return m.KeyAnswer()
        member = self._registry.members.named(gateway)
        if member is None or member.org_id not in (key.org_id, self._hub_org):
            return m.KeyAnswer(elsewhere=True)
        now_ms = self._clock.wall_ms()
        partners = membership.partners_of(key.org_id, self._agreements.signed(), now_ms)
        spent = {} if key.budget_micro is None else self._registry.spending.totals([key.id])
        return m.KeyAnswer(grant=membership.grant_of(key, partners, now_ms, spent_micro=spent.get(key.id, 0)))


class Agreements:
    """The agreements that both sides signed, read anew each time. Any thread may ask."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._verified: dict[tuple[Agreement, str, str], bool] = {}

    def signed(self) -> list[Agreement]:
        """Those whose two signatures are of their organisations' keys."""
        found = self._registry.organisations.agreements()
        if not found:
            return []
        keys = public_keys(self._registry.organisations.all())
        return [one for one in found if self._is_signed(one, keys.get(one.left, ""), keys.get(one.right, ""))]

    def next_turn_ms(self, now_ms: int) -> int | None:
        """The next moment, in UTC, at which an agreement begins or ends by itself."""
        found = self._registry.organisations.agreements()
        moments = [at_ms for one in found for at_ms in (one.begins_at_ms, one.ends_at_ms) if at_ms is not None and at_ms > now_ms]
        return min(moments, default=None)

    def _is_signed(self, agreement: Agreement, left_key: str, right_key: str) -> bool:
        name = (agreement, left_key, right_key)
        known = self._verified.get(name)
        if known is None:
            if len(self._verified) >= VERIFIED_MAX:
                self._verified.clear()
            known = self._verified[name] = is_signed(agreement, left_key, right_key)
            if not known:
                log.warning("the agreement of %s and %s doesn't hold: it isn't signed by both", agreement.left, agreement.right)
        return known


def public_keys(organisations: list[Organisation]) -> dict[OrgId, str]:
    """Each organisation's public key; those without one aren't there."""
    return {one.id: one.public_key for one in organisations if one.public_key}


def is_signed(agreement: Agreement, left_key: str, right_key: str) -> bool:
    """Whether both sides signed; no side without a key did."""
    sides: list[tuple[str, bytes]] = [(left_key, agreement.left_signature), (right_key, agreement.right_signature)]
    verifies: Callable[[str, bytes, bytes], bool] = nkey_text.verifies
    data = sign.agreement_bytes(agreement)
    return all(bool(key) and verifies(key, data, signature) for key, signature in sides)

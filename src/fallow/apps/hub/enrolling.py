"""The hub's desk for who wants to join, and for members whose credential runs out; and the watch over bans."""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from fallow.apps.hub.listening import GROUP
from fallow.apps.hub.refusals import Count, What, uncounted
from fallow.apps.hub.registrar import digest_of, keep_organisation
from fallow.apps.hub.turnstile import JoinLimits, Turnstile
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, Failure, FallowError, NotAdmitted, WireError, shortened
from fallow.model.identity import Member, MemberRole
from fallow.model.ids import OrgId
from fallow.ports import Bus, Clock, Delivery, Registry
from fallow.wire import codec, nkey_text, sign, subjects

LIFE_S = 24 * 3_600
"""How long a credential holds. Members renew it long before."""
AT_ONCE_MAX = 4
"""Registry calls of the desk that run at the same time, for guests and for members each: the other desks need threads too."""
WAITING_MAX = 256
"""Guests, and members, that wait for the registry at the same time; more are told to come again."""
ANSWERS_MAX = 1_024
"""Answers under way; a question beyond that gets none, and who asked tries again."""
RENEWALS = JoinLimits(tries_per_minute=60, failures_per_minute=10, tries_per_second=500)
"""The same limits for members, each of whom is a host of its own."""
BANS_S = 0.5
"""How often the registry is asked for bans."""
BUSY_MS = 2_000

Vouch = Callable[[str, OrgId, int], bytes]
"""Signs that a public key belongs to an organisation until then (UTC seconds)."""
Issue = Callable[[MemberRole, str, int], str]
"""Makes a credential for a role, a public key and a life in seconds; may raise a FallowError."""
OnBans = Callable[[Mapping[str, int]], Awaitable[bool]]
"""Told of all bans, as public keys and when each began (UTC in ms), until it says that they are in force, and when they change."""

log = logging.getLogger("fallow.hub")

_TEXTS = {
    "too_many_failures": "too many tries by you, or by others at your address, were refused; wait a minute",
    "too_many_tries": "too many tries by you, or by others at your address; wait a minute",
    "too_many_guests": "too many want to join at once; try again shortly",
    "busy": "too many want to join at once; try again shortly",
    "malformed": "the hub can't read this; update the older of the two",
    "bad_proof": "the signature doesn't fit the key; check that the key's file is whole",
    "not_invited": "this invitation doesn't let you in: it is wrong, used up, expired or ended, or made for another role; "
    "ask who runs the hub for a new one (`fallow hub invite`)",
    "closed": "this hub takes nobody without an invitation, and doesn't know your key; ask who runs it for one (`fallow hub invite`)",
    "banned": "this key was put out; only who runs the hub can take it in again (`fallow hub unban`)",
    "unknown": "the hub doesn't know this key in this role; join again with an invitation",
    "store_failed": "the hub can't reach its database now; try again shortly",
    "no_issue": "the hub can't make credentials now; who runs it finds why in its log",
}
"""What a guest is told. None of it tells what the hub knows of an invitation's word."""
_HUBS_FAULT = frozenset({"busy", "store_failed", "no_issue"})
"""Refusals that don't count against who asked."""


class _Refused(Exception):
    """Who asked isn't let in, for one of the reasons of the table."""

    def __init__(self, reason: str, retry_after_ms: int | None = None) -> None:
        assert reason in _TEXTS, reason
        super().__init__(reason)
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class EnrolDesk:
    """Lets nodes and gateways in, and gives them their next credential. `refused` counts refusals by reason.

    The time that a guest states is not checked: clocks are off by minutes, and who sends somebody else's words again gets a credential
    that is worth nothing without that one's key. `vouch` signs, as `authority`, whose a member is. `count` is told of refusals, too.
    """

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        issue: Issue,
        clock: Clock,
        *,
        open_to: OrgId | None,
        vouch: Vouch,
        authority: str,
        hub_org_id: OrgId = OrgId(""),  # noqa: B008  (a text)
        life_s: int = LIFE_S,
        limits: JoinLimits = JoinLimits(),  # noqa: B008  (frozen)
        count: Count = uncounted,
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._issue = issue
        self._clock = clock
        self._open_to = open_to
        self._vouch = vouch
        self._authority = authority
        self._hub_org_id = hub_org_id
        self._life_s = life_s
        self._guests = Turnstile(limits)
        self._members = Turnstile(RENEWALS)
        self._queues = {"guest": _Queue(), "member": _Queue()}
        self._count = count
        self._answers = 0
        self._group: asyncio.TaskGroup | None = None
        self.refused: Counter[str] = Counter()
        self.admitted: Counter[MemberRole] = Counter()
        self.renewed: Counter[MemberRole] = Counter()

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Answer from now on; raises BrokerLost, or StoreFailed if the organisation of open enrolment can't be added."""
        self._group = group
        if self._open_to is not None:
            add = functools.partial(keep_organisation, self._registry, self._open_to, public_key="", now_ms=max(0, self._clock.wall_ms()))
            await asyncio.to_thread(add)
        await self._bus.subscribe(subjects.ENROL.pattern, self._on_enrol, group=GROUP)
        await self._bus.subscribe(subjects.RENEW_NODE.pattern, lambda delivery: self._on_renew(delivery, "node"), group=GROUP)
        await self._bus.subscribe(subjects.RENEW_GATEWAY.pattern, lambda delivery: self._on_renew(delivery, "gateway"), group=GROUP)

    def _on_enrol(self, delivery: Delivery) -> None:
        self._begin("joining", delivery, lambda: self._enrol(delivery), f"a guest from {shortened(delivery.host) or 'nowhere'}")

    def _on_renew(self, delivery: Delivery, role: MemberRole) -> None:
        public_key = subjects.last_token(delivery.subject)
        self._begin("renewal", delivery, lambda: self._renew(delivery, role, public_key), f"the {role} {shortened(public_key)}")

    def _begin(self, what: What, delivery: Delivery, answer: Callable[[], Awaitable[m.Enrolled]], who: str) -> None:
        assert self._group is not None, "questions come only while the hub runs"
        if not delivery.reply or self._answers >= ANSWERS_MAX:
            return self._refuse(what, "no_reply" if not delivery.reply else "no_room")
        self._answers += 1
        self._group.create_task(self._answer(what, delivery.reply, answer, who))

    def _refuse(self, what: What, reason: str) -> None:
        self.refused[reason] += 1
        self._count(what, reason)

    async def _answer(self, what: What, subject: str, answer: Callable[[], Awaitable[m.Enrolled]], who: str) -> None:
        try:
            try:
                said = await answer()
            except _Refused as refused:
                self._refuse(what, refused.reason)
                log.warning("%s was refused: %s (%d so far)", who, refused.reason, self.refused[refused.reason])
                said = _refusal(refused)
            await self._bus.publish(subject, codec.encode(said))
        except BrokerLost:
            log.debug("not answered: the broker is away")
        finally:
            self._answers -= 1

    async def _enrol(self, delivery: Delivery) -> m.Enrolled:
        wait = self._guests.enter(delivery.host, now_ms=self._clock.now_ms())
        if wait is not None:
            raise _Refused(wait.reason, wait.ms)
        try:
            asked = _read_enrol(delivery.data)
            enrolled = await self._queues["guest"].run(lambda: self._admit(asked))
        except _Refused as refused:
            if refused.reason not in _HUBS_FAULT:
                self._guests.failed(delivery.host, now_ms=self._clock.now_ms())
            raise
        self.admitted[asked.role] += 1
        log.info("the %s %s joined %s", asked.role, asked.public_key, enrolled.org_id)
        return enrolled

    async def _renew(self, delivery: Delivery, role: MemberRole, public_key: str) -> m.Enrolled:
        wait = self._members.enter(public_key, now_ms=self._clock.now_ms())
        if wait is not None:
            raise _Refused(wait.reason, wait.ms)
        try:
            codec.renew.read(delivery.data)
        except WireError:
            raise _Refused("malformed") from None
        enrolled = await self._queues["member"].run(lambda: self._known(role, public_key))
        self.renewed[role] += 1
        return enrolled

    def _admit(self, asked: m.Enrol) -> m.Enrolled:
        """In a thread: whether the guest is who it says, and may come in."""
        if not _is_proven(asked):
            raise _Refused("bad_proof")
        members = self._registry.members
        known = members.named(asked.public_key)
        if known is not None and known.banned_at_ms is not None:
            raise _Refused("banned")
        guest = Member(
            public_key=asked.public_key, role=asked.role, org_id=self._open_to or OrgId(""), joined_at_ms=max(0, self._clock.wall_ms())
        )
        try:
            if asked.invite:
                member = members.admit(guest, word_digest=digest_of(asked.invite))
            elif known is None and self._open_to is not None:
                member = members.admit_open(guest)
            else:
                member = members.admit(guest, word_digest=b"")
        except NotAdmitted:
            raise _Refused("not_invited" if asked.invite else "closed") from None
        return self._credential(member, asked.role)

    def _known(self, role: MemberRole, public_key: str) -> m.Enrolled:
        """In a thread: the next credential of a member."""
        member = self._registry.members.named(public_key)
        if member is None:
            raise _Refused("unknown")
        return self._credential(member, role)

    def _credential(self, member: Member, role: MemberRole) -> m.Enrolled:
        if member.banned_at_ms is not None:
            raise _Refused("banned")
        if member.role != role:
            raise _Refused("unknown")
        expires_at_s = max(0, self._clock.wall_ms()) // 1000 + self._life_s
        try:
            credential = self._issue(role, member.public_key, self._life_s)
            membership = self._vouch(member.public_key, member.org_id, expires_at_s)
        except FallowError as error:
            log.warning("no credential could be made: %s", error)
            raise _Refused("no_issue", BUSY_MS) from None
        return m.Enrolled(
            credential=credential,
            org_id=member.org_id,
            expires_at_s=expires_at_s,
            membership=membership,
            authority=self._authority,
            hub_org_id=self._hub_org_id,
        )


class _Queue:
    """Registry calls in threads: a few at once, and not too many that wait."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(AT_ONCE_MAX)
        self._waiting = 0

    async def run(self, decide: Callable[[], m.Enrolled]) -> m.Enrolled:
        if self._waiting >= WAITING_MAX:
            raise _Refused("busy", BUSY_MS)
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(decide)
        except FallowError as error:
            log.warning("nobody can join now: %s", error)
            raise _Refused("store_failed", BUSY_MS) from None
        finally:
            self._waiting -= 1


def _read_enrol(data: bytes) -> m.Enrol:
    try:
        return codec.enrol.read(data)
    except WireError:
        raise _Refused("malformed") from None


def _is_proven(asked: m.Enrol) -> bool:
    """Whether who asks has the key, and it is of the kind that connects."""
    return asked.public_key.startswith(sign.NODE_KIND) and nkey_text.verifies(asked.public_key, sign.enrol_bytes(asked), asked.proof)


def _refusal(refused: _Refused) -> m.Enrolled:
    return m.Enrolled(failure=Failure(code=NotAdmitted.code, message=_TEXTS[refused.reason], retry_after_ms=refused.retry_after_ms))


async def watch_bans(registry: Registry, on_bans: OnBans) -> None:
    """Tell of bans as they come and go, and of those in force at first, until cancelled.

    A database or a broker that fails is tried again, and so is what can't be in force yet; what was in force stays so.
    """
    told: dict[str, int] | None = None
    troubled = False
    while True:
        try:
            members = await asyncio.to_thread(registry.members.banned)
            bans = {member.public_key: member.banned_at_ms for member in members if member.banned_at_ms is not None}
            if bans != told:
                told = bans if await on_bans(bans) else None
            troubled = False
        except FallowError as error:
            if not troubled:
                log.warning("bans can't be carried out now: %s; it is tried again", error)
            troubled = True
        await asyncio.sleep(BANS_S)

"""How a node or a gateway comes onto the network: its key, its credential for the broker, and the next one before that ends."""

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fallow.adapters.files import make_folder, write_private
from fallow.adapters.nats_bus import NatsBus, Reach
from fallow.adapters.nkey import Credentials, KeyPair, kept_key, key_from_seed
from fallow.model import messages as m
from fallow.model.errors import BrokerLost, NotAdmitted, StartFailed, WireError
from fallow.model.identity import MemberRole
from fallow.model.ids import OrgId
from fallow.ports import Clock
from fallow.wire import codec, invitation, sign, subjects
from fallow.wire.invitation import Invitation
from fallow.wire.jwt import expiry_of

IDENTITY_FOLDER = "identity"
ENROL_S = 10.0
"""How long the hub may take to let somebody in."""
ENROL_TRIES_MAX = 5
ENROL_WAIT_S_MAX = 65.0
RENEW_S = 5.0
RENEW_AT = 2 / 3
"""A credential is renewed after this part of its life, so that a hub that is away for hours costs nobody anything."""
RENEW_AGAIN_S = 60.0
"""The longest wait between two tries; each doubles the one before."""
RENEW_EVERY_S_MIN = 1.0
RENEW_LOOK_S = 60.0
"""How often it is looked whether a renewal is due: while a machine sleeps, its timers do too, and its credential runs out."""
FRESH_S_MIN = 300.0
"""A credential that ends sooner is replaced before it is used."""

log = logging.getLogger("fallow.joining")


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a hub: the credential, and how to ask for another."""

    credential: str
    org_id: OrgId
    addresses: tuple[str, ...]
    ca_pem: str
    door_jwt: str
    door_seed: str
    membership: bytes = b""
    member_until_s: int = 0
    authority: str = ""
    hub_org_id: OrgId = OrgId("")


class Joined(NamedTuple):
    """Who we are, and how the broker is reached. `membership` is the word of the hub, whose key is `authority`, that we are of `org_id`."""

    credentials: Credentials
    org_id: OrgId
    membership: bytes
    member_until_s: int
    authority: str
    hub_org_id: OrgId
    address: str
    reach: Reach
    file: Path


def read_invitation(text: str, where: str) -> Invitation:
    """An invitation from a flag, a file or the environment; raises StartFailed naming it."""
    try:
        return invitation.read(text.strip())
    except WireError as error:
        raise StartFailed(f"{where} holds no invitation: {error.message}; `fallow hub invite` makes one") from None


async def join(data: Path, role: MemberRole, invited: Invitation | None, hub: str, proxy: str, clock: Clock) -> Joined:
    """Our identity on the network, with a credential that is good for a while: the one that is kept, or a new one.

    `hub` is an address instead of the invitation's. Raises StartFailed, NotAdmitted.
    """
    folder = make_folder(data / IDENTITY_FOLDER)
    key = kept_key(folder / f"{role}.nk", "user")
    file = folder / f"{role}.json"
    kept = _read(file)
    if kept is not None and (invited is None or invited.door_jwt == kept.door_jwt):
        door = Invitation(
            addresses=kept.addresses if invited is None else invited.addresses,
            ca_pem=kept.ca_pem if invited is None else invited.ca_pem,
            door_jwt=kept.door_jwt,
            door_seed=kept.door_seed,
            word="" if invited is None else invited.word,
        )
        if _lives_s(kept.credential, clock) >= FRESH_S_MIN:
            return _joined(kept, door, key, hub, proxy, file)
    elif invited is not None:
        door = invited
    else:
        raise StartFailed(
            "this machine has no identity on a network yet: join one with --join TOKEN, which its hub's `fallow hub invite` gives"
        )
    enrolled, door = await _let_in(role, door, key, hub, proxy, clock)
    kept = Kept(addresses=door.addresses, ca_pem=door.ca_pem, door_jwt=door.door_jwt, door_seed=door.door_seed, **_given(enrolled))
    write_private(file, msgspec.json.encode(kept).decode())
    return _joined(kept, door, key, hub, proxy, file)


def _joined(kept: Kept, door: Invitation, key: KeyPair, hub: str, proxy: str, file: Path) -> Joined:
    return Joined(
        credentials=Credentials(kept.credential, key),
        org_id=kept.org_id,
        membership=kept.membership,
        member_until_s=kept.member_until_s,
        authority=kept.authority,
        hub_org_id=kept.hub_org_id,
        address=_reachable(door, hub, proxy)[0],
        reach=Reach(ca_pem=door.ca_pem, proxy=proxy),
        file=file,
    )


def _given(enrolled: m.Enrolled) -> dict[str, Any]:
    """What is kept of the hub's answer."""
    return {
        "credential": enrolled.credential,
        "org_id": enrolled.org_id,
        "membership": enrolled.membership,
        "member_until_s": enrolled.expires_at_s,
        "authority": enrolled.authority,
        "hub_org_id": enrolled.hub_org_id,
    }


def _read(file: Path) -> Kept | None:
    """What was kept; None if there is nothing, or nothing that can be read: then we join anew."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Kept)
    except (OSError, msgspec.DecodeError):
        return None


def _lives_s(credential: str, clock: Clock) -> float:
    try:
        until_s = expiry_of(credential)
    except WireError:
        return 0.0
    return float("inf") if until_s is None else until_s - clock.wall_ms() / 1000


def _reachable(door: Invitation, hub: str, proxy: str) -> tuple[str, ...]:
    """The addresses to try, in order; through a proxy only WebSocket over TLS goes. Raises StartFailed if there are none."""
    if hub:
        return (hub,)
    found = tuple(one for one in door.addresses if not proxy or one.startswith("wss://"))
    if not found:
        raise StartFailed("the hub has no wss:// address, and nothing else goes through network.proxy; its hub.websocket_port gives it one")
    return found


async def _let_in(role: MemberRole, door: Invitation, key: KeyPair, hub: str, proxy: str, clock: Clock) -> tuple[m.Enrolled, Invitation]:
    """Joined at the first address that answers, which is the first from now on."""
    addresses = _reachable(door, hub, proxy)
    for address in addresses:
        try:
            enrolled = await _admitted(role, door, key, address, proxy, clock)
        except StartFailed as error:
            if address == addresses[-1]:
                raise
            log.info("%s; the next address is tried", error.message)
        else:
            others = tuple(one for one in door.addresses if one != address)
            return enrolled, door if hub else msgspec.structs.replace(door, addresses=(address, *others))
    raise AssertionError("the last address has returned or raised")


async def _admitted(role: MemberRole, door: Invitation, key: KeyPair, address: str, proxy: str, clock: Clock) -> m.Enrolled:
    """As `_enrol`, and again after a while where the hub is only busy, as when many machines behind one address join at once."""
    for tries in range(ENROL_TRIES_MAX):
        enrolled = await _enrol(role, door, key, address, proxy, clock)
        failure = enrolled.failure
        if failure is None:
            return enrolled
        if failure.retry_after_ms is None or tries == ENROL_TRIES_MAX - 1:
            break
        log.info("not let in yet: %s", failure.message)
        await asyncio.sleep(min(ENROL_WAIT_S_MAX, failure.retry_after_ms / 1000) * random.uniform(1.0, 1.5))  # noqa: S311  (nothing secret)
    assert failure is not None, "who is let in has returned"
    raise NotAdmitted(f"the hub did not let us in: {failure.message}")


async def _enrol(role: MemberRole, door: Invitation, key: KeyPair, address: str, proxy: str, clock: Clock) -> m.Enrolled:
    """Ask the hub to be let in; raises StartFailed if it doesn't answer."""
    asked = m.Enrol(role=role, public_key=key.public, invite=door.word, at_s=clock.wall_ms() // 1000)
    asked = msgspec.structs.replace(asked, proof=key.sign(sign.enrol_bytes(asked)))
    guest = Credentials(door.door_jwt, key_from_seed(door.door_seed))
    bus = NatsBus(address, guest, f"guest {role}", reach=Reach(ca_pem=door.ca_pem, proxy=proxy))
    await bus.connect()
    try:
        answer = await bus.request(subjects.ENROL.pattern, codec.encode(asked), within_s=ENROL_S)
        enrolled = codec.enrolled.read(answer)
    except (BrokerLost, WireError) as error:
        raise StartFailed(f"the hub did not let us in: {error.message}") from None
    finally:
        await bus.close()
    return enrolled


class Renewal:
    """Replaces our credential in time, while calls go on; `renewed` is told of each new one."""

    def __init__(
        self, role: MemberRole, joined: Joined, bus: NatsBus, clock: Clock, renewed: Callable[[m.Enrolled], None] = lambda _: None
    ) -> None:
        self._renewed = renewed
        self._role: MemberRole = role
        self._joined = joined
        self._bus = bus
        self._clock = clock
        self._credential = joined.credentials.jwt
        self._warned = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            lives_s = _lives_s(self._credential, self._clock)
            if lives_s == float("inf"):
                return
            await asyncio.sleep(RENEW_EVERY_S_MIN)
            await self._until_due(lives_s)
            wait_s = RENEW_EVERY_S_MIN
            while not await self.renew():
                await asyncio.sleep(wait_s * random.uniform(1.0, 1.5))  # noqa: S311  (nothing secret)
                wait_s = min(RENEW_AGAIN_S, wait_s * 2)

    async def _until_due(self, lives_s: float) -> None:
        """Until most of the credential's life is over, by the machine's uptime or by the time of day, whichever is first."""
        due_ms = self._clock.now_ms() + (RENEW_AT * lives_s - RENEW_EVERY_S_MIN) * 1000
        rest_s = (1 - RENEW_AT) * lives_s
        while (left_s := min((due_ms - self._clock.now_ms()) / 1000, _lives_s(self._credential, self._clock) - rest_s)) > 0:
            await asyncio.sleep(min(RENEW_LOOK_S, left_s))

    async def renew(self) -> bool:
        """Ask for the next credential and use it; False if that didn't work, which is tried again."""
        key = self._joined.credentials.key
        try:
            enrolled = await self._asked() if self._bus.is_up() else await self._asked_at_the_door()
            if enrolled.failure is not None:
                if enrolled.failure.message != self._warned:
                    log.warning("the hub doesn't renew our credential: %s", enrolled.failure.message)
                self._warned = enrolled.failure.message
                return False
            await self._bus.renew(Credentials(enrolled.credential, key))
        except (BrokerLost, WireError, StartFailed) as error:
            log.info("our credential is not renewed yet: %s", error.message)
            return False
        self._credential, self._warned = enrolled.credential, ""
        self._keep(enrolled)
        self._renewed(enrolled)
        return True

    async def _asked(self) -> m.Enrolled:
        """Raises BrokerLost, WireError."""
        subject = subjects.renewal(self._role, self._joined.credentials.key.public)
        return codec.enrolled.read(await self._bus.request(subject, codec.encode(m.Renew()), within_s=RENEW_S))

    async def _asked_at_the_door(self) -> m.Enrolled:
        """For who was away for so long that the broker takes the credential no more. Raises StartFailed."""
        kept, joined = _read(self._joined.file), self._joined
        if kept is None:
            raise StartFailed(f"the broker can't be reached, and {joined.file}, which says how to join again, is gone")
        door = Invitation(addresses=kept.addresses, ca_pem=joined.reach.ca_pem, door_jwt=kept.door_jwt, door_seed=kept.door_seed)
        return await _enrol(self._role, door, joined.credentials.key, joined.address, joined.reach.proxy, self._clock)

    def _keep(self, enrolled: m.Enrolled) -> None:
        kept = _read(self._joined.file)
        if kept is None:
            return  # somebody took it away; the next start joins anew
        changed = msgspec.structs.replace(kept, **_given(enrolled))
        try:
            write_private(self._joined.file, msgspec.json.encode(changed).decode())
        except StartFailed as error:
            log.warning("%s; the next start asks for another credential", error.message)

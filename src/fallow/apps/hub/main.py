"""The hub's process: the broker as a child, kept alive; who takes part; keys, prices and plans."""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from fallow.adapters.certificates import TlsFiles, ca_pem, kept_certificate
from fallow.adapters.clock import SystemClock
from fallow.adapters.files import make_folder, only_one, write_private
from fallow.adapters.nats_bus import NatsBus, Reach, hear_refused_logins, push_accounts
from fallow.adapters.operator import LIFE_S_MAX, BrokerTrust, Operator
from fallow.adapters.price_record import PriceRecord
from fallow.adapters.sql.registry import open_registry
from fallow.apps.card_check import vouched_by
from fallow.apps.hub.card_desk import CardDesk
from fallow.apps.hub.distances import DistanceDesk
from fallow.apps.hub.enrolling import LIFE_S, EnrolDesk, watch_bans
from fallow.apps.hub.founding import found, invite_home, operator_folder, policy_of
from fallow.apps.hub.keeping import BrokerKeeper, Listening
from fallow.apps.hub.key_desk import KeyDesk
from fallow.apps.hub.listening import HubRoster
from fallow.apps.hub.placing import Placing
from fallow.apps.hub.price_desk import PriceDesk
from fallow.apps.hub.refusals import REFUSALS_FILE, Refusals, why_login_refused
from fallow.apps.hub.spending_desk import SpendingDesk
from fallow.apps.run import tell_ready
from fallow.apps.settings import HUB_FILE, HUB_TLS_FOLDER, INVITATION_FILE, Settings
from fallow.model import messages as m
from fallow.model.errors import BadSetting, StartFailed
from fallow.model.ids import NodeId, OrgId
from fallow.ports import Clock, Registry
from fallow.wire import codec, subjects

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
MARKET_ORG = OrgId("open")
"""Whom machines belong to that joined without an invitation."""

_WAITING = (
    "%d bans, or ends of bans, wait for the operator's key: until %s is back beside the others, the broker goes on as it was told last, "
    "and whose ban waits stays connected until its credential ends, within a day; it gets no other"
)

log = logging.getLogger("fallow.hub")


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """How the broker is reached: by others, and from here; `ca_pem` is empty without TLS, or if the certificate is a public one."""

    addresses: tuple[str, ...]
    here: str
    ca_pem: str = ""


class Hub:
    """All desks of a hub, on its two connections to the broker."""

    def __init__(
        self, settings: Settings, operator: Operator, registry: Registry, reached: Reached, clock: Clock, *, life_s: int = LIFE_S
    ) -> None:
        reach = Reach(ca_pem=reached.ca_pem)
        self.bus = NatsBus(reached.here, operator.hub_user(), "hub", reach=reach)
        self._system = NatsBus(reached.here, operator.system_user(), "hub system", reach=reach)
        self._operator = operator
        self._settings = settings
        self._registry = registry
        self._clock = clock
        self._life_s = life_s
        self.keeper: BrokerKeeper | None = None
        self._banned: Mapping[str, int] = {}
        self._trusted: BrokerTrust | None = None
        self._warned: frozenset[str] = frozenset()
        self._refusals = Refusals(settings.data / REFUSALS_FILE, clock)

    async def run(self, until: asyncio.Event, tell: "asyncio.Future[None]") -> None:
        """Until told; `tell` is set when all desks are open. Raises StartFailed, BrokerLost."""
        await self.bus.connect()
        await self._system.connect()
        issue = self._operator.credential
        open_to = MARKET_ORG if self._settings.hub.open else None
        enrolling = EnrolDesk(
            self.bus,
            self._registry,
            lambda role, public_key, life_s: issue(role, public_key, now_s=self._clock.wall_ms() // 1000, life_s=life_s),
            self._clock,
            open_to=open_to,
            vouch=self._operator.vouch,
            authority=self._operator.authority,
            hub_org_id=OrgId(self._settings.organisation.id),
            life_s=self._life_s,
            count=self._refusals.count,
        )
        cards = CardDesk(self._registry.cards, self._clock)
        keys = KeyDesk(self.bus, self._registry, self._clock, OrgId(self._settings.organisation.id))
        whose = vouched_by(self._operator.authority, self._clock)
        roster = HubRoster(self.bus, self._clock, org_of=whose, on_card=cards.take, count=self._refusals.count)
        prices = PriceDesk(self.bus, roster, PriceRecord(self._settings.data), self._clock)
        placing = Placing(self.bus, roster, self._clock)
        distances = DistanceDesk(self.bus, roster, self._clock, self._settings.organisation.country)
        async with asyncio.TaskGroup() as group:
            await enrolling.start(group)
            await keys.start(group)
            await SpendingDesk(self.bus, self._registry).start(group)
            await roster.start()
            await distances.start()
            await prices.start(group)
            await placing.start()
            await hear_refused_logins(self._system, self._count_login)
            watching = watch_bans(self._registry, self.put_out)
            runs = (roster.run(), prices.run(), placing.run(), keys.run(), cards.run(), self._refusals.run(), watching)
            desks = [group.create_task(one) for one in runs]
            desks.append(group.create_task(distances.run()))
            tell.set_result(None)
            await until.wait()
            for desk in desks:
                desk.cancel()

    def _count_login(self, credential: str) -> None:
        now_s = self._clock.wall_ms() // 1000
        self._refusals.count("login", why_login_refused(credential, self._operator.issuers, self._banned, now_s=now_s))

    async def put_out(self, banned: Mapping[str, int]) -> bool:
        """Tell the broker who is banned since when (UTC, ms): it ends their connections, and takes them no more. Raises FallowError.

        False if the operator's key must be back for some of it. What the broker was told already isn't said again.
        """
        if banned == self._banned and self._warned and not self._operator.key_file.exists():
            return False
        revoked = {public_key: at_ms // 1000 for public_key, at_ms in banned.items()}
        if self.keeper is not None:
            self.keeper.revoked = revoked
            self._trusted = self._trusted or self.keeper.trusted
        trust = await asyncio.to_thread(self._operator.trust, revoked, now_s=self._clock.wall_ms() // 1000)
        if self._trusted is None or trust.accounts != self._trusted.accounts:
            await push_accounts(self._system, trust.accounts.values())
        self._trusted, self._banned = trust, banned
        if not trust.unsigned <= self._warned:
            log.warning(_WAITING, len(trust.unsigned), self._operator.key_file)
        self._warned = trust.unsigned
        newest = sorted(banned.keys() - trust.unsigned, key=lambda public_key: -banned[public_key])[: m.PUT_OUT_MAX]
        await self.bus.publish(subjects.BANNED.pattern, codec.encode(m.PutOut(node_ids=tuple(map(NodeId, newest)))))
        return not trust.unsigned

    async def close(self) -> None:
        await self._system.close()
        await self.bus.close()


async def run_hub(settings: Settings, until: asyncio.Event, ready: int | None, *, life_s: int = LIFE_S) -> None:
    """Be the meeting point until told to stop; credentials live `life_s`. Raises StartFailed, StoreFailed or BadSetting."""
    policy_of(settings.key)
    if life_s > LIFE_S_MAX:
        raise BadSetting(
            f"credentials live for {LIFE_S_MAX} s at most: bans are forgotten by the broker when those have ended that they put out"
        )
    clock = SystemClock()
    with only_one(settings.data, "hub"), contextlib.ExitStack() as held:
        operator = Operator.open(operator_folder(settings.data))
        registry = await asyncio.to_thread(open_registry, settings.database)
        held.callback(registry.close)
        await asyncio.to_thread(found, settings, registry, now_ms=clock.wall_ms())
        async with asyncio.TaskGroup() as group:
            keeper, reached = await _broker(settings, operator, registry)
            keeping = None if keeper is None else group.create_task(keeper.keep(), name="broker")
            hub = Hub(settings, operator, registry, reached, clock, life_s=life_s)
            hub.keeper = keeper
            try:
                invite = functools.partial(invite_home, addresses=reached.addresses, ca_pem=reached.ca_pem, now_ms=clock.wall_ms())
                await asyncio.to_thread(invite, settings, registry, operator.door())
                write_private(settings.data / HUB_FILE, msgspec.json.encode({"addresses": reached.addresses}).decode())
                held.callback((settings.data / HUB_FILE).unlink, missing_ok=True)
                is_open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                is_open.add_done_callback(lambda _: tell_ready(ready, reached.here, _words(settings, reached)))
                await hub.run(until, is_open)
            finally:
                await hub.close()
                if keeping is not None:
                    keeping.cancel()


def _words(settings: Settings, reached: Reached) -> str:
    return (
        f"The hub is up at {', '.join(reached.addresses)}. On this machine gateways and nodes join by themselves "
        f"({settings.data / INVITATION_FILE}); `fallow hub invite` asks others in."
    )


async def _broker(settings: Settings, operator: Operator, registry: Registry) -> tuple[BrokerKeeper | None, Reached]:
    """A broker of our own, or the one that runs already."""
    if settings.hub.broker:
        return None, Reached(addresses=(settings.hub.broker,), here=settings.hub.broker)
    host, _, port = settings.hub.listen.rpartition(":")
    plain_host = host.strip("[]")
    tls, authority = (None, "") if plain_host in LOOPBACK or plain_host.startswith("127.") else _certificate(settings, plain_host)
    members = await asyncio.to_thread(registry.members.banned)
    revoked = {one.public_key: one.banned_at_ms // 1000 for one in members if one.banned_at_ms is not None}
    listening = Listening(host=host, port=int(port), websocket_port=settings.hub.websocket_port, tls=tls)
    keeper = BrokerKeeper(settings.data / "broker", listening, operator, revoked)
    address = await keeper.start()
    own_port = address.rpartition(":")[2]
    if tls is None:
        return keeper, Reached(addresses=(f"nats://{host}:{own_port}",), here=f"nats://{host}:{own_port}")
    addresses = [f"tls://{name}:{own_port}" for name in _names(settings, plain_host)]
    if settings.hub.websocket_port:
        addresses += [f"wss://{name}:{settings.hub.websocket_port}" for name in _names(settings, plain_host)]
    return keeper, Reached(addresses=tuple(addresses), here=addresses[0], ca_pem=authority)


def _names(settings: Settings, host: str) -> tuple[str, ...]:
    """By what others reach this machine."""
    if settings.hub.names:
        return settings.hub.names
    return (socket.gethostname(),) if host in ("0.0.0.0", "::", "") else (host,)  # noqa: S104


def _certificate(settings: Settings, host: str) -> tuple[TlsFiles, str]:
    """The one of the settings, or our own; raises StartFailed."""
    given, key = settings.hub.certificate, settings.hub.certificate_key
    if bool(given) != bool(key):
        raise StartFailed("hub.certificate and hub.certificate_key belong together; give both or none")
    if given:
        files = TlsFiles(certificate=Path(given).expanduser(), key=Path(key).expanduser())
        for path in (files.certificate, files.key):
            if not path.is_file():
                raise StartFailed(f"there is no file {path}, which the settings name as the broker's certificate or its key")
        return files, ""
    folder = make_folder(settings.data / HUB_TLS_FOLDER)
    files = kept_certificate(folder, [*_names(settings, host), "localhost", "127.0.0.1"])
    return files, ca_pem(folder)

"""The hub's process: the broker as a child, kept alive, and the keys."""

import asyncio
import hashlib
import hmac
import logging
from pathlib import Path

import msgspec

from fallow.adapters.broker import Broker, start_broker
from fallow.adapters.clock import SystemClock
from fallow.adapters.files import only_one, read_or_make
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.price_record import PriceRecord
from fallow.apps.hub.listening import GROUP, HubRoster
from fallow.apps.hub.placing import Placing
from fallow.apps.hub.price_desk import PriceDesk
from fallow.apps.run import tell_ready
from fallow.apps.settings import KEY_FILE, SECRET_FILE, Key, Settings
from fallow.core.needs import micro
from fallow.model import messages as m
from fallow.model.call import Allowance, Grant
from fallow.model.errors import BadSetting, BrokerLost, FallowError, WireError
from fallow.model.ids import KeyId, OrgId
from fallow.model.needs import Policy
from fallow.ports import Bus, Delivery
from fallow.wire import codec, subjects

KEY_PREFIX = "fk-"
USUAL = Policy()
GENEROUS = Allowance()
POLICY_BYTES_MAX = subjects.KEY.payload_bytes_max - 512
"""What a policy may take of the message in which gateways hear of it; the rest is room for ids and the allowance."""
RESTART_S_MIN = 0.2
RESTART_S_MAX = 30.0
HEALTHY_S = 10.0
"""A broker that lived this long is restarted without delay."""

log = logging.getLogger("fallow.hub")


class KeyDesk:
    """Answers gateways' questions about API keys."""

    def __init__(self, bus: Bus, key: str, org_id: OrgId, policy: Policy = USUAL, allowance: Allowance = GENEROUS) -> None:
        self._bus = bus
        self._digest = hashlib.sha256(key.encode()).digest()
        self._grant = Grant(key_id=KeyId("key-" + self._digest.hex()[:12]), org_id=org_id, policy=policy, allowance=allowance)
        self._group: asyncio.TaskGroup | None = None

    async def start(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        await self._bus.subscribe(subjects.KEY.pattern, self._on_query, group=GROUP)

    def _on_query(self, delivery: Delivery) -> None:
        try:
            query = codec.key_query.read(delivery.data)
        except WireError as error:
            log.warning("a key query was dropped: %s", error)
            return
        known = hmac.compare_digest(query.key_digest, self._digest)
        assert self._group is not None, "queries come only while the hub runs"
        self._group.create_task(self._answer(delivery.reply, m.KeyAnswer(grant=self._grant if known else None)))

    async def _answer(self, subject: str, answer: m.KeyAnswer) -> None:
        try:
            await self._bus.publish(subject, codec.encode(answer))
        except BrokerLost:
            log.debug("not answered: the broker is away")


def policy_of(key: Key) -> Policy:
    """What the settings allow the hub's key; raises BadSetting if it doesn't fit into a message."""
    policy = Policy(
        rings=frozenset(key.rings),
        partners=frozenset(map(OrgId, key.partners)),
        regions=frozenset(key.regions),
        countries=frozenset(key.countries),
        hardware=key.hardware or None,
        isolation=None if key.isolation == "none" else key.isolation,
        prefer=key.prefer,
        cost_max_micro=micro(key.max_cost) if key.max_cost else None,
        price_max_micro_per_munit=micro(key.max_price) if key.max_price else None,
    )
    size = len(msgspec.msgpack.encode(policy))
    if size > POLICY_BYTES_MAX:
        text = f"what the key allows takes {size} bytes, the limit is {POLICY_BYTES_MAX}: name fewer partners, regions or countries"
        raise BadSetting(f"settings.toml: key: {text}")
    return policy


def allowance_of(key: Key) -> Allowance:
    """How much the settings let the hub's key ask for at a time."""
    return Allowance(
        concurrency_max=key.concurrency,
        calls_per_minute=key.calls_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        weight=key.weight,
    )


class BrokerKeeper:
    """A broker of our own that comes back on the same port when it dies."""

    def __init__(self, folder: Path, host: str, port: int, secret: str) -> None:
        self._folder = folder
        self._host = host
        self._port = port
        self._secret = secret
        self._broker: Broker | None = None

    async def start(self) -> str:
        """Raises StartFailed or MissingExtra; returns the address."""
        self._broker = await start_broker(self._folder, host=self._host, port=self._port, secret=self._secret)
        self._port = int(self._broker.address.rpartition(":")[2])
        return f"nats://{self._host}:{self._port}"

    async def keep(self) -> None:
        """Restart it whenever it ends, until cancelled."""
        wait_s = RESTART_S_MIN
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                if self._broker is not None:
                    code = await self._broker.wait()
                    log.warning("the broker ended with code %d; it is started again", code)
                self._broker = None
                wait_s = RESTART_S_MIN if loop.time() - began > HEALTHY_S else min(RESTART_S_MAX, wait_s * 2)
                await asyncio.sleep(wait_s)
                try:
                    await self.start()
                except (FallowError, OSError) as error:
                    log.warning("%s; it is tried again", error)
        finally:
            if self._broker is not None:
                await asyncio.shield(self._broker.stop())


async def run_hub(settings: Settings, secret: str, secret_in: str, until: asyncio.Event, ready: int | None) -> None:
    """Be the meeting point until told to stop; raises StartFailed or BadSetting.

    Without a `secret` one is made; `secret_in` says where it is from.
    """
    policy = policy_of(settings.key)
    with only_one(settings.data, "hub"):
        key = read_or_make(settings.data / KEY_FILE, prefix=KEY_PREFIX)
        secret = secret or read_or_make(settings.data / SECRET_FILE)
        secret_in = secret_in or str(settings.data / SECRET_FILE)
        async with asyncio.TaskGroup() as group:
            keeping: asyncio.Task[None] | None = None
            address = settings.hub.broker
            if not address:
                host, _, port = settings.hub.listen.rpartition(":")
                keeper = BrokerKeeper(settings.data / "broker", host, int(port), secret)
                address = await keeper.start()
                keeping = group.create_task(keeper.keep(), name="broker")
            bus = NatsBus(address, secret, "hub")
            desks: list[asyncio.Task[None]] = []
            try:
                await bus.connect()
                await KeyDesk(bus, key, OrgId(settings.organisation.id), policy, allowance_of(settings.key)).start(group)
                clock = SystemClock()
                roster = HubRoster(bus, clock)
                await roster.start()
                desks.append(group.create_task(roster.run(), name="roster"))
                prices = PriceDesk(bus, roster, PriceRecord(settings.data), clock)
                await prices.start(group)
                desks.append(group.create_task(prices.run(), name="prices"))
                placing = Placing(bus, roster, clock)
                await placing.start()
                desks.append(group.create_task(placing.run(), name="placing"))
                tell_ready(ready, address, f"The hub is up: nodes and gateways join with --hub {address} and the secret in {secret_in}")
                await until.wait()
            finally:
                for desk in desks:
                    desk.cancel()
                await bus.close()
                if keeping is not None:
                    keeping.cancel()

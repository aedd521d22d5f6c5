"""The hub's process: the broker as a child, kept alive, and the keys."""

import asyncio
import hashlib
import hmac
import logging
from pathlib import Path

from fallow.adapters.broker import Broker, start_broker
from fallow.adapters.files import only_one, read_or_make
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.run import tell_ready
from fallow.apps.settings import KEY_FILE, SECRET_FILE, Settings
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, FallowError, WireError
from fallow.model.ids import KeyId, OrgId
from fallow.ports import Bus, Delivery
from fallow.wire import codec, subjects

KEY_PREFIX = "fk-"
GROUP = "hub"
RESTART_S_MIN = 0.2
RESTART_S_MAX = 30.0
HEALTHY_S = 10.0
"""A broker that lived this long is restarted without delay."""

log = logging.getLogger("fallow.hub")


class KeyDesk:
    """Answers gateways' questions about API keys."""

    def __init__(self, bus: Bus, key: str, org_id: OrgId) -> None:
        self._bus = bus
        self._digest = hashlib.sha256(key.encode()).digest()
        self._grant = Grant(key_id=KeyId("key-" + self._digest.hex()[:12]), org_id=org_id)
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
    """Be the meeting point until told to stop; raises StartFailed. Without a `secret` one is made; `secret_in` says where it is from."""
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
            try:
                await bus.connect()
                await KeyDesk(bus, key, OrgId(settings.organisation.id)).start(group)
                tell_ready(ready, address, f"The hub is up: nodes and gateways join with --hub {address} and the secret in {secret_in}")
                await until.wait()
            finally:
                await bus.close()
                if keeping is not None:
                    keeping.cancel()

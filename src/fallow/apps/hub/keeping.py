"""The hub's own broker: a child process that comes back on the same ports when it dies, with all who were put out still out."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from fallow.adapters.broker import Broker, start_broker
from fallow.adapters.certificates import TlsFiles
from fallow.adapters.operator import BrokerTrust, Operator
from fallow.model.errors import FallowError

RESTART_S_MIN = 0.2
RESTART_S_MAX = 30.0
HEALTHY_S = 10.0
"""A broker that lived this long is restarted without delay."""

log = logging.getLogger("fallow.hub")


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Where a broker listens, and with which certificate; None: in plain, on this machine only."""

    host: str
    port: int
    websocket_port: int = 0
    tls: TlsFiles | None = None


class BrokerKeeper:
    """A broker of our own. `revoked` are the keys that were put out, with the UTC seconds since when.

    `trusted` is what the broker was started with.
    """

    def __init__(self, folder: Path, listening: Listening, operator: Operator, revoked: Mapping[str, int]) -> None:
        self._folder = folder
        self._listening = listening
        self._operator = operator
        self._broker: Broker | None = None
        self.revoked = revoked
        self.trusted: BrokerTrust | None = None

    async def start(self) -> str:
        """Raises StartFailed or MissingExtra; returns the address at which this machine reaches it."""
        where = self._listening
        trust = self._operator.trust(self.revoked)
        self._broker = await start_broker(
            self._folder,
            host=where.host,
            port=where.port,
            trust=trust,
            tls=where.tls,
            websocket_port=where.websocket_port or None,
        )
        self.trusted = trust
        port = int(self._broker.address.rpartition(":")[2])
        self._listening = msgspec.structs.replace(where, port=port)
        return self._broker.address

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

"""The gateway's process."""

import asyncio
import gc
import secrets
from typing import Any

import msgspec

from fallow.adapters.clock import SystemClock
from fallow.adapters.files import only_one, write_private
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.gateway.admin import Admin, make_admin
from fallow.apps.gateway.caller import Receive, Scope, Send
from fallow.apps.gateway.calls import Calls
from fallow.apps.gateway.demand import DemandCount
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.history import History
from fallow.apps.gateway.http import Api
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.prices import Prices
from fallow.apps.gateway.roster import Roster
from fallow.apps.gateway.server import listen, make_server
from fallow.apps.run import tell_ready
from fallow.apps.settings import ADDRESS_FILE, Settings
from fallow.core.relay import BusLost
from fallow.model.ids import GatewayId
from fallow.model.needs import COUNTRY_UNKNOWN
from fallow.ports import Bus, Clock


class Gateway:
    """All parts of a gateway on a bus; `app` is the ASGI application."""

    def __init__(self, gateway_id: GatewayId, bus: Bus, clock: Clock, country: str = COUNTRY_UNKNOWN) -> None:
        metrics = Metrics()
        self.bus = bus
        self.exchange = Exchange(gateway_id, bus, clock)
        self.roster = Roster(gateway_id, bus, clock)
        self.keys = Keys(bus, clock)
        self.calls = Calls(self.exchange, self.roster, clock, metrics)
        self.history = History(clock)
        self.prices = Prices(bus)
        self.demand = DemandCount(gateway_id, bus, clock)
        self.api = Api(gateway_id, self.calls, self.keys, self.roster, self.history, clock, metrics, country, self.prices, self.demand)
        self._admin: Any = make_admin(Admin(self.exchange, self.roster, self.keys, bus, clock, metrics))

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The hot paths go straight to the API, everything else to Litestar."""
        await (self.api if scope["path"].startswith("/v1/") else self._admin)(scope, receive, send)

    async def run(self, until: asyncio.Event) -> None:
        """Keep the timers going until told."""
        async with asyncio.TaskGroup() as group:
            self.calls.group = group
            await self.exchange.start()
            await self.roster.start()
            await self.prices.start()
            self.bus.on_lost(self.roster.forget_all)
            sweep = group.create_task(self.exchange.sweep(self._refresh), name="sweep")
            reports = group.create_task(self.demand.run(), name="demand")
            await until.wait()
            sweep.cancel()
            reports.cancel()

    async def _refresh(self) -> None:
        self.history.forget_old()
        await self.roster.refresh()

    def end_calls(self) -> None:
        """Take no more calls, and end those under way with a word."""
        self.api.stopping = True
        self.exchange.end_all(BusLost(code="gateway_stopping", message="the gateway is being stopped"))


async def run_gateway(settings: Settings, hub: str, secret: str, until: asyncio.Event, ready: int | None) -> None:
    """Serve HTTP until told to stop; raises StartFailed."""
    with only_one(settings.data, "gateway"):
        listener = listen(settings.gateway.host, settings.gateway.port)
        host, port = listener.getsockname()[:2]
        base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        gateway_id = GatewayId("gw-" + secrets.token_hex(6))
        bus = NatsBus(hub, secret, gateway_id)
        await bus.connect()
        gateway = Gateway(gateway_id, bus, SystemClock(), settings.organisation.country)
        server = make_server(gateway.app, gateway.end_calls)
        closing = asyncio.Event()
        address = settings.data / ADDRESS_FILE
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run(closing), name="gateway")
                serving = group.create_task(_serve(server, listener), name="http")
                write_private(address, msgspec.json.encode({"base_url": base_url}).decode())
                gc.freeze()
                tell_ready(
                    ready, base_url, f"The gateway answers at {base_url}; its API description is at {base_url.removesuffix('/v1')}/docs"
                )
                await until.wait()
                server.should_exit = True
                await serving
                closing.set()
        finally:
            address.unlink(missing_ok=True)
            await bus.close()


async def _serve(server: Any, listener: Any) -> None:
    # `_serve` is `serve` without taking over the process's signals, which are ours.
    await server._serve([listener])

"""The gateway's process."""

import asyncio
import contextlib
import gc
from typing import Any

import msgspec

from fallow.adapters.clock import SystemClock
from fallow.adapters.files import only_one, write_private
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.card_check import OrgOf, Verify, vouched_by
from fallow.apps.gateway.admin import Admin, make_admin
from fallow.apps.gateway.bans import hear_bans
from fallow.apps.gateway.caller import Receive, Scope, Send
from fallow.apps.gateway.calls import Calls
from fallow.apps.gateway.demand import DemandCount
from fallow.apps.gateway.distances import distances_of
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.history import History
from fallow.apps.gateway.http import Api
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.prices import Prices
from fallow.apps.gateway.roster import Roster
from fallow.apps.gateway.server import listen, make_server
from fallow.apps.gateway.sessions import Asker, KemVerifies, Sessions, kem_check
from fallow.apps.gateway.spending import SpendingReports
from fallow.apps.joining import Renewal, join
from fallow.apps.run import GATEWAY_DRAIN_S, Stop, tell_draining, tell_ready
from fallow.apps.settings import ADDRESS_FILE, Settings
from fallow.core.relay import BusLost
from fallow.model.ids import GatewayId
from fallow.model.messages import Enrolled, Hello
from fallow.model.needs import COUNTRY_UNKNOWN
from fallow.ports import Bus, Clock
from fallow.wire.invitation import Invitation
from fallow.wire.sign import card_verifies


class Gateway:
    """All parts of a gateway on a bus; `app` is the ASGI application."""

    def __init__(
        self,
        asker: Asker,
        bus: Bus,
        clock: Clock,
        country: str = COUNTRY_UNKNOWN,
        *,
        org_of: OrgOf,
        verify: Verify = card_verifies,
        verify_kem: KemVerifies | None = None,
    ) -> None:
        metrics = Metrics()
        gateway_id = asker.hello.gateway_id
        self.bus = bus
        self.sessions = Sessions(asker, bus, clock, lambda node_id: self.roster.kem(node_id), verify_kem or kem_check(clock))
        self.exchange = Exchange(bus, clock, self.sessions)
        self.exchange.refused = metrics.answer_refused
        self.roster = Roster(gateway_id, bus, clock, verify=verify, org_of=org_of, refused=metrics.card_refused)
        self.distances = distances_of(self.exchange, self.roster, bus, clock, country)
        self.keys = Keys(gateway_id, bus, clock)
        self.calls = Calls(self.exchange, self.roster, clock, metrics)
        self.history = History(clock)
        self.prices = Prices(bus)
        self.demand = DemandCount(gateway_id, bus, clock)
        self.spending = SpendingReports(gateway_id, self.calls.purses, bus, clock)
        self.api = Api(gateway_id, self.calls, self.keys, self.roster, self.history, clock, metrics, country, self.prices, self.demand)
        self._admin: Any = make_admin(Admin(self.exchange, self.roster, self.keys, bus, clock, metrics))

    def renewed(self, enrolled: Enrolled) -> None:
        """The hub vouches for us anew."""
        self.sessions.asker = self.sessions.asker.renewed(enrolled.membership, enrolled.expires_at_s)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The hot paths go straight to the API, everything else to Litestar."""
        await (self.api if scope["path"].startswith("/v1/") else self._admin)(scope, receive, send)

    async def run(self, until: asyncio.Event) -> None:
        """Keep the timers going until told."""
        async with asyncio.TaskGroup() as group:
            self.calls.use(group)
            await self.exchange.start()
            await self.keys.start()
            await hear_bans(self.bus, self.roster.forget)
            await self.roster.start()
            await self.prices.start()
            self.bus.on_lost(self.roster.forget_all)
            sweep = group.create_task(self.exchange.sweep(self._refresh), name="sweep")
            reports = group.create_task(self.demand.run(), name="demand")
            distances = group.create_task(self.distances.run(), name="distances")
            spending = group.create_task(self.spending.run(), name="spending")
            await until.wait()
            sweep.cancel()
            reports.cancel()
            distances.cancel()
            spending.cancel()
            await self.spending.report_last()

    async def _refresh(self) -> None:
        self.history.forget_old()
        self.calls.turns.changed()
        self.api.repeats.forget_old()
        await self.roster.refresh()

    async def drain(self, now: asyncio.Event, within_s: float) -> None:
        """Take no more calls, and end those that are still under way after so long, or as soon as `now` is set."""
        self.api.stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await now.wait()
        self.end_calls()

    def end_calls(self) -> None:
        """Take no more calls, and end those under way with a word."""
        self.api.stopping = True
        self.calls.turns.stop()
        self.exchange.end_all(BusLost(code="gateway_stopping", message="the gateway is being stopped"))


async def run_gateway(settings: Settings, hub: str, invited: Invitation | None, stop: Stop, ready: int | None) -> None:
    """Serve HTTP until told to stop, and what is open then to its end; raises StartFailed, NotAdmitted.

    Port and data folder are let go at once, so that the next gateway can start while this one drains.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(only_one(settings.data, "gateway"))
        listener = listen(settings.gateway.host, settings.gateway.port)
        host, port = listener.getsockname()[:2]
        base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        clock = SystemClock()
        joined = await join(settings.data, "gateway", invited, hub, settings.network.proxy, clock)
        gateway_id = GatewayId(joined.credentials.key.public)
        bus = NatsBus(joined.address, joined.credentials, gateway_id, reach=joined.reach)
        await bus.connect()
        hello = Hello(gateway_id=gateway_id, org_id=joined.org_id, member_until_s=joined.member_until_s, membership=joined.membership)
        asker = Asker(hello, joined.credentials.key.sign, is_hubs=joined.org_id == joined.hub_org_id)
        gateway = Gateway(asker, bus, clock, settings.organisation.country, org_of=vouched_by(joined.authority, clock))
        renewal = Renewal("gateway", joined, bus, clock, gateway.renewed)

        async def drain() -> None:
            held.close()
            if gateway.api.calls_now:
                tell_draining(GATEWAY_DRAIN_S)
            await gateway.drain(stop.now, GATEWAY_DRAIN_S)

        server = make_server(gateway.app, drain, drain_s=GATEWAY_DRAIN_S)
        closing = asyncio.Event()
        address = settings.data / ADDRESS_FILE
        held.callback(address.unlink, missing_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(gateway.run(closing), name="gateway")
                serving = group.create_task(_serve(server, listener), name="http")
                renewing = group.create_task(renewal.run(), name="renewal")
                write_private(address, msgspec.json.encode({"base_url": base_url}).decode())
                gc.freeze()
                tell_ready(
                    ready, base_url, f"The gateway answers at {base_url}; its API description is at {base_url.removesuffix('/v1')}/docs"
                )
                await stop.asked.wait()
                server.should_exit = True
                await serving
                renewing.cancel()
                closing.set()
        finally:
            await bus.close()


async def _serve(server: Any, listener: Any) -> None:
    # `_serve` is `serve` without taking over the process's signals, which are ours.
    await server._serve([listener])

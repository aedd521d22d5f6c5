"""The gateway's other pages: probes, metrics, the roster, and what the API looks like."""

from typing import Annotated, Any

from litestar import Litestar, MediaType, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import HeaderParameter

from fallow import __version__
from fallow.apps.gateway import docs_page, errors, openapi
from fallow.apps.gateway.caller import as_bearer
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.roster import Roster
from fallow.core.roster import Member, load_of
from fallow.model.errors import Failure, FallowError
from fallow.model.ids import NodeId
from fallow.model.offer import Offer
from fallow.model.views import GatewayStatus, Health, NodeList, NodeView, OfferView
from fallow.ports import Bus, Clock
from fallow.wire import openai as wire

Authorization = Annotated[str, HeaderParameter(name="authorization", required=False, description="`Bearer KEY`")]
ApiKey = Annotated[str, HeaderParameter(name="x-api-key", required=False, description="The key alone, instead of `Authorization`")]


class Admin:
    """What the pages show."""

    def __init__(self, exchange: Exchange, roster: Roster, keys: Keys, bus: Bus, clock: Clock, metrics: Metrics) -> None:
        self.exchange = exchange
        self.roster = roster
        self.keys = keys
        self.bus = bus
        self.clock = clock
        self.metrics = metrics

    async def check(self, authorization: str, api_key: str) -> None:
        """Whether the key may see the pages; raises InvalidApiKey."""
        await self.keys.check(authorization.encode("latin-1", "replace") or as_bearer(api_key.encode("latin-1", "replace")))

    def nodes(self) -> list[NodeView]:
        now = self.clock.now_ms()
        return [_node(node_id, member, now) for node_id, member in sorted(self.roster.members().items()) if member.card is not None]

    def missing(self) -> str:
        """What keeps the gateway from answering calls; empty if nothing does."""
        if not self.bus.is_up():
            return "the broker can't be reached"
        return "" if self.roster.offers() else "no node offers anything yet"


def _node(node_id: NodeId, member: Member, now_ms: int) -> NodeView:
    card = member.card
    assert card is not None, "strangers aren't shown"
    return NodeView(
        node_id=node_id,
        org_id=card.org_id,
        state=member.state,
        hardware=card.hardware.summary(),
        isolation=card.isolation,
        region=card.region,
        heard_ms_ago=now_ms - member.heard_at_ms,
        offers=[_offer(offer, member) for offer in member.offers],
    )


def _offer(offer: Offer, member: Member) -> OfferView:
    load = load_of(member, offer.model)
    return OfferView(
        model=offer.model,
        readiness=load.readiness if load else "cold",
        slots=offer.slots,
        slots_free=load.slots_free if load else 0,
        waiting=load.waiting if load else 0,
        context_tokens=offer.context_tokens,
    )


def make_admin(admin: Admin) -> Litestar:
    """The pages as an ASGI app."""

    @get("/healthz", summary="Is the process alive?", tags=["probes"])
    async def healthz() -> Health:
        return Health(ok=True)

    @get("/readyz", summary="Can calls be answered?", tags=["probes"])
    async def readyz() -> Response[Health]:
        reason = admin.missing()
        return Response(Health(ok=not reason, reason=reason), status_code=503 if reason else 200)

    @get("/metrics", summary="Counters for Prometheus", media_type=MediaType.TEXT, tags=["probes"])
    async def metrics() -> str:
        admin.metrics.under_way.set(admin.exchange.under_way)
        admin.metrics.nodes.set(len(admin.roster.members()))
        return admin.metrics.text().decode()

    @get("/fallow/nodes", summary="The nodes on the roster", tags=["network"])
    async def nodes(authorization: Authorization = "", api_key: ApiKey = "") -> NodeList:
        await admin.check(authorization, api_key)
        return NodeList(nodes=admin.nodes())

    @get("/fallow/status", summary="How this gateway is", tags=["network"])
    async def status(authorization: Authorization = "", api_key: ApiKey = "") -> GatewayStatus:
        await admin.check(authorization, api_key)
        return GatewayStatus(
            gateway_id=admin.exchange.gateway_id,
            version=__version__,
            broker_up=admin.bus.is_up(),
            calls_under_way=admin.exchange.under_way,
            nodes=len(admin.nodes()),
        )

    @get("/openapi.json", include_in_schema=False)
    async def schema(request: Request[Any, Any, Any]) -> dict[str, Any]:
        return openapi.with_calls(request.app.openapi_schema.to_schema())

    @get(["/", "/docs"], include_in_schema=False, media_type=MediaType.HTML)
    async def docs(request: Request[Any, Any, Any]) -> str:
        return docs_page.render(openapi.with_calls(request.app.openapi_schema.to_schema()))

    return Litestar(
        [healthz, readyz, metrics, nodes, status, schema, docs],
        openapi_config=OpenAPIConfig(
            title="Fallow",
            version=__version__,
            path="/.litestar",
            components=Components(
                security_schemes={
                    "key": SecurityScheme(type="http", scheme="bearer"),
                    "api_key": SecurityScheme(type="apiKey", name="x-api-key", security_scheme_in="header"),
                }
            ),
        ),
        logging_config=None,
        exception_handlers={FallowError: _fallow_error, HTTPException: _http_error, Exception: _any_error},
    )


def _fallow_error(_: Request[Any, Any, Any], error: FallowError) -> Response[bytes]:
    return _envelope(error.failure())


def _http_error(_: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    codes = {404: "unknown_path", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
    return _envelope(Failure(code=code, message=f"{error.detail}; see /openapi.json for what there is"))


def _any_error(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return _envelope(Failure(code="internal_error", message="the gateway failed on this request"))


def _envelope(failure: Failure) -> Response[bytes]:
    status, kind = errors.status_of(failure)
    retry_after = errors.retry_after_s(failure)
    headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
    return Response(wire.error_body(failure, kind), status_code=status, media_type=MediaType.JSON, headers=headers)

"""The hot paths of the API, as plain ASGI: read no more than is needed, refuse early, write little."""

import asyncio
import logging

import msgspec

from fallow.apps.gateway.caller import CallerGone, HttpCaller, Receive, Scope, Send
from fallow.apps.gateway.calls import Calls
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.roster import Roster
from fallow.core.admit import admit_call
from fallow.model.call import Call, Grant
from fallow.model.errors import Failure, FallowError
from fallow.model.ids import GatewayId
from fallow.model.needs import Needs, ServiceTier
from fallow.ports import Clock
from fallow.wire import openai

CALL_PATHS = frozenset({openai.CHAT, openai.COMPLETIONS})
TIERS: dict[openai.Tier, ServiceTier] = {
    "auto": "default",
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
}
CLIENT_CLOSED = 499

log = logging.getLogger("fallow.gateway")
_json = msgspec.json.Encoder()


class Api:
    """`/v1/…`."""

    def __init__(self, gateway_id: GatewayId, calls: Calls, keys: Keys, roster: Roster, clock: Clock, metrics: Metrics) -> None:
        self._gateway_id = gateway_id
        self._calls = calls
        self._keys = keys
        self._roster = roster
        self._clock = clock
        self._metrics = metrics
        self._bodies_bytes = 0
        self.calls_now = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpCaller(scope, receive, send, self._metrics)
        try:
            status = await self._answer(exchange)
        except CallerGone:
            status = CLIENT_CLOSED
        except FallowError as error:
            status = await exchange.fail(error.failure())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (the outermost loop: one call's fault is one call's; its text may hold a prompt)
            log.error("call %s broke: %s", exchange.call_id, type(error).__name__)
            status = await exchange.fail(Failure(code="internal_error", message="the gateway failed on this call"))
        usage = exchange.outcome.usage
        self._metrics.call_ended(status, usage.prompt_tokens if usage else 0, usage.output_tokens if usage else 0)

    async def _answer(self, http: HttpCaller) -> int:
        if self.stopping:
            return await http.fail(Failure(code="gateway_stopping", message="the gateway is being stopped"))
        authorization = http.incoming.header(b"authorization")
        grant = self._keys.recall(authorization) or await self._keys.check(authorization)
        path, method = http.incoming.path, http.incoming.method
        if path in CALL_PATHS:
            return await self._call(http, grant) if method == "POST" else await http.fail(_method(method, "POST"))
        if path == openai.MODELS:
            return await http.reply(200, self._models()) if method == "GET" else await http.fail(_method(method, "GET"))
        if path.startswith(openai.MODELS + "/"):
            if method != "GET":
                return await http.fail(_method(method, "GET"))
            return await self._model(http, path.removeprefix(openai.MODELS + "/"))
        return await http.fail(Failure(code="unknown_path", message=f"there is no {path[:200]}; see /openapi.json for what there is"))

    async def _call(self, http: HttpCaller, grant: Grant) -> int:
        size = http.incoming.declared_bytes()
        refusal = admit_call(calls=self.calls_now, bodies_bytes=self._bodies_bytes, size=size)
        if refusal is not None:
            return await http.fail(refusal)
        self.calls_now += 1
        self._bodies_bytes += size
        try:
            body = await http.incoming.body()
            self._bodies_bytes -= size - len(body)
            size = len(body)
            call = self._read(http, grant, body)
            http.outcome = outcome = await self._calls.run(call, body, http)
            if outcome.failure is not None:
                return await http.fail(outcome.failure)
            return CLIENT_CLOSED if outcome.left else http.status
        finally:
            self.calls_now -= 1
            self._bodies_bytes -= size

    def _read(self, http: HttpCaller, grant: Grant, body: bytes) -> Call:
        head = openai.read_head(body)
        needs = Needs(
            model=head.model,
            prompt_tokens=len(body) // openai.BYTES_PER_TOKEN,
            output_tokens_max=head.output_tokens_max,
            service_tier=TIERS[head.service_tier or "default"],
        )
        return Call(
            id=http.call_id,
            org_id=grant.org_id,
            key_id=grant.key_id,
            gateway_id=self._gateway_id,
            path=http.incoming.path,
            stream=bool(head.stream),
            body_bytes=len(body),
            needs=needs,
            arrived_at_ms=self._clock.wall_ms(),
        )

    def _models(self) -> bytes:
        names = sorted({c.offer.model for c in self._roster.candidates()})
        return _json.encode(openai.ModelList(data=[openai.Model(id=name, created=0, owned_by="fallow") for name in names]))

    async def _model(self, http: HttpCaller, name: str) -> int:
        if any(c.offer.model == name for c in self._roster.candidates()):
            return await http.reply(200, _json.encode(openai.Model(id=name, created=0, owned_by="fallow")))
        return await http.fail(Failure(code="model_not_found", message=f"the model {name[:200]!r} is not offered here", param="model"))


def _method(method: str, wanted: str) -> Failure:
    return Failure(code="method_not_allowed", message=f"{method} is not possible here; use {wanted}")

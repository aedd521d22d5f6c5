"""The hot paths of the API, as plain ASGI: read no more than is needed, refuse early, write little."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from fallow.apps.gateway.caller import CallerGone, HttpCaller, Receive, Scope, Send
from fallow.apps.gateway.calls import Calls
from fallow.apps.gateway.demand import DemandCount
from fallow.apps.gateway.history import History
from fallow.apps.gateway.keys import Keys
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.prices import PATH as PRICES
from fallow.apps.gateway.prices import Prices
from fallow.apps.gateway.quotes import Quotes
from fallow.apps.gateway.roster import Roster
from fallow.core.admit import admit_call
from fallow.core.needs import needs_of
from fallow.model.call import Call, Grant
from fallow.model.errors import Failure, FallowError
from fallow.model.ids import GatewayId
from fallow.ports import Clock
from fallow.wire import models_api, openai, quote_request, wishes

CLIENT_CLOSED = 499

log = logging.getLogger("fallow.gateway")
_json = msgspec.json.Encoder()


class Api:
    """`/v1/…`."""

    def __init__(
        self,
        gateway_id: GatewayId,
        calls: Calls,
        keys: Keys,
        roster: Roster,
        history: History,
        clock: Clock,
        metrics: Metrics,
        country: str,
        prices: Prices,
        demand: DemandCount,
    ) -> None:
        self._gateway_id = gateway_id
        self._calls = calls
        self._keys = keys
        self._roster = roster
        self._history = history
        self._clock = clock
        self._metrics = metrics
        self._country = country
        self._prices = prices
        self._demand = demand
        self._quotes = Quotes(roster)
        self._bodies_bytes = 0
        self.calls_now = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpCaller(scope, receive, send, self._metrics)
        status = CLIENT_CLOSED
        try:
            status = await self._answer(exchange)
        except CallerGone:
            pass
        except FallowError as error:
            status = await exchange.fail(error.failure())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  (the outermost loop: one call's fault is one call's; its text may hold a prompt)
            log.error("call %s broke: %s", exchange.call_id, type(error).__name__)
            status = await exchange.fail(Failure(code="internal_error", message="the gateway failed on this call"))
        finally:
            if exchange.story is not None:
                left = status == CLIENT_CLOSED
                self._history.end(exchange.call_id, http_status=exchange.status, left=left, usage=exchange.outcome.usage)
        usage = exchange.outcome.usage
        self._metrics.call_ended(status, usage.prompt_tokens if usage else 0, usage.output_tokens if usage else 0)

    async def _answer(self, http: HttpCaller) -> int:
        if self.stopping:
            return await http.fail(Failure(code="gateway_stopping", message="the gateway is being stopped"))
        authorization = http.incoming.authorization()
        grant = self._keys.recall(authorization) or await self._keys.check(authorization)
        path, method = http.incoming.path, http.incoming.method
        if path in openai.HEADS or path == quote_request.PATH:
            if method != "POST":
                return await http.fail(_method(method, "POST"))
            return await (self._quote(http, grant) if path == quote_request.PATH else self._call(http, grant))
        if path in (openai.MODELS, PRICES) or path.startswith((openai.MODELS + "/", openai.CALLS + "/", PRICES + "/")):
            return await self._look_up(http, grant, path) if method == "GET" else await http.fail(_method(method, "GET"))
        return await http.fail(Failure(code="unknown_path", message=f"there is no {path[:200]}; see /openapi.json for what there is"))

    async def _look_up(self, http: HttpCaller, grant: Grant, path: str) -> int:
        if path == openai.MODELS:
            return await http.reply(200, _json.encode(self._models(http)))
        if path.startswith(openai.CALLS):
            return await self._story(http, grant, path.removeprefix(openai.CALLS + "/"))
        if path.startswith(PRICES):
            found = await self._prices.answer(path)
            return await (http.fail(found) if isinstance(found, Failure) else http.reply(200, found))
        return await self._model(http, path.removeprefix(openai.MODELS + "/"))

    async def _call(self, http: HttpCaller, grant: Grant) -> int:
        http.story = self._history.begin(http.call_id, grant.org_id, http.incoming.path, began_ns=http.arrived_ns)

        async def run(body: bytes) -> int:
            call = self._read(http, grant, http.incoming.path, body, http.incoming.lines)
            if isinstance(call, Failure):
                return await http.fail(call)
            self._demand.asked(call)
            http.outcome = outcome = await self._calls.run(call, body, http)
            self._demand.ended(call, outcome, http.story)
            if outcome.failure is not None:
                return await http.fail(outcome.failure)
            return CLIENT_CLOSED if outcome.left else http.status

        return await self._taken(http, run)

    async def _quote(self, http: HttpCaller, grant: Grant) -> int:
        """A call's body, and what it would cost."""

        async def tell(body: bytes) -> int:
            lines = http.incoming.lines
            path = quote_request.path_of(body, lines, self._quotes.offered)
            call = self._read(http, grant, path, body, quote_request.without_path(lines))
            found = call if isinstance(call, Failure) else self._quotes.answer(call)
            return await (http.fail(found) if isinstance(found, Failure) else http.reply(200, found))

        return await self._taken(http, tell)

    async def _taken(self, http: HttpCaller, answer: Callable[[bytes], Awaitable[int]]) -> int:
        """The request's body within the limits, and what is made of it."""
        http.load_wait_ms = http.incoming.load_wait_ms()
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
            return await answer(body)
        finally:
            self.calls_now -= 1
            self._bodies_bytes -= size

    def _read(self, http: HttpCaller, grant: Grant, path: str, body: bytes, lines: wishes.Lines) -> Call | Failure:
        head = openai.read_head(path, body)
        if http.story is not None:
            http.story.names(head.model, streams=bool(head.stream))
        asked = openai.asked_of(head, len(body.rstrip()), lines)
        arrived_at_ms = self._clock.wall_ms()
        needs = needs_of(asked, grant.policy, now_ms=arrived_at_ms)
        if isinstance(needs, Failure):
            return needs
        return Call(
            id=http.call_id,
            org_id=grant.org_id,
            key_id=grant.key_id,
            gateway_id=self._gateway_id,
            path=path,
            stream=bool(head.stream),
            body_bytes=len(body),
            needs=needs,
            arrived_at_ms=arrived_at_ms,
            country=self._country,
        )

    def _contexts(self) -> dict[str, int]:
        """The models on offer, each with the longest context."""
        found: dict[str, int] = {}
        for offer in self._roster.offers():
            found[offer.model] = max(offer.context_tokens, found.get(offer.model, 0))
        return found

    def _models(self, http: HttpCaller) -> Any:
        contexts = self._contexts()
        if http.incoming.header(b"anthropic-version"):
            return models_api.model_list(contexts)
        return openai.ModelList(data=[self._listed(name) for name in sorted(contexts)])

    async def _model(self, http: HttpCaller, name: str) -> int:
        context_tokens = self._contexts().get(name)
        if context_tokens is None:
            return await http.fail(Failure(code="model_not_found", message=f"the model {name[:200]!r} is not offered here", param="model"))
        if http.incoming.header(b"anthropic-version"):
            return await http.reply(200, _json.encode(models_api.model_info(name, context_tokens)))
        return await http.reply(200, _json.encode(self._listed(name)))

    def _listed(self, name: str) -> openai.Model:
        paths = {path for offer in self._roster.offers() if offer.model == name for path in offer.paths}
        return openai.Model(id=name, created=0, owned_by="fallow", endpoints=sorted(paths))

    async def _story(self, http: HttpCaller, grant: Grant, call_id: str) -> int:
        view = self._history.view(call_id, grant.org_id)
        if view is None:
            text = "nothing is known of this call; calls are remembered for an hour, by the gateway that took them"
            return await http.fail(Failure(code="call_not_found", message=text))
        return await http.reply(200, _json.encode(view))


def _method(method: str, wanted: str) -> Failure:
    return Failure(code="method_not_allowed", message=f"{method} is not possible here; use {wanted}")

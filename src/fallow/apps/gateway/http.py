"""The hot paths of the API, as plain ASGI: read no more than is needed, refuse early, write little."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec

from fallow.apps.gateway.attempts import Outcome
from fallow.apps.gateway.caller import CallerGone, HttpCaller, Receive, Scope, Send
from fallow.apps.gateway.calls import Calls
from fallow.apps.gateway.demand import DemandCount
from fallow.apps.gateway.history import History
from fallow.apps.gateway.keys import Keys, other_model
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.prices import PATH as PRICES
from fallow.apps.gateway.prices import Prices
from fallow.apps.gateway.quotes import Quotes
from fallow.apps.gateway.repeats import Repeats
from fallow.apps.gateway.roster import Roster
from fallow.core import allowance
from fallow.core.admit import GATEWAY_RETRY_AFTER_MS, admit_call
from fallow.core.needs import needs_of
from fallow.model.call import Allowance, Call, Grant
from fallow.model.errors import Failure, FallowError
from fallow.model.ids import GatewayId
from fallow.model.receipt import Usage
from fallow.ports import Clock
from fallow.wire import models_api, openai, quote_request, wishes

CLIENT_CLOSED = 499
QUERY_FIELDS_MAX = 8
_UNLIMITED = Allowance()
log = logging.getLogger("fallow.gateway")
_json = msgspec.json.Encoder()


class Catalogue:
    """The models on offer, as OpenAI's and Anthropic's clients list them."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def _contexts(self, grant: Grant) -> dict[str, int]:
        """The models on offer that the key allows, each with the longest context."""
        found: dict[str, int] = {}
        for offer in self._roster.offers():
            if grant.models and offer.model not in grant.models:
                continue
            found[offer.model] = max(offer.context_tokens, found.get(offer.model, 0))
        return found

    def all(self, http: HttpCaller, grant: Grant) -> Any:
        """The list that the caller's client reads."""
        contexts = self._contexts(grant)
        if http.incoming.header(b"anthropic-version"):
            return models_api.model_list(contexts)
        return openai.ModelList(data=[self._listed(name) for name in sorted(contexts)])

    async def one(self, http: HttpCaller, grant: Grant, name: str) -> int:
        """Tell the caller of one model."""
        barred = other_model(grant, name)
        if barred is not None:
            return await http.fail(barred)
        context_tokens = self._contexts(grant).get(name)
        if context_tokens is None:
            return await http.fail(Failure(code="model_not_found", message=f"the model {name[:200]!r} is not offered here", param="model"))
        if http.incoming.header(b"anthropic-version"):
            return await http.reply(200, _json.encode(models_api.model_info(name, context_tokens)))
        return await http.reply(200, _json.encode(self._listed(name)))

    def _listed(self, name: str) -> openai.Model:
        paths = {path for offer in self._roster.offers() if offer.model == name for path in offer.paths}
        return openai.Model(id=name, created=0, owned_by="fallow", endpoints=sorted(paths))


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
        self._catalogue = Catalogue(roster)
        self._history = history
        history.turn_of = calls.turns.waiting
        self._clock = clock
        self._metrics = metrics
        self._country = country
        self._prices = prices
        self._demand = demand
        self._quotes = Quotes(roster)
        self.repeats = Repeats(clock)
        self._accounts = allowance.Accounts()
        self._all = allowance.NOTHING
        self._bodies_bytes = 0
        self.calls_now = 0
        self.stopping = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpCaller(scope, receive, send, self._metrics)
        status = CLIENT_CLOSED
        try:
            status = await self._answer(exchange, scope)
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
            if exchange.is_repeat:
                self._history.retract(exchange.call_id)
            elif exchange.story is not None:
                left = status == CLIENT_CLOSED
                self._history.end(exchange.call_id, http_status=exchange.status, left=left, usage=exchange.outcome.usage)
        usage = exchange.outcome.usage
        self._metrics.call_ended(status, usage.prompt_tokens if usage else 0, usage.output_tokens if usage else 0)

    async def _answer(self, http: HttpCaller, scope: Scope) -> int:
        if self.stopping:
            return await http.fail(Failure(code="gateway_stopping", message="the gateway is being stopped"))
        authorization = http.incoming.authorization()
        grant = self._keys.recall(authorization) or await self._keys.check(authorization)
        path, method = http.incoming.path, http.incoming.method
        if path in openai.HEADS or path == quote_request.PATH:
            if method != "POST":
                return await http.fail(_method(method, "POST"))
            return await self._allowed(http, grant, self._quote if path == quote_request.PATH else self._call)
        if path == openai.CALLS and method == "GET":
            return await self._waiting(http, grant, scope["query_string"])
        if path in (openai.MODELS, openai.CALLS, PRICES) or path.startswith((openai.MODELS + "/", openai.CALLS + "/", PRICES + "/")):
            return await self._look_up(http, grant, path) if method == "GET" else await http.fail(_method(method, "GET"))
        return await http.fail(Failure(code="unknown_path", message=f"there is no {path[:200]}; see /openapi.json for what there is"))

    async def _look_up(self, http: HttpCaller, grant: Grant, path: str) -> int:
        if path == openai.MODELS:
            return await http.reply(200, _json.encode(self._catalogue.all(http, grant)))
        if path.startswith(openai.CALLS):
            return await self._story(http, grant, path.removeprefix(openai.CALLS + "/"))
        if path.startswith(PRICES):
            found = await self._prices.answer(path)
            return await (http.fail(found) if isinstance(found, Failure) else http.reply(200, found))
        return await self._catalogue.one(http, grant, path.removeprefix(openai.MODELS + "/"))

    async def _allowed(self, http: HttpCaller, grant: Grant, answer: Callable[[HttpCaller, Grant], Awaitable[int]]) -> int:
        """What comes of a request for which the key has room; else it is refused before its body is read, and leaves no story."""
        key, began_s = (grant.org_id, grant.key_id), self._now_s()
        refusal = self._accounts.begin(key, grant.allowance, now_s=began_s)
        if refusal is not None:
            return await http.fail(refusal)
        try:
            return await answer(http, grant)
        finally:
            self._accounts.end(key, lasted_s=self._now_s() - began_s)

    async def _call(self, http: HttpCaller, grant: Grant) -> int:
        http.story = self._history.begin(http.call_id, grant.org_id, http.incoming.path, began_ns=http.arrived_ns)

        async def run(body: bytes) -> int:
            call = self._read(http, grant, http.incoming.path, body, http.incoming.lines)
            if isinstance(call, Failure):
                return await http.fail(call)
            self._demand.asked(call)
            self._spend(call, call.needs.prompt_tokens)
            run_it = self._calls.run if call.budget_micro is None else self._run_in_budget
            http.outcome = outcome = await run_it(call, body, http)
            self._spend(call, _tokens(call, outcome) - call.needs.prompt_tokens)
            self._demand.ended(call, outcome, http.story)
            if outcome.failure is not None:
                return await http.fail(outcome.failure)
            return CLIENT_CLOSED if outcome.left else http.status

        return await self._taken(http, lambda body: self.repeats.answer(http, grant, body, run))

    async def _run_in_budget(self, call: Call, body: bytes, http: HttpCaller) -> Outcome:
        """The call's outcome; what it cost, as its story tells it, is charged to its key however it ends."""
        usage: Usage | None = None
        try:
            outcome = await self._calls.run(call, body, http)
            usage = outcome.usage
            return outcome
        finally:
            self._calls.settle(call, None if http.story is None else http.story.cost_pico(usage))

    async def _quote(self, http: HttpCaller, grant: Grant) -> int:
        """A call's body, and what it would cost."""

        async def tell(body: bytes) -> int:
            lines = http.incoming.lines
            path = quote_request.path_of(body, lines, self._quotes.offered)
            call = self._read(http, grant, path, body, quote_request.without_path(lines))
            found = call if isinstance(call, Failure) else self._quotes.answer(call)
            return await (http.fail(found) if isinstance(found, Failure) else http.reply(200, found))

        return await self._taken(http, lambda body: self.repeats.answer(http, grant, body, tell))

    async def _taken(self, http: HttpCaller, answer: Callable[[bytes], Awaitable[int]]) -> int:
        """The request's body within the limits, and what is made of it."""
        http.load_wait_ms = http.incoming.load_wait_ms()
        size = http.incoming.declared_bytes()
        again_ms = GATEWAY_RETRY_AFTER_MS if self._all.mean_s is None else allowance.next_end_ms(self._all)
        refusal = admit_call(calls=self.calls_now, bodies_bytes=self._bodies_bytes, size=size, retry_after_ms=again_ms)
        if refusal is not None:
            self._all = allowance.refused(self._all)
            return await http.fail(refusal)
        began_s = self._now_s()
        self.calls_now += 1
        self._all = allowance.begun(self._all, _UNLIMITED, now_s=began_s)
        self._bodies_bytes += size
        try:
            body = await http.incoming.body()
            self._bodies_bytes -= size - len(body)
            size = len(body)
            return await answer(body)
        finally:
            self.calls_now -= 1
            self._all = allowance.ended(self._all, lasted_s=self._now_s() - began_s)
            self._bodies_bytes -= size

    def _spend(self, call: Call, tokens: int) -> None:
        self._accounts.spend((call.org_id, call.key_id), call.allowance, tokens, now_s=self._now_s())

    def _now_s(self) -> float:
        return self._clock.now_ms() / 1000

    def _read(self, http: HttpCaller, grant: Grant, path: str, body: bytes, lines: wishes.Lines) -> Call | Failure:
        head = openai.read_head(path, body)
        if http.story is not None:
            http.story.names(head.model, streams=bool(head.stream))
        barred = other_model(grant, head.model)
        if barred is not None:
            return barred
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
            stream=bool(head.stream) and needs.privacy != "whole",
            body_bytes=len(body),
            needs=needs,
            arrived_at_ms=arrived_at_ms,
            country=self._country,
            allowance=grant.allowance,
            budget_micro=grant.budget_micro,
            spent_micro=grant.spent_micro,
        )

    async def _waiting(self, http: HttpCaller, grant: Grant, query: bytes) -> int:
        """`/v1/calls?state=waiting`."""
        try:
            state = parse_qs(query.decode("ascii"), max_num_fields=QUERY_FIELDS_MAX).get("state", [])
        except ValueError:
            state = []
        if state != ["waiting"]:
            text = "of your calls those that wait can be listed: `?state=waiting`; one that you know the id of is at /v1/calls/{id}"
            return await http.fail(Failure(code="invalid_request", message=text, param="state"))
        return await http.reply(200, _json.encode(self._history.waiting(grant.org_id)))

    async def _story(self, http: HttpCaller, grant: Grant, call_id: str) -> int:
        view = self._history.view(call_id, grant.org_id)
        if view is None:
            text = "nothing is known of this call; calls are remembered for an hour, by the gateway that took them"
            return await http.fail(Failure(code="call_not_found", message=text))
        return await http.reply(200, _json.encode(view))


def _tokens(call: Call, outcome: Outcome) -> int:
    """What a call took of its key's tokens: what was counted, its prompt if nobody counted, nothing if it failed before an answer."""
    if outcome.usage is not None:
        return outcome.usage.prompt_tokens + outcome.usage.output_tokens
    return 0 if outcome.failure is not None and not outcome.started else call.needs.prompt_tokens


def _method(method: str, wanted: str) -> Failure:
    return Failure(code="method_not_allowed", message=f"{method} is not possible here; use {wanted}")

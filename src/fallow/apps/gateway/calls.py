"""A call's way through the gateway: match, ask, relay; and on elsewhere if a node fails."""

import asyncio
import secrets

import msgspec

from fallow.apps.gateway.attempts import Attempts, Caller, Errand, Outcome
from fallow.apps.gateway.delivery import Delivery
from fallow.apps.gateway.errors import refused
from fallow.apps.gateway.exchange import Exchange
from fallow.apps.gateway.metrics import Metrics
from fallow.apps.gateway.race import Race
from fallow.apps.gateway.roster import Roster
from fallow.apps.gateway.turns import Left, Turns
from fallow.core import hedge, prefix
from fallow.core.budget import Purses
from fallow.core.match import survey
from fallow.core.match.decide import match
from fallow.core.retry import try_elsewhere
from fallow.model.call import Call
from fallow.model.errors import Failure
from fallow.model.ids import NodeId
from fallow.model.quote import Place, Refuse, Wait
from fallow.model.receipt import Usage
from fallow.ports import Clock

MOVE_S_MAX = 10.0
MOVE_LOOK_S = 0.25
"""So long an answer that broke off waits for a node that can go on with it, and a call for the broker to come back; and looks so often."""
LOSER_S = 1.0
"""How long the attempt that lost a race may take to end."""
WAITING_MAX = 1_000
"""Calls that wait here for a better moment; each holds its body."""
WAITING_RETRY_AFTER_MS = 10_000


class Calls:
    """Runs calls."""

    def __init__(self, exchange: Exchange, roster: Roster, clock: Clock, metrics: Metrics) -> None:
        self._attempts = Attempts(exchange, roster, clock)
        self._roster = roster
        self._clock = clock
        self._metrics = metrics
        self._salt = secrets.token_bytes(16)
        self._waiting = 0
        self.turns = Turns(roster.market, clock)
        self.purses = Purses()
        self._ration = hedge.Ration()

    def use(self, group: asyncio.TaskGroup) -> None:
        """Where attempts' helpers run."""
        self._attempts.group = group

    async def run(self, call: Call, body: bytes, caller: Caller) -> Outcome:
        """Until the answer is out, the caller left, or nothing can be done."""
        failures: tuple[Failure, ...] = ()
        tried: set[NodeId] = set()
        last: NodeId | None = None
        call = self._known(call, body)
        delivery = Delivery(call.path, stream=call.stream)
        broke_at_s, is_lost = 0.0, False
        while True:
            try:
                full = await self.turns.take(call, caller.gone, caller.waits, at_once=bool(failures))
            except Left:
                return Outcome(left=True, attempts=len(failures), node_id=last)
            if full is not None:
                return Outcome(failure=failures[-1] if failures else full, attempts=len(failures), node_id=last, started=delivery.has_begun)
            usage: Usage | None = Usage()
            try:
                now, only_free = self._roster.moment(), delivery.has_begun or self.turns.is_shared(call)
                decision = match(call, self._roster.market, tried=tried, now=now, attempt=len(failures) + 1, only_free=only_free)
                over = self._over_budget(call, decision)
                if over is None and isinstance(decision, Place):
                    last = decision.node_id
                    tried.add(last)
                    usage = None
                    outcome = await self._try(Errand(call, body, caller, delivery), decision, tried, number=len(failures) + 1)
                    usage = outcome.usage
            finally:
                self.turns.give_back(call, usage)
            if over is not None:
                return Outcome(failure=over, attempts=len(failures), node_id=last, started=delivery.has_begun)
            if isinstance(decision, Wait):
                ended = await self._wait(decision, caller)
                if ended is not None:
                    return ended
                continue
            if isinstance(decision, Refuse):
                may_pass = decision.retry_after_ms and (delivery.has_begun or is_lost)
                if may_pass and self._clock.now_ms() / 1000 - broke_at_s < MOVE_S_MAX:
                    tried.clear()  # a machine that is back is better than none
                    await asyncio.sleep(MOVE_LOOK_S)
                    continue
                failure = failures[-1] if failures else refused(decision, call.needs.model)
                return Outcome(failure=failure, attempts=len(failures), node_id=last, started=delivery.has_begun)
            caller.tried(outcome.failure)
            if outcome.failure is None:
                return outcome
            failures = (*failures, outcome.failure)
            self._metrics.attempt_failed(outcome.failure.code)
            if not try_elsewhere(failures, started=outcome.started, can_continue=outcome.started and delivery.pieces() is not None):
                return outcome
            is_lost = outcome.failure.code == "broker_lost"
            if is_lost:
                tried.discard(decision.node_id)  # that was no node's doing
            broke_at_s = self._clock.now_ms() / 1000
            if outcome.started:
                call = msgspec.structs.replace(call, needs=msgspec.structs.replace(call.needs, service_tier="default", strict=False))

    async def _try(self, errand: Errand, place: Place, tried: set[NodeId], *, number: int) -> Outcome:
        """One attempt; or two at once, if the first token of a priority call is late."""
        race, call = Race(), errand.call
        late_ms = None if errand.delivery.has_begun else hedge.after_ms(call, place.quote)
        if late_ms is None:
            return await self._attempts.make(errand, place, number=number, race=race)
        running = {asyncio.create_task(self._attempts.make(errand, place, number=number, race=race))}
        try:
            done, _ = await asyncio.wait(running, timeout=late_ms / 1000)
            ration = hedge.spend(self._ration)
            if not done and race.winner is None and ration is not None:
                other = match(call, self._roster.market, tried=tried, now=self._roster.moment(), attempt=number + 1)
                if isinstance(other, Place) and self._over_budget(call, other) is None:
                    self._ration = ration
                    tried.add(other.node_id)
                    running.add(asyncio.create_task(self._attempts.make(errand, other, number=number + 1, race=race)))
            outcomes: list[Outcome] = []
            while running and not any(outcome.failure is None and not outcome.lost for outcome in outcomes):
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                outcomes += [task.result() for task in done]
            if running:
                await asyncio.wait(running, timeout=LOSER_S)  # it tells its node to stop
            return next((outcome for outcome in outcomes if not outcome.lost and outcome.failure is None), None) or next(
                outcome for outcome in outcomes if not outcome.lost
            )
        finally:
            for task in running:
                task.cancel()

    def _over_budget(self, call: Call, decision: Place | Refuse | Wait) -> Failure | None:
        """Why the call doesn't fit into its key's budget at this place; what it can cost there is set aside if it does."""
        if call.budget_micro is None or not isinstance(decision, Place):
            return None
        return self.purses.hold(call, decision.quote.cost_max_micro, now_ms=self._clock.now_ms())

    def settle(self, call: Call, cost_pico: int | None) -> None:
        """The call is over, and cost so much; None if nobody counted."""
        self.purses.settle(call, cost_pico or 0, now_ms=self._clock.now_ms())

    def _known(self, call: Call, body: bytes) -> Call:
        """The call with the fingerprint of its beginning, counted as demand."""
        now = self._roster.moment()
        call = msgspec.structs.replace(call, prefix=prefix.blocks(body, salt=self._salt))
        demand = survey.wanted(call, self._roster.market, now)
        if demand is not None:
            self._roster.market.asked(call, demand, now_s=now.at_s)
        self._ration = hedge.earn(self._ration)
        return call

    async def _wait(self, decision: Wait, caller: Caller) -> Outcome | None:
        """Until the call is to be asked again, which is None; or the caller left, or too many wait."""
        if self._waiting >= WAITING_MAX:
            text = f"{WAITING_MAX} calls wait here already; try again later, or without `service_tier: flex`"
            return Outcome(failure=Failure(code="no_capacity", message=text, retry_after_ms=WAITING_RETRY_AFTER_MS))
        caller.waits(decision.why)
        self._waiting += 1
        try:
            async with asyncio.timeout(decision.for_ms / 1000):
                await caller.gone()
            return Outcome(left=True)
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1

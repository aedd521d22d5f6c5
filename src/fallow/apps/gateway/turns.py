"""Whose call is sent now: where a model's slots are taken, calls wait here, in fair order, and not in the nodes' own queues."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import numpy as np

from fallow.core.allowance import KeyName
from fallow.core.fair import ACTIVE_S, Fair, Room
from fallow.core.match.columns import GONE
from fallow.core.match.market import Market
from fallow.core.needs import is_hasty
from fallow.model.call import Call
from fallow.model.errors import Failure, shortened
from fallow.model.ids import CallId
from fallow.model.receipt import Usage
from fallow.model.views import Waiting
from fallow.ports import Clock

TURNS_MAX = 2_000
"""Calls that wait here, of all keys and models; each holds its body."""
TURN_S_MAX = 60.0
"""How long a call waits for its turn at most."""
FLEX_TURN_S_MAX = 600.0
"""The same for a call of the tier flex. OpenAI's own clients give up then."""
TARGET_SHARE = 0.5
"""The part of the time to its first token that a call in a hurry may wait: a call that waits longer is late, and so are those behind it."""
NODE_QUEUE = 1
"""How many calls beyond its slot are sent to a machine that has one, while a single key is active: nobody else could be served
sooner, and the slot doesn't idle for a round trip. With several slots the others work on meanwhile, and with several keys a call
that waits at a node waits where sharing isn't fair."""
BLIP_S = 3.0
"""How long calls go on waiting while nothing is offered; then matching tells them what is wrong."""


class Left(Exception):
    """The caller closed the connection while the call waited; its place is free."""


class Turn(NamedTuple):
    """A call that may be sent. There is no lane where nothing is offered: matching says what is wrong then."""

    lane: "Lane | None"
    key: KeyName
    prompt: float
    began_s: float


class Place(msgspec.Struct, kw_only=True):
    """A call that waits. Ringing the bell ends its wait."""

    lane: "Lane"
    call: Call
    bell: asyncio.Timeout | None = None
    is_given: bool = False
    is_stopped: bool = False

    def ring(self) -> None:
        """End the wait, if it isn't ending already."""
        if self.bell is not None and not self.bell.expired():
            self.bell.reschedule(asyncio.get_running_loop().time())


class Lane:
    """The queue for one model, or for a family of models. Free slots are counted now and then, and kept up to date between.

    `alone` is the room that a key has which is the only one.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.fair = Fair()
        self.places: dict[CallId, Place] = {}
        self.room = self.alone = Room(0, 0)
        self.is_counted = False
        self.used_s = 0.0
        self.empty_s: float | None = None
        """Since when nothing is offered, while calls wait."""

    def count(self, market: Market) -> None:
        """Look at the offers: live ones give their slots, less what is known to be there or on its way."""
        slots = free = alone = free_alone = ours = 0.0
        for shelf in market.shelves(self.model):
            c = shelf.columns.part(0, len(shelf.nodes))
            live = c.stop == 0
            most = np.minimum(c.slots, c.room)[live]
            more = np.where(most == 1, np.minimum(c.room[live], 1 + NODE_QUEUE), most)
            held = c.held[live]
            slots, free = slots + float(most.sum()), free + float(np.maximum(0, most - held).sum())
            alone, free_alone = alone + float(more.sum()), free_alone + float(np.maximum(0, more - held).sum())
            ours += float((c.streams + c.reading)[c.stop != GONE].sum())
        coming = max(0.0, self.fair.running - ours)  # they have their turn, and no node knows of them yet
        self.room = Room(int(slots), int(free - coming))
        self.alone = Room(int(alone), int(free_alone - coming))
        self.is_counted = True

    def room_of(self, key: KeyName, now_s: float) -> Room:
        return self.room if self.fair.others_active(key, now_s=now_s) else self.alone

    def moved(self, by: int) -> None:
        """So many slots were freed."""
        self.room = Room(self.room.slots, min(self.room.slots, self.room.free + by))
        self.alone = Room(self.alone.slots, min(self.alone.slots, self.alone.free + by))


class Turns:
    """All lanes. A call takes a turn before each attempt and gives it back when the attempt has ended and the market knows of it."""

    def __init__(self, market: Market, clock: Clock) -> None:
        self._market = market
        self._clock = clock
        self._lanes: dict[str, Lane] = {}
        self._given: dict[CallId, list[Turn]] = {}
        self._places: dict[CallId, Place] = {}
        self._waits: Counter[KeyName] = Counter()

    def __len__(self) -> int:
        """How many calls wait."""
        return len(self._places)

    async def take(
        self,
        call: Call,
        caller_gone: Callable[[], Awaitable[None]],
        waits: Callable[[str], None] | None = None,
        *,
        at_once: bool = False,
    ) -> Failure | None:
        """None when the call may be sent, which is then to be given back; a Failure if too many wait or it would take too long.

        Raises Left if `caller_gone` returns first. `waits` is told why, if the call has to wait. What breaks off in the middle of an
        answer goes on `at_once`: it has waited before.
        """
        now_s = self._clock.now_ms() / 1000
        key = (call.org_id, call.key_id)
        lane = self._lane(call.needs.model, now_s)
        if lane is None or lane.room.slots <= 0:
            self._hold(call, Turn(None, key, 0.0, now_s))
            return None
        room = None if at_once else lane.room_of(key, now_s)
        if lane.fair.start(key, room, prompt=call.needs.prompt_tokens, weight=call.allowance.weight, now_s=now_s):
            lane.moved(-1)
            self._hold(call, Turn(lane, key, call.needs.prompt_tokens, now_s))
            return None
        return self._full(lane, call, key) or await self._wait(lane, call, key, caller_gone, waits)

    def give_back(self, call: Call, usage: Usage | None) -> None:
        """The attempt has ended; `usage` is None if nobody knows what it took. Whoever is next may start."""
        mine = self._given[call.id]
        turn = mine.pop()
        if not mine:
            del self._given[call.id]
        lane = turn.lane
        if lane is None:
            return
        now_s = self._clock.now_ms() / 1000
        read = None if usage is None else float(usage.prompt_tokens - min(usage.prompt_tokens, usage.cached_tokens))
        wrote = None if usage is None else float(usage.output_tokens)
        lane.fair.ended(turn.key, prompt=turn.prompt, read=read, wrote=wrote, lasted_s=max(0.0, now_s - turn.began_s), now_s=now_s)
        lane.used_s = now_s
        lane.moved(1)
        self._wake(lane, now_s)

    def changed(self) -> None:
        """Offers or loads changed: look again who may start."""
        now_s = self._clock.now_ms() / 1000
        for model, lane in list(self._lanes.items()):
            if lane.places:
                self._wake(lane, now_s, anew=True)
            elif not lane.fair.running and now_s - lane.used_s > ACTIVE_S:
                del self._lanes[model]
            else:
                lane.is_counted = False

    def stop(self) -> None:
        """The gateway stops: all that wait are told so."""
        for place in self._places.values():
            place.is_stopped = True
            place.ring()

    def is_shared(self, call: Call) -> bool:
        """Whether other keys want slots for the same model, or did of late."""
        lane = self._lanes.get(call.needs.model)
        return lane is not None and lane.fair.others_active((call.org_id, call.key_id), now_s=self._clock.now_ms() / 1000)

    def waiting(self, call_id: str) -> Waiting | None:
        """What a call that waits for its turn can know; None if it doesn't."""
        place = self._places.get(CallId(call_id))
        if place is None or place.is_given:
            return None
        fair = place.lane.fair
        position = fair.position(place.call.id)
        estimate_s = fair.estimate_s(position)
        return Waiting(position=position, estimate_s=None if estimate_s is None else round(estimate_s, 1), why=_why(place.lane))

    def _lane(self, model: str, now_s: float) -> Lane | None:
        lane = self._lanes.get(model)
        if lane is None:
            if not self._market.shelves(model):
                return None
            lane = self._lanes[model] = Lane(model)
        if not lane.is_counted:
            lane.count(self._market)
        lane.used_s = now_s
        return lane

    def _hold(self, call: Call, turn: Turn) -> None:
        self._given.setdefault(call.id, []).append(turn)

    def _full(self, lane: Lane, call: Call, key: KeyName) -> Failure | None:
        if len(self._places) >= TURNS_MAX:
            text = f"{TURNS_MAX} calls wait at this gateway already; fewer may come at a time, or more machines be lent"
            return Failure(code="too_many_calls", message=text, retry_after_ms=_ms(lane.fair.estimate_s(1)))
        if self._waits[key] >= call.allowance.waiting_max:
            text = f"{call.allowance.waiting_max} calls of your key wait for a slot, which is its limit; wait for one to start"
            return Failure(code="rate_limit_exceeded", message=text, retry_after_ms=_ms(lane.fair.estimate_s(max(1, len(self._waits)))))
        return None

    async def _wait(
        self,
        lane: Lane,
        call: Call,
        key: KeyName,
        caller_gone: Callable[[], Awaitable[None]],
        waits: Callable[[str], None] | None,
    ) -> Failure | None:
        """Until it is the call's turn."""
        tier, allowance = call.needs.service_tier, call.allowance
        place = Place(lane=lane, call=call)
        lane.fair.wait(call.id, key, tier=tier, prompt=call.needs.prompt_tokens, weight=allowance.weight)
        lane.places[call.id] = self._places[call.id] = place
        self._waits[key] += 1
        try:
            self._wake(lane, self._clock.now_ms() / 1000)
            if place.is_given:
                return None
            limit_s = _limit_s(call, self._clock.wall_ms())
            estimate_s = lane.fair.estimate_s(lane.fair.position(call.id))
            if estimate_s is not None and estimate_s > limit_s:
                return _too_late(lane, limit_s, estimate_s)
            if waits is not None:
                waits(_why(lane))
            async with asyncio.timeout(limit_s) as place.bell:
                await caller_gone()
            raise Left
        except TimeoutError:
            if place.is_given:
                return None
            if place.is_stopped:
                return Failure(code="gateway_stopping", message="the gateway is being stopped")
            return _too_late(lane, limit_s, lane.fair.estimate_s(lane.fair.position(call.id)))
        except BaseException:
            if place.is_given:
                self.give_back(call, Usage())  # the turn wasn't used: it costs the key nothing
            raise
        finally:
            if not place.is_given:
                self._take_out(place)
                lane.fair.leave(call.id, now_s=self._clock.now_ms() / 1000)

    def _wake(self, lane: Lane, now_s: float, *, anew: bool = False) -> None:
        """Let start whoever may."""
        if anew or not lane.is_counted:
            lane.count(self._market)
        while lane.places:
            some = next(iter(lane.places.values())).call
            call_id = lane.fair.next(self._room(lane, (some.org_id, some.key_id), now_s), now_s=now_s)
            if call_id is None:
                return
            place = lane.places[call_id]
            self._take_out(place)
            place.is_given = True
            lane.moved(-1)
            self._hold(place.call, Turn(lane, (place.call.org_id, place.call.key_id), place.call.needs.prompt_tokens, now_s))
            place.ring()

    def _room(self, lane: Lane, key: KeyName, now_s: float) -> Room:
        """What the key may use, if it waits alone; where nothing has been offered for a while all may go and be told so."""
        if lane.room.slots > 0:
            lane.empty_s = None
            return lane.room_of(key, now_s)
        lane.empty_s = now_s if lane.empty_s is None else lane.empty_s
        return Room(0, int(now_s - lane.empty_s >= BLIP_S))

    def _take_out(self, place: Place) -> None:
        key = (place.call.org_id, place.call.key_id)
        del place.lane.places[place.call.id], self._places[place.call.id]
        self._waits[key] -= 1
        if not self._waits[key]:
            del self._waits[key]


def _limit_s(call: Call, wall_ms: int) -> float:
    """How long the call may wait; one in a hurry no longer than leaves time for its first token to come when it is wanted."""
    needs = call.needs
    limit_s = FLEX_TURN_S_MAX if needs.service_tier == "flex" else TURN_S_MAX
    if needs.first_token_within_ms is not None and (needs.strict or is_hasty(needs)):
        limit_s = min(limit_s, TARGET_SHARE * needs.first_token_within_ms / 1000)
    deadline_at_ms = needs.deadline_at_ms
    return limit_s if deadline_at_ms is None else max(0.0, min(limit_s, (deadline_at_ms - wall_ms) / 1000))


def _why(lane: Lane) -> str:
    if lane.room.free > 0:
        return "the free slots are kept for other keys that called lately"
    return f"all {lane.room.slots} slots for this model are taken"


def _too_late(lane: Lane, limit_s: float, estimate_s: float | None) -> Failure:
    """It would take longer than it may. Who comes when enough others have started will find a place."""
    wait = "" if estimate_s is None else f", and this one would wait about {estimate_s:.0f} s"
    text = f"{len(lane.fair)} calls wait for {shortened(lane.model)!r}{wait}; the limit is {limit_s:.0f} s: give it more time, or wait"
    over_s = None if estimate_s is None else max(1.0, estimate_s - limit_s)
    return Failure(code="no_capacity", message=text, retry_after_ms=_ms(over_s))


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(1000 * seconds))

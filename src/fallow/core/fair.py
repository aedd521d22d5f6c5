"""Whose call starts next where work waits: shares between keys by the work that was done for them, and a slot kept for the others.

The Virtual Token Counter (Sheng et al., OSDI'24): a key's counter grows by w_in for each token of its prompts and w_out for each of
its answers, divided by its weight, and the key with the least goes first. One that comes back is lifted to the least of those that
wait, or to the last that started if nobody waits: who was idle has saved up nothing. Between two keys that always wait, the work
done differs by no more than 2 * w_out * M, where M is the most tokens under way at once (a call has at most a slot's part of it).

Answers are long and slots are few, so two things are added. A slot is kept free for each key that was active lately and has nothing
here: else a key that floods would let it wait for a long answer each time. And a waiting key that runs nothing goes before those
that do if it asks for one call at a time, or as long as it is ahead of the least by no more than the other slots' work, which stays
within the bound.
"""

from collections import OrderedDict
from math import ceil, floor
from typing import NamedTuple

import msgspec

from fallow.core.allowance import KeyName
from fallow.model.ids import CallId
from fallow.model.needs import ServiceTier

W_IN = 1.0
W_OUT = 2.0
ACTIVE_S = 30.0
"""A key counts as active for so long after its last call ended."""
KEPT_SHARE = 0.5
"""No more than this part of the slots is kept free, but one where there are two or more."""
KEYS_MAX = 1_024
"""Keys remembered beyond those that run or wait; the longest idle is forgotten first. It comes back as a newcomer."""
LEARN_RATE = 0.1
"""How far one call moves what is believed of the next."""
FADE = 0.99
"""What is believed of the largest call, and of the pace, is forgotten by this factor with every call."""
ATTEMPT_S_MIN = 0.1
"""What comes to nothing sooner than that says nothing of how long calls take."""
COST_GUESS = 500.0
"""What a call costs, in weighted tokens, until one was seen."""

TIERS: dict[ServiceTier, int] = {"priority": 0, "default": 1, "flex": 2}
"""The order of one key's calls; between keys the tier doesn't count, or everybody would ask for the first."""


class Ticket(NamedTuple):
    """A call that waits."""

    key: KeyName
    tier: int
    prompt: float
    number: int


class Share(msgspec.Struct, kw_only=True):
    """What a key was given (`counter`, in weighted tokens by its weight), what it runs, and what of it waits, by tier and arrival."""

    counter: float = 0.0
    weight: float = 1.0
    running: int = 0
    queues: tuple[dict[CallId, Ticket], ...] = msgspec.field(default_factory=lambda: tuple({} for _ in TIERS))

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues))

    def first(self) -> tuple[CallId, Ticket]:
        """The call that goes first; there must be one."""
        return next(item for queue in self.queues for item in queue.items())

    def before(self, call_id: CallId, tier: int) -> int:
        """How many of the key's calls go before that one."""
        return sum(map(len, self.queues[:tier])) + list(self.queues[tier]).index(call_id)


class Room(NamedTuple):
    """How many slots there are, and how many of them are free."""

    slots: int
    free: int


class Idle:
    """The keys that have nothing here and had lately."""

    def __init__(self) -> None:
        self._since_s: OrderedDict[KeyName, float] = OrderedDict()

    def __contains__(self, key: KeyName) -> bool:
        return key in self._since_s

    def put(self, key: KeyName, now_s: float) -> None:
        self._since_s[key] = now_s
        self._since_s.move_to_end(key)

    def drop(self, key: KeyName) -> None:
        self._since_s.pop(key, None)

    def count(self, now_s: float) -> int:
        """How many there are, those forgotten that have had nothing for too long."""
        while self._since_s:
            key, since_s = next(iter(self._since_s.items()))
            if now_s - since_s <= ACTIVE_S:
                break
            del self._since_s[key]
        return len(self._since_s)


def may_start(share: Share, room: Room, idle: int) -> bool:
    """Whether there is room for a key's call, besides what is kept for so many idle keys; one that runs nothing may use that."""
    kept_max = max(1, int(room.slots * KEPT_SHARE)) if room.slots > 1 else 0
    return room.free > (min(idle, kept_max) if share.running else 0)


class Fair:
    """The keys of one queue. Nothing here looks at a clock.

    `running` counts the calls that were started and haven't ended, `mean_s` is how long they take of late.
    """

    def __init__(self) -> None:
        self.running = 0
        self.mean_s: float | None = None
        self._shares: OrderedDict[KeyName, Share] = OrderedDict()
        self._queued: dict[KeyName, Share] = {}
        self._tickets: dict[CallId, Ticket] = {}
        self._idle = Idle()
        self._last = Share()
        self._numbers = 0
        self._cost = COST_GUESS
        self._largest = 0.0
        self._wrote = self._wrote_s = 0.0

    def __len__(self) -> int:
        """How many calls wait."""
        return len(self._tickets)

    def others_active(self, key: KeyName, *, now_s: float) -> bool:
        """Whether any other key has something here, or had lately."""
        here = self._shares.get(key)
        mine = 0 if here is None else here.running
        idle = self._idle.count(now_s)
        return self.running > mine or len(self._queued) > (key in self._queued) or idle > (key in self._idle)

    def start(self, key: KeyName, room: Room | None, *, prompt: float, weight: float, now_s: float) -> bool:
        """Start a call at once if nobody waits, there is room, and the room isn't kept for others; without a `room` in any case."""
        if room is not None and (self._tickets or room.free <= 0):
            return False
        share = self._enter(key, weight)
        if room is not None and not may_start(share, room, self._idle.count(now_s)):
            return False
        self._begin(key, share, prompt)
        return True

    def wait(self, call_id: CallId, key: KeyName, *, tier: ServiceTier, prompt: float, weight: float) -> None:
        """The call waits; `next` will name it, or it leaves."""
        share = self._enter(key, weight)
        self._numbers += 1
        ticket = Ticket(key, TIERS[tier], prompt, self._numbers)
        self._tickets[call_id] = share.queues[ticket.tier][call_id] = ticket
        self._queued[key] = share
        self._idle.drop(key)

    def leave(self, call_id: CallId, *, now_s: float) -> None:
        """The call waits no more."""
        ticket = self._tickets[call_id]
        self._take_out(call_id, ticket)
        self._rest(ticket.key, self._shares[ticket.key], now_s)

    def next(self, room: Room, *, now_s: float) -> CallId | None:
        """Start the call whose turn it is, if there is room for it."""
        if not self._queued or room.free <= 0:
            return None
        least = min(share.counter for share in self._queued.values())
        lead = self._largest * (room.slots - 1)

        def rank(item: tuple[KeyName, Share]) -> tuple[bool, float, int]:
            share = item[1]
            goes_ahead = not share.running and (share.waiting == 1 or share.counter <= least + lead / share.weight)
            return not goes_ahead, share.counter, share.first()[1].number

        key, share = min(self._queued.items(), key=rank)
        if not may_start(share, room, self._idle.count(now_s)):
            return None
        call_id, ticket = share.first()
        self._take_out(call_id, ticket)
        self._begin(key, share, ticket.prompt)
        return call_id

    def ended(self, key: KeyName, *, prompt: float, read: float | None, wrote: float | None, lasted_s: float, now_s: float) -> None:
        """A call that was started is over. It read and wrote so many tokens, or nobody knows and its time is counted.

        `prompt` is what was thought of it at its start.
        """
        share = self._shares[key]
        assert share.running > 0, "a call ends once"
        share.running -= 1
        self.running -= 1
        used = prompt if read is None else read
        pace = self._wrote / self._wrote_s if self._wrote_s else 0.0
        output = lasted_s * pace if wrote is None else wrote  # or who leaves just before the end would pay for no answer
        cost = W_IN * used + W_OUT * output
        share.counter += (cost - W_IN * prompt) / share.weight
        if wrote is not None and cost > 0:
            self._wrote, self._wrote_s = wrote + FADE * self._wrote, lasted_s + FADE * self._wrote_s
            self._cost += LEARN_RATE * (cost - self._cost)
            self._largest = max(cost, FADE * self._largest)
        if (wrote is not None and cost > 0) or lasted_s >= ATTEMPT_S_MIN:
            self.mean_s = lasted_s if self.mean_s is None else self.mean_s + LEARN_RATE * (lasted_s - self.mean_s)
        self._rest(key, share, now_s)

    def position(self, call_id: CallId) -> int:
        """When it is the call's turn, 1 being next, if nobody else comes and every call costs what calls cost of late."""
        ticket = self._tickets[call_id]
        mine = self._queued[ticket.key]
        before = mine.before(call_id, ticket.tier)
        counter, number = mine.counter + before * self._cost / mine.weight, mine.first()[1].number
        found = 1 + before
        for share in self._queued.values():
            if share is not mine:
                calls = (counter - share.counter) * share.weight / max(1.0, self._cost)
                is_older = share.first()[1].number < number
                found += min(share.waiting, max(0, floor(calls) + 1 if is_older else ceil(calls)))
        return found

    def estimate_s(self, position: int) -> float | None:
        """How long it takes until then: calls end at the rate of those that run by their mean length. None until one ended."""
        return None if self.mean_s is None else position * self.mean_s / max(1, self.running)

    def _enter(self, key: KeyName, weight: float) -> Share:
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = Share()
        share.weight = weight
        if key not in self._queued:
            least = min((one.counter for one in self._queued.values()), default=self._last.counter)
            share.counter = max(share.counter, least)
        return share

    def _begin(self, key: KeyName, share: Share, prompt: float) -> None:
        share.running += 1
        share.counter += W_IN * prompt / share.weight
        self.running += 1
        self._last = share
        self._idle.drop(key)

    def _take_out(self, call_id: CallId, ticket: Ticket) -> None:
        share = self._queued[ticket.key]
        del self._tickets[call_id], share.queues[ticket.tier][call_id]
        if not share.waiting:
            del self._queued[ticket.key]

    def _rest(self, key: KeyName, share: Share, now_s: float) -> None:
        """Note that a key has nothing here, if so, and make room for other keys."""
        if share.running or key in self._queued:
            return
        self._idle.put(key, now_s)
        self._shares.move_to_end(key)
        while len(self._shares) > KEYS_MAX:
            oldest = next(name for name, one in self._shares.items() if not one.running and name not in self._queued)
            del self._shares[oldest]
            self._idle.drop(oldest)

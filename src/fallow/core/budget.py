"""What API keys with a budget have spent and set aside at one gateway, and whether a call still fits."""

from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import replace

from fallow.core.cost import PICO_PER_MICRO
from fallow.core.needs import MICRO
from fallow.model.call import Call
from fallow.model.errors import BudgetSpent, Failure
from fallow.model.ids import CallId, KeyId
from fallow.model.messages import SPENT_KEYS_MAX, SPENT_MICRO_MAX, KeySpent

PURSES_MAX = 65_536
"""Keys with a budget that one process of a gateway follows. What a key has cost here must not be forgotten, so one more is refused."""
ACTIVE_MS = 120_000
"""So long after a key's last call the hub is told of it again and again, to hear what it has cost elsewhere: for longer than a gateway
believes what a hub said of a key."""
HELD_RETRY_MS = 2_000
"""When to come again if only calls under way are in the way."""


class Purse(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has spent and set aside.

    `own_pico` is what its calls have cost here since the process began, in millionths of a micro-credit, of which the hub has been told
    `said_micro` and has taken note of `noted_micro`. `elsewhere_micro` is what they have cost anywhere else, or before, as far as was
    heard. `held_micro` is the most that those under way can cost.
    """

    own_pico: int = 0
    said_micro: int = 0
    noted_micro: int = 0
    elsewhere_micro: int = 0
    held_micro: int = 0

    @property
    def own_micro(self) -> int:
        """What its calls have cost here, rounded up: once for all of them, not once a call."""
        return -(-self.own_pico // PICO_PER_MICRO)

    @property
    def spent_micro(self) -> int:
        """What they have cost everywhere, as far as is known here."""
        return self.elsewhere_micro + self.own_micro


EMPTY = Purse()


def why_not(purse: Purse, quote_micro: int, budget_micro: int) -> Failure | None:
    """None if a call that costs `quote_micro` at most fits into the budget, else what there is of it and what would lift it."""
    over_micro = purse.spent_micro + purse.held_micro + quote_micro - budget_micro
    if over_micro <= 0:
        return None
    waits = over_micro <= purse.held_micro
    held = f", {_credits(purse.held_micro)} are set aside for calls under way" if purse.held_micro else ""
    lifts = "wait for those to end, or " if waits else ""
    text = (
        f"your key's budget is {_credits(budget_micro)} credits: {_credits(purse.spent_micro)} are spent{held}, and this call can cost "
        f"{_credits(quote_micro)}; {lifts}let it write less (max_tokens), or whoever keeps the hub can raise the budget with "
        "`fallow keys limit --budget`"
    )
    return BudgetSpent(text, retry_after_ms=HELD_RETRY_MS if waits else None).failure()


def heard(purse: Purse, total_micro: int, *, of_which_here_micro: int) -> Purse:
    """The hub said what the key has cost everywhere, of which no more than `of_which_here_micro` came from here."""
    return replace(purse, elsewhere_micro=max(purse.elsewhere_micro, total_micro - of_which_here_micro))


def noted(purse: Purse, micro: int) -> Purse:
    """The hub has taken note of so much."""
    return replace(purse, noted_micro=max(purse.noted_micro, micro))


class Purses:
    """The purses of all keys with a budget that called here. Nothing here looks at a clock."""

    def __init__(self) -> None:
        self._known: dict[KeyId, Purse] = {}
        self._held: dict[CallId, int] = {}
        self._used_ms: dict[KeyId, int] = {}
        """Those of which the hub is to be told."""

    def of(self, key_id: KeyId) -> Purse:
        """The purse of a key; an empty one if nothing is known of it."""
        return self._known.get(key_id, EMPTY)

    def hold(self, call: Call, quote_micro: int, *, now_ms: int) -> Failure | None:
        """Set a call's quote aside, or say why not. A call that is tried again elsewhere holds the highest of its quotes."""
        assert call.budget_micro is not None, "a key without a budget has no purse"
        key_id, held_micro = call.key_id, self._held.get(call.id, 0)
        if key_id not in self._known and len(self._known) >= PURSES_MAX and not self._made_room():
            text = f"this gateway follows the budgets of {PURSES_MAX} keys already; call another gateway, or have this one restarted"
            return Failure(code="too_many_calls", message=text)
        purse = self.of(key_id)
        purse = heard(purse, call.spent_micro, of_which_here_micro=purse.said_micro)
        more_micro = max(0, quote_micro - held_micro)
        if more_micro or call.id not in self._held:
            refusal = why_not(purse, more_micro, call.budget_micro)
            if refusal is not None:
                return refusal
        self._held[call.id] = held_micro + more_micro
        self._known[key_id] = replace(purse, held_micro=purse.held_micro + more_micro)
        self._used_ms[key_id] = now_ms
        return None

    def settle(self, call: Call, cost_pico: int, *, now_ms: int) -> None:
        """The call is over: what it cost is spent, and what was set aside for it is free again. No call costs more than it holds."""
        held_micro = self._held.pop(call.id, None)
        if held_micro is None:
            return
        assert 0 <= cost_pico <= held_micro * PICO_PER_MICRO, "a quote is the most that a call can cost"
        purse = self._known[call.key_id]
        self._known[call.key_id] = replace(purse, own_pico=purse.own_pico + cost_pico, held_micro=purse.held_micro - held_micro)
        self._used_ms[call.key_id] = now_ms

    def to_say(self, *, now_ms: int) -> Iterator[tuple[KeySpent, ...]]:
        """What the hub is to be told, a message at a time; each counts as said when it is taken."""
        for key_id, used_ms in list(self._used_ms.items()):
            purse = self.of(key_id)
            if now_ms - used_ms > ACTIVE_MS and not purse.held_micro and purse.noted_micro >= purse.own_micro:
                del self._used_ms[key_id]
        key_ids = list(self._used_ms)
        for at in range(0, len(key_ids), SPENT_KEYS_MAX):
            yield tuple(self._said(key_id) for key_id in key_ids[at : at + SPENT_KEYS_MAX])

    def answered(self, said: Iterable[KeySpent], answer: Iterable[KeySpent]) -> None:
        """The hub has taken note of what was said, and tells what these keys have cost everywhere."""
        here = {one.key_id: one.micro for one in said}
        for key_id in here.keys() & self._known.keys():
            self._known[key_id] = noted(self._known[key_id], here[key_id])
        for one in answer:
            if one.key_id in here and one.key_id in self._known:
                self._known[one.key_id] = heard(self._known[one.key_id], one.micro, of_which_here_micro=here[one.key_id])

    def unsaid(self) -> int:
        """How many keys have cost something of which the hub hasn't taken note."""
        return sum(purse.noted_micro < purse.own_micro for purse in self._known.values())

    def _said(self, key_id: KeyId) -> KeySpent:
        purse = self.of(key_id)
        micro = min(purse.own_micro, SPENT_MICRO_MAX)
        self._known[key_id] = replace(purse, said_micro=micro)
        return KeySpent(key_id=key_id, micro=micro)

    def _made_room(self) -> bool:
        """Forget the keys that have cost nothing here and hold nothing; whether there were any."""
        held = {key_id for key_id, purse in self._known.items() if purse.own_pico or purse.held_micro}
        idle = self._known.keys() - held
        for key_id in idle:
            del self._known[key_id]
            self._used_ms.pop(key_id, None)
        return bool(idle)


def _credits(micro: int) -> str:
    return f"{micro / MICRO:.6f}".rstrip("0").rstrip(".")

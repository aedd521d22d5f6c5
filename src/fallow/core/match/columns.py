"""Offers as columns: one array per fact, one row per offer, so that a decision looks at hundreds of them in one go."""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.intp]

GONE = -1
"""In `stop`: the row of an offer that went away."""
ROOM_FACTOR = 2
"""Columns grow by this factor, so that a newcomer seldom costs a copy."""


class Facts(msgspec.Struct, frozen=True):
    """What a prediction looks at, all arrays equally long. Times are seconds of the gateway's clock. The last four are
    several columns each, which stand below each other, since they are reckoned with together: see _TOGETHER.

    `prompt_price`, `cached_price`, `output_price` are micro-credits per token. `rate` is the prompt tokens a second that a new
    call gets, `prefill_var` its relative variance; `step` the seconds per token, `step_log` their logarithm,
    `decode_var` their relative variance. `ahead_s`
    passes before anything of the call is read (round trip, loading), the prompts that came before are read by `queue_until`, of
    which `queue_rest` seconds haven't begun; `queue_var` is the relative variance of that, `known_var` the variance in s² of what
    doesn't depend on the call. `over` calls must end before another gets a slot, 0 or less if one is free; where none is, `slot_s` is
    when the first of this gateway's is expected to be, and 0 else, and `slot_each` the seconds until then for each token that calls
    write. `token_work` is the seconds of the machine that a token of output takes on a busy one, `rent` what a second is worth to the
    calls to come. `trust` is what is left of each chance after the node's faults of late, at most 1.
    """

    prompt_price: Floats
    cached_price: Floats
    step: Floats
    step_log: Floats
    rate: Floats
    ahead_s: Floats
    queue_rest: Floats
    over: Floats
    rent: Floats
    trust: Floats
    per_token: Floats
    until: Floats
    spreads: Floats
    floors: Floats


class Columns(NamedTuple):
    """All that is kept of offers: the facts, and what they follow from.

    `held` counts calls known to be there, of `slots`; `room` is slots and queue places, `context` tokens. `prefill` and `decode` are
    what the card says, in tokens per second;
    `prefill_log`, `decode_log` are learnt corrections of them as logarithms. `slope` is how much longer a step takes with each
    further stream. `writes` is 0 for what answers as soon as it has read. `streams` and `reading` count this gateway's calls
    there, `unread` are their prompts' tokens, of which `head` are being read since `head_s`. `others` run for other gateways;
    `unread_each` is how many tokens a call there has unread on average. `kind` and `org` are numbers for the filter; `state` is 0,
    or the limit that the node's own state is; `stop` is the same, or that the node backs off; `halt` is that, or that all places are
    taken, or FREE. The node backs off until `back_s`.
    """

    prompt_price: Floats
    cached_price: Floats
    output_price: Floats
    step: Floats
    slot_each: Floats
    token_work: Floats
    step_log: Floats
    rate: Floats
    ahead_s: Floats
    queue_until: Floats
    slot_s: Floats
    queue_rest: Floats
    over: Floats
    prefill_var: Floats
    queue_var: Floats
    known_var: Floats
    decode_var: Floats
    rent: Floats
    trust: Floats
    held: Floats
    slots: Floats
    room: Floats
    context: Floats
    expires_s: Floats
    back_s: Floats
    prefill: Floats
    decode: Floats
    slope: Floats
    writes: Floats
    rtt_s: Floats
    load_s: Floats
    prefill_log: Floats
    decode_log: Floats
    streams: Floats
    reading: Floats
    unread: Floats
    head: Floats
    head_s: Floats
    others: Floats
    unread_each: Floats
    kind: Codes
    org: Codes
    state: Codes
    stop: Codes
    halt: Codes

    def part(self, begin: int, end: int) -> "Columns":
        """Rows from `begin` up to `end`, as views."""
        return Columns._make([column[begin:end] for column in self])


_ALONE = tuple(Columns._fields.index(name) for name in Facts.__struct_fields__[:-4])


def _together(*names: str) -> slice:
    """Where these columns stand, one below the other."""
    first = Columns._fields.index(names[0])
    assert Columns._fields[first : first + len(names)] == names, "what is taken together"
    return slice(first, first + len(names))


_TOGETHER = (
    _together("output_price", "step", "slot_each", "token_work"),
    _together("queue_until", "slot_s"),
    _together("prefill_var", "queue_var"),
    _together("known_var", "decode_var"),
)
FACTS = Columns._fields.index("trust") + 1
"""So many columns have all facts."""
assert max(_ALONE) < FACTS, "the facts stand first"
assert all(columns.stop <= FACTS for columns in _TOGETHER), "the facts stand first"
CODES = Columns._fields.index("kind")
"""The first of the columns that are whole numbers."""


def facts_of(floats: Floats) -> Facts:
    """The facts in columns that stand one below the other, as in a table."""
    return Facts(*[floats[column] for column in _ALONE], *[floats[columns] for columns in _TOGETHER])


class Table:
    """The columns' memory: in one piece, so that some rows of all facts are taken in one go."""

    def __init__(self, size: int) -> None:
        self._floats: Floats = np.zeros((CODES, size))
        self._codes: Codes = np.zeros((len(Columns._fields) - CODES, size), np.intp)
        self.columns = Columns._make([*self._floats, *self._codes])
        self._first = (0, facts_of(self._floats[:, :0]))

    def __len__(self) -> int:
        return len(self.columns.kind)

    def first(self, end: int) -> Facts:
        """The facts of the rows before `end`, as views: taking them out is most of what a look at them costs."""
        if self._first[0] != end:
            self._first = (end, facts_of(self._floats[:, :end]))
        return self._first[1]

    def between(self, begin: int, end: int) -> Facts:
        """The facts of the rows from `begin` up to `end`, as views."""
        return facts_of(self._floats[:, begin:end])

    def facts(self, rows: Codes) -> Facts:
        """The facts of these rows, copied."""
        return facts_of(self._floats[:FACTS].take(rows, axis=1))

    def joined(self, end: int, rows: Codes) -> Facts:
        """The facts of the rows before `end`, and of these, copied."""
        facts = self._floats[:FACTS]
        return facts_of(np.concatenate((facts[:, :end], facts.take(rows, axis=1)), axis=1))

    def rows(self, rows: Codes) -> tuple[Columns, Facts]:
        """All of these rows, copied, and the facts among that."""
        floats = self._floats.take(rows, axis=1)
        return Columns._make([*floats, *self._codes.take(rows, axis=1)]), facts_of(floats)

    def grow(self) -> None:
        """Make place for more rows."""
        more = len(self) * (ROOM_FACTOR - 1)
        self._floats = np.concatenate([self._floats, np.zeros((len(self._floats), more))], axis=1)
        self._codes = np.concatenate([self._codes, np.zeros((len(self._codes), more), np.intp)], axis=1)
        self.columns = Columns._make([*self._floats, *self._codes])
        self._first = (0, facts_of(self._floats[:, :0]))

    def put(self, at: int, values: Iterable[float]) -> None:
        """Write all of a row, in the order of the columns."""
        for column, value in zip(self.columns, values, strict=True):
            column[at] = value

    def order(self, rows: Codes) -> None:
        """Put these rows first, in their order."""
        self._floats[:, : len(rows)] = self._floats.take(rows, axis=1)
        self._codes[:, : len(rows)] = self._codes.take(rows, axis=1)

"""Offers as columns: one array per fact, one row per offer, so that a decision looks at hundreds of them in one go."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.intp]

GONE = -1
"""In `stop`: the row of an offer that went away."""
ROOM_FACTOR = 2
"""Columns grow by this factor, so that a newcomer seldom costs a copy."""


class Facts(NamedTuple):
    """What a decision looks at, all arrays equally long. Times are seconds of the gateway's clock.

    `prompt_price`, `cached_price`, `output_price` are micro-credits per token. `rate` is the prompt tokens a second that a new
    call gets, `prefill_var` its relative variance; `step` the seconds per token, `spread` the standard deviation of its
    logarithm. `ahead_s` passes before anything of the call is read (round trip, loading), the prompts that came before are read
    by `queue_until`, of which `queue_rest` seconds haven't begun; `theirs_s` of these are a guess at other gateways'. `held`
    counts calls known to be there, of `slots` and `room` (slots and queue places); where they are full, `slot_s` is when the
    first slot is expected to be free. `token_work` is the seconds of the machine that a token of output takes on a busy one,
    `rent` what a second is worth to the calls to come. `kind` and `org` are numbers for the filter; `stop` is 0, or the limit
    that the node's own state is.
    """

    prompt_price: Floats
    cached_price: Floats
    output_price: Floats
    rate: Floats
    prefill_var: Floats
    step: Floats
    spread: Floats
    ahead_s: Floats
    queue_until: Floats
    queue_rest: Floats
    theirs_s: Floats
    held: Floats
    slots: Floats
    room: Floats
    slot_s: Floats
    token_work: Floats
    rent: Floats
    context: Floats
    expires_s: Floats
    kind: Codes
    org: Codes
    stop: Codes


class Columns(NamedTuple):
    """All that is kept of offers: the facts, and what they follow from.

    `prefill` and `decode` are what the card says, in tokens per second; `prefill_log`, `decode_log` are learnt corrections of
    them as logarithms, `decode_var` is the relative variance. `slope` is how much longer a step takes with each further stream.
    `writes` is 0 for what answers as soon as it has read. `streams` and `reading` count this gateway's calls there, `unread` are
    their prompts' tokens, of which `head` are being read since `head_s`. `others` run for other gateways; `unread_each` is how
    many tokens a call there has unread on average.
    """

    prompt_price: Floats
    cached_price: Floats
    output_price: Floats
    rate: Floats
    prefill_var: Floats
    step: Floats
    spread: Floats
    ahead_s: Floats
    queue_until: Floats
    queue_rest: Floats
    theirs_s: Floats
    held: Floats
    slots: Floats
    room: Floats
    slot_s: Floats
    token_work: Floats
    rent: Floats
    context: Floats
    expires_s: Floats
    kind: Codes
    org: Codes
    stop: Codes
    prefill: Floats
    decode: Floats
    slope: Floats
    writes: Floats
    rtt_s: Floats
    load_s: Floats
    prefill_log: Floats
    decode_log: Floats
    decode_var: Floats
    streams: Floats
    reading: Floats
    unread: Floats
    head: Floats
    head_s: Floats
    others: Floats
    unread_each: Floats

    def part(self, begin: int, end: int) -> "Columns":
        """Rows from `begin` up to `end`, as views."""
        return Columns._make([column[begin:end] for column in self])

    def rows(self, rows: Codes) -> "Columns":
        """These rows, copied."""
        return Columns._make([column[rows] for column in self])

    def facts(self, begin: int, end: int) -> Facts:
        """The facts of rows from `begin` up to `end`, as views."""
        return Facts._make([column[begin:end] for column in self[:FACTS]])

    def facts_of(self, rows: Codes) -> Facts:
        """The facts of these rows, copied."""
        return Facts._make([column[rows] for column in self[:FACTS]])

    def grown(self, size: int) -> "Columns":
        """The same with place for `size` rows."""
        return Columns._make([np.concatenate([column, np.zeros(size - len(column), column.dtype)]) for column in self])


FACTS = len(Facts._fields)
assert Columns._fields[:FACTS] == Facts._fields, "the facts stand first"
CODES = frozenset({"kind", "org", "stop"})


def make(size: int) -> Columns:
    """Empty columns."""
    return Columns._make([np.zeros(size, np.intp if name in CODES else np.float64) for name in Columns._fields])

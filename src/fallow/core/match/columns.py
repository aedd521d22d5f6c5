"""Offers as columns: one array per fact, one row per offer, so that a decision looks at hundreds of them in one go."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.intp]

ROOM_FACTOR = 2
"""Columns grow by this factor, so that a newcomer seldom costs a copy."""


class Columns(NamedTuple):
    """Facts of offers, all arrays equally long. Times are seconds of the gateway's clock, speeds tokens per second.

    `prompt_price`, `cached_price`, `output_price` are micro-credits per token; `slope` is how much longer a step takes with
    each further stream; `room` counts slots and queue places. `kind`, `org` and `serves` are numbers for the filter.
    `stop` is 0, or the limit that the node's own state is. `load_s` is the time until the model is in memory.
    `prefill_log`, `decode_log` are learnt corrections of the speeds, with their variances; `seen_s` is when they were learnt.
    `streams` and `reading` count this gateway's calls there, `unread` are their prompts' tokens, of which `head` are being read
    since `head_s`; `slot_s` is when a slot is expected to be free. `others` run for other gateways, `others_unread` their prompts.
    `rent` is what a second of the machine is worth to the calls to come, in micro-credits.
    """

    prompt_price: Floats
    cached_price: Floats
    output_price: Floats
    prefill: Floats
    decode: Floats
    slope: Floats
    slots: Floats
    room: Floats
    context: Floats
    rtt_s: Floats
    kind: Codes
    org: Codes
    serves: Codes
    stop: Codes
    expires_s: Floats
    load_s: Floats
    prefill_log: Floats
    decode_log: Floats
    prefill_var: Floats
    decode_var: Floats
    seen_s: Floats
    streams: Floats
    reading: Floats
    unread: Floats
    head: Floats
    head_s: Floats
    slot_s: Floats
    others: Floats
    others_unread: Floats
    others_s: Floats
    rent: Floats

    def part(self, begin: int, end: int) -> "Columns":
        """Rows from `begin` up to `end`, as views."""
        return Columns._make([column[begin:end] for column in self])

    def rows(self, rows: Codes) -> "Columns":
        """These rows, copied."""
        return Columns._make([column[rows] for column in self])

    def grown(self, size: int) -> "Columns":
        """The same with place for `size` rows."""
        return Columns._make([np.concatenate([column, np.zeros(size - len(column), column.dtype)]) for column in self])


CODES = frozenset({"kind", "org", "serves", "stop"})


def make(size: int) -> Columns:
    """Empty columns."""
    return Columns._make([np.zeros(size, np.intp if name in CODES else np.float64) for name in Columns._fields])

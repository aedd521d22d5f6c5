"""When the first token and the end of an answer are expected from each offer, and the chance that this is soon enough.

first = rtt + load + wait + queue + unread prompt / prefill;  end = first + output * step  (DESIGN §7)
wait: until a slot is free; queue: until the prompts that came before are read, since an engine reads them one after another;
step: the time of one token, longer with every stream beside it. Speeds start from the node's own benchmark and are corrected
by what was seen (learn.py).
"""

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fallow.core.match.columns import Columns, Facts, Flags, Floats
from fallow.core.match.filter import CODE, FREE
from fallow.core.match.lengths import Length

PREFILL_TOKENS_PER_S_GUESS = 50.0
DECODE_TOKENS_PER_S_GUESS = 8.0
"""For an offer that nobody measured: a slow machine, so that a measured one is preferred."""
GPU_PREFILL_TOKENS_PER_S_GUESS = 1_000.0
GPU_DECODE_TOKENS_PER_S_GUESS = 30.0
"""The same on a GPU, such as a server that a lender has attached."""
TOKENS_PER_S_MIN = 1e-3
"""Slower than that is as good as never, and the arithmetic stays finite."""
SHARE = 0.7
"""What reading a prompt gets of the machine while answers are being written beside it."""
QUEUE_VAR = 0.04
"""Relative variance of the prompts that are to be read before, beyond that of the machine's speed."""
THEIRS_VAR = 4.0
"""Relative variance of what other gateways' calls have unread: all that is known of them is their number."""
SPREAD_MAX = 2.0
STALL = 0.25
"""How much of the time in which one more prompt is read beside an answer its tokens are late."""
LEAST_SD_S = 0.02
PREFILL_VAR_MEASURED, DECODE_VAR_MEASURED = 0.0064, 0.04
"""Relative variances of what a node's own benchmark says."""
PHI_CUBE, PHI_LINE = 0.070566, 1.5976
"""The normal distribution's function as a logistic one, off by 2e-4 at most (Bowling et al. 2009)."""
SURE_Z = 8.0
STEP_S_MIN = 1e-9
"""Less is nothing: what embeds writes no tokens."""
WAIT_S_MIN = 1e-9
_LEAST_Z, _CUBE, _LINE, _ONE, _TWO, _LEAST_SD, _SPREAD_MAX, _STEP_MIN, _WAIT_MIN, _NOTHING = (
    np.array(number) for number in (-SURE_Z, -PHI_CUBE, PHI_LINE, 1.0, 2.0, LEAST_SD_S, SPREAD_MAX, STEP_S_MIN, WAIT_S_MIN, 0.0)
)
"""As arrays, with which arithmetic takes half as long as with Python's numbers."""


class Times(msgspec.Struct, frozen=True):
    """Per offer, in seconds: to the first token, of that for reading this prompt and those before, and until a slot is free (0 where one
    is); of one token, and the logarithm of that.

    `spreads` are the standard deviation of the time to the first token and, where somebody minds, that of the logarithm of a token's.
    """

    first_s: Floats
    spreads: Floats
    read_s: Floats
    queue_s: Floats
    step_s: Floats
    step_log: Floats
    wait_s: Floats


class Targets(NamedTuple):
    """What a call needs, in seconds from now; infinite where the caller doesn't mind."""

    first_s: float
    per_token_s: float
    end_s: float


def phi(z: Floats) -> Floats:
    """The chance that a standard normal value is below z. What is far above needs no bound: there it is 1 to the last digit."""
    z = np.maximum(z, _LEAST_Z)
    below: Floats = z * z
    below *= _CUBE
    below -= _LINE
    below *= z
    np.exp(below, below)
    below += _ONE
    np.divide(_ONE, below, below)
    return below


def guess(*, is_gpu: bool) -> tuple[float, float]:
    """The speeds of reading and writing of an offer that nobody measured."""
    if is_gpu:
        return GPU_PREFILL_TOKENS_PER_S_GUESS, GPU_DECODE_TOKENS_PER_S_GUESS
    return PREFILL_TOKENS_PER_S_GUESS, DECODE_TOKENS_PER_S_GUESS


class Written(msgspec.Struct, frozen=True):
    """What writing the whole answer takes, per offer: micro-credits, seconds, as many to wait for a slot, seconds of the machine."""

    cost: Floats
    step_s: Floats
    wait_s: Floats
    work_s: Floats


def written(f: Facts, output: Floats | float) -> Written:
    """For an answer of so many tokens."""
    return Written(*(f.per_token * output))


def times(f: Facts, w: Written, *, unread: Floats | float, prompt_mean: float | None, now_s: float) -> Times:
    """What to expect of each offer if a prompt were sent now of which so many tokens have to be read.

    `prompt_mean` tokens have the prompts that come meanwhile; None if nobody minds how long a token takes.
    """
    parts = np.empty((2 if prompt_mean is None else 3, len(f.rate)))
    read, queue = parts[0], parts[1]
    np.divide(unread, f.rate, read)
    until = f.until - np.array(now_s)
    np.maximum(until[0], f.queue_rest, out=queue)
    wait = np.maximum(until[1], w.wait_s)
    first = f.ahead_s + queue
    first += read
    first += wait
    if prompt_mean is not None:  # a prompt that is read beside a short answer makes much of a difference
        stall = parts[2]
        np.add(w.step_s, _LEAST_SD, stall)
        stall *= f.rate
        np.divide(np.array(STALL * prompt_mean), stall, stall)
    squares = parts * parts
    squares[:2] *= f.spreads
    spreads = squares[1:]
    spreads[0] += squares[0]
    spreads += f.floors[: len(spreads)]
    np.sqrt(spreads, spreads)
    if prompt_mean is not None:
        np.minimum(spreads[1], _SPREAD_MAX, out=spreads[1])
    return Times(first, spreads, read, queue, f.step, f.step_log, wait)


def derive(c: Columns, at: Any) -> None:
    """Write what follows from the other columns, for a row or some: what a new call gets there."""
    prefill = c.prefill[at] * np.exp(c.prefill_log[at])
    decode = c.decode[at] * np.exp(c.decode_log[at])
    writing = c.streams[at] + c.others[at]
    held = writing + c.reading[at]
    shared = SHARE * prefill
    alone = np.where(writing > 0, shared, prefill)
    theirs = c.others[at] * c.unread_each[at] / shared
    rest = np.maximum(0.0, c.unread[at] - c.head[at]) / shared + theirs
    c.held[at] = held
    c.over[at] = over = held - c.slots[at] + 1.0
    c.rate[at] = np.where(held > 0, shared, prefill)
    c.step[at] = (1.0 + c.slope[at] * (np.minimum(c.slots[at], held + 1.0) - 1.0)) / decode * c.writes[at]
    c.slot_each[at] = c.step[at] * np.maximum(0.0, over) / c.slots[at]
    c.step_log[at] = np.log(np.maximum(c.step[at], STEP_S_MIN))
    c.ahead_s[at] = c.rtt_s[at] + c.load_s[at]
    c.known_var[at] = THEIRS_VAR * theirs * theirs + LEAST_SD_S**2
    c.queue_rest[at] = rest
    c.queue_until[at] = np.where(c.reading[at] > 0, c.head_s[at] + c.head[at] / alone + rest, 0.0)
    c.queue_var[at] = c.prefill_var[at] + QUEUE_VAR
    c.token_work[at] = (c.slope[at] + (1.0 - c.slope[at]) / c.slots[at]) / c.decode[at] * c.writes[at]
    c.halt[at] = np.where(c.stop[at] != 0, c.stop[at], np.where(held >= c.room[at], CODE["busy"], FREE))


def as_cards_say(rows: tuple[Columns, Facts]) -> Facts:
    """The same offers without what was learnt of them: for the few calls that find out whether a slow or faulty node has recovered.

    The `rows` are a copy, which is written.
    """
    c, facts = rows
    c.prefill_log[:] = c.decode_log[:] = 0.0
    c.prefill_var[:] = np.minimum(c.prefill_var, PREFILL_VAR_MEASURED)
    c.decode_var[:] = np.minimum(c.decode_var, DECODE_VAR_MEASURED)
    c.trust[:] = 1.0
    derive(c, slice(None))
    return facts


def chance(t: Times, targets: Targets, length: Length, *, limit: float) -> Floats:
    """The chance of each offer to meet the targets, from 0 to 1. `limit` is the most tokens that the answer can have."""
    chances = _soon_enough(t, targets)
    if targets.end_s < math.inf:
        longest = np.exp(t.spreads[1])
        longest *= t.step_s
        np.maximum(longest, _STEP_MIN, out=longest)
        room = np.array(targets.end_s) - t.first_s
        room -= _TWO * t.spreads[0]
        room /= longest
        in_time: Flags = room >= limit
        if np.count_nonzero(in_time) < len(room):
            chances *= np.where(in_time, 1.0, length.below(room))
    return chances


def _soon_enough(t: Times, targets: Targets) -> Floats:
    """The chance that the first token comes in time, and the others fast enough."""
    minds_first, minds_each = targets.first_s < math.inf, targets.per_token_s < math.inf
    if not minds_first and not minds_each:
        return np.ones(len(t.first_s))
    z = np.empty((minds_first + minds_each, len(t.first_s)))
    if minds_first:
        np.subtract(np.array(targets.first_s), t.first_s, z[0])
        waited = _waited(t, z[0]) if np.count_nonzero(t.wait_s) else None
    if minds_each:
        np.subtract(np.array(math.log(max(STEP_S_MIN, targets.per_token_s))), t.step_log, z[-1])
    z /= t.spreads if minds_first and minds_each else t.spreads[int(minds_each)]
    found = phi(z)
    chances: Floats = found[0]
    if minds_first and waited is not None:
        np.copyto(chances, waited, where=t.wait_s > _NOTHING)
    if minds_first and minds_each:
        chances *= found[1]
    return chances


def _waited(t: Times, spare: Floats) -> Floats:
    """The chance that the first token comes in time where no slot is free; `spare` seconds are left if all goes as expected.

    How long others' answers become is as good as exponential: few waits are much longer than expected, but those are.
    """
    late = t.spreads[0] - spare
    late -= t.wait_s
    np.minimum(late, _NOTHING, out=late)
    late /= np.maximum(t.wait_s, _WAIT_MIN)
    np.exp(late, late)
    found: Floats = _ONE - late
    return found

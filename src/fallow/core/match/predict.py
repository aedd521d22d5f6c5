"""When the first token and the end of an answer are expected from each offer, and the chance that this is soon enough.

first = rtt + load + wait + queue + unread prompt / prefill;  end = first + output * step  (DESIGN §7)
wait: until a slot is free; queue: until the prompts that came before are read, since an engine reads them one after another;
step: the time of one token, longer with every stream beside it. Speeds start from the node's own benchmark and are corrected
by what was seen (learn.py).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from fallow.core.match.columns import FACTS, Columns, Facts, Flags, Floats
from fallow.core.match.filter import CODE
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


class Times(NamedTuple):
    """Per offer, in seconds: to the first token, with its standard deviation, of that for reading this prompt and those before;
    of one token, and the standard deviation of the logarithm of that, None if nobody minds. `wait_s` is the part of `first_s`
    that is spent until a slot is free, None if all have one."""

    first_s: Floats
    first_sd_s: Floats
    read_s: Floats
    queue_s: Floats
    step_s: Floats
    spread: Floats | None
    wait_s: Floats | None


class Targets(NamedTuple):
    """What a call needs, in seconds from now; infinite where the caller doesn't mind."""

    first_s: float
    per_token_s: float
    end_s: float


def phi(z: Floats) -> Floats:
    """The chance that a standard normal value is below z."""
    z = np.minimum(np.maximum(z, -SURE_Z), SURE_Z)
    below = z * z
    below *= -PHI_CUBE
    below -= PHI_LINE
    below *= z
    np.exp(below, out=below)
    below += 1.0
    return np.divide(1.0, below, out=below)


def guess(*, is_gpu: bool) -> tuple[float, float]:
    """The speeds of reading and writing of an offer that nobody measured."""
    if is_gpu:
        return GPU_PREFILL_TOKENS_PER_S_GUESS, GPU_DECODE_TOKENS_PER_S_GUESS
    return PREFILL_TOKENS_PER_S_GUESS, DECODE_TOKENS_PER_S_GUESS


def times(f: Facts, *, prompt: float, warm: Floats | float, output_mean: float, prompt_mean: float | None, now_s: float) -> Times:
    """What to expect of each offer if a prompt of so many tokens, `warm` of them known there, were sent now.

    `prompt_mean` tokens have the prompts that come meanwhile; None if nobody minds how long a token takes.
    """
    queue = f.queue_until - now_s
    np.maximum(queue, f.queue_rest, out=queue)
    read = (prompt - warm) / f.rate
    first = f.ahead_s + queue
    first += read
    variance = read * read
    variance *= f.prefill_var
    behind = queue * queue
    behind *= f.queue_var
    variance += behind
    variance += f.known_var
    wait = None
    is_full = f.held >= f.slots
    if np.count_nonzero(is_full):
        life = output_mean * f.step / f.slots
        wait = np.where(is_full, np.maximum(f.slot_s - now_s, life * (f.held - f.slots + 1.0)), 0.0)
        first += wait
    sd = None if prompt_mean is None else _spread(f, output_mean=output_mean, prompt_mean=prompt_mean)
    return Times(first, np.sqrt(variance, out=variance), read, queue, f.step, sd, wait)


def _spread(f: Facts, *, output_mean: float, prompt_mean: float) -> Floats:
    """The standard deviation of the logarithm of a token's time: a prompt that is read beside a short answer makes much of a difference."""
    found = f.step * output_mean
    found += LEAST_SD_S
    found *= f.rate
    np.divide(STALL * prompt_mean, found, out=found)
    found *= found
    found += f.decode_var
    np.sqrt(found, out=found)
    return np.minimum(found, SPREAD_MAX, out=found)


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
    c.rate[at] = np.where(held > 0, shared, prefill)
    c.step[at] = (1.0 + c.slope[at] * (np.minimum(c.slots[at], held + 1.0) - 1.0)) / decode * c.writes[at]
    c.ahead_s[at] = c.rtt_s[at] + c.load_s[at]
    c.known_var[at] = THEIRS_VAR * theirs * theirs + LEAST_SD_S**2
    c.queue_rest[at] = rest
    c.queue_until[at] = np.where(c.reading[at] > 0, c.head_s[at] + c.head[at] / alone + rest, 0.0)
    c.queue_var[at] = c.prefill_var[at] + QUEUE_VAR
    c.token_work[at] = (c.slope[at] + (1.0 - c.slope[at]) / c.slots[at]) / c.decode[at] * c.writes[at]
    c.halt[at] = np.where(c.stop[at] != 0, c.stop[at], np.where(held >= c.room[at], CODE["busy"], 0))


def as_cards_say(c: Columns) -> Facts:
    """The same offers without what was learnt of them: for the few calls that find out whether a slow or faulty node has recovered.

    `c` are rows of their own, which are written.
    """
    c.prefill_log[:] = c.decode_log[:] = 0.0
    c.prefill_var[:] = np.minimum(c.prefill_var, PREFILL_VAR_MEASURED)
    c.decode_var[:] = np.minimum(c.decode_var, DECODE_VAR_MEASURED)
    c.trust[:] = 1.0
    derive(c, slice(None))
    return Facts._make(c[:FACTS])


def chance(t: Times, targets: Targets, length: Length, *, limit: float) -> Floats:
    """The chance of each offer to meet the targets, from 0 to 1. `limit` is the most tokens that the answer can have."""
    if targets.first_s < math.inf:
        spare = targets.first_s - t.first_s
        spare /= t.first_sd_s
        chances = phi(spare)
        if t.wait_s is not None:
            # How long others' answers become is as good as exponential: few waits are much longer than expected, but those are.
            spare = np.maximum(0.0, targets.first_s - (t.first_s - t.wait_s) - t.first_sd_s)
            chances = np.where(t.wait_s > 0, 1.0 - np.exp(-spare / np.maximum(t.wait_s, 1e-9)), chances)
    else:
        chances = np.ones(len(t.first_s))
    if targets.per_token_s < math.inf:
        assert t.spread is not None, "somebody minds"
        faster = targets.per_token_s / np.maximum(t.step_s, 1e-9)
        np.log(faster, out=faster)
        faster /= t.spread
        chances *= phi(faster)
    if targets.end_s < math.inf:
        assert t.spread is not None, "somebody minds"
        room = (targets.end_s - t.first_s - 2.0 * t.first_sd_s) / np.maximum(1e-9, t.step_s * np.exp(t.spread))
        in_time: Flags = room >= limit
        chances *= np.where(in_time, 1.0, length.below(room))
    return chances

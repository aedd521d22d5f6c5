"""When the first token and the end of an answer are expected from each offer, and the chance that this is soon enough.

first = rtt + load + wait + queue + unread prompt / prefill;  end = first + output * step  (DESIGN §7)
wait: until a slot is free; queue: until the prompts that came before are read, since an engine reads them one after another;
step: the time of one token, longer with every stream beside it. Speeds start from the node's own benchmark and are corrected
by what was seen (learn.py).
"""

import math
from typing import NamedTuple

import numpy as np

from fallow.core.match.columns import Columns, Flags, Floats
from fallow.core.match.lengths import Length

PREFILL_TOKENS_PER_S_GUESS = 50.0
DECODE_TOKENS_PER_S_GUESS = 8.0
"""For an offer that nobody measured: a slow machine, so that a measured one is preferred."""
OUTPUT_TOKENS_GUESS = 256.0
TOKENS_PER_S_MIN = 1e-3
"""Slower than that is as good as never, and the arithmetic stays finite."""
SHARE = 0.7
"""What reading a prompt gets of the machine while answers are being written beside it."""
QUEUE_VAR = 0.04
"""Relative variance of the prompts that are to be read before, beyond that of the machine's speed."""
WAIT_SD = 0.8
"""Relative error of the time until a slot is free: it depends on how long others' answers become."""
LEAST_SD_S = 0.02
FORGET_S = 900.0
"""What was learnt of an offer fades with this time constant while nothing new is heard of it."""
STEP_MOST_SD = 1.0
PHI_CUBE, PHI_LINE = 0.070566, 1.5976
"""The normal distribution's function as a logistic one, off by 2e-4 at most (Bowling et al. 2009)."""
SURE_Z = 8.0


class Times(NamedTuple):
    """Per offer, in seconds: to the first token, with its standard deviation, of that for reading this prompt and those before;
    of one token; `spread` is the standard deviation of the logarithm of that."""

    first_s: Floats
    first_sd_s: Floats
    read_s: Floats
    queue_s: Floats
    step_s: Floats
    spread: Floats


class Targets(NamedTuple):
    """What a call needs, in seconds from now; infinite where the caller doesn't mind."""

    first_s: float
    per_token_s: float
    end_s: float


def phi(z: Floats) -> Floats:
    """The chance that a standard normal value is below z."""
    z = np.clip(z, -SURE_Z, SURE_Z)
    below: Floats = 1.0 / (1.0 + np.exp(-(PHI_LINE + PHI_CUBE * z * z) * z))
    return below


def times(c: Columns, *, prompt: float, warm: Floats | float, output_mean: float, now_s: float, trusts_cards: bool = False) -> Times:
    """What to expect of each offer if a prompt of so many tokens, `warm` of them known there, were sent now.

    `trusts_cards` forgets what was learnt: for the few calls that find out whether a slow node has recovered.
    """
    fade = 0.0 if trusts_cards else np.exp((c.seen_s - now_s) / FORGET_S)
    prefill = c.prefill * np.exp(c.prefill_log * fade)
    writing = c.streams + c.others
    held = writing + c.reading
    alone = np.where(writing > 0, SHARE * prefill, prefill)
    rate = np.where(held > 0, SHARE * prefill, prefill)
    begun = np.maximum(0.0, now_s - c.head_s) * alone
    queue = np.maximum(0.0, c.head - begun) / alone + np.maximum(0.0, c.unread - c.head) / (SHARE * prefill)
    queue += np.maximum(0.0, c.others_unread - np.maximum(0.0, now_s - c.others_s) * alone) / rate
    streams = np.minimum(c.slots, held + 1.0)
    step = (1.0 + c.slope * (streams - 1.0)) / (c.decode * np.exp(c.decode_log * fade))
    is_full = held >= c.slots
    wait: Floats | float = 0.0
    if is_full.any():
        life = output_mean * step / np.maximum(1.0, c.slots)
        wait = np.where(is_full, np.maximum(np.where(c.others > 0, life * (held - c.slots + 1.0), c.slot_s - now_s), life), 0.0)
    read = (prompt - warm) / rate
    sd = np.sqrt(read**2 * c.prefill_var + queue**2 * (c.prefill_var + QUEUE_VAR) + (WAIT_SD * wait) ** 2 + LEAST_SD_S**2)
    return Times(c.rtt_s + c.load_s + wait + queue + read, sd, read, queue, step, np.sqrt(c.decode_var))


def chance(t: Times, targets: Targets, length: Length, *, limit: float) -> Floats:
    """The chance of each offer to meet the targets, from 0 to 1. `limit` is the most tokens that the answer can have."""
    chances = phi((targets.first_s - t.first_s) / t.first_sd_s) if targets.first_s < math.inf else np.ones(len(t.first_s))
    if targets.per_token_s < math.inf:
        chances = chances * phi(np.log(targets.per_token_s / np.maximum(t.step_s, 1e-9)) / t.spread)
    if targets.end_s < math.inf:
        room = (targets.end_s - t.first_s - 2.0 * t.first_sd_s) / np.maximum(1e-9, t.step_s * np.exp(t.spread))
        in_time: Flags = room >= limit
        chances = chances * np.where(in_time, 1.0, length.below(room))
    return chances


def chance_to_end(t: Times, targets: Targets) -> Floats:
    """The same for what answers at once when its input is read: the first token's time is the end's."""
    return phi((min(targets.first_s, targets.end_s) - t.first_s) / t.first_sd_s)

"""What an answer tells about the offer that gave it: its speeds are corrected, and how far they can be trusted."""

import math
from typing import NamedTuple

import numpy as np

from fallow.core.match.columns import Columns
from fallow.core.match.predict import DECODE_VAR_MEASURED, PREFILL_VAR_MEASURED, SHARE, derive

RATE = 0.12
"""How far a correction goes towards what was just seen; a surprise beyond SURPRISE goes half of the way."""
SURPRISE = 1.2
SURPRISE_RATE = 0.5
VAR_RATE = 0.05
STEP_MOST = 3.5
"""No single answer says more than a factor of 33."""
VAR_GUESSED = 0.25
"""The relative variance of a speed that nobody measured."""
VAR_MIN, VAR_MAX = 0.0009, 1.0
READ_S_MIN = 0.005
STEPS_MIN = 8
"""Shorter answers say little about the time of a token."""
FORGET_S = 7_200.0
"""What was learnt of an offer fades with this time constant."""
LOG_MIN = 1e-3
OVERDUE = 3.0
"""A prompt that takes so many times longer than expected is evidence before it ends."""


class Reading(NamedTuple):
    """A prompt that was read without waiting: its uncached tokens, the seconds it took, and whether others were being answered."""

    tokens: float
    took_s: float
    shared: bool


class Writing(NamedTuple):
    """An answer that was written: seconds per token, and how many streams there were when it began."""

    step_s: float
    streams: float


def _clipped(value: float) -> float:
    return max(-STEP_MOST, min(STEP_MOST, value))


def _corrected(known: float, seen: float) -> float:
    return known + (SURPRISE_RATE if abs(seen) > SURPRISE else RATE) * seen


def _variance(known: float, seen: float) -> float:
    return max(VAR_MIN, min(VAR_MAX, known + VAR_RATE * (min(seen * seen, VAR_MAX) - known)))


def learn_reading(c: Columns, row: int, reading: Reading) -> None:
    """A prompt was read."""
    if reading.took_s < READ_S_MIN:
        return
    rate = c.prefill[row] * math.exp(c.prefill_log[row]) * (SHARE if reading.shared else 1.0)
    seen = _clipped(math.log(max(1e-9, reading.tokens / reading.took_s) / rate))
    c.prefill_log[row] = _corrected(float(c.prefill_log[row]), seen)
    c.prefill_var[row] = _variance(float(c.prefill_var[row]), seen)


def learn_writing(c: Columns, row: int, writing: Writing) -> None:
    """An answer came to its end."""
    expected = (1.0 + c.slope[row] * (writing.streams - 1.0)) / (c.decode[row] * math.exp(c.decode_log[row]))
    seen = _clipped(math.log(expected / max(1e-9, writing.step_s)))
    c.decode_log[row] = _corrected(float(c.decode_log[row]), seen)
    c.decode_var[row] = _variance(float(c.decode_var[row]), seen)


def learn_overdue(c: Columns, row: int, *, tokens: float, waited_s: float) -> None:
    """A prompt is being read for so long already: the machine is no faster than that."""
    rate = SHARE * c.prefill[row] * math.exp(c.prefill_log[row])
    if waited_s > OVERDUE * tokens / rate + 1.0:
        slower = math.log(max(1e-9, tokens / waited_s) / (SHARE * c.prefill[row]))
        c.prefill_log[row] = max(float(c.prefill_log[row]) - STEP_MOST, slower)


def forget(c: Columns, *, passed_s: float) -> None:
    """What was learnt fades, and with it what follows from it."""
    known = np.flatnonzero((np.abs(c.prefill_log) > LOG_MIN) | (np.abs(c.decode_log) > LOG_MIN))
    if len(known):
        fade = math.exp(-passed_s / FORGET_S)
        c.prefill_log[known] *= fade
        c.decode_log[known] *= fade
        c.prefill_var[known] += (1.0 - fade) * (PREFILL_VAR_MEASURED - c.prefill_var[known])
        c.decode_var[known] += (1.0 - fade) * (DECODE_VAR_MEASURED - c.decode_var[known])
        derive(c, known)

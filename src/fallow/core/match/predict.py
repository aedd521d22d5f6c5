"""When the first token and the end of an answer are expected from an offer.

first = loading + wait + prompt / prefill;  end = first + output / decode  (DESIGN §7, here without learning)
"""

from typing import NamedTuple

from fallow.core.match.candidate import Candidate
from fallow.model.needs import Needs

PREFILL_TOKENS_PER_S_GUESS = 50.0
DECODE_TOKENS_PER_S_GUESS = 8.0
"""For an offer that nobody measured: a slow machine, so that a measured one is preferred."""
TOKENS_PER_S_MIN = 1e-3
"""Slower than that is as good as never, and the arithmetic stays finite."""
OUTPUT_TOKENS_GUESS = 256
CERTAINTY_MEASURED = 0.8
CERTAINTY_GUESSED = 0.3


class Prediction(NamedTuple):
    """Milliseconds from now, and how sure we are (0 to 1)."""

    first_token_in_ms: int
    end_in_ms: int
    certainty: float


def predict(needs: Needs, candidate: Candidate) -> Prediction:
    """The times to expect if the call were sent now."""
    speed = candidate.offer.speed
    prefill = max(TOKENS_PER_S_MIN, speed.prefill_tokens_per_s or PREFILL_TOKENS_PER_S_GUESS)
    decode = max(TOKENS_PER_S_MIN, speed.decode_tokens_per_s or DECODE_TOKENS_PER_S_GUESS)
    output = 0 if not speed.writes else min(needs.output_tokens_max or OUTPUT_TOKENS_GUESS, candidate.offer.context_tokens)
    slots = max(1, candidate.offer.slots)
    sharing = 1 + min(candidate.running, slots - 1)  # streams that decode together share the machine
    writing_ms = 1000 * output * sharing / decode
    queue = max(0, candidate.running - slots + 1)
    wait_ms = writing_ms * queue / slots
    first_ms = (candidate.load.ready_in_ms or 0) + wait_ms + 1000 * needs.prompt_tokens * sharing / prefill
    certainty = CERTAINTY_MEASURED if speed.decode_tokens_per_s or (speed.prefill_tokens_per_s and not speed.writes) else CERTAINTY_GUESSED
    return Prediction(round(first_ms), round(first_ms + writing_ms), certainty)

"""Whether a call that failed on one node is tried on another."""

from fallow.model.errors import Failure

ATTEMPTS_MAX = 3
MOVES_MAX = 5
"""An answer that began has more to lose."""
ENGINE_FAULTS_MAX = 2
"""A call that kills engines must not walk through the whole network."""

NODE_FAULTS = frozenset(
    {
        "node_unreachable",
        "leaving",
        "node_silent",
        "node_too_slow",
        "attempt_lost",
        "answer_gap",
        "answer_malformed",
        "body_lost",
        "busy",
        "model_loading",
        "yielding",
        "model_not_here",
        "lender_refuses",
        "broker_lost",
        "not_opened",
        "price_changed",
        "cannot_continue",
    }
)
ENGINE_FAULTS = frozenset({"engine_failed", "engine_stalled"})


def try_elsewhere(failures: tuple[Failure, ...], *, started: bool, can_continue: bool = False) -> bool:
    """Whether to try once more. `started` means that the caller already has a part of an answer, which some nodes can go on with."""
    if not failures or len(failures) >= (MOVES_MAX if started else ATTEMPTS_MAX) or (started and not can_continue):
        return False
    if sum(f.code in ENGINE_FAULTS for f in failures) >= ENGINE_FAULTS_MAX:
        return False
    return failures[-1].code in NODE_FAULTS | ENGINE_FAULTS

"""How many threads and slots, and how much context, an engine gets on this machine."""

import msgspec

SLOTS_MAX = 8
CONTEXT_TOKENS_MAX = 8_192
MEMORY_SHARE = 0.5
"""The part of the free memory that one engine may take."""
OVERHEAD_BYTES = 200 * 1024 * 1024
CONTEXT_TOKENS_MIN = 512
BATCH_TOKENS = 128
"""A long prefill freezes the other streams for one batch; 128 keeps that under a second or two on a home CPU."""


class EngineSize(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is started with."""

    threads: int
    slots: int
    context_tokens: int
    batch_tokens: int = BATCH_TOKENS


def size_engine(
    *, cores_physical: int, memory_free_bytes: int, weights_bytes: int, context_tokens: int, kv_bytes_per_token: int
) -> EngineSize | None:
    """The engine's size, or None if the model doesn't fit into half of the free memory with 512 tokens of context.

    One core is left to the owner and to the agent where there is more than one.
    """
    room = int(memory_free_bytes * MEMORY_SHARE) - weights_bytes - OVERHEAD_BYTES
    context = min(context_tokens, CONTEXT_TOKENS_MAX, max(0, room) // max(1, kv_bytes_per_token))
    if context < CONTEXT_TOKENS_MIN:
        return None
    slots = max(1, min(SLOTS_MAX, context // CONTEXT_TOKENS_MIN))
    return EngineSize(threads=max(1, cores_physical - 1), slots=slots, context_tokens=context)

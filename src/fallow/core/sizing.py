"""How many threads and slots, and how much context, an engine gets on this machine."""

import msgspec

from fallow.model.measured import Choice

SLOTS_MAX = 8
CONTEXT_TOKENS_MAX = 8_192
MEMORY_SHARE = 0.5
"""The part of the free memory that engines may take."""
OVERHEAD_BYTES = 200 * 1024 * 1024
CONTEXT_TOKENS_MIN = 512
ENCODER_FACTOR = 3
"""An encoder's weights and what it works on, in sizes of its file."""
ENCODER_SLOTS = 4
BATCH_TOKENS = 128
"""A long prefill freezes the other streams for one batch; 128 keeps that under a second or two on a home CPU."""


class EngineSize(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is started with. `memory_bytes` is what it will take of the node's limit."""

    threads: int
    slots: int
    context_tokens: int
    memory_bytes: int
    batch_tokens: int = BATCH_TOKENS


def memory_limit(*, memory_free_bytes: int, wanted_gb: float) -> int:
    """The memory for all engines together, in bytes: what the owner set, else half of what is free."""
    return int(wanted_gb * 1e9) if wanted_gb else int(memory_free_bytes * MEMORY_SHARE)


def size_engine(
    *, cores_physical: int, memory_limit_bytes: int, weights_bytes: int, context_tokens: int, kv_bytes_per_token: int
) -> EngineSize | None:
    """The engine's size, or None if the model doesn't fit into the limit with 512 tokens of context.

    One core is left to the owner and to the agent where there is more than one.
    """
    room = memory_limit_bytes - weights_bytes - OVERHEAD_BYTES
    context = min(context_tokens, CONTEXT_TOKENS_MAX, max(0, room) // max(1, kv_bytes_per_token))
    if context < CONTEXT_TOKENS_MIN:
        return None
    return EngineSize(
        threads=threads_for(cores_physical),
        slots=max(1, min(SLOTS_MAX, context // CONTEXT_TOKENS_MIN)),
        context_tokens=context,
        memory_bytes=weights_bytes + OVERHEAD_BYTES + context * kv_bytes_per_token,
    )


def threads_for(cores_physical: int) -> int:
    """One less than there are cores, where there is more than one."""
    return max(1, cores_physical - 1)


def size_encoder(*, cores_physical: int, weights_bytes: int, context_tokens: int) -> EngineSize:
    """The size of an engine without a cache, for embeddings: one inference at a time, a few calls in its queue."""
    memory = ENCODER_FACTOR * weights_bytes + OVERHEAD_BYTES
    return EngineSize(threads=threads_for(cores_physical), slots=ENCODER_SLOTS, context_tokens=context_tokens, memory_bytes=memory)


def tuned(size: EngineSize, choice: Choice) -> EngineSize:
    """The size with what the self-benchmark chose; never more slots than fit, and the memory stays as it was."""
    return msgspec.structs.replace(
        size, threads=choice.threads, slots=min(size.slots, choice.slots), batch_tokens=min(size.batch_tokens, choice.batch_tokens)
    )

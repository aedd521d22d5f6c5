"""The size of an engine: it fits into half of the free memory and leaves the owner a core."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.sizing import (
    BATCH_TOKENS,
    CONTEXT_TOKENS_MAX,
    OVERHEAD_BYTES,
    SLOTS_MAX,
    EngineSize,
    memory_limit,
    size_encoder,
    size_engine,
)

PROMISE = settings(max_examples=60)
MIB = 1024 * 1024


def free_for(*, weights: int, context: int, kv: int) -> int:
    """The free memory that just suffices."""
    return 2 * (weights + OVERHEAD_BYTES + context * kv)


@pytest.mark.parametrize(
    ("cores", "free", "context", "then"),
    [
        pytest.param(4, 64 * 1024 * MIB, 2048, (3, 4, 2048), id="the model's own context"),
        pytest.param(4, 64 * 1024 * MIB, 131_072, (3, SLOTS_MAX, CONTEXT_TOKENS_MAX), id="a long context is cut"),
        pytest.param(1, 64 * 1024 * MIB, 2048, (1, 4, 2048), id="one core is used"),
        pytest.param(2, 64 * 1024 * MIB, 2048, (1, 4, 2048), id="one core is left"),
        pytest.param(4, 64 * 1024 * MIB, 512, (3, 1, 512), id="the smallest context"),
        pytest.param(4, 64 * 1024 * MIB, 511, None, id="a context too small to serve"),
        pytest.param(4, free_for(weights=100 * MIB, context=512, kv=4096), 8192, (3, 1, 512), id="just enough memory"),
        pytest.param(4, free_for(weights=100 * MIB, context=512, kv=4096) - 2, 8192, None, id="two bytes short"),
        pytest.param(4, free_for(weights=100 * MIB, context=1100, kv=4096), 8192, (3, 2, 1100), id="memory bounds the context"),
        pytest.param(4, 0, 8192, None, id="no memory"),
    ],
)
def test_size_engine(cores: int, free: int, context: int, then: tuple[int, int, int] | None) -> None:
    size = size_engine(
        cores_physical=cores,
        memory_limit_bytes=memory_limit(memory_free_bytes=free, wanted_gb=0),
        weights_bytes=100 * MIB,
        context_tokens=context,
        kv_bytes_per_token=4096,
    )
    wanted = then and EngineSize(
        threads=then[0],
        slots=then[1],
        context_tokens=then[2],
        batch_tokens=BATCH_TOKENS,
        memory_bytes=100 * MIB + OVERHEAD_BYTES + then[2] * 4096,
    )
    assert size == wanted


@PROMISE
@given(
    cores=st.integers(1, 128),
    free=st.integers(0, 64 * 1024 * MIB) | st.integers(0, 1024 * MIB),
    weights=st.integers(0, 16 * 1024 * MIB) | st.integers(0, 200 * MIB),
    context=st.integers(0, 200_000),
    kv=st.integers(0, 1_000_000),
)
def test_an_engine_fits_and_none_means_that_it_cannot(cores: int, free: int, weights: int, context: int, kv: int) -> None:
    size = size_engine(
        cores_physical=cores,
        memory_limit_bytes=memory_limit(memory_free_bytes=free, wanted_gb=0),
        weights_bytes=weights,
        context_tokens=context,
        kv_bytes_per_token=kv,
    )
    room = free // 2 - weights - OVERHEAD_BYTES
    if size is None:
        assert context < 512 or room < 512 * max(1, kv)
        return
    assert size.context_tokens * kv <= room
    assert 512 <= size.context_tokens <= min(context, CONTEXT_TOKENS_MAX)
    assert 1 <= size.slots <= SLOTS_MAX
    assert size.slots * 512 <= size.context_tokens
    assert 1 <= size.threads <= cores
    assert size.threads < cores or cores == 1


def test_the_owner_sets_the_limit_or_it_is_half_of_what_is_free() -> None:
    assert memory_limit(memory_free_bytes=10_000, wanted_gb=0) == 5_000
    assert memory_limit(memory_free_bytes=10_000, wanted_gb=1.5) == 1_500_000_000


def test_an_encoder_has_a_queue_and_no_cache() -> None:
    size = size_encoder(cores_physical=4, weights_bytes=20 * MIB, context_tokens=256)
    assert (size.threads, size.context_tokens) == (3, 256)
    assert size.slots > 1
    assert 20 * MIB < size.memory_bytes < 20 * MIB * 5 + OVERHEAD_BYTES

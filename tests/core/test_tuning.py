"""What the self-benchmark's points choose: threads that are worth it, streams that still flow, batches that don't freeze."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core import tuning
from fallow.core.sizing import BATCH_TOKENS, SLOTS_MAX, EngineSize, tuned
from fallow.model.measured import Choice, Point, Rates

PROMISE = settings(max_examples=100)
RATE = st.floats(0.01, 1e5)


def point(threads: int, lone: float, *more: tuple[int, float], prefill: float = 500.0) -> Point:
    return Point(threads=threads, prefill_tokens_per_s=prefill, decode_by_streams=((1, lone), *more))


@pytest.mark.parametrize(
    ("cores", "then"), [(1, (1,)), (2, (2, 1)), (3, (3, 1)), (4, (4, 2, 1)), (16, (16, 8, 1)), (0, (1,))], ids="{} cores".format
)
def test_candidates(cores: int, then: tuple[int, ...]) -> None:
    assert tuning.candidates(cores) == then


@pytest.mark.parametrize(
    ("points", "then"),
    [
        pytest.param([point(1, 50)], 1, id="one"),
        pytest.param([point(8, 100), point(4, 60), point(1, 20)], 8, id="the fastest"),
        pytest.param([point(8, 100), point(4, 96), point(1, 20)], 4, id="fewer that are about as fast"),
        pytest.param([point(8, 100), point(4, 95), point(1, 95)], 1, id="the fewest of them"),
        pytest.param([point(8, 100), point(4, 94.9)], 8, id="five percent are worth it"),
        pytest.param([point(8, 40), point(4, 70), point(1, 90)], 1, id="more threads only disturb each other"),
        pytest.param([point(2, 0), point(1, 0)], 1, id="nothing moved"),
        pytest.param([Point(threads=2, texts_by_batch=((1, 90.0),)), Point(threads=1, texts_by_batch=((1, 60.0),))], 2, id="texts"),
    ],
)
def test_threads(points: list[Point], then: int) -> None:
    assert tuning.choose_threads(points) == then
    assert tuning.choose_threads(points[::-1]) == then


@pytest.mark.parametrize(
    ("rates", "then"),
    [
        pytest.param((), 1, id="nothing measured"),
        pytest.param(((1, 50.0),), 1, id="one stream only"),
        pytest.param(((1, 50.0), (2, 80.0), (4, 110.0), (8, 130.0)), 8, id="each step gains"),
        pytest.param(((1, 50.0), (2, 80.0), (4, 80.0), (8, 80.0)), 8, id="sharing costs nothing"),
        pytest.param(((1, 50.0), (2, 80.0), (4, 71.9), (8, 60.0)), 2, id="over a tenth of the best is too much"),
        pytest.param(((1, 50.0), (2, 80.0), (4, 72.0)), 4, id="a tenth is not"),
        pytest.param(((1, 50.0), (2, 44.0), (4, 60.0), (8, 40.0)), 4, id="one disturbed step hides nothing"),
        pytest.param(((1, 4.0), (2, 5.0), (4, 5.6), (8, 7.0)), 4, id="a slow model's streams keep a quarter"),
        pytest.param(((1, 80.0), (2, 84.0), (4, 90.0), (8, 100.0)), 8, id="a fast one's may have less, above four tokens a second"),
        pytest.param(((1, 17.0), (2, 18.0), (4, 19.0), (8, 31.0)), 4, id="under four a second, and under a quarter"),
    ],
)
def test_slots(rates: Rates, then: int) -> None:
    assert tuning.choose_slots(rates) == then


@pytest.mark.parametrize(
    ("prefill", "then"),
    [(0.0, 128), (1000.0, 128), (128.0, 128), (127.9, 64), (64.0, 64), (20.0, 16), (8.0, 8), (0.5, 8)],
    ids="{} tokens a second".format,
)
def test_batch(prefill: float, then: int) -> None:
    assert tuning.choose_batch(prefill) == then


RATES = st.lists(RATE, max_size=4).map(lambda rates: tuple(zip(tuning.STREAMS, rates, strict=False)))
POINTS = st.lists(
    st.builds(lambda threads, prefill, rates: Point(threads=threads, prefill_tokens_per_s=prefill, decode_by_streams=rates),
              st.integers(1, 64), RATE | st.just(0.0), RATES),
    min_size=1, max_size=4, unique_by=lambda one: one.threads,
)  # fmt: skip


@PROMISE
@given(points=POINTS, slots_max=st.integers(1, 8), writes=st.booleans())
def test_the_choice_is_one_of_what_was_seen(points: list[Point], slots_max: int, writes: bool) -> None:
    choice = tuning.choose(points, slots_max=slots_max, writes=writes)
    assert choice == tuning.choose(points[::-1], slots_max=slots_max, writes=writes)
    chosen = next(one for one in points if one.threads == choice.threads)
    best = max(one.decode_tokens_per_s for one in points)
    assert chosen.decode_tokens_per_s >= best * (1 - tuning.ALIKE)
    assert not any(one.threads < chosen.threads and one.decode_tokens_per_s >= best * (1 - tuning.ALIKE) for one in points)
    assert 1 <= choice.slots <= slots_max
    assert choice.slots == slots_max or writes
    assert SLOTS_MAX <= choice.batch_tokens <= BATCH_TOKENS
    if writes and choice.slots > 1:
        total = dict(chosen.decode_by_streams)[choice.slots]
        assert total >= chosen.decode_tokens_per_s * (1 - tuning.LOSS_MAX)
        assert total / choice.slots >= min(tuning.STREAM_TOKENS_PER_S_MIN, tuning.STREAM_SHARE_MIN * chosen.decode_tokens_per_s)


def test_only_streams_that_fit_count() -> None:
    """More streams that gained say nothing of fewer that didn't."""
    seen = point(1, 10.0, (2, 8.0), (4, 20.0))
    assert tuning.choose([seen], slots_max=2, writes=True).slots == 1
    assert tuning.choose([seen], slots_max=4, writes=True).slots == 4


@PROMISE
@given(points=POINTS)
def test_what_is_left_out_would_not_have_been_chosen(points: list[Point]) -> None:
    """Whatever is chosen in the end had its streams tried, and was tried itself while speed only falls with fewer threads."""
    tried: list[Point] = []
    with_streams: set[int] = set()
    for one in sorted(points, key=lambda one: -one.threads):
        if tuning.is_worth_streams(one, tried):
            with_streams.add(one.threads)
        tried.append(one)
    assert tuning.choose_threads(points) in with_streams


@pytest.mark.parametrize(
    ("points", "then"),
    [
        pytest.param([], True, id="nothing tried"),
        pytest.param([point(8, 100)], True, id="the most tried"),
        pytest.param([point(8, 100), point(4, 99)], True, id="half is as good"),
        pytest.param([point(8, 100), point(4, 60)], False, id="half is slower, so one is too"),
    ],
)
def test_is_worth_fewer(points: list[Point], then: bool) -> None:
    assert tuning.is_worth_fewer(points) == then


def test_streams_fit_into_the_slots() -> None:
    assert [tuning.streams_to_try(slots) for slots in (0, 1, 2, 3, 4, 7, 8, 99)] == [
        (1,), (1,), (1, 2), (1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8),
    ]  # fmt: skip


def test_roofline() -> None:
    read = tuning.bytes_per_token(weights_bytes=4 * 10**9, kv_bytes_per_token=10**5, context_tokens=10_000)
    assert read == 5 * 10**9
    share = tuning.roofline(decode_tokens_per_s=4.0, bytes_per_token=read, memory_bytes_per_s=40 * 10**9)
    assert share is not None
    assert math.isclose(share, 0.5)
    assert tuning.roofline(decode_tokens_per_s=4.0, bytes_per_token=read, memory_bytes_per_s=None) is None
    assert tuning.roofline(decode_tokens_per_s=4.0, bytes_per_token=None, memory_bytes_per_s=1) is None
    assert tuning.roofline(decode_tokens_per_s=0.0, bytes_per_token=read, memory_bytes_per_s=1) is None


def test_an_engine_is_sized_as_chosen_but_within_what_fits() -> None:
    size = EngineSize(threads=7, slots=4, context_tokens=2048, memory_bytes=10**9)
    assert tuned(size, Choice(threads=2, slots=2, batch_tokens=32)) == EngineSize(
        threads=2, slots=2, context_tokens=2048, memory_bytes=10**9, batch_tokens=32
    )
    assert tuned(size, Choice(threads=8, slots=8, batch_tokens=512)) == EngineSize(
        threads=8, slots=4, context_tokens=2048, memory_bytes=10**9
    )

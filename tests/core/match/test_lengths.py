"""How long answers become: learnt per key and limit, within bounds, and never told to another key."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.match.lengths import HALF_LIFE_ANSWERS, KEYS_MAX, PRIOR_MEDIAN_TOKENS, Length, Lengths
from fallow.model.ids import KeyId

PROMISE = settings(max_examples=60)
BRIEF, CHATTY = KeyId("brief"), KeyId("chatty")
some_limit = st.none() | st.sampled_from([1, 2, 50, 100, 128, 4_096, 2**20])
some_answers = st.lists(st.tuples(st.sampled_from([BRIEF, CHATTY]), some_limit, st.integers(1, 40_000)), max_size=40)


def learnt(lengths: Lengths, key: KeyId, tokens: int, *, times: int = 50, limit: int | None = None, model: str = "tiny") -> Lengths:
    for _ in range(times):
        lengths.learn(key, model, limit=limit, tokens=tokens)
    return lengths


def mean(lengths: Lengths, key: KeyId, limit: int | None = None, model: str = "tiny") -> float:
    return lengths.expected(key, model, limit=limit).mean_tokens


def share_up_to(length: Length, tokens: float) -> float:
    return float(length.below(np.array([tokens]))[0])


def test_of_a_key_that_nobody_knows_little_is_believed() -> None:
    length = Lengths().expected(BRIEF, "tiny", limit=None)
    assert share_up_to(length, PRIOR_MEDIAN_TOKENS) == pytest.approx(0.5, abs=0.1)
    assert 0.02 < share_up_to(length, PRIOR_MEDIAN_TOKENS / 10) < 0.2
    assert 0.8 < share_up_to(length, PRIOR_MEDIAN_TOKENS * 10) < 0.98


@pytest.mark.parametrize("tokens", [1, 20, 300, 5_000])
def test_a_few_answers_outweigh_the_belief(tokens: int) -> None:
    lengths = learnt(Lengths(), BRIEF, tokens, times=100)
    assert mean(lengths, BRIEF) == pytest.approx(tokens, rel=0.3, abs=40)
    assert share_up_to(lengths.expected(BRIEF, "tiny", limit=None), 1.2 * tokens) > 0.9


def test_two_keys_keep_their_own_lengths() -> None:
    """All that they share is the belief about keys that nobody knows."""
    lengths = Lengths()
    for _ in range(60):
        lengths.learn(BRIEF, "tiny", limit=None, tokens=10)
        lengths.learn(CHATTY, "tiny", limit=None, tokens=2_000)
    assert mean(lengths, BRIEF) < 250
    assert mean(lengths, CHATTY) > 1_500
    alone = learnt(Lengths(), BRIEF, 10, times=60)
    assert mean(lengths, BRIEF) - mean(alone, BRIEF) < 0.1 * 2_000  # what leaks is a part of a belief worth a few answers


def test_models_and_limits_are_told_apart() -> None:
    lengths = learnt(Lengths(), BRIEF, 10, limit=64)
    learnt(lengths, BRIEF, 500, limit=4_096)
    learnt(lengths, BRIEF, 2_000, model="big")
    assert mean(lengths, BRIEF, 64) < 30
    assert mean(lengths, BRIEF, 4_096) == pytest.approx(500, rel=0.3)
    assert mean(lengths, BRIEF, model="big") > 1_500
    assert mean(lengths, BRIEF, 60) == mean(lengths, BRIEF, 64)  # by doublings
    assert 100 < mean(lengths, BRIEF) < 500


def test_who_is_known_without_a_limit_is_known_a_little_with_one() -> None:
    lengths = learnt(Lengths(), BRIEF, 20, times=200)
    assert mean(lengths, BRIEF, 1_000) < mean(Lengths(), BRIEF, 1_000) / 2


def test_what_was_asked_before_is_not_what_is_known_now() -> None:
    asked, fresh = Lengths(), Lengths()
    mean(asked, BRIEF, 1_000)
    learnt(asked, BRIEF, 20, times=200)
    learnt(fresh, BRIEF, 20, times=200)
    assert mean(asked, BRIEF, 1_000) == mean(fresh, BRIEF, 1_000)


def test_habits_change() -> None:
    lengths = learnt(Lengths(), BRIEF, 2_000, times=200)
    learnt(lengths, BRIEF, 20, times=2 * HALF_LIFE_ANSWERS)
    assert mean(lengths, BRIEF) < 200
    learnt(lengths, BRIEF, 20, times=4 * HALF_LIFE_ANSWERS)
    assert mean(lengths, BRIEF) < 40


@PROMISE
@given(some_answers, some_limit, st.sampled_from([BRIEF, CHATTY, KeyId("new")]))
def test_chances_add_up_and_stay_within_the_limit(answers: list[tuple[KeyId, int | None, int]], limit: int | None, key: KeyId) -> None:
    lengths = Lengths()
    for who, asked, tokens in answers:
        lengths.learn(who, "tiny", limit=asked, tokens=tokens if asked is None else min(tokens, asked))
    length = lengths.expected(key, "tiny", limit=limit)
    assert (np.diff(length.cumulative) >= 0.0).all()
    assert 0.0 <= length.cumulative[0] <= 1.0
    assert length.cumulative[-1] == pytest.approx(1.0)
    assert 1.0 <= length.mean_tokens <= (2**14 if limit is None else limit)
    some = np.array([-1e18, -1.0, 0.0, 0.5, 1.0, 2.0, 77.7, 1e3, 2.0**14, 1e18])
    below = length.below(some)
    assert (np.diff(below) >= 0.0).all()
    assert (below[:4] == 0.0).all()  # an answer has a token at least
    assert below[-1] == pytest.approx(1.0)
    if limit is not None:
        assert share_up_to(length, 2.0 * limit) == pytest.approx(1.0)  # limits are told apart by doublings


@pytest.mark.parametrize(("limit", "tokens"), [(None, 2**60), (1, 1), (0, 1), (2**60, 3)])
def test_the_odd_ends(limit: int | None, tokens: int) -> None:
    lengths = learnt(Lengths(), BRIEF, tokens, limit=limit)
    length = lengths.expected(BRIEF, "tiny", limit=limit)
    assert 0.0 <= length.mean_tokens <= (2**14 if limit is None else limit)
    assert np.isfinite(length.cumulative).all()


def test_memory_is_bounded_and_the_least_used_goes_first() -> None:
    lengths = learnt(Lengths(), BRIEF, 5)
    for number in range(KEYS_MAX + 10):
        lengths.learn(KeyId(f"key-{number}"), "tiny", limit=None, tokens=1_000)
        lengths.expected(KeyId(f"key-{number}"), "tiny", limit=None)
        if number % 1_000 == 0:
            lengths.learn(BRIEF, "tiny", limit=None, tokens=5)
    assert max(len(kept) for kept in vars(lengths).values() if hasattr(kept, "popitem")) <= KEYS_MAX
    assert mean(lengths, BRIEF) < mean(lengths, KeyId("key-7")) / 3
    assert mean(lengths, KeyId("key-7")) == mean(lengths, KeyId("nobody"))  # forgotten
    assert mean(lengths, KeyId(f"key-{KEYS_MAX}")) != mean(lengths, KeyId("nobody"))

"""What a key may ask for at a time: each limit under its name, and a prediction that holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core import allowance as module
from fallow.core.allowance import (
    CODE,
    LENGTH_GUESS_S,
    NOTHING,
    RETRY_MS_MAX,
    RETRY_MS_MIN,
    Account,
    Accounts,
    admit,
    begun,
    ended,
    next_end_ms,
    refused,
    spent,
)
from fallow.model.call import CONCURRENCY_DEFAULT, Allowance
from fallow.model.ids import KeyId, OrgId

PROMISE = settings(max_examples=100)
KEY = (OrgId("home"), KeyId("key-1"))
OTHER = (OrgId("elsewhere"), KeyId("key-1"))


@pytest.mark.parametrize(
    ("account", "allowed", "retry_ms", "words"),
    [
        pytest.param(NOTHING, Allowance(), None, [], id="a key that was never seen"),
        pytest.param(Account(running=255, calls=1e9, tokens=1e9), Allowance(), None, [], id="no rate is a limit by itself"),
        pytest.param(
            Account(running=256, mean_s=25.6), Allowance(), 101, ["256 calls under way", "key.concurrency", "0.101 s"], id="all at once"
        ),
        pytest.param(Account(running=1), Allowance(concurrency_max=1), round(1000 * LENGTH_GUESS_S) + 1, ["1 calls"], id="nobody knows"),
        pytest.param(
            Account(running=4, mean_s=8.0, refused=2), Allowance(concurrency_max=4), 6_001, ["key.concurrency"], id="others come first"
        ),
        pytest.param(Account(running=1, mean_s=1e-6), Allowance(concurrency_max=1), RETRY_MS_MIN, [], id="not at once"),
        pytest.param(Account(running=1, mean_s=1e6), Allowance(concurrency_max=1), RETRY_MS_MAX, [], id="not for ever"),
        pytest.param(Account(calls=59.0), Allowance(calls_per_minute=60), None, [], id="the last call of a minute"),
        pytest.param(
            Account(calls=60.0), Allowance(calls_per_minute=60), 1_001, ["60 calls a minute", "key.calls_per_minute"], id="one too many"
        ),
        pytest.param(Account(calls=1.0), Allowance(calls_per_minute=1), 60_001, ["1 calls a minute"], id="one a minute"),
        pytest.param(Account(tokens=999.0), Allowance(tokens_per_minute=1_000), None, [], id="a token is left"),
        pytest.param(
            Account(tokens=6_999.0),
            Allowance(tokens_per_minute=1_000),
            359_941,
            ["1000 tokens a minute", "key.tokens_per_minute", "360 s"],
            id="a long answer is paid for until it has run off",
        ),
    ],
)
def test_admit(account: Account, allowed: Allowance, retry_ms: int | None, words: list[str]) -> None:
    failure = admit(account, allowed, now_s=0.0)
    assert (failure and failure.code) == (None if retry_ms is None else CODE)
    if failure is not None:
        assert failure.retry_after_ms == retry_ms
        for word in (*words, "try again in", "settings"):
            assert word in failure.message


def test_a_bucket_runs_off() -> None:
    allowed = Allowance(calls_per_minute=2, tokens_per_minute=600)
    account = NOTHING
    for _ in range(2):
        assert admit(account, allowed, now_s=100.0) is None
        account = begun(account, allowed, now_s=100.0)
    assert admit(account, allowed, now_s=100.0) is not None
    assert admit(account, allowed, now_s=129.9) is not None
    assert admit(account, allowed, now_s=130.0) is None
    account = spent(account, allowed, 700, now_s=130.0)
    refusal = admit(account, allowed, now_s=130.0)
    assert refusal is not None
    assert "tokens a minute" in refusal.message
    assert admit(spent(account, allowed, -500, now_s=130.0), allowed, now_s=130.0) is None, "a guess is corrected"
    assert spent(account, allowed, -10_000, now_s=130.0).tokens == 0.0, "nothing is saved up"
    assert admit(account, allowed, now_s=90.0) is not None, "a clock that stands still harms nobody"


@PROMISE
@given(
    calls=st.integers(0, 1_000),
    tokens=st.integers(0, 1_000_000),
    allowed=st.builds(
        Allowance, calls_per_minute=st.integers(0, 5_000), tokens_per_minute=st.integers(0, 1_000_000), concurrency_max=st.just(2_000)
    ),
    now_s=st.floats(0, 1e6),
)
def test_who_comes_when_told_is_let_in(calls: int, tokens: int, allowed: Allowance, now_s: float) -> None:
    account = Account(calls=float(calls), tokens=float(tokens), at_s=now_s)
    for _ in range(5):  # one limit may hide another, and after hours of debt rounding may take a millisecond more
        failure = admit(account, allowed, now_s=now_s)
        if failure is None:
            break
        assert failure.retry_after_ms is not None
        early = admit(account, allowed, now_s=now_s + (failure.retry_after_ms - 2) / 1000 - 1e-3)
        assert failure.retry_after_ms <= 2 or early is not None, "no later than need be"
        now_s += failure.retry_after_ms / 1000
    assert failure is None


@PROMISE
@given(
    per_minute=st.integers(1, 600),
    gaps_s=st.lists(st.floats(0, 5), min_size=1, max_size=80),
)
def test_no_minute_has_more_than_two_minutes_worth(per_minute: int, gaps_s: list[float]) -> None:
    """A bucket of a minute's worth that runs off at the rate."""
    allowed, account, now_s = Allowance(calls_per_minute=per_minute), NOTHING, 0.0
    began: list[float] = []
    for gap_s in gaps_s:
        now_s += gap_s
        if admit(account, allowed, now_s=now_s) is None:
            account = begun(account, allowed, now_s=now_s)
            began.append(now_s)
    for at in began:
        assert sum(at <= one < at + 60 for one in began) <= 2 * per_minute + 1


def test_refusals_come_back_one_after_the_other() -> None:
    account = Account(running=10, mean_s=20.0)
    told = []
    for _ in range(4):
        told.append(next_end_ms(account))
        account = refused(account)
    assert told == [2_001, 4_001, 6_001, 8_001]
    account = replace(ended(account, lasted_s=20.0), running=10)
    assert next_end_ms(account) == 8_001, "one of them got its place"
    for _ in range(1_000):
        account = refused(account)
    assert next_end_ms(account) == 22_001, "most of a crowd don't come back"


def test_the_length_of_calls_is_learnt() -> None:
    account = begun(begun(NOTHING, Allowance(), now_s=0.0), Allowance(), now_s=0.0)
    account = ended(account, lasted_s=4.0)
    assert (account.running, account.mean_s) == (1, 4.0)
    assert ended(account, lasted_s=8.0).mean_s == pytest.approx(4.4)
    with pytest.raises(AssertionError, match="ends once"):
        ended(NOTHING, lasted_s=1.0)


def test_keys_are_told_apart_by_their_organisation() -> None:
    accounts, allowed = Accounts(), Allowance(concurrency_max=1)
    assert accounts.begin(KEY, allowed, now_s=0.0) is None
    assert accounts.begin(KEY, allowed, now_s=0.0) is not None
    assert accounts.begin(OTHER, allowed, now_s=0.0) is None
    accounts.end(KEY, lasted_s=1.0)
    assert accounts.begin(KEY, allowed, now_s=0.0) is None
    assert accounts.of(KEY).refused == 0


def test_a_rate_that_was_passed_is_no_crowd() -> None:
    accounts, allowed = Accounts(), Allowance(calls_per_minute=1)
    assert accounts.begin(KEY, allowed, now_s=0.0) is None
    assert accounts.begin(KEY, allowed, now_s=0.0) is not None
    assert accounts.of(KEY).refused == 0


def test_tokens_without_a_limit_are_not_counted() -> None:
    accounts = Accounts()
    accounts.begin(KEY, Allowance(), now_s=0.0)
    accounts.spend(KEY, Allowance(), 10_000, now_s=0.0)
    assert accounts.of(KEY).tokens == 0.0
    accounts.spend(KEY, Allowance(tokens_per_minute=1), 10_000, now_s=0.0)
    assert accounts.of(KEY).tokens == 10_000.0


def test_only_so_many_keys_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACCOUNTS_MAX", 3)
    accounts, allowed = Accounts(), Allowance(calls_per_minute=1)
    names = [(OrgId("home"), KeyId(f"key-{n}")) for n in range(6)]
    assert accounts.begin(names[0], allowed, now_s=0.0) is None
    for name in names[1:]:
        assert accounts.begin(name, allowed, now_s=0.0) is None
        accounts.end(name, lasted_s=0.0)
    assert [name for name in names if accounts.of(name) != NOTHING] == [names[0], *names[-2:]], "what runs is never forgotten"
    accounts.end(names[0], lasted_s=0.0)


def test_the_defaults_are_generous() -> None:
    assert Allowance() == Allowance(
        concurrency_max=CONCURRENCY_DEFAULT, waiting_max=CONCURRENCY_DEFAULT, calls_per_minute=0, tokens_per_minute=0, weight=1.0
    )

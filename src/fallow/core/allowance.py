"""How much an API key may ask for at a time: calls at once, calls a minute, tokens a minute, looked at before a body is read."""

from collections import OrderedDict
from math import floor

import msgspec
from msgspec.structs import replace

from fallow.model.call import Allowance
from fallow.model.errors import Failure
from fallow.model.ids import KeyId, OrgId

CODE = "rate_limit_exceeded"
MINUTE_S = 60.0
ACCOUNTS_MAX = 10_000
"""Keys whose use is remembered; those that run nothing are forgotten first, the least recently used before the others."""
LENGTH_RATE = 0.1
"""How far one call that ended moves what is believed of the next."""
LENGTH_GUESS_S = 5.0
"""How long a call takes until one was seen to end."""
RETRY_MS_MIN, RETRY_MS_MAX = 50, 60_000
"""The bounds of a prediction when a running call will end. When a bucket has run down is no prediction, and has no bound."""

KeyName = tuple[OrgId, KeyId]
"""A key's id is its organisation's own affair, so both are needed."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a key has on its hands, and what it has used of its rates.

    The rates are leaky buckets: what was spent runs off at the rate, and a minute's worth may be spent at once. Tokens may be spent
    beyond that, since an answer's length is known at its end; then the key waits until they have run off. `mean_s` is how long calls
    take of late, `refused` how many were told to come again and may do so before a newcomer.
    """

    running: int = 0
    refused: int = 0
    mean_s: float | None = None
    calls: float = 0.0
    tokens: float = 0.0
    at_s: float = 0.0


NOTHING = Account()


def admit(account: Account, allowance: Allowance, *, now_s: float) -> Failure | None:
    """None if the key may begin a call now, else the limit, what lifts it, and when to come again."""
    now = _run_off(account, allowance, now_s)
    if now.running >= allowance.concurrency_max:
        said = f"your key has {now.running} calls under way here, which is its limit; wait for one to end"
        return _over(said, "concurrency", next_end_ms(now))
    if allowance.calls_per_minute and now.calls + 1 > allowance.calls_per_minute:
        over = now.calls + 1 - allowance.calls_per_minute
        said = f"your key's limit of {allowance.calls_per_minute} calls a minute is used up"
        return _over(said, "calls_per_minute", _ms(over * MINUTE_S / allowance.calls_per_minute))
    if allowance.tokens_per_minute and now.tokens >= allowance.tokens_per_minute:
        over = now.tokens - allowance.tokens_per_minute
        said = f"your key's limit of {allowance.tokens_per_minute} tokens a minute is used up"
        return _over(said, "tokens_per_minute", _ms(over * MINUTE_S / allowance.tokens_per_minute))
    return None


def next_end_ms(account: Account) -> int:
    """In how many milliseconds there is a place for whoever asks now.

    Calls end at the rate of those that run by their mean length (Little's law), and those that were refused before come first,
    though no more of them than run: many never come back.
    """
    mean_s = LENGTH_GUESS_S if account.mean_s is None else account.mean_s
    running = max(1, account.running)
    before = min(account.refused, running)
    return min(RETRY_MS_MAX, max(RETRY_MS_MIN, _ms((before + 1) * mean_s / running)))


def refused(account: Account) -> Account:
    """One more was told to come again."""
    return replace(account, refused=min(account.refused, account.running) + 1)


def begun(account: Account, allowance: Allowance, *, now_s: float) -> Account:
    """A call was let in."""
    now = _run_off(account, allowance, now_s)
    return replace(now, running=now.running + 1, calls=now.calls + 1 if allowance.calls_per_minute else 0.0)


def spent(account: Account, allowance: Allowance, tokens: int, *, now_s: float) -> Account:
    """So many tokens were asked for or written; fewer than none corrects what was thought before."""
    if not allowance.tokens_per_minute:
        return account
    now = _run_off(account, allowance, now_s)
    return replace(now, tokens=max(0.0, now.tokens + tokens))


def ended(account: Account, *, lasted_s: float) -> Account:
    """A call that was let in is over, however it went."""
    assert account.running > 0, "a call ends once"
    mean_s = lasted_s if account.mean_s is None else account.mean_s + LENGTH_RATE * (lasted_s - account.mean_s)
    return replace(account, running=account.running - 1, refused=max(0, account.refused - 1), mean_s=mean_s)


def _run_off(account: Account, allowance: Allowance, now_s: float) -> Account:
    if not allowance.calls_per_minute and not allowance.tokens_per_minute:
        return account
    minutes = max(0.0, now_s - account.at_s) / MINUTE_S
    calls = max(0.0, account.calls - minutes * allowance.calls_per_minute)
    tokens = max(0.0, account.tokens - minutes * allowance.tokens_per_minute)
    return replace(account, calls=calls, tokens=tokens, at_s=max(now_s, account.at_s))


def _over(said: str, setting: str, retry_after_ms: int) -> Failure:
    text = f"{said} (or whoever keeps the hub can raise key.{setting} in its settings); try again in {retry_after_ms / 1000:.3g} s"
    return Failure(code=CODE, message=text, retry_after_ms=retry_after_ms)


def _ms(seconds: float) -> int:
    return floor(1000 * seconds) + 1


class Accounts:
    """The accounts of all keys that were seen. Nothing here looks at a clock."""

    def __init__(self) -> None:
        self._known: OrderedDict[KeyName, Account] = OrderedDict()

    def of(self, key: KeyName) -> Account:
        """The account of a key; an empty one if nothing is known of it."""
        return self._known.get(key, NOTHING)

    def begin(self, key: KeyName, allowance: Allowance, *, now_s: float) -> Failure | None:
        """Let a call of the key in, or say why not; one that was let in must `end`."""
        account = self.of(key)
        refusal = admit(account, allowance, now_s=now_s)
        if refusal is None:
            self._known[key] = begun(account, allowance, now_s=now_s)
        elif account.running >= allowance.concurrency_max:
            self._known[key] = refused(account)
        else:
            self._known[key] = account
        self._known.move_to_end(key)
        if len(self._known) > ACCOUNTS_MAX:
            idle = next((name for name, one in self._known.items() if not one.running), None)
            if idle is not None:
                del self._known[idle]
        return refusal

    def spend(self, key: KeyName, allowance: Allowance, tokens: int, *, now_s: float) -> None:
        """Tokens of a call that was let in."""
        self._known[key] = spent(self._known[key], allowance, tokens, now_s=now_s)

    def end(self, key: KeyName, *, lasted_s: float) -> None:
        """A call that was let in is over."""
        self._known[key] = ended(self._known[key], lasted_s=lasted_s)

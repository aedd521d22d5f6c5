"""The gateway's side of one attempt: from asking the node to the answer's last byte, with every timer."""

from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.model.errors import Failure
from fallow.model.messages import Accepted, Alive, Final, Head, Lost, Part, Unopened
from fallow.model.receipt import Usage

ACCEPT_MS = 1_000
SILENCE_MS = 3_000
PING_MS = 500
"""An answer that flows and pauses for so long: the node is asked whether it is still there. The broker answers for one that isn't."""
PING_EARLY_MS = 1_400
"""The same before the answer begins, when nothing but a word each second is to be heard."""
FIRST_MS_MIN = 30_000
FIRST_FACTOR = 3
WHOLE_MS_MAX = 30 * 60_000
"""An answer that is held until it is whole has no first token to wait for; silence and the engine's own watch bound it before that."""

Phase = Literal["asked", "accepted", "answering", "done"]


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. `started` is set once a byte of the answer went to the caller; from then on another node can only go on from there.

    `keeps` is set when the answer is held back until it is whole.
    """

    phase: Phase = "asked"
    heard_at_ms: int
    first_by_ms: int
    next_index: int = 0
    keeps: bool = False
    pinged_at_ms: int = 0
    asked_again: bool = False

    @property
    def started(self) -> bool:
        return self.next_index > 0 and not self.keeps


class Asked(msgspec.Struct, frozen=True):
    """The request left only now: a session with the node had to be opened first."""


class Unheard(msgspec.Struct, frozen=True):
    """Nobody listens at the node's subject."""


class Tick(msgspec.Struct, frozen=True):
    """Time went by."""


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """The node sent what no node may send."""

    code: str = "answer_malformed"
    message: str = "the node sent a message that can't be read"


class CallerLeft(msgspec.Struct, frozen=True):
    """The caller closed the connection."""


class BusLost(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing more can come: the connection to the broker broke, or the gateway is being stopped."""

    code: str = "broker_lost"
    message: str = "the connection to the broker broke"


class Deliver(msgspec.Struct, frozen=True):
    """Give these bytes to the caller; the first time with the answer's head."""

    data: bytes
    head: Head | None


class Finish(msgspec.Struct, frozen=True):
    """The answer is whole."""

    usage: Usage | None


class Fail(msgspec.Struct, frozen=True):
    """This attempt came to nothing."""

    failure: Failure


class Stop(msgspec.Struct, frozen=True):
    """Tell the node that nobody waits for it."""


class Ask(msgspec.Struct, frozen=True):
    """Ask the node whether it is still there."""


class Again(msgspec.Struct, frozen=True):
    """Send the request once more, under a new session."""


Event = Asked | Accepted | Alive | Part | Final | Unheard | Unopened | Lost | Tick | Broken | CallerLeft | BusLost
Effect = Deliver | Finish | Fail | Stop | Ask | Again


def ask(*, now_ms: int, first_token_in_ms: int, keeps: bool, load_wait_ms: int = 0) -> Relay:
    """An attempt that was just sent; `first_token_in_ms` is the quote's prediction for a model that is loaded."""
    first_ms = WHOLE_MS_MAX if keeps else max(FIRST_MS_MIN, FIRST_FACTOR * first_token_in_ms)
    return Relay(heard_at_ms=now_ms, first_by_ms=now_ms + load_wait_ms + first_ms, keeps=keeps)


def step(relay: Relay, event: Event, *, now_ms: int) -> tuple[Relay, tuple[Effect, ...]]:
    """What an event does to an attempt."""
    match relay.phase, event:
        case "done", _:
            return relay, ()  # late parts of a dead attempt
        case "asked", Asked():
            return replace(relay, heard_at_ms=now_ms), ()
        case "asked", Unopened():
            return _reopen(relay, event, now_ms)
        case "accepted" | "answering", Asked() | Unopened():
            return relay, ()  # it was opened; anybody on the way could say that it wasn't
        case "asked" | "accepted", Accepted() | Alive():
            return replace(relay, phase="accepted", heard_at_ms=now_ms), ()
        case "answering", Accepted() | Alive():
            return replace(relay, heard_at_ms=now_ms), ()
        case "asked" | "accepted" | "answering", Part():
            return _take(relay, event, now_ms)
        case "asked" | "accepted" | "answering", Final():
            return _end(relay, event, now_ms)
        case "asked" | "accepted" | "answering", Unheard():
            return _fail(relay, "node_unreachable", "the node left the network")
        case "asked" | "accepted" | "answering", Lost():
            return _fail(relay, "attempt_lost", "the node doesn't know this attempt any more")
        case "asked" | "accepted" | "answering", BusLost() | Broken():
            return _fail(relay, event.code, event.message)
        case "asked" | "accepted" | "answering", CallerLeft():
            return replace(relay, phase="done"), (Stop(),)
        case "asked", Tick():
            return _overdue(relay, now_ms, ACCEPT_MS)
        case "accepted" | "answering", Tick():
            return _overdue(relay, now_ms, SILENCE_MS)
    raise AssertionError(f"{relay.phase} {event}")


def _reopen(relay: Relay, unopened: Unopened, now_ms: int) -> tuple[Relay, tuple[Effect, ...]]:
    """A node that started anew knows no sessions: once, the request is sent under a new one."""
    if relay.asked_again or unopened.reason == "not_vouched":
        return _fail(relay, "not_opened", f"the node could not open the call ({unopened.reason})")
    return replace(relay, heard_at_ms=now_ms, asked_again=True), (Again(),)


def _take(relay: Relay, part: Part | Final, now_ms: int) -> tuple[Relay, tuple[Effect, ...]]:
    if part.index < relay.next_index:
        return relay, ()
    if part.index > relay.next_index:
        return _fail(relay, "answer_gap", "a part of the answer got lost on the way")
    if part.index == 0 and part.head is None:
        return _fail(relay, "answer_malformed", "the answer began without its head")
    relay = replace(relay, phase="answering", heard_at_ms=now_ms, next_index=part.index + 1)
    return relay, (Deliver(part.data, part.head),)


def _end(relay: Relay, final: Final, now_ms: int) -> tuple[Relay, tuple[Effect, ...]]:
    if final.failure is not None:
        return replace(relay, phase="done"), (Fail(final.failure),)
    relay, effects = _take(relay, final, now_ms)
    if relay.phase == "done" or not effects:
        return relay, effects
    return replace(relay, phase="done"), (*effects, Finish(final.usage))


def _overdue(relay: Relay, now_ms: int, silence_ms: int) -> tuple[Relay, tuple[Effect, ...]]:
    if now_ms - relay.heard_at_ms > silence_ms:
        return _fail(relay, "node_silent", f"the node said nothing for {silence_ms / 1000:g} s")
    if relay.next_index == 0 and now_ms > relay.first_by_ms:
        return _fail(relay, "node_too_slow", "the node did not begin to answer in time")
    since = now_ms - max(relay.heard_at_ms, relay.pinged_at_ms)
    if relay.phase != "asked" and since > (PING_MS if relay.phase == "answering" else PING_EARLY_MS):
        return replace(relay, pinged_at_ms=now_ms), (Ask(),)
    return relay, ()


def _fail(relay: Relay, code: str, message: str) -> tuple[Relay, tuple[Effect, ...]]:
    return replace(relay, phase="done"), (Stop(), Fail(Failure(code=code, message=message)))

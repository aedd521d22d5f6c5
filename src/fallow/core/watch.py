"""The life of an engine: started when wanted, watched, restarted with back-off; a stall is a fault too."""

from typing import Literal

import msgspec
from msgspec.structs import replace

BACK_OFF_MS_MIN = 500
BACK_OFF_MS_MAX = 60_000
HEALTHY_MS = 300_000
"""An engine that ran this long is forgiven its earlier faults."""
STALL_MS = 30_000
LOAD_MS_BASE = 120_000
LOAD_MS_PER_GIB = 20_000
STOP_MS = 5_000
GIVE_UP_FAULTS = 8
"""After this many faults in a row the offer is called failed; it is still tried, at the longest back-off."""

Phase = Literal["cold", "loading", "ready", "stopping", "leaving", "backing_off"]


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. `since_ms` is when the phase began, `until_ms` when loading or backing off is over."""

    weights_bytes: int
    phase: Phase = "cold"
    since_ms: int = 0
    until_ms: int = 0
    faults: int = 0
    loaded_in_ms: int | None = None
    stall_ms: int = STALL_MS


class Wanted(msgspec.Struct, frozen=True):
    """Somebody needs the engine."""


class Unwanted(msgspec.Struct, frozen=True):
    """The engine's memory is needed for another one."""


class Loaded(msgspec.Struct, frozen=True):
    """The engine answers that it is ready."""


class Exited(msgspec.Struct, frozen=True):
    """The engine's process ended, or could not be started."""


class Tick(msgspec.Struct, frozen=True):
    """Time went by. `running` counts the calls in the engine, `progress_at_ms` is when any of them last moved."""

    running: int
    progress_at_ms: int


class Launch(msgspec.Struct, frozen=True):
    """Start the process."""


class Kill(msgspec.Struct, frozen=True):
    """End the process at once."""

    why: Literal["stalled", "load_too_long", "not_stopped", "unwanted"]


class Resumed(msgspec.Struct, frozen=True):
    """The process goes on after it was stopped for so long: its time stood still."""

    stopped_ms: int


Event = Wanted | Unwanted | Loaded | Exited | Tick | Resumed
Effect = Launch | Kill


def step(watch: Watch, event: Event, *, now_ms: int) -> tuple[Watch, tuple[Effect, ...]]:
    """What an event does to an engine."""
    match watch.phase, event:
        case "cold", Wanted():
            return _launch(watch, now_ms)
        case "loading" | "ready" | "stopping" | "leaving" | "backing_off", Wanted():
            return watch, ()
        case "loading" | "ready", Unwanted():
            return replace(watch, phase="leaving", since_ms=now_ms), (Kill("unwanted"),)
        case "stopping", Unwanted():
            return replace(watch, phase="leaving", since_ms=now_ms), ()
        case "backing_off", Unwanted():
            return replace(watch, phase="cold", since_ms=now_ms), ()
        case "cold" | "leaving", Unwanted():
            return watch, ()
        case "loading", Loaded():
            return replace(watch, phase="ready", since_ms=now_ms, loaded_in_ms=now_ms - watch.since_ms), ()
        case "cold" | "ready" | "stopping" | "leaving" | "backing_off", Loaded():
            return watch, ()
        case "loading" | "ready" | "stopping", Exited():
            return _back_off(watch, now_ms), ()
        case "leaving", Exited():
            return replace(watch, phase="cold", since_ms=now_ms), ()
        case "cold" | "backing_off", Exited():
            return watch, ()
        case "loading" | "backing_off", Resumed(stopped_ms):
            stood_ms = max(0, min(stopped_ms, now_ms - watch.since_ms))  # the phase may have begun while it was stopped
            return replace(watch, since_ms=watch.since_ms + stood_ms, until_ms=watch.until_ms + stood_ms), ()
        case "cold" | "ready" | "stopping" | "leaving", Resumed():
            return watch, ()
        case "loading", Tick() if now_ms > watch.until_ms:
            return replace(watch, phase="stopping", since_ms=now_ms), (Kill("load_too_long"),)
        case "ready", Tick() if _is_stalled(watch, event, now_ms):
            return replace(watch, phase="stopping", since_ms=now_ms, faults=_faults(watch, now_ms)), (Kill("stalled"),)
        case "stopping" | "leaving", Tick() if now_ms - watch.since_ms > STOP_MS:
            return replace(watch, since_ms=now_ms), (Kill("not_stopped"),)
        case "backing_off", Tick() if now_ms >= watch.until_ms:
            return _launch(watch, now_ms)
        case "cold" | "loading" | "ready" | "stopping" | "leaving" | "backing_off", Tick():
            return watch, ()
    raise AssertionError(f"{watch.phase} {event}")


def _is_stalled(watch: Watch, tick: Tick, now_ms: int) -> bool:
    return tick.running > 0 and now_ms - max(tick.progress_at_ms, watch.since_ms) > watch.stall_ms


def _faults(watch: Watch, now_ms: int) -> int:
    """The faults that still count."""
    return 0 if watch.phase == "ready" and now_ms - watch.since_ms >= HEALTHY_MS else watch.faults


def _launch(watch: Watch, now_ms: int) -> tuple[Watch, tuple[Effect, ...]]:
    load_ms = LOAD_MS_BASE + LOAD_MS_PER_GIB * watch.weights_bytes // 2**30
    return replace(watch, phase="loading", since_ms=now_ms, until_ms=now_ms + load_ms), (Launch(),)


def _back_off(watch: Watch, now_ms: int) -> Watch:
    faults = _faults(watch, now_ms) + 1
    wait_ms = min(BACK_OFF_MS_MAX, BACK_OFF_MS_MIN * 2 ** min(faults - 1, 10))
    return replace(watch, phase="backing_off", since_ms=now_ms, until_ms=now_ms + wait_ms, faults=faults)


def ready_in_ms(watch: Watch, *, now_ms: int) -> int:
    """When the engine will answer, as far as we can tell; 0 if it does now."""
    usual = watch.loaded_in_ms if watch.loaded_in_ms is not None else load_guess_ms(watch.weights_bytes)
    match watch.phase:
        case "ready":
            return 0
        case "loading":
            return max(100, usual - (now_ms - watch.since_ms))
        case "backing_off":
            return max(0, watch.until_ms - now_ms) + usual
        case "cold" | "stopping" | "leaving":
            return usual


def progress(watch: Watch, *, now_ms: int) -> float | None:
    """How far loading is, 0 to 1, from how long it took before; None unless it is loading."""
    if watch.phase != "loading":
        return None
    passed = max(0, now_ms - watch.since_ms)
    return round(min(0.99, passed / (passed + ready_in_ms(watch, now_ms=now_ms))), 2)


def load_guess_ms(weights_bytes: int) -> int:
    """A first guess: the start of a process, and reading the weights at 200 MB/s."""
    return 1_000 + weights_bytes // 200_000


def is_failed(watch: Watch) -> bool:
    """Whether the engine failed so often in a row that no call should wait for it."""
    return watch.faults >= GIVE_UP_FAULTS and watch.phase != "ready"

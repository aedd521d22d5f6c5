"""Which models a node keeps in memory: one comes in when it is called for or planned, the least recently used leave for it."""

from collections.abc import Sequence, Set
from typing import Literal

import msgspec
from msgspec.structs import replace

IDLE_LEAVES_MS = 15 * 60_000
"""A model that nobody called in this time leaves memory: its owner has a use for that."""
FRESH_MS = 60_000
"""A model that was called this recently doesn't leave for one that is only planned, or the two would take turns."""


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """One model that the node lends. `is_present` from the moment its engine starts until its memory is free again.

    `calls` counts those that run or wait for it.
    """

    model: str
    needs_bytes: int
    is_present: bool
    calls: int
    used_at_ms: int
    is_leaving: bool = False


class Enter(msgspec.Struct, frozen=True):
    """There is room: start the engine."""


class Evict(msgspec.Struct, frozen=True):
    """These must leave first; nobody calls them now."""

    models: tuple[str, ...]


class Wait(msgspec.Struct, frozen=True):
    """There is room once these have nothing to do, or have left."""

    models: tuple[str, ...]
    why: Literal["in_use", "leaving"]


class Never(msgspec.Struct, frozen=True):
    """The model alone is larger than the limit."""


Verdict = Enter | Evict | Wait | Never


def make_room(wanted: str, residents: Sequence[Resident], *, limit_bytes: int, held: Set[str] = frozenset()) -> Verdict:
    """What must happen so that `wanted` can be in memory; a model with calls is never evicted, one of `held` only after others."""
    newcomer = next(one for one in residents if one.model == wanted)
    if newcomer.needs_bytes > limit_bytes:
        return Never()
    present = [one for one in residents if one.is_present and one.model != wanted]
    lacking = newcomer.needs_bytes - (limit_bytes - sum(one.needs_bytes for one in present))
    if newcomer.is_present and not newcomer.is_leaving:
        return Enter()
    if newcomer.is_leaving:
        return Wait((wanted,), "leaving")
    if lacking <= 0:
        return Enter()
    leaving = [one for one in present if one.is_leaving]
    if lacking <= sum(one.needs_bytes for one in leaving):
        return Wait(tuple(one.model for one in leaving), "leaving")
    lacking -= sum(one.needs_bytes for one in leaving)
    evicted: list[str] = []
    idle = [one for one in present if not one.is_leaving and not one.calls]
    for one in sorted(idle, key=lambda one: (one.model in held, one.used_at_ms, one.model)):
        evicted.append(one.model)
        lacking -= one.needs_bytes
        if lacking <= 0:
            return Evict(tuple(evicted))
    return Wait(tuple(one.model for one in present if one.calls), "in_use")


def make_planned_room(wanted: str, residents: Sequence[Resident], *, limit_bytes: int, held: Set[str], now_ms: int) -> Verdict:
    """As `make_room` for a model that is planned and not called: what is planned too, or was called lately, stays."""
    guarded = [replace(one, calls=one.calls or int(one.model in held or now_ms - one.used_at_ms < FRESH_MS)) for one in residents]
    return make_room(wanted, guarded, limit_bytes=limit_bytes)


def idle(residents: Sequence[Resident], *, stay: Set[str], now_ms: int) -> tuple[str, ...]:
    """The models that leave because nobody calls them; those of `stay` don't."""
    return tuple(
        one.model
        for one in residents
        if one.is_present and not one.is_leaving and not one.calls and one.model not in stay and now_ms - one.used_at_ms >= IDLE_LEAVES_MS
    )

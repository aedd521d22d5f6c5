"""Which models a node keeps in memory: one comes in when it is called for, and the least recently used ones leave for it."""

from collections.abc import Sequence
from typing import Literal

import msgspec


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


def make_room(wanted: str, residents: Sequence[Resident], *, limit_bytes: int) -> Verdict:
    """What must happen so that `wanted` can be in memory; a model with calls is never evicted."""
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
    for one in sorted((one for one in present if not one.is_leaving and not one.calls), key=lambda one: (one.used_at_ms, one.model)):
        evicted.append(one.model)
        lacking -= one.needs_bytes
        if lacking <= 0:
            return Evict(tuple(evicted))
    return Wait(tuple(one.model for one in present if one.calls), "in_use")

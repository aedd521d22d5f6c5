"""Which of an engine's slots a request gets, and whether what the slot remembers may be reused: by the same key only.

A slot keeps the last prompt that it read. A request that begins alike is answered sooner and its usage says so, which would tell
one key what another asked. So a slot's memory belongs to the key that filled it, and whoever comes next begins with nothing.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.core.prefix import Blocks, common
from fallow.model.ids import KeyId, OrgId

DOUBT_MS = 30_000
"""How long after the engine went on a request that was left behind may still come to its slot."""

Ending = Literal["begun", "refused", "lost"]
"""How a request left its slot: after the engine began to answer, by a refusal, or before either (its caller left, the engine died)."""


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Whose call it is. A key's id is its organisation's own affair, so both are needed."""

    org_id: OrgId
    key_id: KeyId


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one slot.

    `asker` is whose prompt it holds: None if it is nobody's, or if that isn't sure. `used_at_ms` is None until it was used. A slot
    whose request was lost `is_doubted` until the next one begins; what is written there before `trusted_at_ms` isn't reused.
    """

    asker: Asker | None = None
    blocks: Blocks = ()
    used_at_ms: int | None = None
    is_busy: bool = False
    is_doubted: bool = False
    trusted_at_ms: int = 0


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Where one request goes. The engine itself takes `others` for further choices; it empties them when they are written."""

    slot: int
    may_reuse: bool
    others: tuple[int, ...] = ()

    @property
    def choices(self) -> int:
        return 1 + len(self.others)


def choose(slots: Sequence[Slot], asker: Asker, blocks: Blocks, *, choices: int = 1) -> Seat | None:
    """The free slot whose memory fits best, and room for as many further choices as there are free slots; None if all are busy.

    What others remember is spared as long as possible: the key's own slot that begins alike, its own that remembers little, one
    that remembers nothing of use, its own least recently used, and only then another key's.
    """
    free = [index for index, slot in enumerate(slots) if not slot.is_busy]
    if not free:
        return None
    best = min(free, key=lambda index: (*_rank(slots[index], asker, blocks), index))
    others = [index for index in free if index != best]  # the engine takes its free slots in this order
    return Seat(slot=best, may_reuse=slots[best].asker == asker, others=tuple(others[: choices - 1]))


def _rank(slot: Slot, asker: Asker, blocks: Blocks) -> tuple[int, int, int, int]:
    used_at_ms = -1 if slot.used_at_ms is None else slot.used_at_ms
    if slot.asker is None:
        return 2, 0, 0, used_at_ms
    if slot.asker != asker:
        return 4, 0, 0, used_at_ms
    same = common(slot.blocks, blocks)
    if same:
        return 0, -same, len(slot.blocks), used_at_ms  # of two that fit alike, the one that has less to lose
    return 3 if slot.blocks else 1, 0, 0, used_at_ms


def take(slots: Sequence[Slot], seat: Seat) -> tuple[Slot, ...]:
    """The request is on its way. What the slot held is nobody's from now on, unless it is to be reused."""
    taken = list(slots)
    for index in (seat.slot, *seat.others):
        assert not slots[index].is_busy, "a slot answers one request at a time"
        is_kept = index == seat.slot and seat.may_reuse
        kept = slots[index] if is_kept else replace(slots[index], asker=None, blocks=())
        taken[index] = replace(kept, is_busy=True)
    return tuple(taken)


def begin(slots: Sequence[Slot], seat: Seat, asker: Asker, blocks: Blocks, *, now_ms: int) -> tuple[Slot, ...]:
    """The engine answers: the slot holds this request's prompt, and nothing else.

    A request that was lost before may reach the engine later than this one. The engine runs now, so that is soon or never.
    """
    slot = slots[seat.slot]
    trusted_at_ms = now_ms + DOUBT_MS if slot.is_doubted else slot.trusted_at_ms
    begun = replace(slot, asker=asker, blocks=blocks, is_doubted=False, trusted_at_ms=trusted_at_ms)
    return _with(slots, seat.slot, begun)


def leave(slots: Sequence[Slot], seat: Seat, ending: Ending, *, now_ms: int) -> tuple[Slot, ...]:
    """The request is over, or nobody waits for it any more."""
    left = slots
    for index in seat.others:
        left = _with(left, index, replace(left[index], is_busy=False, used_at_ms=now_ms))
    slot = left[seat.slot]
    slot = replace(slot, is_busy=False, used_at_ms=now_ms, is_doubted=slot.is_doubted or ending == "lost")
    if now_ms < slot.trusted_at_ms:
        slot = replace(slot, asker=None, blocks=())
    return _with(left, seat.slot, slot)


def _with(slots: Sequence[Slot], index: int, slot: Slot) -> tuple[Slot, ...]:
    return (*slots[:index], slot, *slots[index + 1 :])

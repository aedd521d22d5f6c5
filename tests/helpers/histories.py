"""Judges what callers saw: each call ends exactly once, and what came is the right answer's beginning, whole if it was said to be."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

ANCHOR_CHARACTERS = 9
"""So many characters in a row tell where in the right answer a text goes on; the stub's words are as long."""
RETRY_STATUSES = frozenset({429, 503})
INTERRUPTED = frozenset({"stream_interrupted"})
QUOTED_MAX = 60


class Text(msgspec.Struct, frozen=True, tag=True):
    """A piece of the answer came."""

    text: str
    at_s: float


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer was said to be whole: `[DONE]`, or the end of a body with a length."""

    at_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error came, under its public code; an empty one is an error that can't be read."""

    code: str
    at_s: float


class Cut(msgspec.Struct, frozen=True, tag=True):
    """The connection broke, or its body ended, before any end was said."""

    at_s: float


class Left(msgspec.Struct, frozen=True, tag=True):
    """The caller itself went away. Until then nothing may be wrong, and nothing is owed after."""

    at_s: float


Event = Text | Done | Failed | Cut | Left


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One call as its caller saw it. `name` is the caller's own, `right` the whole right answer; times are seconds of one clock.

    `status` is 0 if no head came. Header names are lower case.
    """

    name: str
    right: str
    status: int = 0
    headers: Mapping[str, str] = {}
    sent_s: float = 0.0
    events: tuple[Event, ...] = ()

    @property
    def delivered(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def texts(self) -> list[Text]:
        return [event for event in self.events if isinstance(event, Text)]

    @property
    def is_complete(self) -> bool:
        """Whether the caller got what they asked for."""
        return self.status == 200 and self.delivered == self.right and any(isinstance(event, Done) for event in self.events)

    @property
    def code(self) -> str | None:
        """The error that it ended with."""
        return next((event.code for event in self.events if isinstance(event, Failed)), None)

    @property
    def first_s(self) -> float | None:
        """Seconds from sending to the first piece."""
        return self.texts[0].at_s - self.sent_s if self.texts else None

    @property
    def ended_s(self) -> float | None:
        """When the end came, on the clock of the events."""
        return next((event.at_s for event in self.events if not isinstance(event, Text)), None)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that must not happen: which call, which rule, and what was there instead."""

    name: str
    rule: str
    what: str


class Damage(NamedTuple):
    """Characters by which a delivered text differs from the right answer's beginning."""

    repeated: int
    missing: int
    strange: int

    @property
    def total(self) -> int:
        return sum(self)


def damage(delivered: str, right: str) -> Damage:
    """What was said twice, left out, or never in the answer. What an interrupted text lacks at its end isn't counted.

    Where the text leaves the right answer, it is looked for there again by its next `ANCHOR_CHARACTERS`, at the nearest place.
    """
    repeated = missing = strange = at = place = 0
    while at < len(delivered):
        if place < len(right) and delivered[at] == right[place]:
            at, place = at + 1, place + 1
            continue
        found = _nearest(right, delivered[at : at + ANCHOR_CHARACTERS], place)
        if found is None:
            strange, at = strange + 1, at + 1
        else:
            repeated, missing = repeated + max(0, place - found), missing + max(0, found - place)
            place = found
    return Damage(repeated, missing, strange)


def _nearest(right: str, anchor: str, place: int) -> int | None:
    """Where `anchor` stands in the right answer, nearest to `place` but not at it."""
    before, after = right.rfind(anchor, 0, max(0, place - 1) + len(anchor)), right.find(anchor, place + 1)
    while before >= place:  # an anchor that overlaps the place itself
        before = right.rfind(anchor, 0, before + len(anchor) - 1)
    found = [one for one in (before, after) if one >= 0]
    return min(found, key=lambda one: (abs(one - place), one), default=None)


def judge(seen: Seen, *, interruptions: frozenset[str] = INTERRUPTED) -> list[Fault]:
    """All that is wrong with one call. `interruptions` are the codes with which an answer that began may end."""
    found = [*_ends(seen), *_words(seen), *_errors(seen, interruptions)]
    return [Fault(name=seen.name, rule=rule, what=what) for rule, what in found]


def judge_all(calls: Sequence[Seen], *, interruptions: frozenset[str] = INTERRUPTED) -> list[Fault]:
    """All that is wrong with many calls, each and together: no two of them are the same call to the gateway."""
    found = [fault for seen in calls for fault in judge(seen, interruptions=interruptions)]
    owners: dict[str, str] = {}
    for seen in calls:
        call_id = seen.headers.get("fallow-call")
        if call_id is not None and owners.setdefault(call_id, seen.name) != seen.name:
            found.append(Fault(name=seen.name, rule="shared_id", what=f"{call_id} is the id of {owners[call_id]} too"))
    return found


def _ends(seen: Seen) -> Iterable[tuple[str, str]]:
    """Once, and nothing after it."""
    ends = [at for at, event in enumerate(seen.events) if not isinstance(event, Text)]
    kinds = ", ".join(type(seen.events[at]).__name__ for at in ends)
    if not ends:
        yield "no_end", "the call has not ended"
    elif isinstance(seen.events[ends[0]], Cut):
        yield "cut", f"the connection ended after {len(seen.delivered)} characters without a word"
    if len(ends) > 1:
        yield "many_ends", f"it ended {len(ends)} times: {kinds}"
    if ends and any(isinstance(event, Text) for event in seen.events[ends[0] :]):
        yield "text_after_end", f"text came after {kinds}"


def _words(seen: Seen) -> Iterable[tuple[str, str]]:
    """A prefix of the right answer without gap and repetition; all of it if it is said to be whole."""
    if not seen.right.startswith(seen.delivered):
        harm, at = damage(seen.delivered, seen.right), _parting(seen.delivered, seen.right)
        where = f"from character {at}: {seen.delivered[at : at + QUOTED_MAX]!r} instead of {seen.right[at : at + QUOTED_MAX]!r}"
        for rule, count in harm._asdict().items():
            if count:
                yield rule, f"{count} characters, {where}"
    elif seen.status == 200 and any(isinstance(event, Done) for event in seen.events) and seen.delivered != seen.right:
        yield "incomplete", f"{len(seen.delivered)} of {len(seen.right)} characters came, and then it was said to be whole"


def _errors(seen: Seen, interruptions: frozenset[str]) -> Iterable[tuple[str, str]]:
    """Errors have a code and a fitting status; those that pass have a time to try again."""
    if seen.status and seen.status != 200:
        if seen.delivered:
            yield "text_of_error", f"status {seen.status} came with an answer's text"
        if any(isinstance(event, Done) for event in seen.events):
            yield "done_of_error", f"status {seen.status} was said to be a whole answer"
    if seen.code == "":
        yield "untyped", f"an error without a code, status {seen.status}"
    elif seen.code is not None and seen.status == 200 and seen.code not in interruptions:
        yield "other_code", f"the answer began and ended with {seen.code}"
    if seen.status in RETRY_STATUSES:
        after = seen.headers.get("retry-after", "")
        if not (after.isascii() and after.isdecimal() and int(after) > 0):
            yield "no_retry_after", f"status {seen.status} with retry-after {after!r}"


def _parting(one: str, other: str) -> int:
    """The first character in which two texts differ."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

"""How long a caller's pattern may take, worked out before it meets a text: Python's matcher goes back and tries again."""

import functools
import importlib
import operator
import re
import warnings
from collections.abc import Iterable
from typing import Any

import msgspec

CHARS_MAX = 200
REPEATS_MAX = 1_000
LOOPS_MAX = 2
"""Loops without an end that may give up characters to what follows them."""
NESTED_MAX = 5

# re's parser has no public name (sre_parse warns that it goes away), but only what it reads is what will run.
_regex = importlib.import_module("re._parser")

_OTHER, _ALL = 1 << 128, (1 << 129) - 1
_CATEGORY = {"DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S", "WORD": r"\w", "NOT_WORD": r"\W"}


class PatternCost(msgspec.Struct, frozen=True, kw_only=True):
    """Matching takes the text's length to this power; or `refused` says what is wrong with the pattern."""

    power: int = 0
    refused: str | None = None


@functools.lru_cache(1024)
def pattern_cost(pattern: str) -> PatternCost:
    """What it may cost to search a text for a pattern."""
    if len(pattern) > CHARS_MAX:
        return PatternCost(refused=f"is longer than {CHARS_MAX} characters")
    choices = _Choices()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = _regex.parse(pattern)
        choices.run(tree, 0, 0)
    except _TooSlowError:
        why = f"could take too long, repeats over {REPEATS_MAX} times, or looks around or back; simpler loops lift this"
        return PatternCost(refused=why)
    except (re.error, RecursionError, OverflowError, Warning):
        return PatternCost(refused="is not a valid regular expression")
    if tree.state.flags != re.UNICODE.value:
        return PatternCost(refused="sets flags")
    anchored = len(tree) > 0 and str(tree[0][0]) == "AT" and str(tree[0][1]).startswith("AT_BEGINNING")
    return PatternCost(power=choices.loops + (not anchored))  # without an anchor it is tried from every character


class _TooSlowError(ValueError):
    """The pattern may have to choose too often, or its cost isn't known."""


def _joined(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _characters(op: str, arg: Any) -> int:
    """At least the characters that an item of a pattern takes: a bit for each of ASCII, and one for all others."""
    match op:
        case "LITERAL":
            return 1 << min(int(arg), 128)
        case "RANGE":
            low, high = arg
            return (2 << min(int(high), 128)) - (1 << min(int(low), 128))
        case "CATEGORY":
            kind = re.compile(_CATEGORY[str(arg).removeprefix("CATEGORY_")])
            return _OTHER | sum(1 << code for code in range(128) if kind.match(chr(code)))
        case "IN":
            found = _joined(_characters(str(kind), one) for kind, one in arg if str(kind) != "NEGATE")
            return _ALL & ~found | _OTHER if str(arg[0][0]) == "NEGATE" else found
        case "ANY" | "NOT_LITERAL":
            return _ALL
    raise _TooSlowError


class _Choices:
    """How often a backtracking matcher may have to choose: `ways`, times the text's length for each of `loops`."""

    def __init__(self) -> None:
        self.loops = 0
        self.ways = 1

    def run(self, items: Any, follow: int, looped: int) -> tuple[int, bool]:
        """With which characters items in `looped` loops begin, and whether they may be empty; `follow` is what may come after them."""
        first, empty = 0, True
        for op, arg in reversed(list(items)):
            begin, skips = self._one(str(op), arg, first | (follow if empty else 0), looped)
            first, empty = begin | (first if skips else 0), skips and empty
        return first, empty

    def _one(self, op: str, arg: Any, follow: int, looped: int) -> tuple[int, bool]:
        match op:
            case "AT":
                return 0, True
            case "SUBPATTERN" if not arg[1] and not arg[2]:  # no flags of its own
                return self.run(arg[3], follow, looped)
            case "BRANCH":
                return self._branch(arg[1], follow, looped)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = arg
                return self._repeat(least, most, body, follow, looped)
        return _characters(op, arg), False

    def _branch(self, branches: Any, follow: int, looped: int) -> tuple[int, bool]:
        begins = [self.run(one, follow, looped) for one in branches]
        sets = [first | (follow if empty else 0) for first, empty in begins]
        overlap = sum(map(int.bit_count, sets)) != _joined(sets).bit_count()
        if overlap or sum(empty for _, empty in begins) > 1:
            self._choose(len(sets), looped)
        return _joined(first for first, _ in begins), any(empty for _, empty in begins)

    def _repeat(self, least: int, most: int, body: Any, follow: int, looped: int) -> tuple[int, bool]:
        endless = most is _regex.MAXREPEAT
        if looped >= NESTED_MAX:
            raise _TooSlowError
        first, empty = _Choices().run(body, 0, looped + 1)
        if max(least, 0 if endless else most) > REPEATS_MAX or (empty and most > 1):
            raise _TooSlowError
        if least != most and (first & follow or empty):
            self._choose(None if endless else most - least + 1, looped)
        self.run(body, follow | (first if most > 1 else 0), looped + (most > 1))
        return first, empty or least == 0

    def _choose(self, ways: int | None, looped: int) -> None:
        self.loops += ways is None
        self.ways *= ways or 1
        if looped or self.loops > LOOPS_MAX or self.ways > REPEATS_MAX:
            raise _TooSlowError

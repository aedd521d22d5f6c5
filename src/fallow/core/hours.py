"""Parts of the day as owners write them ("22-7"): the owner gate asks whether it is one of them, and when the next begins."""

from collections.abc import Sequence

from fallow.model.errors import shortened
from fallow.model.owner import DAY_MINUTES, Window

HOUR_MINUTES = 60
EXPECTED = 'expected hours such as "22-7" or "12:30-14, 20-8"'


def parse(text: str) -> tuple[Window, ...]:
    """The windows of a text; none for an empty one. "7-7" is the whole day, as is "0-24".

    Raises ValueError with one line that says what was expected.
    """
    return tuple(_window(part) for part in text.split(",")) if text.strip() else ()


def is_within(windows: Sequence[Window], minute: int) -> bool:
    """Whether a minute of the day is in one of the windows; no windows: always."""
    return not windows or any(_has(window, minute % DAY_MINUTES) for window in windows)


def minutes_until(windows: Sequence[Window], minute: int) -> int:
    """How many minutes until the next minute that is within; 0: this one is. Every window comes once a day, so there always is one."""
    if is_within(windows, minute):
        return 0
    return min((window.start - minute) % DAY_MINUTES for window in windows)


def written(windows: Sequence[Window]) -> str:
    """The windows as an owner would write them."""
    return ", ".join(f"{_clock(window.start)}-{_clock(window.end)}" for window in windows)


def _has(window: Window, minute: int) -> bool:
    if window.start < window.end:
        return window.start <= minute < window.end
    return minute >= window.start or minute < window.end


def _window(part: str) -> Window:
    start, dash, end = part.partition("-")
    if not dash:
        raise ValueError(f"{EXPECTED}, got {shortened(part.strip())!r}")
    return Window(_minute(start, DAY_MINUTES - 1, "23:59"), _minute(end, DAY_MINUTES, "24"))


def _minute(text: str, highest: int, highest_written: str) -> int:
    hour, colon, rest = text.strip().partition(":")
    if not _is_number(hour, 1) or (colon and not _is_number(rest, 2)):
        raise ValueError(f"{EXPECTED}, got {shortened(text.strip())!r} where a time should be")
    minutes = int(rest or 0)
    total = int(hour) * HOUR_MINUTES + minutes
    if minutes >= HOUR_MINUTES or total > highest:
        raise ValueError(f"{EXPECTED}: the time must be from 0 to {highest_written}, got {text.strip()!r}")
    return total


def _is_number(text: str, digits_min: int) -> bool:
    return digits_min <= len(text) <= 2 and text.isascii() and text.isdigit()


def _clock(minute: int) -> str:
    hour, rest = divmod(minute, HOUR_MINUTES)
    return f"{hour}:{rest:02}" if rest else str(hour)

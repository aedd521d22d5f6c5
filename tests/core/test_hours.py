"""Hours as owners write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.core.hours import is_within, minutes_until, parse, written
from fallow.model.owner import DAY_MINUTES, Window

MINUTES = st.integers(0, DAY_MINUTES - 1)
WINDOWS = st.lists(st.builds(Window, MINUTES, st.integers(0, DAY_MINUTES)), max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("", ()),
        ("  ", ()),
        ("22-7", (Window(22 * 60, 7 * 60),)),
        ("22:30-7:15", (Window(22 * 60 + 30, 7 * 60 + 15),)),
        ("12:30-14, 20-8", (Window(12 * 60 + 30, 14 * 60), Window(20 * 60, 8 * 60))),
        (" 9 - 17 ", (Window(9 * 60, 17 * 60),)),
        ("0-24", (Window(0, DAY_MINUTES),)),
        ("18-24:00", (Window(18 * 60, DAY_MINUTES),)),
        ("23:59-00:00", (Window(DAY_MINUTES - 1, 0),)),
        ("07-7", (Window(7 * 60, 7 * 60),)),
    ],
)
def test_what_is_understood(text: str, windows: tuple[Window, ...]) -> None:
    assert parse(text) == windows


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("always", "'always'"),
        ("22", "'22'"),
        ("22-", "''"),
        ("-7", "''"),
        ("22-7,", "''"),
        ("22-7-9", "'7-9'"),
        ("24-7", "0 to 23:59"),
        ("22-25", "0 to 24"),
        ("22-24:01", "0 to 24"),
        ("22:60-7", "'22:60'"),
        ("22:5-7", "'22:5'"),
        ("22:-7", "'22:'"),
        ("222-7", "'222'"),
        ("+2-7", "'+2'"),
        ("²-7", "'²'"),
        ("٣-7", "'٣'"),
        ("10pm-7am", "'10pm'"),
        ("22\n-x\ny", "where a time should be"),
        ("x" * 300, "x…"),
    ],
)
def test_what_is_not_says_what_was_expected(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="expected hours such as") as caught:
        parse(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "time", "within", "minutes"),
    [
        ("", "3:00", True, 0),
        ("22-7", "21:59", False, 1),
        ("22-7", "22:00", True, 0),
        ("22-7", "0:00", True, 0),
        ("22-7", "6:59", True, 0),
        ("22-7", "7:00", False, 15 * 60),
        ("9-17", "8:30", False, 30),
        ("9-17", "17:00", False, 16 * 60),
        ("9-24", "23:59", True, 0),
        ("9-24", "0:00", False, 9 * 60),
        ("7-7", "7:00", True, 0),
        ("0-0", "12:00", True, 0),
        ("12:30-14, 20-8", "15:00", False, 5 * 60),
        ("20-8, 12:30-14", "12:00", False, 30),
    ],
)
def test_when(text: str, time: str, within: bool, minutes: int) -> None:
    hour, _, rest = time.partition(":")
    minute = int(hour) * 60 + int(rest)
    assert is_within(parse(text), minute) is within
    assert minutes_until(parse(text), minute) == minutes


@given(WINDOWS, MINUTES)
def test_the_next_minute_within_is_the_first(windows: tuple[Window, ...], minute: int) -> None:
    wait = minutes_until(windows, minute)
    assert wait == next(n for n in range(DAY_MINUTES) if is_within(windows, (minute + n) % DAY_MINUTES))


@given(WINDOWS)
def test_what_is_written_is_understood(windows: tuple[Window, ...]) -> None:
    assert parse(written(windows)) == windows


@given(st.text(max_size=20) | st.text("0123456789:-, ", max_size=20))
def test_any_text_is_hours_or_an_error(text: str) -> None:
    try:
        windows = parse(text)
    except ValueError:
        return
    assert all(0 <= one.start < DAY_MINUTES and 0 <= one.end <= DAY_MINUTES for one in windows)

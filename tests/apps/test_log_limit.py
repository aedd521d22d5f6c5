"""The limit of the log: by kind, by the minute, and said."""

import logging

from fallow.apps.log_limit import KINDS_MAX, LINES_MAX, SPAN_S, LogLimit


def line(text: str, *about: object, at_s: float = 0.0, name: str = "fallow") -> logging.LogRecord:
    record = logging.LogRecord(name, logging.WARNING, "", 0, text, about, None)
    record.created = 1_000.0 + at_s
    return record


def test_the_first_lines_of_a_kind_are_written_and_the_last_says_so() -> None:
    limit = LogLimit()
    written = [one for number in range(3 * LINES_MAX) if limit.filter(one := line("node %d lies", number))]
    assert [one.getMessage() for one in written[:2]] == ["node 0 lies", "node 1 lies"]
    assert len(written) == LINES_MAX
    assert written[-1].getMessage() == f"node {LINES_MAX - 1} lies (more lines like this are left out for a minute)"


def test_other_kinds_and_other_minutes_have_their_own() -> None:
    limit = LogLimit()
    for number in range(LINES_MAX + 1):
        limit.filter(line("a %d", number))
    assert not limit.filter(line("a %d", 1))
    assert limit.filter(line("b"))
    assert limit.filter(line("a %d", 1, name="fallow.hub"))
    assert not limit.filter(line("a %d", 1, at_s=SPAN_S - 1))
    assert limit.filter(line("a %d", 1, at_s=SPAN_S))
    assert limit.filter(line("a %d", 1, at_s=-5.0)), "the clock was set back"


def test_kinds_are_not_remembered_without_end() -> None:
    limit = LogLimit()
    for number in range(3 * KINDS_MAX):
        assert limit.filter(line(f"kind {number}"))
    assert len(limit._seen) <= KINDS_MAX

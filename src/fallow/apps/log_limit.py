"""A log that nobody can flood: of each kind of line, so many a minute."""

import logging

LINES_MAX = 60
SPAN_S = 60.0
"""Lines of one kind (one text, whatever was filled into it) in such a time."""
KINDS_MAX = 1_000
"""Kinds that are counted at a time; with more of them, counting begins anew."""


class LogLimit(logging.Filter):
    """Lets the first lines of each kind through; the last of them says that further ones are left out."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        kind = (record.name, str(record.msg))
        since, lines = self._seen.get(kind, (record.created, 0))
        if not 0.0 <= record.created - since < SPAN_S:
            since, lines = record.created, 0
        if kind not in self._seen and len(self._seen) >= KINDS_MAX:
            self._seen.clear()
        self._seen[kind] = (since, lines + 1)
        if lines + 1 == LINES_MAX:
            record.msg, record.args = f"{record.getMessage()} (more lines like this are left out for a minute)", None
        return lines < LINES_MAX

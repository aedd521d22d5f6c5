"""What changed of API keys, numbered in the order of commits, so that gateways forget what they know of them."""

from collections.abc import Iterable

import sqlalchemy as sa

from fallow.adapters.sql.database import Database
from fallow.adapters.sql.schema import change
from fallow.model.messages import KEYS_CHANGED_MAX
from fallow.ports import Changes

CHANGES_LOCK = 0x46_61_6C_6C_6F_77_02
"""Held by whoever notes a change until it commits: else a reader could see number 6 before number 5, and never ask for 5."""
CHANGES_KEPT = 10_000
"""Who missed more is told that all keys changed."""


def note_changes(connection: sa.Connection, digests: Iterable[bytes | None]) -> None:
    """In the transaction that makes them, under CHANGES_LOCK. None: more than some keys are concerned."""
    for digest in digests:
        row = connection.execute(sa.insert(change).values(digest=digest).returning(change.c.number))
        connection.execute(sa.delete(change).where(change.c.number <= row.scalar_one() - CHANGES_KEPT))


def changes_after(database: Database, number: int) -> Changes:
    """All that changed after change `number`, which 0 is before the first of."""
    newer = sa.select(change.c.number, change.c.digest).where(change.c.number > number).order_by(change.c.number)
    with database.reading() as connection:
        oldest, newest = connection.execute(sa.select(sa.func.min(change.c.number), sa.func.max(change.c.number))).one()
        rows = connection.execute(newer.limit(KEYS_CHANGED_MAX + 1)).all()
    if newest is None:
        return Changes(0, (), number != 0)
    digests = tuple(dict.fromkeys(row.digest for row in rows))
    # a number ahead of ours comes from a database that was put back to an older copy
    if number > newest or number < oldest - 1 or None in digests or len(rows) > KEYS_CHANGED_MAX:
        return Changes(newest, (), True)
    return Changes(rows[-1].number if rows else newest, digests, False)

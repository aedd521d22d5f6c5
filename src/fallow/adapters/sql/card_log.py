"""The public log of cards, in SQL: a hash chain, whole however many append at once."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from fallow.adapters.sql.database import Database
from fallow.adapters.sql.schema import card_log as table
from fallow.core.membership import CHAIN_START, chained
from fallow.model.identity import LogEntry
from fallow.model.ids import NodeId

CARDS_LOCK = 0x46_61_6C_6C_6F_77_03
"""Held from reading the last entry until the next one is committed."""
PAGE_MAX = 1_000
"""Entries given out at once, of a few kilobytes each."""


class SqlCardLog:
    """Fills ports.CardLog."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, node_id: NodeId, card: bytes, *, at_ms: int) -> LogEntry:
        """`at_ms` is UTC. What the node said last is not logged again."""
        newest = sa.select(table).order_by(table.c.number.desc()).limit(1)
        with self._database.writing(lock=CARDS_LOCK) as connection:
            own = connection.execute(newest.where(table.c.node_id == node_id)).mappings().first()
            if own is not None and own["card"] == card:
                return _entry(own)
            last = connection.execute(newest).mappings().first()
            number = 1 if last is None else last["number"] + 1
            digest = chained(CHAIN_START if last is None else last["hash"], number=number, at_ms=at_ms, card=card)
            row = {"number": number, "node_id": node_id, "card": card, "at_ms": at_ms, "hash": digest}
            connection.execute(sa.insert(table).values(row))
            return _entry(row)

    def after(self, number: int, *, limit: int) -> list[LogEntry]:
        """At most `limit` entries, and never more than PAGE_MAX."""
        page = sa.select(table).where(table.c.number > number).order_by(table.c.number).limit(max(0, min(limit, PAGE_MAX)))
        with self._database.reading() as connection:
            return [_entry(row) for row in connection.execute(page).mappings()]


def _entry(row: Mapping[Any, Any]) -> LogEntry:
    return LogEntry(**row)

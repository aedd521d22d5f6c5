"""What API keys have cost, in SQL: a row for each process of a gateway, so that saying it again changes nothing."""

from collections.abc import Collection, Mapping

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from fallow.adapters.sql.database import Database
from fallow.adapters.sql.schema import api_key
from fallow.adapters.sql.schema import spending as table
from fallow.model.ids import GatewayId, KeyId


class SqlSpending:
    """Fills ports.Spending."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tell(self, gateway_id: GatewayId, since_ms: int, micro: Mapping[KeyId, int]) -> dict[KeyId, int]:
        """Keep the most that each key was said to have cost at this process of a gateway; gives what each has cost everywhere."""
        with self._database.writing() as connection:
            known = connection.execute(sa.select(api_key.c.id).where(api_key.c.id.in_(list(micro)))).scalars().all()
            rows = [
                {"key_id": id, "gateway_id": gateway_id, "since_ms": since_ms, "micro": micro[id]} for id in sorted(known) if micro[id] > 0
            ]
            if rows:
                connection.execute(self._insert(), rows)
            return dict.fromkeys(known, 0) | _totals(connection, known)

    def totals(self, key_ids: Collection[KeyId] | None = None) -> dict[KeyId, int]:
        """What each of these keys has cost everywhere; None: all that cost something."""
        with self._database.reading() as connection:
            return dict.fromkeys(key_ids or (), 0) | _totals(connection, key_ids)

    def _insert(self) -> sqlite.Insert | postgresql.Insert:
        """A row, or more in a row that is there."""
        insert = sqlite.insert(table) if self._database.is_sqlite else postgresql.insert(table)
        micro = insert.excluded.micro
        return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_={"micro": micro}, where=micro > table.c.micro)


def _totals(connection: sa.Connection, key_ids: Collection[KeyId] | None) -> dict[KeyId, int]:
    query = sa.select(table.c.key_id, sa.func.sum(table.c.micro)).group_by(table.c.key_id)
    if key_ids is not None:
        query = query.where(table.c.key_id.in_(list(key_ids)))
    return {id: int(micro) for id, micro in connection.execute(query)}

"""API keys by their digests, in SQL."""

import hmac
from typing import Any

import msgspec
import sqlalchemy as sa

from fallow.adapters.sql.changes import CHANGES_LOCK, note_changes
from fallow.adapters.sql.database import Database
from fallow.adapters.sql.organisations import must_know
from fallow.adapters.sql.schema import DIGEST_HEAD_BYTES
from fallow.adapters.sql.schema import api_key as table
from fallow.model.errors import UnknownName, shortened
from fallow.model.identity import ApiKey
from fallow.model.ids import KeyId

COLUMNS = [column for column in table.c if column.name != "digest_head"]


class SqlKeys:
    """Fills ports.Keys."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: ApiKey) -> None:
        """Raises NameTaken, and UnknownName for an organisation that isn't there."""
        taken = f"there is a key {shortened(key.id)} already, or the same key under another id"
        with self._database.writing(lock=CHANGES_LOCK, taken=taken) as connection:
            must_know(connection, key.org_id)
            connection.execute(sa.insert(table).values(_row(key)))
            note_changes(connection, [key.digest])  # a gateway may remember that nobody knows it

    def all(self) -> list[ApiKey]:
        """Oldest first, those that can't be used any more included."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(*COLUMNS).order_by(table.c.created_at_ms, table.c.id))
            return [ApiKey(**row) for row in rows.mappings()]

    def find(self, digest: bytes) -> ApiKey | None:
        """The key with this SHA-256. How long that takes tells at most the digest's first bytes, from which no key follows."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(*COLUMNS).where(table.c.digest_head == digest[:DIGEST_HEAD_BYTES]))
            found = [row for row in rows.mappings() if hmac.compare_digest(row["digest"], digest)]
            return ApiKey(**found[0]) if found else None

    def named(self, id: KeyId) -> ApiKey:
        """Raises UnknownName."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(*COLUMNS).where(table.c.id == id)).mappings().first()
        if row is None:
            raise _unknown(id)
        return ApiKey(**row)

    def change(self, key: ApiKey) -> None:
        """Write all but its id anew; a revocation stays. Raises UnknownName, and NameTaken if another one has its digest."""
        taken = "there is the same key under another id"
        with self._database.writing(lock=CHANGES_LOCK, taken=taken) as connection:
            known = connection.execute(sa.select(table.c.digest, table.c.revoked_at_ms).where(table.c.id == key.id)).first()
            if known is None:
                raise _unknown(key.id)
            before, revoked_at_ms = known
            if revoked_at_ms is not None:  # somebody may have read the key before that, and change another limit now
                key = msgspec.structs.replace(key, revoked_at_ms=revoked_at_ms)
            must_know(connection, key.org_id)
            connection.execute(sa.update(table).where(table.c.id == key.id).values(_row(key)))
            note_changes(connection, dict.fromkeys((before, key.digest)))


def _row(key: ApiKey) -> dict[str, Any]:
    return msgspec.structs.asdict(key) | {"digest_head": key.digest[:DIGEST_HEAD_BYTES]}


def _unknown(id: KeyId) -> UnknownName:
    return UnknownName(f"there is no key {shortened(id)}")

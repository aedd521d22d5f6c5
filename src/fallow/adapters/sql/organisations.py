"""Organisations and their agreements, in SQL."""

import msgspec
import sqlalchemy as sa

from fallow.adapters.sql.changes import CHANGES_LOCK, note_changes
from fallow.adapters.sql.database import Database
from fallow.adapters.sql.schema import agreement as agreement_table
from fallow.adapters.sql.schema import organisation as organisation_table
from fallow.model.errors import NameTaken, UnknownName, shortened
from fallow.model.identity import Agreement, Organisation
from fallow.model.ids import OrgId


class SqlOrganisations:
    """Fills ports.Organisations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, organisation: Organisation) -> None:
        """Raises NameTaken."""
        taken = f"there is an organisation {shortened(organisation.id)} already"
        with self._database.writing(taken=taken) as connection:
            connection.execute(sa.insert(organisation_table).values(msgspec.structs.asdict(organisation)))

    def all(self) -> list[Organisation]:
        """By name."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(organisation_table).order_by(organisation_table.c.id))
            return [Organisation(**row) for row in rows.mappings()]

    def agree(self, agreement: Agreement) -> None:
        """Two may agree anew from when their last agreement ended; raises NameTaken before that, UnknownName if one isn't there."""
        left, right = agreement.left, agreement.right
        assert left < right, "the organisations of an agreement stand in order"
        table = agreement_table.c
        taken = f"{shortened(left)} and {shortened(right)} have an agreement already: end it before another one begins"
        running = sa.or_(table.ends_at_ms.is_(None), table.ends_at_ms > agreement.begins_at_ms)
        with self._database.writing(lock=CHANGES_LOCK, taken=taken) as connection:
            must_know(connection, left)
            must_know(connection, right)
            there = sa.select(table.left).where(table.left == left, table.right == right, running).limit(1)
            if connection.execute(there).first() is not None:
                raise NameTaken(taken)
            connection.execute(sa.insert(agreement_table).values(msgspec.structs.asdict(agreement)))
            note_changes(connection, [None])

    def end_agreement(self, left: OrgId, right: OrgId, *, at_ms: int) -> None:
        """From then on the two are no partners; raises UnknownName if they aren't at that time anyway."""
        table = agreement_table.c
        running = sa.or_(table.ends_at_ms.is_(None), table.ends_at_ms > at_ms)
        with self._database.writing(lock=CHANGES_LOCK) as connection:
            ended = connection.execute(
                sa.update(agreement_table).where(table.left == left, table.right == right, running).values(ends_at_ms=at_ms)
            )
            if ended.rowcount == 0:
                raise UnknownName(f"{shortened(left)} and {shortened(right)} have no agreement that could be ended")
            note_changes(connection, [None])

    def agreements(self) -> list[Agreement]:
        """All that ever were, by names and beginning."""
        table = agreement_table.c
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(agreement_table).order_by(table.left, table.right, table.begins_at_ms))
            return [Agreement(**row) for row in rows.mappings()]


def must_know(connection: sa.Connection, id: OrgId) -> None:
    """Raises UnknownName unless there is this organisation. None is ever taken away, so it stays there."""
    if connection.execute(sa.select(organisation_table.c.id).where(organisation_table.c.id == id)).first() is None:
        raise UnknownName(f"there is no organisation {shortened(id)}: add it first")

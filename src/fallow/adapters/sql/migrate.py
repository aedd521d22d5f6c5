"""Brings a database to the schema that this version of Fallow knows, step by step, whoever else starts at the same time."""

import threading
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fallow.adapters.sql.database import Database
from fallow.model.errors import StoreFailed, shortened

SCHEMA_LOCK = 0x46_61_6C_6C_6F_77_01
MIGRATE_MAX_MS = 600_000
"""A step may take so long on PostgreSQL, and who starts at the same time waits as long."""
HEAD = "head"
_upgrading = threading.Lock()
"""Alembic keeps what it is at in module variables, one for the whole process."""


def configuration() -> Config:
    """Alembic's, without a file: the steps lie in this package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def migrate(database: Database, *, to: str = HEAD) -> None:
    """All steps up to `to` that the database hasn't seen, in one transaction: either all are done, or none.

    Raises StoreFailed, also for a database that a newer version of Fallow has changed.
    """
    config = configuration()
    script = ScriptDirectory.from_config(config)
    with database.writing() as connection:
        if not database.is_sqlite:  # there, who writes has the whole file
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {MIGRATE_MAX_MS}")
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {MIGRATE_MAX_MS}")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
        version = version_of(connection)
        known = {step.revision for step in script.walk_revisions()}
        if version is not None and version not in known:
            raise StoreFailed(
                f"the database {database.shown} has schema {shortened(version)}, and this version of Fallow knows none after "
                f"{script.get_current_head()}: use the version that changed it, or go back to a copy from before"
            )
        if version != script.get_current_head():
            config.attributes["connection"] = connection
            with _upgrading:
                command.upgrade(config, to)


def version_of(connection: sa.Connection) -> str | None:
    """The last step that was done; None for an empty database."""
    return MigrationContext.configure(connection).get_current_revision()

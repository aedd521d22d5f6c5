"""A database by its address: transactions on SQLite or PostgreSQL, and what goes wrong in them as one line."""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from fallow.model.errors import MissingExtra, NameTaken, StoreFailed, shortened

CONNECTIONS_MAX = 8
"""Of one process to its database at once; who needs one more waits for it."""
CONNECTION_WAIT_S = 10
CONNECT_TIMEOUT_S = 10
LOCK_WAIT_MS = 10_000
"""How long a transaction waits for another one before it gives up."""
STATEMENT_MAX_MS = 30_000
"""PostgreSQL gives up a statement that takes longer."""
WAL_TRIES = 50
WAL_WAIT_S = 0.1
"""Between tries to switch a file to write-ahead logging, for which SQLite doesn't wait by itself."""
SHOWN_MAX = 300

DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
FORMS = "an address is sqlite:///path/of/a/file or postgresql://user:password@host/database"
DUPLICATE_SQLITE = {"SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_UNIQUE"}
DUPLICATE_POSTGRESQL = "23505"
_making = threading.Lock()


class Database:
    """An engine and its transactions. Everything raised is StoreFailed, or what the rule inside the transaction raised."""

    def __init__(self, engine: sa.Engine, *, shown: str) -> None:
        self.engine = engine
        self.shown = shown
        """Where it is, fit for a log: without user and password."""
        self.is_sqlite = engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with self._told(taken=""), self.engine.connect() as connection:
            yield connection.execution_options(fallow_reads=True)

    @contextlib.contextmanager
    def writing(self, *, lock: int = 0, taken: str = "") -> Iterator[sa.Connection]:
        """A transaction that writes: all of it, or nothing if an error leaves it.

        With `lock`, transactions of the same number come one after the other, commit included; on SQLite all that write do. `taken` is
        the text of NameTaken, raised if a row of that name is there.
        """
        with self._told(taken=taken), self.engine.begin() as connection:
            if lock and not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    @contextlib.contextmanager
    def _told(self, *, taken: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            if taken and _is_duplicate(error.orig):
                raise NameTaken(taken) from None
            raise self.failure(error) from None
        except (SQLAlchemyError, OverflowError) as error:
            raise self.failure(error) from None

    def failure(self, error: Exception) -> StoreFailed:
        """An error of the driver in one line. Drivers put values into further lines, where keys could be; those are left out."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        said = str(cause).strip()
        line = said.splitlines()[0] if said else type(cause).__name__
        return StoreFailed(f"the database {self.shown} failed: {shortened(line, SHOWN_MAX)}")

    def close(self) -> None:
        """Let all connections go."""
        self.engine.dispose()


def open_database(url: str) -> Database:
    """The database at this address; a SQLite file is made if there is none, for its owner only. Raises StoreFailed or MissingExtra."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    try:
        engine = sa.create_engine(
            parsed,
            pool_size=CONNECTIONS_MAX,
            max_overflow=0,
            pool_timeout=CONNECTION_WAIT_S,
            pool_pre_ping=True,  # a database that was restarted costs nobody an error
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "fallow"},
        )
    except ModuleNotFoundError:
        raise MissingExtra("PostgreSQL needs psycopg: pip install 'fallow[postgres]'") from None
    except SQLAlchemyError as error:
        raise StoreFailed(f"the database's address isn't right: {type(error).__name__}; {FORMS}") from None
    sa.event.listen(engine, "connect", _prepare_postgresql)
    host = parsed.query.get("host") or parsed.host or "localhost"
    return Database(engine, shown=f"postgresql://{host}/{parsed.database or ''}")


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # whose text could hold the password
        raise StoreFailed(f"the database's address isn't right: {FORMS}") from None
    name = parsed.drivername.split("+")[0]
    if name not in DRIVERS:
        raise StoreFailed(f"no database is called {shortened(name)}: {FORMS}")
    return parsed.set(drivername=DRIVERS[name])


def _open_sqlite(parsed: URL) -> Database:
    if not parsed.database or ":memory:" in parsed.database:
        raise StoreFailed("a database in memory is gone with its connection: give it a file, sqlite:///path/of/a/file")
    path = Path(parsed.database)
    _make_private(path)
    engine = sa.create_engine(
        URL.create("sqlite+pysqlite", database=str(path)),
        pool_size=CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=CONNECTION_WAIT_S,
        connect_args={"timeout": LOCK_WAIT_MS / 1000, "isolation_level": None},  # transactions are begun below
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return Database(engine, shown=f"sqlite:///{path}")


def _make_private(path: Path) -> None:
    """Make the file with mode 600, which SQLite gives to the files that it puts beside it.

    One at a time: closing a file that SQLite has open in this process too would take SQLite's locks away.
    """
    try:
        with _making:
            if path.exists():
                path.chmod(0o600)
            else:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return  # another process made it just now
    except OSError as error:
        raise StoreFailed(f"the database's file {path} can't be made or opened: {error.strerror}") from None


def _prepare_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    """Settings that SQLite forgets with each connection, and the log that it keeps: a commit is on the disk."""
    connection.execute(f"PRAGMA busy_timeout = {LOCK_WAIT_MS}")
    for left in reversed(range(WAL_TRIES)):
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            if left == 0 or "locked" not in str(error):
                raise
            time.sleep(WAL_WAIT_S)
    if mode != "wal":
        raise sqlite3.OperationalError("its file system can't do write-ahead logging: put the file on a local disk")
    for setting in ("synchronous = FULL", "foreign_keys = ON", "recursive_triggers = ON", "trusted_schema = OFF"):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: sa.Connection) -> None:
    """A writer takes its lock first: one that read before it wrote could not wait for another writer."""
    reads = connection.get_execution_options().get("fallow_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _prepare_postgresql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {STATEMENT_MAX_MS}")
        cursor.execute(f"SET lock_timeout = {LOCK_WAIT_MS}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {STATEMENT_MAX_MS}")
    connection.commit()


def _is_duplicate(cause: BaseException | None) -> bool:
    if isinstance(cause, sqlite3.IntegrityError):
        return cause.sqlite_errorname in DUPLICATE_SQLITE
    return getattr(cause, "sqlstate", None) == DUPLICATE_POSTGRESQL

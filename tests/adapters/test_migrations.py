"""Every schema that ever landed becomes today's, once, whoever starts at the same time; a newer one is left alone."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fallow.adapters.sql.database import open_database
from fallow.adapters.sql.migrate import configuration, migrate, version_of
from fallow.adapters.sql.registry import open_registry
from fallow.adapters.sql.schema import metadata
from fallow.model.errors import StoreFailed
from fallow.model.identity import Organisation
from fallow.model.ids import OrgId

pytest_plugins = ("databases",)
STEPS = [step.revision for step in ScriptDirectory.from_config(configuration()).walk_revisions()]
PROCESSES = 3
OPENS = """
import sys
from fallow.adapters.sql.registry import open_registry
from fallow.model.identity import Organisation
from fallow.model.ids import OrgId
print("here", flush=True)
sys.stdin.readline()
registry = open_registry(sys.argv[1])
registry.organisations.add(Organisation(id=OrgId(sys.argv[2])))
registry.close()
"""


def test_the_steps_are_one_line() -> None:
    script = ScriptDirectory.from_config(configuration())
    assert len(script.get_heads()) == len(script.get_bases()) == 1
    assert sorted(STEPS, reverse=True) == STEPS, "they are numbered in their order"


@pytest.mark.parametrize("version", STEPS)
def test_every_version_becomes_todays(version: str, database_url: str) -> None:
    database = open_database(database_url)
    migrate(database, to=version)
    with database.reading() as connection:
        assert version_of(connection) == version
    migrate(database)
    migrate(database)  # nothing is left to do
    with database.reading() as connection:
        assert version_of(connection) == STEPS[0]
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_the_comparison_sees_a_difference(database_url: str) -> None:
    database = open_database(database_url)
    migrate(database)
    other = sa.MetaData()
    for table in metadata.sorted_tables:
        table.to_metadata(other)
    other.tables["member"].append_column(sa.Column("more", sa.Text()))
    with database.reading() as connection:
        assert [what for what, *_ in compare_metadata(MigrationContext.configure(connection), other)] == ["add_column"]
    database.close()


def test_a_newer_schema_is_refused_and_left_alone(database_url: str) -> None:
    open_registry(database_url).close()
    database = open_database(database_url)
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreFailed, match=f"schema 9999.*none after {STEPS[0]}.*use the version") as failure:
        open_registry(database_url)
    assert "\n" not in failure.value.message
    with database.reading() as connection:
        assert version_of(connection) == "9999"
    database.close()


def test_a_step_that_fails_leaves_nothing(database_url: str) -> None:
    database = open_database(database_url)
    with database.writing() as connection:
        connection.execute(sa.text("CREATE TABLE card_log (mine INTEGER)"))  # the first step's last table
    with pytest.raises(StoreFailed, match="card_log"):
        migrate(database)
    with database.reading() as connection:
        assert sa.inspect(connection).get_table_names() == ["card_log"]
        assert version_of(connection) is None
    database.close()


def test_processes_that_start_at_once(database_url: str) -> None:
    command = [sys.executable, "-W", "error", "-c", OPENS, database_url]
    children = [
        subprocess.Popen([*command, f"org{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "here\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = [child.communicate(timeout=60)[1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert [child.returncode for child in children] == [0] * PROCESSES, said
    registry = open_registry(database_url)
    assert [o.id for o in registry.organisations.all()] == [f"org{i}" for i in range(PROCESSES)]
    registry.close()


def test_nothing_depends_on_the_working_folder(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = elsewhere\n")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    open_registry(sqlite_url).close()
    assert caplog.records == []


def test_the_file_is_for_its_owner_only(tmp_path: Path, sqlite_url: str) -> None:
    before = os.umask(0o000)
    try:
        registry = open_registry(sqlite_url)
        registry.organisations.add(Organisation(id=OrgId("acme")))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        registry.close()
    finally:
        os.umask(before)
    assert {"hub.db", "hub.db-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path, sqlite_url: str) -> None:
    (tmp_path / "hub.db").touch(0o644)
    open_registry(sqlite_url).close()
    assert stat.S_IMODE((tmp_path / "hub.db").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hub.db", "isn't right.*sqlite:///path"),
        ("", "isn't right"),
        ("mysql://u:hush@h/d", "mysql.*postgresql://"),
        ("postgresql://u:hush@h:port/d", "isn't right"),
        ("postgresql://u:hush@127.0.0.1:1/d", "127.0.0.1.* failed"),
        ("postgresql://u:hush@/d?host=/nowhere/at/all", "/nowhere/at/all"),
        ("postgresql://127.0.0.1:1/d?password=hush", "127.0.0.1"),
        ("postgresql://127.0.0.1:1/d?passwort=hush", "127.0.0.1"),
        ("postgresql://u:hu sh:a/b@h@x:y/d", "isn't right"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:////nowhere/at/all/hub.db", "/nowhere/at/all/hub.db"),
    ],
)
def test_a_bad_address_is_told_in_a_line_without_its_password(url: str, words: str) -> None:
    with pytest.raises(StoreFailed, match=words) as failure:
        open_registry(url)
    assert "hush" not in failure.value.message
    assert "\n" not in failure.value.message
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None, "a traceback shows nothing of the driver's error"


def test_what_is_no_database_is_refused(tmp_path: Path, sqlite_url: str) -> None:
    (tmp_path / "hub.db").write_bytes(b"my diary, not a database\n" * 100)
    with pytest.raises(StoreFailed, match=r"hub\.db failed: file is not a database"):
        open_registry(sqlite_url)
    assert (tmp_path / "hub.db").read_bytes().startswith(b"my diary")


def test_nodes_and_gateways_start_without_it() -> None:
    code = "import sys, fallow.apps.node.main, fallow.apps.gateway.main; print({'sqlalchemy', 'alembic', 'psycopg'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr

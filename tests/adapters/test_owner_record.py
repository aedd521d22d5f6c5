"""The owner's small files: they outlive the process, stay small, and a damaged one is no fault."""

import stat
from pathlib import Path

import pytest

from fallow.adapters import owner_record
from fallow.adapters.owner_record import FOLDER, OwnerRecord, stamp
from fallow.model.owner import Entry, Work

ENTRY = Entry(at="2026-11-23T10:00:00Z", state="pause", reason="cpu_busy", detail="others use 2 of 2 cores", lasted_ms=1_500)


def test_a_pause_is_kept_and_forgotten(tmp_path: Path) -> None:
    OwnerRecord(tmp_path).pause(12_345)
    again = OwnerRecord(tmp_path)
    assert again.paused_until_wall_ms == 12_345
    again.resume()
    assert again.paused_until_wall_ms is None
    assert OwnerRecord(tmp_path).paused_until_wall_ms is None
    again.resume()  # twice is no fault


def test_the_work_is_that_of_the_day(tmp_path: Path) -> None:
    OwnerRecord(tmp_path).keep_work(Work(day="2026-11-23", calls=3))
    assert OwnerRecord(tmp_path).work("2026-11-23").calls == 3
    assert OwnerRecord(tmp_path).work("2026-11-24") == Work(day="2026-11-24")


def test_the_log_is_read_from_its_end(tmp_path: Path) -> None:
    record = OwnerRecord(tmp_path)
    for lasted in range(5):
        record.note(Entry(at=ENTRY.at, state="run", reason="clear", detail="", lasted_ms=lasted))
    assert [entry.lasted_ms for entry in OwnerRecord(tmp_path).entries(2)] == [3, 4]


def test_the_log_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_record, "LOG_BYTES_MAX", 2_000)
    record = OwnerRecord(tmp_path)
    for _ in range(200):
        record.note(ENTRY)
    assert (tmp_path / FOLDER / "log.jsonl").stat().st_size < 3_000
    assert record.entries(1) == [ENTRY]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"until_wall_ms": "soon"}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, damage: bytes) -> None:
    record = OwnerRecord(tmp_path)
    record.note(ENTRY)
    for name in ("pause.json", "work.json"):
        (tmp_path / FOLDER / name).write_bytes(damage)
    with (tmp_path / FOLDER / "log.jsonl").open("ab") as file:
        file.write(damage + b"\n")
    again = OwnerRecord(tmp_path)
    assert again.paused_until_wall_ms is None
    assert again.work("2026-11-23").calls == 0
    assert again.entries(9) == [ENTRY]


def test_they_are_their_owners_only(tmp_path: Path) -> None:
    record = OwnerRecord(tmp_path)
    record.pause(1)
    record.keep_work(Work())
    record.note(ENTRY)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / FOLDER).iterdir()} == {0o600}
    assert stamp(0) == "1970-01-01T00:00:00Z"

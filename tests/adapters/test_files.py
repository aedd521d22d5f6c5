"""Files of the data folder: whole or not there, closed to others, and held by one process at a time."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fallow.adapters.files import is_held, make_folder, only_one, read_or_make, write_private
from fallow.model.errors import AlreadyRunning, StartFailed

HOLDER = """
import sys
from pathlib import Path
from fallow.adapters.files import only_one
with only_one(Path(sys.argv[1]), "hub"):
    print("held", flush=True)
    sys.stdin.read()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder as a hub."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# writing
def test_a_file_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "key", "one\n")
    finally:
        os.umask(before)
    assert mode(tmp_path / "key") == 0o600
    assert (tmp_path / "key").read_text() == "one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_file_that_others_could_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert mode(path) == 0o600
    assert path.read_text() == "new"


def test_a_reader_sees_the_old_or_the_new_and_nothing_between(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = ["a" * 300_000, "b" * 200_000]
    write_private(path, texts[0])
    stop = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        write_private(path, texts[number % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts)
    assert seen


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "inside").write_text("old")
    with pytest.raises(StartFailed, match="could not write") as caught:
        write_private(target, "new")
    assert "\n" not in caught.value.message
    assert (target / "inside").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "no half file is left"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="nowhere"):
        write_private(tmp_path / "nowhere" / "key", "x")


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed):
        write_private(tmp_path / "file" / "key", "x")


# words of chance
def test_a_word_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "key"
    word = read_or_make(path, prefix="fk-", length=24)
    assert word.startswith("fk-")
    assert len(bytes.fromhex(word.removeprefix("fk-"))) == 24
    assert mode(path) == 0o600
    assert [read_or_make(path, prefix="fk-"), read_or_make(path, prefix="other-", length=3)] == [word, word]
    assert read_or_make(tmp_path / "another") != word.removeprefix("fk-")


def test_a_word_that_a_user_wrote_is_taken(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("  mine \n")
    assert read_or_make(tmp_path / "key", prefix="fk-") == "mine"


def test_a_word_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(StartFailed, match="could not read"):
        read_or_make(tmp_path / "key")


def test_folders_are_closed_to_others(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a" / "b" / ".." / "c")
    assert made == tmp_path / "a" / "c"
    assert mode(made) == 0o700
    assert make_folder(made) == made
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed, match="could not make the folder"):
        make_folder(tmp_path / "file" / "x")


# one process
def test_a_second_holder_is_told_the_firsts_pid(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(AlreadyRunning) as caught, only_one(tmp_path, "hub"):
        pytest.fail("held twice")
    assert f"pid {holder.pid})" in caught.value.message
    assert "fallow hub" in caught.value.message
    assert "\n" not in caught.value.message
    assert is_held(tmp_path, "hub")


def test_it_is_so_within_one_process_too(tmp_path: Path) -> None:
    with only_one(tmp_path, "hub"):
        assert mode(tmp_path / "hub.lock") == 0o600
        with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"), only_one(tmp_path, "hub"):
            pytest.fail("held twice")
        assert is_held(tmp_path, "hub"), "the one who was refused took nothing away"


def test_other_roles_and_folders_are_free(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    (tmp_path / "other").mkdir()
    with only_one(tmp_path, "node"), only_one(tmp_path / "other", "hub"):
        assert is_held(tmp_path, "node")
        assert is_held(tmp_path, "hub")
    assert not is_held(tmp_path, "node")
    assert not is_held(tmp_path, "gateway")


def test_it_is_free_after_the_end(tmp_path: Path) -> None:
    for _ in range(2):
        with only_one(tmp_path, "hub"):
            assert is_held(tmp_path, "hub")
        assert not is_held(tmp_path, "hub")
    with pytest.raises(ValueError, match="ours"), only_one(tmp_path, "hub"):
        raise ValueError("ours")
    assert not is_held(tmp_path, "hub")


def test_it_is_free_after_a_sudden_end_and_the_old_pid_is_gone(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / "hub.lock").write_text("999999999999\n")
    assert not is_held(tmp_path, "hub")
    with only_one(tmp_path, "hub"):
        assert (tmp_path / "hub.lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_can_not_be_held_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="could not open"), only_one(tmp_path / "nowhere", "hub"):
        pytest.fail("held")

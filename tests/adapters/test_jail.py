"""Finding out what this machine can do, and what is said where it can't. The jail itself is tried in acceptance/test_escape.py."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fallow.adapters import jail, seccomp
from fallow.adapters.confinement import Confinement
from fallow.engines import confine
from fallow.model.errors import StartFailed

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no jail yet")


def refused(wanted: jail.Wanted) -> str:
    with pytest.raises(StartFailed) as error:
        jail.detect(wanted)
    assert "--isolation none" in error.value.message
    return error.value.message


def without_bubble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "bubblewraps", lambda: [])


def without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "landlock_abi", lambda: 0)


# here
@linux
@pytest.mark.parametrize("wanted", ["landlock", "bwrap"])
def test_each_level_is_found_by_trying(wanted: jail.Wanted) -> None:
    found = jail.detect(wanted)
    assert found.level == wanted
    assert found.landlock_abi > 0
    assert found.missing == ()
    assert not jail.tried(found)


@linux
def test_the_best_is_taken_and_none_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jail.detect().level == "bwrap"
    assert jail.detect("none") == jail.NO_JAIL
    without_bubble(monkeypatch)
    found = jail.detect()
    assert found.level == "landlock"
    assert "bubblewrap is not installed" in found.missing[0]
    without_landlock(monkeypatch)
    said = refused("auto")
    assert "bubblewrap" in said
    assert "Landlock is not in this kernel" in said


@linux
def test_a_level_that_can_not_be_had_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bubble(monkeypatch)
    assert "bubblewrap is not installed" in refused("bwrap")
    without_landlock(monkeypatch)
    assert "Landlock is not in this kernel" in refused("landlock")


@linux
def test_bubblewrap_is_a_jail_without_landlock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    without_landlock(monkeypatch)
    found = jail.detect()
    assert found.level == "bwrap"
    assert "Landlock is not in this kernel" in found.missing[0]


@linux
@pytest.mark.parametrize("wanted", ["auto", "bwrap", "landlock"])
def test_there_is_no_jail_without_libseccomp(monkeypatch: pytest.MonkeyPatch, wanted: jail.Wanted) -> None:
    monkeypatch.setattr(seccomp, "pyseccomp", None)
    assert "libseccomp is not installed" in refused(wanted)


@linux
def test_a_bubblewrap_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(jail, "bubblewraps", lambda: [str(broken)])
    found = jail.detect()
    assert found.level == "landlock"
    assert "namespace" in found.missing[0]


@linux
@pytest.mark.parametrize("level", ["landlock", "bwrap"])
def test_a_jail_that_lets_something_through_is_found_out(level: jail.Wanted) -> None:
    """One whose filter allows everything."""
    open_filter = b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    found = jail.detect(level)
    assert found.filter is not None
    weak = msgspec.structs.replace(found, filter=msgspec.structs.replace(found.filter, program=open_filter))
    assert "start a process" in jail.tried(weak)


# what is said
@pytest.mark.parametrize(
    ("platform", "said"), [("darwin", "macOS has no jail yet"), ("win32", "WSL2"), ("freebsd14", "freebsd14 has no jail yet")]
)
def test_other_systems_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, platform: str, said: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert said in refused("auto")
    assert jail.detect("none") == jail.NO_JAIL


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor"),
        ("kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "max_user_namespaces"),
        ("kernel/apparmor_restrict_unprivileged_userns", "0", "does not work here: no luck"),
        ("kernel/other", "1", "does not work here: no luck"),
    ],
)
def test_why_bubblewrap_fails_is_read_from_the_kernel(tmp_path: Path, setting: str, value: str, said: str) -> None:
    path = tmp_path / setting
    path.parent.mkdir(parents=True)
    path.write_text(f"{value}\n")
    assert said in jail.why_no_bubble("no luck", tmp_path)


# folders
def test_only_outermost_folders_that_exist_are_opened_and_never_a_home(tmp_path: Path) -> None:
    home = tmp_path / "people" / "ann"
    inside, link = home / "venv" / "lib", tmp_path / "link"
    inside.mkdir(parents=True)
    link.symlink_to(home / "venv")
    asked = [str(inside), str(home / "venv"), str(home), str(home.parent), "/", "", "relative", str(tmp_path / "absent")]
    assert jail.outermost(asked, home) == (str(home / "venv"),)
    assert jail.outermost([str(link)], home) == (str(link), str(home / "venv"))


def test_every_hop_to_a_program_is_named(tmp_path: Path) -> None:
    program, middle, first = tmp_path / "p", tmp_path / "folder" / "m", tmp_path / "f"
    program.touch()
    middle.parent.mkdir()
    middle.symlink_to("../p")
    first.symlink_to(middle)
    assert jail.links(first) == [str(first), str(middle), str(program)]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert len(jail.links(loop)) <= 41


@linux
def test_the_current_folder_and_the_users_environment_are_not_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not any(Path(one).is_relative_to(tmp_path) or tmp_path.is_relative_to(one) for one in jail.python_folders())


# confinement
@linux
def test_a_confinement_that_can_not_be_read_or_done_ends_the_engine() -> None:
    command = [*jail.PYTHON, "-m", jail.CONFINE, jail.PROVE]
    ended = subprocess.run(command, input=b"nonsense\n", capture_output=True, timeout=60)
    assert ended.returncode == confine.EXIT_BAD_SETTINGS
    told = Confinement(level="landlock", files=("/no/such/file",), socket_folder="/tmp", landlock_abi=1, seccomp=b"\0" * 8)
    ended = subprocess.run(command, input=msgspec.json.encode(told) + b"\n", capture_output=True, timeout=60)
    assert ended.returncode == confine.EXIT_NOT_CONFINED
    assert b"No such file" in ended.stderr


@linux
def test_without_a_jail_an_engine_gives_way_all_the_same() -> None:
    told = jail.NO_JAIL.confinement(files=(), socket_folder="/tmp", memory_bytes=2**20)
    code = f"""
import msgspec, os, resource
from fallow.adapters.confinement import Confinement
from fallow.engines.confine import confine
confine(msgspec.json.decode({msgspec.json.encode(told)!r}, type=Confinement))
assert os.sched_getscheduler(0) == os.SCHED_IDLE
assert os.nice(0) == 19
assert open("/proc/self/oom_score_adj").read().strip() == "1000"
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 2**30
open("/etc/passwd").close()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@linux
def test_root_has_no_bound_on_tasks_and_others_have_room() -> None:
    assert (jail.tasks_max() == 0) == (os.getuid() == 0)


def run_filter(program: bytes, number: int, argument: int) -> int:
    """What a filter answers: the few instructions that ours has."""
    place, word = 0, 0
    while True:
        code, yes, no, value = (
            int.from_bytes(program[8 * place :][:2], sys.byteorder),
            program[8 * place + 2],
            program[8 * place + 3],
            int.from_bytes(program[8 * place + 4 :][:4], sys.byteorder),
        )
        place += 1
        match code:
            case confine.LOAD:
                word = number if value == confine.CALL_NUMBER else argument
            case confine.EQUAL:
                place += yes if word == value else no
            case _:
                return value


@pytest.mark.parametrize(("number", "argument", "allowed"), [(62, 7, True), (234, 7, True), (62, 8, False), (234, 0, False), (1, 8, True)])
def test_signals_are_kept_to_the_process_itself(number: int, argument: int, allowed: bool) -> None:
    program = confine.own_signals((62, 234), 7)
    assert run_filter(program, number, argument) == (confine.ALLOW if allowed else confine.REFUSE)


SHARES = """
from pathlib import Path
from fallow.adapters import jail
own = Path("/proc/self/autogroup")
before = own.read_text()
jail.detect()
print(before == own.read_text(), "nice 0" in before)
"""


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel groups no sessions")
def test_finding_out_does_not_slow_down_the_terminal_it_is_started_in() -> None:
    """An engine lowers the share of its whole session, so whatever tries a jail needs a session of its own."""
    said = subprocess.run([sys.executable, "-c", SHARES], capture_output=True, text=True, timeout=60, start_new_session=True)
    assert said.stdout.strip() == "True True", said.stderr

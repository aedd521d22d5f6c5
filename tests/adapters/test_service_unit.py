"""The service's text: read back as systemd and launchd read it, and by systemd's own program where there is one."""

import configparser
import plistlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.adapters.service_unit import LABEL, UNIT, data_folder, launchd_plist, systemd_unit
from fallow.model.errors import BadFlag

ANALYZE = shutil.which("systemd-analyze")
DATA = Path("/home/me/.local/share/fallow")
WORDS = st.lists(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]).filter(lambda c: c != "\x7f")), max_size=5)
ODD = ["a b", "100%", "%h", 'say "x"', "it's", "back\\slash", "end\\", "ünï", "semi;colon", "#hash", "{brace}", "tab  twice", "-dash", ";"]


def words_of(line: str) -> list[str]:
    """A command line as systemd.service(5) describes it: quotes, backslashes, %% and $$."""
    words: list[str] = []
    rest = line
    while rest := rest.lstrip(" "):
        word = ""
        if rest.startswith('"'):
            rest = rest[1:]
            while not rest.startswith('"'):
                escaped = rest.startswith("\\")
                word += rest[1] if escaped else rest[0]
                assert not escaped or rest[1] in '\\"', "no other escapes are written"
                rest = rest[2:] if escaped else rest[1:]
            rest = rest[1:]
            assert rest == "" or rest.startswith(" ")
        else:
            word, _, rest = rest.partition(" ")
            assert not set(word) & set("\\\"'"), "those are special without quotes"
            assert word != ";"
        assert "%" not in word.replace("%%", "")
        assert not words or "$" not in word.replace("$$", "")
        word = word.replace("%%", "%")
        words.append(word.replace("$$", "$") if words else word)
    return words


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize(("is_root", "target"), [(True, "multi-user.target"), (False, "default.target")])
def test_a_unit(is_root: bool, target: str) -> None:
    text = systemd_unit(["/opt/py/bin/python", "-m", "fallow", "lend"], DATA, is_root=is_root)
    unit = parsed(text)
    service = unit["Service"]
    assert service["ExecStart"] == "/opt/py/bin/python -m fallow lend"
    assert unit["Install"]["WantedBy"] == target
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0"), "it never gives up"
    assert (service["Delegate"], service["KillMode"], service["UMask"]) == ("yes", "mixed", "0077")
    assert ("network-online.target" in text) is is_root, "a user's units can't see the machine's"
    assert data_folder(text.encode()) == DATA


def command_in(unit: str) -> list[str]:
    (line,) = [line for line in unit.split("\n") if line.startswith("ExecStart=")]
    return words_of(line.removeprefix("ExecStart="))


@given(WORDS)
def test_words_come_back_from_a_unit(words: list[str]) -> None:
    command = ["/usr/bin/python", *words]
    assert command_in(systemd_unit(command, DATA, is_root=False)) == command


@pytest.mark.parametrize("odd", ODD)
def test_odd_words_come_back_from_a_unit(odd: str) -> None:
    command = ["/opt/a b/100%/python", odd, "", f"${odd}", f"${{{odd}}}"]
    assert command_in(systemd_unit(command, DATA, is_root=False)) == command


@pytest.mark.parametrize("odd", ["a\nb", "a\rb", "a\x00b", "a\x7fb", "a\x1bb", "a\udc80b"])
def test_what_no_service_can_be_started_with(odd: str) -> None:
    for command, data in ((["/bin/x", odd], DATA), ([f"/{odd}"], DATA), (["/bin/x"], Path(f"/{odd}"))):
        with pytest.raises(BadFlag, match="control characters"):
            systemd_unit(command, data, is_root=False)
        with pytest.raises(BadFlag, match="control characters"):
            launchd_plist(command, data)


@pytest.mark.parametrize("odd", ["$", '"', "'", "\\"])
def test_a_program_that_systemd_cannot_name(odd: str) -> None:
    with pytest.raises(BadFlag, match="install Fallow elsewhere"):
        systemd_unit([f"/opt/{odd}x/python"], DATA, is_root=False)


@pytest.mark.skipif(ANALYZE is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("is_root", [True, False])
@pytest.mark.parametrize("odd", [*ODD, "x" * 200])
def test_systemd_itself_has_no_complaint(tmp_path: Path, odd: str, is_root: bool) -> None:
    """It says so if it can't find the program, so it must have read its name as we wrote it."""
    program = tmp_path / "".join(c for c in odd if c not in "\"'\\")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT
    unit.write_text(systemd_unit([str(program), odd, "$HOME"], tmp_path / odd, is_root=is_root))
    assert ANALYZE is not None
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    arguments = [ANALYZE, "verify", "--man=no", "--recursive-errors=no", *([] if is_root else ["--user"]), str(unit)]
    said = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    program.unlink()
    said = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert said.returncode != 0, "it does look"


@pytest.mark.parametrize("odd", ODD)
def test_a_plist(odd: str) -> None:
    command = ["/opt/python", "-m", "fallow", odd]
    text = launchd_plist(command, DATA / odd)
    found = plistlib.loads(text)
    assert (found["Label"], found["ProgramArguments"]) == (LABEL, command)
    assert (found["KeepAlive"], found["RunAtLoad"], found["ProcessType"], found["LowPriorityIO"]) == (True, True, "Background", True)
    assert found["StandardErrorPath"] == str(DATA / odd / "lend.log")
    assert data_folder(text) == DATA / odd


@pytest.mark.parametrize("odd", [*ODD, "a\x85b", "a\u2028b"])
def test_a_data_folder_comes_back_from_a_unit(odd: str) -> None:
    assert data_folder(systemd_unit(["/bin/x"], DATA / odd, is_root=False).encode()) == DATA / odd


@pytest.mark.parametrize(
    "text",
    [b"", b"[Unit]\nDescription=x\n", b"\xff\xfe", b"<plist></plist>", plistlib.dumps({"Label": LABEL}), plistlib.dumps([1]), b"bplist00"],
)
def test_what_others_wrote_is_not_ours(text: bytes) -> None:
    assert data_folder(text) is None

"""Settings: what a user may write, and the words they get when it is wrong."""

import re
import stat
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fallow.apps import settings as module
from fallow.apps.settings import FILE, TEMPLATE, Settings, load
from fallow.model.errors import BadSetting, StartFailed

UNCOMMENTED = re.sub(r"^# (\w+ = )", r"\1", TEMPLATE, flags=re.MULTILINE)


def written(folder: Path, text: str) -> Path:
    (folder / FILE).write_text(text)
    return folder / FILE


def refused(folder: Path, flags: dict[str, Any] | None = None) -> str:
    """The words with which the settings are refused; one line, always."""
    with pytest.raises(BadSetting) as caught:
        load(folder, flags)
    assert "\n" not in caught.value.message
    return caught.value.message


# what there is
def test_without_a_file_there_are_the_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path / "new" / "folder")
    assert settings == Settings(data=tmp_path / "new" / "folder")
    assert settings.hub.listen == "127.0.0.1:8422"
    assert (settings.gateway.host, settings.gateway.port) == ("127.0.0.1", 8400)
    assert settings.hub.listen.startswith("127."), "nothing listens beyond this machine by itself"


def test_the_first_start_writes_a_commented_file_for_its_owner_only(tmp_path: Path) -> None:
    load(tmp_path / "d")
    path = tmp_path / "d" / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == TEMPLATE
    assert all(not section for section in tomllib.loads(TEMPLATE).values()), "every setting is commented out"


def test_the_file_reads_the_same_with_every_line_uncommented(tmp_path: Path) -> None:
    """What the comments show are the defaults, of all settings that there are."""
    written(tmp_path, UNCOMMENTED)
    assert load(tmp_path) == Settings(data=tmp_path)
    shown = {section: set(keys) for section, keys in tomllib.loads(UNCOMMENTED).items()}
    there_are = {f.name: {g.name for g in msgspec.structs.fields(f.type)} for f in msgspec.structs.fields(Settings) if f.name != "data"}
    assert shown == there_are


def test_a_file_that_is_there_is_read_and_left_alone(tmp_path: Path) -> None:
    text = '[gateway]\nport = 9000\n\n[node]\nmodels = ["other"]\nstall_s = 5\n'
    path = written(tmp_path, text)
    settings = load(tmp_path)
    assert (settings.gateway.port, settings.node.models, settings.node.stall_s) == (9000, ("other",), 5.0)
    assert settings.node.slots == Settings(data=tmp_path).node.slots
    assert path.read_text() == text


def test_flags_win_over_the_file_and_are_not_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "[gateway]\nport = 9000\nhost = '10.0.0.1'\n")
    settings = load(tmp_path, {"gateway.port": 0, "gateway.host": None, "node.slots": 3})
    assert (settings.gateway.port, settings.gateway.host, settings.node.slots) == (0, "10.0.0.1", 3)
    assert "9000" in path.read_text()
    assert load(tmp_path).gateway.port == 9000


def test_folders_are_those_of_the_user_or_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALLOW_DATA", str(tmp_path / "chosen"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(None).data == tmp_path / "chosen"
    assert load(Path("~/mine")).data == tmp_path / "home" / "mine"
    written(tmp_path, "[models]\nfolder = '~/weights'\n")
    assert load(tmp_path).models_folder == tmp_path / "home" / "weights"
    monkeypatch.delenv("FALLOW_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert module.default_data().name == "fallow"


# what is wrong
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[gateway]\n# port = 1\nport = 'x'\n", 3, ["gateway.port", "int"]),
        ("[gateway]\nport = 70000\n", 2, ["gateway.port", "65535"]),
        ("[gateway]\n\nport = -1\n", 3, ["gateway.port", "0"]),
        ("[gateway]\nport = 1.5\n", 2, ["gateway.port", "int"]),
        ("[gateway]\nhost = 5\n", 2, ["gateway.host", "str"]),
        ("[node]\nslots = 1\nthreads = 5000\n", 3, ["node.threads", "1024"]),
        ("[node]\nregion = 'a b'\n", 2, ["node.region"]),
        ("[organisation]\nid = ''\n", 2, ["organisation.id"]),
        ("[hub]\nlisten = 'nowhere'\n", 2, ["hub.listen"]),
        ("[node]\nstall_s = 0.5\n", 2, ["node.stall_s", "1"]),
        ("[gateway]\nhost = 'a'\n[node]\nslots = []\n", 4, ["node.slots", "int"]),
        ("[gateway]\nprot = 1\n", 2, ["gateway.prot", "no such setting"]),
        ("\n\n[gatway]\nport = 1\n", 3, ["gatway", "no such setting"]),
        ("port = 1\n", 1, ["port", "no such setting"]),
        ("gateway = 5\n", 1, ["gateway", "object"]),
        ("[key]\nconcurrency = 0\n", 2, ["key.concurrency", "1"]),
        ("[key]\ncalls_per_minute = -1\n", 2, ["key.calls_per_minute", "0"]),
        ("[key]\ntokens_per_minute = 1.5\n", 2, ["key.tokens_per_minute", "int"]),
        ("[key]\nweight = 0\n", 2, ["key.weight", "0.001"]),
    ],
)
def test_a_wrong_value_is_named_with_file_line_and_what_was_expected(tmp_path: Path, text: str, line: int, words: list[str]) -> None:
    path = written(tmp_path, text)
    said = refused(tmp_path)
    assert said.startswith(f"{path}, line {line}: ")
    for word in words:
        assert word in said


def test_spaces_around_a_sections_name_hide_no_line(tmp_path: Path) -> None:
    written(tmp_path, "# mine\n[ gateway ]\nport = 'x'\n")
    assert ", line 3: gateway.port: " in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("# mine\n[gateway] # here\nport = 'x'\n", 3, id="a comment after the section"),
        pytest.param("# mine\ngateway.port = 'x'\n", 2, id="a dotted name"),
        pytest.param("# mine\ngateway = {port = 'x'}\n", 2, id="an inline section"),
        pytest.param("# mine\n[gateway]\n'port' = 'x'\n", 3, id="a quoted name"),
    ],
)
def test_lines_are_found_in_all_forms_that_toml_has(tmp_path: Path, text: str, line: int) -> None:
    written(tmp_path, text)
    assert f", line {line}: gateway.port: " in refused(tmp_path)


@pytest.mark.parametrize(("text", "line"), [("[gateway\n", 1), ("[gateway]\nport = \n", 2), ("a = 1\na = 2\n", 2), ('[node]\nx = "y\n', 2)])
def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = written(tmp_path, text)
    said = refused(tmp_path)
    assert said.startswith(f"{path}: ")
    assert f"line {line}" in said


def test_what_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"[gateway]\nhost = '\xff\xfe'\n")
    assert str(tmp_path / FILE) in refused(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    assert "can't be read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("flags", "flag", "expected"),
    [
        ({"gateway.port": 70_000}, "--port", "65535"),
        ({"hub.listen": "nowhere"}, "--listen", "hub.listen"),
        ({"node.slots": -1}, "--slots", "0"),
        ({"node.threads": 5_000}, "--threads", "1024"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: dict[str, Any], flag: str, expected: str) -> None:
    said = refused(tmp_path, flags)
    assert said.startswith(f"{flag}: ")
    assert expected in said
    assert FILE not in said, "the file is not to blame"


def test_a_data_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed, match="could not make the folder"):
        load(tmp_path / "file")


def test_the_data_folder_is_no_setting_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, "data = '/elsewhere'\n")
    assert "line 1: data: there is no such setting" in refused(tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    written(tmp_path, f"[node]\nstall_s = {value}\n")
    assert "line 2: node.stall_s" in refused(tmp_path)


# the environment
def test_the_environment_is_read_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FALLOW_BASE_URL", "FALLOW_API_KEY", "FALLOW_JOIN"):
        monkeypatch.delenv(name, raising=False)
    assert module.caller() == module.Caller(base_url="", api_key="")
    assert module.invitation_from_environment() == ""
    monkeypatch.setenv("FALLOW_BASE_URL", "http://there/v1")
    monkeypatch.setenv("FALLOW_API_KEY", "fk-1")
    monkeypatch.setenv("FALLOW_JOIN", "s")
    assert module.caller() == module.Caller(base_url="http://there/v1", api_key="fk-1")
    assert module.invitation_from_environment() == "s"
    assert module.inherited()["FALLOW_JOIN"] == "s"

"""`fallow models`: what it prints, what it leaves behind, and how it fails."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sites
from sites import PAYLOAD, Site, make_gguf, sha256
from typer.testing import CliRunner, Result

from fallow.adapters import fetch_http
from fallow.adapters.catalogue import USER_FILE, load_catalogue
from fallow.adapters.store import Store
from fallow.cli.main import app

DIGEST = sha256(PAYLOAD)
ENTRY = """
[[model]]
name = "far"
kind = "chat"
aliases = ["away"]
licence = {{ name = "Strange Terms", link = "https://example.org/terms", must_accept = {must_accept} }}
files = [{{ filename = "far.gguf", sources = [{{ type = "https", url = "{url}/far.gguf" }}] }}]
"""


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a models folder of its own, and nobody's environment."""
    for name in [name for name in os.environ if name.startswith(("FALLOW_", "HF_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FALLOW_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.toml").write_text(f'[models]\nfolder = "{tmp_path / "models"}"\n')
    return tmp_path / "data"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[Site]:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", ())
    with sites.running() as site:
        site.files["/far.gguf"] = PAYLOAD
        yield site


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "My Model.gguf"
    path.write_bytes(PAYLOAD)
    return path


def models(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, arguments)])


def said(result: Result) -> str:
    """What a command that went well printed."""
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def complaint(result: Result, code: int = 1) -> str:
    """The one line with which a command failed."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("fallow: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.strip()


def shown(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(said(models("show", name, "--json")))
    return document


def write_far(data: Path, site: Site, *, must_accept: bool = False) -> None:
    (data / USER_FILE).write_text(ENTRY.format(url=site.url, must_accept=str(must_accept).lower()))


# a life
def test_a_file_of_ones_own_comes_and_goes(data: Path, tmp_path: Path, mine: Path) -> None:
    assert said(models("add", mine)) == "my-model\n"
    entry = load_catalogue(data).find("my-model")
    assert (entry.sha256, entry.size_bytes, entry.family, entry.context_tokens) == (DIGEST, len(PAYLOAD), "llama", 64)
    assert shown("my-model")["own"] is True
    assert shown("my-model")["here"] is False
    assert "checksum pinned" in said(models("pull", "my-model"))
    assert shown("my-model")["here"] is True
    assert [row["name"] for row in json.loads(said(models("list", "--here", "--json")))] == ["my-model"]
    assert "my-model" in said(models("list", "--here")).split()
    assert said(models("verify")).startswith("my-model is whole: ")
    assert "0.3 MB are free again; it is no longer in your models.toml" in said(models("rm", "my-model"))
    assert not load_catalogue(data).has("my-model")
    assert mine.read_bytes() == PAYLOAD
    assert list((tmp_path / "models").glob("*-*")) == []


def test_an_address_is_fetched_and_pinned(data: Path, site: Site) -> None:
    assert said(models("add", f"{site.url}/far.gguf", "--name", "near")) == "near\n"
    row = shown("near")
    assert (row["sha256"], row["checksum"], row["here"]) == (DIGEST, "pinned", True)
    site.asked.clear()
    said(models("pull", "near"))
    assert site.asked == []


def test_what_is_learnt_is_shown_so(data: Path, site: Site) -> None:
    write_far(data, site)
    assert (shown("away")["checksum"], shown("away")["sha256"]) == ("unknown", None)
    assert "not known (unknown)" in said(models("show", "far"))
    assert "checksum learnt" in said(models("pull", "far"))
    assert (shown("far")["checksum"], shown("far")["sha256"], shown("far")["size_bytes"]) == ("learnt", DIGEST, len(PAYLOAD))
    assert f"{DIGEST} (learnt)" in said(models("show", "far"))
    assert "learnt" in next(line for line in said(models("list")).splitlines() if line.startswith(" far ")).split()
    assert "checksum learnt" in said(models("verify", "far"))


def test_learnt_then_changed_until_it_is_forgotten(data: Path, site: Site) -> None:
    write_far(data, site)
    said(models("pull", "far"))
    said(models("rm", "far", "--keep-entry"))
    changed = make_gguf(seed=5)
    site.files["/far.gguf"], site.etag = changed, '"two"'
    assert "rm far --keep-entry --forget" in complaint(models("pull", "far"))
    said(models("rm", "far", "--keep-entry", "--forget"))
    said(models("pull", "far"))
    assert shown("far")["sha256"] == sha256(changed)


def test_a_licence_is_accepted_by_a_flag_once(data: Path, site: Site) -> None:
    write_far(data, site, must_accept=True)
    message = complaint(models("pull", "far"))
    assert "https://example.org/terms" in message
    assert "--accept-licence" in message
    assert site.asked == []
    assert "Strange Terms *" in said(models("list"))
    said(models("pull", "far", "--accept-licence"))
    assert shown("far")["accepted"] is True
    said(models("rm", "far", "--keep-entry"))
    said(models("pull", "far"))


def test_a_damaged_file_is_found_and_fetched_anew(data: Path, tmp_path: Path, site: Site) -> None:
    write_far(data, site)
    said(models("pull", "far"))
    path = Store(tmp_path / "models").named(DIGEST, "far.gguf")
    path.chmod(0o644)
    path.write_bytes(PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]))
    assert "is damaged; run `fallow models pull far`" in complaint(models("verify"))
    said(models("pull", "far"))
    said(models("verify", "far"))


def test_one_that_fails_does_not_keep_the_others(data: Path, site: Site, mine: Path) -> None:
    write_far(data, site)
    said(models("add", mine))
    del site.files["/far.gguf"]
    result = models("pull", "far", "my-model")
    assert "HTTP 404" in complaint(result)
    assert result.stdout.startswith("my-model is here and whole: ")


def test_the_budget_of_the_settings_holds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    (data / "settings.toml").write_text(f'[models]\nfolder = "{tmp_path / "models"}"\ndisk_gb = 1\n')
    said(models("add", mine))
    monkeypatch.setattr(Store, "used_bytes", lambda store: 10**9)
    assert "disk_gb" in complaint(models("pull", "my-model"))
    assert " of 1 GB taken" in models("list").stdout


# what goes wrong
@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (["show", "giant"], "no model is called 'giant'", 1),
        (["pull", "giant"], "no model is called 'giant'", 1),
        (["rm", "giant"], "no model is called 'giant'", 1),
        (["verify", "giant"], "no model is called 'giant'", 1),
        (["show", "gema-3-270m"], "gemma-3-270m", 1),
        (["verify", "smollm2-135m-instruct"], "run `fallow models pull smollm2-135m-instruct`", 1),
        (["pull", "gemma-3-270m"], "licence that must be accepted", 1),
        (["add", "/nowhere/a.gguf"], "there is no file /nowhere/a.gguf", 1),
        (["add", "/"], "should be a file", 2),
        (["add", "http://example.org/a.gguf"], "must begin with https://", 2),
        (["add", "ftp://example.org/a.gguf"], "must begin with https://", 2),
        (["add", "hub:a/b"], "hub:OWNER/REPOSITORY/FILE", 2),
        (["add", "hub:a/b/../c"], "hub:OWNER/REPOSITORY/FILE", 2),
        (["add", "https://example.org/a.onnx"], "tokenizer", 1),
        (["add", "/a.gguf", "--name", "No Name"], "--name: ", 2),
        (["add", "/a.gguf", "--name", "smollm2-135m-instruct"], "is there already", 2),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_line(arguments: list[str], text: str, code: int, tmp_path: Path) -> None:
    result = models(*arguments)
    assert text in complaint(result, code)
    assert result.stdout == ""
    assert not (tmp_path / "data" / USER_FILE).exists()


@pytest.mark.parametrize("flip", [PAYLOAD[:-100], b"GGUF" + bytes(100), b"", b"plain words"], ids=["cut", "hollow", "empty", "text"])
def test_what_is_no_model_is_not_added(data: Path, mine: Path, flip: bytes) -> None:
    mine.write_bytes(flip)
    assert "isn't a model that can be used" in complaint(models("add", mine))
    assert not (data / USER_FILE).exists()


@pytest.mark.parametrize("command", [["list"], ["show", "far"], ["pull", "far"], ["rm", "far"], ["verify"], ["add", "/a.gguf"]])
def test_a_bad_file_of_ones_own_stops_every_command(data: Path, command: list[str]) -> None:
    (data / USER_FILE).write_text('[[model]]\nname = "far"\nkind = "poem"\n')
    message = complaint(models(*command))
    assert f"{data / USER_FILE}, line 1, model 'far': " in message


@pytest.mark.parametrize("arguments", [["show"], ["add"], ["rm"], ["pull", "--nonsense"]])
def test_wrong_use_is_exit_code_2(arguments: list[str]) -> None:
    assert models(*arguments).exit_code == 2


def test_a_model_of_the_packages_stays_listed(data: Path) -> None:
    assert "no longer" not in said(models("rm", "smollm2-135m-instruct"))
    assert shown("smollm2-135m-instruct")["here"] is False


def test_several_names_of_one_command(data: Path, mine: Path) -> None:
    said(models("add", mine))
    said(models("add", mine, "--name", "twin"))
    assert said(models("pull", "my-model", "twin")).count("is here and whole") == 2
    assert "0.0 MB" not in said(models("rm", "my-model", "twin")).splitlines()[-1]
    assert load_catalogue(data).all()[0].name == "smollm2-135m-instruct"

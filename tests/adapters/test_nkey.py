"""Private keys: kept, private, and never seen in a text."""

import stat
from pathlib import Path

import nkeys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.adapters.nkey import Credentials, Kind, kept_key, key_from_seed, make_key
from fallow.model.errors import BadSetting, StartFailed
from fallow.wire.nkey_text import verifies

PROMISE = settings(max_examples=100)
KINDS: tuple[Kind, ...] = ("operator", "account", "user")
KEY = make_key("user")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_comes_back_from_its_seed(kind: Kind) -> None:
    key = make_key(kind)
    again = key_from_seed(key.seed)
    assert (again.public, again.kind, again.seed) == (key.public, kind, key.seed)
    assert verifies(key.public, b"data", again.sign(b"data"))


def test_keys_differ() -> None:
    assert len({make_key("user").public for _ in range(20)}) == 20


def test_a_seed_shows_nowhere() -> None:
    for text in (repr(KEY), str(KEY), f"{KEY}", repr(Credentials("a.b.c", KEY)), str(Credentials("a.b.c", KEY)), repr([KEY])):
        assert KEY.public in text
        assert KEY.seed not in text
        assert "a.b.c" not in text


BAD = ["", "SU", KEY.public, KEY.seed[:-1], KEY.seed + "A", KEY.seed.lower(), KEY.seed[:-1] + "1", KEY.seed[:20] + " " + KEY.seed[21:],
       nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_SERVER).decode(), "=" * 58, "ü" * 58]  # fmt: skip


@pytest.mark.parametrize("seed", BAD, ids=range(len(BAD)))
def test_what_is_no_seed_is_refused_and_not_told(seed: str) -> None:
    with pytest.raises(BadSetting) as caught:
        key_from_seed(seed)
    assert not seed or seed[5:] not in caught.value.message or len(seed) < 10


@pytest.mark.parametrize("at", range(2, 58, 5))
def test_a_letter_that_was_mistyped_is_noticed(at: int) -> None:
    other = "A" if KEY.seed[at] != "A" else "B"
    with pytest.raises(BadSetting):
        key_from_seed(KEY.seed[:at] + other + KEY.seed[at + 1 :])


@PROMISE
@given(st.text(st.sampled_from("SUAO234567"), max_size=60) | st.text(max_size=60))
def test_any_text_is_a_seed_or_refused(text: str) -> None:
    with pytest.raises(BadSetting):
        key_from_seed(text)


# kept in a file
def test_a_key_is_made_once_and_private(tmp_path: Path) -> None:
    first = kept_key(tmp_path / "k", "user")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert kept_key(tmp_path / "k", "user").public == first.public


@pytest.mark.parametrize("text", ["", "nonsense", KEY.public], ids=["empty", "nonsense", "a public half"])
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text)
    with pytest.raises(BadSetting) as caught:
        kept_key(tmp_path / "k", "user")
    assert str(tmp_path / "k") in caught.value.message
    assert (tmp_path / "k").read_text() == text


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    kept_key(tmp_path / "k", "account")
    with pytest.raises(BadSetting, match="an account"):
        kept_key(tmp_path / "k", "user")


def test_what_can_not_be_read_or_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StartFailed):
        kept_key(tmp_path / "folder", "user")
    with pytest.raises(StartFailed):
        kept_key(tmp_path / "nowhere" / "k", "user")

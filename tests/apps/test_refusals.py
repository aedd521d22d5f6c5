"""The hub's book of refusals: what is counted, what is kept over restarts, and what strangers can't do to it."""

import asyncio
import contextlib
import json
import logging
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from fallow.adapters.nkey import KeyPair, make_key
from fallow.apps.hub import refusals
from fallow.apps.hub.refusals import KINDS_MAX, TEXTS, LoginReason, Refusal, Refusals, What, read_refusals, why_login_refused
from fallow.core.cards import REASONS
from fallow.model.errors import StoreFailed
from fallow.wire import jwt

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import FakeClock, until
else:
    from one_loop import FakeClock, until

pytestmark = pytest.mark.anyio

NOW_S = 1_000
SIGNING, USER = make_key("account"), make_key("user")


def kept(path: Path) -> dict[tuple[str, str], int]:
    return {(one.what, one.reason): one.count for one in read_refusals(path)}


def test_everything_that_is_refused_has_its_words() -> None:
    assert TEXTS.keys() == set(get_args(What))
    assert TEXTS["login"].keys() == set(get_args(LoginReason))
    assert TEXTS["card"].keys() == set(REASONS)
    assert sum(map(len, TEXTS.values())) < KINDS_MAX


# why a login was refused
def credential(*, key: KeyPair = SIGNING, expires_at_s: int | None = NOW_S + 1) -> str:
    claims = jwt.user_claims(USER.public, name="node", account="A", issued_at_s=0, expires_at_s=expires_at_s)
    return jwt.encode(claims, key.public, key.sign)


@pytest.mark.parametrize(
    ("shown", "banned", "why"),
    [
        ("", (), "no_credential"),
        ("a.b", (), "unreadable"),
        ("a.b.c", (), "unreadable"),
        ("x" * 300_000, (), "unreadable"),
        (credential(key=make_key("account")), (), "foreign"),
        (credential(expires_at_s=NOW_S), (), "expired"),
        (credential(), (USER.public,), "banned"),
        (credential(expires_at_s=NOW_S), (USER.public,), "banned"),
        (credential(), (make_key("user").public,), "bad_proof"),
        (credential(expires_at_s=None), (), "bad_proof"),
        (credential()[:-4], (), "bad_proof"),
    ],
    ids=["nothing", "two-parts", "nonsense", "too-long", "foreign", "expired", "banned", "banned-first", "good", "endless", "cut-off"],
)
def test_why_a_login_was_refused(shown: str, banned: tuple[str, ...], why: str) -> None:
    assert why_login_refused(shown, {SIGNING.public}, set(banned), now_s=NOW_S) == why


# the book
@contextlib.asynccontextmanager
async def running(book: Refusals):  # type: ignore[no-untyped-def]
    task = asyncio.create_task(book.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_counted_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    path, clock = tmp_path / "hub" / "refusals.json", FakeClock()
    first_ms = clock.wall_ms()
    book = Refusals(path, clock)
    async with running(book):
        book.count("login", "foreign")
        await until(lambda: kept(path) == {("login", "foreign"): 1}, what="the file")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        clock.advance(5)
        book.count("login", "foreign")
        book.count("card", "signature")
    assert kept(path) == {("card", "signature"): 1, ("login", "foreign"): 2}, "the last words of a hub that is stopped"
    again = Refusals(path, clock)
    clock.advance(5)
    async with running(again):
        again.count("login", "foreign")
        await until(lambda: kept(path) == {("card", "signature"): 1, ("login", "foreign"): 3}, what="the file")
    latest = read_refusals(path)[0]
    assert (latest.first_at_ms, latest.last_at_ms) == (first_ms, clock.wall_ms())
    assert latest.why == TEXTS["login"]["foreign"]


async def test_however_much_is_refused_the_file_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Refusals, "_write", lambda self, text: texts.append(text))
    book = Refusals(tmp_path / "r.json", FakeClock())
    async with running(book):
        for _ in range(100):
            book.count("login", "foreign")
            await asyncio.sleep(0)
        await until(lambda: texts, what="the first writing")
        book.count("login", "foreign")
        await asyncio.sleep(0.02)
        assert len(texts) == 1, "the next is two seconds later"
    assert len(texts) == 2
    assert json.loads(texts[1])[0]["count"] == 101


async def test_only_so_many_kinds_are_counted(tmp_path: Path) -> None:
    book = Refusals(tmp_path / "r.json", FakeClock())
    for number in range(2 * KINDS_MAX):
        book.count("login", f"reason {number}")
    async with running(book):
        await until(lambda: kept(tmp_path / "r.json"), what="the file")
    found = kept(tmp_path / "r.json")
    assert len(found) == KINDS_MAX + 1
    assert found["other", "other"] == KINDS_MAX
    assert len(Refusals(tmp_path / "r.json", FakeClock())._counts) == KINDS_MAX


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[" * 60_000, '[{"what":"login"}]', "\ud800"], ids=["empty", "object", "number", "deep", "cut", "bytes"]
)
async def test_a_damaged_file_is_told_and_counting_begins_anew(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StoreFailed, match="delete it") as caught:
        read_refusals(path)
    assert "\n" not in caught.value.message
    book = Refusals(path, FakeClock())
    assert "counted anew" in caplog.text
    async with running(book):
        book.count("login", "foreign")
        await until(lambda: path.read_bytes().startswith(b'[{"what"'), what="the file")


async def test_a_folder_that_can_not_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refusals, "WRITE_S", 0.001)
    book = Refusals(tmp_path / "hub" / "r.json", FakeClock())
    (tmp_path / "hub").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        async with running(book):
            book.count("login", "foreign")
            await until(lambda: caplog.records, what="the warning")
            began = time.monotonic()
            while time.monotonic() - began < 0.03:
                await asyncio.sleep(0.001)
            assert len(caplog.records) == 1
            (tmp_path / "hub").unlink()
            await until(lambda: (tmp_path / "hub" / "r.json").exists(), what="the file")
    assert kept(tmp_path / "hub" / "r.json") == {("login", "foreign"): 1}


def test_another_versions_reasons_are_shown_without_words() -> None:
    assert Refusal(what="moon", reason="new", count=1, first_at_ms=0, last_at_ms=0).why == ""

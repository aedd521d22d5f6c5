"""The settings file under watch: good changes, bad ones, and a kernel that watches nothing more."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import watchfiles
from watchfiles import Change

from fallow.apps.node import settings_watch as module
from fallow.apps.node.settings_watch import SettingsWatch, changed
from fallow.apps.settings import FILE, Settings, load

pytestmark = pytest.mark.anyio

WITHIN_S = 5.0


async def until(said: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.01)


class Watched:
    """A watch that runs, and what it took."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.taken: list[Settings] = []
        self.watch = SettingsWatch(load(folder), lambda: load(folder), self.taken.append, ("isolation",))
        self.task = asyncio.ensure_future(self.watch.run())

    async def write(self, text: str, said: Callable[[], object], what: str) -> None:
        """Write until it is seen: the watch may not be there yet."""
        deadline = time.monotonic() + WITHIN_S
        while not said():
            assert time.monotonic() < deadline, f"{what} did not happen"
            self.path.write_text(text)
            await asyncio.sleep(0.3)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    one = Watched(tmp_path)
    await asyncio.sleep(0)
    yield one
    one.task.cancel()
    await asyncio.wait([one.task])


async def test_a_good_change_is_taken(watched: Watched) -> None:
    await watched.write('[lend]\nprofile = "quiet"\n', lambda: watched.taken, "the change")
    assert watched.taken[-1].lend.profile == "quiet"
    assert (watched.watch.error, watched.watch.needs_restart) == ("", ())


async def test_a_bad_one_is_named_and_not_taken(watched: Watched) -> None:
    await watched.write('[lend]\n\nhours = "late"\n', lambda: watched.watch.error, "the complaint")
    assert "line 3" in watched.watch.error
    assert watched.taken == []
    await watched.write("[lend]\n", lambda: watched.watch.error == "", "the good file")


async def test_what_is_read_at_the_start_only_is_named(watched: Watched) -> None:
    text = '[node]\nslots = 3\n[lend]\nisolation = "landlock"\n'
    await watched.write(text, lambda: watched.taken, "the change")
    assert watched.watch.needs_restart == ("node.slots", "lend.isolation")


async def test_where_the_kernel_watches_nothing_more_the_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = watchfiles.awatch

    def awatch(*paths: Path, **options: Any) -> object:
        if not options["force_polling"]:
            raise OSError(24, "Too many open files")
        return real(*paths, **options)

    monkeypatch.setattr(module, "awatch", awatch)
    monkeypatch.setattr(module, "POLL_MS", 20)
    watched = Watched(tmp_path)
    try:
        await watched.write("[lend]\ncores = 1\n", lambda: watched.taken, "the change")
    finally:
        watched.task.cancel()
        await asyncio.wait([watched.task])


def test_other_files_do_not_matter() -> None:
    assert module._is_ours(Change.modified, f"/d/{FILE}")
    assert not module._is_ours(Change.modified, "/d/work.json")


def test_nothing_changed(tmp_path: Path) -> None:
    assert changed(load(tmp_path), load(tmp_path), ("isolation",)) == ()

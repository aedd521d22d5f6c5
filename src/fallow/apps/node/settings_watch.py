"""Watches the settings file: a change takes effect at once, and a bad one keeps what was."""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
from watchfiles import Change, awatch

from fallow.apps.settings import FILE, Settings
from fallow.model.errors import FallowError

SETTLE_MS = 50
"""How long a file must rest: editors write in several steps."""
AT_START = ("organisation", "hub", "gateway", "node", "models", "engine")
"""The sections that are read when the node starts; the others take effect while it runs."""

log = logging.getLogger("fallow.owner")


class SettingsWatch:
    """`error` is what is wrong with the file now; `needs_restart` names what was changed and isn't in force."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings], take: Callable[[Settings], None]) -> None:
        self._started_with = settings
        self._reload = reload
        self._take = take
        self.error = ""
        self.needs_restart: tuple[str, ...] = ()

    async def run(self) -> None:
        """Until cancelled."""
        folder = self._started_with.data
        async for changes in awatch(folder, watch_filter=_is_ours, recursive=False, debounce=SETTLE_MS * 2, step=SETTLE_MS):
            if any(change != Change.deleted for change, _ in changes):
                self._read_and_take()

    def _read_and_take(self) -> None:
        try:
            settings = self._reload()
            self._take(settings)
        except FallowError as error:
            self.error = error.message
            log.warning("the settings stay as they were: %s", error)
            return
        self.error = ""
        self.needs_restart = changed(self._started_with, settings)
        if self.needs_restart:
            log.warning("a restart is needed for %s", ", ".join(self.needs_restart))


def _is_ours(_: Change, path: str) -> bool:
    return Path(path).name == FILE


def changed(before: Settings, after: Settings) -> tuple[str, ...]:
    """The settings outside the live sections that differ, as `node.models`."""
    found: list[str] = []
    for section in AT_START:
        old, new = (msgspec.structs.asdict(getattr(one, section)) for one in (before, after))
        found += [f"{section}.{name}" for name in old if old[name] != new[name]]
    if before.lend.isolation != after.lend.isolation:
        found.append("lend.isolation")
    return tuple(found)

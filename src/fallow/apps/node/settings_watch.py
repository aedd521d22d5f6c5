"""Watches the settings file: a change takes effect at once, and a bad one keeps what was."""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec
from watchfiles import Change, awatch

from fallow.apps.settings import FILE, Settings
from fallow.model.errors import FallowError

POLL_MS = 1_000
SETTLE_MS = 50
"""How long a file must rest: editors write in several steps."""
AT_START = ("organisation", "hub", "gateway", "node", "models", "engine")
"""The sections that are read when the node starts; the others take effect while it runs."""

log = logging.getLogger("fallow.owner")


class SettingsWatch:
    """`error` is what is wrong with the file now; `needs_restart` names what was changed and isn't in force."""

    def __init__(
        self, settings: Settings, reload: Callable[[], Settings], take: Callable[[Settings], None], at_start: Collection[str]
    ) -> None:
        """`at_start` are the settings of [lend] that are read when the node starts."""
        self._started_with = settings
        self._reload = reload
        self._take = take
        self._at_start = at_start
        self.error = ""
        self.needs_restart: tuple[str, ...] = ()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._watch(polls=False)
        except (RuntimeError, OSError) as error:  # a busy desktop may have used up what the kernel watches at a time
            log.warning("the settings file is looked at every second instead of being watched: %s", error)
            await self._watch(polls=True)

    async def _watch(self, *, polls: bool) -> None:
        async for changes in awatch(
            self._started_with.data,
            watch_filter=_is_ours,
            recursive=False,
            debounce=SETTLE_MS * 2,
            step=SETTLE_MS,
            force_polling=polls,
            poll_delay_ms=POLL_MS,
        ):
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
        self.needs_restart = changed(self._started_with, settings, self._at_start)
        if self.needs_restart:
            log.warning("a restart is needed for %s", ", ".join(self.needs_restart))


def _is_ours(_: Change, path: str) -> bool:
    return Path(path).name == FILE


def changed(before: Settings, after: Settings, at_start: Collection[str] = ()) -> tuple[str, ...]:
    """The settings that differ and are read at the start only, as `node.models`."""
    found: list[str] = []
    for section in AT_START:
        old, new = (msgspec.structs.asdict(getattr(one, section)) for one in (before, after))
        found += [f"{section}.{name}" for name in old if old[name] != new[name]]
    found += [f"lend.{name}" for name in at_start if getattr(before.lend, name) != getattr(after.lend, name)]
    return tuple(found)

"""A bar that moves while something large comes."""

import sys
from types import TracebackType
from typing import Self

STAGES = {"download": "fetching", "check": "checking"}
SHOW_BYTES_MIN = 1_000_000


class Bar:
    """A progress bar on a terminal; silent elsewhere, and until there is something to show."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: object | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are there; a total of 0 isn't known."""
        if not sys.stderr.isatty() or max(done, total) < SHOW_BYTES_MIN or (stage == "check" and self._bar is None):
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        if self._bar is None:
            from rich.console import Console

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            bar = self._bar = Progress(*columns, console=Console(stderr=True))
            bar.start()
            self._task = bar.add_task(self._title, total=total or None)
        assert isinstance(self._bar, Progress)
        self._bar.update(self._task, completed=done, total=total or None, description=f"{STAGES.get(stage, stage)} {self._title}")
        if stage == "check" and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
            self._bar = None

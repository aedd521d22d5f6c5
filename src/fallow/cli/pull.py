"""`fallow models`: what the catalogue has, and fetching it with a bar that moves."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from fallow.apps.run import complain
from fallow.apps.settings import load
from fallow.model.errors import FallowError

STAGES = {"download": "fetching", "check": "checking"}
SHOW_BYTES_MIN = 1_000_000


class Bar:
    """A progress bar on a terminal; silent elsewhere, and until there is something to show."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: object | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        if not sys.stderr.isatty() or total < SHOW_BYTES_MIN or (stage == "check" and self._bar is None):
            return
        if self._bar is None:
            from rich.console import Console

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            bar = self._bar = Progress(*columns, console=Console(stderr=True))
            bar.start()
            self._task = bar.add_task(self._title, total=total)
        assert isinstance(self._bar, Progress)
        self._bar.update(self._task, completed=done, total=total, description=f"{STAGES.get(stage, stage)} {self._title}")
        if stage == "check" and done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
            self._bar = None


def pull(data: Path | None, name: str) -> int:
    """`fallow models pull`."""
    from fallow.adapters.catalogue import find
    from fallow.adapters.fetch import fetch

    try:
        settings = load(data)
        weights = find(name or settings.node.model)
        with Bar(weights.name) as bar:
            path = fetch(weights, settings.models_folder, progress=bar)
    except FallowError as error:
        complain(error)
        return 1
    print(f"{weights.name} is here and whole: {path} ({weights.size_bytes // 10**6} MB, {weights.licence})")
    return 0


def show(data: Path | None, *, as_json: bool) -> int:
    """`fallow models list`."""
    from fallow.adapters.catalogue import CATALOGUE

    if as_json:
        print(msgspec.json.encode(list(CATALOGUE.values())).decode())
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "licence", "parameters", "MB", "context", box=None, header_style="bold")
    for one in CATALOGUE.values():
        table.add_row(one.name, one.licence, f"{one.parameters / 1e6:.0f} M", str(one.size_bytes // 10**6), str(one.context_tokens))
    Console().print(table)
    return 0

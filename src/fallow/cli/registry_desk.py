"""What the commands of the registry share: opening it, complaining in one line, and printing."""

import datetime
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from fallow.adapters.clock import SystemClock
from fallow.adapters.sql.registry import open_registry
from fallow.apps.hub import registrar
from fallow.apps.hub.founding import own_key
from fallow.apps.run import complain
from fallow.apps.settings import DATABASE_FILE, Settings, load
from fallow.model.errors import BadFlag, FallowError
from fallow.model.ids import OrgId
from fallow.ports import Registry

WIDE_COLUMNS = 240
"""Of a table that no terminal shows: nothing in it is cut short."""
UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
SPAN = re.compile(r"^([0-9]{1,6})([smhd])\Z")
YEARS_MAX_MS = 10 * 366 * 86_400_000


class Desk:
    """A registry that a command has open, and whose machine this is."""

    def __init__(self, settings: Settings, registry: Registry, now_ms: int) -> None:
        self.settings = settings
        self.registry = registry
        self.now_ms = now_ms

    def own(self) -> OrgId:
        """This machine's organisation, which is in the registry from now on."""
        own, key = own_key(self.settings)
        registrar.keep_organisation(self.registry, own, public_key=key.public, now_ms=self.now_ms)
        return own

    def organisation(self, name: str) -> OrgId:
        """The one that is named, or this machine's."""
        return registrar.find_organisation(self.registry, OrgId(name)).id if name else self.own()


def is_hub_here(settings: Settings) -> bool:
    """Whether a hub keeps its registry here."""
    return bool(settings.hub.database) or Path(settings.data, DATABASE_FILE).exists()


@contextmanager
def opened(settings: Settings) -> Iterator[Desk]:
    """The registry that the settings name, brought up to date; raises StoreFailed."""
    registry = open_registry(settings.database)
    try:
        yield Desk(settings, registry, SystemClock().wall_ms())
    finally:
        registry.close()


def at_desk(data: Path | None, act: Callable[[Desk], None]) -> int:
    """Do something with the registry; returns the exit code."""

    def open_and_act(settings: Settings) -> None:
        with opened(settings) as desk:
            act(desk)

    return told(data, open_and_act)


def told(data: Path | None, act: Callable[[Settings], None]) -> int:
    """Do something, or complain in one line; returns the exit code."""
    try:
        act(load(data))
    except FallowError as error:
        complain(error)
        return 2 if isinstance(error, BadFlag) else 1
    return 0


def span_ms(flag: str, text: str) -> int | None:
    """Milliseconds from `90m`, `12h` or `30d`; None for `never`. Raises BadFlag."""
    if text == "never":
        return None
    found = SPAN.match(text)
    if found is None or not 0 < int(found[1]) * UNITS_MS[found[2]] <= YEARS_MAX_MS:
        raise BadFlag(f"--{flag}: {text!r} isn't a time: write 90m, 12h or 30d, ten years at most, or never")
    return int(found[1]) * UNITS_MS[found[2]]


def listed(text: str | None) -> list[str] | None:
    """The words of a flag with commas between; None if it wasn't given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def local(at_ms: int | None) -> str:
    """A stamp as this machine's clock shows it."""
    return "" if at_ms is None else datetime.datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")


def utc(at_ms: int | None) -> str | None:
    """A stamp as programs read it."""
    return None if at_ms is None else datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).isoformat(timespec="seconds")


def print_json(value: object) -> None:
    print(msgspec.json.encode(value, order="sorted").decode())


def say(text: str) -> None:
    """To whoever looks; what programs read is on stdout."""
    sys.stderr.write(text + "\n")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    if not rows:
        return say(empty)
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False) if sys.stdout.isatty() else Console(width=WIDE_COLUMNS, markup=False)
    console.print(table, highlight=False)

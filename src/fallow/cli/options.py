"""Flags that several groups of commands share."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Data folder (default: FALLOW_DATA, or the user's).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def data_of(context: typer.Context) -> Path | None:
    """`fallow lend --data DIR status` means the same as `fallow lend status --data DIR`."""
    return context.parent.params.get("data") if context.parent is not None else None


SHORT_ID = 12
"""The beginning of a key that is shown in tables, and that commands take for the whole."""


def short(id: str) -> str:
    """A node's id for a table: its beginning if it is a key, else all of it."""
    return id[:SHORT_ID] if len(id) > 2 * SHORT_ID else id

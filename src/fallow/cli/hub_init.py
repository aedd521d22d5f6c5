"""`fallow hub init`: everything that a hub keeps, made before it runs for the first time."""

import shutil
from pathlib import Path

from fallow.adapters.files import make_folder
from fallow.adapters.operator import Operator
from fallow.apps.hub.founding import found, operator_folder
from fallow.apps.settings import Settings
from fallow.cli.registry_desk import opened, say, told
from fallow.model.errors import StartFailed

OFFLINE = ("operator.seed", "account-*.seed")
"""What a hub that runs doesn't need until an account changes."""


def init(data: Path | None, offline: Path | None) -> int:
    """`fallow hub init`; returns the exit code."""

    def act(settings: Settings) -> None:
        folder = operator_folder(settings.data)
        operator = Operator.open(folder)
        operator.trust({})  # signs the accounts while the operator's key is here
        operator.door()
        with opened(settings) as desk:
            found(settings, desk.registry, now_ms=desk.now_ms)
        print(folder)
        say(f"The hub's keys lie in {folder}: keep a copy, since who has them decides who takes part.")
        if offline is not None:
            moved = _move(folder, make_folder(offline.expanduser()))
            say(f"{moved} files moved to {offline}. They are needed for a ban and after an update of Fallow; joining works without them.")

    return told(data, act)


def _move(source: Path, target: Path) -> int:
    """Take the keys off this folder; raises StartFailed, and then those that were moved lie in the target."""
    moved = 0
    for path in sorted(path for pattern in OFFLINE for path in source.glob(pattern)):
        if (target / path.name).exists():
            raise StartFailed(f"{target / path.name} is there already, and it stays as it is; choose an empty folder")
        try:
            shutil.move(path, target / path.name)
        except OSError as error:
            raise StartFailed(f"could not move {path}: {error.strerror}") from None
        moved += 1
    return moved

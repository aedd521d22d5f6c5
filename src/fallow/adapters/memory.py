"""What is remembered of models between pulls: learnt checksums, accepted licences, and when each was last used."""

import contextlib
import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from fallow.adapters.files import write_private
from fallow.model.errors import FetchFailed, StartFailed
from fallow.model.weights import Weights, WeightsFile

RECORDS_FILE = "records.json"
AGAIN = "run `fallow models pull` again"
Value = TypeVar("Value")


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """What the first pull of a file brought."""

    sha256: str
    size_bytes: int


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """When a model was last asked for, and under which names its files lie."""

    at_ms: int
    files: tuple[str, ...]


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between pulls."""

    learnt: dict[str, Learnt] = {}
    accepted: dict[str, str] = {}
    """The licence that was accepted, by model."""
    used: dict[str, Use] = {}


class Memory:
    """What is remembered in a models folder. Several processes may write at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> Records:
        """What is remembered; raises FetchFailed where it can't be read, as forgetting a checksum isn't safe."""
        path = self.folder / RECORDS_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=Records)
        except FileNotFoundError:
            return Records()
        except (OSError, msgspec.DecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it isn't what Fallow wrote"
            raise FetchFailed(f"can't read {path}: {reason}; delete it, and the learnt checksums with it, and {AGAIN}") from None

    def change(self, edit: Callable[[Records], Records]) -> None:
        """Remember something else; nobody else can write in between."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{RECORDS_FILE}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self.records()
            edited = edit(records)
            if edited != records:
                write_private(self.folder / RECORDS_FILE, msgspec.json.format(msgspec.json.encode(edited), indent=1).decode())

    def learn(self, model: str, file: WeightsFile, learnt: Learnt) -> None:
        """Remember the checksum of what came."""
        self.change(lambda records: msgspec.structs.replace(records, learnt={**records.learnt, key_of(model, file): learnt}))

    def forget(self, weights: Weights) -> None:
        """Let the next pull learn the checksums anew."""
        keys = [key_of(weights.name, file) for file in weights.files]
        self.change(lambda records: msgspec.structs.replace(records, learnt=without(records.learnt, *keys)))

    def accept(self, weights: Weights) -> None:
        """Remember that this model's licence was accepted."""
        said = _licence(weights)
        self.change(lambda records: msgspec.structs.replace(records, accepted={**records.accepted, weights.name: said}))

    def accepted(self, weights: Weights) -> bool:
        """Whether the model may be fetched under its licence as it is today."""
        return not weights.licence.must_accept or self.records().accepted.get(weights.name) == _licence(weights)

    def note_use(self, model: str, files: tuple[str, ...]) -> None:
        """Remember that a model was asked for now."""
        use = Use(at_ms=time.time_ns() // 10**6, files=files)
        with contextlib.suppress(OSError, StartFailed):  # in a folder of somebody else's, that is only read, nothing is remembered
            self.change(lambda records: msgspec.structs.replace(records, used={**records.used, model: use}))


def key_of(model: str, file: WeightsFile) -> str:
    return f"{model}/{file.filename}"


def _licence(weights: Weights) -> str:
    return f"{weights.licence.name} {weights.licence.link}".strip()


def without(values: dict[str, Value], *keys: str) -> dict[str, Value]:
    return {key: value for key, value in values.items() if key not in keys}

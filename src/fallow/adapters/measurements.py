"""What was measured on this machine, kept in the models folder, so that a model is measured once for all data folders."""

import contextlib
import fcntl
import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.adapters import machine
from fallow.adapters.bandwidth import measure_bandwidth
from fallow.adapters.files import write_private
from fallow.model.card import Hardware
from fallow.model.errors import StartFailed
from fallow.model.measured import Measured
from fallow.model.weights import Engine

FILE = "measurements.json"
FORMAT = 1
"""Raised when what is measured, or how, changes: then all is measured again."""
ENTRIES_MAX = 256
FILE_BYTES_MAX = 4 * 2**20
MEMORY_STEP_BYTES = 2**30
"""Memory counts in steps: kernels tell a few megabytes more or less after each start."""
PACKAGES: dict[Engine, str] = {"llama": "xllamacpp", "onnx": "onnxruntime"}


class HardwareKey(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a machine another one for measurements. `cores` are those that engines may use."""

    isa: str
    cores: int
    memory_gib: int
    cpu: str

    def text(self) -> str:
        """A short name of it."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """How fast the memory was read, and when."""

    bytes_per_s: Annotated[int, Meta(ge=1)]
    at_ms: int


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    """All of the file."""

    format: int
    bandwidth: dict[str, Bandwidth] = {}
    models: dict[str, Measured] = {}


class Measurements:
    """The cache of one models folder. A file that can't be read, or that another format wrote, is as good as none.

    Several processes may write at once. In a folder that can't be written nothing is remembered.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: HardwareKey, digest: str, build: str) -> Measured | None:
        """What was measured of these weights with this build of the engine on this machine."""
        return self._read().models.get(_entry(key, digest, build))

    def keep(self, key: HardwareKey, digest: str, build: str, measured: Measured) -> None:
        """Remember it; the oldest entries make room."""

        def edit(document: _Document) -> _Document:
            models = {**document.models, _entry(key, digest, build): measured}
            newest = sorted(models, key=lambda name: (models[name].at_ms, name))[-ENTRIES_MAX:]
            return msgspec.structs.replace(document, models={name: models[name] for name in newest})

        self._change(edit)

    def bandwidth(self, key: HardwareKey) -> int | None:
        """How fast this machine's memory is read, in bytes per second, if that was measured."""
        found = self._read().bandwidth.get(key.text())
        return None if found is None else found.bytes_per_s

    def keep_bandwidth(self, key: HardwareKey, bytes_per_s: int, *, at_ms: int) -> None:
        """Remember it; the oldest entries make room."""

        def edit(document: _Document) -> _Document:
            found = {**document.bandwidth, key.text(): Bandwidth(bytes_per_s=bytes_per_s, at_ms=at_ms)}
            newest = sorted(found, key=lambda name: (found[name].at_ms, name))[-ENTRIES_MAX:]
            return msgspec.structs.replace(document, bandwidth={name: found[name] for name in newest})

        self._change(edit)

    def _read(self) -> _Document:
        try:
            with (self._folder / FILE).open("rb") as file:
                document = msgspec.json.decode(file.read(FILE_BYTES_MAX + 1), type=_Document)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _Document(format=FORMAT)
        return document if document.format == FORMAT else _Document(format=FORMAT)

    def _change(self, edit: Callable[[_Document], _Document]) -> None:
        with contextlib.suppress(OSError, StartFailed):  # as somebody else's folder, that is only read
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f".{FILE}.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_private(self._folder / FILE, msgspec.json.encode(edit(self._read())).decode() + "\n")


def key_of(hardware: Hardware, cores_allowed: int) -> HardwareKey:
    """The key of this machine, with as many cores as its owner allows."""
    return HardwareKey(
        isa=hardware.isa, cores=cores_allowed, memory_gib=round(hardware.memory_bytes / MEMORY_STEP_BYTES), cpu=machine.read_cpu_name()
    )


def build_of(engine: Engine) -> str:
    """The engine's build, such as `xllamacpp 2026.10.11549`."""
    try:
        return f"{PACKAGES[engine]} {metadata.version(PACKAGES[engine])}"
    except metadata.PackageNotFoundError:
        return f"{PACKAGES[engine]} missing"


def memory_speed(cache: Measurements, key: HardwareKey, *, at_ms: int, again: bool = False) -> int | None:
    """Bytes per second that the cores allowed read together: remembered, or measured now, which takes up to a second of all of them.

    The owner's other cores are left alone, so this is what engines can have, and not always all that the memory gives.
    """
    known = None if again else cache.bandwidth(key)
    if known is not None:
        return known
    measured = measure_bandwidth(key.cores)
    if measured is not None:
        cache.keep_bandwidth(key, measured, at_ms=at_ms)
    return measured


def _entry(key: HardwareKey, digest: str, build: str) -> str:
    return f"{key.text()}/{build}/{digest}"

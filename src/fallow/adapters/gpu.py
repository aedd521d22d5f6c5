"""The graphics card of this machine, as NVIDIA's driver tells it."""

import contextlib
import re

import msgspec
import pynvml

NAME_MAX = 64
_UNPRINTABLE = re.compile(r"[^ -~]+")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The card with the most memory. `count` is how many there are."""

    name: str
    memory_bytes: int
    count: int


def read_gpu() -> Gpu | None:
    """The machine's graphics card; None if there is none, or no driver that tells."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return None
    try:
        cards = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        found = [(int(pynvml.nvmlDeviceGetMemoryInfo(card).total), _name(pynvml.nvmlDeviceGetName(card))) for card in cards]
    except (pynvml.NVMLError, OSError):
        return None
    finally:
        _shut_down()
    if not found:
        return None
    memory_bytes, name = max(found)
    return Gpu(name=name, memory_bytes=memory_bytes, count=len(found))


def _name(said: str | bytes) -> str:
    """The card's name as a word that goes into headers."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return _UNPRINTABLE.sub("?", text)[:NAME_MAX].strip() or "unknown"


def _shut_down() -> None:
    with contextlib.suppress(pynvml.NVMLError, OSError):
        pynvml.nvmlShutdown()

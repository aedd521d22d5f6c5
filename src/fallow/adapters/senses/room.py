"""How much memory and disk is left, how long work waits for either, and which of the owner's programs run."""

import os
import re
import shutil
from pathlib import Path

import psutil

from fallow.adapters.senses.kernel_files import PROC, read_bytes, read_text
from fallow.model.owner import Unknown

COMM_BYTES = 15
"""The kernel keeps this much of a process's name: see proc_pid_comm(5)."""
_AVERAGE = re.compile(r"^some avg10=([0-9]{1,3}(?:\.[0-9]{1,6})?) ", re.MULTILINE)


def memory_free_share(proc: Path = PROC) -> float | Unknown:
    """What can be given to programs without swapping (MemAvailable), as a share of all memory."""
    text = read_text(proc / "meminfo")
    if text is None:
        try:
            memory = psutil.virtual_memory()
        except (OSError, RuntimeError, psutil.Error) as error:
            return Unknown(f"free memory can't be read: {type(error).__name__}")
        return float(memory.available / memory.total)
    if isinstance(text, Unknown):
        return text
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s*([0-9]{1,18}) kB$", text, re.MULTILINE))
    total, available = int(sizes.get("MemTotal", 0)), sizes.get("MemAvailable")
    if total == 0 or available is None:
        return Unknown("/proc/meminfo doesn't tell what memory is free")
    return min(1.0, int(available) / total)


def pressure(kind: str, proc: Path = PROC) -> float | Unknown | None:
    """Percent of the last 10 s in which some work waited for `memory` or `io`; None where the kernel doesn't measure it."""
    text = read_text(proc / "pressure" / kind)
    if not isinstance(text, str):
        return text
    found = _AVERAGE.search(text)
    return float(found[1]) if found else Unknown(f"pressure/{kind} is damaged")


def disk_free_bytes(folder: Path) -> int | Unknown:
    """What we may still write where the folder is, or will be."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return Unknown(f"free disk space can't be read: {error.strerror}")
    return Unknown("free disk space can't be read: there is no such place")


class ProgramWatch:
    """Finds the owner's programs among what runs. A process is asked for its command only when its name is new."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = str(proc)
        self._called: dict[str, tuple[bytes, frozenset[str]]] = {}
        """By process number: its name as the kernel keeps it, and all that it may be called."""

    def find(self, programs: tuple[str, ...]) -> frozenset[str]:
        """Those of `programs` that run, as the owner wrote them; capitals don't matter. With an empty list nothing is read."""
        if not programs:
            self._called.clear()
            return frozenset()
        running = self._names()
        return frozenset(program for program in programs if program.casefold() in running)

    def _names(self) -> set[str]:
        try:
            present = os.listdir(self._proc)
        except OSError:
            return _portable_names()
        called: dict[str, tuple[bytes, frozenset[str]]] = {}
        for pid in filter(str.isdecimal, present):
            comm = read_bytes(f"{self._proc}/{pid}/comm")
            if comm is None:
                continue  # it has ended
            known = self._called.get(pid)
            called[pid] = (
                known if known is not None and known[0] == comm else (comm, _names_of(comm, read_bytes(f"{self._proc}/{pid}/cmdline")))
            )
        self._called = called
        return {name for _, names in called.values() for name in names}


def _names_of(comm: bytes, command: bytes | None) -> frozenset[str]:
    """The kernel's name, and the last part of the command's first word; Windows programs under Wine have theirs with `\\`."""
    comm = comm.strip()
    last = (command or b"").split(b"\0", 1)[0].replace(b"\\", b"/").rpartition(b"/")[2].strip()
    cut = len(comm) >= COMM_BYTES and last.startswith(comm)
    return frozenset(name.decode(errors="replace").casefold() for name in (last if cut else comm, last) if name)


def _portable_names() -> set[str]:
    return {name.casefold() for process in psutil.process_iter(["name"]) if (name := process.info.get("name"))}

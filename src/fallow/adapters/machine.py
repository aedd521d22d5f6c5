"""What this machine is: cores, memory, instruction set."""

import platform
from pathlib import Path

import psutil

from fallow.model.card import Hardware

_X86_LEVELS = (("avx512_vnni", "avx512vnni"), ("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx"))
CPUINFO = Path("/proc/cpuinfo")


def read_hardware() -> Hardware:
    """The machine as its card describes it."""
    return Hardware(kind="cpu", isa=_isa(), cores=physical_cores(), memory_bytes=psutil.virtual_memory().total)


def physical_cores() -> int:
    """Cores that this process may use; hyper-threads don't count."""
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))


def free_memory_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _isa() -> str:
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64") or not CPUINFO.exists():
        return machine
    flags = next((line.split(":", 1)[1].split() for line in CPUINFO.read_text().splitlines() if line.startswith("flags")), [])
    level = next((name for flag, name in _X86_LEVELS if flag in flags), "sse")
    return f"x86_64-{level}"

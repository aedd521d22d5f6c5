"""What this machine is: its processor with the instructions that engines gain from, cores, memory, graphics card."""

import contextlib
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil

from fallow.adapters.gpu import read_gpu
from fallow.model.card import Hardware

CPUINFO = Path("/proc/cpuinfo")
SYSCTL = "/usr/sbin/sysctl"
SYSCTL_S = 2.0
NAME_MAX = 100

_X86_LEVELS = (
    ("amx", {"amx_tile", "amx_int8"}),
    ("avx512vnni", {"avx512_vnni"}),
    ("avx512", {"avx512f"}),
    ("avxvnni", {"avx_vnni"}),
    ("avx2", {"avx2"}),
    ("avx", {"avx"}),
)
"""The best first: one word says it, as each has what stands below it."""
_ARM_PARTS = (("dot", "asimddp"), ("i8mm", "i8mm"), ("sve", "sve"))
"""Each may be there without the others, so all that are there are said: `aarch64-dot+i8mm+sve`."""
_APPLE = {"hw.optional.arm.FEAT_DotProd": "asimddp", "hw.optional.arm.FEAT_I8MM": "i8mm", "hw.optional.arm.FEAT_SVE": "sve"}
_APPLE_X86 = {
    "hw.optional.avx1_0": "avx",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.avx512vnni": "avx512_vnni",
}
_SAME = {"amd64": "x86_64", "arm64": "aarch64"}
_ARM_NAMES = {
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0xc0", "0xac3"): "Ampere-1",
}
"""Linux tells an ARM core's maker and part only, by Arm's numbers."""


def read_hardware(*, memory_bytes_per_s: int | None = None) -> Hardware:
    """The machine as its card describes it; `memory_bytes_per_s` is what bandwidth.py measured, if it did.

    `kind` is "cpu", as our engines run on the processor. A graphics card is named all the same: it tells what the machine could do.
    """
    gpu = read_gpu()
    return Hardware(
        kind="cpu",
        isa=read_isa(),
        cores=physical_cores(),
        memory_bytes=psutil.virtual_memory().total,
        memory_bytes_per_s=memory_bytes_per_s,
        gpu=None if gpu is None else gpu.name,
    )


def physical_cores() -> int:
    """Cores that this process may use; hyper-threads don't count."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, usable_cpus()))


def usable_cpus() -> int:
    """CPUs, hyper-threads among them, that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def free_memory_bytes() -> int:
    return int(psutil.virtual_memory().available)


def has_battery() -> bool:
    """Whether this is a machine to carry about; False where it can't be told."""
    if not hasattr(psutil, "sensors_battery"):
        return False
    with contextlib.suppress(OSError, RuntimeError):
        return psutil.sensors_battery() is not None
    return False


def read_isa(cpuinfo: Path = CPUINFO) -> str:
    """The instruction set, such as `x86_64-avx512vnni` or `aarch64-dot+i8mm`."""
    if sys.platform == "darwin":
        told = _sysctl()
        return isa_of(platform.machine(), {flag for name, flag in (_APPLE | _APPLE_X86).items() if told.get(name) == "1"})
    return isa_of(platform.machine(), flags_of(_text(cpuinfo)))


def read_cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, as far as it is told; printable, and empty if it isn't."""
    if sys.platform == "darwin":
        return _printable(_sysctl().get("machdep.cpu.brand_string", ""))
    return cpu_name_of(_text(cpuinfo))


def isa_of(machine: str, flags: Collection[str]) -> str:
    """The word for an architecture with these flags of Linux's."""
    machine = _SAME.get(machine.lower(), machine.lower())
    have = set(flags)
    if machine == "x86_64":
        return f"{machine}-{next((word for word, needed in _X86_LEVELS if needed <= have), 'sse')}"
    if machine == "aarch64":
        return f"{machine}-{'+'.join(word for word, flag in _ARM_PARTS if flag in have) or 'neon'}"
    return _printable(machine)[:64] or "unknown"


def flags_of(cpuinfo: str) -> frozenset[str]:
    """What the first core can do, in Linux's words."""
    found = _field(cpuinfo, "flags") or _field(cpuinfo, "Features")
    return frozenset(found.split())


def cpu_name_of(cpuinfo: str) -> str:
    """The processor's name; of an ARM core, that of its design, or its numbers."""
    named = _field(cpuinfo, "model name")
    maker, part = _field(cpuinfo, "CPU implementer"), _field(cpuinfo, "CPU part")
    if maker and part:
        named = _ARM_NAMES.get((maker.lower(), part.lower()), f"arm {maker} {part}")
    return _printable(named)


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}[ \t]*:(.*)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _printable(text: str) -> str:
    return " ".join(re.sub(r"[^ -~]", "?", text).split())[:NAME_MAX]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _sysctl() -> Mapping[str, str]:
    """What macOS tells of its processor; empty if it doesn't within two seconds."""
    try:
        said = subprocess.run(
            [SYSCTL, "hw.optional", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=SYSCTL_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return sysctl_values(said.stdout)


def sysctl_values(text: str) -> Mapping[str, str]:
    """`name: value` lines as a table."""
    return {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines()) if colon}

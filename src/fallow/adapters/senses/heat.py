"""How hot the processor is, or that nothing measures it."""

from pathlib import Path

import msgspec
import psutil

from fallow.adapters.senses.kernel_files import SYS, list_folder, read_int, read_text
from fallow.model.owner import Unknown

COLDEST_C = 0.0
HOTTEST_C = 150.0
"""A reading must lie between the two; anything else is a sensor's way to say nothing."""
CPU_CHIPS = (
    "coretemp",
    "k10temp",
    "k8temp",
    "zenpower",
    "cpu",
    "soc",
    "fam15h",
    "via_cputemp",
    "x86_pkg_temp",
    "tcpu",
    "bigcore",
    "littlecore",
)
CPU_LABELS = ("package", "tctl", "tdie", "cpu", "core ")
BOARD_CHIPS = ("acpitz",)
"""The board's own zone, near the processor on most laptops: taken where the processor has no sensor. On many other boards
it is a placeholder with a value that makes no sense, which then counts as no sensor."""


class _Found(msgspec.Struct):
    """What the sensors of one kind told: the hottest, and whether any was there that told nothing."""

    hottest_c: float | None = None
    silent: int = 0

    def add(self, milli_c: int | Unknown | None) -> None:
        if isinstance(milli_c, int) and COLDEST_C < milli_c / 1000 <= HOTTEST_C:
            self.hottest_c = max(milli_c / 1000, self.hottest_c or COLDEST_C)
        elif milli_c is not None:
            self.silent += 1


def temperature_c(sysfs: Path = SYS) -> float | Unknown | None:
    """The hottest sensor of the processor or its package. Disks, radios, batteries and graphics cards don't count.

    The kernel's files are described in its Documentation/hwmon/sysfs-interface.rst and driver-api/thermal/sysfs-api.rst.
    """
    if not sysfs.exists():
        return _portable_temperature()
    cpu, board = _Found(), _Found()
    unread = [_read_chips(sysfs, cpu, board), _read_zones(sysfs, cpu, board)]
    if cpu.hottest_c is not None:
        return cpu.hottest_c
    if cpu.silent:
        return Unknown("the processor's temperature sensor tells nothing that makes sense")
    if board.hottest_c is not None:
        return board.hottest_c
    return next((why for why in unread if why is not None), None)


def _read_chips(sysfs: Path, cpu: _Found, board: _Found) -> Unknown | None:
    chips = list_folder(sysfs / "class" / "hwmon")
    if not isinstance(chips, list):
        return chips
    for chip in chips:
        name, files = read_text(chip / "name"), list_folder(chip)
        if not isinstance(files, list):
            continue
        inputs = {file: _label(file) for file in files if file.name.startswith("temp") and file.name.endswith("_input")}
        named = isinstance(name, str)
        if named and _is_one_of(name, BOARD_CHIPS):
            _add_all(board, list(inputs))
        elif named and _is_one_of(name, CPU_CHIPS):
            _add_all(cpu, _best(inputs))
        else:
            _add_all(cpu, [file for file, label in inputs.items() if label.startswith(CPU_LABELS)])
    return None


def _read_zones(sysfs: Path, cpu: _Found, board: _Found) -> Unknown | None:
    zones = list_folder(sysfs / "class" / "thermal")
    if not isinstance(zones, list):
        return zones
    for zone in zones:
        kind = read_text(zone / "type") if zone.name.startswith("thermal_zone") else None
        if _is_one_of(kind, CPU_CHIPS):
            cpu.add(read_int(zone / "temp"))
        elif _is_one_of(kind, BOARD_CHIPS):
            board.add(read_int(zone / "temp"))
    return None


def _is_one_of(name: str | Unknown | None, chips: tuple[str, ...]) -> bool:
    return isinstance(name, str) and name.lower().startswith(chips)


def _label(file: Path) -> str:
    label = read_text(file.with_name(file.name.replace("_input", "_label")))
    return label.lower() if isinstance(label, str) else ""


def _best(inputs: dict[Path, str]) -> list[Path]:
    """A package's sensor tells the hottest of its cores, and reading each core's would wake it. `tdie` is the true one where
    `tctl` has an offset for the fan."""
    packages = [file for file, label in inputs.items() if label.startswith("package")]
    dies = [file for file, label in inputs.items() if label.startswith("tdie")]
    return packages or dies or list(inputs)


def _add_all(found: _Found, files: list[Path]) -> None:
    for file in files:
        found.add(read_int(file))


def _portable_temperature() -> float | Unknown | None:
    if not hasattr(psutil, "sensors_temperatures"):
        return None  # macOS and Windows tell no program; they slow a hot processor down by themselves
    found = _Found()
    try:
        chips = psutil.sensors_temperatures()
    except (OSError, RuntimeError, ValueError, psutil.Error) as error:
        return Unknown(f"the temperature can't be read: {type(error).__name__}")
    for name, sensors in chips.items():
        for sensor in sensors if _is_one_of(name, (*CPU_CHIPS, *BOARD_CHIPS)) else ():
            found.add(round(sensor.current * 1000))
    return Unknown("the temperature sensor tells nothing that makes sense") if found.hottest_c is None and found.silent else found.hottest_c

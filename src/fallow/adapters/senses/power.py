"""The machine's battery, or that it has none."""

from pathlib import Path

import msgspec
import psutil

from fallow.adapters.senses.kernel_files import SYS, list_folder, read_int, read_text
from fallow.model.owner import Battery, Unknown

PERCENT_MAX = 110
"""Old batteries tell a little more than 100; beyond this it is nonsense."""
STORES = frozenset({"Battery", "UPS"})
_AMOUNTS = (("energy_now", "energy_full"), ("charge_now", "charge_full"))


class _Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One battery of possibly two."""

    percent: float | None
    size: int | None
    status: str


def battery(sysfs: Path = SYS) -> Battery | Unknown | None:
    """All batteries that run the machine, as one; those of mice, keyboards and headsets don't count.

    None: it has no battery; Unknown: there is one that doesn't tell how full it is or whether it is plugged in.
    The kernel's files are described in its Documentation/ABI/testing/sysfs-class-power.
    """
    if not sysfs.exists():
        return _portable_battery()
    supplies = list_folder(sysfs / "class" / "power_supply")
    if supplies is None or isinstance(supplies, Unknown):
        return supplies
    cells: list[_Cell] = []
    online: list[bool] = []
    unread: Unknown | None = None
    for supply in supplies:
        kind = read_text(supply / "type")
        if isinstance(kind, Unknown):
            unread = kind
        elif kind is None or read_text(supply / "scope") == "Device":
            continue
        elif kind not in STORES:
            plugged = read_int(supply / "online")
            online += [plugged > 0] if isinstance(plugged, int) else []
        elif read_text(supply / "present") != "0":
            cells.append(_read_cell(supply))
    if not cells:
        return unread
    percent, on_mains = _percent(cells), _on_mains(cells, online)
    if percent is None:
        return Unknown("the battery doesn't tell how full it is")
    if on_mains is None:
        return Unknown("the battery doesn't tell whether it is plugged in")
    return Battery(percent=percent, on_mains=on_mains)


def _read_cell(supply: Path) -> _Cell:
    status = read_text(supply / "status")
    told = read_int(supply / "capacity")
    percent = float(told) if isinstance(told, int) else None
    size: int | None = None
    for now_name, full_name in _AMOUNTS:
        now, full = read_int(supply / now_name), read_int(supply / full_name)
        if isinstance(now, int) and isinstance(full, int) and full > 0:
            size = full
            percent = 100.0 * now / full if percent is None else percent
            break
    if percent is not None:
        percent = min(percent, 100.0) if 0 <= percent <= PERCENT_MAX else None
    return _Cell(percent=percent, size=size, status=status if isinstance(status, str) else "Unknown")


def _percent(cells: list[_Cell]) -> float | None:
    """How full they are together; those that don't tell are left out, unless none does."""
    told = [(cell.percent, cell.size) for cell in cells if cell.percent is not None]
    if not told:
        return None
    sizes = [size for _, size in told if size is not None]
    if len(sizes) < len(told):
        return sum(percent for percent, _ in told) / len(told)
    return sum(percent * size for (percent, _), size in zip(told, sizes, strict=True)) / sum(sizes)


def _on_mains(cells: list[_Cell], online: list[bool]) -> bool | None:
    """By the plug, where there is one that tells; else by what the batteries do."""
    doing = {cell.status for cell in cells}
    if any(online) or "Charging" in doing:
        return True
    if online or "Discharging" in doing:
        return False
    return True if doing & {"Full", "Not charging"} else None


def _portable_battery() -> Battery | Unknown | None:
    if not hasattr(psutil, "sensors_battery"):
        return Unknown("this system doesn't tell whether it has a battery")
    try:
        told = psutil.sensors_battery()
    except (OSError, RuntimeError, ValueError, psutil.Error) as error:
        return Unknown(f"the battery can't be read: {type(error).__name__}")
    if told is None:
        return None
    if told.power_plugged is None or not 0 <= told.percent <= PERCENT_MAX:
        return Unknown("the battery doesn't tell how full it is or whether it is plugged in")
    return Battery(percent=min(100.0, float(told.percent)), on_mains=bool(told.power_plugged))

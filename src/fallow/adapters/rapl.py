"""The processor's own energy meter (RAPL), where Linux lets us read it: joules since the meter was made."""

from pathlib import Path

ROOT = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:*"
"""AMD's too go by this name. Those with a second colon are parts of a package, and would be counted twice."""


class Meter:
    """Adds up the packages' counters, each of which begins again at 0 when it is full: read it once a minute at least."""

    def __init__(self, zones: dict[Path, int]) -> None:
        self._ranges = zones
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._total_uj = 0

    def joules(self) -> float | None:
        """Energy of all packages since the meter was made; None once a counter can't be read."""
        for zone, full in self._ranges.items():
            now, before = _number(zone / "energy_uj"), self._last[zone]
            if now is None or before is None:
                return None
            self._total_uj += now - before if now >= before else now + full - before
            self._last[zone] = now
        return self._total_uj / 1e6


def open_meter(root: Path = ROOT) -> Meter | None:
    """The machine's meter; None where there is none, or only root may read it (as on most systems since 2020)."""
    zones: dict[Path, int] = {}
    for zone in sorted(root.glob(PACKAGES)):
        full, now = _number(zone / "max_energy_range_uj"), _number(zone / "energy_uj")
        if zone.name.count(":") == 1 and full and now is not None:
            zones[zone] = full
    return Meter(zones) if zones else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

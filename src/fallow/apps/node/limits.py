"""The owner's limits from the settings: the profile's, and over them every line that the owner set."""

from typing import Any, Final, Literal

from msgspec.structs import replace

from fallow.apps.lend_settings import Lend, Power
from fallow.apps.settings import Settings
from fallow.core import hours, profiles
from fallow.model.errors import BadSetting
from fallow.model.owner import Limits, PowerWindow, Profile, Window

SECOND_MS = 1_000
GB = 10**9
AS_PROFILE: Final = "profile"


def limits_of(settings: Settings, *, default: Profile, cores_physical: int, cores: int) -> Limits:
    """What the owner allows on a machine with so many cores, `default` being the profile if they named none.

    Raises BadSetting, whose text begins with the setting's name ("lend.hours: ").
    """
    lend = settings.lend
    profile = default if lend.profile == "default" else lend.profile
    limits = profiles.limits(profile, cores_physical=cores_physical)
    return replace(limits, **_lend(lend), **_power(settings.power), cores_max=max(1, min(lend.cores or limits.cores_max, cores)))


def _lend(lend: Lend) -> dict[str, Any]:
    """What [lend] sets; where a limit may be switched off, 0 does so."""
    set_by_owner: dict[str, Any] = {
        "others_share_max": _times(lend.others_percent_max, 0.01),
        "resume_after_ms": _times(lend.resume_after_s, SECOND_MS),
        "input_idle_s_min": lend.input_idle_s or None,
        "while_fullscreen": lend.while_fullscreen,
        "while_metered": lend.while_metered,
        "on_battery": lend.on_battery,
        "battery_percent_min": lend.battery_percent_min,
        "temperature_c_max": lend.temperature_c_max or None,
        "memory_free_share_min": _times(lend.memory_free_percent_min, 0.01),
        "disk_free_bytes_min": _times(lend.disk_free_gb_min, GB),
        "leave_after_ms": _times_unless_off(lend.leave_after_s, SECOND_MS),
        "upload_bytes_per_day_max": _times_unless_off(lend.upload_gb_per_day, GB),
        "programs": lend.programs,
        "hours": _windows("lend.hours", lend.hours) or AS_PROFILE,
    }
    return {name: value for name, value in set_by_owner.items() if value != AS_PROFILE}


def _power(power: Power) -> dict[str, Any]:
    windows: list[PowerWindow] = []
    for one in power.windows:
        parts = _windows("power.windows", one.hours)
        if not parts:
            raise BadSetting(f"power.windows: {hours.EXPECTED}, got an empty text")
        windows += [PowerWindow(window=part, usd_per_kwh=one.usd_per_kwh) for part in parts]
    return {"usd_per_kwh": power.usd_per_kwh, "power_windows": tuple(windows), "usd_per_kwh_max": power.usd_per_kwh_max or None}


def _windows(name: str, text: str) -> tuple[Window, ...]:
    try:
        return hours.parse(text)
    except ValueError as error:
        raise BadSetting(f"{name}: {error}") from None


def _times(value: float | Literal["profile"], factor: float) -> float | Literal["profile"]:
    """In the limit's unit; a whole number if the unit is counted."""
    if value == AS_PROFILE:
        return AS_PROFILE
    return round(value * factor) if isinstance(factor, int) else value * factor


def _times_unless_off(value: float | Literal["profile"], factor: int) -> float | Literal["profile"] | None:
    """None for 0; whatever else is set, however small, is a limit."""
    return None if value == 0 else _times(value, factor) or 1

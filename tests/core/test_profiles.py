"""What the profiles allow."""

from typing import get_args

import pytest
from msgspec.structs import asdict

from fallow.core.profiles import limits
from fallow.model.owner import Profile, Window

PROFILES: tuple[Profile, ...] = get_args(Profile)


@pytest.mark.parametrize(
    ("profile", "cores"),
    [
        ("invisible", (1, 1, 3, 15)),
        ("balanced", (1, 1, 3, 15)),
        ("dedicated", (1, 2, 4, 16)),
        ("night", (1, 1, 3, 15)),
        ("quiet", (1, 1, 2, 8)),
    ],
)
def test_cores(profile: Profile, cores: tuple[int, ...]) -> None:
    assert tuple(limits(profile, cores_physical=count).cores_max for count in (1, 2, 4, 16)) == cores


@pytest.mark.parametrize(
    ("profile", "differs"),
    [
        ("invisible", {}),
        ("balanced", {"others_share_max": 0.6, "resume_after_ms": 60_000, "input_idle_s_min": None}),
        (
            "dedicated",
            {
                "cores_max": 4,
                "others_share_max": None,
                "resume_after_ms": 0,
                "input_idle_s_min": None,
                "while_fullscreen": True,
                "on_battery": True,
                "battery_percent_min": 0.0,
                "temperature_c_max": 95.0,
                "memory_free_share_min": 0.05,
                "memory_pressure_max": 40.0,
                "io_pressure_max": None,
                "leave_after_ms": None,
            },
        ),
        ("night", {"hours": (Window(22 * 60, 7 * 60),)}),
        ("quiet", {"cores_max": 2, "temperature_c_max": 65.0}),
    ],
)
def test_how_each_differs_from_invisible(profile: Profile, differs: dict[str, object]) -> None:
    usual = asdict(limits("invisible", cores_physical=4))
    assert asdict(limits(profile, cores_physical=4)) == usual | {"profile": profile} | differs


@pytest.mark.parametrize("profile", PROFILES)
def test_no_profile_pays_for_data(profile: Profile) -> None:
    assert limits(profile, cores_physical=4).while_metered is False


def test_invisible_stops_before_it_is_felt() -> None:
    found = limits("invisible", cores_physical=4)
    assert (found.others_share_max, found.resume_after_ms, found.input_idle_s_min) == (0.25, 180_000, 180.0)
    assert (found.while_fullscreen, found.on_battery, found.battery_percent_min, found.temperature_c_max) == (False, False, 50.0, 85.0)
    assert (found.memory_free_share_min, found.memory_pressure_max, found.io_pressure_max) == (0.15, 10.0, 25.0)
    assert (found.disk_free_bytes_min, found.leave_after_ms, found.hours) == (2 * 10**9, 1_800_000, ())

"""The owner's limits out of the settings file."""

from pathlib import Path

import msgspec
import pytest

from fallow.apps.node.limits import limits_of
from fallow.apps.settings import Settings, load
from fallow.core import profiles
from fallow.model.errors import BadSetting
from fallow.model.owner import Limits, PowerWindow, Window


def settings(folder: Path, text: str) -> Settings:
    (folder / "settings.toml").write_text(text)
    return load(folder)


def limits(folder: Path, text: str) -> Limits:
    return limits_of(settings(folder, text), default="invisible", cores_physical=4, cores=8)


def test_nothing_set_is_the_profile_with_the_usual_power_price(tmp_path: Path) -> None:
    expected = profiles.limits("invisible", cores_physical=4)
    found = limits(tmp_path, "")
    assert found.usd_per_kwh == 0.30
    assert found == Limits(**{name: getattr(expected, name) for name in expected.__struct_fields__} | {"usd_per_kwh": 0.30})


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("[lend]\nprofile = 'default'", "profile", "invisible"),
        ("[lend]\non_battery = 'profile'", "on_battery", False),
        ("[lend]\nprofile = 'dedicated'\non_battery = 'profile'", "on_battery", True),
        ("[lend]\nprofile = 'dedicated'", "profile", "dedicated"),
        ("[lend]\nprofile = 'dedicated'", "cores_max", 4),
        ("[lend]\ncores = 2", "cores_max", 2),
        ("[lend]\ncores = 6", "cores_max", 6),
        ("[lend]\ncores = 64", "cores_max", 8),
        ("[lend]\nhours = '22:30-7'", "hours", (Window(22 * 60 + 30, 7 * 60),)),
        ("[lend]\nprofile = 'night'", "hours", (Window(22 * 60, 7 * 60),)),
        ("[lend]\nprofile = 'night'\nhours = '1-2'", "hours", (Window(60, 120),)),
        ("[lend]\nothers_percent_max = 50", "others_share_max", 0.5),
        ("[lend]\nothers_percent_max = 0", "others_share_max", 0.0),
        ("[lend]\nresume_after_s = 1.5", "resume_after_ms", 1_500),
        ("[lend]\nresume_after_s = 0", "resume_after_ms", 0),
        ("[lend]\ninput_idle_s = 20", "input_idle_s_min", 20.0),
        ("[lend]\ninput_idle_s = 0", "input_idle_s_min", None),
        ("[lend]\nprofile = 'dedicated'\ninput_idle_s = 9", "input_idle_s_min", 9.0),
        ("[lend]\nwhile_fullscreen = true", "while_fullscreen", True),
        ("[lend]\nprofile = 'dedicated'\nwhile_fullscreen = false", "while_fullscreen", False),
        ("[lend]\nwhile_metered = true", "while_metered", True),
        ("[lend]\non_battery = true", "on_battery", True),
        ("[lend]\nbattery_percent_min = 0", "battery_percent_min", 0.0),
        ("[lend]\ntemperature_c_max = 60", "temperature_c_max", 60.0),
        ("[lend]\nmemory_free_percent_min = 30", "memory_free_share_min", 0.3),
        ("[lend]\ndisk_free_gb_min = 0.5", "disk_free_bytes_min", 500_000_000),
        ("[lend]\nupload_gb_per_day = 1.5", "upload_bytes_per_day_max", 1_500_000_000),
        ("[lend]\nupload_gb_per_day = 1e-12", "upload_bytes_per_day_max", 1),
        ("[lend]\nupload_gb_per_day = 0", "upload_bytes_per_day_max", None),
        ("[lend]\nleave_after_s = 0.0001", "leave_after_ms", 1),
        ("[lend]\nleave_after_s = 60", "leave_after_ms", 60_000),
        ("[lend]\nleave_after_s = 0", "leave_after_ms", None),
        ("[lend]\nprofile = 'dedicated'\nleave_after_s = 60", "leave_after_ms", 60_000),
        ("[lend]\nprograms = ['steam']", "programs", ("steam",)),
        ("[power]\nusd_per_kwh = 0.1", "usd_per_kwh", 0.1),
        ("[power]\nusd_per_kwh_max = 0.2", "usd_per_kwh_max", 0.2),
        ("[power]\nusd_per_kwh_max = 0", "usd_per_kwh_max", None),
        (
            "[power]\nwindows = [{ hours = '22-6, 12-13', usd_per_kwh = 0.2 }]",
            "power_windows",
            (
                PowerWindow(window=Window(22 * 60, 6 * 60), usd_per_kwh=0.2),
                PowerWindow(window=Window(12 * 60, 13 * 60), usd_per_kwh=0.2),
            ),
        ),
    ],
)
def test_a_line_wins_over_the_profile(tmp_path: Path, text: str, name: str, value: object) -> None:
    found = getattr(limits(tmp_path, text), name)
    assert type(found) is type(value)
    assert found == (pytest.approx(value) if isinstance(value, float) else value)


def test_one_line_changes_one_limit(tmp_path: Path) -> None:
    usual, changed = limits(tmp_path, ""), limits(tmp_path, "[lend]\non_battery = true")
    assert [name for name in usual.__struct_fields__ if getattr(usual, name) != getattr(changed, name)] == ["on_battery"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lend]\nhours = 'nights'", 'lend.hours: expected hours such as "22-7" or "12:30-14, 20-8", got \'nights\''),
        ("[lend]\nhours = '22-25'", "lend.hours: expected hours"),
        ("[power]\nwindows = [{ hours = '6', usd_per_kwh = 0.2 }]", "power.windows: expected hours"),
        ("[power]\nwindows = [{ hours = '', usd_per_kwh = 0.2 }]", "power.windows: expected hours"),
    ],
)
def test_bad_hours_name_the_setting(text: str, message: str) -> None:
    document = msgspec.toml.decode(text.encode(), type=Settings, strict=False)
    with pytest.raises(BadSetting) as caught:
        limits_of(document, default="invisible", cores_physical=4, cores=4)
    assert caught.value.message.startswith(message)


def test_the_command_chooses_the_profile_unless_the_file_does(tmp_path: Path) -> None:
    def chosen(text: str) -> str:
        return limits_of(settings(tmp_path, text), default="dedicated", cores_physical=4, cores=4).profile

    assert chosen("") == "dedicated"
    assert chosen("[lend]\nprofile = 'default'") == "dedicated"
    assert chosen("[lend]\nprofile = 'quiet'") == "quiet"


def test_a_small_share_of_a_big_machine_is_all_that_is_used(tmp_path: Path) -> None:
    assert limits_of(settings(tmp_path, ""), default="dedicated", cores_physical=16, cores=2).cores_max == 2

"""What the owner's commands make of times, and how they show what they are told."""

import pytest

from fallow.cli.owner import _log_line, _span, _status_lines, read_duration
from fallow.model.errors import BadFlag
from fallow.model.owner import Entry, OwnerStatus, Work


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("90min", 5400), ("1h30m", 5400), ("45s", 45), ("10", 600), ("2d", 172_800), ("1d2h3m4s", 93_784)],
)
def test_times(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "soon", "h", "-1h", "1.5h", "2h later", "0", "0s", "9999d", "30m1h", "١h"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadFlag) as caught:
        read_duration(text)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("ms", "shown"), [(0, "0.0 s"), (59_400, "59.4 s"), (60_000, "1 min 0 s"), (3_600_000, "1 h 0 min"), (90_061_000, "25 h 1 min")]
)
def test_lengths(ms: float, shown: str) -> None:
    assert _span(ms) == shown


STATUS = OwnerStatus(
    node_id="node-a",
    profile="quiet",
    state="pause",
    reason="hot",
    detail="the processor is at 90 degrees, the limit is 65",
    since="2026-11-23T10:00:00Z",
    until=None,
    cores=0,
    unread=("input_idle_s",),
    isolation="landlock",
    isolation_missing=("bubblewrap is not installed",),
    models=("tiny",),
    running=1,
    today=Work(calls=1, pauses=1, watt_s=3.6e6, usd=0.3),
    watts=8.0,
    watts_method="modelled",
    usd_per_kwh=0.3,
    settings_error="settings.toml, line 3: wrong",
    needs_restart=("node.slots",),
)


def test_the_status_tells_everything() -> None:
    said = "\n".join(_status_lines(STATUS))
    for words in (
        "profile quiet", "pause since", "90 degrees", "(hot)", "tiny; 1 call now", "landlock", "bubblewrap is not installed",
        "1 call,", "1 pause,", "1.000 kWh", "8 W", "(modelled)", "input_idle_s", "line 3", "node.slots",
    ):  # fmt: skip
        assert words in said


def test_a_line_of_the_log() -> None:
    said = _log_line(Entry(at="2026-11-23T10:00:00Z", state="pause", reason="cpu_busy", detail="others use 2 of 2 cores", lasted_ms=90_000))
    assert "cpu_busy: others use 2 of 2 cores" in said
    assert "1 min 30 s" in said

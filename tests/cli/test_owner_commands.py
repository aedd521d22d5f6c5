"""What the owner's commands make of times, and how they show what they are told."""

from pathlib import Path

import pytest

from fallow.adapters.owner_record import OwnerRecord
from fallow.cli.entry import quick
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
    absent=("battery",),
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
        "1 call,", "1 pause,", "1.000 kWh", "8 W", "(modelled)", "input_idle_s", "battery", "line 3", "node.slots",
    ):  # fmt: skip
        assert words in said


def test_a_line_of_the_log() -> None:
    said = _log_line(Entry(at="2026-11-23T10:00:00Z", state="pause", reason="cpu_busy", detail="others use 2 of 2 cores", lasted_ms=90_000))
    assert "cpu_busy: others use 2 of 2 cores" in said
    assert "1 min 30 s" in said


@pytest.mark.parametrize(
    "words",
    [[], ["lend"], ["pause", "--help"], ["resume", "2h"], ["pause", "2h", "3h"], ["pause", "--data"], ["pause", "-x"], ["status", "pause"]],
)
def test_only_the_owners_plain_words_take_the_short_way(words: list[str]) -> None:
    assert quick(words) is None


def test_the_short_way_does_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(["pause", "--data", str(tmp_path), "2h"]) == 0
    assert "No node runs here" in capsys.readouterr().out
    assert OwnerRecord(tmp_path).paused_until_wall_ms is not None
    assert quick(["resume", "--data", str(tmp_path)]) == 0
    assert OwnerRecord(tmp_path).paused_until_wall_ms is None
    assert quick(["pause", "soon", "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

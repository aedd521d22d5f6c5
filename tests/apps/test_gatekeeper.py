"""What follows from the owner gate's word: who is stopped, freed, told, and what is written down."""

from pathlib import Path

import pytest
from clocks import FakeClock
from msgspec.structs import replace

from fallow.adapters.owner_record import FOREVER_MS, OwnerRecord
from fallow.apps.node.gatekeeper import LOOK_S, Gatekeeper
from fallow.apps.node.workbook import WorkBook
from fallow.core import profiles
from fallow.core.owner_gate import FREED_MS_MIN
from fallow.model.owner import Limits, Senses, Unknown, Verdict, Window
from fallow.model.receipt import Usage

CORES = 4
STEP_MS = round(LOOK_S * 1000)
CALM = Senses(cores=CORES, others_cores=0.1)
LIMITS = replace(profiles.limits("invisible", cores_physical=CORES), resume_after_ms=2_000)


class FakeSensing:
    """A machine that tells what a test says."""

    own_cpu_s = 0.0

    def __init__(self) -> None:
        self.now = CALM

    async def refresh(self) -> None:
        return None

    def others_cores(self) -> float | Unknown:
        return self.now.others_cores

    def senses(self, *, others_cores: float | Unknown, minute: int, uploaded_today_bytes: int, paused_until_ms: int | None) -> Senses:
        return replace(
            self.now,
            others_cores=others_cores,
            uploaded_today_bytes=max(uploaded_today_bytes, self.now.uploaded_today_bytes),
            paused_until_ms=paused_until_ms,
        )


class FakeReins:
    """An engine's reins that write down what is done with them."""

    def __init__(self, story: list[str]) -> None:
        self._story = story
        self.cores: int | None = None

    def stop(self) -> None:
        self._story.append("stop")

    def go_on(self) -> None:
        self._story.append("go on")

    def keep_to(self, cpus: frozenset[int] | None) -> None:
        self.cores = None if cpus is None else len(cpus)


class House:
    """A gatekeeper, and the story of what it did."""

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        self.story: list[str] = []
        self.clock = FakeClock()
        self.sensing = FakeSensing()
        self.record = OwnerRecord(folder)
        self.engine = FakeReins(self.story)
        self.idle = True
        self.book = WorkBook(self.record, self.clock, lambda cores: 20.0 * cores)
        self.keeper = Gatekeeper(self.sensing, limits, self, self.record, self.book, self.clock)  # type: ignore[arg-type]
        self.keeper.tell = self._tell
        self.keeper.is_idle = lambda: self.idle
        self.look()

    threads = 3

    def reins(self) -> list[FakeReins]:
        return [self.engine]

    def free(self) -> None:
        self.story.append("free")

    def fetch_back(self) -> bool:
        self.story.append("fetch back")
        return True

    are_loading = False

    def _tell(self, verdict: Verdict, drops: bool) -> None:
        self.story.append(f"tell {verdict.state}{' and drop' if drops else ''}")

    def look(self, times: int = 1) -> list[str]:
        """Look so often, a tenth of a second apart; returns what was done."""
        self.story.clear()
        for _ in range(times):
            self.clock.ms += STEP_MS
            self.keeper.look()
        return list(self.story)

    def sense(self, **changed: object) -> None:
        self.sensing.now = replace(CALM, **changed)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_quiet_machine_works_from_the_first_look(house: House) -> None:
    assert house.story == ["tell run"]
    assert house.keeper.looked.is_set()
    assert house.look(50) == [], "and nothing is said while nothing changes"


def test_an_owners_burst_stops_the_engine_before_anybody_is_told(house: House) -> None:
    house.sense(others_cores=3.9)
    assert house.look() == [], "one sample is nothing"
    assert house.look() == ["stop", "tell pause and drop"]
    assert house.look(20) == []


def test_it_goes_on_after_the_quiet_period_and_not_before(house: House) -> None:
    house.sense(others_cores=3.9)
    house.look(2)
    house.sense()
    quiet = LIMITS.resume_after_ms // STEP_MS
    assert house.look(quiet - 1) == []
    assert house.look(2) == ["go on", "tell run"]


def test_the_owners_pause_and_its_end(house: House) -> None:
    house.record.pause(FOREVER_MS)
    assert house.look() == ["stop", "tell pause and drop"]
    house.record.resume()
    assert house.look() == ["go on", "tell run"], "their own pause needs no quiet period"


def test_a_pause_outlives_the_process(tmp_path: Path) -> None:
    House(tmp_path).record.pause(FOREVER_MS)
    again = House(tmp_path)
    assert again.keeper.verdict.reason == "owner_paused"
    assert again.story == ["stop", "tell pause and drop"], "an engine that is being started is stopped too"


def test_little_memory_frees_the_engines_and_brings_them_back(house: House) -> None:
    house.sense(memory_free_share=0.05)
    assert house.look() == ["stop", "free", "tell leave and drop"]
    assert house.look(10) == []
    house.sense(memory_free_share=0.5)
    assert house.look(FREED_MS_MIN // STEP_MS + 1) == ["go on", "fetch back", "tell run"]


def test_memory_that_runs_out_during_a_pause_is_freed_too(house: House) -> None:
    house.sense(others_cores=3.9)
    house.look(2)
    house.sense(others_cores=3.9, memory_free_share=0.05)
    assert house.look() == ["free", "tell leave"]


def test_a_reason_that_can_wait_lets_calls_end(tmp_path: Path) -> None:
    house = House(tmp_path, replace(LIMITS, upload_bytes_per_day_max=1_000))
    house.idle = False
    house.sense(uploaded_today_bytes=1_000)
    assert house.look() == ["tell pause"], "no new calls, but those that run go on"
    assert house.look(10) == []
    house.idle = True
    assert house.look() == ["stop", "tell pause and drop"]


def test_but_not_for_ever(tmp_path: Path) -> None:
    house = House(tmp_path, replace(LIMITS, upload_bytes_per_day_max=1_000))
    house.idle = False
    house.sense(uploaded_today_bytes=1_000)
    house.look()
    assert house.look(29_000 // STEP_MS) == []
    assert house.look(2_000 // STEP_MS) == ["stop", "tell pause and drop"]


def test_and_an_owner_who_comes_back_meanwhile_does_not_wait(tmp_path: Path) -> None:
    house = House(tmp_path, replace(LIMITS, upload_bytes_per_day_max=1_000))
    house.idle = False
    house.sense(uploaded_today_bytes=1_000)
    house.look(5)
    house.record.pause(FOREVER_MS)
    assert house.look() == ["stop", "tell pause and drop"]


def test_fewer_free_cores_keep_the_engine_off_the_others(tmp_path: Path) -> None:
    house = House(tmp_path, replace(LIMITS, others_share_max=None))
    house.sense(others_cores=2.0)
    assert house.look(3) == ["tell throttle"]
    assert house.keeper.verdict.cores == 2
    house.sense()
    assert "tell run" in house.look(100)
    assert house.engine.cores is None


def test_new_limits_are_in_force_at_the_next_look(house: House) -> None:
    house.keeper.limits = replace(LIMITS, hours=(Window(0, 1),))
    house.sense(minute=700)
    assert house.look() == ["stop", "tell pause and drop"]
    house.keeper.limits = LIMITS
    assert house.look() == ["go on", "tell run"]


def test_a_look_between_two_samples_is_no_second_sample(house: House) -> None:
    house.sense(others_cores=3.9)
    house.look()
    house.clock.ms += 10
    house.keeper.look()
    assert house.keeper.verdict.state != "pause"


def test_the_log_says_why_and_for_how_long(house: House) -> None:
    house.sense(others_cores=3.9)
    house.look(12)
    house.sense()
    house.look(60)
    entries = house.record.entries(10)
    assert [(entry.state, entry.reason) for entry in entries] == [("run", "clear"), ("pause", "cpu_busy")]
    assert 2_900 <= entries[1].lasted_ms <= 3_400, "the quiet period belongs to it"
    assert "others use 3.9 of 4 cores" in entries[1].detail
    assert house.book.today().pauses == 1


def test_the_days_work_is_counted_kept_and_begun_anew(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.book.did(Usage(prompt_tokens=7, output_tokens=3), 500)
    house.book.did(None, 20)
    house.book.burned(cpu_s=180.0, usd_per_kwh=0.30)
    work = house.book.today()
    assert (work.calls, work.prompt_tokens, work.output_tokens, work.uploaded_bytes) == (2, 7, 3, 520)
    assert work.watt_s == pytest.approx(3_600)
    assert work.usd == pytest.approx(0.001 * 0.30)
    house.book.keep()
    assert WorkBook(house.record, house.clock, lambda cores: 0.0).today() == work
    house.clock.ms += 24 * 3_600_000
    assert house.book.today().calls == 0

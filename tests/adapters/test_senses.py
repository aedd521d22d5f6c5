"""The machine's senses: others' work against our own, and recorded /proc and /sys trees, whole and damaged."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.adapters.senses import process_tree
from fallow.adapters.senses.cpu import ROUNDING_TICKS, OthersCpu
from fallow.adapters.senses.heat import temperature_c
from fallow.adapters.senses.kernel_files import read_bytes
from fallow.adapters.senses.machine_senses import MachineSenses
from fallow.adapters.senses.power import battery
from fallow.adapters.senses.room import ProgramWatch, disk_free_bytes, memory_free_share, pressure
from fallow.model.owner import Battery, Senses, Unknown

WITHIN_S = 20.0
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
STEP_NS = 100_000_000
Tree = Mapping[str, str | bytes]
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def write_tree(root: Path, tree: Tree) -> Path:
    """A recorded tree; a file that ends in / becomes a folder, which can be listed but not read."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def is_as(value: object, expected: object) -> bool:
    return isinstance(value, Unknown) if expected is Unknown else value == expected


# Others' processor time


def stat_text(
    user: int = 0, *, nice: int = 0, system: int = 0, rest: str = "900 50", irq: int = 0, softirq: int = 0, forks: int = 7
) -> str:
    ticks = f"{user} {nice} {system} {rest} {irq} {softirq} 70 30 20"
    return f"cpu  {ticks}\ncpu0 {ticks}\ncpu1 0 0 0 0 0 0 0 0 0 0\nintr 5 0 0\nctxt 9\nprocesses {forks}\nprocs_running 1\n"


def pid_text(pid: int, parent: int, *, own: tuple[int, int] = (0, 0), reaped: tuple[int, int] = (0, 0), name: str = "engine") -> str:
    return f"{pid} ({name}) R {parent} 1 1 0 -1 4194560 1 2 3 4 {own[0]} {own[1]} {reaped[0]} {reaped[1]} 39 19 3 0 100 5 6\n"


class Recorded:
    """A /proc and a clock that a test moves by hand."""

    def __init__(self, root: Path, *, lists: bool = True) -> None:
        self.root = root
        self.now_ns = 0
        self.lists = lists

    def set(self, stat: str, *processes: str, children: Mapping[int, str] | None = None) -> None:
        tree = {"stat": stat} | {f"{text.split()[0]}/stat": text for text in processes}
        if self.lists:
            tree |= {f"{pid}/task/{pid}/children": text for pid, text in (children or {}).items()}
        write_tree(self.root, tree)

    def later(self, ns: int = STEP_NS) -> None:
        self.now_ns += ns

    def watch(self, *roots: int, cpus: frozenset[int] | None = None) -> OthersCpu:
        return OthersCpu(roots, proc=self.root, cpus=cpus, now_ns=lambda: self.now_ns)


@linux
@pytest.mark.parametrize(
    ("before", "after", "cores"),
    [
        (stat_text(), stat_text(), 0.0),
        (stat_text(), stat_text(5), 0.5),
        (stat_text(), stat_text(1, nice=1, system=1, irq=1, softirq=1), 0.5),
        (stat_text(), stat_text(rest="950 90"), 0.0),  # idle and waiting for disks
        (stat_text(5), stat_text(), 0.0),  # a processor went away
        (stat_text(), "", Unknown),
        (stat_text(), "cpu  1 2\n", Unknown),
        (stat_text(), "cpu  1 2 3 4 5 6 seven 8\n", Unknown),
        (stat_text(), "intr 1 2 3 4 5 6 7 8 9\n", Unknown),
        ("", stat_text(5), Unknown),
    ],
)
def test_busy_time_from_the_kernels_table(tmp_path: Path, before: str, after: str, cores: object) -> None:
    proc = Recorded(tmp_path)
    proc.set(before)
    others = proc.watch()
    proc.set(after)
    proc.later(round(TICK_S * 10 * 1e9))
    value = others.sample()
    assert isinstance(value, Unknown) if cores is Unknown else value == pytest.approx(cores)
    others.close()


@linux
def test_rounding_is_settled_in_the_next_sample(tmp_path: Path) -> None:
    """The kernel told two ticks of ours too early, so they are missing from the next."""
    proc = Recorded(tmp_path)
    proc.set(stat_text(), pid_text(10, 1), children={10: ""})
    others = proc.watch(10)
    for busy, own in ((10, 12), (20, 20)):
        proc.set(stat_text(busy), pid_text(10, 1, own=(own, 0)))
        proc.later()
        assert others.sample() == pytest.approx(0.0, abs=1e-9)
    others.close()


@linux
def test_only_the_processors_that_we_may_use_count(tmp_path: Path) -> None:
    proc = Recorded(tmp_path)
    proc.set(stat_text())
    watches = {cpu: proc.watch(cpus=frozenset({cpu})) for cpu in (0, 1, 2)}
    proc.set(stat_text(5))
    proc.later(round(TICK_S * 10 * 1e9))
    values = {cpu: others.sample() for cpu, others in watches.items()}
    assert values[0] == pytest.approx(0.5)
    assert values[1] == 0.0
    assert isinstance(values[2], Unknown)


@linux
@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("name", ["engine", "a b", "bad) R 1 (name", ""])
def test_work_of_our_processes_is_taken_off(tmp_path: Path, lists: bool, name: str) -> None:
    """The root, a jail that was there before, and an engine that starts in it later; process 99 is another's."""
    proc = Recorded(tmp_path, lists=lists)
    other = pid_text(99, 1)
    proc.set(stat_text(), pid_text(10, 1), pid_text(11, 10, own=(50, 0)), other, children={10: "11 ", 11: ""})
    others = proc.watch(10)
    engine = pid_text(12, 11, own=(3, 1), name=name)
    proc.set(stat_text(20, forks=8), pid_text(10, 1, own=(1, 1)), pid_text(11, 10, own=(52, 0)), engine, other, children={11: "12"})
    proc.later(2_000_000_000)
    assert others.sample() == pytest.approx((20 - 2 - 2 - 4) * TICK_S / 2)
    others.close()


@linux
def test_the_time_of_a_child_that_ended_comes_once(tmp_path: Path) -> None:
    """It was counted while it ran, up to 6 ticks of its 9; then its parent holds all 9."""
    proc = Recorded(tmp_path)
    proc.set(stat_text(), pid_text(10, 1), pid_text(11, 10, own=(6, 0)), children={10: "11", 11: ""})
    others = proc.watch(10)
    proc.set(stat_text(10), pid_text(10, 1, reaped=(9, 0)), children={10: "", 11: ""})
    (tmp_path / "11/stat").write_text("")
    proc.later()
    assert others.sample() == pytest.approx((10 - 3) * TICK_S / 0.1)
    others.close()


@linux
def test_an_answer_is_repeated_when_asked_too_soon(tmp_path: Path) -> None:
    proc = Recorded(tmp_path)
    proc.set(stat_text())
    others = proc.watch()
    assert isinstance(others.sample(), Unknown)
    proc.later()
    assert others.sample() == 0.0
    proc.set(stat_text(1))
    proc.later(1_000_000)
    assert others.sample() == 0.0
    proc.later(99_000_000)
    assert others.sample() == pytest.approx(TICK_S / 0.1)


@linux
@settings(max_examples=50)
@given(steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20))
def test_others_are_never_negative_and_never_hidden(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]) -> None:
    """Whatever the kernel's rounding does, the sum is at least what others did, and a sample hides two ticks at most."""
    proc = Recorded(tmp_path_factory.mktemp("proc"))
    proc.set(stat_text(), pid_text(10, 1), children={10: ""})
    watch = proc.watch(10)
    busy = own = 0
    seen_ticks = 0.0
    for more_busy, more_own in steps:
        busy, own = busy + more_busy, own + more_own
        proc.set(stat_text(busy), pid_text(10, 1, own=(own, 0)))
        proc.later()
        cores = watch.sample()
        assert isinstance(cores, float)
        assert cores >= 0
        assert cores * 0.1 / TICK_S >= more_busy - more_own - ROUNDING_TICKS - 1e-6
        seen_ticks += cores * 0.1 / TICK_S
    assert seen_ticks >= busy - own - 1e-6
    watch.close()


BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass\n"


@contextmanager
def burning(*, seconds: float = 600, within: str = "exec {python} -c '{code}'") -> Iterator[subprocess.Popen[bytes]]:
    """A child that works, or a shell that starts some. All of it ends with the test."""
    command = within.format(python=sys.executable, code=BURN.format(seconds=seconds))
    child = subprocess.Popen(["sh", "-c", command], start_new_session=True)
    try:
        yield child
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def spare_s(proc: Path, roots: tuple[int, ...], enough: Callable[[float], bool], *, change: Callable[[], None] = lambda: None) -> float:
    """By how much work looks smaller to one who counts `roots` as ours, once that is enough."""
    ours, all_of_it = OthersCpu(roots, proc=proc), OthersCpu((), proc=proc)
    change()
    before = time.monotonic()
    deadline = before + WITHIN_S
    sum_s = 0.0
    while not enough(sum_s):
        assert time.monotonic() < deadline, f"only {sum_s:.2f} s of our work was taken off"
        time.sleep(0.05)
        everything, others = all_of_it.sample(), ours.sample()
        now = time.monotonic()
        if isinstance(everything, float) and isinstance(others, float):
            assert others >= 0
            sum_s += (everything - others) * (now - before)
        before = now
    ours.close()
    all_of_it.close()
    return sum_s


@pytest.fixture(params=[pytest.param(Path("/proc"), marks=linux, id="kernel"), pytest.param(Path("/nowhere"), id="portable")])
def proc(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_a_childs_work_is_others_unless_it_is_under_the_roots(proc: Path) -> None:
    with burning() as child:
        assert spare_s(proc, (child.pid,), lambda sum_s: sum_s > 0.3) > 0.3


def test_a_grandchild_that_starts_later_is_ours(proc: Path, tmp_path: Path) -> None:
    """As an engine that the agent starts in a jail: the shell stands between."""
    go = tmp_path / "go"
    with burning(within=f"while [ ! -e {go} ]; do sleep 0.02; done; sh -c \"{{python}} -c '{{code}}'; true\"; true") as child:
        assert spare_s(proc, (child.pid,), lambda sum_s: sum_s > 0.3, change=go.touch) > 0.3


@linux
def test_children_that_come_and_go_are_ours() -> None:
    """Each works for a tenth of a second: the time of those that ended is found at their parent."""
    within = "while true; do {python} -c '{code}'; done"
    with burning(seconds=0.1, within=within) as child:
        parent = psutil.Process(child.pid)
        sum_s = spare_s(Path("/proc"), (child.pid,), lambda _: parent.cpu_times().children_user > 0.6)
    assert sum_s > 0.4


@linux
def test_children_of_threads_are_ours_too() -> None:
    engine = f"[sys.executable, '-c', {BURN.format(seconds=600)!r}]"
    code = f"import subprocess, sys, threading; threading.Thread(target=subprocess.run, args=({engine},)).start()"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        assert spare_s(Path("/proc"), (child.pid,), lambda sum_s: sum_s > 0.3) > 0.3
    finally:
        os.killpg(child.pid, 9)
        child.wait()


@linux
def test_it_works_on_a_kernel_without_lists_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "read_bytes", lambda path: None if path.endswith("/children") else read_bytes(path))
    with burning(within="{python} -c '{code}'; true") as child:
        assert spare_s(Path("/proc"), (child.pid,), lambda sum_s: sum_s > 0.3) > 0.3


@linux
def test_no_file_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        OthersCpu((os.getpid(), 2**22 + 1)).close()
    assert set(os.listdir("/proc/self/fd")) == before


# Memory, pressure, disk


@pytest.mark.parametrize(
    ("meminfo", "share"),
    [
        ("MemTotal:        1000 kB\nMemFree:   9 kB\nMemAvailable:    250 kB\n", 0.25),
        ("MemTotal:        1000 kB\nMemAvailable:    2000 kB\n", 1.0),
        ("MemTotal:        1000 kB\nMemFree:   9 kB\n", Unknown),
        ("MemTotal:        0 kB\nMemAvailable:    0 kB\n", Unknown),
        ("MemTotal: lots\n", Unknown),
        (b"\xff\x00", Unknown),
        ("", Unknown),
    ],
)
def test_free_memory(tmp_path: Path, meminfo: str | bytes, share: object) -> None:
    assert is_as(memory_free_share(write_tree(tmp_path, {"meminfo": meminfo})), share)


def test_free_memory_where_there_is_no_proc(tmp_path: Path) -> None:
    share = memory_free_share(tmp_path)
    assert isinstance(share, float)
    assert 0 < share < 1


FULL = "full avg10=9.99 avg60=9.99 avg300=9.99 total=9\n"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"pressure/io": f"some avg10=12.34 avg60=1.00 avg300=0.00 total=123\n{FULL}"}, 12.34),
        ({"pressure/io": f"some avg10=100.00 avg60=1.00 avg300=0.00 total=123\n{FULL}"}, 100.0),
        ({"pressure/io": f"some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n{FULL}"}, 0.0),
        ({"pressure/io": FULL}, Unknown),
        ({"pressure/io": "some avg10=nan avg60=0.00"}, Unknown),
        ({"pressure/io": ""}, Unknown),
        ({"pressure/io/": ""}, Unknown),
        ({"pressure/memory": FULL}, None),
        ({}, None),
    ],
)
def test_pressure(tmp_path: Path, tree: Tree, expected: object) -> None:
    assert is_as(pressure("io", write_tree(tmp_path, tree)), expected)


def test_disk_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "not" / "yet", tmp_path / "file" / "below"):
        free = disk_free_bytes(folder)
        assert isinstance(free, int)
        assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert isinstance(disk_free_bytes(tmp_path / ("x" * 300)), Unknown)


# Battery

MAINS = {"class/power_supply/AC/type": "Mains\n", "class/power_supply/AC/online": "1\n"}
UNPLUGGED = MAINS | {"class/power_supply/AC/online": "0\n"}


def cell(number: int = 0, /, **files: str) -> dict[str, str]:
    given = {"type": "Battery", "present": "1", "capacity": "80", "status": "Discharging"} | files
    return {f"class/power_supply/BAT{number}/{name}": f"{text}\n" for name, text in given.items() if text}


def sized(number: int, now: str, full: str, status: str = "Discharging") -> dict[str, str]:
    """A battery that tells energies and no percents."""
    return cell(number, capacity="", status=status, energy_now=now, energy_full=full)


HEADSET = {f"class/power_supply/hid-1/{name}": text for name, text in {"type": "Battery", "scope": "Device", "capacity": "5"}.items()}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        pytest.param({"class/x": ""}, None, id="a machine without the folder"),
        pytest.param({"class/power_supply/": ""}, None, id="a machine without supplies"),
        pytest.param(MAINS, None, id="only mains"),
        pytest.param(MAINS | HEADSET, None, id="a headset's battery isn't the machine's"),
        pytest.param(MAINS | cell(present="0"), None, id="an empty bay"),
        pytest.param(UNPLUGGED | cell(), Battery(percent=80.0, on_mains=False), id="unplugged"),
        pytest.param(MAINS | cell(status="Charging"), Battery(percent=80.0, on_mains=True), id="charging"),
        pytest.param(MAINS | HEADSET | cell(), Battery(percent=80.0, on_mains=True), id="plugged into a weak charger"),
        pytest.param(UNPLUGGED | cell(status="Full", capacity="100"), Battery(percent=100.0, on_mains=False), id="just unplugged"),
        pytest.param(cell(status="Full", capacity="103"), Battery(percent=100.0, on_mains=True), id="full by its own word"),
        pytest.param(cell(), Battery(percent=80.0, on_mains=False), id="no plug is listed"),
        pytest.param(UNPLUGGED | cell(type="UPS"), Battery(percent=80.0, on_mains=False), id="an UPS"),
        pytest.param(cell(status="Unknown"), Unknown, id="plug unknown"),
        pytest.param(cell(status=""), Unknown, id="no status"),
        pytest.param(MAINS | cell(capacity=""), Unknown, id="no charge"),
        pytest.param(MAINS | cell(capacity="-5"), Unknown, id="negative"),
        pytest.param(MAINS | cell(capacity="250"), Unknown, id="too much"),
        pytest.param(MAINS | cell(capacity="lots"), Unknown, id="no number"),
        pytest.param(MAINS | sized(0, "30", "40"), Battery(percent=75.0, on_mains=True), id="by energy"),
        pytest.param(MAINS | sized(0, "30", "0"), Unknown, id="full is nothing"),
        pytest.param(
            UNPLUGGED | sized(0, "10", "10") | sized(1, "0", "30", "Unknown"),
            Battery(percent=25.0, on_mains=False),
            id="two of different size",
        ),
        pytest.param(UNPLUGGED | cell(0) | cell(1, capacity="40"), Battery(percent=60.0, on_mains=False), id="two without sizes"),
        pytest.param(UNPLUGGED | cell(0) | cell(1, capacity="?"), Battery(percent=80.0, on_mains=False), id="one of two tells"),
        pytest.param({"class/power_supply/BAT0/type/": ""}, Unknown, id="its type can't be read"),
        pytest.param({"class/power_supply": "no folder"}, None, id="no folder at all"),
    ],
)
def test_battery(tmp_path: Path, tree: Tree, expected: object) -> None:
    assert is_as(battery(write_tree(tmp_path, tree)), expected)


def test_battery_where_there_is_no_sys(tmp_path: Path) -> None:
    told = battery(tmp_path / "none")
    assert told is None or isinstance(told, (Battery, Unknown))


# Temperature


def chip(number: int, name: str, *sensors: tuple[str, str]) -> dict[str, str]:
    """A chip of hwmon, and its sensors by label and value."""
    tree = {f"class/hwmon/hwmon{number}/name": f"{name}\n"}
    for index, (label, value) in enumerate(sensors, start=1):
        tree[f"class/hwmon/hwmon{number}/temp{index}_input"] = f"{value}\n"
        tree |= {f"class/hwmon/hwmon{number}/temp{index}_label": f"{label}\n"} if label else {}
    return tree


def zone(number: int, kind: str, value: str) -> dict[str, str]:
    return {f"class/thermal/thermal_zone{number}/type": kind, f"class/thermal/thermal_zone{number}/temp": value}


DISK = chip(7, "nvme", ("Composite", "99000"))
RADIO = chip(8, "iwlwifi_1", ("", "88000"))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        pytest.param({"class/x": ""}, None, id="none"),
        pytest.param(DISK | RADIO | zone(0, "iwlwifi", "77000") | {"class/thermal/cooling_device0/type": "cpu"}, None, id="not the cpu's"),
        pytest.param(DISK | chip(0, "coretemp", ("Package id 0", "61000"), ("Core 0", "59000")), 61.0, id="package"),
        pytest.param(chip(0, "coretemp", ("Core 0", "59000"), ("Core 1", "63500")), 63.5, id="hottest core"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "50000")) | chip(1, "coretemp", ("Package id 1", "70000")), 70.0, id="two"),
        pytest.param(chip(0, "k10temp", ("Tctl", "85000"), ("Tdie", "58000"), ("Tccd1", "57000")), 58.0, id="tctl has an offset"),
        pytest.param(chip(0, "k10temp", ("Tctl", "65000")), 65.0, id="tctl alone"),
        pytest.param(chip(0, "thinkpad", ("CPU", "55000"), ("GPU", "95000"), ("", "91000")), 55.0, id="by label"),
        pytest.param(zone(0, "x86_pkg_temp", "47000") | zone(1, "acpitz", "95000"), 47.0, id="zone"),
        pytest.param(zone(0, "cpu-thermal", "52300") | zone(1, "gpu-thermal", "91000"), 52.3, id="a board computer"),
        pytest.param(zone(0, "acpitz", "44000"), 44.0, id="the board's, for want of better"),
        pytest.param(zone(0, "acpitz", "-273200"), None, id="the board's placeholder"),
        pytest.param(zone(0, "acpitz", "0") | chip(0, "acpitz", ("", "0")), None, id="another placeholder"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "0")), Unknown, id="zero"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "-5000")), Unknown, id="frost"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "255000")), Unknown, id="fire"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "warm")), Unknown, id="no number"),
        pytest.param({"class/hwmon/hwmon0/name": "coretemp", "class/hwmon/hwmon0/temp1_input/": ""}, Unknown, id="unreadable"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "warm")) | zone(0, "acpitz", "40000"), Unknown, id="the board's is no excuse"),
        pytest.param(chip(0, "coretemp", ("Package id 0", "warm")) | zone(0, "x86_pkg_temp", "41000"), 41.0, id="the other way works"),
        pytest.param(chip(0, "coretemp", ("Core 0", "151000"), ("Core 1", "42000")), 42.0, id="one of two makes sense"),
    ],
)
def test_temperature(tmp_path: Path, tree: Tree, expected: object) -> None:
    assert is_as(temperature_c(write_tree(tmp_path, tree)), expected)


def test_temperature_where_there_is_no_sys(tmp_path: Path) -> None:
    told = temperature_c(tmp_path / "none")
    assert told is None or isinstance(told, (float, Unknown))


# Programs


def run_tree(number: int, comm: str, command: str) -> dict[str, str]:
    return {f"{number}/comm": f"{comm}\n", f"{number}/cmdline": command.replace(" ", "\0") + "\0"}


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        (run_tree(1, "blender", "/usr/bin/blender -b"), {"Blender"}),
        (run_tree(1, "python3", "/opt/blender"), {"Blender"}),
        (run_tree(1, "a-game-with-a-l", "/opt/a-game-with-a-long-name --full"), {"a-game-with-a-long-name"}),
        (run_tree(1, "game.exe", "C:\\Games\\game.exe"), {"game.exe"}),
        (run_tree(1, "blenders", "/usr/bin/blenders blender"), set()),
        (run_tree(1, "blender", ""), {"Blender"}),
        ({"1/comm": "blender"}, {"Blender"}),
        ({"self/comm": "blender", "1/cmdline": "blender"}, set()),
        ({"1/comm/": "", "2/comm": b"\xff\xfe"}, set()),
        ({"1/comm": ""}, set()),
    ],
)
def test_programs(tmp_path: Path, tree: Tree, found: set[str]) -> None:
    watch = ProgramWatch(write_tree(tmp_path, tree))
    names = ("Blender", "a-game-with-a-long-name", "game.exe")
    assert watch.find(names) == found
    assert watch.find(()) == frozenset()
    assert watch.find(names) == found


def test_a_process_that_becomes_another_program(tmp_path: Path) -> None:
    watch = ProgramWatch(write_tree(tmp_path, run_tree(1, "sh", "sh -c blender")))
    assert watch.find(("blender",)) == frozenset()
    write_tree(tmp_path, run_tree(1, "blender", "blender"))
    assert watch.find(("blender",)) == {"blender"}


@pytest.mark.parametrize("where", [pytest.param(Path("/proc"), marks=linux), Path("/nowhere")])
def test_a_real_program(where: Path, tmp_path: Path) -> None:
    program = tmp_path / "fallow-game"
    shutil.copy("/bin/sleep", program)
    watch = ProgramWatch(where)
    assert watch.find(("fallow-game",)) == frozenset()
    with subprocess.Popen([program, "600"]) as child:
        try:
            deadline = time.monotonic() + WITHIN_S
            while not (found := watch.find(("fallow-game", "no-such-program"))):  # it gets its name a moment after it started
                assert time.monotonic() < deadline
        finally:
            child.kill()
    assert found == {"fallow-game"}
    assert watch.find(("fallow-game",)) == frozenset()


# Damage


LONG = b"9" * 400
ODD = (
    *(b"9" * 5_000, LONG, b"-1", b"1e9", b"\0"),
    b"cpu " + b" ".join([LONG] * 8) + b"\n",
    b"1 (x) " + b" ".join([LONG] * 20),
    b"some avg10=" + LONG,
)


@settings(max_examples=60)
@given(noise=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode), st.sampled_from(ODD)))
def test_damaged_files_never_raise(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    root = tmp_path_factory.mktemp("damaged")
    files = dict.fromkeys((*cell(), *MAINS, *chip(0, "coretemp", ("Package id 0", "1")), *zone(0, "acpitz", "1")), noise)
    write_tree(root, {**cell(), **files, "class/power_supply/BAT0/type": b"Battery", "class/hwmon/hwmon0/name": b"coretemp"})
    write_tree(root, {"stat": noise, "meminfo": noise, "pressure/io": noise, "1/comm": noise, "1/cmdline": noise, "1/stat": noise})
    write_tree(root, {"1/task/1/children": noise, "healthy/stat": stat_text(), "healthy/1/stat": noise})
    battery(root)
    temperature_c(root)
    memory_free_share(root)
    pressure("io", root)
    ProgramWatch(root).find(("x",))
    for proc in (root, root / "healthy"):
        others = OthersCpu((1,), proc=proc, now_ns=iter((0, STEP_NS)).__next__)
        others.sample()
        others.close()


# All together


def make_senses(tmp_path: Path, **more: object) -> MachineSenses:
    given: dict[str, object] = {
        "roots": (os.getpid(),),
        "disk_folder": tmp_path,
        "programs": lambda: ("blender",),
        "session_bus": "",
        "system_bus": "",
        "has_display": False,
    }
    return MachineSenses(**(given | more))  # type: ignore[arg-type]


def now(machine: MachineSenses) -> Senses:
    return machine.senses(others_cores=0.5, minute=61, uploaded_today_bytes=7, paused_until_ms=9)


@linux
@pytest.mark.anyio
async def test_all_senses_together(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    memory = {"meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n", "pressure/io": "some avg10=1.50 avg60=0"}
    write_tree(proc, memory | {"stat": stat_text()} | run_tree(5, "blender", "blender"))
    write_tree(sysfs, UNPLUGGED | cell() | zone(0, "x86_pkg_temp", "40000"))
    machine = make_senses(tmp_path, proc=proc, sysfs=sysfs)
    first = now(machine)
    assert isinstance(first.battery, Unknown)
    assert isinstance(first.temperature_c, Unknown)
    assert isinstance(first.memory_free_share, Unknown)
    await machine.refresh()
    told = now(machine)
    assert isinstance(told.disk_free_bytes, int)
    assert told == Senses(
        cores=len(os.sched_getaffinity(0)),
        others_cores=0.5,
        memory_free_share=0.5,
        memory_pressure=None,
        io_pressure=1.5,
        battery=Battery(percent=80.0, on_mains=False),
        temperature_c=40.0,
        disk_free_bytes=told.disk_free_bytes,
        programs=frozenset({"blender"}),
        uploaded_today_bytes=7,
        minute=61,
        paused_until_ms=9,
    )
    await machine.close()


@pytest.mark.anyio
async def test_this_machine(tmp_path: Path) -> None:
    machine = make_senses(tmp_path)
    await machine.refresh()
    share = now(machine).memory_free_share
    assert isinstance(share, float)
    assert 0 < share < 1
    cores = machine.others_cores()
    assert isinstance(cores, Unknown) or cores >= 0
    await machine.close()


@linux
@pytest.mark.anyio
async def test_a_file_that_hangs_makes_everything_slow_unknown_until_it_answers(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    write_tree(proc, {"stat": stat_text()})
    os.mkfifo(proc / "meminfo")
    machine = make_senses(tmp_path, proc=proc, read_timeout_s=0.02)
    try:
        for _ in range(2):
            await machine.refresh()
            assert isinstance(now(machine).memory_free_share, Unknown)
        with (proc / "meminfo").open("w") as pipe:  # there is one reader, not two
            pipe.write("MemTotal: 100 kB\nMemAvailable: 25 kB\n")
        deadline = time.monotonic() + WITHIN_S
        while isinstance(now(machine).memory_free_share, Unknown):
            assert time.monotonic() < deadline
            await machine.refresh()
    finally:
        os.close(os.open(proc / "meminfo", os.O_RDWR | os.O_NONBLOCK))  # whoever still waits reads an end
    assert now(machine).memory_free_share == 0.25
    await machine.close()

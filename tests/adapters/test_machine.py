"""What a machine says of itself, read from texts that real ones told (shortened to what is read), and of this one."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pynvml
import pytest

from fallow.adapters import gpu, machine, rapl
from fallow.model.card import Hardware

HASWELL = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz
flags\t\t: fpu vme de pse sse sse2 ht syscall nx rdtscp lm ssse3 fma cx16 sse4_1 sse4_2 popcnt aes xsave avx f16c rdrand bmi1 avx2 smep
vmx flags\t: vnmi preemption_timer invvpid avx512f
"""
IVY_BRIDGE = "model name\t: Intel(R) Core(TM) i5-3470\nflags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt aes xsave avx f16c\n"
CORE_2 = "model name\t: Intel(R) Core(TM)2 Duo CPU E8400\nflags\t\t: fpu sse sse2 ssse3 sse4_1\n"
SKYLAKE_X = (
    "model name\t: Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz\nflags\t\t: sse2 avx f16c avx2 avx512f avx512dq avx512cd avx512bw avx512vl\n"
)
ALDER_LAKE = "model name\t: 12th Gen Intel(R) Core(TM) i5-12400\nflags\t\t: sse2 avx f16c fma avx2 sha_ni avx_vnni umip vaes\n"
GENOA = """\
model name\t: AMD EPYC
flags\t\t: sse2 avx f16c avx2 avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 avx512_vnni
"""
SAPPHIRE_RAPIDS = """\
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: sse2 avx f16c avx2 avx512f avx_vnni avx512_bf16 avx512vbmi avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8 flush_l1d
"""
HALF_AMX = "model name\t: a guest that got one flag only\nflags\t\t: sse2 avx avx2 avx512f avx512_vnni amx_tile\n"
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: {features}
CPU implementer\t: {maker}
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: {part}
CPU revision\t: 1
"""
PI_4 = ARM.format(features="fp asimd evtstrm crc32 cpuid", maker="0x41", part="0xd08")
PI_5 = ARM.format(
    features="fp asimd evtstrm aes pmull sha1 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp", maker="0x41", part="0xd0b"
)
GRAVITON_3 = ARM.format(
    features="fp asimd crc32 atomics fphp asimdhp jscvt fcma lrcpc sha3 asimddp sha512 sve asimdfhm svei8mm svebf16 i8mm bf16 dgh rng",
    maker="0x41",
    part="0xd40",
)
A64FX = ARM.format(features="fp asimd crc32 atomics fphp asimdhp asimdrdm fcma dcpop sve", maker="0x46", part="0x001")


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "isa", "name"),
    [
        pytest.param("x86_64", HASWELL, "x86_64-avx2", "Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz", id="AVX2, a second line of flags"),
        pytest.param("AMD64", IVY_BRIDGE, "x86_64-avx", "Intel(R) Core(TM) i5-3470", id="AVX"),
        pytest.param("x86_64", CORE_2, "x86_64-sse", "Intel(R) Core(TM)2 Duo CPU E8400", id="older"),
        pytest.param("x86_64", SKYLAKE_X, "x86_64-avx512", "Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", id="AVX-512 without VNNI"),
        pytest.param("x86_64", ALDER_LAKE, "x86_64-avxvnni", "12th Gen Intel(R) Core(TM) i5-12400", id="VNNI without AVX-512"),
        pytest.param("x86_64", GENOA, "x86_64-avx512vnni", "AMD EPYC", id="AVX-512 VNNI"),
        pytest.param("x86_64", SAPPHIRE_RAPIDS, "x86_64-amx", "Intel(R) Xeon(R) Platinum 8488C", id="AMX"),
        pytest.param("x86_64", HALF_AMX, "x86_64-avx512vnni", "a guest that got one flag only", id="tiles that can't multiply"),
        pytest.param("aarch64", PI_4, "aarch64-neon", "Cortex-A72", id="NEON"),
        pytest.param("aarch64", PI_5, "aarch64-dot", "Cortex-A76", id="NEON dot"),
        pytest.param("aarch64", GRAVITON_3, "aarch64-dot+i8mm+sve", "Neoverse-V1", id="dot, i8mm and SVE"),
        pytest.param("aarch64", A64FX, "aarch64-sve", "arm 0x46 0x001", id="SVE alone, by its numbers"),
        pytest.param("x86_64", "", "x86_64-sse", "", id="nothing told"),
        pytest.param("riscv64", "isa\t: rv64imafdcv\n", "riscv64", "", id="another architecture"),
        pytest.param("", "model name\t: caf\u00e9\x07\n", "unknown", "caf??", id="nothing printable"),
    ],
)
def test_recorded_machines(architecture: str, cpuinfo: str, isa: str, name: str) -> None:
    assert machine.isa_of(architecture, machine.flags_of(cpuinfo)) == isa
    assert machine.cpu_name_of(cpuinfo) == name


def test_macos_tells_by_sysctl() -> None:
    told = machine.sysctl_values(
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nmachdep.cpu.brand_string: Apple M1\nsysctl: unknown 'x'\nnoise\n"
    )
    assert told["hw.optional.arm.FEAT_DotProd"] == "1"
    assert told["hw.optional.arm.FEAT_I8MM"] == "0"
    assert told["machdep.cpu.brand_string"] == "Apple M1"
    assert machine.isa_of("arm64", {"asimddp"}) == "aarch64-dot"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert machine.read_cpu_name(tmp_path / "none") == ""
    assert "-" in machine.read_isa(tmp_path / "none")


def test_this_machine_fits_its_card() -> None:
    found = machine.read_hardware(memory_bytes_per_s=10**10)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Hardware) == found
    assert found.kind == "cpu", "our engines run on the processor, whatever else there is"
    assert found.memory_bytes_per_s == 10**10
    assert machine.read_hardware().memory_bytes_per_s is None
    assert 1 <= machine.physical_cores() <= machine.usable_cpus() <= (psutil.cpu_count() or 1)
    assert isinstance(machine.has_battery(), bool)


class Driver:
    """What NVIDIA's driver would tell; there is none here."""

    def __init__(self, cards: list[tuple[str | bytes, int]]) -> None:
        self.cards = cards
        self.is_open = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, said in {
            "nvmlInit": self.init,
            "nvmlShutdown": self.shut_down,
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": lambda number: number,
            "nvmlDeviceGetName": lambda card: self.cards[card][0],
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=self.cards[card][1]),
        }.items():
            monkeypatch.setattr(pynvml, name, said)

    def init(self) -> None:
        self.is_open = True

    def shut_down(self) -> None:
        self.is_open = False


@pytest.mark.parametrize(
    ("cards", "then"),
    [
        pytest.param([], None, id="a driver without a card"),
        pytest.param([("NVIDIA L4", 24)], gpu.Gpu(name="NVIDIA L4", memory_bytes=24, count=1), id="one"),
        pytest.param([("small", 8), (b"NVIDIA H100 NVL", 94)], gpu.Gpu(name="NVIDIA H100 NVL", memory_bytes=94, count=2), id="the largest"),
        pytest.param([("\u2603" * 3 + "x" * 90, 1)], gpu.Gpu(name="?" + "x" * 63, memory_bytes=1, count=1), id="a name for headers"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, cards: list[tuple[str | bytes, int]], then: gpu.Gpu | None) -> None:
    driver = Driver(cards)
    driver.install(monkeypatch)
    assert gpu.read_gpu() == then
    assert not driver.is_open
    found = machine.read_hardware()
    assert (found.kind, found.gpu) == ("cpu", then and then.name)


def zone(root: Path, name: str, energy_uj: str, full_uj: str = "1000") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(energy_uj)
    (folder / "max_energy_range_uj").write_text(full_uj)
    return folder


def test_the_energy_meter_adds_packages_and_wraps_around(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "100\n"), zone(tmp_path, "intel-rapl:1", "990\n")
    core = zone(tmp_path, "intel-rapl:0:0", "50\n")
    meter = rapl.open_meter(tmp_path)
    assert meter is not None
    assert meter.joules() == 0
    (first / "energy_uj").write_text("400\n")
    (second / "energy_uj").write_text("40\n")  # full at 1000
    (core / "energy_uj").write_text("900\n")  # a part of the first
    assert meter.joules() == pytest.approx(350e-6)
    (first / "energy_uj").write_text("450\n")
    assert meter.joules() == pytest.approx(400e-6)
    (second / "energy_uj").write_text("nonsense")
    assert meter.joules() is None


@pytest.mark.parametrize("energy", ["", "-", "x"], ids=repr)
def test_no_meter(tmp_path: Path, energy: str) -> None:
    assert rapl.open_meter(tmp_path / "none") is None
    zone(tmp_path, "intel-rapl:0", energy)
    zone(tmp_path, "dtpm", "5")
    assert rapl.open_meter(tmp_path) is None

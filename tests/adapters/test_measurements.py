"""What was measured is found again for the same machine, weights and build, and for nothing else."""

import os
import threading
from pathlib import Path

import msgspec
import pytest

from fallow.adapters import measurements
from fallow.adapters.measurements import ENTRIES_MAX, FILE, HardwareKey, Measurements, build_of, key_of, memory_speed
from fallow.model.card import Hardware
from fallow.model.measured import Choice, Measured, Point

KEY = HardwareKey(isa="x86_64-avx2", cores=4, memory_gib=16, cpu="a processor")
DIGEST = "a" * 64
BUILD = "xllamacpp 1.0"
MEASURED = Measured(
    work="text",
    choice=Choice(threads=2, slots=4, batch_tokens=64),
    prefill_tokens_per_s=120.0,
    decode_tokens_per_s=30.5,
    decode_by_streams=((1, 30.5), (2, 44.0)),
    points=(Point(threads=2, prefill_tokens_per_s=120.0, decode_by_streams=((1, 30.5), (2, 44.0))),),
    at_ms=1_000,
    bytes_per_token=10**8,
    memory_bytes_per_s=2 * 10**10,
    roofline_share=0.15,
)


def at(at_ms: int) -> Measured:
    return msgspec.structs.replace(MEASURED, at_ms=at_ms)


def test_it_is_found_again_by_another_process(tmp_path: Path) -> None:
    Measurements(tmp_path / "new").keep(KEY, DIGEST, BUILD, MEASURED)
    assert Measurements(tmp_path / "new").find(KEY, DIGEST, BUILD) == MEASURED
    assert (tmp_path / "new" / FILE).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("change", [{"isa": "x86_64-amx"}, {"cores": 3}, {"memory_gib": 8}, {"cpu": "another"}], ids=str)
def test_another_machine_is_measured_anew(tmp_path: Path, change: dict[str, object]) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, DIGEST, BUILD, MEASURED)
    cache.keep_bandwidth(KEY, 5, at_ms=1)
    other = msgspec.structs.replace(KEY, **change)
    assert cache.find(other, DIGEST, BUILD) is None
    assert cache.bandwidth(other) is None


def test_other_weights_and_builds_are_measured_anew(tmp_path: Path) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, DIGEST, BUILD, MEASURED)
    assert cache.find(KEY, "b" * 64, BUILD) is None
    assert cache.find(KEY, DIGEST, "xllamacpp 1.1") is None


def test_the_latest_counts_and_the_oldest_leave(tmp_path: Path) -> None:
    cache = Measurements(tmp_path)
    document = measurements._Document(
        format=measurements.FORMAT, models={f"{KEY.text()}/{BUILD}/{number}": at(number) for number in range(ENTRIES_MAX)}
    )
    (tmp_path / FILE).write_bytes(msgspec.json.encode(document))
    cache.keep(KEY, DIGEST, BUILD, at(10_000))
    cache.keep(KEY, DIGEST, BUILD, at(10_001))
    assert cache.find(KEY, DIGEST, BUILD) == at(10_001)
    assert cache.find(KEY, "0", BUILD) is None
    assert cache.find(KEY, "1", BUILD) == at(1)
    assert len(msgspec.json.decode((tmp_path / FILE).read_bytes())["models"]) == ENTRIES_MAX


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1, "models": {"x": 3}}', b"[" * 100_000, b'{"format": 99, "models": {}}'],
    ids=["empty", "cut", "a list", "no text", "other values", "deep", "another format"],
)
def test_a_broken_file_is_no_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    cache = Measurements(tmp_path)
    assert cache.find(KEY, DIGEST, BUILD) is None
    cache.keep(KEY, DIGEST, BUILD, MEASURED)
    assert cache.find(KEY, DIGEST, BUILD) == MEASURED


def test_another_formats_values_are_not_believed(tmp_path: Path) -> None:
    cache = Measurements(tmp_path)
    cache.keep(KEY, DIGEST, BUILD, MEASURED)
    document = msgspec.json.decode((tmp_path / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(msgspec.json.encode(document | {"format": measurements.FORMAT + 1}))
    assert cache.find(KEY, DIGEST, BUILD) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_only_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    Measurements(tmp_path).keep(KEY, DIGEST, BUILD, MEASURED)
    assert Measurements(tmp_path).find(KEY, DIGEST, BUILD) is None


def test_a_folder_that_can_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Measurements(tmp_path / "file" / "folder")
    cache.keep(KEY, DIGEST, BUILD, MEASURED)
    assert cache.find(KEY, DIGEST, BUILD) is None


def test_several_write_at_once(tmp_path: Path) -> None:
    workers = [threading.Thread(target=Measurements(tmp_path).keep, args=(KEY, str(number), BUILD, at(number + 1))) for number in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [Measurements(tmp_path).find(KEY, str(number), BUILD) for number in range(12)] == [at(number + 1) for number in range(12)]


def test_the_memory_is_measured_once(tmp_path: Path) -> None:
    cache = Measurements(tmp_path)
    key = msgspec.structs.replace(KEY, cores=1)
    first = memory_speed(cache, key, at_ms=1)
    assert first is not None
    assert cache.bandwidth(key) == first
    cache.keep_bandwidth(key, 7, at_ms=2)
    assert memory_speed(cache, key, at_ms=3) == 7
    again = memory_speed(cache, key, at_ms=4, again=True)
    assert again == cache.bandwidth(key) != 7


def test_memory_that_the_kernel_tells_a_little_differently_is_the_same() -> None:
    def of(memory_bytes: int) -> HardwareKey:
        return key_of(Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=memory_bytes), 2)

    assert of(16 * 2**30 - 10**8) == of(16 * 2**30 - 3 * 10**8) != of(32 * 2**30)
    assert of(2**34).cores == 2


def test_the_builds_are_those_installed() -> None:
    assert build_of("llama") != build_of("onnx")
    assert all(len(build_of(engine).split()) == 2 for engine in ("llama", "onnx"))

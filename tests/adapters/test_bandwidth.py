"""How fast memory is read: over the caches, within what is free, on this machine."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.adapters import bandwidth

MIB = 2**20
GIB = 2**30


@pytest.mark.parametrize(
    ("cores", "cache", "free", "then"),
    [
        pytest.param(2, 32 * MIB, 8 * GIB, 128 * MIB, id="a desktop: over its cache"),
        pytest.param(2, 0, 8 * GIB, 128 * MIB, id="a cache that isn't told"),
        pytest.param(64, 256 * MIB, 256 * GIB, 1024 * MIB, id="a server: four times its caches"),
        pytest.param(96, 1152 * MIB, 768 * GIB, 2 * GIB, id="not without a limit"),
        pytest.param(4, 8 * MIB, 512 * MIB, 64 * MIB, id="an eighth of what is free"),
        pytest.param(512, 0, 2048 * GIB, 512 * 8 * MIB, id="a chunk for each core"),
        pytest.param(4, 8 * MIB, 255 * MIB, None, id="no memory for that"),
    ],
)
def test_buffers(cores: int, cache: int, free: int, then: int | None) -> None:
    assert bandwidth.buffer_bytes(cores, cache_bytes=cache, free_bytes=free) == then


@given(cores=st.integers(1, 1024), cache=st.integers(0, 4 * GIB), free=st.integers(0, 2**42))
def test_buffers_never_take_more_than_an_eighth(cores: int, cache: int, free: int) -> None:
    found = bandwidth.buffer_bytes(cores, cache_bytes=cache, free_bytes=free)
    assert found is None or cores * bandwidth.CHUNK_BYTES <= found <= free // 8


def cache(cpus: Path, cpu: int, index: int, level: str, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, value in {"level": level, "size": size, "shared_cpu_list": shared}.items():
        (folder / name).write_text(value + "\n")


def test_last_level_caches_count_once_each(tmp_path: Path) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 2, "2", "1024K", str(cpu))
        cache(tmp_path, cpu, 3, "3", "32768K", "0-1" if cpu < 2 else "2-3")
    cache(tmp_path, 0, 4, "nonsense", "1K", "0")
    cache(tmp_path, 1, 4, "4", "much", "0")
    assert bandwidth.cache_bytes(tmp_path) == 64 * MIB
    assert bandwidth.cache_bytes(tmp_path / "none") == 0


def test_units(tmp_path: Path) -> None:
    cache(tmp_path, 0, 0, "3", "6M", "0")
    assert bandwidth.cache_bytes(tmp_path) == 6 * MIB


def test_this_machine_reads_memory(tmp_path: Path) -> None:
    found = bandwidth.measure_bandwidth(1, cpus=tmp_path)
    assert found is not None
    assert 10**8 < found < 10**13

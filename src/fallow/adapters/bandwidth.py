"""How fast this machine's memory is read by all cores together: what bounds decoding on a processor.

Of numpy's operations a sum of 8-byte numbers came closest to the memory's speed. On two cores of an EPYC (DDR5, 32 MB of cache):
sum of float64 35 GB/s, sum of int64 31, maximum of int64 28, maximum of bytes 27; BLAS's dot product does as well with one thread,
but starts threads of its own. Numpy gives the interpreter's lock away meanwhile, so threads suffice.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

BUDGET_S = 0.9
"""For everything: making the buffers, and reading them."""
FILL_SHARE = 0.6
"""Of the budget, for making the buffers: each new page costs the kernel more than reading it costs us."""
PASSES_MAX = 12
CACHES = 4
"""How many times the last-level caches the buffers are."""
TOTAL_BYTES_MIN = 128 * 2**20
TOTAL_BYTES_MAX = 2 * 2**30
FREE_SHARE = 8
"""The buffers take one part in so many of the free memory at most."""
CHUNK_BYTES = 8 * 2**20
NUMBER_BYTES = 8
CPUS = Path("/sys/devices/system/cpu")
_SIZE = re.compile(r"(\d+)([KM]?)\Z")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}

Numbers = NDArray[np.float64]


def measure_bandwidth(cores: int, *, cpus: Path = CPUS) -> int | None:
    """Bytes per second read by `cores` threads at once, the best of a few passes within a second; None if there is no memory for it."""
    total = buffer_bytes(cores, cache_bytes=cache_bytes(cpus), free_bytes=int(psutil.virtual_memory().available))
    if total is None:
        return None
    began = time.monotonic()
    with ThreadPoolExecutor(cores, thread_name_prefix="bandwidth") as pool:
        fill_until = began + BUDGET_S * FILL_SHARE
        try:
            buffers = list(pool.map(lambda _: _fill(total // cores, fill_until), range(cores)))
        except MemoryError:
            return None
        size = sum(chunk.nbytes for buffer in buffers for chunk in buffer)
        best = 0.0
        for _ in range(PASSES_MAX):
            before = time.perf_counter()
            list(pool.map(_read, buffers))
            best = max(best, size / (time.perf_counter() - before))
            if time.monotonic() - began > BUDGET_S:
                break
    return int(best)


def buffer_bytes(cores: int, *, cache_bytes: int, free_bytes: int) -> int | None:
    """How much all threads read together: well over the caches, within the free memory; None if that leaves less than a chunk for each."""
    least = cores * CHUNK_BYTES
    total = min(max(CACHES * cache_bytes, TOTAL_BYTES_MIN, least), max(TOTAL_BYTES_MAX, least), free_bytes // FREE_SHARE)
    return total if total >= least else None


def cache_bytes(cpus: Path = CPUS) -> int:
    """All last-level caches together, each once; 0 where Linux doesn't tell."""
    found: dict[str, tuple[int, int]] = {}
    for index in sorted(cpus.glob("cpu[0-9]*/cache/index*")):
        try:
            level, shared = int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip()
            size = _SIZE.match((index / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if size is not None:
            found[f"{level} {shared}"] = (level, int(size.group(1)) * _UNITS[size.group(2)])
    last = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == last)


def _fill(wanted_bytes: int, until: float) -> list[Numbers]:
    """Chunks of memory that are really there (untouched pages all are the same one); one at least, fewer if time runs out."""
    chunks: list[Numbers] = []
    while len(chunks) * CHUNK_BYTES < wanted_bytes and (not chunks or time.monotonic() < until):
        chunks.append(np.full(CHUNK_BYTES // NUMBER_BYTES, 1.0))
    return chunks


def _read(chunks: list[Numbers]) -> None:
    for chunk in chunks:
        chunk.sum()

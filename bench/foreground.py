"""An owner's own work, as a process: told how long on standard input, it answers with how much it got done."""

import hashlib
import sys
import time

import numpy as np

BUFFER_BYTES = 64 * 1024 * 1024
BLOCK = b"x" * 65_536
PROBE_PERIOD_S = 0.05
PROBE_WORK_S = 0.005
CALIBRATE_S = 0.5


def count_cpu(seconds: float) -> float:
    """Hashes, which need the core and nothing else."""
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        hashlib.sha256(BLOCK).digest()
        done += 1
    return done


def count_memory(seconds: float, source: np.ndarray, target: np.ndarray) -> float:
    """Copies between buffers far larger than any cache."""
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.copyto(target, source)
        done += 1
    return done


def spin(rounds: int) -> None:
    for _ in range(rounds):
        hashlib.sha256(BLOCK).digest()


def probe(seconds: float, rounds: int) -> list[float]:
    """A little work, again and again: how many milliseconds each took."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        spin(rounds)
        done = time.perf_counter()
        took.append((done - began) * 1000)
        time.sleep(max(0.0, PROBE_PERIOD_S - (done - began)))
    return took


def main() -> None:
    kind = sys.argv[1]
    source, target = (np.ones(BUFFER_BYTES // 8), np.zeros(BUFFER_BYTES // 8)) if kind == "memory" else (np.ones(1), np.ones(1))
    rounds = max(1, round(count_cpu(CALIBRATE_S) * PROBE_WORK_S / CALIBRATE_S)) if kind == "probe" else 0
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        if kind == "probe":
            print(" ".join(f"{ms:.4f}" for ms in probe(seconds, rounds)), flush=True)
        else:
            print(count_cpu(seconds) if kind == "cpu" else count_memory(seconds, source, target), flush=True)


if __name__ == "__main__":
    main()

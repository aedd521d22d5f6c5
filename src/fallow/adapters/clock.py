"""Time, as the operating system tells it."""

import time


class SystemClock:
    """The Clock of a running process."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


def local_minute(wall_ms: int) -> int:
    """The minute of the local day, 0 to 1439."""
    local = time.localtime(wall_ms / 1000)
    return local.tm_hour * 60 + local.tm_min


def local_day(wall_ms: int) -> str:
    """The local date, `2026-11-23`."""
    return time.strftime("%Y-%m-%d", time.localtime(wall_ms / 1000))

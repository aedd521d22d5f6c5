"""Time, as the operating system tells it."""

import time


class SystemClock:
    """The Clock of a running process."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

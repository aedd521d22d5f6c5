"""Time for tests."""


class FakeClock:
    """A clock that moves when told. The wall's time of day is whatever it is: no test may rest on it."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def now_ms(self) -> int:
        return self.ms

    def wall_ms(self) -> int:
        return 1_790_000_000_000 + self.ms

    def advance(self, ms: int) -> None:
        self.ms += ms

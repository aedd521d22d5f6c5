"""Whether callers see one steady service while nodes die, come and go, and more is asked than there is: `python -m bench.steady`."""

import argparse

from bench.load import run
from bench.report import Figure, publish
from bench.steady_churn import measure_churn
from bench.steady_kills import measure_kills
from bench.steady_load import measure_flood, measure_overload

PARTS = ("kills", "churn", "flood", "overload")


async def measure(part: str, *, quick: bool) -> list[Figure]:
    """All figures of one part."""
    match part:
        case "kills":
            return await measure_kills(quick=quick)
        case "churn":
            return await measure_churn(quick=quick)
        case "flood":
            return await measure_flood(quick=quick)
        case "overload":
            return await measure_overload(quick=quick)
    raise AssertionError(part)


def publish_all(parts: tuple[str, ...] = PARTS, *, quick: bool = False) -> None:
    """Measure and publish each part; a shortened run has a file of its own."""
    for part in parts:
        publish(f"steady-{part}{'-quick' if quick else ''}", run(measure(part, quick=quick)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steady", description="One steady service")
    parser.add_argument("parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a shortened form of each")
    chosen = parser.parse_args()
    publish_all(tuple(chosen.parts), quick=chosen.quick)


if __name__ == "__main__":
    main()

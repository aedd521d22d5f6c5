"""The door of the `fallow` command: the owner's two words get through without waiting for the rest to be loaded."""

import sys
from pathlib import Path

QUICK = ("pause", "resume")


def main() -> None:
    """Run a command."""
    code = quick(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    from fallow.cli import main as whole

    whole.main()


def quick(words: list[str]) -> int | None:
    """The exit code of `pause [TIME] [--data DIR]` or `resume [--data DIR]`; None for everything else, help and mistakes too."""
    if not words or words[0] not in QUICK:
        return None
    command, *rest = words
    data: Path | None = None
    if "--data" in rest[:-1]:
        at = rest.index("--data")
        data = Path(rest[at + 1])
        del rest[at : at + 2]
    if len(rest) > (command == "pause") or any(word.startswith("-") for word in rest):
        return None
    from fallow.cli import owner

    return owner.pause(data, rest[0] if rest else "") if command == "pause" else owner.resume(data)

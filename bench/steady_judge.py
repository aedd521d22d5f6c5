"""The tests' judge of histories, for benches: it isn't installed, so this module knows where it lies."""

import sys

from bench.children import ROOT

sys.path.append(str(ROOT / "tests" / "helpers"))

from histories import Cut, Done, Event, Failed, Fault, Left, Seen, Text, damage, judge_all

__all__ = ["Cut", "Done", "Event", "Failed", "Fault", "Left", "Seen", "Text", "damage", "judge_all", "told"]


def told(faults: list[Fault]) -> str:
    """The first fault of each rule, for a table's note."""
    first = {fault.rule: fault for fault in reversed(faults)}
    return "; ".join(f"{rule}: {fault.name}: {fault.what}" for rule, fault in first.items())

"""What a gateway thinks of each node, from how attempts there ended: a pure fold, in which what is old fades."""

import math
from collections import OrderedDict
from typing import Literal

import msgspec
from msgspec.structs import replace

from fallow.model.ids import NodeId

HALF_LIFE_S = 1_800.0
"""After so long an attempt counts half."""
BACK_OFF_S_MIN, BACK_OFF_S_MAX = 1.0, 60.0
"""How long a node is left alone after a fault; each further one in a row doubles it, up to the most."""
PROBE_S_MAX = 60.0
"""A probe that nothing was heard of for so long doesn't keep others away any more."""
STANDINGS_MAX = 20_000
"""Nodes whose standing is remembered; those that nothing was heard of for longest are forgotten first."""
LOOK_S = 10.0
"""How often matching is told of a standing that only time changes."""
ENDS_PRIOR, FAULTS_PRIOR = 20.0, 0.2
"""What a newcomer is taken to have done already: the chance is the mean of a beta distribution that starts there."""
CHANCE_LEAST = 0.05
MISSED = 0.5
"""A call that meets a fault goes on elsewhere; about so many of those are late for it."""
LATE_FACTOR, LATE_S = 2.0, 0.5
"""A promise is kept if the answer came no later than so many times what was promised, or no more than so much later."""
RATIO_LOG_MAX = 3.0
"""No single answer says more about honesty than a factor of 20."""
TIME_S_LEAST = 0.01
"""Shorter times are not told apart."""
FAULTS = frozenset(
    {
        "node_unreachable",
        "node_silent",
        "node_too_slow",
        "answer_malformed",
        "engine_failed",
        "engine_stalled",
    }
)
"""The failures that count against a node. All others are the call's, the caller's, the gateway's, the way's, or a node's good right."""

Access = Literal["open", "probe", "closed"]
"""Who may be sent to a node: any call; one call, to see whether it has mended; none."""


class Succeeded(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt came to its end.

    `promised_s` was promised until the first token (until the end, where nothing tells when the first token came), `took_s` is what
    it took, None if nobody looked. `kept`: the answer came as it had to.
    """

    promised_s: float = 0.0
    took_s: float | None = None
    kept: bool = True


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt came to nothing, for this reason. If it isn't in FAULTS, this is the same as Yielded."""

    code: str


class Yielded(msgspec.Struct, frozen=True):
    """An attempt ended without telling anything: the owner came back, the caller left, or the call was at fault."""


class Probed(msgspec.Struct, frozen=True):
    """A call was sent to a node that may be in trouble."""


class Suspected(msgspec.Struct, frozen=True):
    """The node may be gone: it isn't heard, or nobody was there to take a call."""


class Heard(msgspec.Struct, frozen=True):
    """The node is there, as it says itself."""


Event = Succeeded | Failed | Yielded | Probed | Suspected | Heard


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What is thought of a node. All counts are as they were worth at `at_s`; times are seconds of the gateway's clock.

    `ends` and `faults` count attempts. `promises` counts those that something was promised for and that came to their end, `kept`
    those that kept it; `ratio_log` is the sum of their logarithms of what it took by what was promised. `in_a_row` faults came
    since something last went well, or since the trouble was forgotten.
    """

    at_s: float = 0.0
    ends: float = 0.0
    faults: float = 0.0
    promises: float = 0.0
    kept: float = 0.0
    ratio_log: float = 0.0
    in_a_row: int = 0
    backs_off_until_s: float = 0.0
    probed_until_s: float = 0.0
    suspected: bool = False


NEWCOMER = Standing()


def fold(standing: Standing, event: Event, now_s: float) -> Standing:
    """What is thought of a node after one more event."""
    s = faded(standing, now_s)
    match event:
        case Succeeded():
            return _succeeded(s, event)
        case Failed(code="node_unreachable"):  # all that it ran ends at once; it is back when it is heard
            return s if s.suspected else replace(s, faults=s.faults + 1.0, probed_until_s=0.0)
        case Failed(code=code) if code in FAULTS:
            return _failed(s, now_s)
        case Failed() | Yielded():
            return replace(s, probed_until_s=0.0)  # if it was a probe, the next call is one
        case Probed():
            return s if s.probed_until_s > now_s else replace(s, probed_until_s=now_s + PROBE_S_MAX)
        case Suspected():
            return replace(s, suspected=True)
        case Heard():
            return replace(s, suspected=False)
    raise AssertionError(f"{event}")


def _succeeded(s: Standing, event: Succeeded) -> Standing:
    s = replace(s, ends=s.ends + 1.0, in_a_row=0, backs_off_until_s=0.0, probed_until_s=0.0)
    if event.took_s is None:
        return s
    log = math.log(max(TIME_S_LEAST, event.took_s) / max(TIME_S_LEAST, event.promised_s))
    clipped = max(-RATIO_LOG_MAX, min(RATIO_LOG_MAX, log))
    return replace(s, promises=s.promises + 1.0, kept=s.kept + event.kept, ratio_log=s.ratio_log + clipped)


def _failed(s: Standing, now_s: float) -> Standing:
    """One fault more. While a node is left alone, the calls that were there end for the same reason: that is one trouble, counted once."""
    if now_s < s.backs_off_until_s and s.probed_until_s <= now_s:
        return s
    in_a_row = 1 if is_forgotten(s, now_s) else s.in_a_row + 1
    doublings = min(in_a_row - 1, math.ceil(math.log2(BACK_OFF_S_MAX / BACK_OFF_S_MIN)))
    until_s = now_s + min(BACK_OFF_S_MAX, BACK_OFF_S_MIN * 2.0**doublings)
    return replace(s, faults=s.faults + 1.0, in_a_row=in_a_row, backs_off_until_s=until_s, probed_until_s=0.0)


def faded(standing: Standing, now_s: float) -> Standing:
    """The counts as they are worth now."""
    if now_s <= standing.at_s:
        return standing
    left = 0.5 ** ((now_s - standing.at_s) / HALF_LIFE_S)
    return replace(
        standing,
        at_s=now_s,
        ends=standing.ends * left,
        faults=standing.faults * left,
        promises=standing.promises * left,
        kept=standing.kept * left,
        ratio_log=standing.ratio_log * left,
    )


def is_forgotten(standing: Standing, now_s: float) -> bool:
    """Whether the last trouble is so long ago that nobody minds."""
    return now_s - standing.backs_off_until_s > HALF_LIFE_S


def is_troubled(standing: Standing, now_s: float) -> bool:
    """Whether faults came in a row, and nothing went well since."""
    return standing.in_a_row > 0 and not is_forgotten(standing, now_s)


def access(standing: Standing, now_s: float) -> Access:
    """Who may be sent there. Whatever happened, a probe may be BACK_OFF_S_MAX later, unless the node isn't even heard."""
    if standing.suspected:
        return "closed"
    if not is_troubled(standing, now_s):
        return "open"
    return "closed" if now_s < max(standing.backs_off_until_s, standing.probed_until_s) else "probe"


def chance(standing: Standing) -> float:
    """The chance that an attempt there comes to its end, soon or late, from CHANCE_LEAST to less than 1."""
    ends = ENDS_PRIOR + standing.ends
    return max(CHANCE_LEAST, ends / (ends + FAULTS_PRIOR + standing.faults))


def trust(standing: Standing) -> float:
    """What the node's faults leave of a call's chance to meet its needs, at most 1; who is new is as good as who is known to be good."""
    return 1.0 - MISSED * (1.0 - min(1.0, chance(standing) / chance(NEWCOMER)))


def honesty(standing: Standing) -> tuple[float, float] | None:
    """How many times longer than promised answers took in the geometric mean, and the share of promises kept; None if nothing is known."""
    if standing.promises < 1e-6:
        return None
    return math.exp(standing.ratio_log / standing.promises), min(1.0, standing.kept / standing.promises)


def keeps(*, promised_s: float, took_s: float) -> bool:
    """Whether an answer came as soon as was promised, more or less."""
    return took_s <= max(LATE_FACTOR * promised_s, promised_s + LATE_S)


class Standings:
    """The standings of all nodes that something was heard of, and which of them time will change."""

    def __init__(self) -> None:
        self._all: OrderedDict[NodeId, Standing] = OrderedDict()
        self._due: dict[NodeId, float] = {}
        self._soonest_s = math.inf

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._all

    def of(self, node_id: NodeId, now_s: float) -> Standing:
        """A node's standing as it is worth now."""
        return faded(self._all.get(node_id, NEWCOMER), now_s)

    def told(self, node_id: NodeId, event: Event, now_s: float) -> tuple[NodeId, ...]:
        """Take an event in; returns the nodes whose standing is another now."""
        self._all[node_id] = fold(self._all.get(node_id, NEWCOMER), event, now_s)
        self._all.move_to_end(node_id)
        self._plan(node_id, now_s)
        if len(self._all) <= STANDINGS_MAX:
            return (node_id,)
        forgotten, _ = self._all.popitem(last=False)
        self._due.pop(forgotten, None)
        return node_id, forgotten

    def due(self, now_s: float) -> list[NodeId]:
        """The nodes that matching should be told of, since time has passed."""
        if now_s < self._soonest_s:
            return []
        found = [node_id for node_id, due_s in self._due.items() if due_s <= now_s]
        for node_id in found:
            self._plan(node_id, now_s)
        self._soonest_s = min(self._due.values(), default=math.inf)
        return found

    def _plan(self, node_id: NodeId, now_s: float) -> None:
        standing = self._all[node_id]
        if not is_troubled(standing, now_s) and trust(faded(standing, now_s)) == 1.0:
            self._due.pop(node_id, None)
            return
        ends = [end_s for end_s in (standing.backs_off_until_s, standing.probed_until_s) if end_s > now_s]
        self._due[node_id] = due_s = min([now_s + LOOK_S, *ends])
        self._soonest_s = min(self._soonest_s, due_s)

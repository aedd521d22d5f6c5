"""Where a call goes: the cheapest offer that can take it, soonest first among equals, or why none can."""

from collections.abc import Collection, Sequence

from fallow.core.match.candidate import Candidate
from fallow.core.match.explain import explain
from fallow.core.match.filter import sieve
from fallow.core.match.pick import pick
from fallow.core.match.price import quote
from fallow.model.call import Call
from fallow.model.ids import NodeId
from fallow.model.quote import Place, Refuse


def match(call: Call, candidates: Sequence[Candidate], *, tried: Collection[NodeId], now_ms: int) -> Place | Refuse:
    """Filter → predict → price → pick, or explain. `tried` are the nodes on which this call already failed."""
    fit, stopped = sieve(call, candidates, tried=tried, now_ms=now_ms)
    if not fit:
        return explain(call, candidates, stopped)
    best = pick([quote(call.needs, candidate) for candidate in fit])
    return Place(node_id=best.node_id, quote=best, why="cheapest")

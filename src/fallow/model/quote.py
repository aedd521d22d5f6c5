"""An offer applied to needs; what matching returns."""

import msgspec

from fallow.model.ids import NodeId


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """The most it can cost, when the first token and the end are expected, and how sure we are (0 to 1)."""

    node_id: NodeId
    model: str
    cost_max_micro: int
    first_token_in_ms: int
    end_in_ms: int
    certainty: float


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the call goes, and at what quote."""

    node_id: NodeId
    quote: Quote


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """No offer can take the call: `limit` stopped it, `lifted_by` says what would help.

    `counts` tells how many offers each limit stopped, in the order in which the limits apply.
    """

    limit: str
    lifted_by: str
    counts: tuple[tuple[str, int], ...] = ()
    models: tuple[str, ...] = ()
    retry_after_ms: int | None = None

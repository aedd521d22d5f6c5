"""An offer applied to needs; what matching returns."""

import msgspec

from fallow.model.ids import NodeId
from fallow.model.needs import HardwareKind, Ring


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """The most it can cost, what it probably costs, when to expect it, and the chance that it meets what the call needs (0 to 1)."""

    node_id: NodeId
    model: str
    hardware: HardwareKind
    ring: Ring
    region: str
    cost_max_micro: int
    cost_expected_micro: int
    first_token_in_ms: int
    per_token_ms: float
    end_in_ms: int
    chance: float


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """How many offers a limit stopped, and what would lift it."""

    limit: str
    offers: int
    lifted_by: str


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the call goes, at what quote, and why; `others` are the next best, `able` how many would have met the needs."""

    node_id: NodeId
    quote: Quote
    why: str
    able: int = 1
    others: tuple[Quote, ...] = ()


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """No offer can take the call: `limit` stopped it, `lifted_by` says what would help.

    `stopped` has all limits that stopped offers, in the order in which they apply.
    """

    limit: str
    lifted_by: str
    stopped: tuple[Stopped, ...] = ()
    models: tuple[str, ...] = ()
    retry_after_ms: int | None = None


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """A flex call is better asked again in a while."""

    for_ms: int
    why: str

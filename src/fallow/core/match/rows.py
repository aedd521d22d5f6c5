"""The offers of one model in order of their price: rows are put, changed, dropped, and sorted now and then."""

import bisect
import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from fallow.core.match import learn, predict
from fallow.core.match.columns import GONE, Codes, Columns, Floats, Table
from fallow.model.ids import NodeId
from fallow.model.offer import Load, Offer

ROWS_MIN = 16
TAIL_MAX = 64
"""Offers that came since the rows were last put in order; all of them are looked at each time."""
CONTEXT_OF_LISTS = 2.0**40
"""What embeds or ranks takes lists of texts, each of which must fit: the whole says nothing."""
NEWCOMERS_MAX = 512
"""Where more come at once, as when a gateway starts, they are put in order at once."""
GONE_MAX = 16
PARTS = (512, *(8 * 512 * 4**more for more in range(12)))
"""The cheapest offers are looked at first; this is where the parts end."""
UNREAD_EACH_TOKENS = 150.0
"""What is believed of another gateway's call until our own tell better."""
NOBODY: Codes = np.zeros(0, np.intp)
NEAR_FIRST = 16
"""So many of a nearer ring are looked at along with the cheapest of all, the others only if none of these will do."""
QUICK_ROWS = 64
"""Where speed matters more than cost, so many of the fastest are looked at first."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is written into the columns of an offer besides what is learnt."""

    offer: Offer
    kind: int
    org: int
    stop: int
    load: Load
    expires_s: float
    is_gpu: bool
    rtt_s: float = 0.0


class Mark(NamedTuple):
    """A node's standing as it is written: the limit that stops every call, or 0; until when; its trust; whether only probes may go."""

    doubt: int
    back_s: float
    trust: float
    is_on_probation: bool


class Cheapest(NamedTuple):
    """An organisation's rows that are looked at first: before `beyond`, so many after it, so many of the newest; whether they are all."""

    rows: Codes
    beyond: int
    far: int
    newest: int
    are_all: bool


class Rows:
    """The offers in order of their price, with the newest at the end."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.nodes: list[NodeId] = []
        self.row_of: dict[NodeId, int] = {}
        self.table = Table(ROWS_MIN)
        self.ordered = 0
        self.gone = 0
        self.orgs: dict[int, list[int]] = {}
        """The rows of each organisation."""
        self._known: dict[int, Cheapest] = {}
        """Of some of these."""
        self.on_probation: set[NodeId] = set()
        """Nodes that backed off, and should be tried by a call that can be spared."""
        self.doubted: set[NodeId] = set()
        """Nodes whose trust isn't whole."""
        self.cheapest_prompt: Floats = np.zeros(0)
        self.quick: Codes = np.zeros(0, np.intp)
        self.expires_s = self.context = math.inf
        """No offer expires sooner, or takes less."""

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def columns(self) -> Columns:
        """What is known of each row; new arrays when there are more rows than there was place for."""
        return self.table.columns

    def put(self, node_id: NodeId, row: Row, *, now_s: float) -> None:
        """An offer is new, or something about it changed; what was learnt of it stays."""
        old = self.row_of.get(node_id)
        if old is not None and self._place(old) == (*_prices(row), row.org):
            self._write(old, row)
            return
        at = len(self.nodes)
        if at >= len(self.table):
            self.table.grow()
        self.nodes.append(node_id)
        self.row_of[node_id] = at
        if old is None:
            self._unlearn(at, row.offer)
        else:  # another price or owner is another place
            self.table.put(at, [column[old] for column in self.columns])
            self._leave_row(old)
        self._write(at, row)
        self.orgs.setdefault(row.org, []).append(at)
        self._known.pop(row.org, None)
        if len(self.nodes) - self.ordered > max(NEWCOMERS_MAX, self.ordered):
            self.order()

    def _place(self, at: int) -> tuple[float, float, float, int]:
        c = self.columns
        return float(c.prompt_price[at]), float(c.cached_price[at]), float(c.output_price[at]), int(c.org[at])

    def _write(self, at: int, row: Row) -> None:
        c, offer, speed = self.columns, row.offer, row.offer.speed
        c.prompt_price[at], c.cached_price[at], c.output_price[at] = _prices(row)
        c.writes[at] = speed.writes
        prefill, decode = predict.guess(is_gpu=row.is_gpu)
        c.prefill[at] = max(predict.TOKENS_PER_S_MIN, speed.prefill_tokens_per_s or prefill)
        c.decode[at] = max(predict.TOKENS_PER_S_MIN, speed.decode_tokens_per_s or decode)
        c.slope[at] = slope_of(offer)
        c.slots[at] = max(1, offer.slots)
        c.room[at] = offer.slots + row.load.waiting_max
        c.context[at] = offer.context_tokens if speed.writes else CONTEXT_OF_LISTS
        c.rtt_s[at] = row.rtt_s
        c.kind[at], c.org[at] = row.kind, row.org
        c.state[at] = c.stop[at] = row.stop
        c.expires_s[at] = row.expires_s
        c.load_s[at] = (row.load.ready_in_ms or 0) / 1000
        self.expires_s = min(self.expires_s, row.expires_s)
        self.context = min(self.context, float(c.context[at]))

    def _unlearn(self, at: int, offer: Offer) -> None:
        c = self.columns
        self.table.put(at, [0] * len(c))
        measured = offer.speed.prefill_tokens_per_s > 0
        c.prefill_var[at] = predict.PREFILL_VAR_MEASURED if measured else learn.VAR_GUESSED
        c.decode_var[at] = predict.DECODE_VAR_MEASURED if measured else learn.VAR_GUESSED
        c.unread_each[at] = UNREAD_EACH_TOKENS
        c.trust[at] = 1.0

    def mark(self, node_id: NodeId, mark: Mark) -> None:
        """What is thought of a node changed, or its row was written anew."""
        at = self.row_of.get(node_id)
        if at is None:
            return
        c = self.columns
        c.trust[at], c.back_s[at] = mark.trust, mark.back_s
        (self.on_probation.add if mark.is_on_probation else self.on_probation.discard)(node_id)
        (self.doubted.add if mark.trust != 1.0 else self.doubted.discard)(node_id)
        stop = int(c.state[at]) or mark.doubt
        if stop != c.stop[at]:
            c.stop[at] = stop
            predict.derive(c, at)

    def held(self, row: int) -> float:
        """Calls that the offer runs or keeps waiting, as far as is known."""
        return float(self.columns.held[row])

    def of_orgs(self, orgs: Iterable[int]) -> list[int]:
        """The rows of these organisations."""
        return [row for org in orgs for row in self.orgs.get(org, ())]

    def cheapest_of(self, orgs: Iterable[int], *, beyond: int) -> tuple[Codes, bool]:
        """The rows of these organisations before `beyond`, some after it, and all that aren't put in order yet, ascending.

        And whether these are all of them.
        """
        found = [cheapest for org in orgs if (cheapest := self._cheapest(org, beyond)) is not None]
        if len(found) < 2:
            return (found[0].rows, found[0].are_all) if found else (NOBODY, True)
        rows = np.concatenate([one.rows for one in found])
        rows.sort()
        over = sum([one.far for one in found]) - NEAR_FIRST
        if over <= 0:
            return rows, all(one.are_all for one in found)
        newest = len(rows) - sum([one.newest for one in found])
        return np.concatenate((rows[: newest - over], rows[newest:])), False

    def _cheapest(self, org: int, beyond: int) -> "Cheapest | None":
        """The same of one organisation, or None. It is remembered until something of it changes, since lists are slow to look at."""
        known = self._known.get(org)
        if known is None or known.beyond != beyond:
            rows = self.orgs.get(org)
            if rows is None:
                return None
            ordered = bisect.bisect_left(rows, self.ordered)
            before = min(ordered, bisect.bisect_left(rows, beyond))
            end = min(ordered, before + NEAR_FIRST)
            some = np.array(rows[:end] + rows[ordered:], np.intp)
            known = self._known[org] = Cheapest(some, beyond, end - before, len(rows) - ordered, end == ordered)
        return known

    def drop(self, node_id: NodeId) -> None:
        """The node doesn't offer the model any more."""
        at = self.row_of.pop(node_id, None)
        self.on_probation.discard(node_id)
        self.doubted.discard(node_id)
        if at is not None:
            self._leave_row(at)

    def _leave_row(self, at: int) -> None:
        """Nobody's row any more, until the shelf is put in order."""
        org = int(self.columns.org[at])
        self.orgs[org].remove(at)
        self._known.pop(org, None)
        if not self.orgs[org]:
            del self.orgs[org]
        self.columns.stop[at] = self.columns.halt[at] = GONE
        self.nodes[at] = NodeId("")
        self.gone += 1

    def order(self) -> None:
        """Put the rows in order of their price; ties by id, so that every gateway has the same order."""
        if len(self.nodes) - self.ordered <= TAIL_MAX and self.gone <= GONE_MAX + self.ordered // 16:
            return
        c = self.columns
        there = np.array(sorted(self.row_of.values(), key=self.nodes.__getitem__), np.intp)
        rows = there[np.lexsort((c.prompt_price[there], c.output_price[there]))]
        count = len(rows)
        self.table.order(rows)
        self.nodes = [self.nodes[row] for row in rows]
        self.row_of = {node_id: row for row, node_id in enumerate(self.nodes)}
        self.ordered, self.gone = count, 0
        self.expires_s = float(c.expires_s[:count].min(initial=math.inf))
        self.context = float(c.context[:count].min(initial=math.inf))
        floors = np.minimum.accumulate(np.minimum(c.prompt_price[:count], c.cached_price[:count])[::-1])[::-1]
        self.cheapest_prompt = floors
        self.orgs, self._known = {}, {}
        for row, org in enumerate(c.org[:count].tolist()):
            self.orgs.setdefault(org, []).append(row)
        self.quick = np.sort(np.argsort(-c.decode[:count], kind="stable")[:QUICK_ROWS])


def _prices(row: Row) -> tuple[float, float, float]:
    """Micro-credits per token of the prompt, of what is cached of it, and of the output, which only those have that write."""
    price = row.offer.price
    cached = min(price.cached_prompt_micro_per_munit, price.prompt_micro_per_munit)
    output = price.output_micro_per_munit if row.offer.speed.writes else 0
    return price.prompt_micro_per_munit / 1e6, cached / 1e6, output / 1e6


def slope_of(offer: Offer) -> float:
    """How much longer a step takes with each further stream, from the node's benchmark with several; 1 if there was none."""
    speed = offer.speed
    found = [
        (streams * speed.decode_tokens_per_s / rate - 1.0) / (streams - 1)
        for streams, rate in speed.decode_by_streams
        if streams > 1 and rate > 0 and speed.decode_tokens_per_s > 0
    ]
    return min(1.0, max(0.0, found[-1])) if found else 1.0

"""All offers of one model: their columns, this gateway's calls on them, and who wanted them of late."""

import math
from collections import Counter, deque

import msgspec
import numpy as np

from fallow.core.match import learn, predict, rent
from fallow.core.match.columns import ROOM_FACTOR, Codes, Columns, Floats, make
from fallow.model.ids import NodeId
from fallow.model.offer import Load, Offer

ROWS_MIN = 16
TAIL_MAX = 64
"""Offers that came since the shelf was last put in order; all of them are looked at each time."""
GONE_MAX = 16
GONE = -1
"""The row of an offer that went away."""
PARTS = (128, 512, 2_048)
"""The cheapest offers are looked at first; beyond these numbers each further part is four times as long."""
QUICK_ROWS = 256
"""Where speed matters more than cost, so many of the fastest are looked at first."""
OVERRUN = 1.1
OVERDUE_S = 0.5


class Booking(msgspec.Struct, kw_only=True):
    """A call of this gateway on an offer, from the choice to the end."""

    node_id: NodeId
    model: str
    prompt: float
    output: float
    began_s: float
    streams: float
    waits: bool
    first_s: float | None = None
    end_s: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is written into the columns of an offer besides what is learnt."""

    offer: Offer
    kind: int
    org: int
    serves: int
    stop: int
    load: Load
    expires_s: float
    rtt_s: float = 0.0


class Shelf:
    """The offers in order of their price, with the newest at the end."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.nodes: list[NodeId] = []
        self.row_of: dict[NodeId, int] = {}
        self.columns: Columns = make(ROWS_MIN)
        self.ordered = 0
        self.gone = 0
        self.orgs: Counter[int] = Counter()
        self.cheapest_prompt: Floats = np.zeros(0)
        self.quick: Codes = np.zeros(0, np.intp)
        self.bookings: dict[NodeId, dict[str, Booking]] = {}
        self.wanted: deque[rent.Wanted] = deque(maxlen=rent.CALLS_MAX)
        self.asked_s: deque[float] = deque(maxlen=rent.CALLS_MAX)
        self.dear_prompt = self.dear_output = 0.0
        self.prompt_mean = 500.0
        self.output_mean = predict.OUTPUT_TOKENS_GUESS
        self.share = 1.0
        self.writes = True

    def __len__(self) -> int:
        return len(self.row_of)

    # offers come, change and go
    def put(self, node_id: NodeId, row: Row, *, now_s: float) -> None:
        """An offer is new, or something about it changed; what was learnt of it stays."""
        old = self.row_of.get(node_id)
        price = row.offer.price.output_micro_per_munit / 1e6
        if old is not None and self.columns.output_price[old] == price:
            self._write(old, row)
            return
        at = len(self.nodes)
        if at >= len(self.columns.org):
            self.columns = self.columns.grown(ROOM_FACTOR * at)
        self.nodes.append(node_id)
        self.row_of[node_id] = at
        if old is None:
            self._unlearn(at, row.offer, now_s)
        else:  # another price is another place in the order
            for column in self.columns:
                column[at] = column[old]
            self._leave_row(old)
        self._write(at, row)
        self.orgs[row.org] += 1
        self._recount(node_id)

    def _write(self, at: int, row: Row) -> None:
        c, offer, speed = self.columns, row.offer, row.offer.speed
        self.writes = speed.writes
        c.prompt_price[at] = offer.price.prompt_micro_per_munit / 1e6
        c.cached_price[at] = min(offer.price.cached_prompt_micro_per_munit, offer.price.prompt_micro_per_munit) / 1e6
        c.output_price[at] = offer.price.output_micro_per_munit / 1e6
        c.prefill[at] = max(predict.TOKENS_PER_S_MIN, speed.prefill_tokens_per_s or predict.PREFILL_TOKENS_PER_S_GUESS)
        c.decode[at] = max(predict.TOKENS_PER_S_MIN, speed.decode_tokens_per_s or predict.DECODE_TOKENS_PER_S_GUESS)
        c.slope[at] = slope_of(offer)
        c.slots[at] = max(1, offer.slots)
        c.room[at] = offer.slots + row.load.waiting_max
        c.context[at] = offer.context_tokens
        c.rtt_s[at] = row.rtt_s
        c.kind[at], c.org[at], c.serves[at], c.stop[at] = row.kind, row.org, row.serves, row.stop
        c.expires_s[at] = row.expires_s
        c.load_s[at] = (row.load.ready_in_ms or 0) / 1000

    def _unlearn(self, at: int, offer: Offer, now_s: float) -> None:
        c = self.columns
        for column in c:
            column[at] = 0
        measured = offer.speed.prefill_tokens_per_s > 0
        c.prefill_var[at] = learn.PREFILL_VAR_MEASURED if measured else learn.PREFILL_VAR_GUESSED
        c.decode_var[at] = learn.DECODE_VAR_MEASURED if measured else learn.DECODE_VAR_GUESSED
        c.seen_s[at] = c.others_s[at] = now_s

    def drop(self, node_id: NodeId) -> None:
        """The node doesn't offer the model any more."""
        at = self.row_of.pop(node_id, None)
        if at is not None:
            self._leave_row(at)
            self.bookings.pop(node_id, None)

    def _leave_row(self, at: int) -> None:
        """Nobody's row any more, until the shelf is put in order."""
        org = int(self.columns.org[at])
        self.orgs[org] -= 1
        if not self.orgs[org]:
            del self.orgs[org]
        self.columns.stop[at] = GONE
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
        for column in c:
            column[:count] = column[rows]
        self.nodes = [self.nodes[row] for row in rows]
        self.row_of = {node_id: row for row, node_id in enumerate(self.nodes)}
        self.ordered, self.gone = count, 0
        floors = np.minimum.accumulate(np.minimum(c.prompt_price[:count], c.cached_price[:count])[::-1])[::-1]
        self.cheapest_prompt = floors
        self.quick = np.sort(np.argsort(-c.decode[:count], kind="stable")[:QUICK_ROWS])

    # what happens to calls
    def book(self, booking_id: str, booking: Booking) -> None:
        self.bookings.setdefault(booking.node_id, {})[booking_id] = booking
        self._recount(booking.node_id, now_s=booking.began_s)

    def held(self, row: int) -> float:
        """Calls that the offer runs or keeps waiting, as far as is known."""
        c = self.columns
        return float(c.streams[row] + c.reading[row] + c.others[row])

    def first(self, booking: Booking, *, now_s: float) -> None:
        """The first token came."""
        row = self.row_of.get(booking.node_id)
        if row is None:
            return
        c = self.columns
        start = max(float(c.head_s[row]), booking.began_s)
        queued = c.head_s[row] > booking.began_s + 0.01
        if not booking.waits and not queued:
            took = now_s - start - float(c.rtt_s[row]) - float(c.load_s[row])
            reading = learn.Reading(booking.prompt, took, bool(c.streams[row] > 0))
            learn.learn_reading(c, row, reading, now_s=now_s)
        booking.first_s = now_s
        step = (1.0 + c.slope[row] * (min(c.slots[row], len(self.bookings[booking.node_id])) - 1.0)) / c.decode[row]
        booking.end_s = now_s + OVERRUN * booking.output * step * math.exp(-c.decode_log[row])
        self._recount(booking.node_id, now_s=now_s)

    def end(self, booking_id: str, booking: Booking, *, tokens: int | None, now_s: float) -> None:
        """The call is over on that node; `tokens` were written if it went well."""
        mine = self.bookings.get(booking.node_id, {})
        mine.pop(booking_id, None)
        row = self.row_of.get(booking.node_id)
        if row is None:
            return
        if tokens is not None and booking.first_s is not None and tokens > learn.STEPS_MIN:
            took = now_s - booking.first_s - float(self.columns.rtt_s[row]) / 2
            learn.learn_writing(self.columns, row, learn.Writing(took / (tokens - 1), booking.streams), now_s=now_s)
        self._recount(booking.node_id, now_s=now_s)

    def heard(self, node_id: NodeId, *, running: int, ours: int, now_s: float) -> None:
        """A heartbeat: the offer runs so many calls, of which `ours` were this gateway's when it was sent."""
        row = self.row_of.get(node_id)
        if row is None:
            return
        c = self.columns
        others = max(0, running - ours)
        rate = predict.SHARE * float(c.prefill[row]) * math.exp(float(c.prefill_log[row]))
        left = max(0.0, float(c.others_unread[row]) - (now_s - float(c.others_s[row])) * rate)
        came = max(0.0, others - float(c.others[row]))
        c.others_unread[row] = min(left + came * self.prompt_mean, others * self.prompt_mean)
        c.others[row], c.others_s[row] = others, now_s
        if running:
            self.share += 0.01 * (ours / running - self.share)

    def _recount(self, node_id: NodeId, now_s: float | None = None) -> None:
        """Write what this gateway has on a node into its columns."""
        row = self.row_of.get(node_id)
        if row is None:
            return
        c, mine = self.columns, self.bookings.get(node_id, {}).values()
        reading = [one for one in mine if one.first_s is None]
        was_reading = c.reading[row] > 0 and now_s is not None
        c.streams[row] = len(mine) - len(reading)
        c.reading[row] = len(reading)
        c.unread[row] = sum(one.prompt for one in reading)
        c.head[row] = reading[0].prompt if reading else 0.0
        latest = max((one.first_s for one in mine if one.first_s is not None), default=0.0)
        if not reading:
            c.head_s[row] = 0.0
        elif not was_reading or latest == now_s:
            c.head_s[row] = max(reading[0].began_s, latest if now_s is None else now_s)
        over = len(mine) - int(c.slots[row])
        c.slot_s[row] = sorted(one.end_s for one in mine)[over] if over >= 0 and over < len(mine) else 0.0

    # what follows from it, now and then
    def refresh(self, *, now_s: float) -> None:
        """Put the shelf in order, look for what is overdue, and see what the machines' time is worth."""
        self.order()
        count = len(self.nodes)
        if not count:
            return
        there = self.columns.stop[:count] != GONE
        if there.any():
            self.dear_prompt = float(self.columns.prompt_price[:count][there].max())
            self.dear_output = float(self.columns.output_price[:count][there].max())
        for node_id, mine in self.bookings.items():
            reading = [one for one in mine.values() if one.first_s is None]
            row, c = self.row_of.get(node_id), self.columns
            if row is not None and reading and not reading[0].waits:
                began = max(reading[0].began_s, float(c.head_s[row])) + OVERDUE_S + float(c.load_s[row])
                learn.learn_overdue(c, row, tokens=reading[0].prompt, waited_s=now_s - began, now_s=now_s)
        self._draw_rents(now_s)

    def _draw_rents(self, now_s: float) -> None:
        if len(self.wanted) < rent.CALLS_MIN:
            return
        rows = min(len(self.nodes), rent.ROWS_MAX)
        calls = max(rent.CALLS_MIN, min(len(self.wanted), rent.CELLS_MAX // rows))
        wanted: Floats = np.array(list(self.wanted)[-calls:])
        asked = list(self.asked_s)[-calls:]
        calls_per_s = len(asked) / max(1e-3, now_s - asked[0]) / max(0.05, self.share)
        c = self.columns.part(0, rows)
        c.rent[:] = rent.rents(c, wanted, calls_per_s=calls_per_s)

    def wants(self, wanted: rent.Wanted, *, now_s: float) -> None:
        """A call that this model is asked for."""
        self.wanted.append(wanted)
        self.asked_s.append(now_s)
        self.prompt_mean += 0.02 * (wanted.prompt - self.prompt_mean)
        self.output_mean += 0.02 * (wanted.output - self.output_mean)


def slope_of(offer: Offer) -> float:
    """How much longer a step takes with each further stream, from the node's benchmark with several; 1 if there was none."""
    speed = offer.speed
    found = [
        (streams * speed.decode_tokens_per_s / rate - 1.0) / (streams - 1)
        for streams, rate in speed.decode_by_streams
        if streams > 1 and rate > 0 and speed.decode_tokens_per_s > 0
    ]
    return min(1.0, max(0.0, found[-1])) if found else 1.0


def part_ends(count: int) -> list[int]:
    """Where the parts end in which so many rows are looked at."""
    ends = [end for end in PARTS if end < count]
    while (ends[-1] if ends else 0) < count:
        ends.append(min(count, 4 * ends[-1]) if len(ends) >= len(PARTS) else count)
    return ends

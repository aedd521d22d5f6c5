"""A model's offers, this gateway's calls on them, and who wanted them of late."""

import math
from collections import deque

import msgspec
import numpy as np

from fallow.core.match import learn, predict, rent
from fallow.core.match.columns import GONE, Floats
from fallow.core.match.rows import Row, Rows
from fallow.model.ids import NodeId

OVERRUN = 1.1
OVERDUE_S = 0.5
PROMPT_MEAN_TOKENS = 500.0
MISS_FACTOR = 2.0
"""A call that misses its needs is worth nothing and is bought again, at worst at so many times the dearest offer's price."""
IDLE_S = 10.0
"""How often rents are looked at for a model that nobody asks for."""
MEAN_RATE = 0.02
SHARE_RATE = 0.005
SHARE_MIN = 0.02
EACH_RATE = 0.1
EACH_MOST = 1.5
"""Another gateway's call has at most so many mean prompts unread."""


class Booking(msgspec.Struct, kw_only=True):
    """A call of this gateway on an offer, from the choice to the end."""

    node_id: NodeId
    model: str
    prompt: float
    output: float
    began_s: float
    streams: float
    waits: bool
    tells_first: bool
    first_in_s: float
    first_s: float | None = None
    end_s: float


class Shelf(Rows):
    """The offers of a model, with what happens on them."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.bookings: dict[NodeId, dict[str, Booking]] = {}
        self.wanted: deque[rent.Wanted] = deque(maxlen=rent.CALLS_MAX)
        self.asked_s: deque[float] = deque(maxlen=rent.CALLS_MAX)
        self.dear_prompt = self.dear_output = 0.0
        self.prompt_mean = PROMPT_MEAN_TOKENS
        self._ours = self._running = 0.01
        self.refreshed_s = self._drawn_s = 0.0
        self.has_rents = False

    def put(self, node_id: NodeId, row: Row, *, now_s: float) -> None:
        super().put(node_id, row, now_s=now_s)
        at, c = self.row_of[node_id], self.columns
        self.dear_prompt = max(self.dear_prompt, float(c.prompt_price[at]))  # what misses cost counts a newcomer at once
        self.dear_output = max(self.dear_output, float(c.output_price[at]))
        self._recount(node_id)

    def drop(self, node_id: NodeId) -> None:
        super().drop(node_id)
        self.bookings.pop(node_id, None)

    def book(self, booking_id: str, booking: Booking) -> None:
        self.bookings.setdefault(booking.node_id, {})[booking_id] = booking
        self._recount(booking.node_id, now_s=booking.began_s)

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
            self._learn_reading(row, booking.prompt, took, shared=bool(c.streams[row] + c.others[row] > 0))
        booking.first_s = now_s
        step = (1.0 + c.slope[row] * (min(c.slots[row], len(self.bookings.get(booking.node_id, ()))) - 1.0)) / c.decode[row]
        booking.end_s = now_s + OVERRUN * booking.output * step * math.exp(-c.decode_log[row])
        self._recount(booking.node_id, now_s=now_s)

    def end(self, booking_id: str, booking: Booking, *, tokens: int | None, now_s: float) -> None:
        """The call is over on that node; `tokens` were written if it went well."""
        mine = self.bookings.get(booking.node_id, {})
        mine.pop(booking_id, None)
        row = self.row_of.get(booking.node_id)
        if row is None:
            return
        if tokens is not None and not booking.tells_first:
            self._learn_whole(row, booking, tokens, now_s)
        elif tokens is not None and booking.first_s is not None and tokens > learn.STEPS_MIN:
            took = now_s - booking.first_s - float(self.columns.rtt_s[row]) / 2
            learn.learn_writing(self.columns, row, learn.Writing(took / (tokens - 1), booking.streams))
        self._recount(booking.node_id, now_s=now_s)

    def _learn_whole(self, row: int, booking: Booking, tokens: int, now_s: float) -> None:
        """An answer that came in one piece: its writing took what its prompt can't have taken."""
        took = now_s - booking.began_s - float(self.columns.rtt_s[row])
        if tokens > learn.STEPS_MIN and took > booking.first_in_s:
            step = (took - booking.first_in_s) / (tokens - 1)
            learn.learn_writing(self.columns, row, learn.Writing(step, booking.streams))
        elif not booking.waits:
            self._learn_reading(row, booking.prompt, took - float(self.columns.load_s[row]), shared=bool(self.columns.streams[row] > 0))

    def _learn_reading(self, row: int, tokens: float, took_s: float, *, shared: bool) -> None:
        """What took longer than this prompt alone is other gateways' prompts, as far as they can explain it."""
        c = self.columns
        others = float(c.others[row])
        if others:
            extra = max(0.0, took_s * float(c.rate[row]) - tokens) / others
            each = min(extra, EACH_MOST * self.prompt_mean)
            c.unread_each[row] += EACH_RATE * (each - c.unread_each[row])
            tokens += others * each
        learn.learn_reading(c, row, learn.Reading(tokens, took_s, shared))

    def heard(self, node_id: NodeId, *, running: int, ours: int, now_s: float) -> None:
        """A heartbeat: the offer runs so many calls, of which `ours` were this gateway's when it was sent."""
        row = self.row_of.get(node_id)
        if row is None:
            return
        c = self.columns
        self._ours += SHARE_RATE * (ours - self._ours)
        self._running += SHARE_RATE * (running - self._running)
        others = max(0, running - ours)
        if others == c.others[row]:
            return
        c.others[row] = others
        predict.derive(c, row)

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
        predict.derive(c, row)

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
            for one in mine.values():
                if not one.tells_first and one.first_s is None and now_s > one.began_s + one.first_in_s:
                    one.first_s = now_s  # nobody tells when its prompt was read
                    self._recount(node_id, now_s=now_s)
            reading = [one for one in mine.values() if one.first_s is None]
            row, c = self.row_of.get(node_id), self.columns
            if row is not None and reading and not reading[0].waits:
                began = max(reading[0].began_s, float(c.head_s[row])) + OVERDUE_S + float(c.load_s[row])
                others = float(c.others[row]) * EACH_MOST * self.prompt_mean
                learn.learn_overdue(c, row, tokens=reading[0].prompt + others, waited_s=now_s - began)
                predict.derive(c, row)
        learn.forget(self.columns.part(0, count), passed_s=max(0.0, now_s - self.refreshed_s))
        self.refreshed_s = now_s
        self._draw_rents(now_s)

    def _draw_rents(self, now_s: float) -> None:
        is_asked = bool(self.asked_s) and self.asked_s[-1] >= self._drawn_s
        if len(self.wanted) < rent.CALLS_MIN or (not is_asked and now_s - self._drawn_s < IDLE_S):
            return
        self._drawn_s = now_s
        rows = min(len(self.nodes), rent.ROWS_MAX)
        calls = max(rent.CALLS_MIN, min(len(self.wanted), rent.CELLS_MAX // rows))
        wanted: Floats = np.array(list(self.wanted)[-calls:])
        asked = list(self.asked_s)[-calls:]
        calls_per_s = len(asked) / max(1e-3, now_s - asked[0]) / self.share()
        c = self.columns.part(0, rows)
        c.rent[:] = rent.rents(c, wanted, calls_per_s=calls_per_s)
        self.has_rents = bool(self.columns.rent.any())

    def share(self) -> float:
        """The part of what the offers run that is this gateway's."""
        return min(1.0, max(SHARE_MIN, self._ours / self._running))

    def miss(self, prompt: float, output: float) -> float:
        """What missing a call's needs costs, in micro-credits."""
        return MISS_FACTOR * (self.dear_prompt * prompt + self.dear_output * output)

    def wants(self, wanted: rent.Wanted, *, now_s: float) -> None:
        """A call that this model is asked for."""
        self.wanted.append(wanted)
        self.asked_s.append(now_s)
        self.prompt_mean += MEAN_RATE * (wanted.prompt - self.prompt_mean)

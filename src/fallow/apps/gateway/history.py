"""What happened to calls: told as it happens, packed small when a call is over, forgotten after an hour."""

from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter_ns

import msgspec

from fallow.core.cost import PICO_PER_MICRO, cost_of
from fallow.core.match.decide import FLEX_RETRY_MS_MAX
from fallow.core.needs import MICRO
from fallow.model.errors import shortened
from fallow.model.ids import CallId, NodeId, OrgId
from fallow.model.needs import HardwareKind, Ring
from fallow.model.offer import Price
from fallow.model.quote import Place, Quote
from fallow.model.receipt import Usage
from fallow.model.views import AttemptView, CallState, CallView, QuoteView, Timing, Waiting, WaitingCall, WaitingList
from fallow.ports import Clock

ENDED_MAX = 8_192
"""Calls that are over and not yet forgotten; about 750 bytes each."""
KEPT_MS = 60 * 60_000
MODEL_CHARS_MAX = 64
"""A model's name is the caller's text until somebody offers it."""
CHANCE_PARTS = 10_000
LISTED_MAX = 256
"""Calls in one list of those that wait."""
COST_DIGITS = 9
"""Decimals of a cost in credits: a token of a small model costs some 1e-7."""


class Small(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A quote in few bytes. An empty model is that of the quote which was taken; `chance` counts ten-thousandths."""

    node_id: NodeId
    model: str
    hardware: HardwareKind
    ring: Ring
    region: str
    cost_max_micro: int
    cost_expected_micro: int
    first_token_in_ms: int
    per_token_us: int
    end_in_ms: int
    chance: int


class Try(msgspec.Struct, array_like=True, gc=False):
    """One node that was tried, and why it was chosen; `us` is None until it is over."""

    hardware: str
    began_us: int
    why: str
    quote: Small
    others: tuple[Small, ...] = ()
    code: str | None = None
    us: int | None = None


class Story(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """A call from its arrival on. It becomes bytes when the call is over, so nothing in it may refer back to it.

    `price` is what the offer asked that was chosen last, or whose answer was heard, until the cost is known, and `cost_max_micro` the most
    that it could come to; `again_us` is when a call that waits for a better
    moment is looked at again, at the latest.
    """

    org_id: OrgId
    path: str
    model: str | None = None
    streams: bool = False
    arrived_at_ms: int
    began_ns: int
    state: CallState = "running"
    http_status: int | None = None
    code: str | None = None
    first_byte_us: int | None = None
    total_us: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    price: Price | None = None
    cost_max_micro: int = 0
    cost: float | None = None
    wait_why: str | None = None
    wait_began_us: int | None = None
    again_us: int = 0
    waited_us: int = 0
    ended_at_ms: int = 0
    tries: list[Try] = []

    def names(self, model: str, *, streams: bool = False) -> None:
        """What the call asks for, and whether its answer comes piece by piece."""
        self.model = shortened(model, MODEL_CHARS_MAX)
        self.streams = streams

    def waits(self, why: str, for_ms: int = FLEX_RETRY_MS_MAX) -> None:
        """The call waits for its turn, or for a better moment and is looked at again after that time."""
        self.wait_why = why
        self.again_us = self._us() + 1000 * for_ms
        if self.wait_began_us is None:
            self.wait_began_us = self._us()

    def trying(self, node_id: NodeId, hardware: str, place: Place, price: Price) -> None:
        """The call is sent there, at that price."""
        assert node_id == place.node_id, "a call goes where it was placed"
        self.waited_us, self.wait_began_us = self._waited_us(), None
        self.price, self.cost_max_micro = price, place.quote.cost_max_micro
        others = tuple(_small(one, place.quote.model) for one in place.others)
        self.tries.append(Try(hardware, self._us(), place.why, _small(place.quote, ""), others))

    def tried(self, code: str | None) -> None:
        """That attempt is over; `code` says why it came to nothing."""
        last = self.tries[-1]
        last.code = code
        last.us = self._us() - last.began_us

    def answered(self, place: Place, price: Price) -> None:
        """The whole answer came from there: of two nodes that were asked at once it need not be the last one."""
        self.price, self.cost_max_micro = price, place.quote.cost_max_micro

    def first_byte(self) -> None:
        """The answer begins."""
        self.first_byte_us = self._us()

    def ends(self, *, http_status: int, left: bool, usage: Usage | None, now_ms: int) -> None:
        """The call is over."""
        self.state = "caller_left" if left else "failed" if self.code is not None else "done"
        self.http_status = http_status or None
        self.waited_us, self.wait_began_us, self.again_us = self._waited_us(), None, 0
        self.total_us = self._us()
        self.ended_at_ms = now_ms
        if usage is not None:
            self.prompt_tokens, self.cached_tokens, self.output_tokens = usage.prompt_tokens, usage.cached_tokens, usage.output_tokens
            pico = self.cost_pico(usage)
            self.cost = None if pico is None else round(pico / PICO_PER_MICRO / MICRO, COST_DIGITS)
        self.price = None

    def cost_pico(self, usage: Usage | None) -> int | None:
        """What the call costs, in millionths of a micro-credit; None if nobody counted, or if it is over."""
        if usage is None or self.price is None:
            return None
        return cost_of(usage, self.price, cost_max_micro=self.cost_max_micro)

    def waited_ms(self) -> float | None:
        """How long the call waited for a better moment; None if it didn't."""
        return None if self.wait_why is None else self._waited_us() / 1000

    def again_s(self) -> float:
        """How long it takes at most until a call that waits for a better moment is looked at again."""
        return round(max(0, self.again_us - self._us()) / 1e6, 1)

    def _waited_us(self) -> int:
        return self.waited_us + (0 if self.wait_began_us is None else self._us() - self.wait_began_us)

    def _us(self) -> int:
        return (perf_counter_ns() - self.began_ns) // 1000


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Story).decode


class History:
    """The stories of this gateway's calls. `turn_of` tells what a call can know that waits for its turn."""

    def __init__(self, clock: Clock, turn_of: Callable[[str], Waiting | None] = lambda _: None) -> None:
        self._clock = clock
        self.turn_of = turn_of
        self._running: dict[str, Story] = {}
        self._ended: dict[str, bytes] = {}
        self._order: deque[str] = deque()

    def begin(self, call_id: CallId, org_id: OrgId, path: str, *, began_ns: int) -> Story:
        """A call of an organisation has come; the story is the caller's to tell."""
        story = Story(org_id=org_id, path=path, arrived_at_ms=self._clock.wall_ms(), began_ns=began_ns)
        self._running[call_id] = story
        return story

    def retract(self, call_id: CallId) -> None:
        """It was a repeat of another call, whose story is told already."""
        self._running.pop(call_id, None)

    def end(self, call_id: CallId, *, http_status: int, left: bool, usage: Usage | None) -> None:
        """The call is over."""
        story = self._running.pop(call_id)
        story.ends(http_status=http_status, left=left, usage=usage, now_ms=self._clock.now_ms())
        self._ended[call_id] = _encode(story)
        self._order.append(call_id)
        if len(self._order) > ENDED_MAX:
            del self._ended[self._order.popleft()]

    def forget_old(self) -> None:
        """Drop what has been over for an hour."""
        now = self._clock.now_ms()
        while self._order and now - _decode(self._ended[self._order[0]]).ended_at_ms > KEPT_MS:
            del self._ended[self._order.popleft()]

    def view(self, call_id: str, org_id: OrgId) -> CallView | None:
        """The call as its own organisation may see it; None for any other, and if nothing is known."""
        story = self._running.get(call_id)
        if story is None:
            packed = self._ended.get(call_id)
            story = None if packed is None else _decode(packed)
        if story is None or story.org_id != org_id:
            return None
        if story.state != "running" and self._clock.now_ms() - story.ended_at_ms > KEPT_MS:
            return None
        return _view(CallId(call_id), story, self._waiting(call_id, story) if story.state == "running" else None)

    def waiting(self, org_id: OrgId) -> WaitingList:
        """The organisation's calls that wait."""
        places = self._places()
        found: list[WaitingCall] = []
        total = 0
        for call_id, story in self._running.items():
            waiting = (self.turn_of(call_id) or _moment(story, places.get(call_id))) if story.org_id == org_id else None
            total += waiting is not None
            if waiting is not None and len(found) < LISTED_MAX:
                said = msgspec.structs.asdict(waiting)
                found.append(
                    WaitingCall(**said, id=CallId(call_id), model=story.model, path=story.path, waited_ms=story.waited_ms() or 0.0)
                )
        return WaitingList(data=found, total=total)

    def _waiting(self, call_id: str, story: Story) -> Waiting | None:
        turn = self.turn_of(call_id)
        return turn if turn is not None or story.wait_began_us is None else _moment(story, self._places().get(call_id))

    def _places(self) -> dict[str, int]:
        """The calls that wait for a better moment, each with its place among those for the same model, as they came."""
        counts: Counter[str | None] = Counter()
        places: dict[str, int] = {}
        for call_id, story in self._running.items():
            if story.wait_began_us is not None and self.turn_of(call_id) is None:
                counts[story.model] += 1
                places[call_id] = counts[story.model]
        return places


def _moment(story: Story, place: int | None) -> Waiting | None:
    """What a call that waits for a better moment can know."""
    return None if place is None else Waiting(position=place, estimate_s=story.again_s(), why=story.wait_why or "")


def _view(call_id: CallId, story: Story, waiting: Waiting | None) -> CallView:
    predicted, actual = _timing(story)
    return CallView(
        id=call_id,
        path=story.path,
        model=story.model,
        status=story.state,
        http_status=story.http_status,
        code=story.code,
        arrived_at=datetime.fromtimestamp(story.arrived_at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        first_byte_ms=_ms(story.first_byte_us),
        total_ms=_ms(story.total_us),
        prompt_tokens=story.prompt_tokens,
        cached_tokens=story.cached_tokens,
        output_tokens=story.output_tokens,
        cost=story.cost,
        predicted=predicted,
        actual=actual,
        waited_ms=story.waited_ms(),
        wait_why=story.wait_why,
        waiting=waiting,
        attempts=[_attempt(one) for one in story.tries],
    )


def _attempt(one: Try) -> AttemptView:
    return AttemptView(
        node=one.quote.node_id,
        hardware=one.hardware,
        ring=one.quote.ring,
        region=one.quote.region,
        code=one.code,
        ms=_ms(one.us),
        why=one.why,
        quote=_large(one.quote, ""),
        others=[_large(other, one.quote.model) for other in one.others],
    )


def _timing(story: Story) -> tuple[Timing | None, Timing | None]:
    """What was predicted of the last attempt, and what became of it. Only a stream tells when its first token came."""
    if not story.tries:
        return None, None
    last = story.tries[-1]
    first_us = story.first_byte_us - last.began_us if story.streams and story.first_byte_us is not None else None
    predicted = Timing(first_token_ms=float(last.quote.first_token_in_ms), end_ms=float(last.quote.end_in_ms))
    return predicted, Timing(first_token_ms=_ms(first_us), end_ms=_ms(last.us))


def quote_view(quote: Quote, gpu: str | None = None) -> QuoteView:
    """A quote as people see it; `gpu` names the node's card."""
    return QuoteView(
        node=quote.node_id,
        model=quote.model,
        hardware=quote.hardware,
        gpu=gpu or msgspec.UNSET,
        ring=quote.ring,
        region=quote.region,
        cost_max=quote.cost_max_micro / MICRO,
        cost_expected=quote.cost_expected_micro / MICRO,
        first_token_ms=quote.first_token_in_ms,
        per_token_ms=quote.per_token_ms,
        end_ms=quote.end_in_ms,
        chance=quote.chance,
    )


def _small(quote: Quote, taken: str) -> Small:
    return Small(
        quote.node_id,
        "" if quote.model == taken else quote.model,
        quote.hardware,
        quote.ring,
        quote.region,
        quote.cost_max_micro,
        quote.cost_expected_micro,
        quote.first_token_in_ms,
        round(1000 * quote.per_token_ms),
        quote.end_in_ms,
        round(CHANCE_PARTS * quote.chance),
    )


def _large(small: Small, taken: str) -> QuoteView:
    quote = Quote(
        node_id=small.node_id,
        model=small.model or taken,
        hardware=small.hardware,
        ring=small.ring,
        region=small.region,
        cost_max_micro=small.cost_max_micro,
        cost_expected_micro=small.cost_expected_micro,
        first_token_in_ms=small.first_token_in_ms,
        per_token_ms=small.per_token_us / 1000,
        end_in_ms=small.end_in_ms,
        chance=small.chance / CHANCE_PARTS,
    )
    return quote_view(quote)


def _ms(us: int | None) -> float | None:
    return None if us is None else us / 1000

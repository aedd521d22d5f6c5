"""All that a gateway knows of offers: a shelf for each model, what it learnt of answers, and what its calls are doing."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from fallow.core.match.filter import CODE, Kinds, kind_of
from fallow.core.match.keys import Prompts, Warmth
from fallow.core.match.lengths import Lengths
from fallow.core.match.rent import Wanted
from fallow.core.match.rows import Mark, Row
from fallow.core.match.shelf import Booking, Shelf
from fallow.core.standing import Event, Probed, Standings, access, is_troubled, trust
from fallow.model.call import Call
from fallow.model.card import Card
from fallow.model.ids import NodeId, OrgId
from fallow.model.offer import Load, Offer
from fallow.model.owner import WORKING, State
from fallow.model.quote import Quote
from fallow.model.receipt import Usage

REFRESH_S = 0.95
REFRESH_PARTS = 5
"""No more than this part of the shelves is looked at in one go, so that no call waits long for it."""


class Families:
    """Which models are offered of each family, from what each offer says of itself."""

    def __init__(self) -> None:
        self._models: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def change(self, old: Offer | None, new: Offer | None) -> None:
        """An offer takes another's place; None where there is none."""
        for offer, by in ((new, 1), (old, -1)):
            if offer is not None and offer.family:
                models = self._models[offer.family]
                models[offer.model] += by
                if not models[offer.model]:
                    del models[offer.model]
                if not models:
                    del self._models[offer.family]

    def models(self, family: str) -> list[str]:
        return sorted(self._models[family]) if family in self._models else []


class Market:
    """The offers that are there. Nothing here looks at a clock: every event says when it happened, in seconds."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        self.prompts = Prompts()
        self.warmth = Warmth()
        self._shelves: dict[str, Shelf] = {}
        self._families = Families()
        self._offered: dict[NodeId, dict[str, Offer]] = {}
        self.kinds = Kinds()
        self.orgs: dict[OrgId, int] = {}
        """The numbers of organisations, which are compared faster than names."""
        self._bookings: dict[str, Booking] = {}
        self.standings = Standings()

    # offers
    def put(self, card: Card, offer: Offer, load: Load, state: State, *, expires_s: float, now_s: float, rtt_s: float = 0.0) -> None:
        """What a node said of one of its offers, the first time and each time after."""
        node_id = card.node_id
        mine = self._offered.setdefault(node_id, {})
        kind = self.kinds.number(kind_of(card, offer))
        if kind is None:
            return
        self._families.change(mine.get(offer.model), offer)
        mine[offer.model] = offer
        shelf = self._shelves.get(offer.model)
        if shelf is None:
            shelf = self._shelves[offer.model] = Shelf(offer.model)
        stop = CODE["owner_is_back"] if state not in WORKING else CODE["engine_failed"] if load.readiness == "failed" else 0
        row = Row(
            offer=offer,
            load=load,
            kind=kind,
            org=self.org(card.org_id),
            stop=stop,
            is_gpu=card.hardware.kind == "gpu",
            expires_s=expires_s,
            rtt_s=rtt_s,
        )
        shelf.put(node_id, row, now_s=now_s)
        if node_id in self.standings:
            self._mark(node_id, now_s)

    def drop(self, node_id: NodeId, keep: Mapping[str, object] = {}) -> None:
        """The node is gone, or has no offers any more but those to keep."""
        mine = self._offered.get(node_id, {})
        for model in [model for model in mine if model not in keep]:
            self._families.change(mine.pop(model), None)
            shelf = self._shelves[model]
            shelf.drop(node_id)
            if not len(shelf) and not shelf.bookings:
                del self._shelves[model]
        if not mine:
            self._offered.pop(node_id, None)

    def heard(self, node_id: NodeId, model: str, *, running: int, now_s: float) -> None:
        """A heartbeat told how many calls an offer runs."""
        shelf = self._shelves.get(model)
        if shelf is not None:
            shelf.heard(node_id, running=running, ours=len(shelf.bookings.get(node_id, ())), now_s=now_s)

    def offer(self, node_id: NodeId, model: str) -> Offer | None:
        return self._offered.get(node_id, {}).get(model)

    def models(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, shelf in self._shelves.items() if len(shelf)))

    def shelves(self, model: str) -> list[Shelf]:
        """The shelf of a model, or those of a family; what is offered as a model is no family."""
        shelf = self._shelves.get(model)
        if shelf is not None and len(shelf):
            return [shelf]
        return [self._shelves[name] for name in self._families.models(model)]

    def org(self, org_id: OrgId) -> int:
        """An organisation's number, a new one if it has none."""
        number = self.orgs.get(org_id)
        if number is None:
            number = self.orgs[org_id] = len(self.orgs)
        return number

    # calls
    def asked(self, call: Call, wanted: Wanted, *, now_s: float) -> None:
        """A call came; the demand counts it once, however often it is tried."""
        for shelf in self.shelves(call.needs.model)[:1]:
            shelf.wants(wanted, now_s=now_s)

    def began(self, booking_id: str, call: Call, quote: Quote, *, now_s: float) -> None:
        """The call was sent to the node that was chosen."""
        shelf = self._shelves.get(quote.model)
        row = None if shelf is None else shelf.row_of.get(quote.node_id)
        if shelf is None or row is None:
            return
        prompt = self.prompts.tokens(call)
        length = self.lengths.expected(call.key_id, quote.model, limit=call.needs.output_tokens_max)
        held = shelf.held(row)
        booking = Booking(
            node_id=quote.node_id,
            model=quote.model,
            prompt=prompt - self.warmth.of(call, shelf, prompt).get(row, 0.0),
            output=length.mean_tokens,
            began_s=now_s,
            streams=min(float(shelf.columns.slots[row]), held + 1.0),
            waits=held >= shelf.columns.slots[row],
            tells_first=call.stream,
            first_in_s=quote.first_token_in_ms / 1000,
            end_s=now_s + quote.end_in_ms / 1000,
        )
        self._bookings[booking_id] = booking
        shelf.book(booking_id, booking)
        if is_troubled(self.standings.of(quote.node_id, now_s), now_s):
            self.told(quote.node_id, Probed(), now_s=now_s)
        self.warmth.put(call, quote.model, quote.node_id)

    def first(self, booking_id: str, *, now_s: float) -> None:
        """The first token came."""
        booking = self._bookings.get(booking_id)
        shelf = None if booking is None else self._shelves.get(booking.model)
        if booking is not None and shelf is not None and booking.first_s is None:
            shelf.first(booking, now_s=now_s)

    def ended(self, booking_id: str, call: Call, usage: Usage | None, *, now_s: float) -> tuple[float, float | None]:
        """The call is over on the node; `usage` is None if it came to nothing there.

        Returns the seconds that were promised and those that it took: to the first token, to the end where nothing told of that one;
        None if it didn't come to that.
        """
        booking = self._bookings.pop(booking_id, None)
        if booking is None:
            return 0.0, None
        tokens = None if usage is None else usage.output_tokens
        shelf = self._shelves.get(booking.model)
        if shelf is not None:
            shelf.end(booking_id, booking, tokens=tokens, now_s=now_s)
        if usage is not None:
            self.prompts.learn(call, usage.prompt_tokens)
            if usage.output_tokens:
                self.lengths.learn(call.key_id, booking.model, limit=call.needs.output_tokens_max, tokens=usage.output_tokens)
        if not booking.tells_first:
            return booking.end_s - booking.began_s, now_s - booking.began_s
        return booking.first_in_s, None if booking.first_s is None else booking.first_s - booking.began_s

    # nodes
    def told(self, node_id: NodeId, event: Event, *, now_s: float) -> None:
        """How an attempt on a node ended, or whether it is heard."""
        for changed in self.standings.told(node_id, event, now_s):
            self._mark(changed, now_s)

    def _mark(self, node_id: NodeId, now_s: float) -> None:
        standing = self.standings.of(node_id, now_s)
        who = access(standing, now_s)
        doubt = CODE["backing_off"] if who == "closed" else 0
        mark = Mark(doubt, standing.backs_off_until_s, trust(standing), who == "probe")
        for model in self._offered.get(node_id, ()):
            self._shelves[model].mark(node_id, mark)

    def refresh(self, *, now_s: float) -> None:
        """Several times a second: keep the shelves in order, see what is overdue and what is scarce, each shelf about once a second."""
        for node_id in self.standings.due(now_s):
            self._mark(node_id, now_s)
        due = [shelf for shelf in self._shelves.values() if now_s - shelf.refreshed_s >= REFRESH_S]
        due.sort(key=lambda shelf: shelf.refreshed_s)
        for shelf in due[: max(1, len(self._shelves) // REFRESH_PARTS)]:
            shelf.refresh(now_s=now_s)

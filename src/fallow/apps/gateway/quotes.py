"""What a call would cost, and when it would be answered, for `/v1/quotes`: matching is asked, and nothing is run."""

import msgspec

from fallow.apps.gateway.errors import refused
from fallow.apps.gateway.history import quote_view
from fallow.apps.gateway.roster import Roster
from fallow.core.match import decide
from fallow.model.call import Call
from fallow.model.errors import Failure
from fallow.model.quote import Quote
from fallow.model.views import QuoteList, QuoteView, StoppedView

_NOBODY = frozenset({"model_not_offered", "no_nodes"})
"""With these there is nothing to tell but the error that the call itself would get."""
_json = msgspec.json.Encoder()


class Quotes:
    """The offers of the roster, applied to calls that nobody makes."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def offered(self, model: str) -> frozenset[str]:
        """The paths that offers of a model, or of a family, have."""
        return frozenset(path for offer in self._roster.offers() if model in (offer.model, offer.family) for path in offer.paths)

    def answer(self, call: Call) -> bytes | Failure:
        """The document for a call, or why there is none."""
        market, now = self._roster.market, self._roster.moment()
        questions = decide.ask(call, market, now=now)
        quotes, refusal = decide.quotes(call, market, now=now)
        if refusal is not None and (not questions or refusal.limit in _NOBODY):
            return refused(refusal, call.needs.model)
        assert questions, "without an offer there is a refusal"
        found = QuoteList(
            model=call.needs.model,
            path=call.path,
            prompt_tokens=round(questions[0].prompt),
            output_tokens=round(questions[0].length.mean_tokens) if any(quote.per_token_ms for quote in quotes) else 0,
            quotes=[self._view(quote) for quote in quotes],
            refused=[] if refusal is None else [StoppedView(**msgspec.structs.asdict(one)) for one in refusal.stopped],
        )
        return _json.encode(found)

    def _view(self, quote: Quote) -> QuoteView:
        card = self._roster.card(quote.node_id)
        return quote_view(quote, gpu=None if card is None else card.hardware.gpu)

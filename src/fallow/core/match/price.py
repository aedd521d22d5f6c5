"""What a call costs at most on an offer."""

from fallow.core.match.candidate import Candidate
from fallow.core.match.predict import predict
from fallow.model.needs import Needs
from fallow.model.quote import Quote

MUNIT = 1_000_000


def quote(needs: Needs, candidate: Candidate) -> Quote:
    """The offer applied to the needs. The cost is rounded up: it is a ceiling."""
    times = predict(needs, candidate)
    price = candidate.offer.price
    output = needs.output_tokens_max if needs.output_tokens_max is not None else candidate.offer.context_tokens
    total = needs.prompt_tokens * price.prompt_micro_per_munit + output * price.output_micro_per_munit
    return Quote(
        node_id=candidate.offer.node_id,
        model=candidate.offer.model,
        hardware=candidate.card.hardware.kind,
        ring="market",
        region=candidate.card.region,
        cost_max_micro=-(-total // MUNIT),
        cost_expected_micro=-(-total // MUNIT),
        first_token_in_ms=times.first_token_in_ms,
        per_token_ms=0.0,
        end_in_ms=times.end_in_ms,
        chance=times.certainty,
    )

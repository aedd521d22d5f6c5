"""An offer with all that matching looks at."""

import msgspec

from fallow.model.card import Card
from fallow.model.offer import Load, Offer
from fallow.model.owner import State


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One offer as a gateway sees it.

    `elsewhere` counts what the node runs for others, `in_flight` what this gateway has there now.
    """

    offer: Offer
    card: Card
    load: Load
    state: State = "run"
    elsewhere: int = 0
    in_flight: int = 0

    @property
    def running(self) -> int:
        return self.elsewhere + self.in_flight

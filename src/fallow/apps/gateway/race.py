"""Two attempts of one call: whose answer begins first is heard, and the other is told to stop."""

from fallow.apps.gateway.conversation import Conversation
from fallow.core import relay


class Race:
    """The attempts of a call that run at once."""

    def __init__(self) -> None:
        self._runners: list[Conversation] = []
        self.winner: Conversation | None = None

    def enter(self, conversation: Conversation) -> None:
        """One more runs."""
        self._runners.append(conversation)

    def wins(self, conversation: Conversation) -> bool:
        """Whether this one's answer is the one that is heard. The first to ask is; the others end at once."""
        if self.winner is None:
            self.winner = conversation
            for other in self._runners:
                if other is not conversation:
                    other.hear(relay.CallerLeft())
        return self.winner is conversation

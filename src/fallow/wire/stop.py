"""Ends a text at the first of its stop sequences, and says which one it was."""

from collections.abc import Sequence

from fallow.wire.generation import Ended, Event, Text


class StopCutter:
    """Edits the events of one choice; what may be the beginning of a stop sequence is held back until it is clear."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_met = False

    def feed(self, events: Sequence[Event]) -> list[Event]:
        """The events that can go on; nothing follows once a stop sequence was met."""
        out: list[Event] = []
        for event in events:
            if self.has_met:
                break
            if isinstance(event, Text):
                out += self._text(event)
            else:
                if isinstance(event, Ended) and self._held:
                    out.append(Text(event.choice, self._held))
                    self._held = ""
                out.append(event)
        return out

    def _text(self, event: Text) -> list[Event]:
        text = self._held + event.text
        found = ((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0)
        met = min(found, default=None)  # the one that is whole first: which that is can't depend on how the text is cut
        if met is not None:
            self.has_met = True
            _, at, stop = met
            before = [Text(event.choice, text[:at], event.tokens)] if at else []
            return [*before, Ended(event.choice, "stop", stop)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        out = text[: len(text) - keep] if keep else text
        return [Text(event.choice, out, event.tokens)] if out or event.tokens else []

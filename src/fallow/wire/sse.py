"""Server-sent events: bytes as they come, cut into whole events."""

from fallow.model.errors import WireError

EVENT_BYTES_MAX = 4 * 1024 * 1024
DONE = b"data: [DONE]\n\n"
_END = b"\n\n"
_FIELD = b"data:"
_LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


class EventCutter:
    """Cuts a stream into events; each comes with its closing blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes; raises WireError if one grows beyond its limit."""
        buffer = self._rest + chunk if self._rest else chunk
        if b"\r" in buffer:  # some servers end their lines so; a lone one at the end waits for its companion
            whole = buffer[:-1] if buffer.endswith(b"\r") else buffer
            buffer = whole.replace(b"\r\n", b"\n") + buffer[len(whole) :]
        events: list[bytes] = []
        start = 0
        while (end := buffer.find(_END, start)) >= 0:
            events.append(buffer[start : end + 2])
            start = end + 2
        self._rest = buffer[start:]
        if max(map(len, [*events, self._rest])) > EVENT_BYTES_MAX:
            raise WireError(f"an event of the engine is over {EVENT_BYTES_MAX} bytes")
        return events


def payload(event: bytes) -> bytes:
    """The JSON of a `data:` event; empty for a comment or anything else."""
    return event[len(_FIELD) : -2].strip() if event.startswith(_FIELD) else b""


def event(data: bytes) -> bytes:
    """An event around one line of JSON. Some clients end lines at other characters too, so these are escaped."""
    for raw, escaped in _LINE_ENDS:
        if raw in data:
            data = data.replace(raw, escaped)
    return b"data: " + data + _END

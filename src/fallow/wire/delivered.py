"""What of a streamed answer a caller has already: the pieces of its text, read back from the bytes that went out.

Only an answer that broke off is ever read back; while it flows, its bytes are kept as they came.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from fallow.model.errors import WireError
from fallow.model.messages import PIECES_MAX
from fallow.wire import openai, sse

TEXT_BYTES_MAX = 64 * 1024
"""A longer answer isn't continued: it must fit beside the request's body into one message."""
_OPENING = frozenset(
    {
        "message_start",
        "ping",
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    }
)
"""Events before a text that say nothing of it."""
_fields = msgspec.json.Decoder(dict[str, Any])


class _Other(Exception):
    """Something other than plain text was delivered, or the text has ended."""


def pieces(path: str, chunks: Iterable[bytes]) -> tuple[str, ...] | None:
    """The pieces in their order; None if the answer is none that can be continued.

    That can only be one choice of plain text, not yet ended, in whole events.
    """
    read = _READERS.get(path)
    data = b"".join(chunks)
    if read is None or (data and not data.endswith(b"\n\n")):
        return None
    found: list[str] = []
    try:
        for event in sse.EventCutter().feed(data) if data else []:
            payload = sse.payload(event[event.find(b"data:") :] if event.startswith(b"event:") else event)
            if payload and (text := read(_fields.decode(payload))):
                found.append(text)
    except (_Other, WireError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    if len(found) > PIECES_MAX or len("".join(found).encode()) > TEXT_BYTES_MAX:
        return None
    return tuple(found)


def _chat(fields: dict[str, Any]) -> str:
    delta, ended = _only_choice(fields, "delta")
    if ended or set(delta) - {"role", "content"}:
        raise _Other
    return _text(delta.get("content") or "")


def _completion(fields: dict[str, Any]) -> str:
    text, ended = _only_choice(fields, "text")
    if ended:
        raise _Other
    return _text(text)


def _only_choice(fields: dict[str, Any], name: str) -> tuple[Any, bool]:
    (choice,) = fields["choices"] or [{}]
    if choice.get("index") != 0:
        raise _Other
    return choice[name], choice.get("finish_reason") is not None


def _response(fields: dict[str, Any]) -> str:
    kind = fields["type"]
    if kind == "response.output_text.delta":
        return _text(fields["delta"])
    if kind not in _OPENING or fields.get("item", {}).get("type", "message") != "message":
        raise _Other
    return ""


def _message(fields: dict[str, Any]) -> str:
    kind = fields["type"]
    if kind == "content_block_delta":
        if fields["delta"]["type"] != "text_delta":
            raise _Other
        return _text(fields["delta"]["text"])
    if kind == "content_block_start" and fields["index"] == 0 and fields["content_block"]["type"] == "text":
        return ""
    if kind not in _OPENING:
        raise _Other
    return ""


def _text(found: object) -> str:
    if not isinstance(found, str):
        raise _Other
    return found


_READERS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    openai.CHAT: _chat,
    openai.COMPLETIONS: _completion,
    openai.RESPONSES: _response,
    openai.MESSAGES: _message,
}
CONTINUED = frozenset(_READERS)
"""The paths whose answers can be continued."""

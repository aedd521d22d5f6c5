"""What it means that a request comes again under the same `Idempotency-Key`, and which answers are kept for that."""

import hashlib
from collections.abc import Sequence

import msgspec

from fallow.model.errors import Failure

HEADER = "Idempotency-Key"
KEY_CHARS_MAX = 255
"""Of the key itself, without quotes around it."""
RECORDINGS_MAX = 4_096
"""Calls with a key that one gateway remembers; beyond it the one that ended first is forgotten."""
RECORDING_BYTES_MAX = 4 * 1024 * 1024
"""One answer's body. A longer one isn't kept, but it is remembered that it was given."""
RECORDINGS_BYTES_MAX = 256 * 1024 * 1024
"""All bodies that are kept; beyond it those that ended first are dropped, and it is remembered that they were there."""
KEPT_MS = 60 * 60_000
"""How long a call is remembered after its end: as long as `GET /v1/calls/{id}` tells of it."""
FULL_RETRY_AFTER_MS = 1_000
TRY_AGAIN = frozenset({401, 408, 429, 503})
"""Statuses that invite the caller to try the same once more."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of the call that came first under a key. `is_lost` is set when its answer can't be given again."""

    digest: bytes
    call_id: str
    is_lost: bool


class Fresh(msgspec.Struct, frozen=True):
    """Nobody asked this before: run it."""


class Same(msgspec.Struct, frozen=True):
    """It runs or has run: give its answer."""


class OtherBody(msgspec.Struct, frozen=True):
    """The key stands for another request."""


class AnswerLost(msgspec.Struct, frozen=True, kw_only=True):
    """It has run, so it isn't run again; but its answer isn't kept."""

    call_id: str


class Full(msgspec.Struct, frozen=True):
    """No more can be remembered, and nothing can be forgotten, for all of it still runs."""


def read_key(lines: Sequence[bytes]) -> str | Failure | None:
    """The key in the header's lines, None without one.

    The draft of the IETF has a quoted string; most clients send the bare characters. `"a"` and `a` are the same key.
    """
    if not lines:
        return None
    text = lines[0].decode("latin-1").strip(" \t")
    if len(lines) > 1:
        return _wrong("came more than once")
    if not (text.isascii() and text.isprintable()):
        return _wrong("holds something else than printable ASCII")
    key = _unquoted(text) if text.startswith('"') else text
    if key is None:
        return _wrong("begins with a quote and is no quoted string")
    if not key:
        return _wrong("is empty")
    if len(key) > KEY_CHARS_MAX:
        return _wrong(f"is over {KEY_CHARS_MAX} characters")
    return key


def digest_of(path: str, body: bytes) -> bytes:
    """What makes two requests the same."""
    digest = hashlib.sha256(path.encode() + b"\n")
    digest.update(body)
    return digest.digest()


def meaning(known: Known | None, digest: bytes, *, is_full: bool) -> Fresh | Same | OtherBody | AnswerLost | Full:
    """What to do with a request, by what is known under its key."""
    if known is None:
        return Full() if is_full else Fresh()
    if known.digest != digest:
        return OtherBody()
    return AnswerLost(call_id=known.call_id) if known.is_lost else Same()


def refusal(why: OtherBody | AnswerLost | Full) -> Failure:
    """The same as the caller hears it."""
    match why:
        case OtherBody():
            text = f"this {HEADER} came before with another path or body; each request needs a key of its own"
            return Failure(code="idempotency_conflict", message=text, param=HEADER)
        case AnswerLost(call_id=call_id):
            text = (
                f"the call of this {HEADER} is not run twice, and its answer is not kept: one of up to {RECORDING_BYTES_MAX} bytes is,"
                f" and {RECORDINGS_BYTES_MAX} bytes of all; GET /v1/calls/{call_id} tells of it, and a new key runs it anew"
            )
            return Failure(code="idempotency_answer_too_long", message=text, param=HEADER)
        case Full():
            text = f"this gateway runs {RECORDINGS_MAX} calls with an {HEADER}; try again later, or without the header"
            return Failure(code="too_many_calls", message=text, retry_after_ms=FULL_RETRY_AFTER_MS)


def is_kept(http_status: int, *, node_asked: bool) -> bool:
    """Whether an answer is the call's answer from now on. `http_status` is 0 if there was none.

    What may have run is kept, success or not: it must not run twice. What was refused before a node was asked ran nowhere,
    so a caller who tries again, or who corrects the body, must be able to succeed; and so must one who was invited to.
    """
    if 200 <= http_status < 300:
        return True
    return node_asked and http_status not in TRY_AGAIN


def fits(size_bytes: int, more_bytes: int) -> bool:
    """Whether a recording of so many bytes can take more."""
    return size_bytes + more_bytes <= RECORDING_BYTES_MAX


def is_old(ended_at_ms: int, *, now_ms: int) -> bool:
    """Whether a call that ended then is to be forgotten."""
    return now_ms - ended_at_ms > KEPT_MS


def _unquoted(text: str) -> str | None:
    """What a string of RFC 8941 says, None if it isn't one. Parameters may follow it; they mean nothing here."""
    said: list[str] = []
    is_escaped = False
    for at, char in enumerate(text[1:], 1):
        if is_escaped:
            if char not in '"\\':
                return None
            is_escaped = False
            said.append(char)
        elif char == '"':
            rest = text[at + 1 :].lstrip(" ")
            return "".join(said) if rest[:1] in ("", ";") else None
        elif char == "\\":
            is_escaped = True
        else:
            said.append(char)
    return None


def _wrong(what: str) -> Failure:
    text = f"the header {HEADER} {what}; it takes 1 to {KEY_CHARS_MAX} printable ASCII characters, such as a UUID"
    return Failure(code="invalid_request", message=text, param=HEADER)

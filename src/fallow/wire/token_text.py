"""Bytes as one word that people copy: a prefix that says what it is, base64url, and a checksum that a cut or a slip doesn't pass."""

import base64
import binascii
import hashlib
import zlib

from fallow.model.errors import WireError

TOKEN_CHARS_MAX = 32 * 1024
"""What a shell takes as one argument is several times as much."""
PACKED_BYTES_MAX = 48 * 1024
"""What a token may unpack to."""
CHECK_BYTES = 4


def wrap(prefix: str, packed: bytes) -> str:
    """The word; raises WireError if it would be longer than `unwrap` takes."""
    squeezed = zlib.compress(packed, 9)
    text = prefix + base64.urlsafe_b64encode(squeezed + _check(squeezed)).rstrip(b"=").decode()
    if len(packed) > PACKED_BYTES_MAX or len(text) > TOKEN_CHARS_MAX:
        raise WireError(f"it has {len(text)} characters, and the limit is {TOKEN_CHARS_MAX}: what it carries must be shorter")
    return text


def unwrap(prefix: str, text: str, *, what: str) -> bytes:
    """The bytes, whole as they were wrapped; raises WireError, which never repeats the word.

    Line breaks and spaces, as copying makes them, don't matter. `what` is what the word should be: `invitation`.
    """
    again = "copy it whole, or ask for a new one"
    too_long = WireError(f"this is longer than any {what}, which has {TOKEN_CHARS_MAX} characters at most")
    if len(text) > 2 * TOKEN_CHARS_MAX:
        raise too_long
    token = "".join(text.split())
    if not token.startswith(prefix):
        raise WireError(f"this is no {what}: one begins with {prefix}")
    if len(token) > TOKEN_CHARS_MAX:
        raise too_long
    code = token.removeprefix(prefix)
    try:
        data = base64.b64decode(code + "=" * (-len(code) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        data = b""
    squeezed, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if check != _check(squeezed):
        raise WireError(f"this {what} is cut off or mistyped: {again}")
    unpacker = zlib.decompressobj()
    try:
        packed = unpacker.decompress(squeezed, PACKED_BYTES_MAX)
    except zlib.error:
        raise WireError(f"this {what} is damaged: {again}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise WireError(f"this {what} is damaged, or unpacks to more than {PACKED_BYTES_MAX} bytes: {again}")
    return packed


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:CHECK_BYTES]

"""NKeys as text: a public key's letters to its 32 bytes, and signatures that are checked against it."""

import base64
import binascii

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fallow.model.errors import WireError

PREFIXES = {"operator": "O", "account": "A", "user": "U"}
"""The letter that the public key of each kind begins with."""
_FIRST_BYTES = {"O": 14 << 3, "A": 0, "U": 20 << 3}
PUBLIC_LENGTH = 56
"""Base32 of 35 bytes: the kind, 32 bytes of key, and a CRC-16 (XMODEM, low byte first). NATS, ADR-14 and the nkeys libraries."""


def raw_public(public: str, kind_prefix: str) -> bytes:
    """The 32 bytes of an Ed25519 public key written as an NKey of this kind (`U`, `A` or `O`); raises WireError."""
    if len(public) != PUBLIC_LENGTH or not public.isascii() or public[0] != kind_prefix or kind_prefix not in _FIRST_BYTES:
        raise WireError(f"not a public key: {PUBLIC_LENGTH} letters and digits that begin with {kind_prefix} are expected")
    try:
        packed = base64.b32decode(public)
    except binascii.Error:
        raise WireError("not a public key: it holds what base32 doesn't") from None
    body, checksum = packed[:-2], packed[-2:]
    if body[0] != _FIRST_BYTES[kind_prefix] or binascii.crc_hqx(body, 0).to_bytes(2, "little") != checksum:
        raise WireError("not a public key: its checksum is wrong; was it copied whole?")
    return body[1:]


def verifies(public: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is the Ed25519 signature of `data` by the key with this public half, of whichever kind. Nothing raises."""
    try:
        Ed25519PublicKey.from_public_bytes(raw_public(public, public[:1])).verify(signature, data)
    except (WireError, InvalidSignature, ValueError):
        return False
    return True

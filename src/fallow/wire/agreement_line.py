"""A partner agreement as a line of text: one organisation signs it, the other countersigns it, and hubs keep it."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.model.errors import WireError
from fallow.model.identity import Agreement
from fallow.model.ids import OrgId
from fallow.wire import token_text
from fallow.wire.nkey_text import verifies
from fallow.wire.sign import Sign, agreement_bytes

PREFIX = "fallow-agree1-"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z"
"""Of an organisation, as in the settings."""
ORGANISATION_KIND = "A"
_Name = Annotated[str, Meta(pattern=NAME)]
_Key = Annotated[str, Meta(pattern=r"^(A[A-Z2-7]{55})?\Z")]
_Signature = Annotated[bytes, Meta(max_length=64)]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides pass to each other. A side that hasn't signed yet has neither key nor signature. Nothing in it is secret."""

    left: _Name
    right: _Name
    begins_at_ms: Annotated[int, Meta(ge=0, le=2**53)]
    left_key: _Key = ""
    right_key: _Key = ""
    left_signature: _Signature = b""
    right_signature: _Signature = b""

    @property
    def agreement(self) -> Agreement:
        return Agreement(
            left=OrgId(self.left),
            right=OrgId(self.right),
            begins_at_ms=self.begins_at_ms,
            left_signature=self.left_signature,
            right_signature=self.right_signature,
        )

    @property
    def keys(self) -> dict[OrgId, str]:
        """The public key of each side that has signed, by its signature."""
        data = agreement_bytes(self.agreement)
        sides = ((self.left, self.left_key, self.left_signature), (self.right, self.right_key, self.right_signature))
        return {OrgId(name): key for name, key, signature in sides if key.startswith(ORGANISATION_KIND) and verifies(key, data, signature)}


def proposed(own: OrgId, other: OrgId, *, begins_at_ms: int) -> Line:
    """An agreement that nobody has signed yet; raises WireError if the names aren't those of two organisations."""
    left, right = sorted((own, other))
    return _checked(msgspec.msgpack.encode(Line(left=left, right=right, begins_at_ms=begins_at_ms)))


def signed(line: Line, own: OrgId, public_key: str, sign: Sign) -> Line:
    """The line with the signature of one of its sides."""
    assert own in (line.left, line.right), "only the two sides sign"
    signature = sign(agreement_bytes(line.agreement))
    if own == line.left:
        return msgspec.structs.replace(line, left_key=public_key, left_signature=signature)
    return msgspec.structs.replace(line, right_key=public_key, right_signature=signature)


def write(line: Line) -> str:
    """The line as text."""
    return token_text.wrap(PREFIX, msgspec.msgpack.encode(line))


def read(text: str) -> Line:
    """What the text says; raises WireError, also if a signature in it doesn't fit."""
    line = _checked(token_text.unwrap(PREFIX, text, what="line of an agreement"))
    missing = {OrgId(line.left), OrgId(line.right)} - set(line.keys)
    if missing & {name for name, key in ((line.left, line.left_key), (line.right, line.right_key)) if key}:
        raise WireError("a signature in this line doesn't fit what it signs: ask the other side for a new line")
    return line


def _checked(packed: bytes) -> Line:
    try:
        line = _decoder.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise WireError("the names of organisations are letters, digits, _ and -, 63 at most; else update the older of the two") from None
    if line.left >= line.right:
        raise WireError("an agreement is between two organisations with different names")
    return line


_decoder = msgspec.msgpack.Decoder(Line)

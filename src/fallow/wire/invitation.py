"""The one word with which a machine joins: where the hub is, whom to believe, the door's credential, and the secret of an invitation."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.model.errors import WireError
from fallow.model.messages import CREDENTIAL_MAX
from fallow.wire import token_text

PREFIX = "fallow1-"
ADDRESSES_MAX = 8
CA_CHARS_MAX = 32 * 1024
"""Some ten certificates."""

Address = Annotated[str, Meta(pattern=r"^(nats|tls|ws|wss)://[^\s@]{1,256}\Z")]
"""Of a broker. Secrets have their own places, so there is no `user:password@`."""


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """What a token says. `addresses` are tried in order; `ca_pem` is empty where the system's certificates do.

    `door_jwt` and `door_seed` let a guest knock at the hub and do nothing else. `word` is the invitation's secret, empty for open
    enrolment.
    """

    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=ADDRESSES_MAX)]
    ca_pem: Annotated[str, Meta(max_length=CA_CHARS_MAX)] = ""
    door_jwt: Annotated[str, Meta(max_length=CREDENTIAL_MAX)] = ""
    door_seed: Annotated[str, Meta(max_length=128)] = ""
    word: Annotated[str, Meta(max_length=128)] = ""

    def __repr__(self) -> str:
        return f"Invitation(addresses={self.addresses!r}, word and door not shown)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("addresses", self.addresses)]


def write(invitation: Invitation) -> str:
    """The token; raises WireError if a part is not what `read` would take."""
    packed = msgspec.msgpack.encode(invitation)
    try:
        _decoder.decode(packed)
    except msgspec.ValidationError as error:
        raise WireError(f"this can't be made an invitation: {error}") from None
    return token_text.wrap(PREFIX, packed)


def read(text: str) -> Invitation:
    """What the token says; raises WireError, which never repeats the token. Line breaks and spaces from copying don't matter."""
    packed = token_text.unwrap(PREFIX, text, what="invitation")
    try:
        return _decoder.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise WireError("this invitation says what this version of Fallow doesn't understand: update it, or ask for a new one") from None


_decoder = msgspec.msgpack.Decoder(Invitation)

"""Private keys: made, kept in files that only their owner reads, and used to sign."""

import base64
import binascii
import contextlib
import os
from pathlib import Path
from typing import Literal

import nkeys

from fallow.adapters.files import write_private
from fallow.model.errors import BadSetting, StartFailed

Kind = Literal["operator", "account", "user"]
_PREFIX: dict[Kind, int] = {
    "operator": nkeys.PREFIX_BYTE_OPERATOR,
    "account": nkeys.PREFIX_BYTE_ACCOUNT,
    "user": nkeys.PREFIX_BYTE_USER,
}
SEED_LENGTH = 58


class KeyPair:
    """An Ed25519 key as an NKey. Its text shows the public half only."""

    __slots__ = ("_pair", "kind", "public")

    def __init__(self, pair: nkeys.KeyPair, kind: Kind) -> None:
        self._pair = pair
        self.kind = kind
        self.public: str = bytes(pair.public_key).decode()

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        return bytes(self._pair.sign(data))

    @property
    def seed(self) -> str:
        """The private half as text (`S…`). It belongs into private files only."""
        return bytes(self._pair.seed).decode()

    def __repr__(self) -> str:
        return f"KeyPair({self.public})"


class Credentials:
    """What the broker lets in: a JWT and the key that it names. Only the public half shows in its text."""

    __slots__ = ("jwt", "key")

    def __init__(self, jwt: str, key: KeyPair) -> None:
        self.jwt = jwt
        self.key = key

    def __repr__(self) -> str:
        return f"Credentials({self.key.public})"


def make_key(kind: Kind) -> KeyPair:
    """A new key, of the operating system's chance."""
    return KeyPair(nkeys.from_seed(nkeys.encode_seed(os.urandom(32), _PREFIX[kind])), kind)


def key_from_seed(seed: str) -> KeyPair:
    """The key with this seed; raises BadSetting, without the seed in its text."""
    wrong = BadSetting(f"not the seed of a key: {SEED_LENGTH} letters and digits that begin with SO, SA or SU are expected")
    if len(seed) != SEED_LENGTH or not seed.isascii():
        raise wrong
    try:
        packed = base64.b32decode(seed + "=" * (-SEED_LENGTH % 8))
    except binascii.Error:
        raise wrong from None
    if binascii.crc_hqx(packed[:-2], 0).to_bytes(2, "little") != packed[-2:]:  # the library doesn't look at the checksum
        raise wrong
    with contextlib.suppress(nkeys.NkeysError, ValueError):
        prefix, _ = nkeys.decode_seed(seed.encode())
        for kind, known in _PREFIX.items():
            if known == prefix:
                return KeyPair(nkeys.from_seed(seed.encode()), kind)
    raise wrong


def kept_key(path: Path, kind: Kind) -> KeyPair:
    """The key in a private file, made on first use. Raises BadSetting if something else is in it, StartFailed if it can't be read."""
    if not path.exists():
        made = make_key(kind)
        write_private(path, made.seed + "\n")
        return made
    try:
        key = key_from_seed(path.read_text(errors="replace").strip())
    except OSError as error:
        raise StartFailed(f"could not read {path}: {error.strerror}") from None
    except BadSetting as error:
        raise BadSetting(f"{path}: {error.message}") from None
    if key.kind != kind:
        raise BadSetting(f"{path} holds the key of {_article(key.kind)}, and one of {_article(kind)} is expected")
    return key


def _article(kind: Kind) -> str:
    return f"{'a' if kind == 'user' else 'an'} {kind}"

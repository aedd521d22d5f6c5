"""Chance that depends on names alone, so that every rule meets the same world whatever it decides."""

import random
from hashlib import blake2b


def source(*names: object) -> random.Random:
    """A source of chance for this name."""
    text = "/".join(str(name) for name in names)
    return random.Random(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big"))

"""Which requests begin alike: leading blocks of their bytes as hashes, so that nobody needs to keep the bytes."""

import hashlib

import numpy

BLOCK_BYTES = 512
"""About a hundred tokens: what is shorter costs little to read again."""
BLOCKS_MAX = 128
"""What lies beyond 64 KiB isn't looked at."""
SALT_BYTES_MAX = hashlib.blake2b.MAX_KEY_SIZE

Blocks = tuple[int, ...]


def blocks(body: bytes, *, salt: bytes) -> Blocks:
    """One 64-bit hash for each whole block: of everything from the body's start to that block's end.

    `salt` is secret and of this process (at most 64 bytes): without it nobody can confirm a guess of what was asked.
    """
    whole = min(len(body) // BLOCK_BYTES, BLOCKS_MAX)
    view = memoryview(body)
    so_far = hashlib.blake2b(digest_size=8, key=salt)
    found = []
    for start in range(0, whole * BLOCK_BYTES, BLOCK_BYTES):
        so_far.update(view[start : start + BLOCK_BYTES])
        found.append(so_far.copy().digest())
    return tuple(numpy.frombuffer(b"".join(found), dtype="<u8").tolist())


def common(a: Blocks, b: Blocks) -> int:
    """How many leading blocks are the same."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count

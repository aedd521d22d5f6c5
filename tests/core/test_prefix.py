"""Requests that begin alike: what their hashes say of it, and what they don't."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.core.prefix import BLOCK_BYTES, BLOCKS_MAX, SALT_BYTES_MAX, blocks, common

PROMISE = settings(max_examples=200)
SALT = b"s" * 16
A = b"a" * BLOCK_BYTES
B = b"b" * BLOCK_BYTES


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 0),
        (BLOCK_BYTES - 1, 0),
        (BLOCK_BYTES, 1),
        (2 * BLOCK_BYTES - 1, 1),
        (2 * BLOCK_BYTES, 2),
        (BLOCKS_MAX * BLOCK_BYTES, BLOCKS_MAX),
        (BLOCKS_MAX * BLOCK_BYTES + 1, BLOCKS_MAX),
        ((BLOCKS_MAX + 5) * BLOCK_BYTES, BLOCKS_MAX),
    ],
)
def test_only_whole_blocks_count(size: int, count: int) -> None:
    found = blocks(b"x" * size, salt=SALT)
    assert len(found) == len(set(found)) == count, "each is of all that came before, so no two are the same"
    assert all(0 <= one < 2**64 for one in found)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b"", b"", 0),
        (A, b"", 0),
        (A, A, 1),
        (A + B, A, 1),
        (A + B, A + A, 1),
        (B + A, A + A, 0),
        (A + B + A, A + B + A + B, 3),
        (A + B + A + A, A + A + A + A, 1),
        (A + b"tail", A + b"tall", 1),
    ],
)
def test_how_much_of_two_requests_is_the_same(one: bytes, other: bytes, same: int) -> None:
    assert common(blocks(one, salt=SALT), blocks(other, salt=SALT)) == same
    assert common(blocks(other, salt=SALT), blocks(one, salt=SALT)) == same


def test_a_body_that_is_alike_again_after_a_difference_is_not_alike() -> None:
    one, other = blocks(A + A + B, salt=SALT), blocks(B + A + B, salt=SALT)
    assert not set(one) & set(other)


@pytest.mark.parametrize("salt", [b"t" * 16, b"", b"s" * SALT_BYTES_MAX])
def test_another_salt_tells_nothing(salt: bytes) -> None:
    assert not set(blocks(A + B, salt=SALT)) & set(blocks(A + B, salt=salt))


bodies = st.binary(max_size=3 * BLOCK_BYTES)


@PROMISE
@given(bodies, bodies, bodies)
def test_common_blocks_are_common_bytes(start: bytes, one: bytes, other: bytes) -> None:
    a, b = start + one, start + other
    alike = 0
    while alike < min(len(a), len(b)) and a[alike] == b[alike]:
        alike += 1
    assert common(blocks(a, salt=SALT), blocks(b, salt=SALT)) == alike // BLOCK_BYTES

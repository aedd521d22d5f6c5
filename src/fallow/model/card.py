"""What a node says it is."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import HardwareKind, Isolation, Ring

Word = Annotated[str, Meta(pattern=r"^[ -~]{1,64}\Z")]
"""Printable ASCII: it goes into headers."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's class. `isa` names the instruction set that engines use, such as `x86_64-avx2`."""

    kind: HardwareKind
    isa: Word
    cores: Annotated[int, Meta(ge=1, le=100_000)]
    memory_bytes: Annotated[int, Meta(ge=0)]
    memory_bytes_per_s: int | None = None
    gpu: Word | None = None

    def summary(self) -> str:
        """A few words for headers and tables."""
        return f"gpu {self.gpu}" if self.kind == "gpu" else f"cpu {self.cores}x {self.isa.removeprefix('x86_64-')}"


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """Who a node is. A higher `sequence` replaces a lower one. `signature` is the node's own.

    `refuses_…` are the callers whom its owner doesn't work for. `membership` is the hub's signature that the node belongs to `org_id`
    until `member_until_s` (UTC).
    """

    node_id: NodeId
    org_id: OrgId
    sequence: int
    expires_at_ms: int
    hardware: Hardware
    isolation: Isolation
    region: Word
    serves: frozenset[Ring]
    signature: bytes = b""
    refuses_organisations: Annotated[frozenset[str], Meta(max_length=256)] = frozenset()
    refuses_countries: Annotated[frozenset[str], Meta(max_length=256)] = frozenset()
    member_until_s: Annotated[int, Meta(ge=0, le=2**40)] = 0
    membership: Annotated[bytes, Meta(max_length=64)] = b""

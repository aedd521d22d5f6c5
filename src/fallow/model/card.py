"""What a node says it is."""

import msgspec

from fallow.model.ids import NodeId, OrgId
from fallow.model.needs import HardwareKind, Isolation, Ring


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's class. `isa` names the instruction set that engines use, such as `x86_64-avx2`."""

    kind: HardwareKind
    isa: str
    cores: int
    memory_bytes: int
    memory_bytes_per_s: int | None = None
    gpu: str | None = None

    def summary(self) -> str:
        """A few words for headers and tables."""
        return f"gpu {self.gpu}" if self.kind == "gpu" else f"cpu {self.cores}x {self.isa.removeprefix('x86_64-')}"


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """Who a node is. A higher `sequence` replaces a lower one. `signature` stays empty until nodes have keys."""

    node_id: NodeId
    org_id: OrgId
    sequence: int
    expires_at_ms: int
    hardware: Hardware
    isolation: Isolation
    region: str
    serves: frozenset[Ring]
    signature: bytes = b""

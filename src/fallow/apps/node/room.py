"""The memory that engines share: a model comes in when it is called for, and idle ones leave for it."""

import asyncio
from typing import Protocol

from fallow.core.residency import Enter, Evict, Never, Resident, Wait, make_room
from fallow.model.errors import StartFailed

POLL_S = 0.05


class Tenant(Protocol):
    """A model that may be in memory."""

    def resident(self) -> Resident: ...

    def want(self) -> None:
        """Start the engine."""

    def leave(self) -> None:
        """End it."""


class Room:
    """All models of a node, within one limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._tenants: dict[str, Tenant] = {}

    def add(self, tenant: Tenant) -> None:
        """One more model; raises StartFailed if it can never be loaded."""
        resident = tenant.resident()
        if resident.needs_bytes > self.limit_bytes:
            need, limit = resident.needs_bytes // 2**20, self.limit_bytes // 2**20
            raise StartFailed(
                f"{resident.model} needs {need} MB, the limit is {limit} MB; raise [node] memory_gb or choose a smaller model"
            )
        self._tenants[resident.model] = tenant

    async def admit(self, model: str) -> None:
        """Wait until there is room, then start the engine. Nobody else can take the room in between."""
        while True:
            match make_room(model, [tenant.resident() for tenant in self._tenants.values()], limit_bytes=self.limit_bytes):
                case Enter():
                    self._tenants[model].want()
                    return
                case Evict(models):
                    for one in models:
                        self._tenants[one].leave()
                case Wait():
                    pass
                case Never():
                    raise AssertionError("add() refuses what can never fit")
            await asyncio.sleep(POLL_S)

    def holders(self, model: str) -> tuple[str, ...]:
        """The models that must end their calls before this one can come in."""
        verdict = make_room(model, [tenant.resident() for tenant in self._tenants.values()], limit_bytes=self.limit_bytes)
        return verdict.models if isinstance(verdict, Wait) and verdict.why == "in_use" else ()

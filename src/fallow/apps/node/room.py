"""The memory that engines share: a model comes in when it is called for or planned, and idle ones leave for it."""

import asyncio
from typing import Protocol

from fallow.core.residency import Enter, Evict, Never, Resident, Wait, idle, make_planned_room, make_room
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
    """All models of a node, within one limit. `held` are those that the hub's plan wants here."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held: frozenset[str] = frozenset()
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
            match make_room(model, self._residents(), limit_bytes=self.limit_bytes, held=self.held):
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
        verdict = make_room(model, self._residents(), limit_bytes=self.limit_bytes, held=self.held)
        return verdict.models if isinstance(verdict, Wait) and verdict.why == "in_use" else ()

    def invite(self, model: str, now_ms: int) -> bool:
        """A planned model starts if there is room; else those that may leave for it do. False while they leave: it has the next turn."""
        match make_planned_room(model, self._residents(), limit_bytes=self.limit_bytes, held=self.held, now_ms=now_ms):
            case Enter():
                self._tenants[model].want()
            case Evict(models):
                for one in models:
                    self._tenants[one].leave()
                return False
            case Wait(why=why):
                return why != "leaving"
            case Never():
                raise AssertionError("add() refuses what can never fit")
        return True

    def clear_idle(self, stay: frozenset[str], now_ms: int) -> tuple[str, ...]:
        """End what nobody called for long; returns which."""
        left = idle(self._residents(), stay=stay, now_ms=now_ms)
        for model in left:
            self._tenants[model].leave()
        return left

    def _residents(self) -> list[Resident]:
        return [tenant.resident() for tenant in self._tenants.values()]

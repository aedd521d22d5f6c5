"""A whole network on this machine for the steadiness benches: a real broker, a real gateway, and nodes that can be killed."""

import asyncio
import contextlib
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import psutil

from bench.children import READY_S, running, running_stub
from bench.steady_pen import READY
from fallow.adapters import children
from fallow.adapters.clock import SystemClock
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.sql.registry import open_registry
from fallow.apps.hub import registrar
from fallow.apps.settings import INVITATION_FILE, Settings, load
from fallow.apps.up import Part, start_part
from fallow.model.errors import EngineFailed
from fallow.model.ids import OrgId

Death = Literal["drop", "hush", "sigkill"]
POLL_S = 0.05
KNOWN_S_MAX = 30.0
NODES_BYTES_MAX = 1024 * 1024
HEALTH_S = 5.0


class Herd(Protocol):
    """Nodes that can be killed and started again under the same name."""

    names: tuple[str, ...]

    async def start(self, name: str) -> None: ...

    async def kill(self, name: str, how: Death) -> None: ...


class PenHerd:
    """Nodes that share a process; its connections die one by one."""

    def __init__(self, process: Process, names: Sequence[str]) -> None:
        self._process = process
        self._turn = asyncio.Lock()
        self.names = tuple(names)

    async def start(self, name: str) -> None:
        await self.tell("start", name)

    async def kill(self, name: str, how: Death) -> None:
        assert how != "sigkill", "the others live in the same process"
        await self.tell(how, name)

    async def tell(self, word: str, name: str) -> None:
        """Say one command, until it is carried out."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(f"{word} {name}\n".encode())
            await self._process.stdin.drain()
            async with asyncio.timeout(READY_S):
                said = (await self._process.stdout.readline()).decode().strip()
            if said != f"{word} {name}":
                raise RuntimeError(f"the nodes' process answered {word} {name} with {said!r}")


class LentHerd:
    """Nodes that are `fallow lend` processes, each with a data folder; they die by SIGKILL."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self._folder = folder
        self._arguments = list(arguments)
        self._parts: dict[str, Part] = {}
        self._folders: dict[str, Path] = {}
        self.names: tuple[str, ...] = ()

    async def add(self, count: int) -> None:
        """Start so many nodes; their names are their own."""
        folders = [self._folder / f"n{number}" for number in range(count)]
        for folder, (part, name) in zip(folders, await asyncio.gather(*map(self._lend, folders)), strict=True):
            self._parts[name], self._folders[name] = part, folder
        self.names = tuple(self._parts)

    async def _lend(self, folder: Path) -> tuple[Part, str]:
        part = await start_part(load(folder), "lend", self._arguments)
        return part, await part.address()

    async def start(self, name: str) -> None:
        self._parts[name], same = await self._lend(self._folders[name])
        assert same == name, "a node's id lies in its data folder"

    async def kill(self, name: str, how: Death) -> None:
        assert how == "sigkill", "a process of its own dies as a process"
        await children.kill(self._parts[name].process)

    async def close(self) -> None:
        await asyncio.gather(*(children.end(part.process) for part in self._parts.values()))


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What is running. `base_url` is without `/v1`."""

    base_url: str
    keys: tuple[str, ...]
    hub: str
    invitation: Path
    folder: Path
    engine: str
    gateway_pid: int

    def gateway_mib(self) -> float:
        """The gateway's resident memory."""
        return float(psutil.Process(self.gateway_pid).memory_info().rss / 2**20)

    async def know(self, names: Sequence[str]) -> None:
        """Wait until the gateway knows just these nodes as ready; raises TimeoutError."""
        client = HttpEngine(self.base_url.removeprefix("http://"), headers={"authorization": f"Bearer {self.keys[0]}"})
        try:
            async with asyncio.timeout(KNOWN_S_MAX):
                while await _ready(client) != set(names):
                    await asyncio.sleep(POLL_S)
        finally:
            client.close()


async def _ready(client: HttpEngine) -> set[str]:
    """The nodes whose offers are all ready and that may work."""
    try:
        status, said = await client.get("/fallow/nodes", HEALTH_S, NODES_BYTES_MAX)
    except EngineFailed:
        return set()
    if status != 200:
        return set()
    nodes = msgspec.json.decode(said)["nodes"]
    return {
        node["node_id"]
        for node in nodes
        if node["state"] in ("run", "throttle") and node["offers"] and all(offer["readiness"] == "ready" for offer in node["offers"])
    }


def _make_keys(settings: Settings, count: int) -> tuple[str, ...]:
    """So many API keys in the hub's registry; blocks."""
    registry = open_registry(settings.database)
    try:
        own = OrgId(settings.organisation.id)
        return tuple(registrar.make_key(registry, org_id=own, now_ms=SystemClock().wall_ms())[1] for _ in range(count))
    finally:
        registry.close()


@contextlib.asynccontextmanager
async def running_site(*, keys: int = 1) -> AsyncIterator[Site]:
    """Broker, gateway and stub engine as processes; the keys are known to us. Nodes are added by `pen` or `lent`."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fallow-bench-")))
        settings = load(folder / "gateway")
        hub = await start_part(settings, "hub", ["--listen", "127.0.0.1:0"])
        stack.push_async_callback(children.end, hub.process)
        hub_address = await hub.address()
        ring = await asyncio.to_thread(_make_keys, settings, keys)
        gateway = await start_part(settings, "gateway", ["--port", "0"])
        stack.push_async_callback(children.end, gateway.process)
        base_url = (await gateway.address()).removesuffix("/v1")
        engine = await stack.enter_async_context(running_stub(folder / "stub.sock"))
        yield Site(
            base_url=base_url,
            keys=ring,
            hub=hub_address,
            invitation=settings.data / INVITATION_FILE,
            folder=folder,
            engine=engine,
            gateway_pid=gateway.process.pid,
        )


@contextlib.asynccontextmanager
async def pen(site: Site, *, nodes: int, slots: int) -> AsyncIterator[PenHerd]:
    """So many nodes in one process, known to the gateway."""
    where = ["--data", str(site.folder / "pen"), "--join-file", str(site.invitation), "--nodes", str(nodes)]
    where += ["--engine", site.engine, "--slots", str(slots)]
    async with running(sys.executable, "-m", "bench.steady_pen", *where, output=PIPE, talks=True) as process:
        assert process.stdout is not None
        async with asyncio.timeout(READY_S):
            ready, *names = (await process.stdout.readline()).decode().split()
        if ready != READY:
            raise RuntimeError(f"the nodes' process did not start: {ready!r}")
        herd = PenHerd(process, names)
        for name in herd.names:
            await herd.start(name)
        await site.know(herd.names)
        yield herd


@contextlib.asynccontextmanager
async def lent(site: Site, *, nodes: int, slots: int) -> AsyncIterator[LentHerd]:
    """So many `fallow lend` processes, known to the gateway."""
    where = ["--join-file", str(site.invitation), "--engine", f"unix:{site.engine}"]
    herd = LentHerd(site.folder, [*where, "--slots", str(slots), "--profile", "dedicated"])
    try:
        await herd.add(nodes)
        await site.know(herd.names)
        yield herd
    finally:
        await herd.close()

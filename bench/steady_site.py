"""A whole network on this machine for the steadiness benches: a real broker, a real gateway, and nodes that can be killed."""

import asyncio
import contextlib
import hashlib
import secrets
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import psutil

from bench.children import READY_S, running, running_stub
from bench.steady_pen import ORG, READY
from fallow.adapters import children
from fallow.adapters.broker import start_broker
from fallow.adapters.files import write_private
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.settings import SECRET_FILE, load
from fallow.apps.up import Part, start_part
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.errors import BrokerLost, EngineFailed, WireError
from fallow.model.ids import KeyId
from fallow.ports import Delivery
from fallow.wire import codec, subjects

Death = Literal["drop", "hush", "sigkill"]
POLL_S = 0.05
KNOWN_S_MAX = 30.0
NODES_BYTES_MAX = 1024 * 1024
HEALTH_S = 5.0


class KeyRing:
    """Answers gateways' questions about API keys, as a hub's desk does that has several of them."""

    def __init__(self, bus: NatsBus, keys: Sequence[str]) -> None:
        self._bus = bus
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._grants = {digest: Grant(key_id=KeyId("key-" + digest.hex()[:12]), org_id=ORG) for digest in digests}
        self._answers: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.KEY.pattern, self._on_query, group="hub")

    def _on_query(self, delivery: Delivery) -> None:
        with contextlib.suppress(WireError):
            grant = self._grants.get(codec.key_query.read(delivery.data).key_digest)
            task = asyncio.ensure_future(self._answer(delivery.reply, m.KeyAnswer(grant=grant)))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)

    async def _answer(self, subject: str, answer: m.KeyAnswer) -> None:
        with contextlib.suppress(BrokerLost):
            await self._bus.publish(subject, codec.encode(answer))


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
    secret_file: Path
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


@contextlib.asynccontextmanager
async def running_site(*, keys: int = 1) -> AsyncIterator[Site]:
    """Broker, gateway and stub engine as processes; the keys are known to us. Nodes are added by `pen` or `lent`."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fallow-bench-")))
        settings = load(folder / "gateway")
        secret = secrets.token_hex(16)
        write_private(settings.data / SECRET_FILE, secret)
        broker = await start_broker(folder / "broker", host="127.0.0.1", port=0, secret=secret)
        stack.push_async_callback(broker.stop)
        bus = NatsBus(broker.address, secret, "bench")
        await bus.connect()
        stack.push_async_callback(bus.close)
        ring = tuple(f"fk-{secrets.token_hex(12)}" for _ in range(keys))
        await KeyRing(bus, ring).start()
        gateway = await start_part(settings, "gateway", ["--hub", broker.address, "--port", "0"])
        stack.push_async_callback(children.end, gateway.process)
        base_url = (await gateway.address()).removesuffix("/v1")
        engine = await stack.enter_async_context(running_stub(folder / "stub.sock"))
        yield Site(
            base_url=base_url,
            keys=ring,
            hub=broker.address,
            secret_file=settings.data / SECRET_FILE,
            folder=folder,
            engine=engine,
            gateway_pid=gateway.process.pid,
        )


@contextlib.asynccontextmanager
async def pen(site: Site, *, nodes: int, slots: int) -> AsyncIterator[PenHerd]:
    """So many nodes in one process, known to the gateway."""
    where = ["--data", str(site.folder / "pen"), "--hub", site.hub, "--secret-file", str(site.secret_file)]
    where += ["--engine", site.engine, "--slots", str(slots)]
    async with running(sys.executable, "-m", "bench.steady_pen", *where, output=PIPE, talks=True) as process:
        assert process.stdout is not None
        async with asyncio.timeout(READY_S):
            said = (await process.stdout.readline()).decode().strip()
        if said != READY:
            raise RuntimeError(f"the nodes' process did not start: {said!r}")
        herd = PenHerd(process, [f"node-{number:02d}" for number in range(nodes)])
        for name in herd.names:
            await herd.start(name)
        await site.know(herd.names)
        yield herd


@contextlib.asynccontextmanager
async def lent(site: Site, *, nodes: int, slots: int) -> AsyncIterator[LentHerd]:
    """So many `fallow lend` processes, known to the gateway."""
    where = ["--hub", site.hub, "--secret-file", str(site.secret_file), "--engine", f"unix:{site.engine}"]
    herd = LentHerd(site.folder, [*where, "--slots", str(slots), "--profile", "dedicated"])
    try:
        await herd.add(nodes)
        await site.know(herd.names)
        yield herd
    finally:
        await herd.close()

"""The node's process: what it serves, and where."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from fallow.adapters import machine
from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.clock import SystemClock
from fallow.adapters.engine_process import SOCKET_PATH_MAX
from fallow.adapters.fetch import Options, fetch
from fallow.adapters.files import make_folder, only_one, read_or_make
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.node.attached import AttachedServed, find_models
from fallow.apps.node.loading import Loader
from fallow.apps.node.node import Node
from fallow.apps.node.room import Room
from fallow.apps.node.served import Served
from fallow.apps.run import tell_ready
from fallow.apps.settings import Settings
from fallow.core.sizing import memory_limit
from fallow.model.card import Card
from fallow.model.errors import BadFlag, StartFailed
from fallow.model.ids import NodeId, OrgId
from fallow.ports import Clock

ATTACHED_SLOTS = 64
CARD_LIFE_MS = 24 * 3_600_000
SOCKET_NAME = "e99"
LOAD_POLL_S = 0.1


async def run_node(settings: Settings, hub: str, secret: str, engine: str, until: asyncio.Event, ready: int | None) -> None:
    """Lend this machine until told to stop; raises StartFailed, FetchFailed, MissingExtra."""
    with only_one(settings.data, "node"):
        node_id = NodeId(read_or_make(settings.data / "node_id", prefix="node-", length=4))
        clock = SystemClock()
        run_folder = _socket_folder(settings.data)
        try:
            served = await _attached(engine, settings) if engine else await _packaged(settings, run_folder, clock)
            bus = NatsBus(hub, secret, node_id)
            await bus.connect()
            try:
                node = Node(_card(node_id, settings, clock), served, bus, clock)
                async with asyncio.TaskGroup() as group:
                    serving = group.create_task(node.run(until), name="node")
                    loading = group.create_task(_tell_when_ready(served, ready, node_id), name="ready")
                    serving.add_done_callback(lambda _: loading.cancel())
                    await until.wait()
                    loading.cancel()
            finally:
                await bus.close()
        finally:
            shutil.rmtree(run_folder, ignore_errors=True)


async def _tell_when_ready(served: list[Served], ready: int | None, node_id: NodeId) -> None:
    """Load the first model before anybody calls, then say that we are ready; raises StartFailed if it can't be loaded."""
    await asyncio.sleep(0)  # the node's task starts the supervisors first
    while (failure := await served[0].ready()) is not None:
        if failure.code == "engine_failed":
            raise StartFailed(f"{served[0].model} can't be loaded: {failure.message}")
        await asyncio.sleep(LOAD_POLL_S)
    tell_ready(ready, node_id, f"Lending {', '.join(one.model for one in served)} as {node_id}; Ctrl-C stops it.")


def _card(node_id: NodeId, settings: Settings, clock: Clock) -> Card:
    now = clock.wall_ms()
    return Card(
        node_id=node_id,
        org_id=OrgId(settings.organisation.id),
        sequence=now,
        expires_at_ms=now + CARD_LIFE_MS,
        hardware=machine.read_hardware(),
        isolation="none",
        region=settings.node.region,
        serves=frozenset({"own", "partner"}),
    )


async def _packaged(settings: Settings, folder: Path, clock: Clock) -> list[Served]:
    """All models that this machine lends, their files fetched; raises StartFailed, FetchFailed, MissingExtra."""
    limit = memory_limit(memory_free_bytes=machine.free_memory_bytes(), wanted_gb=settings.node.memory_gb)
    loader = Loader(settings, folder, Room(limit), clock)
    catalogue = load_catalogue(settings.data)
    served: list[Served] = []
    for name in dict.fromkeys(catalogue.find(name).name for name in settings.node.models):
        weights = catalogue.find(name)
        await asyncio.to_thread(fetch, weights, settings.models_folder, options=Options(budget_bytes=settings.models.disk_bytes))
        served.append(loader.load(weights))
    return served


async def _attached(address: str, settings: Settings) -> list[Served]:
    client = HttpEngine(_endpoint(address))
    slots = settings.node.slots or ATTACHED_SLOTS
    return [AttachedServed(model=name, engine=client, slots=slots) for name in await find_models(client)]


def _endpoint(address: str) -> str:
    """`http://host:port[/v1]` or `unix:/path` as the engine's client takes it; raises BadFlag."""
    if address.startswith("unix:/"):
        return address.removeprefix("unix:")
    try:
        parts = urlsplit(address)
        port = parts.port or 80
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "http" or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
        raise BadFlag(f"--engine: {address!r} should look like http://localhost:11434/v1 or unix:/path/of.sock")
    return f"{parts.hostname}:{port}"


def _socket_folder(data: Path) -> Path:
    """A folder whose path leaves room for a socket's name."""
    wanted = data / "engines"
    if len(str(wanted / f"{SOCKET_NAME}.sock")) <= SOCKET_PATH_MAX:
        return make_folder(wanted)
    return Path(tempfile.mkdtemp(prefix="fallow-"))

"""The node's process: what it serves, where, and for whom."""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

import msgspec

from fallow.adapters import cgroup, machine
from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.clock import SystemClock
from fallow.adapters.engine_process import SOCKET_PATH_MAX, socket_path
from fallow.adapters.files import make_folder, only_one
from fallow.adapters.jail import NO_JAIL, Jail, detect
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.joining import Joined, Renewal, join
from fallow.apps.node.attached import attach
from fallow.apps.node.holding import Holding
from fallow.apps.node.loading import Loader
from fallow.apps.node.node import Node
from fallow.apps.node.owner_side import OwnerSide
from fallow.apps.node.room import Room
from fallow.apps.node.seals import vouched_by
from fallow.apps.node.served import Served
from fallow.apps.run import NODE_DRAIN_S, Stop, tell_draining, tell_ready
from fallow.apps.settings import Settings
from fallow.core.sizing import memory_limit
from fallow.model.card import Card, Hardware
from fallow.model.errors import StartFailed
from fallow.model.ids import NodeId
from fallow.model.measured import Measured
from fallow.ports import Clock
from fallow.wire.invitation import Invitation

CARD_LIFE_MS = 24 * 3_600_000
SOCKET_NAME = "e99"
LOAD_POLL_S = 0.1
MEASURE_MS_MAX = 120_000
"""For all models of one start; those that it isn't enough for are lent unmeasured."""

T = TypeVar("T")
log = logging.getLogger("fallow.node")


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """What `fallow lend` was told besides settings.

    `only` are the models of an attached server that are lent; `reload` reads the settings again, with the same flags over them.
    """

    hub: str
    invited: Invitation | None
    engine: str
    only: tuple[str, ...]
    with_up: bool
    reload: Callable[[], Settings]
    ready: int | None


async def run_node(settings: Settings, joining: Joining, stop: Stop) -> None:
    """Lend this machine until told to stop, and what runs then to its end; raises StartFailed, NotAdmitted, BadModelFile, MissingExtra."""
    with only_one(settings.data, "node"):
        clock = SystemClock()
        joined = await join(settings.data, "node", joining.invited, joining.hub, settings.network.proxy, clock)
        node_id = NodeId(joined.credentials.key.public)
        folder = _socket_folder(settings.data)
        owner = OwnerSide(
            settings,
            node_id=node_id,
            default="dedicated" if joining.with_up else "invisible",
            roots=[os.getppid() if joining.with_up else os.getpid()],
            is_attached=bool(joining.engine),
            reload=joining.reload,
            clock=clock,
        )
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(owner.run(folder), name="owner")  # before anything else runs here
                await owner.gatekeeper.looked.wait()
                try:
                    preparing = _attached(joining, settings) if joining.engine else _packaged(settings, folder, owner, clock)
                    lent = await _until_told(preparing, stop.asked)
                    if lent is not None:
                        owner.lend(lent.served, lent.jail, lent.measured)
                        await _join(settings, joining, owner, lent, joined, stop, clock)
                finally:
                    keeping.cancel()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


async def _join(settings: Settings, joining: Joining, owner: OwnerSide, lent: "Lent", joined: Joined, stop: Stop, clock: Clock) -> None:
    """Be on the network until told to stop. The owner comes first to the end: what drains still yields."""
    card = _card(joined, settings, lent, clock)
    bus = NatsBus(joined.address, joined.credentials, card.node_id, reach=joined.reach)
    await bus.connect()
    try:
        await owner.asking.start(bus, card.hardware.kind)
        speaks = vouched_by(joined.authority, joined.hub_org_id, clock)
        node = Node(card, lent.served, bus, clock, joined.credentials.key.sign, speaks, settings.network.suite)
        closing = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(node.run(closing), name="node")
            loading = group.create_task(_tell_when_ready(owner, node, lent.served, joining.ready), name="ready")
            serving.add_done_callback(lambda _: loading.cancel())
            renewing = group.create_task(Renewal("node", joined, bus, clock, node.renewed).run(), name="renewal")
            serving.add_done_callback(lambda _: renewing.cancel())
            holding = group.create_task(_hold(owner, lent, card.node_id, bus, clock), name="holding")
            serving.add_done_callback(lambda _: holding.cancel())
            await stop.asked.wait()
            loading.cancel()
            holding.cancel()
            renewing.cancel()
            if len(node.jobs):
                tell_draining(NODE_DRAIN_S)
            await node.drain(stop.now, NODE_DRAIN_S)
            owner.gatekeeper.tell = lambda verdict, drops: None  # what happens now is the node's own leaving
            closing.set()
    finally:
        await bus.close()


async def _hold(owner: OwnerSide, lent: "Lent", node_id: NodeId, bus: NatsBus, clock: Clock) -> None:
    """Follow the hub's plan, where engines are ours to load."""
    if lent.room is not None:
        first = lent.served[0].model
        await Holding(node_id, lent.room, bus, clock, offered=owner.offered, may_follow=owner.follows_demand, first=first).run()


async def _until_told(work: Coroutine[None, None, T], until: asyncio.Event) -> T | None:
    """What comes of it, or None if we are told to stop first."""
    working, stop = asyncio.ensure_future(work), asyncio.ensure_future(until.wait())
    try:
        await asyncio.wait([working, stop], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait([working])
        return None
    finally:
        stop.cancel()


async def _tell_when_ready(owner: OwnerSide, node: Node, served: list[Served], ready: int | None) -> None:
    """Load the first model before anybody calls, then say that we are ready; raises StartFailed if it can't be loaded.

    A machine whose owner needs it now is ready too: it will load when it may.
    """
    await asyncio.sleep(0)  # the node's task starts the supervisors first
    owner.join(node)
    while owner.may_work() and (failure := await served[0].ready()) is not None:
        if failure.code == "engine_failed":
            raise StartFailed(f"{served[0].model} can't be loaded: {failure.message}")
        await asyncio.sleep(LOAD_POLL_S)
    words = f"Lending {', '.join(one.model for one in served)} as {node.card.node_id}; Ctrl-C stops it."
    if not owner.may_work():
        owner.load_later()
        words += f" Not now: {owner.gatekeeper.verdict.detail}."
    tell_ready(ready, node.card.node_id, words)


def _card(joined: Joined, settings: Settings, lent: "Lent", clock: Clock) -> Card:
    now = clock.wall_ms()
    return Card(
        node_id=NodeId(joined.credentials.key.public),
        org_id=joined.org_id,
        membership=joined.membership,
        member_until_s=joined.member_until_s,
        sequence=now,
        expires_at_ms=now + CARD_LIFE_MS,
        hardware=lent.hardware,
        isolation=lent.jail.level,
        region=settings.node.region,
        serves=frozenset(settings.lend.serves),
    )


class Lent(msgspec.Struct, frozen=True, kw_only=True):
    """What is lent, by what, and what is known of its speed. An attached server has its own memory, not our `room`."""

    served: list[Served]
    hardware: Hardware
    jail: Jail
    measured: dict[str, Measured]
    room: Room | None = None


async def _packaged(settings: Settings, folder: Path, owner: OwnerSide, clock: Clock) -> Lent:
    """All models that this machine lends, whose files are here; raises StartFailed, BadModelFile, MissingExtra."""
    jail = await asyncio.to_thread(detect, settings.lend.isolation)
    groups = await asyncio.to_thread(cgroup.detect)
    log.info("isolation %s; control groups: %s", jail.level, groups.why_not or "delegated")
    room = Room(memory_limit(memory_free_bytes=machine.free_memory_bytes(), wanted_gb=settings.node.memory_gb))
    loader = Loader(settings, folder, room, clock, jail=jail, cgroups=groups, cores_max=owner.gatekeeper.limits.cores_max)
    catalogue = load_catalogue(settings.data)
    served: list[Served] = []
    measured: dict[str, Measured] = {}
    until_ms = clock.now_ms() + MEASURE_MS_MAX
    for name in dict.fromkeys(catalogue.find(name).name for name in settings.node.models):
        weights = catalogue.find(name)
        subject = loader.find(weights)
        may_measure = settings.lend.measure and clock.now_ms() < until_ms
        known = await loader.measure(subject, owner.gatekeeper) if may_measure else None
        if known is not None:
            measured[subject.model] = known
        served.append(loader.load(weights, subject, known))
    memory_speed = next((one.memory_bytes_per_s for one in measured.values()), None)
    hardware = machine.read_hardware(memory_bytes_per_s=memory_speed)
    return Lent(served=served, hardware=hardware, jail=jail, measured=measured, room=room)


async def _attached(joining: Joining, settings: Settings) -> Lent:
    """Everything that the lender's own server lists. What keeps that apart from their machine is theirs too."""
    found = await attach(joining.engine, settings, only=joining.only)
    return Lent(served=list(found.served), hardware=found.hardware, jail=NO_JAIL, measured={})


def _socket_folder(data: Path) -> Path:
    """A folder whose path leaves room for a socket's name."""
    wanted = data / "engines"
    if len(str(socket_path(wanted, SOCKET_NAME))) <= SOCKET_PATH_MAX:
        return make_folder(wanted)
    return Path(tempfile.mkdtemp(prefix="fallow-"))

"""Many nodes in one process, each on a connection of its own to the broker; what reads from stdin says which of them dies, and how.

One command a line: `start NAME`; `drop NAME`, its connection breaks and the broker tells; `hush NAME`, it says and hears nothing any
more, on a connection that stays; `pause NAME` and `resume NAME`, its owner comes back and leaves. Each is answered with its own line.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.load import run
from fallow.adapters.clock import SystemClock
from fallow.adapters.files import make_folder
from fallow.adapters.nats_bus import NatsBus
from fallow.apps.joining import Joined, join, read_invitation
from fallow.apps.node.attached import attach
from fallow.apps.node.node import Node
from fallow.apps.node.seals import vouched_by
from fallow.apps.settings import Settings, load
from fallow.model.card import Card
from fallow.model.ids import NodeId
from fallow.model.owner import Reason, State, Verdict
from fallow.ports import Delivery, Hear
from fallow.wire.invitation import Invitation

CARD_LIFE_MS = 24 * 3_600_000
READY = "ready"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the nodes of this process join, and what they lend."""

    data: Path
    invited: Invitation
    nodes: int
    engine: str
    slots: int


class FrailBus:
    """A connection that can fall silent without breaking, as a machine's does that hangs or lost its network."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self.is_hushed = False

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if not self.is_hushed:
            await self._bus.publish(subject, data, reply)

    async def subscribe(self, subject: str, hear: Hear, *, group: str = "") -> None:
        def heard(delivery: Delivery) -> None:
            if not self.is_hushed:
                hear(delivery)

        await self._bus.subscribe(subject, heard, group=group)

    async def request(self, subject: str, data: bytes, *, within_s: float) -> bytes:
        return await self._bus.request(subject, data, within_s=within_s)

    def is_up(self) -> bool:
        return self._bus.is_up()

    def on_lost(self, tell: Callable[[], None]) -> None:
        self._bus.on_lost(tell)

    async def close(self) -> None:
        await self._bus.close()


class Inmate:
    """One running node."""

    def __init__(self, node: Node, bus: FrailBus, task: "asyncio.Task[None]") -> None:
        self.node = node
        self.bus = bus
        self.task = task

    async def die(self) -> None:
        """Without a word: nothing is said any more, then the connection is gone."""
        self.bus.is_hushed = True
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.bus.close()


class Pen:
    """The nodes of this process by name."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._settings: Settings = load(place.data, {"node.slots": place.slots})
        self._clock = SystemClock()
        self._inmates: dict[str, Inmate] = {}
        self._identities: dict[str, Joined] = {}
        self.group: asyncio.TaskGroup | None = None

    async def settle(self) -> list[str]:
        """All nodes join the network; returns their names."""
        for number in range(self._place.nodes):
            folder = make_folder(self._place.data / f"{number:03d}")
            joined = await join(folder, "node", self._place.invited, "", "", self._clock)
            self._identities[joined.credentials.key.public] = joined
        return list(self._identities)

    async def obey(self, word: str, name: str) -> None:
        """Carry out one command."""
        match word:
            case "start":
                await self._end(name)
                await self._start(name)
            case "drop":
                await self._end(name)
            case "hush":
                self._inmates[name].bus.is_hushed = True
            case "pause":
                self._inmates[name].node.take(self._verdict("pause", "input"), True)
            case "resume":
                self._inmates[name].node.take(self._verdict("run", "clear"), False)
            case _:
                raise ValueError(f"no such command: {word!r}")

    async def _start(self, name: str) -> None:
        joined = self._identities[name]
        bus = NatsBus(joined.address, joined.credentials, name, reach=joined.reach)
        await bus.connect()
        found = await attach(f"unix:{self._place.engine}", self._settings)
        now = self._clock.wall_ms()
        card = Card(
            node_id=NodeId(name),
            org_id=joined.org_id,
            membership=joined.membership,
            member_until_s=joined.member_until_s,
            sequence=now,
            expires_at_ms=now + CARD_LIFE_MS,
            hardware=found.hardware,
            isolation="none",
            region="unknown",
            serves=frozenset({"own", "partner"}),
        )
        frail = FrailBus(bus)
        speaks = vouched_by(joined.authority, joined.hub_org_id, self._clock)
        node = Node(card, found.served, frail, self._clock, joined.credentials.key.sign, speaks)
        assert self.group is not None, "commands come only while the group is open"
        self._inmates[name] = Inmate(node, frail, self.group.create_task(node.run(asyncio.Event()), name=name))

    async def _end(self, name: str) -> None:
        inmate = self._inmates.pop(name, None)
        if inmate is not None:
            await inmate.die()

    def _verdict(self, state: State, reason: Reason) -> Verdict:
        return Verdict(state=state, reason=reason, detail="the bench says so", cores=0, since_ms=self._clock.now_ms())

    async def close(self) -> None:
        await asyncio.gather(*(inmate.die() for inmate in self._inmates.values()))


async def keep(place: Place) -> None:
    """Do as stdin says until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    pen = Pen(place)
    async with asyncio.TaskGroup() as group:
        pen.group = group
        print(READY, *await pen.settle(), flush=True)
        while line := (await reader.readline()).decode().strip():
            word, _, name = line.partition(" ")
            await pen.obey(word, name)
            print(line, flush=True)
        await pen.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steady_pen", description="Many nodes in one process")
    parser.add_argument("--data", type=Path, required=True, help="the folder of their settings")
    parser.add_argument("--join-file", type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True, help="how many there are")
    parser.add_argument("--engine", required=True, help="the stub engine's socket")
    parser.add_argument("--slots", type=int, required=True, help="of each node")
    chosen = parser.parse_args()
    invited = read_invitation(chosen.join_file.read_text(), str(chosen.join_file))
    run(keep(Place(data=chosen.data, invited=invited, nodes=chosen.nodes, engine=chosen.engine, slots=chosen.slots)))


if __name__ == "__main__":
    main()

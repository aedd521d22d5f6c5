"""The gateway's sessions with nodes, under which calls are sealed: opened before the first call, and anew before they end."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from fallow.model import messages as m
from fallow.model.errors import NodeSilent, NodeUnreachable, NotOpened, WireError
from fallow.model.ids import AttemptId, NodeId
from fallow.ports import Bus, Clock, Delivery
from fallow.wire import codec, seal, subjects
from fallow.wire.sign import Sign, kem_verifies

SESSION_MS = 10 * 60_000
"""A session is used for so long at most."""
RENEW_MS = 9 * 60_000
"""From then on the next call has a new one opened beside it."""
SESSIONS_MAX = 10_000
"""The one that was used least lately is forgotten first."""
HELLO_S = 1.0
"""How long a node may take to answer a hello."""
HELLO_PREFIX = "hello-"
"""Begins the name, among attempts, under which a hello is answered."""

log = logging.getLogger("fallow.gateway")

KemOf = Callable[[NodeId], m.KemKey | None]
KemVerifies = Callable[[NodeId, m.KemKey], bool]


class Asker(NamedTuple):
    """Who this gateway is: its name, and the hub's word for its organisation in a hello's fields; `sign` is of its own key.

    `is_hubs`: who runs the hub runs this gateway too, and so can read what passes through it.
    """

    hello: m.Hello
    sign: Sign
    is_hubs: bool = False

    @property
    def readers(self) -> str:
        """Who can read a call besides its caller."""
        return "hub, node" if self.is_hubs else "gateway, node"

    def renewed(self, membership: bytes, until_s: int) -> "Asker":
        """With the hub's newer word."""
        return self._replace(hello=replace(self.hello, membership=membership, member_until_s=until_s))


def kem_check(clock: Clock) -> KemVerifies:
    """Whether nodes have signed their KEM keys, by this clock."""
    return lambda node_id, kem: kem_verifies(node_id, kem, now_s=clock.wall_ms() // 1000)


class _Open(NamedTuple):
    keys: seal.GatewaySession
    since_ms: int


class Sessions:
    """One for each node that was asked of late. Answers to hellos come by `on_answer`."""

    def __init__(self, asker: Asker, bus: Bus, clock: Clock, kem_of: KemOf, verifies: KemVerifies) -> None:
        self.asker = asker
        self._bus = bus
        self._clock = clock
        self._kem_of = kem_of
        self._verifies = verifies
        self._open: OrderedDict[NodeId, _Open] = OrderedDict()
        self._opening: dict[NodeId, asyncio.Task[seal.GatewaySession]] = {}
        self._answers: dict[str, asyncio.Future[m.Welcome]] = {}

    def now(self, node_id: NodeId) -> seal.GatewaySession | None:
        """The session with a node, if there is one to be used at once."""
        known = self._open.get(node_id)
        age_ms = 0 if known is None else self._clock.now_ms() - known.since_ms
        if known is None or age_ms > SESSION_MS or known.keys.is_used_up:
            return None
        if age_ms > RENEW_MS:
            self._begin(node_id)
        self._open.move_to_end(node_id)
        return known.keys

    async def ready(self, node_id: NodeId) -> seal.GatewaySession:
        """The session with a node, opened first if need be; raises NodeSilent, NodeUnreachable, WireError, BrokerLost."""
        known = self.now(node_id)
        return known if known is not None else await asyncio.shield(self._begin(node_id))

    def forget(self, node_id: NodeId, session: bytes) -> None:
        """The node doesn't know it any more."""
        known = self._open.get(node_id)
        if known is not None and known.keys.id == session:
            del self._open[node_id]

    def _begin(self, node_id: NodeId) -> "asyncio.Task[seal.GatewaySession]":
        """One hello, however many calls wait for it."""
        opening = self._opening.get(node_id)
        if opening is None:
            opening = self._opening[node_id] = asyncio.ensure_future(self._hello(node_id))
            opening.add_done_callback(lambda done: self._ended(node_id, done))
        return opening

    def _ended(self, node_id: NodeId, done: "asyncio.Task[seal.GatewaySession]") -> None:
        self._opening.pop(node_id, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.info("no session with %s: %s", node_id, error)

    async def _hello(self, node_id: NodeId) -> seal.GatewaySession:
        kem = self._kem_of(node_id)
        if kem is None or not self._verifies(node_id, kem):
            raise NotOpened("the node has no KEM key that it has signed", reason="no_key")
        gateway_id = self.asker.hello.gateway_id
        asked = seal.ask(self.asker.hello, node_id, kem, self.asker.sign)
        name = AttemptId(HELLO_PREFIX + asked.hello.session.hex())
        answered = self._answers[name] = asyncio.get_running_loop().create_future()
        try:
            reply = subjects.answer(gateway_id, node_id, name)
            await self._bus.publish(subjects.control(node_id), codec.encode(asked.hello), reply)
            async with asyncio.timeout(HELLO_S):
                keys = seal.begin(asked, await answered)
        except TimeoutError:
            raise NodeSilent(f"the node said nothing for {HELLO_S:g} s") from None
        finally:
            del self._answers[name]
        self._open[node_id] = _Open(keys, self._clock.now_ms())
        self._open.move_to_end(node_id)
        if len(self._open) > SESSIONS_MAX:
            self._open.popitem(last=False)
        return keys

    def on_answer(self, delivery: Delivery) -> bool:
        """Whether this answers a hello."""
        name = subjects.last_token(delivery.subject)
        if not name.startswith(HELLO_PREFIX):
            return False
        answered = self._answers.get(name)
        if answered is None or answered.done():
            return True
        if delivery.unheard:
            answered.set_exception(NodeUnreachable("the node left the network"))
            return True
        try:
            message = codec.to_gateway.read(delivery.data)
        except WireError:
            answered.set_exception(NotOpened("what came as the node's answer to the hello can't be read"))
            return True
        if isinstance(message, m.Welcome):
            answered.set_result(message)
        elif isinstance(message, m.Unopened):
            answered.set_exception(NotOpened("the node doesn't take the hello", reason=message.reason))
        return True

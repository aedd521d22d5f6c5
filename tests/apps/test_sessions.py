"""A gateway's sessions and a node's against each other: opened once, renewed, forgotten, bounded, and only for whom the hub vouches."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from msgspec.structs import replace

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.nkey import KeyPair, make_key
from fallow.apps.gateway import sessions as gateway_sessions
from fallow.apps.gateway.sessions import HELLO_PREFIX, RENEW_MS, Asker, Sessions, kem_check
from fallow.apps.node import seals as node_seals
from fallow.apps.node.seals import HELLOS_MAX, HELLOS_MS, KEM_LIFE_S, KEM_MS, SESSIONS_PER_GATEWAY_MAX, Seals, vouched_by
from fallow.model import messages as m
from fallow.model.errors import NodeSilent, NodeUnreachable, NotOpened, WireError
from fallow.model.ids import AttemptId, GatewayId, NodeId, OrgId
from fallow.ports import Delivery
from fallow.wire import codec, seal, subjects
from fallow.wire.sign import CLOCKS_S, kem_bytes, member_bytes

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import ORG, SIGN, FakeClock, Overheard, anybody, kem_believed, request_of, turns
else:
    from one_loop import ORG, SIGN, FakeClock, Overheard, anybody, kem_believed, request_of, turns

pytestmark = pytest.mark.anyio

HUB_ORG = OrgId("hub")
HUB = make_key("account")
NODE, STRANGER = make_key("user"), make_key("user")
NODE_ID = NodeId(NODE.public)
MEMBER_S = 3_600


class Desk:
    """A gateway of an organisation and a node, with real keys, and a hub that vouches for the gateway. What the node does is counted."""

    def __init__(self, org_id: OrgId = ORG) -> None:
        self.clock = FakeClock()
        self.broker = Overheard()
        self.key = make_key("user")
        self.node_bus = MemoryBus(self.broker)
        self.seals = self.restarted()
        self.hellos: list[m.Hello] = []
        self.answers: list[m.Message | None] | None = None
        """What is said to hellos instead of what the node says; None: nothing is said."""
        self.kem: m.KemKey | None = self.seals.kem
        bus = MemoryBus(self.broker)
        self.sessions = Sessions(Asker(self.hello(org_id), self.key.sign), bus, self.clock, lambda _: self.kem, kem_check(self.clock))
        self._bus = bus
        self._answering: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        await self.node_bus.subscribe(subjects.control(NODE_ID), self._on_control)
        await self._bus.subscribe(subjects.answers(self.gateway_id), self.heard)

    def heard(self, delivery: Delivery) -> None:
        assert self.sessions.on_answer(delivery)

    @property
    def gateway_id(self) -> GatewayId:
        return GatewayId(self.key.public)

    def restarted(self) -> Seals:
        """The node's side, knowing nothing."""
        return Seals(NODE_ID, NODE.sign, vouched_by(HUB.public, HUB_ORG, self.clock), self.clock, "x25519")

    def hello(self, org_id: OrgId = ORG, *, until_s: int | None = None, hub: KeyPair = HUB) -> m.Hello:
        """Who the gateway is, with the hub's word for it."""
        until_s = self.clock.wall_ms() // 1000 + MEMBER_S if until_s is None else until_s
        word = hub.sign(member_bytes(self.gateway_id, org_id, until_s))
        return m.Hello(gateway_id=self.gateway_id, org_id=org_id, member_until_s=until_s, membership=word)

    def asked(self, hello: m.Hello | None = None, node_id: NodeId = NODE_ID) -> seal.Asked:
        """A hello that the gateway may send."""
        return seal.ask(hello or self.hello(), node_id, self.seals.kem, self.key.sign)

    def _on_control(self, delivery: Delivery) -> None:
        hello = codec.to_node.read(delivery.data)
        assert isinstance(hello, m.Hello)
        self.hellos.append(hello)
        answer = self.seals.welcome(hello) if self.answers is None else self.answers.pop(0)
        if answer is not None:
            answering = asyncio.ensure_future(self.node_bus.publish(delivery.reply, codec.encode(answer)))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    def call(self, session: seal.GatewaySession, org_id: OrgId = ORG, gateway_id: str = "") -> m.SealedRequest:
        """The session's next call."""
        number, channel = session.call()
        request = replace(request_of("one", gateway_id=gateway_id or self.gateway_id), org_id=org_id)
        return m.SealedRequest(session=session.id, number=number, box=channel.seal(codec.encode(request))[1])


@pytest.fixture
async def desk() -> Desk:
    one = Desk()
    await one.start()
    return one


async def why(work: Awaitable[object]) -> str:
    """Why something isn't opened."""
    with pytest.raises(NotOpened) as raised:
        await work
    return raised.value.reason


# how long a session is used
async def test_one_hello_for_many_calls(desk: Desk) -> None:
    opened = await asyncio.gather(*(desk.sessions.ready(NODE_ID) for _ in range(20)))
    assert {session.id for session in opened} == {desk.hellos[0].session}
    for _ in range(5):
        session = desk.sessions.now(NODE_ID)
        assert session is opened[0]
        assert desk.seals.open(desk.call(session)).request.org_id == ORG
    await turns()
    assert len(desk.hellos) == 1


async def test_a_caller_who_leaves_takes_no_session_from_the_others(desk: Desk) -> None:
    asked = [asyncio.ensure_future(desk.sessions.ready(NODE_ID)) for _ in range(3)]
    await asyncio.sleep(0)
    asked[0].cancel()
    sessions = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(sessions[0], asyncio.CancelledError)
    assert sessions[1] is sessions[2] is desk.sessions.now(NODE_ID)
    assert len(desk.hellos) == 1


async def test_the_next_session_is_opened_beside_the_one_in_use(desk: Desk) -> None:
    first = await desk.sessions.ready(NODE_ID)
    desk.clock.advance(RENEW_MS)
    assert desk.sessions.now(NODE_ID) is first
    await turns()
    assert len(desk.hellos) == 1, "not yet"
    desk.clock.advance(1)
    assert desk.sessions.now(NODE_ID) is first, "no call waits for the next one"
    assert desk.sessions.now(NODE_ID) is first
    early = desk.call(first)
    await turns()
    assert len(desk.hellos) == 2
    second = desk.sessions.now(NODE_ID)
    assert second is not None
    assert second.id == desk.hellos[1].session
    desk.seals.open(desk.call(second))
    desk.seals.open(early)


async def test_a_renewal_that_fails_leaves_the_session_that_is_open(desk: Desk) -> None:
    first = await desk.sessions.ready(NODE_ID)
    desk.clock.advance(RENEW_MS + 1)
    desk.answers = [m.Unopened(reason="no_key")] * 3
    for times in (1, 2, 3):
        assert desk.sessions.now(NODE_ID) is first
        await turns()
        assert len(desk.hellos) == 1 + times
    desk.seals.open(desk.call(first))


async def test_a_session_ends(desk: Desk) -> None:
    first = await desk.sessions.ready(NODE_ID)
    desk.clock.advance(gateway_sessions.SESSION_MS + 1)
    assert desk.sessions.now(NODE_ID) is None
    second = await desk.sessions.ready(NODE_ID)
    assert second.id != first.id
    desk.seals.open(desk.call(first))  # what is on its way may still come
    desk.clock.advance(node_seals.SESSION_MS - gateway_sessions.SESSION_MS)
    with pytest.raises(NotOpened, match="over"):
        desk.seals.open(desk.call(first))
    desk.seals.open(desk.call(second))
    desk.seals.rotate()
    desk.seals.open(desk.call(second))
    assert desk.seals.refused == {"no_session": 1}


async def test_a_session_has_so_many_calls(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "CALLS_MAX", 3)
    first = await desk.sessions.ready(NODE_ID)
    for _ in range(3):
        assert desk.sessions.now(NODE_ID) is first
        desk.seals.open(desk.call(first))
    assert desk.sessions.now(NODE_ID) is None
    assert (await desk.sessions.ready(NODE_ID)).id != first.id


async def test_what_the_node_has_forgotten_the_gateway_forgets(desk: Desk) -> None:
    first = await desk.sessions.ready(NODE_ID)
    desk.seals = desk.restarted()
    desk.kem = desk.seals.kem
    with pytest.raises(NotOpened) as refused:
        desk.seals.open(desk.call(first))
    assert refused.value.reason == "no_session"
    desk.sessions.forget(NODE_ID, bytes(16))
    assert desk.sessions.now(NODE_ID) is first, "of another session"
    desk.sessions.forget(NODE_ID, first.id)
    assert desk.sessions.now(NODE_ID) is None
    second = await desk.sessions.ready(NODE_ID)
    desk.sessions.forget(NODE_ID, first.id)
    assert desk.sessions.now(NODE_ID) is second, "said late"
    desk.seals.open(desk.call(second))


async def test_the_gateway_keeps_so_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used least lately goes first."""
    monkeypatch.setattr(gateway_sessions, "SESSIONS_MAX", 2)
    clock, broker = FakeClock(), Overheard()
    nodes = {NodeId(name): Seals(NodeId(name), SIGN, anybody, clock, "x25519") for name in ("a", "b", "c")}
    asker = Asker(m.Hello(gateway_id=GatewayId("gw"), org_id=ORG), SIGN)
    bus = MemoryBus(broker)
    sessions = Sessions(asker, bus, clock, lambda node_id: nodes[node_id].kem, kem_believed)

    def heard(delivery: Delivery) -> None:
        assert sessions.on_answer(delivery)

    await bus.subscribe(subjects.answers(GatewayId("gw")), heard)
    for node_id, one in nodes.items():
        await bus.subscribe(subjects.control(node_id), answering(one, bus))
    for name in ("a", "b"):
        await sessions.ready(NodeId(name))
    sessions.now(NodeId("a"))
    await sessions.ready(NodeId("c"))
    assert {node_id for node_id in nodes if sessions.now(node_id) is not None} == {"a", "c"}


def answering(seals: Seals, bus: MemoryBus) -> Any:
    under_way: set[asyncio.Future[None]] = set()

    def on_control(delivery: Delivery) -> None:
        hello = codec.to_node.read(delivery.data)
        assert isinstance(hello, m.Hello)
        answer = seals.welcome(hello)
        assert answer is not None
        under_way.add(asyncio.ensure_future(bus.publish(delivery.reply, codec.encode(answer))))

    return on_control


# what may come of a hello
async def test_a_node_that_is_not_there(desk: Desk) -> None:
    await desk.node_bus.close()
    for _ in range(2):  # each time anew
        with pytest.raises(NodeUnreachable):
            await desk.sessions.ready(NODE_ID)


async def test_a_node_that_says_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_sessions, "HELLO_S", 0.01)
    desk.answers = [None]
    with pytest.raises(NodeSilent):
        await desk.sessions.ready(NODE_ID)
    desk.answers = None
    assert desk.sessions.now(NODE_ID) is None
    await desk.sessions.ready(NODE_ID)


@pytest.mark.parametrize("reason", ["altered", "replayed", "no_key", "not_vouched"])
async def test_a_node_that_does_not_take_the_hello(desk: Desk, reason: Any) -> None:
    desk.answers = [m.Unopened(reason=reason)]
    assert await why(desk.sessions.ready(NODE_ID)) == reason
    assert desk.sessions.now(NODE_ID) is None


@pytest.mark.parametrize(
    "welcome",
    [
        m.Welcome(share=bytes(32), confirm=bytes(32)),
        m.Welcome(share=seal.KemPair("x25519").public, confirm=bytes(32)),
    ],
    ids=["no key", "of who can't open the hello"],
)
async def test_who_is_not_the_node_can_not_answer_for_it(desk: Desk, welcome: m.Welcome) -> None:
    desk.answers = [welcome]
    await why(desk.sessions.ready(NODE_ID))
    assert desk.sessions.now(NODE_ID) is None


async def test_a_welcome_is_for_one_hello(desk: Desk) -> None:
    other = desk.seals.welcome(desk.asked().hello)
    desk.answers = [other]
    await why(desk.sessions.ready(NODE_ID))


@pytest.mark.parametrize("data", [b"", b"\x02\x91", b"nonsense"])
async def test_nonsense_in_answer_to_a_hello(desk: Desk, data: bytes) -> None:
    desk.answers = [None]
    asking = asyncio.ensure_future(desk.sessions.ready(NODE_ID))
    await turns()
    subject = subjects.answer(desk.gateway_id, NODE_ID, AttemptId(HELLO_PREFIX + desk.hellos[0].session.hex()))
    await desk.node_bus.publish(subject, data)
    with pytest.raises(WireError):
        await asking
    await desk.node_bus.publish(subject, data)  # late
    await turns()


@pytest.mark.parametrize("fault", ["none", "a stranger's", "unsigned"])
async def test_nothing_is_sealed_to_a_key_that_the_node_has_not_signed(desk: Desk, fault: str) -> None:
    other = replace(desk.seals.kem, signature=b"", public_key=seal.KemPair("x25519").public)
    wrong: dict[str, m.KemKey | None] = {
        "none": None,
        "a stranger's": replace(other, signature=STRANGER.sign(kem_bytes(NODE_ID, other))),
        "unsigned": other,
    }
    desk.kem = wrong[fault]
    assert await why(desk.sessions.ready(NODE_ID)) == "no_key"
    assert desk.hellos == []


async def test_nothing_is_sealed_to_a_key_whose_time_is_over(desk: Desk) -> None:
    desk.clock.advance((KEM_LIFE_S + CLOCKS_S) * 1000)
    await desk.sessions.ready(NODE_ID)
    desk.sessions.forget(NODE_ID, (await desk.sessions.ready(NODE_ID)).id)
    desk.clock.advance(1_000)
    assert await why(desk.sessions.ready(NODE_ID)) == "no_key"
    assert len(desk.hellos) == 1


# whom the node takes
async def test_a_key_that_was_rotated_once_still_opens(desk: Desk) -> None:
    first = desk.seals.kem
    assert first.expires_at_s == desk.clock.wall_ms() // 1000 + 2 * KEM_MS // 1000
    assert not desk.seals.rotate()
    early, late = desk.asked(), desk.asked()
    desk.clock.advance(KEM_MS - 1)
    assert not desk.seals.rotate()
    desk.clock.advance(1)
    assert desk.seals.rotate()
    assert not desk.seals.rotate()
    second = desk.seals.kem
    assert second.public_key != first.public_key
    assert isinstance(desk.seals.welcome(early.hello), m.Welcome)
    desk.clock.advance(KEM_MS)
    assert desk.seals.rotate()
    assert desk.seals.welcome(late.hello) == m.Unopened(reason="no_key")
    assert desk.seals.refused == {"no_key": 1}


async def test_a_machine_that_slept_keeps_no_old_key(desk: Desk) -> None:
    asked = desk.asked()
    desk.clock.advance(2 * KEM_MS)
    assert desk.seals.rotate()
    assert desk.seals.welcome(asked.hello) == m.Unopened(reason="no_key")


async def test_a_session_outlives_the_key_that_began_it(desk: Desk) -> None:
    session = await desk.sessions.ready(NODE_ID)
    for _ in range(2):
        desk.clock.advance(KEM_MS)
        assert desk.seals.rotate()
    desk.seals.open(desk.call(session))


async def test_too_many_hellos_are_dropped(desk: Desk) -> None:
    """They cost time; who meant well asks again."""
    for _ in range(HELLOS_MAX):
        assert desk.seals.welcome(replace(desk.hello(), kid=b"unknown!")) == m.Unopened(reason="no_key")
    last = desk.asked()
    assert desk.seals.welcome(last.hello) is None
    desk.clock.advance(HELLOS_MS - 1)
    assert desk.seals.welcome(last.hello) is None
    desk.clock.advance(1)
    assert isinstance(desk.seals.welcome(last.hello), m.Welcome)


async def test_the_next_hello_brings_the_hubs_newest_word(desk: Desk) -> None:
    newer = desk.hello(until_s=desk.clock.wall_ms() // 1000 + 2 * MEMBER_S)
    desk.sessions.asker = desk.sessions.asker.renewed(newer.membership, newer.member_until_s)
    desk.clock.advance((MEMBER_S + CLOCKS_S + 1) * 1000)
    desk.seals.rotate()
    desk.kem = desk.seals.kem
    await desk.sessions.ready(NODE_ID)
    [hello] = desk.hellos
    assert (hello.membership, hello.member_until_s, hello.org_id) == (newer.membership, newer.member_until_s, ORG)


async def test_a_gateway_has_so_many_sessions_and_no_more(desk: Desk) -> None:
    other = Desk()
    theirs = other.asked()
    begun = seal.begin(theirs, welcomed(other.seals, theirs))
    ours = []
    for _ in range(SESSIONS_PER_GATEWAY_MAX + 1):
        asked = replaced(desk, other)
        ours.append(seal.begin(asked, welcomed(other.seals, asked)))
    with pytest.raises(NotOpened):
        other.seals.open(desk.call(ours[0]))
    for session in ours[1:]:
        other.seals.open(desk.call(session))
    other.seals.open(other.call(begun))


def replaced(desk: Desk, other: Desk) -> seal.Asked:
    """One gateway's hello to the node of another desk."""
    return seal.ask(desk.hello(), NODE_ID, other.seals.kem, desk.key.sign)


def welcomed(seals: Seals, asked: seal.Asked) -> m.Welcome:
    answer = seals.welcome(asked.hello)
    assert isinstance(answer, m.Welcome), answer
    return answer


async def test_all_gateways_together_have_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_seals, "SESSIONS_MAX", 3)
    seals = Seals(NODE_ID, SIGN, anybody, FakeClock(), "x25519")
    calls = []
    for number in range(5):
        asked = seal.ask(m.Hello(gateway_id=GatewayId(f"gw-{number}"), org_id=ORG), NODE_ID, seals.kem, SIGN)
        session = seal.begin(asked, welcomed(seals, asked))
        request = request_of("one", gateway_id=f"gw-{number}")
        index, channel = session.call()
        calls.append(m.SealedRequest(session=session.id, number=index, box=channel.seal(codec.encode(request))[1]))
    for call in calls[:2]:
        with pytest.raises(NotOpened):
            seals.open(call)
    assert [seals.open(call).request.gateway_id for call in calls[2:]] == ["gw-2", "gw-3", "gw-4"]


async def test_a_hello_counts_once(desk: Desk) -> None:
    asked = desk.asked()
    session = seal.begin(asked, welcomed(desk.seals, asked))
    assert desk.seals.welcome(asked.hello) == m.Unopened(reason="replayed")
    desk.seals.open(desk.call(session))


HELLOS: dict[str, Callable[[Desk], seal.Asked]] = {
    "another hub's word": lambda desk: desk.asked(desk.hello(hub=make_key("account"))),
    "one's own word": lambda desk: desk.asked(desk.hello(hub=desk.key)),
    "no word": lambda desk: desk.asked(replace(desk.hello(), membership=b"")),
    "a word for another organisation": lambda desk: desk.asked(replace(desk.hello(), org_id=OrgId("other"))),
    "a word that says less long": lambda desk: desk.asked(replace(desk.hello(), member_until_s=2**40)),
    "a word that has ended": lambda desk: desk.asked(desk.hello(until_s=desk.clock.wall_ms() // 1000 - CLOCKS_S - 1)),
    "for another node": lambda desk: desk.asked(node_id=NodeId(STRANGER.public)),
}


@pytest.mark.parametrize("name", HELLOS)
async def test_a_gateway_that_nobody_vouches_for(desk: Desk, name: str) -> None:
    assert desk.seals.welcome(HELLOS[name](desk).hello) == m.Unopened(reason="not_vouched")
    assert desk.seals.refused == {"not_vouched": 1}


@pytest.mark.parametrize("field", ["gateway_id", "session", "box", "signature"])
async def test_a_hello_that_was_altered(desk: Desk, field: str) -> None:
    hello = desk.asked().hello
    before = getattr(hello, field)
    after = STRANGER.public if field == "gateway_id" else bytes([before[0] ^ 1]) + before[1:]
    assert desk.seals.welcome(replace(hello, **{field: after})) == m.Unopened(reason="not_vouched")


async def test_a_hello_whose_secret_is_not_for_this_key(desk: Desk) -> None:
    """Signed by the gateway, and sealed to something else."""
    hello = replace(desk.asked().hello, box=bytes(96))
    hello = replace(hello, signature=desk.key.sign(seal.hello_bytes(hello, NODE_ID)))
    assert desk.seals.welcome(hello) == m.Unopened(reason="altered")


@pytest.mark.parametrize("org_id", [OrgId("other"), HUB_ORG, OrgId("")])
async def test_a_gateway_speaks_for_its_own_organisation(desk: Desk, org_id: OrgId) -> None:
    session = await desk.sessions.ready(NODE_ID)
    with pytest.raises(NotOpened) as refused:
        desk.seals.open(desk.call(session, org_id))
    assert refused.value.reason == "not_vouched"
    assert desk.seals.refused == {"not_vouched": 1}
    desk.seals.open(desk.call(session, ORG))


async def test_the_hubs_own_gateway_speaks_for_all() -> None:
    desk = Desk(HUB_ORG)
    await desk.start()
    session = await desk.sessions.ready(NODE_ID)
    for org_id in (ORG, OrgId("other"), HUB_ORG):
        assert desk.seals.open(desk.call(session, org_id)).request.org_id == org_id


async def test_a_call_names_the_gateway_that_sends_it(desk: Desk) -> None:
    """Its answer goes where it says."""
    session = await desk.sessions.ready(NODE_ID)
    with pytest.raises(WireError, match="another gateway"):
        desk.seals.open(desk.call(session, gateway_id=STRANGER.public))


async def test_what_a_gateway_seals_must_be_a_request(desk: Desk) -> None:
    session = await desk.sessions.ready(NODE_ID)
    number, channel = session.call()
    box = channel.seal(codec.encode(m.BodyPart(offset=0, data=b"x")))[1]
    with pytest.raises(WireError):
        desk.seals.open(m.SealedRequest(session=session.id, number=number, box=box))


async def test_a_call_is_opened_once_and_in_any_order(desk: Desk) -> None:
    session = await desk.sessions.ready(NODE_ID)
    calls = [desk.call(session) for _ in range(6)]
    for at in (3, 0, 5, 1, 2, 4):
        desk.seals.open(calls[at])
    for call in calls:
        with pytest.raises(NotOpened) as refused:
            desk.seals.open(call)
        assert refused.value.reason == "replayed"
    assert desk.seals.refused == {"replayed": 6}


async def test_an_altered_call_spoils_nothing(desk: Desk) -> None:
    session = await desk.sessions.ready(NODE_ID)
    call = desk.call(session)
    for at in range(0, len(call.box), 7):
        box = bytes([*call.box[:at], call.box[at] ^ 1, *call.box[at + 1 :]])
        with pytest.raises(NotOpened):
            desk.seals.open(replace(call, box=box))
    with pytest.raises(NotOpened):
        desk.seals.open(replace(call, number=call.number + 1))
    with pytest.raises(NotOpened):
        desk.seals.open(replace(call, number=2**32))
    desk.seals.open(call)


def test_a_machine_without_ml_kem_seals_with_what_it_has(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pair = seal.KemPair

    def made(suite: m.SuiteName) -> seal.KemPair:
        if suite != "x25519":
            raise UnsupportedAlgorithm("no ML-KEM")
        return pair(suite)

    monkeypatch.setattr(seal, "KemPair", made)
    clock = FakeClock()
    seals = Seals(NODE_ID, NODE.sign, anybody, clock)
    assert seals.kem.suite == "x25519"
    assert kem_check(clock)(NODE_ID, seals.kem)
    clock.advance(KEM_MS)
    assert seals.rotate()
    assert len(caplog.records) == 1, "it is said once"

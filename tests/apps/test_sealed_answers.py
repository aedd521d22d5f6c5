"""A sealed answer on its way from a node's outlet to a gateway's conversation, and all that somebody between the two may do to it."""

from collections.abc import Callable
from typing import NamedTuple, cast

import pytest
from clocks import FakeClock
from msgspec.structs import replace
from sealed_ends import CANARY, SUITES, Ends, request_of

from fallow.apps.gateway.conversation import Conversation, Unfit
from fallow.apps.node.outlet import Outlet
from fallow.core import relay
from fallow.model import messages as m
from fallow.model.call import Attempt
from fallow.model.ids import AttemptId, CallId, NodeId
from fallow.model.receipt import Usage
from fallow.ports import Bus
from fallow.wire import codec
from fallow.wire.commitment import Commitment
from fallow.wire.subjects import PART_BYTES_MAX

pytestmark = pytest.mark.anyio

HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)
USAGE = Usage(prompt_tokens=3, output_tokens=2)
TOKENS = (7, 8)
PIECES = (b"one ", b"two ", b"three")

Changed = Callable[[list[bytes]], list[bytes]]


class Carrier:
    """A broker that keeps what it carries."""

    def __init__(self) -> None:
        self.carried: list[bytes] = []

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        self.carried.append(data)


class Call(NamedTuple):
    """One call: the gateway's end, the node's, and what is between."""

    conversation: Conversation
    outlet: Outlet
    carrier: Carrier


def call_of(ends: Ends) -> Call:
    clock, carrier, request = FakeClock(), Carrier(), request_of()
    gateway, node = ends.call(codec.encode(request))
    attempt = Attempt(id=request.attempt_id, call_id=CallId("call"), node_id=NodeId("node"), number=1, asked_at_ms=clock.now_ms())
    conversation = Conversation(attempt, relay.ask(now_ms=clock.now_ms(), first_token_in_ms=1, keeps=False), clock)
    conversation.asked(request, request.body, ends.gateway.id, gateway)
    outlet = Outlet(cast(Bus, carrier), "subject", node, clock)
    outlet.commitment = Commitment(request.attempt_id, request.body, request.model_digest)
    return Call(conversation, outlet, carrier)


async def answered(call: Call) -> list[bytes]:
    """The whole answer, as it travels."""
    await call.outlet.part(PIECES[0], HEAD)
    await call.outlet.part(PIECES[1], None)
    await call.outlet.finish(PIECES[2], None, USAGE, TOKENS)
    assert not any(piece.strip() in data for piece in PIECES for data in call.carrier.carried)
    return call.carrier.carried


async def told(conversation: Conversation, data: list[bytes]) -> list[relay.Effect]:
    """What the caller's side is told of these bytes. The first that is refused ends it, as in the gateway."""
    effects: list[relay.Effect] = []
    for one in data:
        message = codec.to_gateway.read(one)
        assert isinstance(message, m.Sealed)
        try:
            conversation.take(message)
        except Unfit as unfit:
            conversation.hear(unfit.event)
    conversation.hear(relay.CallerLeft())  # who waits for more ends here, and hears nothing if all was over before
    while (effect := await conversation.next()) is not None:
        effects.append(effect)
    return effects


WHOLE = [*(relay.Deliver(piece, None if at else HEAD) for at, piece in enumerate(PIECES)), relay.Finish(USAGE)]


@pytest.fixture(scope="module", params=SUITES)
def ends(request: pytest.FixtureRequest) -> Ends:
    return Ends(request.param)


def flipped(data: bytes) -> bytes:
    """With a bit of what is sealed flipped."""
    sealed = codec.to_gateway.read(data)
    assert isinstance(sealed, m.Sealed)
    return codec.encode(replace(sealed, box=sealed.box[:-1] + bytes([sealed.box[-1] ^ 1])))


async def test_an_answer_comes_as_it_was_said(ends: Ends) -> None:
    call = call_of(ends)
    assert await told(call.conversation, await answered(call)) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda parts: [part for part in parts for _ in range(2)], id="each twice"),
        pytest.param(lambda parts: [*parts, *parts], id="all twice"),
        pytest.param(lambda parts: [parts[0], parts[1], parts[0], parts[2]], id="an early one again"),
        pytest.param(lambda parts: [*parts, flipped(parts[2])], id="altered after the end"),
        pytest.param(lambda parts: [parts[0], flipped(parts[0]), *parts[1:]], id="altered and there already"),
    ],
)
async def test_what_does_no_harm(ends: Ends, change: Changed) -> None:
    call = call_of(ends)
    assert await told(call.conversation, change(await answered(call))) == WHOLE


@pytest.mark.parametrize(
    ("change", "pieces", "code"),
    [
        pytest.param(lambda parts: [], 0, None, id="nothing"),
        pytest.param(lambda parts: parts[:2], 2, None, id="cut off"),
        pytest.param(lambda parts: parts[1:], 0, "answer_gap", id="its beginning is missing"),
        pytest.param(lambda parts: [parts[0], parts[2]], 1, "answer_gap", id="its middle is missing"),
        pytest.param(lambda parts: [parts[2]], 0, "answer_gap", id="only its end"),
        pytest.param(lambda parts: [parts[1], parts[0], parts[2]], 0, "answer_gap", id="disordered"),
        pytest.param(lambda parts: parts[::-1], 0, "answer_gap", id="backwards"),
        pytest.param(lambda parts: [flipped(parts[0]), *parts], 0, "not_opened", id="its beginning is altered"),
        pytest.param(lambda parts: [*parts[:2], flipped(parts[2]), parts[2]], 2, "not_opened", id="its end is altered"),
    ],
)
async def test_what_ends_the_attempt(ends: Ends, change: Changed, pieces: int, code: str | None) -> None:
    """What was delivered before is right, and the answer is never called whole."""
    call = call_of(ends)
    effects = await told(call.conversation, change(await answered(call)))
    assert effects[:pieces] == WHOLE[:pieces]
    assert not any(isinstance(effect, relay.Deliver | relay.Finish) for effect in effects[pieces:])
    assert [effect.failure.code for effect in effects if isinstance(effect, relay.Fail)] == ([code] if code else [])


async def test_another_call_s_answer(ends: Ends) -> None:
    call, other = call_of(ends), call_of(ends)
    effects = await told(call.conversation, await answered(other))
    assert [effect.failure.code for effect in effects if isinstance(effect, relay.Fail)] == ["not_opened"]


@pytest.mark.parametrize("change", [{"data": b"threE"}, {"tokens": (7,)}, {"usage": None}, {"digest": b""}, {"digest": bytes(32)}], ids=str)
async def test_a_node_that_commits_to_another_answer(ends: Ends, change: dict[str, object]) -> None:
    call, honest = call_of(ends), call_of(ends)
    sent = await answered(honest)
    final = codec.inner.read(honest_open(honest, sent))
    assert isinstance(final, m.Final)
    await call.outlet.part(PIECES[0], HEAD)
    await call.outlet.part(PIECES[1], None)
    await call.outlet._seal(replace(final, **change))
    effects = await told(call.conversation, call.carrier.carried)
    assert effects[:2] == WHOLE[:2]
    assert [effect.failure.code for effect in effects if isinstance(effect, relay.Fail)] == ["answer_malformed"]


def honest_open(call: Call, sent: list[bytes]) -> bytes:
    """The last message of an answer, as its gateway reads it."""
    last = codec.to_gateway.read(sent[-1])
    assert isinstance(last, m.Sealed)
    assert call.conversation.channel is not None
    return call.conversation.channel.open(last.index, last.box)


@pytest.mark.parametrize("pads", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("size", [0, 1, PART_BYTES_MAX - 1, PART_BYTES_MAX, PART_BYTES_MAX + 1])
@pytest.mark.parametrize("tokens", [0, 1, m.TOKENS_MAX, m.TOKENS_MAX + 1])
async def test_the_largest_last_message_fits(ends: Ends, size: int, tokens: int, pads: bool) -> None:
    """A long answer in one piece, with a number for each token: the broker carries every message of it."""
    call = call_of(ends)
    call.outlet.channel.pads = pads
    call.outlet.grant(m.Credit(attempt_id=AttemptId("attempt"), until_bytes=2**30))
    call.conversation.granted_bytes = 2**30
    await call.outlet.finish(CANARY[:1] * size, HEAD, USAGE, (2**32 - 1,) * tokens)
    effects = await told(call.conversation, call.carrier.carried)
    assert effects[-1] == relay.Finish(USAGE)
    assert b"".join(effect.data for effect in effects if isinstance(effect, relay.Deliver)) == CANARY[:1] * size

"""What somebody on the way does to messages ends attempts with a word, counts against no node, and never makes an answer look whole."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from fallow.apps.node.attached import PassedAnswer
from fallow.apps.node.continuing import ContinuedAnswer
from fallow.apps.node.served import NO_PAST
from fallow.core.standing import FAULTS
from fallow.model import messages as m
from fallow.model.ids import AttemptId, NodeId
from fallow.wire import codec, subjects

if TYPE_CHECKING:
    from tests.apps.one_loop import FakeServed, Network, request_of, turns, until
else:
    from one_loop import FakeServed, Network, request_of, turns, until

pytestmark = pytest.mark.anyio

HOUR_S = 3_600.0
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)


async def refused(network: Network, reason: str) -> float:
    """How many answers were refused for this reason."""
    page = (await network.get("/metrics")).body.decode()
    name = f'fallow_answers_refused_total{{reason="{reason}"}} '
    return next(float(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))


async def test_a_welcome_that_cannot_be_read_is_no_fault_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Network() as network:
        node = await network.play("node-h")
        monkeypatch.setattr(node.seals, "welcome", lambda hello: m.KeyAnswer())
        call = await network.ask().done()
        assert (call.status, call.code) == (502, "not_opened")
        assert "not_opened" not in FAULTS


async def test_an_altered_answer_is_counted_and_not_taken() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=True)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b"one ", head=EVENTS_HEAD))
        subject = subjects.answer(request.gateway_id, NodeId("node-h"), request.attempt_id)
        await network.hand.publish(subject, codec.encode(m.Sealed(index=1, box=bytes(40))))
        await call.done()
        assert call.chunks[0] == b"one "
        assert b'"stream_interrupted"' in call.chunks[1]
        assert await refused(network, "altered") == 1


@pytest.mark.parametrize("data", [b"", b"\x01", codec.encode(m.Sealed(index=1, box=bytes(40)))], ids=["nothing", "no-message", "altered"])
async def test_an_altered_body_ends_the_attempt_at_once(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for the rest would be blamed for not having it."""
    monkeypatch.setattr("fallow.apps.node.job.BODY_WAIT_S", HOUR_S)
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        await network.other.ask("node-a", request_of("one", body=b"{", body_bytes=2))
        await network.hand.publish(subjects.body(NodeId("node-a"), AttemptId("one")), data)
        await until(lambda: network.other.heard_of(m.Final, "one"))
        failure = network.other.heard_of(m.Final, "one")[0].failure
        assert failure is not None
        assert failure.code == "not_opened"
        assert served.bodies == []
        await network.works()


async def test_what_comes_after_a_whole_body_changes_nothing() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        await network.other.ask("node-a", request_of("one", body=b"{", body_bytes=2))
        await network.other.send_body("node-a", "one", m.BodyPart(offset=1, data=b"}"))
        await network.hand.publish(subjects.body(NodeId("node-a"), AttemptId("one")), b"\x01")
        await until(lambda: network.other.heard_of(m.Final, "one"))
        assert network.other.heard_of(m.Final, "one")[0].failure is None


async def test_who_says_hello_and_cannot_be_read_is_told() -> None:
    """Else it would wait, and hold the silence against the node."""
    async with Network() as network:
        await network.add("node-a", FakeServed())
        gateway_id = network.other.sessions.asker.hello.gateway_id
        reply = subjects.answer(gateway_id, NodeId("node-a"), AttemptId("attempt"))
        await network.hand.publish(subjects.control(NodeId("node-a")), b"\x01\x99", reply)
        await turns()
        assert network.other.heard["attempt"] == [m.Unopened(reason="altered")]


# what says that all came
class Chunks:
    """A server's answer in these chunks. The connection tells the end with the last of them, or only after it."""

    head = EVENTS_HEAD

    def __init__(self, chunks: list[bytes], *, tells_late: bool) -> None:
        self._chunks = chunks
        self._tells_late = tells_late
        self.is_complete = False

    async def body(self) -> AsyncIterator[bytes]:
        for at, chunk in enumerate(self._chunks):
            self.is_complete = not self._tells_late and at == len(self._chunks) - 1
            yield chunk


EVENT, DONE = b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"


@pytest.mark.parametrize("tells_late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("is_continued", [False, True], ids=["passed", "continued"])
@pytest.mark.parametrize("chunks", [[EVENT, EVENT, DONE], [EVENT, EVENT + DONE], [EVENT + EVENT + DONE]], ids=["alone", "joined", "all"])
async def test_done_goes_with_the_last_message(chunks: list[bytes], is_continued: bool, tells_late: bool) -> None:
    """If that gets lost, the caller has not been told that the answer is whole."""
    source: Any = Chunks(chunks, tells_late=tells_late)
    answer = ContinuedAnswer(source, EVENTS_HEAD, NO_PAST) if is_continued else PassedAnswer(source)
    pieces = [piece async for piece in answer.pieces()]
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert b"".join(piece.data for piece in pieces) == b"".join(chunks)
    assert DONE in pieces[-1].data

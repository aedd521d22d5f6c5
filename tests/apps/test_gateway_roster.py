"""What a gateway believes: which nodes there are, whose keys it is shown, and nothing of what is nonsense."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from one_key import OneKeyDesk

from fallow.adapters.memory_bus import MemoryBus
from fallow.adapters.nkey import make_key
from fallow.apps import card_check
from fallow.apps.gateway import keys
from fallow.apps.log_limit import LINES_MAX, LogLimit
from fallow.apps.node.node import Node
from fallow.core import credit
from fallow.core.cards import CARD_LIFE_MAX_MS
from fallow.core.match.filter import FREE
from fallow.core.roster import SUSPECTED_AFTER_MS
from fallow.model import messages as m
from fallow.model.card import Card
from fallow.model.errors import Failure, InvalidApiKey
from fallow.model.ids import AttemptId, NodeId, OrgId
from fallow.model.offer import Offer, Price, Speed
from fallow.model.receipt import Usage
from fallow.wire import codec, subjects
from fallow.wire.sign import card_verifies, signed_card

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import (
        GATEWAY,
        KEY,
        MODEL,
        WALL_BEGINNING_MS,
        FakeServed,
        Network,
        anybody,
        beat_of,
        card_of,
        offer_of,
        request_of,
        turns,
        until,
    )
else:
    from one_loop import (
        GATEWAY,
        KEY,
        MODEL,
        WALL_BEGINNING_MS,
        FakeServed,
        Network,
        anybody,
        beat_of,
        card_of,
        offer_of,
        request_of,
        turns,
        until,
    )

pytestmark = pytest.mark.anyio

JSON_HEAD = m.Head(status=200, content_type="application/json", engine_us=5)
EVENTS_HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=5)


# the roster
async def test_a_node_that_says_it_leaves_is_forgotten() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        await node.beat("leave")
        await turns()
        assert network.gateway.roster.members() == {}
        refused = await network.ask().done()
        assert (refused.status, refused.code, refused.headers["fallow-attempts"]) == (503, "no_node", "0")


async def test_a_node_that_falls_silent_is_forgotten() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        network.clock.advance(5_000)
        await node.beat()
        await turns()
        network.clock.advance(5_000)
        await asyncio.sleep(0.15)  # one sweep
        assert set(network.gateway.roster.members()) == {"node-h"}
        network.clock.advance(3_000)
        await until(lambda: not network.gateway.roster.members())


def may_be_sent_to(network: Network) -> set[str]:
    """The nodes that nothing keeps a new call from."""
    roster = network.gateway.roster
    [shelf] = roster.market.shelves(MODEL)
    return {node_id for node_id, row in shelf.row_of.items() if shelf.columns.halt[row] == FREE and node_id not in shelf.on_probation}


async def test_a_node_that_misses_a_heartbeat_is_left_aside_until_it_is_heard() -> None:
    async with Network() as network:
        silent, other = await network.play("node-a"), await network.play("node-b")
        network.clock.advance(SUSPECTED_AFTER_MS + 1)
        await other.beat()
        await turns()
        await network.gateway.roster.refresh()
        assert may_be_sent_to(network) == {"node-b"}
        assert set(network.gateway.roster.members()) == {"node-a", "node-b"}
        await silent.beat()
        await turns()
        assert may_be_sent_to(network) == {"node-a", "node-b"}


async def test_a_gateway_that_hears_nobody_suspects_nobody() -> None:
    async with Network() as network:
        for name in ("node-a", "node-b", "node-c"):
            await network.play(name)
        network.clock.advance(SUSPECTED_AFTER_MS + 1)
        await network.gateway.roster.refresh()
        assert may_be_sent_to(network) == {"node-a", "node-b", "node-c"}


@pytest.mark.parametrize("code", ["node_unreachable", "node_silent"])
async def test_a_node_that_an_attempt_did_not_find_is_suspected_not_forgotten(code: str) -> None:
    async with Network() as network:
        node = await network.play("node-a")
        await network.play("node-b")
        roster = network.gateway.roster
        roster.heard(NodeId("node-a"), Failure(code=code, message=""))
        await roster.refresh()
        assert set(roster.members()) == {"node-a", "node-b"}
        assert may_be_sent_to(network) == {"node-b"}
        network.clock.advance(1_500)  # the back-off is over, but nobody has heard it yet
        await roster.refresh()
        assert may_be_sent_to(network) == {"node-b"}
        await node.beat()
        await turns()
        [shelf] = roster.market.shelves(MODEL)
        assert shelf.on_probation == ({"node-a"} if code == "node_silent" else set())  # who only went owes nothing
        roster.heard(NodeId("node-a"), None)
        assert may_be_sent_to(network) == {"node-a", "node-b"}


async def test_who_leaves_is_forgotten_and_comes_back_as_good_as_before() -> None:
    async with Network() as network:
        node = await network.play("node-a")
        await network.play("node-b")
        network.gateway.roster.heard(NodeId("node-a"), Failure(code="leaving", message=""))
        assert set(network.gateway.roster.members()) == {"node-b"}
        await node.beat()
        await network.knows("node-a")
        assert may_be_sent_to(network) == {"node-a", "node-b"}


async def test_a_node_that_went_away_in_trouble_is_not_as_good_as_new() -> None:
    """Else it would only have to be restarted."""
    async with Network() as network:
        node = await network.play("node-a")
        await network.play("node-b")
        network.gateway.roster.heard(NodeId("node-a"), Failure(code="engine_failed", message=""))
        await node.beat("leave")
        await turns()
        await node.beat()
        await network.knows("node-a")
        assert may_be_sent_to(network) == {"node-b"}


async def test_what_attempts_tell_is_a_nodes_standing() -> None:
    async with Network() as network:
        await network.play("node-a")
        roster, node_id = network.gateway.roster, NodeId("node-a")
        roster.heard(node_id, None, promised_s=1.0, took_s=1.9)
        roster.heard(node_id, None, promised_s=1.0, took_s=2.1)
        roster.heard(node_id, None, promised_s=1.0, took_s=1.0, kept=False)
        roster.heard(node_id, None)
        roster.heard(node_id, None, left=True)
        for code in ("yielding", "busy", "invalid_request", "broker_lost"):
            roster.heard(node_id, Failure(code=code, message=""))
        standing = roster.market.standings.of(node_id, network.clock.now_ms() / 1000)
        assert (standing.ends, standing.faults, standing.promises, standing.kept) == (4.0, 0.0, 3.0, 1.0)
        assert may_be_sent_to(network) == {"node-a"}
        roster.heard(node_id, Failure(code="engine_stalled", message=""))
        assert roster.market.standings.of(node_id, network.clock.now_ms() / 1000).faults == 1.0
        assert may_be_sent_to(network) == set()


async def test_a_heartbeat_that_names_another_node_than_its_subject_is_ignored() -> None:
    async with Network() as network:
        await network.add("node-b", FakeServed())
        await network.hand.publish("hb.node-a", codec.encode(beat_of("node-b", 2**60, state="leave")))
        await network.hand.publish("hb.node-a", codec.encode(beat_of("node-c")))
        await turns()
        assert set(network.gateway.roster.members()) == {"node-b"}
        await network.works()


async def test_an_old_heartbeat_changes_nothing() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        await node.beat()
        await network.hand.publish("hb.node-h", codec.encode(beat_of("node-h", 1, state="leave", offers=())))
        await turns()
        assert len(network.gateway.roster.offers()) == 1


async def test_a_stranger_is_asked_for_its_card_before_it_gets_work() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        await node.beat("leave")
        beat = m.Heartbeat(node_id=NodeId("node-h"), sequence=9, state="run", card_sequence=1, loads=())
        await network.hand.publish("hb.node-h", codec.encode(beat))
        await turns()
        assert network.gateway.roster.offers() == []
        await until(lambda: node.heard_of(m.Introduce))
        assert node.heard_of(m.Introduce) == [m.Introduce(gateway_id=network.gateway.exchange.gateway_id)]


# cards
class Signer:
    """A node with a key of its own, which a test plays: its cards, and heartbeats that bring them."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._key = make_key("user")
        self.node_id = NodeId(self._key.public)
        self._sequence = 0

    def card(self, sequence: int = 1, **more: Any) -> Card:
        """Signed as it should be."""
        return signed_card(msgspec.structs.replace(card_of(self.node_id, sequence=sequence), **more), self._key.sign)

    async def beat(self, card: Card | None, *, card_sequence: int | None = None, decode: float = 1.0) -> None:
        self._sequence += 1
        offer = offer_of(self.node_id, speed=Speed(decode_tokens_per_s=decode))
        beat = msgspec.structs.replace(
            beat_of(self.node_id, self._sequence, offers=(offer,)),
            card=card,
            card_sequence=card.sequence if card is not None else card_sequence,
        )
        await self._network.hand.publish(f"hb.{self.node_id}", codec.encode(beat))
        await turns()

    @property
    def believed(self) -> Card | None:
        """What the gateway believes of it; without a card it offers nothing."""
        card = self._network.gateway.roster.card(self.node_id)
        assert (card is not None) == bool(self._network.gateway.roster.offers())
        return card


def tampered(signer: Signer) -> Card:
    return msgspec.structs.replace(signer.card(2), region="elsewhere")


def unsigned(signer: Signer) -> Card:
    return msgspec.structs.replace(signer.card(2), signature=b"")


def signed_by_another(signer: Signer) -> Card:
    return signed_card(signer.card(2), make_key("user").sign)


def expired(signer: Signer) -> Card:
    return signer.card(2, expires_at_ms=WALL_BEGINNING_MS)


def eternal(signer: Signer) -> Card:
    return signer.card(2, expires_at_ms=WALL_BEGINNING_MS + CARD_LIFE_MAX_MS + 1)


def older(signer: Signer) -> Card:
    return signer.card(0)


def another_of_the_same_number(signer: Signer) -> Card:
    return signer.card(1, org_id=OrgId("other"))


NEVER_GOOD = [(tampered, "signature"), (unsigned, "signature"), (signed_by_another, "signature"), (expired, "expired"), (eternal, "life")]
REPLAYED = [(older, "replayed"), (another_of_the_same_number, "replayed")]
Bad = Callable[[Signer], Card]


async def refused(network: Network, reason: str) -> int:
    page = (await network.get("/metrics")).body.decode()
    [line] = [line for line in page.splitlines() if line.startswith(f'fallow_cards_refused_total{{reason="{reason}"}}')]
    return int(float(line.split()[-1]))


@pytest.mark.parametrize(("bad", "reason"), NEVER_GOOD)
async def test_a_node_whose_card_does_not_verify_gets_no_calls(bad: Bad, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Network(verify=card_verifies) as network:
        signer = Signer(network)
        assert await refused(network, reason) == 0
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await signer.beat(bad(signer))
        assert signer.believed is None
        assert (await network.get("/fallow/nodes")).json["nodes"] == []
        assert (await network.ask().done()).code == "no_node"
        assert await refused(network, reason) == 3
        assert [record.getMessage().count(signer.node_id) for record in caplog.records] == [1], "it is said once"
        await signer.beat(signer.card(3))
        assert signer.believed == signer.card(3)


@pytest.mark.parametrize(("bad", "reason"), NEVER_GOOD + REPLAYED)
async def test_a_good_card_stays_when_a_bad_one_comes(bad: Bad, reason: str) -> None:
    async with Network(verify=card_verifies) as network:
        signer = Signer(network)
        await signer.beat(signer.card())
        await signer.beat(bad(signer), decode=2.0)
        assert signer.believed == signer.card()
        assert [offer.speed.decode_tokens_per_s for offer in network.gateway.roster.offers()] == [1.0], "nor what it offers with it"
        await signer.beat(None, card_sequence=bad(signer).sequence)
        assert signer.believed == signer.card()
        assert await refused(network, reason) == 1
        [node] = (await network.get("/fallow/nodes")).json["nodes"]
        assert node["node_id"] == signer.node_id
        await signer.beat(signer.card(5))
        assert signer.believed == signer.card(5)


async def test_a_card_that_expires_must_be_renewed() -> None:
    async with Network(verify=card_verifies) as network:
        signer = Signer(network)
        await signer.beat(signer.card(expires_at_ms=WALL_BEGINNING_MS + 1_000))
        network.clock.advance(999)
        await signer.beat(None, card_sequence=1)
        assert signer.believed is not None
        network.clock.advance(1)
        await signer.beat(None, card_sequence=1)
        assert signer.believed is None
        await network.gateway.roster.refresh()
        asked = network.broker.sent_to(f"n.{signer.node_id}.ctl")
        assert [codec.to_node.read(data) for data in asked] == [m.Introduce(gateway_id=GATEWAY)]
        await signer.beat(signer.card(2))
        assert signer.believed == signer.card(2)


async def test_a_node_whose_card_was_refused_is_not_asked_for_it_again_and_again() -> None:
    async with Network(verify=card_verifies) as network:
        signer = Signer(network)

        async def asked() -> int:
            await signer.beat(None, card_sequence=2)
            await network.gateway.roster.refresh()
            return len(network.broker.sent_to(f"n.{signer.node_id}.ctl"))

        await signer.beat(unsigned(signer))
        assert [await asked() for _ in range(3)] == [0, 0, 0]
        network.clock.advance(card_check.ASK_AGAIN_MS)
        assert await asked() == 1


async def test_who_was_believed_since_is_asked_at_once() -> None:
    async with Network(verify=card_verifies) as network:
        signer = Signer(network)
        await signer.beat(unsigned(signer))
        await signer.beat(signer.card(3))
        await signer.beat(None, card_sequence=4)
        await network.gateway.roster.refresh()
        assert len(network.broker.sent_to(f"n.{signer.node_id}.ctl")) == 1


async def test_only_so_many_refused_cards_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_check, "REFUSED_MAX", 2)
    async with Network(verify=card_verifies) as network:
        signers = [Signer(network) for _ in range(3)]
        for signer in signers:
            await signer.beat(unsigned(signer))
        for signer in signers:
            await signer.beat(None, card_sequence=2)
        await network.gateway.roster.refresh()
        asked = [len(network.broker.sent_to(f"n.{signer.node_id}.ctl")) for signer in signers]
        assert asked == [1, 0, 0], "the first was forgotten"


async def test_refused_cards_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A node's card is logged once for each reason, and of many nodes only so many, by the limit that every log has."""
    log_limit = LogLimit()
    caplog.handler.addFilter(log_limit)
    try:
        async with Network(verify=card_verifies) as network:
            with caplog.at_level(logging.WARNING):
                signer = Signer(network)
                for _ in range(3):
                    await signer.beat(unsigned(signer))
                assert len(caplog.records) == 1
                for _ in range(LINES_MAX + 5):
                    signer = Signer(network)
                    await signer.beat(unsigned(signer))
                assert len(caplog.records) == LINES_MAX
                assert await refused(network, "signature") == 3 + LINES_MAX + 5
        assert "left out" in caplog.messages[-1]
    finally:
        caplog.handler.removeFilter(log_limit)


async def test_real_nodes_are_believed_by_their_keys() -> None:
    async with Network(verify=card_verifies) as network:
        key, stranger = make_key("user"), make_key("user")
        for node_id, sign in ((key.public, key.sign), (stranger.public, key.sign)):
            network._start(Node(card_of(node_id), [FakeServed()], MemoryBus(network.broker), network.clock, sign, anybody).run)
        await network.knows(key.public)
        await turns()
        assert {offer.node_id for offer in network.gateway.roster.offers()} == {key.public}
        await network.works()


# nonsense
GARBAGE = [
    b"",
    b"\x00",
    b"\x02",
    b"\x03" + codec.encode(m.Alive())[1:],
    b"\x02" + b"\x91" * 50_000,
    b"\xff" * 300,
    b"{}",
    codec.encode(beat_of("node-a"))[:-5],
    codec.encode(request_of("x"))[:-1],
    codec.encode(m.Final(index=0))[:-1],
    codec.encode(m.SealedRequest(session=bytes(16), number=0, box=b"x"))[:-1],
    codec.encode(m.Hello(gateway_id=GATEWAY, org_id=OrgId("home"), session=bytes(17))),
]
SUBJECTS = [
    "n.node-a.req",
    "n.node-a.body.x",
    "n.node-a.ctl",
    "hb.node-a",
    "hub.key",
    "rsp.gw-1.node-a.x",
    "rsp.gw-1.x",
    "rsp.gw-1.a.b.c.d",
]
KINDS: list[m.Message] = [
    request_of("x"),
    m.BodyPart(offset=0, data=b"x"),
    m.Cancel(attempt_id=AttemptId("x")),
    m.Credit(attempt_id=AttemptId("x"), until_bytes=2**40),
    m.Lease(gateway_id=request_of("x").gateway_id, attempt_ids=(AttemptId("x"),)),
    m.Accepted(),
    m.Part(index=0, data=b"x"),
    m.Final(index=0, data=b"x"),
    m.Alive(),
    m.KeyQuery(key_digest=b"x"),
    m.KeyAnswer(),
    m.Hello(gateway_id=GATEWAY, org_id=OrgId("home"), session=bytes(16), kid=bytes(8), box=b"x"),
    m.Welcome(share=bytes(32), confirm=bytes(32)),
    m.SealedRequest(session=bytes(16), number=0, box=b"x"),
    m.Sealed(index=0, box=b"x"),
    m.Unopened(reason="no_session"),
    m.Lost(),
]


@pytest.mark.parametrize("subject", SUBJECTS)
async def test_garbage_changes_nothing(subject: str) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        before = network.gateway.roster.offers()
        for data in [*GARBAGE, *map(codec.encode, KINDS)]:
            await network.hand.publish(subject, data, "rsp.gw-1.node-a.x")
            await network.hand.publish(subject, data)
        await turns()
        assert network.gateway_runs
        after = network.gateway.roster.offers()
        assert after == before
        await network.works()
        assert len(served.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("data", [*GARBAGE, codec.encode(m.KeyAnswer()), codec.encode(beat_of("node-h"))])
async def test_garbage_in_the_middle_of_an_answer_breaks_the_attempt(data: bytes, stream: bool) -> None:
    """From the node that was asked; what others say is no part of the answer."""
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=stream)
        request = await node.request()
        await node.say(request, m.Part(index=0, data=b"one ", head=EVENTS_HEAD))
        await network.hand.publish(subjects.answer(request.gateway_id, NodeId("node-x"), request.attempt_id), data)
        await turns()
        assert network.gateway.exchange.under_way == 1
        await network.hand.publish(subjects.answer(request.gateway_id, NodeId("node-h"), request.attempt_id), data)
        await call.done()
        if stream:
            assert call.chunks[0] == b"one "
            assert b'"stream_interrupted"' in call.chunks[1]
        else:
            assert (call.status, call.code) == (502, "not_opened"), "anybody on the way can have said it"
        await turns()
        assert node.heard_of(m.Cancel) == [m.Cancel(attempt_id=request.attempt_id)]


async def test_a_node_that_sends_more_than_it_was_granted_is_cut_off() -> None:
    """Else a slow reader's answer would pile up in the gateway."""
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=True)
        call.reads.clear()
        request = await node.request()
        part = b"x" * subjects.PART_BYTES_MAX
        for index in range(2 + 2 * credit.ANSWER_WINDOW_BYTES // len(part)):
            await node.say(request, m.Part(index=index, data=part, head=None if index else EVENTS_HEAD))
        await turns()
        call.reads.set()
        await call.done()
        assert b'"stream_interrupted"' in call.chunks[-1]
        assert len(call.body) <= credit.ANSWER_WINDOW_BYTES + 2 * len(part)


@pytest.mark.parametrize("node_id", ["nöde", "no*de", "no de"])
async def test_a_heartbeat_whose_name_fits_no_subject_does_not_end_the_gateway(node_id: str) -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        beat = m.Heartbeat(node_id=NodeId(node_id), sequence=1, state="run", card_sequence=1, loads=())
        await network.hand.publish(f"hb.{node_id}", codec.encode(beat))
        await asyncio.sleep(0.15)  # one sweep
        assert network.gateway_runs
        await network.works()


@pytest.mark.parametrize(
    "offer",
    [
        pytest.param(offer_of("ghost"), id="for another node"),
        pytest.param(offer_of("no.de"), id="for a name that fits no subject"),
        pytest.param(offer_of("node-a", speed=Speed(decode_tokens_per_s=math.nan)), id="at a speed that isn't a number"),
        pytest.param(offer_of("node-a", speed=Speed(decode_tokens_per_s=-1.0)), id="at a negative speed"),
        pytest.param(msgspec.structs.replace(offer_of("node-a"), price=Price(output_micro_per_munit=-5)), id="at a negative price"),
    ],
)
async def test_an_absurd_offer_is_not_believed(offer: Offer) -> None:
    async with Network() as network:
        await network.add("node-b", FakeServed())
        await network.hand.publish("hb.node-a", codec.encode(beat_of("node-a", offers=(offer,))))
        await turns()
        call = await network.ask().done()
        assert (call.status, call.headers["fallow-node"], call.headers["fallow-attempts"]) == (200, "node-b", "1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(None, id="missing"),
        pytest.param(m.Head(status=42, content_type="a/b", engine_us=1), id="no status"),
        pytest.param(m.Head(status=200, content_type="a/b\r\nx: y", engine_us=1), id="two headers in one"),
        pytest.param(m.Head(status=200, content_type="a/ł", engine_us=1), id="no Latin-1"),
    ],
)
async def test_an_answer_with_a_wrong_head_is_a_failed_attempt(head: m.Head | None, stream: bool) -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask(stream=stream)
        await node.say(await node.request(), m.Final(index=0, data=b"{}", head=head))
        await call.done()
        assert call.status == 502
        assert call.headers["content-type"] == "application/json"
        assert call.code


async def test_a_usage_below_zero_breaks_no_counter() -> None:
    async with Network() as network:
        node = await network.play("node-h")
        call = network.ask()
        usage = Usage(prompt_tokens=-1, output_tokens=-1)
        await node.say(await node.request(), m.Final(index=0, data=b"{}", head=JSON_HEAD, usage=usage, digest=bytes(32)))
        await call.done()
        assert (call.status, call.code) == (502, "answer_malformed")
        assert b"fallow_calls_total" in (await network.get("/metrics")).body


# keys
@pytest.mark.parametrize(("key", "code"), [("fk-wrong", "invalid_api_key"), ("", "invalid_api_key"), ("k" * 300, "invalid_api_key")])
async def test_a_key_that_nobody_knows(key: str, code: str) -> None:
    async with Network() as network:
        served = FakeServed()
        await network.add("node-a", served)
        call = await network.ask(key=key).done()
        assert (call.status, call.code) == (401, code)
        assert served.bodies == []


async def test_known_keys_work_while_the_hub_is_away_and_others_do_not() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        await network.works()
        await network.hub_bus.close()
        await network.works()
        call = await network.ask(key="fk-other").done()
        assert (call.status, call.code) == (503, "broker_lost")
        assert int(call.headers["retry-after"]) >= 1
        assert len(network.broker.sent_to("hub.key")) == 2


async def test_the_hub_is_asked_once_for_a_key() -> None:
    async with Network() as network:
        await network.add("node-a", FakeServed())
        for _ in range(3):
            await network.works()
        assert len(network.broker.sent_to("hub.key")) == 1
        assert KEY.encode() not in b"".join(data for _, data in network.broker.sent), "the key itself stays at the gateway"


@pytest.mark.parametrize("seen_before", [False, True])
async def test_many_calls_at_once_with_one_good_key_are_all_let_in(seen_before: bool) -> None:
    async with Network() as network:
        if seen_before:
            await network.gateway.keys.check(f"Bearer {KEY}".encode())
            network.clock.advance(keys.FRESH_MS + 1)
        await network.add("node-a", FakeServed(slots=200))
        calls = [network.ask() for _ in range(100)]
        statuses = [(await call.done()).status for call in calls]
        assert statuses.count(200) == 100, f"{statuses.count(503)} were turned away"


async def test_a_known_key_is_asked_for_again_after_a_minute_but_stays_good_without_the_hub() -> None:
    async with Network() as network:
        authorization = f"Bearer {KEY}".encode()
        grant = await network.gateway.keys.check(authorization)
        assert network.gateway.keys.recall(authorization) == grant
        network.clock.advance(keys.FRESH_MS + 1)
        assert network.gateway.keys.recall(authorization) is None
        assert await network.gateway.keys.check(authorization) == grant
        assert len(network.broker.sent_to("hub.key")) == 2
        await network.hub_bus.close()
        network.clock.advance(keys.FRESH_MS + 1)
        assert await network.gateway.keys.check(authorization) == grant


async def test_a_key_that_becomes_known_is_let_in_after_a_moment() -> None:
    """That nobody knows a key is remembered for two seconds only: keys are made while gateways run."""
    async with Network() as network:
        for _ in range(2):
            with pytest.raises(InvalidApiKey):
                await network.gateway.keys.check(b"Bearer fk-new")
        assert len(network.broker.sent_to("hub.key")) == 1
        await network.hub_bus.close()
        new_hub = MemoryBus(network.broker)
        async with asyncio.TaskGroup() as group:
            await OneKeyDesk(new_hub, "fk-new", OrgId("other")).start(group)
            network.clock.advance(keys.UNKNOWN_FRESH_MS + 1)
            assert (await network.gateway.keys.check(b"Bearer fk-new")).org_id == "other"

"""A broker that alters, drops, doubles, reorders, replays and redirects what it carries: nobody gets a wrong answer or pays for one."""

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import requests
from bench.stub_engine import right_answer
from echoing import Engine
from histories import Cut, Done, Event, Failed, Seen, Text, judge_all
from hostile import Meddle, Message, Relay, honest
from running import Service, node_id_of, until
from test_rolling import END_S, MODEL, Long, Site
from trusted import DAY_S, Tap, connections

from fallow.adapters.clock import SystemClock
from fallow.adapters.nkey import KeyPair, kept_key, make_key
from fallow.adapters.operator import Operator
from fallow.apps.joining import join, read_invitation
from fallow.apps.node.served import Lane
from fallow.core.cards import CARD_LIFE_MS
from fallow.core.standing import FAULTS
from fallow.model import messages as m
from fallow.model.card import Card, Hardware
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.offer import Load, Price
from fallow.wire import codec, subjects
from fallow.wire.openai import CHAT
from fallow.wire.sign import signed_card
from fallow.wire.subjects import Role

WORDS = 12
LARGE = b" " * 400_000
"""Makes a request's body so large that it takes three messages."""
LOSSY_CALLS = 24
CALLERS = 6
DROPPED, DOUBLED, HELD = 0.05, 0.3, 0.05
BEGINNING, OFFSETS = 32, 40
"""The first bytes are all flipped, each in its turn, and then so many of the others."""
LOST = frozenset({"node_silent"})
"""After a flip a hello may be taken for one too many: that is as good as a loss, which looks like silence."""
LOST_SHARE = 20
BEATS, COPIES = 4, 12
MINE = "mine"
"""A model that only a machine of the last version has."""
FLOOD_BYTES = 250_000
FLOOD_MAX = 400


class Wild(Site):
    """The broker that gateways and nodes speak with is a relay before the real one, and does what a test tells it to."""

    relay: Relay
    engine: Engine

    def begin(self) -> None:
        super().begin()
        self.real_address = self.hub_address
        self.relay = Relay(int(self.hub_address.rpartition(":")[2]))
        self.hub_address = self.relay.address

    def start_engine(self) -> str:
        self.engine = Engine()
        return self.engine.url

    def stop(self) -> None:
        super().stop()
        for one in ("relay", "engine"):
            if hasattr(self, one):
                getattr(self, one).close()

    def node_ids(self) -> list[str]:
        return [node_id_of(self.folder / name) for name in ("node1", "node2")]

    def gateway_id(self, name: str = "gateway1") -> str:
        return kept_key(self.folder / name / "identity" / "gateway.nk", "user").public

    def failed(self) -> Counter[str]:
        """Attempts that came to nothing at the first gateway, by code."""
        return counted(self.services[0], "fallow_attempts_failed_total", "code")

    def is_whole(self) -> bool:
        """Nothing has crashed, and nothing came that nobody had thought of."""
        return all(part.process.poll() is None and "Traceback" not in part.said() for part in self.parts.values())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wild]:
    wild = Wild(tmp_path_factory.mktemp("wild"))
    try:
        wild.start()
        yield wild
    finally:
        wild.stop()


@pytest.fixture(autouse=True)
def honest_again(site: Wild) -> Iterator[None]:
    yield
    site.relay.meddle = honest


def counted(service: Service, name: str, label: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in service.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            found[line.partition(f'{label}="')[2].partition('"')[0]] = int(float(line.rpartition(" ")[2]))
    return found


# calls, as their callers see them
def called(service: Service, prompt: str, *, words: int = WORDS, interval_ms: int = 0, delay_ms: int = 0, more: bytes = b"") -> Seen:
    """One streamed call; its right answer is a function of the prompt. `more` follows on its body."""
    body = {
        "model": MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": prompt}],
        "metadata": {"words": str(words), "interval_ms": str(interval_ms), "delay_ms": str(delay_ms)},
    }
    sent_s = time.perf_counter()
    answer = service.post(msgspec.json.encode(body) + more, stream=True)
    events: list[Event] = []
    try:
        if answer.status_code != 200:
            events.append(Failed(answer.json()["error"]["code"], time.perf_counter()))
        else:
            for line in answer.iter_lines():
                events += heard(line, time.perf_counter())
            if not events or isinstance(events[-1], Text):
                events.append(Cut(time.perf_counter()))
    except requests.RequestException:
        events.append(Cut(time.perf_counter()))
    headers = {name.lower(): value for name, value in answer.headers.items()}
    right = right_answer(prompt, words)
    return Seen(name=prompt[:20], right=right, status=answer.status_code, headers=headers, sent_s=sent_s, events=tuple(events))


def heard(line: bytes, at_s: float) -> list[Event]:
    if not line.startswith(b"data: "):
        return []
    data = line.removeprefix(b"data: ")
    if data == b"[DONE]":
        return [Done(at_s)]
    said = msgspec.json.decode(data)
    if "error" in said:
        return [Failed(said["error"]["code"], at_s)]
    return [Text(text, at_s) for choice in said["choices"] if (text := choice["delta"].get("content"))]


# what passes
def tag(message: Message) -> int:
    return int(msgspec.msgpack.decode(message.data[1:])[0]) if message.data else 0


def kind(message: Message) -> str:
    """What is carried, as far as the broker sees it; empty for what isn't of calls."""
    first = message.subject.partition(".")[0]
    if message.to_broker and first in ("n", "rsp", "hb"):
        name = next((name for name, one in vars(m).items() if name[:1].isupper() and tag_of(one) == tag(message)), "")
        return "BodyPart" if ".body." in message.subject else name
    return ""


def tag_of(one: Any) -> int:
    return int(getattr(getattr(one, "__struct_config__", None), "tag", None) or -1)


# row 16
class Flipper:
    """Flips one byte of the next message of a kind. A gateway that is to say hello is first told that its session isn't known."""

    def __init__(self, what: str, offset: int, flip: int) -> None:
        self.what, self.offset, self.flip = what, offset, flip
        self.size = 0
        self.hit = False
        self.unsettled = what in ("Hello", "Welcome")

    def __call__(self, message: Message) -> Sequence[Message]:
        passing = kind(message)
        if self.unsettled and passing == "SealedRequest":
            self.unsettled = False
            asked = msgspec.msgpack.decode(message.data[1:])
            asked[1] = bytes(16)
            return (message._replace(data=message.data[:1] + msgspec.msgpack.encode(asked)),)
        if self.hit or passing != self.what:
            return (message,)
        self.hit, self.size = True, len(message.data)
        at = self.offset % len(message.data)
        altered = bytearray(message.data)
        altered[at] ^= self.flip
        return (message._replace(data=bytes(altered)),)


@pytest.mark.parametrize("what", ["SealedRequest", "Sealed", "Hello", "Welcome", "BodyPart", "Accepted"])
def test_a_flipped_byte_is_refused_and_nobody_is_blamed(site: Wild, what: str) -> None:
    chance = random.Random(what)
    before, calls = site.failed(), []
    size, offset = BEGINNING + 1, 0
    while offset < size:
        flipper = Flipper(what, offset, chance.choice((0x01, 0x80, 0xFF)))
        site.relay.meddle = flipper
        until(lambda: site.services[0].readiness(), what="a node")
        delay_ms, more = 40 * (what == "Accepted"), LARGE * (what == "BodyPart")
        calls.append(called(site.services[0], f"{what} {offset}", words=3, delay_ms=delay_ms, more=more))
        assert flipper.hit or calls[-1].status == 503, "no node was asked"
        size = max(size, flipper.size)
        offset += 1 if offset < BEGINNING else max(1, size // OFFSETS)
    assert judge_all(calls) == []
    assert sum(call.is_complete for call in calls) > len(calls) // 2, Counter(call.code for call in calls)
    failed = site.failed() - before
    assert not (FAULTS - LOST) & failed.keys(), "what the broker did is no fault of the node's"
    assert sum(failed[code] for code in LOST) <= len(calls) // LOST_SHARE, failed
    assert site.is_whole()


# row 14
class Recorder:
    """Keeps what passes of some kinds, and hands everything on."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.kept: list[Message] = []

    def __call__(self, message: Message) -> Sequence[Message]:
        if kind(message) in self.kinds:
            self.kept.append(message)
        return (message,)

    def reasons(self) -> Counter[str]:
        """Why nodes didn't open what came."""
        return Counter(msgspec.msgpack.decode(one.data[1:])[1] for one in self.kept if kind(one) == "Unopened")


def deliver_again(site: Wild, message: Message, node_id: str, attempt: str) -> None:
    """A captured request or hello, as if the broker had it for this node now."""
    place = subjects.last_token(message.subject)
    subject, reply = f"n.{node_id}.{place}", f"rsp.{site.gateway_id()}.{node_id}.{attempt}"
    number = site.relay.listens[node_id, subject]
    site.relay.say(message._replace(who=node_id, to_broker=False, subject=subject, number=number, reply=reply))


def replayed(site: Wild, recorder: Recorder, requests: Sequence[Message], node_id: str, attempt: str = "") -> Counter[str]:
    """What the node says to each of them."""
    before = recorder.reasons()
    for number, one in enumerate(requests):
        deliver_again(site, one, node_id, attempt or subjects.last_token(one.reply) or f"new{number}")
    until(lambda: (recorder.reasons() - before).total() >= len(requests), within_s=END_S, what="the refusals")
    return recorder.reasons() - before


def test_what_was_said_once_is_refused_again(site: Wild) -> None:
    recorder = Recorder("SealedRequest", "Hello", "Unopened")
    site.relay.meddle = recorder
    for name in ("node1", "node2"):
        restart(site, name)
    assert judge_all([called(site.services[0], f"captured {number}") for number in range(6)]) == []
    asked = [one for one in recorder.kept if kind(one) == "SealedRequest"]
    first = asked[0].subject.split(".")[1]
    session = session_of(next(one for one in reversed(asked) if one.subject.split(".")[1] == first))
    theirs = [one for one in asked if session_of(one) == session]
    hellos = [one for one in recorder.kept if kind(one) == "Hello" and one.subject.split(".")[1] == first]
    assert hellos
    (other,) = (one for one in site.node_ids() if one != first)
    spent = site.engine.calls, counted(site.services[0], "fallow_tokens_total", "kind")

    assert replayed(site, recorder, theirs, first) == {"replayed": len(theirs)}
    assert replayed(site, recorder, theirs, first, "another-attempt") == {"replayed": len(theirs)}
    assert replayed(site, recorder, hellos, first, "hello-again") == {"replayed": len(hellos)}
    assert replayed(site, recorder, theirs, other) == {"no_session": len(theirs)}, "redirected"
    restart(site, "node1" if node_id_of(site.folder / "node1") == first else "node2")
    assert replayed(site, recorder, theirs, first) == {"no_session": len(theirs)}
    assert replayed(site, recorder, hellos, first, "hello-again") == {"no_key": len(hellos)}
    assert (site.engine.calls, counted(site.services[0], "fallow_tokens_total", "kind")) == spent, "nobody computed or pays"
    assert judge_all([called(site.services[0], f"after {number}") for number in range(4)]) == []
    assert site.is_whole()


def session_of(message: Message) -> bytes:
    """The session of a sealed request."""
    return bytes(msgspec.msgpack.decode(message.data[1:])[1])


def restart(site: Wild, name: str) -> None:
    """Ended and started again, until its gateways know it."""
    part = site.parts[name]
    part.stop()
    site.start_again(name)
    until(lambda: "Lending" in site.parts[name].said(), what=name)
    site.wait_ready()


def test_an_answer_of_another_call_is_not_taken(site: Wild) -> None:
    """The first call's answer is given again, in place of the second's."""
    recorder = Recorder("Sealed")
    site.relay.meddle = recorder
    assert called(site.services[0], "the first").is_complete
    theirs = [one for one in recorder.kept if one.subject.startswith("rsp.")]
    swapped: list[Message] = []

    def swap(message: Message) -> Sequence[Message]:
        if kind(message) == "Sealed" and message.subject.startswith("rsp.") and len(swapped) < len(theirs):
            swapped.append(message)
            return (message._replace(data=theirs[len(swapped) - 1].data),)
        return (message,)

    site.relay.meddle = swap
    second = called(site.services[0], "the second")
    assert judge_all([second]) == []
    assert swapped


# row 31
async def _says(site: Wild, role: Role, key: KeyPair, said: Callable[[Tap], Any], *heard: str) -> list[Any]:
    """What a member of the last version hears in answer to what it says."""
    login = Operator.open(site.folder / "hub" / "hub" / "keys").credential(role, key.public, now_s=int(time.time()), life_s=DAY_S)
    tap = await Tap.open(site.real_address, login, key)
    try:
        for subject in heard:
            await tap.listen(subject)
        await said(tap)
        await tap.flush()
        if heard:
            await asyncio.to_thread(until, lambda: tap.heard, within_s=END_S, what="an answer")
        return list(tap.heard)
    finally:
        await tap.close()


def of_before(message: m.Message, fields: int) -> bytes:
    """A message as a version wrote it that knew so many of its fields."""
    data = codec.encode(message)
    return data[:1] + msgspec.msgpack.encode(msgspec.msgpack.decode(data[1:])[:fields])


def test_a_gateway_that_does_not_seal_is_told_so_in_the_open(site: Wild) -> None:
    key, node_id = make_key("user"), NodeId(site.node_ids()[0])
    body = msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]})
    asked = m.Request(
        attempt_id=AttemptId("old"),
        call_id=CallId("call_old"),
        gateway_id=GatewayId(key.public),
        org_id=OrgId("home"),
        key_id=KeyId("key"),
        path="/v1/chat/completions",
        model=MODEL,
        stream=False,
        body_bytes=len(body),
        body=body,
    )
    subject = subjects.answer(asked.gateway_id, node_id, asked.attempt_id)
    calls = site.engine.calls

    async def ask(tap: Tap) -> None:
        await tap.flush()
        await tap.client.publish(subjects.request(node_id), bytes([codec.UNSEALED_MAJOR]) + of_before(asked, 11)[1:], reply=subject)

    (answer,) = asyncio.run(_says(site, "gateway", key, ask, f"rsp.{key.public}.*.*"))
    kind, index, data, head, usage, failure = msgspec.msgpack.decode(answer.data[1:])
    assert (answer.data[0], kind, index, data, head, usage) == (codec.UNSEALED_MAJOR, 9, 0, b"", None, None), "as that version reads it"
    assert (failure["code"], "update the gateway" in failure["message"]) == ("wire_error", True)
    assert site.engine.calls == calls


def test_a_node_that_does_not_seal_gets_no_call_and_its_callers_are_told(site: Wild) -> None:
    invited = read_invitation((site.folder / "hub" / "invitation").read_text(), "the test")
    joined = asyncio.run(join(site.folder / "old", "node", invited, site.real_address, "", SystemClock()))
    key, now = joined.credentials.key, int(time.time() * 1000)
    node_id = NodeId(key.public)
    card = Card(
        node_id=node_id,
        org_id=joined.org_id,
        membership=joined.membership,
        member_until_s=joined.member_until_s,
        sequence=now,
        expires_at_ms=now + CARD_LIFE_MS,
        hardware=Hardware(kind="cpu", isa="unknown", cores=1, memory_bytes=0),
        isolation="none",
        region="unknown",
        serves=frozenset({"own", "partner", "market"}),
    )
    offer = Lane(model=MINE, slots=4, context_tokens=2048, digest="", paths=frozenset({CHAT}), price=Price()).offer(node_id, now + 60_000)
    beat = m.Heartbeat(
        node_id=node_id,
        sequence=now,
        state="run",
        card_sequence=card.sequence,
        loads=(Load(model=MINE, readiness="ready", slots_free=4, waiting=0, waiting_max=0),),
        card=signed_card(card, key.sign),
        offers=(offer,),
    )

    async def tell(tap: Tap) -> None:
        await tap.client.publish(subjects.heartbeat(node_id), of_before(beat, 8))

    refused = "fallow_cards_refused_total"
    before = counted(site.services[0], refused, "reason")["unsealed"]
    asyncio.run(_says(site, "node", key, tell))
    until(lambda: counted(site.services[0], refused, "reason")["unsealed"] > before, within_s=END_S, what="the refusal")
    assert node_id not in [node["node_id"] for node in site.services[0].nodes()]
    answer = site.services[0].post({"model": MINE, "messages": [{"role": "user", "content": "Hi"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert site.is_whole()


# row 28
async def _connections(site: Wild) -> dict[str, set[int]]:
    found = await connections(site.real_address, site.folder / "hub" / "hub" / "keys")
    names = [*site.node_ids(), site.gateway_id("gateway1"), site.gateway_id("gateway2")]
    return {name: found.get(name, set()) for name in names}


def test_a_gateway_that_does_not_read_is_dropped_and_nobody_else(site: Wild) -> None:
    site.wait_ready()
    before, stopped = asyncio.run(_connections(site)), site.gateway_id("gateway2")
    log = site.folder / "broker" / "broker.log"

    async def flood(tap: Tap) -> None:
        for number in range(FLOOD_MAX):
            await tap.client.publish(f"rsp.{stopped}.{key.public}.{number}", bytes(FLOOD_BYTES))
            await tap.client.flush()
            if "slow consumer" in log.read_text().lower():
                return

    key, calls = make_key("user"), []
    part = site.parts["gateway2"].process
    part.send_signal(signal.SIGSTOP)
    try:
        long = Long(site.services[0]).begun()
        asyncio.run(_says(site, "node", key, flood))
        until(lambda: not asyncio.run(_connections(site))[stopped], within_s=END_S, what="the end of its connection")
        calls = [called(site.services[0], f"beside {number}") for number in range(8)]
        assert long.is_whole(), long.failed
    finally:
        part.send_signal(signal.SIGCONT)
    assert all(call.is_complete for call in calls), Counter(call.code for call in calls)
    site.wait_ready()
    after = asyncio.run(_connections(site))
    assert {name: after[name] for name in before if name != stopped} == {name: before[name] for name in before if name != stopped}
    assert after[stopped].isdisjoint(before[stopped])
    until(lambda: called(site.services[1], "again").is_complete, within_s=END_S, what="an answer through it")
    assert site.is_whole()


def test_flipped_heartbeats_are_dropped_or_change_nothing_of_an_answer(site: Wild) -> None:
    chance = random.Random("heartbeats")
    beats: list[int] = []

    def flip(message: Message) -> Sequence[Message]:
        if kind(message) != "Heartbeat":
            return (message,)
        beats.append(len(message.data))
        out = []
        for _ in range(COPIES):
            altered = bytearray(message.data)
            altered[chance.randrange(len(altered))] ^= chance.randrange(1, 256)
            out.append(message._replace(data=bytes(altered)))
        return (*out, message)

    site.relay.meddle = flip
    until(lambda: len(beats) >= BEATS, within_s=END_S, what="heartbeats")
    assert judge_all([called(site.services[0], f"beat {number}") for number in range(4)]) == []
    assert site.is_whole()


# row 13
def lossy(chance: random.Random, done: Counter[str]) -> Meddle:
    """Drops some messages of calls, says many twice, and holds some back until the next ones have passed."""
    held: list[Message] = []

    def meddle(message: Message) -> Sequence[Message]:
        if not message.to_broker or message.subject.split(".")[0] not in ("n", "rsp"):
            return (message,)
        drawn = chance.random()
        if drawn < DROPPED:
            done["dropped"] += 1
            return ()
        if drawn < DROPPED + HELD:
            done["held"] += 1
            held.append(message)
            return ()
        out = [message, message] if drawn < DROPPED + HELD + DOUBLED else [message]
        done["doubled"] += len(out) - 1
        # what was held is said later, over whichever connection it came
        late = [held.pop(at) for at in reversed(range(len(held))) if held[at].who == message.who]
        return [*out, *late]

    return meddle


def test_lost_doubled_and_overtaken_messages_give_no_wrong_answer(site: Wild) -> None:
    done: Counter[str] = Counter()
    calls: list[Seen] = []
    site.wait_ready()
    site.relay.meddle = lossy(random.Random(13), done)

    def call_on(caller: int) -> None:
        for number in range(LOSSY_CALLS // CALLERS):
            calls.append(called(site.services[caller % 2], f"lossy {caller} {number}", interval_ms=5))

    threads = [threading.Thread(target=call_on, args=(caller,), daemon=True) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * END_S)
        assert not thread.is_alive(), "a call hangs"
    assert judge_all(calls) == []
    assert all(done[what] > 0 for what in ("dropped", "held", "doubled")), done
    assert sum(call.is_complete for call in calls) > 0, Counter(call.code for call in calls)
    failed = [counted(one, "fallow_attempts_failed_total", "code") for one in site.services]
    assert sum(one["answer_gap"] for one in failed) > 0, "what is missing is noticed"
    assert site.is_whole()

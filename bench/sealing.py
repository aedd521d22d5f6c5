"""What sealing costs the processor, gateway and node together, without broker and engine: `python -m bench.sealing`."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, get_args

from bench.report import Figure, publish
from fallow.adapters.clock import SystemClock
from fallow.adapters.nkey import make_key
from fallow.apps.node.seals import Seals, vouched_by
from fallow.model import messages as m
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.receipt import Usage
from fallow.wire import codec, seal
from fallow.wire.commitment import Commitment
from fallow.wire.sign import kem_verifies, member_bytes

ROUNDS = 41
SESSIONS = 10
CALLS = 200
PARTS = 1_000
"""In one round each; the median of the rounds counts."""
CALLS_OF_A_SESSION = 100
"""Over which a session's cost is spread: one call in five seconds. A busy gateway has many thousands."""
BODY = b'{"model":"tiny","stream":true,"messages":[{"role":"user","content":"' + b"x" * 200 + b'"}]}'
DATA = b'data: {"choices":[{"delta":{"content":" word"}}]}\n\n'
USAGE = Usage(prompt_tokens=60, output_tokens=20)
TOKENS = tuple(range(1_000, 1_020))
ORG = OrgId("org")


class Pair(NamedTuple):
    """A gateway and a node that know each other."""

    seals: Seals
    node_id: NodeId
    asker: m.Hello
    sign: Callable[[bytes], bytes]


def pair_of(suite: m.SuiteName) -> Pair:
    hub, gateway, node = make_key("account"), make_key("user"), make_key("user")
    clock = SystemClock()
    until_s = clock.wall_ms() // 1000 + 86_400
    asker = m.Hello(
        gateway_id=GatewayId(gateway.public),
        org_id=ORG,
        member_until_s=until_s,
        membership=hub.sign(member_bytes(gateway.public, ORG, until_s)),
    )
    node_id = NodeId(node.public)
    return Pair(Seals(node_id, node.sign, vouched_by(hub.public, ORG, clock), clock, suite), node_id, asker, gateway.sign)


def opened_session(pair: Pair) -> seal.GatewaySession:
    """All that both ends do for a session, as the apps do it."""
    pair.seals._hellos.clear()  # how many a second are answered isn't the question here
    now_s = SystemClock().wall_ms() // 1000
    if not kem_verifies(pair.node_id, pair.seals.kem, now_s=now_s):
        raise RuntimeError("the node's KEM key doesn't verify")
    asked = seal.ask(pair.asker, pair.node_id, pair.seals.kem, pair.sign)
    hello = codec.to_node.read(codec.encode(asked.hello))
    assert isinstance(hello, m.Hello)
    answered = pair.seals.welcome(hello)
    assert isinstance(answered, m.Welcome), answered
    welcomed = codec.to_gateway.read(codec.encode(answered))
    assert isinstance(welcomed, m.Welcome)
    return seal.begin(asked, welcomed)


def request_of(pair: Pair) -> m.Request:
    return m.Request(
        attempt_id=AttemptId("a" * 20),
        call_id=CallId("c" * 20),
        gateway_id=pair.asker.gateway_id,
        org_id=ORG,
        key_id=KeyId("k" * 20),
        path="/v1/chat/completions",
        model="tiny",
        stream=True,
        body_bytes=len(BODY),
        body=BODY,
        model_digest="sha256:" + "0" * 64,
    )


def sealed_call(pair: Pair, session: seal.GatewaySession, request: m.Request) -> None:
    """Request there, the answer's end back, and what both commit to."""
    number, channel = session.call()
    _, box = channel.seal(codec.encode(request))
    sent = codec.encode(m.SealedRequest(session=session.id, number=number, box=box))
    opened = pair.seals.open(codec.sealed_request.read(sent))
    digest = committed(opened.request)
    index, box = opened.channel.seal(codec.encode(m.Final(index=0, data=DATA, usage=USAGE, tokens=TOKENS, digest=digest)))
    came = codec.to_gateway.read(codec.encode(m.Sealed(index=index, box=box)))
    assert isinstance(came, m.Sealed)
    final = codec.inner.read(channel.open(came.index, came.box))
    if not isinstance(final, m.Final) or final.digest != committed(request):
        raise RuntimeError("the answer isn't what was committed to")


def committed(request: m.Request) -> bytes:
    kept = Commitment(request.attempt_id, request.body, request.model_digest)
    kept.add(DATA)
    return kept.digest(USAGE, TOKENS)


def plain_call(request: m.Request) -> None:
    """The same in the open."""
    codec.request.read(codec.encode(request))
    codec.inner.read(codec.encode(m.Final(index=0, data=DATA, usage=USAGE, tokens=TOKENS)))


class Spent(NamedTuple):
    """Microseconds of the processor, each."""

    node: float
    gateway: float
    plain: float


def spent_on_parts(pair: Pair, session: seal.GatewaySession, *, pads: bool) -> Spent:
    """One round of an answer's parts: at the node, at the gateway, and both together if they went in the open."""
    number, gateway = session.call()
    _, box = gateway.seal(codec.encode(request_of(pair)))
    node = pair.seals.open(m.SealedRequest(session=session.id, number=number, box=box)).channel
    node.pads = pads
    parts = [m.Part(index=at, data=DATA) for at in range(PARTS)]
    begin = time.thread_time_ns()
    sent = [codec.encode(m.Sealed(index=index, box=box)) for index, box in (node.seal(codec.encode(part)) for part in parts)]
    between = time.thread_time_ns()
    for data in sent:
        came = codec.to_gateway.read(data)
        assert isinstance(came, m.Sealed)
        codec.inner.read(gateway.open(came.index, came.box))
    opened = time.thread_time_ns()
    for part in parts:
        codec.inner.read(codec.encode(part))
    end = time.thread_time_ns()
    return Spent(*(span / PARTS / 1_000 for span in (between - begin, opened - between, end - opened)))


def each_us(do: Callable[[], object], times: int) -> float:
    """Microseconds of the processor each, median of the rounds."""
    rounds = []
    for _ in range(ROUNDS):
        begin = time.thread_time_ns()
        for _ in range(times):
            do()
        rounds.append((time.thread_time_ns() - begin) / times / 1_000)
    return statistics.median(rounds)


def figures_of(suite: m.SuiteName) -> list[Figure]:
    """All figures of one suite."""
    pair = pair_of(suite)
    session, request = opened_session(pair), request_of(pair)
    session_us = each_us(lambda: opened_session(pair), SESSIONS)
    session = opened_session(pair)
    call_us = each_us(lambda: sealed_call(pair, session, request), CALLS)
    plain_us = each_us(lambda: plain_call(request), CALLS)
    figures = [
        Figure(name=f"{suite}: a new session, both ends", value=session_us / 1_000, unit="ms", goal=3.0),
        Figure(name=f"{suite}: a new KEM key, each ten minutes", value=each_us(lambda: seal.KemPair(suite), SESSIONS), unit="µs"),
        Figure(
            name=f"{suite}: added to a call, both ends",
            value=(call_us - plain_us + session_us / CALLS_OF_A_SESSION) / 1_000,
            unit="ms",
            goal=0.15,
            note=f"request, Final, commitments, and a {CALLS_OF_A_SESSION}th of a session; {call_us - plain_us:.0f} µs without that",
        ),
    ]
    for pads in (False, True):
        rounds = [spent_on_parts(pair, session, pads=pads) for _ in range(ROUNDS)]
        node, gateway, plain = (statistics.median(values) for values in zip(*rounds, strict=True))
        figures.append(
            Figure(
                name=f"{suite}: added to a {'padded ' if pads else ''}part, both ends",
                value=node + gateway - plain,
                unit="µs",
                goal=8.0,
                note=f"node {node:.1f}, gateway {gateway:.1f}, of which {plain:.1f} go without sealing too",
            )
        )
    return figures


def main() -> None:
    publish("sealing", [figure for suite in get_args(m.SuiteName) for figure in figures_of(suite)])


if __name__ == "__main__":
    main()

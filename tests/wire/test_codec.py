"""Messages to bytes and back: nothing is lost, newer writers are understood, and hostile bytes meet one kind of error."""

import math
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fallow.core.match.decide import match, quotes
from fallow.core.match.market import Market
from fallow.model import messages as m
from fallow.model.call import Grant
from fallow.model.card import Card, Hardware
from fallow.model.errors import Failure, WireError
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.offer import Load, Offer, Price, Speed
from fallow.model.receipt import Usage
from fallow.wire import codec, subjects
from fallow.wire.codec import MAJOR, Reader, encode
from fallow.wire.seal import Channel
from fallow.wire.subjects import PART_BYTES_MAX, PAYLOAD_BYTES_MAX, TABLE
from offers import AT_S, FOREVER_S, NOW, PLAIN, call_id, call_of

PROMISE = settings(max_examples=30)
MANY = settings(max_examples=250)

KINDS: list[type[m.Message]] = m.Message.__subclasses__()
READERS: dict[str, tuple[Reader[Any], set[type[m.Message]]]] = {
    "request": (codec.request, {m.Request}),
    "body_part": (codec.body_part, {m.BodyPart}),
    "inner": (codec.inner, {m.Part, m.Final, m.Alive}),
    "sealed_request": (codec.sealed_request, {m.SealedRequest}),
    "sealed_body": (codec.sealed_body, {m.Sealed}),
    "to_node": (codec.to_node, {m.Cancel, m.Credit, m.Lease, m.Introduce, m.Ping, m.Hello}),
    "to_gateway": (codec.to_gateway, {m.Accepted, m.Sealed, m.Alive, m.Credit, m.Welcome, m.Unopened, m.Lost}),
    "heartbeat": (codec.heartbeat, {m.Heartbeat}),
    "key_query": (codec.key_query, {m.KeyQuery}),
    "key_answer": (codec.key_answer, {m.KeyAnswer}),
    "spent": (codec.spent, {m.Spent}),
    "spent_answer": (codec.spent_answer, {m.SpentAnswer}),
    "from_hub": (codec.from_hub, {m.Hold, m.Introduce, m.Ping}),
    "echo": (codec.echo, {m.Alive}),
    "keys_changed": (codec.keys_changed, {m.KeysChanged}),
    "put_out": (codec.put_out, {m.PutOut}),
    "enrol": (codec.enrol, {m.Enrol}),
    "enrolled": (codec.enrolled, {m.Enrolled}),
    "renew": (codec.renew, {m.Renew}),
    "demand": (codec.demand, {m.Demand}),
    "index": (codec.index, {m.Index}),
    "history_query": (codec.history_query, {m.HistoryQuery}),
    "history_answer": (codec.history_answer, {m.HistoryAnswer}),
}
SEALED: set[type[m.Message]] = {m.Request, m.BodyPart, m.Part, m.Final}
"""What no subject carries: it travels within something else."""
SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=12),
    bytes: st.binary(max_size=12),
    bool: st.booleans(),
    int: st.integers(0, 2**63 - 1),
    float: st.floats(0, 1e9),
    type(None): st.none(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that messages are made of, within its bounds."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    if isinstance(kind, NewType):
        return values(kind.__supertype__)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return bounded(*arguments)
    if get_origin(kind) is Literal:
        return st.sampled_from(arguments)
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of([values(one) for one in arguments])
    if get_origin(kind) is tuple and arguments[-1] is not ...:
        return st.tuples(*map(values, arguments))
    if get_origin(kind) is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    assert get_origin(kind) is frozenset, f"no values for {kind}"
    return st.frozensets(values(arguments[0]), max_size=3)


def bounded(kind: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    """A value within what its field allows; the ends come up now and then."""
    if kind is int:
        most = 2**63 - 1 if meta.le is None else int(meta.le)
        return st.integers(int(meta.ge or 0), most if meta.lt is None else int(meta.lt) - 1)
    if kind is float:
        return st.floats(meta.ge or 0.0, 1e9 if meta.le is None else meta.le)
    if meta.pattern is not None:
        return st.from_regex(meta.pattern)
    if kind is str:
        return st.text(min_size=meta.min_length or 0, max_size=12)
    if kind is bytes:
        least = meta.min_length or 0
        return st.binary(min_size=least, max_size=max(least, min(12, meta.max_length or 12)))
    assert meta.max_length is None or meta.max_length >= 3
    return values(kind)


def readers_of(kind: type[m.Message]) -> Iterator[Reader[Any]]:
    yield from (reader for reader, kinds in READERS.values() if kind in kinds)


@pytest.mark.parametrize("kind", KINDS)
@PROMISE
@given(data=st.data())
def test_round_trip(kind: type[m.Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    for reader in readers_of(kind):
        assert reader.read(encode(message)) == message


def test_each_subject_has_a_reader_for_all_that_it_carries() -> None:
    read = {kind for _, kinds in READERS.values() for kind in kinds}
    carried = {kind for row in TABLE for kind in row.carries}
    assert read == set(KINDS) == carried | SEALED
    assert not carried & SEALED, "only what is sealed may tell of a call"
    one_reader = [kinds for _, kinds in READERS.values()]
    assert all(set(row.carries) in one_reader or row.is_asked for row in TABLE)  # those answers are replies


INDEX_PRICE = m.IndexPrice(model="tiny", hardware="cpu", price=Price(output_micro_per_munit=9), utilisation=0.5, at_ms=1)
SAMPLES: dict[type[m.Message], m.Message] = {
    m.Request: m.Request(
        attempt_id=AttemptId("attempt"),
        call_id=CallId("call"),
        gateway_id=GatewayId("gateway"),
        org_id=OrgId("org"),
        key_id=KeyId("key"),
        path="/v1/completions",
        model="tiny",
        stream=True,
        body_bytes=2,
        body=b"{}",
        model_digest="digest",
        price=Price(output_micro_per_munit=9),
        cost_max_micro=7,
        privacy="padded",
    ),
    m.BodyPart: m.BodyPart(offset=7, data=b"more"),
    m.Cancel: m.Cancel(attempt_id=AttemptId("attempt")),
    m.Credit: m.Credit(attempt_id=AttemptId("attempt"), until_bytes=9),
    m.Lease: m.Lease(gateway_id=GatewayId("gateway"), attempt_ids=(AttemptId("one"), AttemptId("two"))),
    m.Introduce: m.Introduce(gateway_id=GatewayId("gateway")),
    m.Ping: m.Ping(attempt_id=AttemptId("attempt")),
    m.Accepted: m.Accepted(),
    m.Part: m.Part(index=0, data=b"data", head=m.Head(status=200, content_type="text/event-stream", engine_us=3)),
    m.Final: m.Final(
        index=1, usage=Usage(prompt_tokens=1), failure=Failure(code="busy", message="full"), tokens=(1, 2**32 - 1), digest=bytes(32)
    ),
    m.Alive: m.Alive(),
    m.Hello: m.Hello(
        gateway_id=GatewayId("gateway"),
        org_id=OrgId("org"),
        member_until_s=9,
        membership=b"word",
        session=bytes(16),
        kid=bytes(8),
        box=b"box",
        signature=b"signed",
    ),
    m.Welcome: m.Welcome(share=bytes(32), confirm=bytes(32)),
    m.SealedRequest: m.SealedRequest(session=bytes(16), number=3, box=b"box"),
    m.Sealed: m.Sealed(index=3, box=b"box"),
    m.Unopened: m.Unopened(reason="no_session"),
    m.Lost: m.Lost(),
    m.Hold: m.Hold(sequence=1, models=("tiny",)),
    m.Demand: m.Demand(gateway_id=GatewayId("gateway"), sequence=1, span_ms=30_000, models=(m.ModelDemand(model="tiny", calls=2),)),
    m.Index: m.Index(sequence=1, prices=(INDEX_PRICE,)),
    m.HistoryQuery: m.HistoryQuery(model="tiny"),
    m.HistoryAnswer: m.HistoryAnswer(prices=(INDEX_PRICE,)),
    m.Heartbeat: m.Heartbeat(
        node_id=NodeId("node"),
        sequence=1,
        state="run",
        card_sequence=1,
        loads=(Load(model="tiny", readiness="ready", slots_free=1, waiting=0, waiting_max=2),),
        card=Card(
            node_id=NodeId("node"),
            org_id=OrgId("org"),
            sequence=1,
            expires_at_ms=9,
            hardware=Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33),
            isolation="none",
            region="eu-de",
            serves=frozenset({"own"}),
        ),
        offers=(
            Offer(
                node_id=NodeId("node"),
                model="tiny",
                paths=frozenset({"/v1/completions"}),
                context_tokens=2048,
                model_digest="",
                speed=Speed(prefill_tokens_per_s=1.5, decode_tokens_per_s=1.5),
                price=Price(),
                slots=2,
                expires_at_ms=9,
            ),
        ),
        kem=m.KemKey(suite="x25519", public_key=bytes(32), expires_at_s=9, signature=b"signed"),
    ),
    m.Enrol: m.Enrol(role="node", public_key="U" * 56, invite="word", at_s=1, proof=b"proof"),
    m.Enrolled: m.Enrolled(credential="a.b.c", org_id=OrgId("org"), expires_at_s=2),
    m.Renew: m.Renew(),
    m.KeysChanged: m.KeysChanged(sequence=1, key_digests=(b"digest",)),
    m.PutOut: m.PutOut(node_ids=(NodeId("node"),)),
    m.Spent: m.Spent(gateway_id=GatewayId("gateway"), since_ms=1, keys=(m.KeySpent(key_id=KeyId("key"), micro=2),)),
    m.SpentAnswer: m.SpentAnswer(keys=(m.KeySpent(key_id=KeyId("key"), micro=3),)),
    m.KeyQuery: m.KeyQuery(key_digest=b"digest"),
    m.KeyAnswer: m.KeyAnswer(grant=Grant(key_id=KeyId("key"), org_id=OrgId("org"))),
}


def test_the_bytes_of_a_message_stay_as_they_are() -> None:
    """Nodes and gateways of different ages meet: a tag is never given to something else."""
    assert encode(SAMPLES[m.Cancel]) == b"\x02\x92\x03\xa7attempt"
    assert encode(SAMPLES[m.BodyPart]) == b"\x02\x93\x02\x07\xc4\x04more"
    assert [msgspec.msgpack.decode(encode(SAMPLES[kind])[1:])[0] for kind in KINDS] == [*range(1, 27), *range(28, 34)]
    assert [kind.__name__ for kind in KINDS] == [
        "Request", "BodyPart", "Cancel", "Credit", "Lease", "Introduce", "Accepted", "Part", "Final", "Alive", "Heartbeat", "KeyQuery",
        "KeyAnswer", "Hold", "Demand", "Index", "HistoryQuery", "HistoryAnswer", "Ping",
        "Enrol", "Enrolled", "Renew", "KeysChanged", "PutOut", "Spent", "SpentAnswer",
        "Hello", "Welcome", "SealedRequest", "Sealed", "Unopened", "Lost",
    ]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_takes_only_what_its_subject_carries(name: str, kind: type[m.Message]) -> None:
    reader, kinds = READERS[name]
    data = encode(SAMPLES[kind])
    if kind in kinds:
        assert reader.read(data) == SAMPLES[kind]
    else:
        with pytest.raises(WireError):
            reader.read(data)


@pytest.mark.parametrize("name", READERS)
def test_another_major_version_is_refused_and_named(name: str) -> None:
    reader, kinds = READERS[name]
    good = encode(SAMPLES[next(iter(kinds))])
    assert good[0] == MAJOR
    for other in range(256):
        if other != MAJOR:
            with pytest.raises(WireError, match=f"version {other}, this side version {MAJOR}"):
                reader.read(bytes([other]) + good[1:])
    with pytest.raises(WireError, match="nothing"):
        reader.read(b"")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [["new"], [None, {"a": [1]}, b"x"]])
def test_fields_that_a_newer_version_adds_are_ignored(kind: type[m.Message], added: list[Any]) -> None:
    fields = msgspec.msgpack.decode(encode(SAMPLES[kind])[1:])
    # An older writer leaves out what has a default; here all fields are there and more.
    data = bytes([MAJOR]) + msgspec.msgpack.encode([*fields, *added])
    for reader in readers_of(kind):
        assert reader.read(data) == SAMPLES[kind]


def test_a_head_may_grow_too() -> None:
    tag, index, data, head, *rest = msgspec.msgpack.decode(encode(SAMPLES[m.Part])[1:])
    grown = msgspec.msgpack.encode([tag, index, data, [*head, "new"], *rest])
    assert codec.inner.read(bytes([MAJOR]) + grown) == SAMPLES[m.Part]


def test_what_an_older_writer_leaves_out_has_its_default() -> None:
    data = bytes([MAJOR]) + msgspec.msgpack.encode([9, 4])
    assert codec.inner.read(data) == m.Final(index=4)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_what_the_broker_would_not_carry_is_not_encoded(over: int) -> None:
    envelope = len(encode(m.BodyPart(offset=0, data=bytes(100_000)))) - 100_000
    message = m.BodyPart(offset=0, data=bytes(PAYLOAD_BYTES_MAX - envelope + over))
    if over > 0:
        with pytest.raises(WireError, match=str(PAYLOAD_BYTES_MAX)):
            encode(message)
    else:
        assert len(encode(message)) == PAYLOAD_BYTES_MAX + over


@pytest.mark.parametrize("pads", [False, True])
def test_a_whole_part_fits_with_its_envelope(pads: bool) -> None:
    channel = Channel(bytes(32), is_nodes=True)
    channel.pads = pads
    part = replace(SAMPLES[m.Part], data=bytes(PART_BYTES_MAX))
    body_part = replace(SAMPLES[m.BodyPart], data=bytes(PART_BYTES_MAX))
    for message in (part, body_part):
        _, box = channel.seal(encode(message))
        assert len(encode(replace(SAMPLES[m.Sealed], box=box))) < PAYLOAD_BYTES_MAX
    _, box = channel.seal(encode(replace(SAMPLES[m.Request], body=bytes(PART_BYTES_MAX))))
    assert len(encode(replace(SAMPLES[m.SealedRequest], box=box))) < PAYLOAD_BYTES_MAX


@pytest.mark.parametrize(
    ("subject", "gateway", "is_its_own"),
    [("hub.spent.gw-1", "gw-1", True), ("hub.spent.gw-1", "gw-2", False), ("hub.spent", "gw-1", False)],
)
def test_a_gateway_says_what_was_spent_on_itself_only(subject: str, gateway: str, is_its_own: bool) -> None:
    said = m.Spent(gateway_id=GatewayId(gateway), since_ms=1, keys=())
    if is_its_own:
        assert codec.read_spent(encode(said), subject) == said
    else:
        with pytest.raises(WireError, match="another gateway"):
            codec.read_spent(encode(said), subject)


@pytest.mark.parametrize("message", [m.Spent, m.SpentAnswer])
def test_the_largest_report_of_what_was_spent_fits_its_subject(message: type[m.Spent | m.SpentAnswer]) -> None:
    keys = tuple(m.KeySpent(key_id=KeyId(f"{n:0128}"), micro=m.SPENT_MICRO_MAX) for n in range(m.SPENT_KEYS_MAX))
    said = replace(SAMPLES[message], keys=keys)
    assert len(encode(said)) <= subjects.SPENT.payload_bytes_max
    assert next(readers_of(message)).read(encode(said)) == said


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("request", subjects.REQUEST),
        ("sealed_request", subjects.REQUEST),
        ("body_part", subjects.BODY),
        ("sealed_body", subjects.BODY),
        ("inner", subjects.ANSWER),
        ("to_node", subjects.CONTROL),
        ("to_gateway", subjects.ANSWER),
        ("heartbeat", subjects.HEARTBEAT),
        ("key_query", subjects.KEY),
        ("key_answer", subjects.KEY),
        ("spent", subjects.SPENT),
        ("spent_answer", subjects.SPENT),
    ],
)
def test_what_is_larger_than_its_subject_allows_is_not_read(name: str, row: subjects.Subject) -> None:
    reader, kinds = READERS[name]
    kind = next(iter(kinds))
    fields = msgspec.msgpack.decode(encode(SAMPLES[kind])[1:])
    empty = len(msgspec.msgpack.encode([*fields, bytes(70_000)])) - 70_000 + 1
    full = row.payload_bytes_max - empty if row.payload_bytes_max > 70_000 else row.payload_bytes_max - empty + 2  # a shorter length
    data = bytes([MAJOR]) + msgspec.msgpack.encode([*fields, bytes(full)])
    assert len(data) == row.payload_bytes_max
    assert reader.read(data) == SAMPLES[kind]
    with pytest.raises(WireError, match=str(row.payload_bytes_max)):
        reader.read(data + b"\x00")


# Hostile bytes. Whatever comes, a reader returns a message or raises WireError.
def meet(data: bytes) -> None:
    for reader, kinds in READERS.values():
        try:
            read = reader.read(data)
        except WireError:
            continue
        assert type(read) in kinds


@MANY
@given(st.binary(max_size=60), st.booleans())
def test_random_bytes(data: bytes, versioned: bool) -> None:
    meet(bytes([MAJOR]) + data if versioned else data)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_bytes(kind: type[m.Message]) -> None:
    data = encode(SAMPLES[kind])
    for size in range(len(data)):
        for reader in readers_of(kind):
            with pytest.raises(WireError):
                reader.read(data[:size])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [b"\x00", b"\xc1", b"\x93\x03"])
def test_bytes_after_the_end(kind: type[m.Message], rest: bytes) -> None:
    for reader in readers_of(kind):
        with pytest.raises(WireError):
            reader.read(encode(SAMPLES[kind]) + rest)


@MANY
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_bytes(kind: type[m.Message], changes: list[tuple[int, int]]) -> None:
    data = bytearray(encode(SAMPLES[kind]))
    for at, byte in changes:
        data[at % len(data)] = byte
    meet(bytes(data))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80"])
def test_text_that_is_not_text(text: bytes) -> None:
    data = bytes([MAJOR, 0x92, 3, 0xA0 + len(text)]) + text
    with pytest.raises(WireError):
        codec.to_node.read(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff\x05", id="an array of four thousand million"),
        pytest.param(b"\x93\x05\xa1g\xdd\xff\xff\xff\xff", id="a lease of four thousand million"),
        pytest.param(b"\x92\x03\xdb\xff\xff\xff\xffab", id="a text of 4 GiB"),
        pytest.param(b"\x92\x03\xd7\xff" + b"\xff" * 8, id="a stamp where text is due"),
        pytest.param(b"\x91" * 100_000, id="deep"),
        pytest.param(b"\x92\x03\xa1a" + b"\x91" * 100_000, id="deep after the end"),
        pytest.param(b"\x93\x03\xa1a" + b"\x91" * 100_000, id="deep in an unknown field"),
        pytest.param(b"\x92\x63\xa1a", id="an unknown tag"),
        pytest.param(b"\x92\xa1c\xa1a", id="a tag that is no number"),
        pytest.param(b"\x82\x01\x02\x03\x04", id="a map"),
        pytest.param(b"\xc0", id="nothing"),
    ],
)
def test_bytes_made_to_hurt(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.to_node.read(bytes([MAJOR]) + data)


# Numbers and texts from strangers.
def offering(speed: Speed = Speed(), *, load: Load | None = None, **changes: Any) -> bytes:  # noqa: B008  (frozen)
    sample = SAMPLES[m.Heartbeat]
    assert isinstance(sample, m.Heartbeat)
    assert sample.offers is not None
    offers = (replace(sample.offers[0], speed=speed, **changes),)
    return encode(replace(sample, offers=offers, loads=sample.loads if load is None else (load,)))


def decided(beats: Sequence[m.Heartbeat]) -> None:
    """Every call that a gateway could have finds a sane quote or a refusal, whatever the heartbeats say."""
    market = Market()
    for at, beat in enumerate(beats):
        assert beat.card is not None
        assert beat.offers is not None
        card = replace(beat.card, node_id=NodeId(f"node-{at}"))
        market.put(card, beat.offers[0], beat.loads[0], beat.state, expires_s=FOREVER_S, now_s=AT_S)
        market.heard(card.node_id, beat.offers[0].model, running=beat.loads[0].slots_free, now_s=AT_S)
    market.refresh(now_s=AT_S)
    for at, needs in enumerate((PLAIN, HURRIED, replace(HURRIED, prefer="fast"), replace(HURRIED, strict=True), WAITING)):
        call = call_of(needs, path="/v1/completions", org="org")
        made, _ = quotes(call, market, now=NOW)
        for one in made:
            assert one.cost_expected_micro >= 0
            assert one.cost_max_micro >= 0
            assert 0 <= one.first_token_in_ms <= one.end_in_ms
            assert 0.0 <= one.per_token_ms < math.inf
            assert 0.0 <= one.chance <= 1.0
        for explores in (False, True):
            match(replace(call, id=call_id(explores=explores)), market, now=NOW)
        if made:
            market.began(f"call-{at}", call, made[0], now_s=AT_S)
            market.first(f"call-{at}", now_s=AT_S)
            market.ended(f"call-{at}", call, Usage(output_tokens=50), now_s=AT_S + at)
            market.refresh(now_s=AT_S + at)


HURRIED = replace(PLAIN, first_token_within_ms=1, per_token_within_ms=1, deadline_at_ms=NOW.wall_ms + 1)
ODD_BATCHES = ((2**63 - 1, 5e-324), (2, 5e-324), (-(2**63), 1.0))
WAITING = replace(PLAIN, service_tier="flex", output_tokens_max=None)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(offering(), id="nothing measured"),
        pytest.param(offering(Speed(prefill_tokens_per_s=90.5, decode_tokens_per_s=1e9), slots=0), id="fast, and full"),
        pytest.param(offering(Speed(prefill_tokens_per_s=1e-3, decode_tokens_per_s=1e-3), context_tokens=2**40), id="slow"),
        pytest.param(offering(Speed(prefill_tokens_per_s=5e-324, decode_tokens_per_s=5e-324)), id="a speed of almost nothing"),
        pytest.param(offering(Speed(decode_tokens_per_s=1e9, decode_by_streams=ODD_BATCHES)), id="odd batches"),
        pytest.param(offering(Speed(writes=False)), id="it embeds, at an unknown speed"),
        pytest.param(
            offering(
                price=Price(prompt_micro_per_munit=2**40, cached_prompt_micro_per_munit=2**40, output_micro_per_munit=2**40),
                context_tokens=2**40,
            ),
            id="dear",
        ),
        pytest.param(offering(slots=2**40, context_tokens=0), id="as many slots as there can be, and no context"),
        pytest.param(
            offering(load=Load(model="tiny", readiness="loading", slots_free=2**40, waiting=2**40, waiting_max=2**40, ready_in_ms=2**40)),
            id="loading for ever, and full",
        ),
    ],
)
def test_no_offer_that_is_read_breaks_its_quote(data: bytes) -> None:
    """One stranger's heartbeat must not end every call for a model."""
    usual = codec.heartbeat.read(offering(Speed(prefill_tokens_per_s=400.0, decode_tokens_per_s=20.0)))
    beat = codec.heartbeat.read(data)
    decided([beat])
    decided([beat, usual])


@PROMISE
@given(st.lists(st.tuples(values(Offer), values(Load), values(Card)), min_size=1, max_size=3))
def test_no_offer_that_could_be_read_breaks_its_quote(strangers: list[tuple[Offer, Load, Card]]) -> None:
    sample = SAMPLES[m.Heartbeat]
    beats = []
    for offer, load, card in strangers:
        offer = replace(offer, model="tiny", paths=frozenset({"/v1/completions"}))
        beats.append(codec.heartbeat.read(encode(replace(sample, offers=(offer,), loads=(replace(load, model="tiny"),), card=card))))
    decided(beats)


def beat(**changes: Any) -> bytes:
    return encode(replace(SAMPLES[m.Heartbeat], **changes))


def carded(**changes: Any) -> bytes:
    sample = SAMPLES[m.Heartbeat]
    assert isinstance(sample, m.Heartbeat)
    assert sample.card is not None
    return beat(card=replace(sample.card, **changes))


LOAD = Load(model="tiny", readiness="ready", slots_free=1, waiting=0, waiting_max=2)
HARDWARE = Hardware(kind="cpu", isa="x86_64-avx2", cores=4, memory_bytes=2**33)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(offering(Speed(prefill_tokens_per_s=float("nan"))), id="a speed that is no number"),
        pytest.param(offering(Speed(decode_tokens_per_s=float("inf"))), id="an infinite speed"),
        pytest.param(offering(Speed(decode_tokens_per_s=-9.0)), id="a negative speed"),
        pytest.param(offering(price=Price(output_micro_per_munit=-1)), id="a negative price"),
        pytest.param(offering(price=Price(output_micro_per_munit=2**41)), id="a price without bound"),
        pytest.param(offering(context_tokens=-1), id="a negative context"),
        pytest.param(offering(slots=-1), id="negative slots"),
        pytest.param(offering(model=""), id="a model without a name"),
        pytest.param(offering(model="x" * 201), id="a model with an endless name"),
        pytest.param(offering(paths=frozenset(map(str, range(65)))), id="too many paths"),
        pytest.param(beat(loads=(LOAD,) * 65), id="too many loads"),
        pytest.param(beat(loads=(replace(LOAD, progress=1.5),)), id="more than loaded"),
        pytest.param(beat(loads=(replace(LOAD, progress=float("nan")),)), id="loaded to no number"),
        pytest.param(beat(loads=(replace(LOAD, waiting=-1),)), id="fewer than nobody waiting"),
        pytest.param(beat(loads=(replace(LOAD, waiting_max=-1),)), id="a negative queue"),
        pytest.param(beat(loads=(replace(LOAD, ready_in_ms=-1),)), id="ready in the past"),
        pytest.param(carded(region="a\r\nb"), id="a region of two lines"),
        pytest.param(carded(region=""), id="no region"),
        pytest.param(carded(hardware=replace(HARDWARE, isa="\u2603")), id="hardware that no header can hold"),
        pytest.param(carded(hardware=replace(HARDWARE, gpu="x" * 65)), id="a GPU with an endless name"),
        pytest.param(carded(hardware=replace(HARDWARE, cores=0)), id="no cores"),
        pytest.param(carded(hardware=replace(HARDWARE, memory_bytes=-1)), id="negative memory"),
    ],
)
def test_a_heartbeat_with_impossible_fields_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.heartbeat.read(data)


HEAD = m.Head(status=200, content_type="text/event-stream", engine_us=0)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(m.Final(index=0, usage=Usage(output_tokens=-1)), id="negative usage"),
        pytest.param(m.Final(index=0, usage=Usage(prompt_tokens=2**41)), id="usage without bound"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, status=-1)), id="no HTTP status"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, status=199)), id="an answer before the answer"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, status=600)), id="an unknown HTTP status"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, engine_us=-1)), id="an answer before the question"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, content_type="a\r\nb: c")), id="a second header"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, content_type="\u2603")), id="a header that isn't Latin-1"),
        pytest.param(m.Part(index=0, data=b"", head=replace(HEAD, content_type="x" * 129)), id="an endless header"),
    ],
)
def test_an_answer_with_impossible_fields_is_refused(message: m.Message) -> None:
    with pytest.raises(WireError):
        codec.to_gateway.read(encode(message))


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        (codec.to_gateway, encode(m.Part(index=0, data=b"", head=replace(HEAD, content_type="text/plain\n")))),
        (codec.heartbeat, carded(region="eu-de\n")),
    ],
)
def test_a_newline_at_the_end_is_refused_too(reader: Reader[Any], data: bytes) -> None:
    with pytest.raises(WireError):
        reader.read(data)

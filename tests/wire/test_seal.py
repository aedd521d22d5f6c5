"""Sealing: both ends understand each other, and whatever else comes meets one kind of error and changes nothing."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.pretty import pretty_repr
from sealed_ends import CANARY, SUITES, Ends, Gateway, Node, begin, heard, request_of, said

from fallow.model import messages as m
from fallow.model.errors import NotOpened, WireError
from fallow.model.ids import GatewayId, NodeId, OrgId
from fallow.wire import codec, seal
from fallow.wire.seal import BUCKETS, CALLS_MAX, SKIPPED_MAX, KemPair, lp, padded, unpadded
from fallow.wire.sign import enrol_bytes, kem_bytes

PROMISE = settings(max_examples=100)
FEW = settings(max_examples=40)
LOW_ORDER = (bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little"), (2**255 - 19).to_bytes(32, "little"),
             (2**255 - 18).to_bytes(32, "little"), bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
             bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"))  # fmt: skip
"""X25519 keys that agree on nothing but zeros with everybody (RFC 7748 §6.1)."""

by_suite = pytest.mark.parametrize("suite", SUITES)


@pytest.fixture(scope="module", params=SUITES)
def ends(request: pytest.FixtureRequest) -> Ends:
    """One session that all attacks of a suite share: none may harm it."""
    return Ends(request.param)


def refused(take: Callable[..., object], *data: Any, reason: str | None = None) -> None:
    """What comes is refused by one kind of error, whose text says nothing of what was sealed."""
    with pytest.raises(WireError) as caught:
        take(*data)
    assert CANARY.decode() not in str(caught.value)
    if reason is not None:
        assert isinstance(caught.value, NotOpened)
        assert caught.value.reason == reason


def flips(data: bytes) -> list[bytes]:
    """The data with one bit of each byte flipped in turn, and each byte's highest."""
    found = []
    for at, byte in enumerate(data):
        for bit in {at % 8, 7}:
            found.append(data[:at] + bytes([byte ^ 1 << bit]) + data[at + 1 :])
    return found


# Both ends understand each other.
def test_a_call_there_and_back(ends: Ends) -> None:
    gateway, node = ends.call(codec.encode(request_of()))
    for data in (b"", b"one", b"\0", b"two" * 1_000, b"\x80", b"\x80\0\0"):
        assert heard(gateway, said(node, data)) == data
        assert heard(node, said(gateway, data)) == data


def test_what_travels_says_nothing(ends: Ends) -> None:
    sent, gateway = ends.request()
    opened, node = ends.open(sent)
    assert opened == CANARY
    for data in (ends.hello, ends.welcome, sent, said(node), said(gateway)):
        assert CANARY not in data


@by_suite
def test_a_new_session_has_new_keys(suite: m.SuiteName) -> None:
    node, gateway = Node(suite), Gateway()
    one, two = Ends(suite, gateway, node), Ends(suite, gateway, node)
    assert one.gateway.id != two.gateway.id
    assert one.request()[0] != two.request()[0]
    first, _ = one.request()
    foreign = replace(codec.sealed_request.read(first), session=two.gateway.id)
    refused(two.open, codec.encode(foreign), reason="altered")


def test_sizes(ends: Ends) -> None:
    """docs/protocol/sealing.md names them."""
    hybrid = ends.first.hello.box[112:] != b""
    assert len(ends.asked.pair.public) == (1_216 if hybrid else 32)
    assert len(ends.first.hello.box) == (32 + (1_088 if hybrid else 0) + 64 + 16)
    assert len(ends.gateway.id) == 16
    gateway, _ = ends.call()
    assert len(gateway.seal(b"")[1]) == 1 + 16


# The first attack: bits that flip on the way.
def test_any_flipped_bit_of_a_hello(ends: Ends) -> None:
    for bad in flips(ends.hello):
        refused(ends.asked.welcome, bad)
    assert begin(ends.first, codec.encode(ends.asked.welcome(ends.hello)[0])).id == ends.gateway.id


def test_any_flipped_bit_of_a_welcome(ends: Ends) -> None:
    for bad in flips(ends.welcome):
        refused(begin, ends.first, bad)
    assert begin(ends.first, ends.welcome).id == ends.gateway.id


def test_any_flipped_bit_of_a_request(ends: Ends) -> None:
    request = codec.encode(request_of())
    sent, _ = ends.request(request)
    for bad in flips(sent):
        refused(ends.open, bad)
    assert ends.open(sent)[0] == request


MESSAGES: tuple[m.Inner, ...] = (
    m.Part(index=0, data=CANARY, head=m.Head(status=200, content_type="text/event-stream", engine_us=3)),
    m.Final(index=0, data=CANARY, tokens=(1, 2, 3), digest=bytes(32)),
    m.Alive(),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("pads", [False, True], ids=["plain", "padded"])
def test_any_flipped_bit_of_an_answer(ends: Ends, message: m.Inner, pads: bool) -> None:
    gateway, node = ends.call()
    node.pads = pads
    sent = said(node, codec.encode(message))
    for bad in flips(sent):
        refused(heard, gateway, bad)
    assert codec.inner.read(heard(gateway, sent)) == message


def test_any_flipped_bit_of_a_body(ends: Ends) -> None:
    gateway, node = ends.call()
    part = m.BodyPart(offset=0, data=CANARY)
    sent = said(gateway, codec.encode(part))
    for bad in flips(sent):
        refused(heard, node, bad)
    assert codec.body_part.read(heard(node, sent)) == part


@pytest.mark.parametrize("kind", ["hello", "welcome", "request", "part"])
def test_cut_off_and_prolonged(ends: Ends, kind: str) -> None:
    request, _ = ends.request()
    gateway, node = ends.call()
    part = said(node)
    data, take = {
        "hello": (ends.hello, ends.asked.welcome),
        "welcome": (ends.welcome, lambda bad: begin(ends.first, bad)),
        "request": (request, ends.open),
        "part": (part, lambda bad: heard(gateway, bad)),
    }[kind]
    for bad in [*(data[:size] for size in range(0, len(data), max(1, len(data) // 200))), data[:-1], data + b"\0", data + data]:
        refused(take, bad)
    assert take(data)


def test_boxes_of_any_length(ends: Ends) -> None:
    """As above, with lengths that fit their envelopes."""
    gateway, node = ends.call()
    index, box = node.seal(CANARY)
    hello = ends.first.hello
    for size in {0, 1, 15, 16, 17, 31, 32, 33, 112, 1_119, 1_120, 1_121, len(hello.box) - 1, 2_048} - {len(hello.box)}:
        bad = replace(hello, box=(hello.box + bytes(2_048))[:size])
        refused(seal.welcome, bad, ends.asked.id, ends.asked.pair, reason="altered")
    for size in (0, 1, 15, 16, 17, len(box) - 1, len(box) + 1):
        refused(gateway.open, index, (box + b"\0")[:size], reason="altered")
    assert gateway.open(index, box) == CANARY


# Who speaks to whom.
def signed(gateway: Gateway, node: Node, hello: m.Hello, **changes: Any) -> bytes:
    """A hello that was changed, and signed again by whoever it names."""
    changed = replace(hello, **changes)
    return codec.encode(replace(changed, signature=gateway.key.sign(seal.hello_bytes(changed, node.id))))


@by_suite
def test_another_gateway_can_t_use_a_hello(suite: m.SuiteName) -> None:
    """It may have heard it all, and be let in itself."""
    ends, thief = Ends(suite), Gateway()
    refused(ends.asked.welcome, signed(thief, ends.asked, ends.first.hello, gateway_id=thief.id), reason="altered")


@by_suite
def test_another_node_can_t_pass_a_hello_on(suite: m.SuiteName) -> None:
    """It has signed the honest node's KEM key as its own, so that the gateway says hello to it, and hands the hello on."""
    honest, thief, gateway = Node(suite), Node(suite), Gateway()
    asker = m.Hello(gateway_id=gateway.id, org_id=OrgId("org"), member_until_s=1_000, membership=bytes(64))
    asked = seal.ask(asker, thief.id, honest.kem, gateway.key.sign)
    refused(honest.welcome, codec.encode(asked.hello), reason="not_vouched")
    refused(seal.welcome, asked.hello, honest.id, honest.pair, reason="altered")
    refused(seal.welcome, asked.hello, thief.id, thief.pair, reason="altered")


@by_suite
def test_another_node_s_welcome_is_refused(suite: m.SuiteName) -> None:
    one, two = Ends(suite), Ends(suite)
    refused(begin, one.first, two.welcome, reason="altered")
    share = codec.to_gateway.read(one.welcome)
    assert isinstance(share, m.Welcome)
    refused(begin, one.first, codec.encode(replace(share, share=two.asked.pair.public[-32:])), reason="altered")


@by_suite
@pytest.mark.parametrize("field", ["org_id", "member_until_s", "membership", "session", "kid"])
def test_all_of_a_hello_counts(suite: m.SuiteName, field: str) -> None:
    """Even the gateway itself can't say another thing of the same secret: either it doesn't open, or the welcome is for nobody."""
    ends = Ends(suite)
    other: dict[str, Any] = {"org_id": "other", "member_until_s": 7, "membership": b"x" * 64, "session": b"s" * 16, "kid": b"k" * 8}
    changed = codec.to_node.read(signed(ends.asker, ends.asked, ends.first.hello, **{field: other[field]}))
    assert isinstance(changed, m.Hello)
    if field == "session":
        return refused(seal.welcome, changed, ends.asked.id, ends.asked.pair, reason="altered")
    welcomed, _ = seal.welcome(changed, ends.asked.id, ends.asked.pair)
    refused(seal.begin, ends.first, welcomed, reason="altered")


@by_suite
@pytest.mark.parametrize("session", [b"", b"short", bytes(15)], ids=len)
def test_a_session_s_name_has_its_length(suite: m.SuiteName, session: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "SESSION_BYTES", len(session))
    node, gateway = Node(suite), Gateway()
    hello = gateway.ask(node).hello
    assert len(hello.session) == len(session)
    monkeypatch.undo()
    refused(node.welcome, codec.encode(hello), reason="altered")


@by_suite
def test_a_secret_has_its_length(suite: m.SuiteName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "SECRET_BYTES", 31)
    node, gateway = Node(suite), Gateway()
    hello = codec.encode(gateway.ask(node).hello)
    monkeypatch.undo()
    refused(node.welcome, hello, reason="altered")


@by_suite
def test_a_rotated_key_and_a_restart(suite: m.SuiteName) -> None:
    ends = Ends(suite)
    sent, _ = ends.request()
    ends.asked.pair = KemPair(suite)
    refused(ends.asked.welcome, ends.hello, reason="no_key")
    refused(seal.welcome, ends.first.hello, ends.asked.id, ends.asked.pair, reason="altered")
    restarted = Node(suite)
    refused(seal.welcome, ends.first.hello, ends.asked.id, restarted.pair, reason="altered")
    assert ends.open(sent)[0] == CANARY  # the session is older than the key's end, and goes on


@by_suite
def test_a_replayed_hello_opens_no_old_call(suite: m.SuiteName) -> None:
    """A node that has forgotten the session may welcome it again: its new share makes it another one."""
    ends = Ends(suite)
    sent, _ = ends.request()
    _, ends.node = ends.asked.welcome(ends.hello)
    refused(ends.open, sent, reason="altered")


# Keys that are none.
def test_suites_don_t_mix() -> None:
    both = {suite: Node(suite) for suite in SUITES}
    for suite in SUITES:
        for other in set(SUITES) - {suite}:
            kem = replace(both[suite].kem, suite=other)
            refused(ask_with, kem, reason="no_key")


def ask_with(kem: m.KemKey) -> seal.Asked:
    gateway = Gateway()
    asker = m.Hello(gateway_id=gateway.id, org_id=OrgId("org"))
    return seal.ask(asker, NodeId("node"), kem, gateway.key.sign)


def test_a_suite_can_t_be_exchanged_for_the_half_of_it() -> None:
    """The X25519 half of a hybrid key opens nothing that was sealed under that half's name."""
    node = Node("mlkem768-x25519")
    half = KemPair("x25519", bytes(64) + bytes(31) + b"\x01")
    hybrid = KemPair("mlkem768-x25519", bytes(64) + bytes(31) + b"\x01")
    assert hybrid.public[-32:] == half.public
    asked = ask_with(replace(node.kem, suite="x25519", public_key=half.public))
    refused(seal.welcome, asked.hello, NodeId("node"), hybrid, reason="altered")


@by_suite
@pytest.mark.parametrize("size", [0, 1, 31, 33, 1_184, 1_215, 1_217])
def test_kem_keys_of_another_length(suite: m.SuiteName, size: int) -> None:
    kem = Node(suite).kem
    refused(ask_with, replace(kem, public_key=(kem.public_key * 40)[-size:] if size else b""), reason="no_key")


@by_suite
@pytest.mark.parametrize("point", LOW_ORDER, ids=range(len(LOW_ORDER)))
def test_keys_that_agree_with_everybody(suite: m.SuiteName, point: bytes) -> None:
    ends = Ends(suite)
    refused(begin, ends.first, codec.encode(m.Welcome(share=point, confirm=bytes(32))), reason="altered")
    kem = replace(ends.asked.kem, public_key=ends.asked.kem.public_key[:-32] + point)
    refused(ask_with, kem, reason="no_key")
    assert begin(ends.first, ends.welcome).id == ends.gateway.id


@by_suite
def test_a_low_share_in_a_hello(suite: m.SuiteName, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a gateway that is let in and means harm."""
    node, gateway = Node(suite), Gateway()
    monkeypatch.setattr(seal, "X25519PrivateKey", Lowly)
    hello = codec.encode(gateway.ask(node).hello)
    monkeypatch.undo()
    refused(node.welcome, hello, reason="altered")


class Lowly:
    """A key pair whose public half is of low order."""

    @classmethod
    def generate(cls) -> "Lowly":
        return cls()

    def public_key(self) -> "Lowly":
        return self

    def public_bytes_raw(self) -> bytes:
        return LOW_ORDER[1]


def test_polynomials_that_are_none() -> None:
    """ML-KEM's half must be reduced (FIPS 203 §7.2)."""
    kem = Node("mlkem768-x25519").kem
    refused(ask_with, replace(kem, public_key=b"\xff" * 1_184 + kem.public_key[-32:]), reason="no_key")


def test_a_machine_without_ml_kem(monkeypatch: pytest.MonkeyPatch) -> None:
    kem = Node("mlkem768-x25519").kem
    monkeypatch.setattr(seal, "MLKEM768PublicKey", Lacking)
    with pytest.raises(NotOpened, match="update it") as caught:
        ask_with(kem)
    assert caught.value.reason == "no_key"


class Lacking:
    """ML-KEM where OpenSSL has none."""

    @staticmethod
    def from_public_bytes(data: bytes) -> None:
        raise UnsupportedAlgorithm("lacking")


def test_no_signature_is_one_of_a_text(ends: Ends) -> None:
    """Brokers have their clients sign a text of the broker's choice, with the key that signs all this."""
    node_id, key = ends.asked.id, ends.asked.key.public
    hello = replace(ends.first.hello, kid=b"k" * 8, membership=b"m" * 64, box=b"b" * 112, session=b"s" * 16)
    for signed in (
        seal.hello_bytes(hello, node_id),
        kem_bytes(node_id, m.KemKey(suite="x25519", public_key=b"k" * 32, expires_at_s=1)),
        enrol_bytes(m.Enrol(role="node", public_key=key)),
    ):
        with pytest.raises(UnicodeDecodeError):
            signed.decode()


# Calls: each opens once, in any order within the window.
def test_a_replayed_call(ends: Ends) -> None:
    sent, _ = ends.request()
    assert ends.open(sent)[0] == CANARY
    refused(ends.open, sent, reason="replayed")
    late, _ = ends.request()
    ends.call()
    assert ends.open(late)[0] == CANARY
    refused(ends.open, late, reason="replayed")


def test_a_call_under_another_number(ends: Ends) -> None:
    sent, _ = ends.request()
    sealed = codec.sealed_request.read(sent)
    for number in (sealed.number + 1, sealed.number + SKIPPED_MAX, sealed.number - 1, 0, 2**32):
        refused(ends.open, codec.encode(replace(sealed, number=number)))
    assert ends.open(sent)[0] == CANARY


@by_suite
def test_calls_out_of_order(suite: m.SuiteName) -> None:
    ends = Ends(suite)
    sent = [ends.request(b"%d" % number)[0] for number in range(SKIPPED_MAX + 1)]
    for number in (SKIPPED_MAX, *range(1, SKIPPED_MAX, 2), *range(0, SKIPPED_MAX, 2)):
        assert ends.open(sent[number])[0] == b"%d" % number
    for data in sent:
        refused(ends.open, data, reason="replayed")


@by_suite
def test_the_window_s_edge(suite: m.SuiteName) -> None:
    ends = Ends(suite)
    sent = [ends.request()[0] for _ in range(2 * SKIPPED_MAX + 4)]
    refused(ends.open, sent[SKIPPED_MAX + 1], reason="no_session")
    assert ends.open(sent[SKIPPED_MAX])  # which skips as many as may be
    refused(ends.open, sent[2 * SKIPPED_MAX + 2], reason="no_session")
    assert ends.open(sent[SKIPPED_MAX + 2])  # and one more pushes the oldest out
    refused(ends.open, sent[0], reason="replayed")
    assert ends.open(sent[1])


def test_numbers_that_no_gateway_has(ends: Ends) -> None:
    for number in (-1, -(2**70), CALLS_MAX, 2**32, 2**70):
        refused(ends.node.open, number, b"")
    assert ends.call()


@by_suite
def test_a_session_is_used_up(suite: m.SuiteName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "CALLS_MAX", 3)
    ends = Ends(suite)
    for _ in range(3):
        assert not ends.gateway.is_used_up
        ends.call()
    assert ends.gateway.is_used_up
    sent, _ = ends.request()
    refused(ends.open, sent, reason="no_session")


# Messages of a call: each opens in its place, once, at the other end of this call only.
def test_a_message_in_another_place(ends: Ends) -> None:
    gateway, node = ends.call()
    first, second, third = (node.seal(b"%d" % at) for at in range(3))
    refused(gateway.open, first[0], second[1], reason="altered")
    refused(gateway.open, second[0], first[1], reason="altered")
    for index in (3, 2**32, 2**96 - 1, 2**96, 2**200):
        refused(gateway.open, index, first[1], reason="altered")
    refused(gateway.open, -1, first[1], reason="replayed")
    assert gateway.open(*first) == b"0"
    refused(gateway.open, *first, reason="replayed")
    assert gateway.open(*third) == b"2"
    refused(gateway.open, *second, reason="replayed")


def test_a_message_of_another_call_or_direction(ends: Ends) -> None:
    gateway, node = ends.call()
    other_gateway, other_node = ends.call()
    index, box = node.seal(CANARY)
    refused(other_gateway.open, index, box, reason="altered")
    refused(node.open, index + 1, node.seal(CANARY)[1], reason="altered")
    refused(other_node.open, *gateway.seal(CANARY), reason="altered")
    refused(gateway.open, *gateway.seal(CANARY), reason="altered")
    assert gateway.open(index, box) == CANARY


def test_a_request_is_no_part_of_its_body(ends: Ends) -> None:
    sent, _ = ends.request()
    sealed = codec.sealed_request.read(sent)
    _, node = ends.open(sent)
    refused(node.open, 0, sealed.box, reason="replayed")


@FEW
@given(
    suite=st.sampled_from(SUITES), steps=st.lists(st.tuples(st.sampled_from(["call", "open", "up", "down", "hear"]), st.integers(0, 30)))
)
def test_any_order_of_calls_and_messages(suite: m.SuiteName, steps: Sequence[tuple[str, int]]) -> None:
    """Against a model of the window, with a small one: what opens is what was sealed, and nothing opens that shouldn't."""
    window = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "SKIPPED_MAX", window)
        ends = Ends(suite)
        sent: list[tuple[bytes, seal.Channel]] = []
        expected, skipped = 0, list[int]()
        lines: list[tuple[seal.Channel, seal.Channel, list[tuple[int, bytes]]]] = []
        heard_of: dict[int, int] = {}
        for kind, at in steps:
            if kind == "call":
                sent.append(ends.request(b"call %d" % len(sent)))
            elif kind == "open" and sent:
                number = at % len(sent)
                opens = number in skipped or 0 <= number - expected <= window
                if not opens:
                    refused(ends.open, sent[number][0])
                    continue
                data, node = ends.open(sent[number][0])
                assert data == b"call %d" % number
                lines += [(sent[number][1], node, []), (node, sent[number][1], [])]
                if number in skipped:
                    skipped.remove(number)
                else:
                    skipped = [*skipped, *range(expected, number)][-window:]
                    expected = number + 1
            elif kind in ("up", "down") and lines:
                line = lines[at % len(lines) // 2 * 2 + (kind == "down")]
                line[2].append(line[0].seal(b"message %d" % len(line[2])))
            elif kind == "hear" and lines and (waiting := lines[at % len(lines)][2]):
                which = at % len(lines)
                place = at % len(waiting)
                if place <= heard_of.get(which, -1):
                    refused(lines[which][1].open, *waiting[place], reason="replayed")
                else:
                    assert lines[which][1].open(*waiting[place]) == b"message %d" % place
                    heard_of[which] = place


# Padding, and parts with their lengths.
@PROMISE
@given(st.binary(max_size=300) | st.integers(0, 40_000).map(bytes), st.booleans())
def test_padding_is_undone(data: bytes, to_buckets: bool) -> None:
    whole = padded(data, to_buckets=to_buckets)
    assert unpadded(whole) == data
    if not to_buckets:
        assert len(whole) == len(data) + 1
    elif len(data) < BUCKETS[-1]:
        assert len(whole) == min(bucket for bucket in BUCKETS if bucket > len(data))
    else:
        assert len(whole) % BUCKETS[-1] == 0
        assert 0 < len(whole) - len(data) <= BUCKETS[-1]


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_bucket_s_edge(bucket: int) -> None:
    assert len(padded(bytes(bucket - 1), to_buckets=True)) == bucket
    following = {**dict(itertools.pairwise(BUCKETS)), BUCKETS[-1]: 2 * BUCKETS[-1]}
    assert len(padded(bytes(bucket), to_buckets=True)) == following[bucket]


@PROMISE
@given(st.binary(max_size=60))
def test_anything_is_unpadded_or_refused(data: bytes) -> None:
    try:
        bare = unpadded(data)
    except NotOpened:
        assert not data.rstrip(b"\0").endswith(b"\x80")
    else:
        assert data == bare + b"\x80" + bytes(len(data) - len(bare) - 1)


parts = st.lists(st.binary(max_size=8), max_size=5)


@PROMISE
@given(parts, parts)
def test_no_two_lists_of_parts_are_alike(left: list[bytes], right: list[bytes]) -> None:
    assert (lp(*left) == lp(*right)) == (left == right)
    whole = b"".join(left)
    for cut in range(len(whole) + 1):
        if [whole[:cut], whole[cut:]] != left:
            assert lp(whole[:cut], whole[cut:]) != lp(*left)


def test_padding_hides_sizes(ends: Ends) -> None:
    gateway, node = ends.call()
    node.pads = True
    assert {len(node.seal(bytes(size))[1]) for size in range(BUCKETS[0])} == {BUCKETS[0] + 16}
    assert gateway.open(*node.seal(CANARY)) == CANARY


# Nothing shows a secret.
def test_nothing_shows_a_secret(ends: Ends) -> None:
    gateway, node = ends.call()
    for value in (ends.first, ends.asked.pair, ends.gateway, ends.node, gateway, node):
        for shown in (repr(value), str(value), f"{value}", pretty_repr(value)):
            assert re.fullmatch(r"<fallow\.wire\.seal\.\w+ object at 0x[0-9a-f]+>", shown)


@by_suite
def test_a_kem_key_from_a_seed(suite: m.SuiteName) -> None:
    seed = bytes(range(96))
    one, two = KemPair(suite, seed), KemPair(suite, seed)
    assert one.public == two.public
    assert one.kid == two.kid == seal.kid_of(one.public)
    assert KemPair(suite).public != KemPair(suite).public


def test_ids_of_any_length_stay_apart() -> None:
    """`ab` asking `c` isn't `a` asking `bc`."""
    hello = m.Hello(gateway_id=GatewayId("ab"), org_id=OrgId("o"))
    assert seal.hello_bytes(hello, NodeId("c")) != seal.hello_bytes(replace(hello, gateway_id=GatewayId("a")), NodeId("bc"))

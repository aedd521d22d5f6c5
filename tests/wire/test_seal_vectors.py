"""The known answers in docs/protocol: the product gives them, and so does a second computation from the standards' own words."""

import hashlib
import hmac
import struct
from typing import Any

import msgspec
import pytest
import seal_vectors
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fallow.model import messages as m
from fallow.model.ids import AttemptId, NodeId
from fallow.model.receipt import Usage
from fallow.wire import codec, seal
from fallow.wire.commitment import Commitment
from fallow.wire.nkey_text import raw_public, verifies
from fallow.wire.sign import is_vouched, kem_bytes, kem_verifies

VECTORS: dict[str, Any] = msgspec.json.decode(seal_vectors.PATH.read_bytes())
SESSIONS: list[dict[str, Any]] = VECTORS["sessions"]


@pytest.fixture(params=SESSIONS, ids=lambda session: session["suite"])
def session(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def raw(values: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(values[name])


def hello_of(session: dict[str, Any]) -> m.Hello:
    hello = codec.to_node.read(raw(session["hello"], "encoded"))
    assert isinstance(hello, m.Hello)
    return hello


def node_of(session: dict[str, Any]) -> NodeId:
    return NodeId(session["keys"]["node"]["public"])


class Given:
    """Stands in for X25519PrivateKey where a known key is to be drawn."""

    def __init__(self, private: bytes) -> None:
        self._private = private

    def generate(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._private)


# The product.
def test_keys_and_signatures(session: dict[str, Any]) -> None:
    kem, hello, node_id = session["kem"], hello_of(session), node_of(session)
    pair = seal.KemPair(session["suite"], raw(kem, "seed"))
    assert (pair.public, pair.kid) == (raw(kem, "public_key"), raw(kem, "kid"))
    key = m.KemKey(suite=session["suite"], public_key=pair.public, expires_at_s=kem["expires_at_s"], signature=raw(kem, "signature"))
    assert kem_bytes(node_id, key) == raw(kem, "signed")
    assert kem_verifies(node_id, key, now_s=kem["expires_at_s"])
    assert seal.hello_bytes(hello, node_id) == raw(session["hello"], "signed")
    assert verifies(hello.gateway_id, raw(session["hello"], "signed"), hello.signature)
    authority = session["keys"]["hub"]["public"]
    assert is_vouched(hello.gateway_id, hello.org_id, hello.member_until_s, hello.membership, authority, now_s=0)
    assert codec.encode(hello) == raw(session["hello"], "encoded")


def test_a_session_by_both_ends(session: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hello, node_id, welcome = hello_of(session), node_of(session), session["welcome"]
    pair = seal.KemPair(session["suite"], raw(session["kem"], "seed"))
    monkeypatch.setattr(seal, "X25519PrivateKey", Given(raw(welcome, "node_private")))
    welcomed, node = seal.welcome(hello, node_id, pair)
    monkeypatch.undo()
    assert codec.encode(welcomed) == raw(welcome, "encoded")
    private = X25519PrivateKey.from_private_bytes(raw(session["hello"], "gateway_private"))
    gateway = seal.begin(seal.Asked(hello, node_id, raw(session["hello"], "secret"), private), welcomed)
    for call in session["calls"]:
        number, channel = gateway.call()
        assert number == call["number"]
        there = [one for one in call["messages"] if one["direction"] == "to node"]
        back = [one for one in call["messages"] if one["direction"] == "to gateway"]
        for one in there:
            channel.pads = one["padded"]
            assert channel.seal(raw(one, "message")) == (one["index"], raw(one, "box"))
        if there:
            sealed = codec.sealed_request.read(raw(there[0], "encoded"))
            assert (sealed.session, sealed.number) == (gateway.id, number)
            data, other = node.open(sealed.number, sealed.box)
            assert data == raw(there[0], "message")
            assert codec.request.read(data).attempt_id == "attempt-1"
            other.pads = there[0]["padded"]
            assert [other.seal(raw(one, "message")) for one in back] == [(one["index"], raw(one, "box")) for one in back]
        for one in back:
            carried = codec.to_gateway.read(raw(one, "encoded"))
            assert isinstance(carried, m.Sealed)
            assert channel.open(carried.index, carried.box) == raw(one, "message")
            assert codec.encode(codec.inner.read(raw(one, "message"))) == raw(one, "message")


def test_the_commitment() -> None:
    known = VECTORS["commitment"]
    kept = Commitment(AttemptId(known["attempt_id"]), raw(known, "body"), known["model_digest"])
    for piece in known["pieces"]:
        kept.add(bytes.fromhex(piece))
    prompt, cached, output = known["usage"]
    usage = Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=output)
    assert kept.digest(usage, known["tokens"]) == raw(known, "digest")
    begun = sha256(lp(b"fallow/answer/v1", known["attempt_id"].encode(), sha256(raw(known, "body")), known["model_digest"].encode()))
    data = sha256(b"".join(map(bytes.fromhex, known["pieces"])))
    assert sha256(lp(begun, data, struct.pack(">QQQ", *known["usage"]), struct.pack(">I", *known["tokens"]))) == raw(known, "digest")


# The same from the standards' own words, with nothing of the product's.
def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, "sha256").digest()


def lp(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def expand(key: bytes, info: bytes) -> bytes:
    return mac(key, info + b"\x01")


class Labelled:
    """RFC 9180 §4: HKDF with labels, for one suite id."""

    def __init__(self, suite: bytes) -> None:
        self._suite = suite

    def extract(self, salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return mac(salt, b"HPKE-v1" + self._suite + label + ikm)

    def expand(self, key: bytes, label: bytes, info: bytes, size: int) -> bytes:
        return expand(key, struct.pack(">H", size) + b"HPKE-v1" + self._suite + label + info)[:size]


def shared_secret(suite: str, seed: bytes, public: bytes, box: bytes) -> tuple[int, int, bytes]:
    """What the KEM gives: its number, the size of what it sent, and the shared secret."""
    private = X25519PrivateKey.from_private_bytes(seed[-32:])
    if suite == "x25519":  # DHKEM(X25519, HKDF-SHA256), RFC 9180 §4.1
        agreed = private.exchange(X25519PublicKey.from_public_bytes(box[:32]))
        labelled = Labelled(b"KEM" + struct.pack(">H", 0x0020))
        key = labelled.extract(b"", b"eae_prk", agreed)
        return 0x0020, 32, labelled.expand(key, b"shared_secret", box[:32] + public, 32)
    sent, share = box[:1_088], box[1_088:1_120]  # X-Wing: draft-connolly-cfrg-xwing-kem
    first = MLKEM768PrivateKey.from_seed_bytes(seed[:64]).decapsulate(sent)
    second = private.exchange(X25519PublicKey.from_public_bytes(share))
    return 0x647A, 1_120, hashlib.sha3_256(first + second + share + public[-32:] + rb"\.//^" + b"\\").digest()


def opened(suite: str, seed: bytes, public: bytes, box: bytes, info: bytes) -> bytes:
    """HPKE in base mode, RFC 9180 §5.1: HKDF-SHA256 is 1, ChaCha20-Poly1305 is 3."""
    number, size, secret = shared_secret(suite, seed, public, box)
    labelled = Labelled(b"HPKE" + struct.pack(">HHH", number, 1, 3))
    context = b"\0" + labelled.extract(b"", b"psk_id_hash", b"") + labelled.extract(b"", b"info_hash", info)
    key = labelled.extract(secret, b"secret", b"")
    nonce = labelled.expand(key, b"base_nonce", context, 12)
    return ChaCha20Poly1305(labelled.expand(key, b"key", context, 32)).decrypt(nonce, box[size:], b"")


def test_each_step_by_the_standards(session: dict[str, Any]) -> None:
    keys, kem, hello, welcome = (session[name] for name in ("keys", "kem", "hello", "welcome"))
    gateway_id, node_id = keys["gateway"]["public"].encode(), keys["node"]["public"].encode()
    for name in ("gateway", "node"):
        public = Ed25519PrivateKey.from_private_bytes(raw(keys[name], "seed")).public_key()
        assert public.public_bytes(Encoding.Raw, PublicFormat.Raw) == raw_public(keys[name]["public"], "U")
    kid, session_name = sha256(raw(kem, "public_key"))[:8], raw(hello, "session")
    assert kid == raw(kem, "kid")
    info = lp(b"fallow/seal/v1 secret", gateway_id, node_id, session_name, session["suite"].encode(), raw(kem, "public_key"))
    assert info == raw(hello, "info")
    inner = opened(session["suite"], raw(kem, "seed"), raw(kem, "public_key"), raw(hello, "box"), info)
    assert inner == raw(hello, "secret") + raw(hello, "gateway_share")
    until = struct.pack(">Q", hello["member_until_s"])
    parts = (gateway_id, node_id, session_name, kid, hello["org_id"].encode(), until, raw(hello, "membership"), raw(hello, "box"))
    signed = lp(b"fallow/seal/v1 hello\xff", *parts)
    assert signed == raw(hello, "signed")
    th = sha256(lp(b"fallow/seal/v1 session", signed, raw(hello, "signature"), raw(welcome, "node_share")))
    private = X25519PrivateKey.from_private_bytes(raw(welcome, "node_private"))
    agreed = private.exchange(X25519PublicKey.from_public_bytes(inner[32:]))
    assert agreed == raw(welcome, "agreed")
    root = mac(th, inner[:32] + agreed)
    assert root == raw(welcome, "root")
    assert expand(root, b"confirm") == raw(welcome, "confirm")
    chain = expand(root, b"chain")
    for known, call in zip(session["chains"], session["calls"], strict=True):
        assert chain.hex() == known
        both = hmac.new(chain, b"call\x01", "sha512").digest()
        check_call(both[:32], call)
        chain = both[32:]


def check_call(key: bytes, call: dict[str, Any]) -> None:
    assert key == raw(call, "key")
    for one in call["messages"]:
        direction = {"to node": 0, "to gateway": 1}[one["direction"]]
        data = ChaCha20Poly1305(key).decrypt(struct.pack(">BxxxQ", direction, one["index"]), raw(one, "box"), None)
        assert data.rstrip(b"\0") == raw(one, "message") + b"\x80"
        assert len(data) in (256, 1_024, 4_096) if one["padded"] else data[-1:] == b"\x80"


def test_the_script_writes_what_is_there() -> None:
    """But for what HPKE draws anew each time, and what follows from it."""
    made = seal_vectors.vectors()
    assert made["commitment"] == VECTORS["commitment"]
    for new, old in zip(made["sessions"], SESSIONS, strict=True):
        assert (new["suite"], new["keys"], new["kem"]) == (old["suite"], old["keys"], old["kem"])
        fixed = set(old["hello"]) - {"box", "signed", "signature", "encoded"}
        assert {name: new["hello"][name] for name in fixed} == {name: old["hello"][name] for name in fixed}
        assert [len(call["messages"]) for call in new["calls"]] == [len(call["messages"]) for call in old["calls"]]

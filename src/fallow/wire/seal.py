"""Sealing: what a gateway and a node say to each other of a call is for these two alone, whoever carries it.

A session begins with a `Hello` and a `Welcome`. The gateway draws a secret and an X25519 key, and sends both, under HPKE (RFC 9180), to
the node's KEM key, which the node has signed with its own. The node answers with an X25519 key of its own. Both sides mix the secret with
what the two X25519 keys agree on, and forget all of them. So whoever gets at the node's KEM key later still reads nothing, and whoever can
break X25519 one day still lacks the secret. A chain of keys follows, of which each call takes the next, and none leads back.

    th      = SHA-256(lp("fallow/seal/v1 session", hello's bytes, hello's signature, node's X25519 key))
    root    = HMAC-SHA-256(th, secret || X25519(gateway's, node's))            HKDF-Extract, RFC 5869
    confirm = expand(root, "confirm"),  chain 0 = expand(root, "chain")        expand(k, i) = HMAC-SHA-256(k, i || 0x01): HKDF-Expand
    call n || chain n+1 = HMAC-SHA-512(chain n, "call" || 0x01)                 HKDF-Expand to 64 bytes, of which a call takes 32

A call's key is one of ChaCha20-Poly1305 (RFC 8439). The nonce of message i of a direction is 0 (to the node) or 1 (to the gateway) in one
byte and i in 11, big-endian; no key is used for anything else. `lp` is each part after its length in 4 bytes, big-endian. Who the two are
is in the hello's bytes, and so in every key: a message is good for this gateway, node, call, direction and place only, and opens once. The
secret's HPKE `info` names both, the session, the suite and the whole KEM key, so none of them can be exchanged for another. Python can't
wipe memory: keys are dropped as soon as they have done their part. All of it byte by byte, with known answers: docs/protocol/sealing.md.
"""

import hashlib
import hmac
import secrets
from bisect import bisect_left

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
from msgspec.structs import replace

from fallow.model.errors import NotOpened
from fallow.model.ids import NodeId
from fallow.model.messages import Hello, KemKey, SuiteName, Welcome
from fallow.wire.sign import Sign

LABEL = b"fallow/seal/v1"
SECRET_BYTES = 32
SESSION_BYTES = 16
KEY_BYTES = 32
KID_BYTES = 8
SKIPPED_MAX = 256
"""Calls of a session that may be overtaken by later ones. Who skips more needs a new session."""
CALLS_MAX = 1 << 20
"""Calls of one session."""
END = b"\x80"
"""Ends what is sealed; zeros may follow it, so that only rounded sizes are seen."""
BUCKETS = (256, 1024, 4096, 16384)
"""Sizes that padded messages have; above the largest, its multiples."""

_KEMS: dict[SuiteName, KEM] = {"mlkem768-x25519": KEM.MLKEM768_X25519, "x25519": KEM.X25519}
_PUBLIC_BYTES: dict[SuiteName, int] = {"mlkem768-x25519": 1184 + 32, "x25519": 32}
_MLKEM_SEED_BYTES = 64
_TO_NODE, _TO_GATEWAY = b"\x00", b"\x01"


def lp(*parts: bytes) -> bytes:
    """The parts, each after its length in 4 bytes: no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def kid_of(public_key: bytes) -> bytes:
    """The short name of a KEM key."""
    return hashlib.sha256(public_key).digest()[:KID_BYTES]


def _hpke(suite: SuiteName) -> Suite:
    return Suite(_KEMS[suite], KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class KemPair:
    """A node's KEM key, in memory only. `public` is ML-KEM-768's half (1,184 bytes) if the suite has one, then X25519's (32)."""

    def __init__(self, suite: SuiteName, seed: bytes | None = None) -> None:
        """Made anew, or from a seed: ML-KEM's 64 bytes if the suite has it, then X25519's 32. Raises UnsupportedAlgorithm."""
        self.suite = suite
        raw = seed[-32:] if seed is not None else secrets.token_bytes(32)
        x25519 = X25519PrivateKey.from_private_bytes(raw)
        self.public = x25519.public_key().public_bytes_raw()
        self._private: X25519PrivateKey | MLKEM768X25519PrivateKey = x25519
        if suite == "mlkem768-x25519":
            mlkem = MLKEM768PrivateKey.generate() if seed is None else MLKEM768PrivateKey.from_seed_bytes(seed[:_MLKEM_SEED_BYTES])
            self.public = mlkem.public_key().public_bytes_raw() + self.public
            self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.kid = kid_of(self.public)

    def open(self, box: bytes, info: bytes) -> bytes:
        """What was sealed to this key; raises NotOpened."""
        try:
            return _hpke(self.suite).decrypt(box, self._private, info)
        except (InvalidTag, ValueError):
            raise NotOpened("a session's secret could not be opened") from None


def _sealed_to(kem: KemKey, secret: bytes, info: bytes) -> bytes:
    """Sealed so that only the KEM key's owner can open it; raises NotOpened if it isn't a key, or not one for this machine."""
    if len(kem.public_key) != _PUBLIC_BYTES[kem.suite]:
        raise NotOpened("the node's KEM key isn't of its suite's length", reason="no_key")
    try:
        x25519 = X25519PublicKey.from_public_bytes(kem.public_key[-32:])
        if kem.suite == "x25519":
            return _hpke(kem.suite).encrypt(secret, x25519, info)
        mlkem = MLKEM768PublicKey.from_public_bytes(kem.public_key[:-32])
        return _hpke(kem.suite).encrypt(secret, MLKEM768X25519PublicKey(mlkem, x25519), info)
    except ValueError:
        raise NotOpened("the node's KEM key isn't one of its suite", reason="no_key") from None
    except UnsupportedAlgorithm:
        raise NotOpened("this machine's OpenSSL lacks ML-KEM, which the node's KEM key needs: update it", reason="no_key") from None


def _info(gateway_id: str, node_id: str, session: bytes, suite: SuiteName, public_key: bytes) -> bytes:
    return lp(LABEL + b" secret", gateway_id.encode(), node_id.encode(), session, suite.encode(), public_key)


def hello_bytes(hello: Hello, node_id: NodeId) -> bytes:
    """What the gateway signs of a hello, all but the signature. No text has the byte ff: brokers have clients sign texts at log-in."""
    return lp(
        LABEL + b" hello\xff",
        hello.gateway_id.encode(),
        node_id.encode(),
        hello.session,
        hello.kid,
        hello.org_id.encode(),
        hello.member_until_s.to_bytes(8, "big"),
        hello.membership,
        hello.box,
    )


def _root(hello: Hello, node_id: NodeId, node_share: bytes, secret: bytes, shared: bytes) -> bytes:
    th = hashlib.sha256(lp(LABEL + b" session", hello_bytes(hello, node_id), hello.signature, node_share)).digest()
    return hmac.digest(th, secret + shared, "sha256")


def _expand(key: bytes, info: bytes) -> bytes:
    return hmac.digest(key, info + b"\x01", "sha256")


def _agreed(private: X25519PrivateKey, public: bytes) -> bytes:
    """What two X25519 keys agree on; raises NotOpened for what is no key, or one that agrees on the same with everybody."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise NotOpened("a session's share isn't an X25519 key") from None


def padded(data: bytes, *, to_buckets: bool) -> bytes:
    """The data with its end marked, and rounded up to a bucket if asked for."""
    if not to_buckets:
        return data + END
    size = len(data) + 1
    whole = BUCKETS[bisect_left(BUCKETS, size)] if size <= BUCKETS[-1] else -(-size // BUCKETS[-1]) * BUCKETS[-1]
    return (data + END).ljust(whole, b"\0")


def unpadded(data: bytes) -> bytes:
    """The data that was padded; raises NotOpened if its end isn't marked."""
    bare = data.rstrip(b"\0")
    if bare[-1:] != END:
        raise NotOpened("a sealed message has no end")
    return bare[:-1]


class Channel:
    """One call, as one of its two ends holds it."""

    def __init__(self, key: bytes, *, is_nodes: bool) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._own, self._others = (_TO_GATEWAY, _TO_NODE) if is_nodes else (_TO_NODE, _TO_GATEWAY)
        self._next = 0
        self._heard = -1
        self.pads = False
        """Whether what is sealed here is rounded up to a bucket."""

    def seal(self, data: bytes) -> tuple[int, bytes]:
        """The place of the next message in this direction, and the message for the other side alone."""
        index = self._next
        self._next += 1
        return index, self._cipher.encrypt(self._own + index.to_bytes(11, "big"), padded(data, to_buckets=self.pads), None)

    def open(self, index: int, box: bytes) -> bytes:
        """What the other side sealed at this place; raises NotOpened if it didn't, or if this place or a later one was opened before."""
        if index <= self._heard:
            raise NotOpened("this message was here before, or was overtaken", reason="replayed")
        try:
            data = self._cipher.decrypt(self._others + index.to_bytes(11, "big"), box, None)
        except (InvalidTag, OverflowError):
            raise NotOpened("a sealed message was altered on the way, or isn't in its place") from None
        self._heard = index
        return unpadded(data)


def _steps(chain: bytes, count: int) -> tuple[list[bytes], bytes]:
    """The keys of a chain's next calls, and the chain after them."""
    keys = []
    for _ in range(count):
        both = hmac.digest(chain, b"call\x01", "sha512")
        keys.append(both[:KEY_BYTES])
        chain = both[KEY_BYTES:]
    return keys, chain


class GatewaySession:
    """The gateway's end of a session with a node."""

    def __init__(self, session: bytes, chain: bytes) -> None:
        self.id = session
        self._chain = chain
        self._number = 0

    @property
    def is_used_up(self) -> bool:
        return self._number >= CALLS_MAX

    def call(self) -> tuple[int, Channel]:
        """The next call's number, and its channel."""
        (key,), self._chain = _steps(self._chain, 1)
        self._number += 1
        return self._number - 1, Channel(key, is_nodes=False)


class NodeSession:
    """The node's end of a session with a gateway."""

    def __init__(self, hello: Hello, chain: bytes) -> None:
        self.id = hello.session
        self.gateway_id = hello.gateway_id
        self.org_id = hello.org_id
        self._chain = chain
        self._number = 0
        self._skipped: dict[int, bytes] = {}

    def open(self, number: int, box: bytes) -> tuple[bytes, Channel]:
        """A call's first message and its channel; raises NotOpened.

        A call opens once. What doesn't open changes nothing: the call that was meant may still come.
        """
        ahead = number - self._number
        if ahead < 0:
            key = self._skipped.get(number)
            if key is None:
                raise NotOpened("this call was here before, or is long overtaken", reason="replayed")
            opened = _opened(key, box)
            del self._skipped[number]
            return opened
        if ahead > SKIPPED_MAX or number >= CALLS_MAX:
            raise NotOpened(f"more than {SKIPPED_MAX} calls of the session are missing", reason="no_session")
        keys, after = _steps(self._chain, ahead + 1)
        opened = _opened(keys[-1], box)
        self._skipped.update(zip(range(self._number, number), keys[:-1], strict=True))
        self._chain, self._number = after, number + 1
        for oldest in list(self._skipped)[: max(0, len(self._skipped) - SKIPPED_MAX)]:
            del self._skipped[oldest]
        return opened


def _opened(key: bytes, box: bytes) -> tuple[bytes, Channel]:
    channel = Channel(key, is_nodes=True)
    return channel.open(0, box), channel


class Asked:
    """What a gateway keeps of a hello until the welcome comes. No value with fields: nothing shows or compares its secrets."""

    def __init__(self, hello: Hello, node_id: NodeId, secret: bytes, private: X25519PrivateKey) -> None:
        self.hello, self.node_id = hello, node_id
        self._secret, self._private = secret, private

    def root(self, share: bytes) -> bytes:
        """The session's root with the node's share; raises NotOpened."""
        return _root(self.hello, self.node_id, share, self._secret, _agreed(self._private, share))


def ask(asker: Hello, node_id: NodeId, kem: KemKey, sign: Sign) -> Asked:
    """A hello to a node whose KEM key was checked; `asker` says who asks, `sign` is of their key. Raises NotOpened."""
    private, secret, session = X25519PrivateKey.generate(), secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(SESSION_BYTES)
    kid = kid_of(kem.public_key)
    inner = secret + private.public_key().public_bytes_raw()
    box = _sealed_to(kem, inner, _info(asker.gateway_id, node_id, session, kem.suite, kem.public_key))
    hello = replace(asker, session=session, kid=kid, box=box, signature=b"")
    return Asked(replace(hello, signature=sign(hello_bytes(hello, node_id))), node_id, secret, private)


def welcome(hello: Hello, node_id: NodeId, pair: KemPair) -> tuple[Welcome, NodeSession]:
    """The node's answer to a hello whose signature was checked, and its end of the session; raises NotOpened."""
    inner = pair.open(hello.box, _info(hello.gateway_id, node_id, hello.session, pair.suite, pair.public))
    if len(inner) != SECRET_BYTES + 32 or len(hello.session) != SESSION_BYTES:
        raise NotOpened("a session's secret or name isn't of its length")
    private = X25519PrivateKey.generate()
    share = private.public_key().public_bytes_raw()
    root = _root(hello, node_id, share, inner[:SECRET_BYTES], _agreed(private, inner[SECRET_BYTES:]))
    return Welcome(share=share, confirm=_expand(root, b"confirm")), NodeSession(hello, _expand(root, b"chain"))


def begin(asked: Asked, welcomed: Welcome) -> GatewaySession:
    """The gateway's end of a session; raises NotOpened unless it is the asked node that answers."""
    root = asked.root(welcomed.share)
    if not hmac.compare_digest(welcomed.confirm, _expand(root, b"confirm")):
        raise NotOpened("who answered isn't the node that was asked")
    return GatewaySession(asked.hello.session, _expand(root, b"chain"))

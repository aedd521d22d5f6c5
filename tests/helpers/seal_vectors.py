"""Known answers of sealing, for whoever writes it anew: `python tests/helpers/seal_vectors.py` writes docs/protocol/sealing-vectors.json.

All keys follow from names, so only the boxes differ from run to run: HPKE draws a key for each.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import nkeys
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from fallow.adapters.nkey import KeyPair, Kind
from fallow.model import messages as m
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.model.receipt import Usage
from fallow.wire import codec, seal
from fallow.wire.commitment import Commitment
from fallow.wire.sign import kem_bytes, member_bytes

PATH = Path(__file__).parents[2] / "docs" / "protocol" / "sealing-vectors.json"
MODEL = "sha256:" + hashlib.sha256(b"a model").hexdigest()
PIECES = (b'data: {"choices":[{"text":"Hello"}]}\n\n', b"data: [DONE]\n\n")
USAGE = Usage(prompt_tokens=5, cached_tokens=2, output_tokens=1)
TOKENS = (15_496,)
WHO = ("hub", "gateway", "node")


def drawn(name: str, size: int = 32) -> bytes:
    """Bytes that look drawn, and follow from a name."""
    return hashlib.shake_256(b"fallow test vector: " + name.encode()).digest(size)


def key_of(name: str) -> KeyPair:
    kind: Kind = "account" if name == "hub" else "user"
    prefix = nkeys.PREFIX_BYTE_ACCOUNT if kind == "account" else nkeys.PREFIX_BYTE_USER
    return KeyPair(nkeys.from_seed(nkeys.encode_seed(drawn(name), prefix)), kind)


def request(gateway_id: str, privacy: str) -> m.Request:
    body = b'{"model":"tiny","prompt":"Say hello"}'
    return m.Request(
        attempt_id=AttemptId("attempt-1"),
        call_id=CallId("call-1"),
        gateway_id=GatewayId(gateway_id),
        org_id=OrgId("acme"),
        key_id=KeyId("key-1"),
        path="/v1/completions",
        model="tiny",
        stream=True,
        body_bytes=len(body),
        body=body,
        country="de",
        made_at_s=1_800_000_000,
        model_digest=MODEL,
        cost_max_micro=12,
        privacy=privacy,  # type: ignore[arg-type]
    )


def commitment() -> dict[str, Any]:
    body = request("", "plain").body
    kept = Commitment(AttemptId("attempt-1"), body, MODEL)
    for piece in PIECES:
        kept.add(piece)
    return {
        "attempt_id": "attempt-1",
        "body": body.hex(),
        "model_digest": MODEL,
        "pieces": [piece.hex() for piece in PIECES],
        "usage": [USAGE.prompt_tokens, USAGE.cached_tokens, USAGE.output_tokens],
        "tokens": list(TOKENS),
        "digest": kept.digest(USAGE, TOKENS).hex(),
    }


def answer() -> tuple[m.Part, m.Final]:
    head = m.Head(status=200, content_type="text/event-stream", engine_us=1_000)
    digest = bytes.fromhex(commitment()["digest"])
    return m.Part(index=0, data=PIECES[0], head=head), m.Final(index=1, data=PIECES[1], usage=USAGE, tokens=TOKENS, digest=digest)


def call(session: bytes, chain: bytes, number: int, messages: dict[str, list[m.Message]], *, pads: bool) -> dict[str, Any]:
    """A call's keys, and what is sealed with them."""
    (key,), _ = seal._steps(chain, 1)
    told = []
    for direction, said in messages.items():
        channel = seal.Channel(key, is_nodes=direction == "to gateway")
        channel.pads = pads
        for one in said:
            index, box = channel.seal(codec.encode(one))
            carried: m.Message = m.Sealed(index=index, box=box)
            if direction == "to node" and index == 0:
                carried = m.SealedRequest(session=session, number=number, box=box)
            told.append({
                "direction": direction, "index": index, "message": codec.encode(one).hex(), "padded": pads, "box": box.hex(),
                "encoded": codec.encode(carried).hex(),
            })  # fmt: skip
    return {
        "number": number,
        "key": key.hex(),
        "messages": told,
    }


def session(suite: m.SuiteName) -> dict[str, Any]:
    """One session, step by step."""
    hub, gateway, node = (key_of(name) for name in WHO)
    kem_seed = drawn("kem", 96 if suite == "mlkem768-x25519" else 32)
    pair = seal.KemPair(suite, kem_seed)
    kem = m.KemKey(suite=suite, public_key=pair.public, expires_at_s=1_800_001_200)
    kem = replace(kem, signature=node.sign(kem_bytes(NodeId(node.public), kem)))
    name, secret = drawn("session", 16), drawn("secret")
    asker, answerer = (X25519PrivateKey.from_private_bytes(drawn(of)) for of in ("gateway's X25519", "node's X25519"))
    info = seal._info(gateway.public, node.public, name, suite, pair.public)
    inner = secret + asker.public_key().public_bytes_raw()
    hello = m.Hello(
        gateway_id=GatewayId(gateway.public),
        org_id=OrgId("acme"),
        member_until_s=1_800_086_400,
        membership=hub.sign(member_bytes(gateway.public, OrgId("acme"), 1_800_086_400)),
        session=name,
        kid=pair.kid,
        box=seal._sealed_to(kem, inner, info),
    )
    signed = seal.hello_bytes(hello, NodeId(node.public))
    hello = replace(hello, signature=gateway.sign(signed))
    share = answerer.public_key().public_bytes_raw()
    agreed = seal._agreed(asker, share)
    root = seal._root(hello, NodeId(node.public), share, secret, agreed)
    chains = [seal._expand(root, b"chain")]
    for _ in range(2):
        chains.append(seal._steps(chains[-1], 1)[1])
    welcomed = m.Welcome(share=share, confirm=seal._expand(root, b"confirm"))
    part, final = answer()
    plain: dict[str, list[m.Message]] = {"to node": [request(gateway.public, "plain")], "to gateway": [part, final]}
    padded: dict[str, list[m.Message]] = {
        "to node": [request(gateway.public, "padded"), m.BodyPart(offset=0, data=b"more")],
        "to gateway": [m.Alive(), part, final],
    }
    return {
        "suite": suite,
        "keys": {name: {"seed": drawn(name).hex(), "public": key_of(name).public} for name in WHO},
        "kem": {
            "seed": kem_seed.hex(), "public_key": pair.public.hex(), "kid": pair.kid.hex(), "expires_at_s": kem.expires_at_s,
            "signed": kem_bytes(NodeId(node.public), kem).hex(), "signature": kem.signature.hex(),
        },
        "hello": {
            "org_id": hello.org_id, "member_until_s": hello.member_until_s, "membership": hello.membership.hex(), "session": name.hex(),
            "info": info.hex(), "secret": secret.hex(), "gateway_private": drawn("gateway's X25519").hex(),
            "gateway_share": inner[32:].hex(), "box": hello.box.hex(), "signed": signed.hex(), "signature": hello.signature.hex(),
            "encoded": codec.encode(hello).hex(),
        },
        "welcome": {
            "node_private": drawn("node's X25519").hex(), "node_share": share.hex(), "agreed": agreed.hex(), "root": root.hex(),
            "confirm": welcomed.confirm.hex(), "encoded": codec.encode(welcomed).hex(),
        },
        "chains": [chain.hex() for chain in chains],
        "calls": [
            call(name, chains[0], 0, plain, pads=False), call(name, chains[1], 1, padded, pads=True),
            call(name, chains[2], 2, {}, pads=False),
        ],
    }  # fmt: skip


def vectors() -> dict[str, Any]:
    return {
        "about": "Known answers for docs/protocol/sealing.md. Bytes are hexadecimal. The keys are public: never use them.",
        "sessions": [session("mlkem768-x25519"), session("x25519")],
        "commitment": commitment(),
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_bytes(msgspec.json.format(msgspec.json.encode(vectors()), indent=1) + b"\n")

"""Two ends that seal to each other, for tests of sealing: a gateway and a node with keys, and what a careful receiver does with bytes."""

from typing import get_args

from msgspec.structs import replace

from fallow.adapters.nkey import KeyPair, make_key
from fallow.model import messages as m
from fallow.model.errors import NotOpened
from fallow.model.ids import AttemptId, CallId, GatewayId, KeyId, NodeId, OrgId
from fallow.wire import codec, seal
from fallow.wire.nkey_text import verifies
from fallow.wire.sign import kem_bytes

SUITES: tuple[m.SuiteName, ...] = get_args(m.SuiteName)
CANARY = b"canary-7431"
"""Stands in every request and answer, and must stand in nothing else."""


class Node:
    """A node with a key and a KEM key, both new."""

    def __init__(self, suite: m.SuiteName) -> None:
        self.key: KeyPair = make_key("user")
        self.id = NodeId(self.key.public)
        self.pair = seal.KemPair(suite)
        kem = m.KemKey(suite=suite, public_key=self.pair.public, expires_at_s=2_000)
        self.kem = replace(kem, signature=self.key.sign(kem_bytes(self.id, kem)))

    def welcome(self, data: bytes) -> tuple[m.Welcome, seal.NodeSession]:
        """What comes of bytes that may be a hello; raises NotOpened or WireError."""
        hello = codec.to_node.read(data)
        if not isinstance(hello, m.Hello):
            raise NotOpened("another message")
        if hello.kid != self.pair.kid:
            raise NotOpened("another key", reason="no_key")
        if not verifies(hello.gateway_id, seal.hello_bytes(hello, self.id), hello.signature):
            raise NotOpened("another signature", reason="not_vouched")
        return seal.welcome(hello, self.id, self.pair)


class Gateway:
    """A gateway with a key."""

    def __init__(self) -> None:
        self.key: KeyPair = make_key("user")
        self.id = GatewayId(self.key.public)

    def ask(self, node: Node) -> seal.Asked:
        asker = m.Hello(gateway_id=self.id, org_id=OrgId("org"), member_until_s=1_000, membership=bytes(64))
        return seal.ask(asker, node.id, node.kem, self.key.sign)


class Ends:
    """Both ends of a session between the two, and what went between them."""

    def __init__(self, suite: m.SuiteName, gateway: Gateway | None = None, node: Node | None = None) -> None:
        self.asker, self.asked = gateway or Gateway(), node or Node(suite)
        self.first = self.asker.ask(self.asked)
        self.hello = codec.encode(self.first.hello)
        welcomed, self.node = self.asked.welcome(self.hello)
        self.welcome = codec.encode(welcomed)
        self.gateway = begin(self.first, self.welcome)

    def request(self, data: bytes = CANARY) -> tuple[bytes, seal.Channel]:
        """The next call as it travels, and the gateway's end of it."""
        number, channel = self.gateway.call()
        _, box = channel.seal(data)
        return codec.encode(m.SealedRequest(session=self.gateway.id, number=number, box=box)), channel

    def open(self, data: bytes) -> tuple[bytes, seal.Channel]:
        """What a node does with bytes that may be a call; raises NotOpened or WireError."""
        sealed = codec.sealed_request.read(data)
        if sealed.session != self.node.id:
            raise NotOpened("another session", reason="no_session")
        return self.node.open(sealed.number, sealed.box)

    def call(self, data: bytes = CANARY) -> tuple[seal.Channel, seal.Channel]:
        """The gateway's and the node's end of a call."""
        sent, channel = self.request(data)
        opened, other = self.open(sent)
        assert opened == data
        return channel, other


def begin(asked: seal.Asked, data: bytes) -> seal.GatewaySession:
    """What a gateway does with bytes that may be a welcome; raises NotOpened or WireError."""
    welcomed = codec.to_gateway.read(data)
    if not isinstance(welcomed, m.Welcome):
        raise NotOpened("another message")
    return seal.begin(asked, welcomed)


def said(channel: seal.Channel, data: bytes = CANARY) -> bytes:
    """A message of a call as it travels."""
    index, box = channel.seal(data)
    return codec.encode(m.Sealed(index=index, box=box))


def heard(channel: seal.Channel, data: bytes) -> bytes:
    """What a gateway does with bytes that may be a part of an answer; raises NotOpened or WireError."""
    sealed = codec.to_gateway.read(data)
    if not isinstance(sealed, m.Sealed):
        raise NotOpened("another message")
    return channel.open(sealed.index, sealed.box)


def request_of(body: bytes = CANARY) -> m.Request:
    """A call's first message."""
    return m.Request(
        attempt_id=AttemptId("attempt"),
        call_id=CallId("call"),
        gateway_id=GatewayId("gateway"),
        org_id=OrgId("org"),
        key_id=KeyId("key"),
        path="/v1/completions",
        model="tiny",
        stream=True,
        body_bytes=len(body),
        body=body,
    )

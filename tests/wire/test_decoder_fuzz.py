"""Every decoder against bytes that are almost right: it reads them or says its own kind of error, and nothing else ever.

`make test` tries a few hundred of each, the same in every run; with FUZZ_SECONDS each decoder has that long, and other bytes each time.
"""

import base64
import io
import os
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest
from mutations import drawn, mutated
from sealed_ends import CANARY, SUITES, Ends, begin, heard, said

from fallow.adapters.nkey import make_key
from fallow.model import messages as m
from fallow.model.errors import BadModelFile, EngineFailed, FallowError, InvalidRequest, NotOpened, WireError
from fallow.model.ids import NodeId, OrgId
from fallow.wire import (
    agreement_line,
    chat_request,
    codec,
    completions_api,
    embeddings,
    invitation,
    jwt,
    messages_request,
    nkey_text,
    openai,
    prefer,
    quote_request,
    rerank,
    responses_request,
    seal,
    sse,
    token_text,
)
from fallow.wire.gguf_header import read_gguf
from fallow.wire.llama_answer import EngineStream
from fallow.wire.onnx_header import read_onnx

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
TRIES = 150
SAMPLES = 40

READERS = {name: one for name, one in vars(codec).items() if isinstance(one, codec.Reader)}


class Decoder(NamedTuple):
    """What is fuzzed: what it reads, how, and what it may raise."""

    samples: list[bytes]
    read: Callable[[bytes], object]
    error: type[FallowError] = WireError


def fuzzed(decoder: Decoder, name: str) -> None:
    """The same tries each time, or others until the time is up."""
    chance = random.Random(None if SECONDS else name)
    until, tries = time.monotonic() + SECONDS, 0
    while time.monotonic() < until if SECONDS else tries < TRIES:
        data, tries = mutated(decoder.samples, chance), tries + 1
        try:
            decoder.read(data)
        except decoder.error:
            pass
        except BaseException as error:
            error.add_note(f"{name} met bytes.fromhex('{data.hex()}')")
            raise


def text_of(data: bytes) -> str:
    """Any bytes as text: what is no UTF-8 shows as odd characters."""
    return data.decode(errors="replace")


# The messages of the broker.
@pytest.mark.parametrize("name", READERS)
def test_messages(name: str) -> None:
    reader, chance = READERS[name], random.Random(name)
    samples = [codec.encode(drawn(reader._decoder.type, chance)) for _ in range(SAMPLES)]
    for sample in samples:
        reader.read(sample)
    fuzzed(Decoder(samples, reader.read), name)


def test_heartbeats() -> None:
    chance = random.Random(1)
    samples = [codec.encode(drawn(m.Heartbeat, chance)) for _ in range(SAMPLES)]
    fuzzed(Decoder(samples, lambda data: codec.read_heartbeat(data, "hb.tiny")), "heartbeats")


# What is sealed. Nothing may open but what was sealed.
def opens(ends: Ends) -> dict[str, Decoder]:
    """The places where sealed bytes from outside are opened."""
    node = ends.asked
    first = ends.first
    gateway_channel, node_channel = ends.call()
    request, _ = ends.request()
    part = said(node_channel)

    def welcome(data: bytes) -> None:
        """As a node hears one of a gateway that may sign what it likes."""
        hello = codec.to_node.read(data)
        if isinstance(hello, m.Hello):
            assert seal.hello_bytes(hello, node.id)
            seal.welcome(hello, node.id, node.pair)

    def call(data: bytes) -> None:
        assert ends.open(data)[0] == CANARY

    def answer(data: bytes) -> None:
        assert heard(gateway_channel, data) == CANARY

    def kem_key(data: bytes) -> None:
        beat = codec.heartbeat.read(data)
        if beat.kem is not None:
            seal.ask(m.Hello(gateway_id=ends.asker.id, org_id=OrgId("org")), NodeId("node"), beat.kem, ends.asker.key.sign)

    beat = m.Heartbeat(node_id=node.id, sequence=1, state="run", card_sequence=1, loads=(), kem=node.kem)
    other = replace_suite(node.kem)
    return {
        "hello": Decoder([ends.hello], welcome),
        "welcome": Decoder([ends.welcome], lambda data: begin(first, data)),
        "call": Decoder([request], call),
        "answer": Decoder([part], answer),
        "KEM key": Decoder([codec.encode(beat), codec.encode(msgspec.structs.replace(beat, kem=other))], kem_key),
        "box": Decoder([ends.first.hello.box], lambda data: node.pair.open(data, b"info"), NotOpened),
        "padding": Decoder([seal.padded(CANARY, to_buckets=pads) for pads in (False, True)], seal.unpadded, NotOpened),
    }


def replace_suite(kem: m.KemKey) -> m.KemKey:
    """The same key under the other suite's name."""
    return msgspec.structs.replace(kem, suite=next(suite for suite in SUITES if suite != kem.suite))


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", ["hello", "welcome", "call", "answer", "KEM key", "box", "padding"])
def test_sealed(suite: m.SuiteName, name: str) -> None:
    fuzzed(opens(Ends(suite))[name], f"{name} {suite}")


# Credentials, tokens, keys.
KEY = make_key("user")
CLAIMS = msgspec.json.encode({**jwt.user_claims(KEY.public, name="n", account="A", issued_at_s=1, expires_at_s=2), "iss": "A"})
JWT = jwt.encode(jwt.user_claims(KEY.public, name="n", account="A", issued_at_s=1, expires_at_s=2), "A", KEY.sign)
INVITATION = invitation.Invitation(addresses=("tls://hub.example:8422",), ca_pem="pem", door_jwt=JWT, door_seed="SU", word="word")
ORGANISATION = make_key("account")
LINE = agreement_line.proposed(OrgId("a"), OrgId("b"), begins_at_ms=5)
SIGNED = agreement_line.signed(LINE, OrgId("a"), ORGANISATION.public, ORGANISATION.sign)


def wrapped(prefix: str, read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Around bytes as they come, with the right checksum."""
    return lambda data: read(token_text.wrap(prefix, data))


def claims(data: bytes) -> object:
    return jwt.expiry_of(f"e30.{base64.urlsafe_b64encode(data).decode().rstrip('=')}.x")


def key_text(data: bytes) -> None:
    text = text_of(data)
    nkey_text.verifies(text, b"data", data)
    nkey_text.raw_public(text, text[:1] or "U")


TEXTS: dict[str, Decoder] = {
    "jwt": Decoder([JWT.encode()], lambda data: jwt.claims_of(text_of(data))),
    "jwt's claims": Decoder([CLAIMS], claims),
    "invitation": Decoder([invitation.write(INVITATION).encode()], lambda data: invitation.read(text_of(data))),
    "invitation's inside": Decoder([msgspec.msgpack.encode(INVITATION)], wrapped(invitation.PREFIX, invitation.read)),
    "agreement": Decoder([agreement_line.write(SIGNED).encode()], lambda data: agreement_line.read(text_of(data))),
    "agreement's inside": Decoder([msgspec.msgpack.encode(SIGNED)], wrapped(agreement_line.PREFIX, agreement_line.read)),
    "nkey": Decoder([KEY.public.encode(), ORGANISATION.public.encode()], key_text),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    fuzzed(TEXTS[name], name)


# What engines write.
CHUNK = {
    "choices": [{"index": 0, "delta": {"content": "a"}, "text": "a", "finish_reason": "stop",
                 "logprobs": {"content": [{"id": 5, "token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}]}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    "timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3},
}  # fmt: skip
STREAM = sse.event(msgspec.json.encode(CHUNK)) + b": alive\n\n" + sse.event(b'{"choices":[]}').replace(b"\n", b"\r\n") + sse.DONE


def fed(feed: Callable[[bytes], object], data: bytes) -> None:
    """In pieces, whose sizes follow from the data."""
    step = 1 + len(data) % 37
    for at in range(0, len(data), step):
        feed(data[at : at + step])


ENGINES: dict[str, Decoder] = {
    "events": Decoder([STREAM], lambda data: fed(sse.EventCutter().feed, data)),
    "engine's stream": Decoder([STREAM], lambda data: fed(EngineStream(choices=1, top_logprobs=2).feed, data), EngineFailed),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name: str) -> None:
    fuzzed(ENGINES[name], name)


# Model files.
def test_gguf() -> None:
    sample: bytes = pytest.importorskip("test_gguf_header").TINY
    fuzzed(Decoder([sample], lambda data: read_gguf(io.BytesIO(data), len(data)), BadModelFile), "gguf")


def test_onnx() -> None:
    sample: bytes = pytest.importorskip("test_onnx_header").GOOD
    fuzzed(Decoder([sample], read_onnx, BadModelFile), "onnx")


# What callers send.
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "properties": {"a": {"pattern": "^a+$"}}}}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "response_format": SCHEMA, "stop": ["x"], "n": 2}
MESSAGES = {"model": "tiny", "max_tokens": 5, "system": "s", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
BODIES: dict[str, tuple[Callable[[bytes], object], dict[str, Any]]] = {
    "chat": (chat_request.read, CHAT),
    "completions": (completions_api.read, {"model": "tiny", "prompt": ["a", "b"], "logit_bias": {"5": 1}, "logprobs": 2, "seed": 1}),
    "embeddings": (embeddings.read, {"model": "tiny", "input": ["a", "b"], "dimensions": 5, "encoding_format": "base64"}),
    "rerank": (rerank.read, {"model": "tiny", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1}),
    "messages": (messages_request.read, MESSAGES),
    "messages' count": (messages_request.read_count, MESSAGES),
    "responses": (responses_request.read, {"model": "tiny", "input": [{"role": "user", "content": "hi"}], "max_output_tokens": 5}),
    "responses' count": (responses_request.read_count, {"model": "tiny", "input": "hi"}),
    "head": (lambda data: openai.read_head(openai.CHAT, data), {**CHAT, "fallow": {"max_price": 1}}),
    "quote": (lambda data: quote_request.path_of(data, [], lambda model: ()), {"model": "tiny", "input": "a"}),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    read, sample = BODIES[name]
    fuzzed(Decoder([msgspec.json.encode(sample)], read, InvalidRequest), name)


def test_prefer() -> None:
    fuzzed(Decoder([b'wait=60, return="a,b"; x', b"respond-async"], lambda data: prefer.wait_s([data]), InvalidRequest), "prefer")

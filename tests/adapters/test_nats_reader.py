"""What a server sends is read strictly, however it is cut into pieces, and no subject that somebody chose does harm."""

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.errors import ProtocolError
from trusted import Site, Tap, until

from fallow.adapters import nats_reader
from fallow.adapters.nats_bus import NatsBus
from fallow.adapters.nats_reader import Reader
from fallow.ports import Delivery

PROMISE = settings(max_examples=100)


class Played:
    """What would be nats-py's client."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.said.append((sid, subject, reply, data, headers))

    async def _process_ping(self) -> None:
        self.said.append(("ping",))

    async def _process_pong(self) -> None:
        self.said.append(("pong",))

    async def _process_err(self, err_msg: str) -> None:
        self.said.append(("err", err_msg))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.said.append(("info", info))


def read(*pieces: bytes) -> list[tuple[Any, ...]]:
    played = Played()
    reader = Reader(played)

    async def feed() -> None:
        for piece in pieces:
            await reader.parse(piece)

    asyncio.run(feed())
    return played.said


SAID = (
    b'INFO {"max_payload":5}\r\nPING\r\nMSG a.b 1 3\r\nabc\r\n+OK\r\nMSG a.b 22 reply.to 0\r\n\r\nPONG\r\n'
    b"HMSG c 3 12 14\r\nNATS/1.0\r\n\r\nxy\r\nHMSG c 3 r 12 12\r\nNATS/1.0\r\n\r\n\r\n-ERR 'Some Error'\r\nMSG d 4 6\r\n\r\nPING\r\n"
)
MEANT = [
    ("info", {"max_payload": 5}),
    ("ping",),
    (1, b"a.b", b"", b"abc", b""),
    (22, b"a.b", b"reply.to", b"", b""),
    ("pong",),
    (3, b"c", b"", b"xy", b"NATS/1.0\r\n\r\n"),
    (3, b"c", b"r", b"", b"NATS/1.0\r\n\r\n"),
    ("err", "'some error'"),
    (4, b"d", b"", b"\r\nPING", b""),
]


def test_each_kind_of_line() -> None:
    assert read(SAID) == MEANT


@PROMISE
@given(st.lists(st.integers(0, len(SAID)), max_size=12))
def test_however_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(SAID)]
    assert read(*(SAID[left:right] for left, right in itertools.pairwise(edges))) == MEANT


BAD = [b"MSG\r\n", b"MSG a\r\n", b"MSG a 1\r\n", b"MSG a x 1\r\n", b"MSG a 1 -1\r\n", b"MSG a 1 b c 1\r\n", b"MSG a 1 99999999999\r\n",
       b"HMSG a 1 5\r\n", b"HMSG a 1 5 4\r\n", b"HMSG a 1 x 4\r\n", b"WHAT\r\n", b"\r\n", b"INFO nonsense\r\n", b"INFO []\r\n",
       b"INFO \xff\r\n", b"MSG a 1 \xb2\r\n", b"MSG a 1 " + b"9" * 5_000 + b"\r\n", b"MSG a\x0b1 2 3 4 5\r\n"]  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_what_is_not_the_protocol_is_an_error(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(line)


def test_an_empty_subject_is_dropped() -> None:
    assert read(b"MSG  1 1\r\nx\r\n", b"PING\r\n") == [("ping",)]


def test_a_line_without_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_reader, "LINE_BYTES_MAX", 100)
    with pytest.raises(ProtocolError):
        read(b"INFO " + b"x" * 100)


ODD = [b"a\x0b3", b"a\x0c3", b"a\x0b3\x0b", b"\xff\xfe", b"a\xc3\xbc", b"a\x00", b"a\x1f", b"a\x7f", b"a\rb", b"\x85"]


@pytest.mark.parametrize("token", ODD, ids=ascii)
def test_odd_subjects_and_replies_are_dropped(token: bytes) -> None:
    said = b"MSG x." + token + b" 1 2\r\nab\r\nMSG x 1 y." + token + b" 2\r\nab\r\nHMSG x." + token + b" 1 2 2\r\nab\r\nPING\r\n"
    assert read(said) == [("ping",)]


@PROMISE
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, data + b"\r\n", b"MSG " + data + b"\r\n", b"-ERR " + data + b"\r\n", b"INFO " + data + b"\r\n"):
        with contextlib.suppress(ProtocolError):
            read(text)


@pytest.mark.anyio
async def test_a_node_can_not_reach_a_gateways_other_ears_or_cut_it_off(tmp_path: Path) -> None:
    """Against the real server: it carries these subjects, and nats-py's own parser takes them apart wrongly."""
    site = await Site.start(tmp_path)
    login, node = site.member("gateway"), site.member("node")
    gateway = NatsBus(site.broker.address, login, "gateway")
    heard: dict[str, list[Delivery]] = {"answers": [], "keys": [], "prices": []}
    lost: list[bool] = []
    gateway.on_lost(lambda: lost.append(True))
    tap = await Tap.open(site.broker.address, node.jwt, node.key)
    wire = tap.client._transport
    assert wire is not None
    try:
        await gateway.connect()
        for subject, name in (("keys", "keys"), ("prices", "prices"), (f"rsp.{login.key.public}.*.*", "answers")):
            await gateway.subscribe(subject, heard[name].append)
        place = f"rsp.{login.key.public}.{node.key.public}.".encode()
        for token in ODD:
            if b"\r" not in token:
                wire.write(b"PUB " + place + token + b" 6\r\nforged\r\n")
        await tap.flush()
        await tap.client.publish((place + b"a1").decode(), b"honest")
        await until(lambda: heard["answers"], what="the honest answer")
        assert [one.data for one in heard["answers"]] == [b"honest"]
        assert heard["keys"] == heard["prices"] == []
        assert lost == []
        assert tap.refused == []
        assert gateway.is_up()
    finally:
        await tap.close()
        await gateway.close()
        await site.broker.stop()

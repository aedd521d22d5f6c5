"""The engine's client against small servers that answer, stall, break off and talk nonsense."""

import asyncio
import contextlib
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from fallow.adapters import http_engine
from fallow.adapters.http_engine import BUFFER_BYTES_MAX, HttpEngine, default_tls
from fallow.model.errors import EngineFailed, EngineStalled

pytestmark = pytest.mark.anyio

WITHIN_S = 20.0
SOCKET_BYTES_MAX = 1024 * 1024
"""What a Unix socket and both sides' streams hold besides the engine's own buffer."""


async def until(said: Callable[[], Any], *, what: str = "it") -> None:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + WITHIN_S
    while not said():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S:g} s"
        await asyncio.sleep(0.001)


class Talk:
    """One connection, seen from the server."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.requests: list[tuple[str, bytes]] = []
        self.sent_bytes = 0
        self.is_closed = False
        self._reader = reader
        self._writer = writer

    async def request(self) -> bool:
        """Read the next request; False if the client has closed the connection."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            sizes = [int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length:")]
            self.requests.append((head, await self._reader.readexactly(sizes[0] if sizes else 0)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_closed = True
            return False
        return True

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
            self.sent_bytes += len(data)

    async def answer(self, body: bytes = b"{}", *, status: str = "200 OK", headers: str = "content-type: application/json\r\n") -> None:
        await self.send(f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def until_closed(self) -> None:
        """Until the client closes."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass
        self.is_closed = True

    def close(self) -> None:
        self._writer.close()


Script = Callable[[Talk], Awaitable[None]]


class Site:
    """A server on a socket of either kind; each connection follows the script, and is closed at its end."""

    def __init__(self) -> None:
        self.script: Script = answers
        self.talks: list[Talk] = []
        self.address = ""
        self.tasks: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        talk = Talk(len(self.talks), reader, writer)
        self.talks.append(talk)
        with contextlib.suppress(asyncio.CancelledError):  # a cancelled task is a fault to asyncio's streams
            await self.script(talk)
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()


async def answers(talk: Talk) -> None:
    """The script of a well-behaved engine."""
    while await talk.request():
        await talk.answer(b'{"echo":"%s"}' % talk.requests[-1][1])


@pytest.fixture(params=["unix", "tcp"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(Site(), tmp_path / "engine.sock" if request.param == "unix" else None) as one:
        yield one


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[Site]:
    """Where the kind of socket makes no difference."""
    async with serving(Site(), tmp_path / "engine.sock") as one:
        yield one


@contextlib.asynccontextmanager
async def serving(site: Site, path: Path | None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    if path is None:
        server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=tls)
        site.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(site.serve, path)
        site.address = str(path)
    async with server:
        yield site
        for task in site.tasks:
            task.cancel()
        await asyncio.gather(*site.tasks, return_exceptions=True)
    asyncio.get_running_loop().set_exception_handler(None)
    assert faults == []


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[HttpEngine]:
    """The client of the test's site."""
    name = "site" if "site" in request.fixturenames else "unix"
    client = HttpEngine(request.getfixturevalue(name).address)
    yield client
    client.close()


async def ask(engine: HttpEngine, body: bytes = b"x") -> bytes:
    async with asyncio.timeout(WITHIN_S), engine.post("/v1/completions", body) as answer:
        return b"".join([chunk async for chunk in answer.body()])


# whole answers
async def test_a_request_and_its_answer(site: Site, engine: HttpEngine) -> None:
    async with engine.post("/v1/chat/completions", b'{"a":1}') as answer:
        assert (answer.head.status, answer.head.content_type) == (200, "application/json")
        assert answer.head.engine_us > 0
        assert b"".join([chunk async for chunk in answer.body()]) == b'{"echo":"{"a":1}"}'
        assert answer.is_complete
    head, body = site.talks[0].requests[0]
    assert body == b'{"a":1}'
    lines = head.lower().split("\r\n")
    assert lines[0] == "post /v1/chat/completions http/1.1"
    assert "content-type: application/json" in lines
    assert "content-length: 7" in lines
    assert any(line.startswith("host:") for line in lines)


HELLO = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_a_chunked_answer(site: Site, engine: HttpEngine, cut: int) -> None:
    """Put together again however the bytes are cut on the way."""

    async def script(talk: Talk) -> None:
        while await talk.request():
            for start in range(0, len(HELLO), cut):
                await talk.send(HELLO[start : start + cut])
                await asyncio.sleep(0)

    site.script = script
    for _ in range(2):
        async with engine.post("/", b"") as answer:
            assert (answer.head.status, answer.head.content_type) == (200, "text/event-stream")
            assert b"".join([chunk async for chunk in answer.body()]) == b"hello world"


@pytest.mark.parametrize(("status", "number"), [("400 Bad Request", 400), ("503 Service Unavailable", 503), ("204 No Content", 204)])
async def test_other_statuses_pass(unix: Site, engine: HttpEngine, status: str, number: int) -> None:
    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(b"" if number == 204 else b"no", status=status, headers="")

    unix.script = script
    async with engine.post("/", b"") as answer:
        assert answer.head.status == number
        assert answer.head.content_type == ""
        assert b"".join([chunk async for chunk in answer.body()]) == (b"" if number == 204 else b"no")


async def test_an_answer_is_handed_on_as_it_comes(site: Site, engine: HttpEngine) -> None:
    go_on = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
        await talk.send(b"one")
        await go_on.wait()
        await talk.send(b"two")
        await talk.until_closed()

    site.script = script
    async with engine.post("/", b"") as answer:
        body = answer.body()
        assert await asyncio.wait_for(anext(body), WITHIN_S) == b"one"
        assert not answer.is_complete
        go_on.set()
        assert await asyncio.wait_for(anext(body), WITHIN_S) == b"two"
        assert answer.is_complete
        with pytest.raises(StopAsyncIteration):
            await anext(body)


async def test_the_engines_own_time_is_measured(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        while await talk.request():
            await asyncio.sleep(0.03)
            await talk.answer()

    unix.script = script
    async with engine.post("/", b"") as answer:
        assert 30_000 <= answer.head.engine_us < 3_000_000


# connections
async def test_a_connection_is_used_again(site: Site, engine: HttpEngine) -> None:
    for number in range(5):
        assert await ask(engine, b"%d" % number) == b'{"echo":"%d"}' % number
    assert len(site.talks) == 1


async def test_a_connection_is_used_again_after_a_chunked_answer(site: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.send(HELLO)

    site.script = script
    assert [await ask(engine) for _ in range(3)] == [b"hello world"] * 3
    assert len(site.talks) == 1


async def test_calls_at_the_same_time_have_a_connection_each(site: Site, engine: HttpEngine) -> None:
    arrived = asyncio.Barrier(5)

    async def script(talk: Talk) -> None:
        while await talk.request():
            await arrived.wait()
            await talk.answer(talk.requests[-1][1])

    site.script = script
    for _ in range(2):
        assert await asyncio.gather(*(ask(engine, b"%d" % n) for n in range(5))) == [b"%d" % n for n in range(5)]
    assert len(site.talks) == 5


async def test_an_engine_that_asks_to_close_is_taken_at_its_word(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(headers="connection: close\r\n")

    unix.script = script
    assert [await ask(engine), await ask(engine)] == [b"{}", b"{}"]
    assert len(unix.talks) == 2


async def test_a_connection_serves_no_more_than_its_share(unix: Site, engine: HttpEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "USES_MAX", 3)
    for _ in range(7):
        await ask(engine)
    assert [len(talk.requests) for talk in unix.talks] == [3, 3, 1]


async def test_a_connection_that_idled_too_long_is_not_trusted(unix: Site, engine: HttpEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    await ask(engine)
    monkeypatch.setattr(http_engine, "IDLE_S_MAX", 0.0)
    await ask(engine)
    assert len(unix.talks) == 2
    await until(lambda: unix.talks[0].is_closed, what="the old one is closed")


async def test_no_more_than_some_connections_are_kept(unix: Site, engine: HttpEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "IDLE_CONNECTIONS_MAX", 2)
    arrived = asyncio.Barrier(4)

    async def script(talk: Talk) -> None:
        while await talk.request():
            await arrived.wait()
            await talk.answer()

    unix.script = script
    await asyncio.gather(*(ask(engine) for _ in range(4)))
    await asyncio.sleep(0.02)
    assert sum(talk.is_closed for talk in unix.talks) == 2


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_that_was_closed_while_idle_is_replaced(site: Site, engine: HttpEngine, noticed: bool) -> None:
    """Whether its end came before the next request or crossed it on the way."""

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.answer(b"%d" % talk.number)
        if talk.number == 0 and not noticed:
            await talk.request()

    site.script = script
    assert await ask(engine) == b"0"
    if noticed:
        await asyncio.wait_for(asyncio.gather(site.tasks[0]), WITHIN_S)
        await asyncio.sleep(0.01)
    assert await ask(engine) == b"1"
    assert len(site.talks) == 2


async def test_closing_closes_what_is_idle(unix: Site, engine: HttpEngine) -> None:
    await ask(engine)
    assert not unix.talks[0].is_closed
    engine.close()
    await until(lambda: unix.talks[0].is_closed)
    assert await ask(engine) == b'{"echo":"x"}', "and it can be used again"


# faults
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"hello, this is no HTTP\r\n\r\n", id="garbage"),
        pytest.param(b"\x00" * 100, id="zeros"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", id="a status that is none"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", id="a length that is none"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100 + b"\r\n", id="too many headers"),
    ],
)
@pytest.mark.parametrize("hangs", [False, True])
async def test_nonsense(site: Site, engine: HttpEngine, said: bytes, hangs: bool) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(said)
        if hangs:
            await talk.until_closed()

    site.script = script
    with pytest.raises(EngineFailed):
        await ask(engine)
    assert len(site.talks) == 1, "a fresh connection is not tried twice"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\ncontent-"])
async def test_no_answer(site: Site, engine: HttpEngine, said: bytes) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(said)

    site.script = script
    with pytest.raises(EngineFailed, match="without an answer"):
        await ask(engine)
    assert len(site.talks) == 1


@pytest.mark.parametrize(
    ("said", "got"),
    [
        pytest.param(LENGTH + b"12345", b"12345", id="closed before the length"),
        pytest.param(CHUNKED + b"5\r\nhello\r\n", b"hello", id="closed between chunks"),
        pytest.param(CHUNKED + b"9\r\nhello", b"hello", id="closed in a chunk"),
        pytest.param(CHUNKED + b"5\r\nhello\r\nzz\r\n", b"hello", id="a chunk's size that is none"),
        pytest.param(LENGTH, b"", id="closed after the head"),
    ],
)
async def test_half_an_answer(site: Site, engine: HttpEngine, said: bytes, got: bytes) -> None:
    """What came is handed on first; then it is told that this was not all."""

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(said)

    site.script = script
    taken: list[bytes] = []

    async def take() -> None:
        async with asyncio.timeout(WITHIN_S), engine.post("/", b"") as answer:
            async for chunk in answer.body():
                taken.append(chunk)

    with pytest.raises(EngineFailed, match="middle"):
        await take()
    assert b"".join(taken) == got


async def test_a_broken_connection_is_not_used_again(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        if talk.number == 0:
            await talk.send(LENGTH + b"1")
        else:
            await talk.answer(b"well")

    unix.script = script
    with pytest.raises(EngineFailed):
        await ask(engine)
    assert await ask(engine) == b"well"


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed):
        await ask(HttpEngine(str(tmp_path / "nothing.sock")))
    (tmp_path / "file").touch()
    with pytest.raises(EngineFailed):
        await ask(HttpEngine(str(tmp_path / "file")))
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with pytest.raises(EngineFailed, match="reached"):
        await ask(HttpEngine(f"127.0.0.1:{port}"))


async def test_an_engine_that_died_is_not_reached_through_an_old_connection(tmp_path: Path) -> None:
    async with serving(Site(), tmp_path / "engine.sock") as site:
        engine = HttpEngine(site.address)
        assert await ask(engine)
    (tmp_path / "engine.sock").unlink(missing_ok=True)
    with pytest.raises(EngineFailed):
        await ask(engine)


async def test_an_engine_that_wants_another_protocol(tmp_path: Path) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nxyz")
        await talk.until_closed()

    async with serving(Site(), tmp_path / "engine.sock") as site:
        site.script = script
        with contextlib.suppress(EngineFailed):
            assert await ask(HttpEngine(site.address)) == b"", "what it says there is no answer"


async def test_more_than_was_announced_is_not_handed_on(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await talk.until_closed()

    unix.script = script
    assert await ask(engine) == b"{}"


async def test_an_answer_that_ends_with_the_connection(unix: Site, engine: HttpEngine) -> None:
    """HTTP/1.0, and HTTP/1.1 without a length: servers that a lender attaches may answer so."""

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n{}")

    unix.script = script
    assert await ask(engine) == b"{}"


@pytest.mark.parametrize("said", [b"", CHUNKED, CHUNKED + b"5\r\nhello\r\n"])
async def test_an_engine_that_falls_silent_is_left(unix: Site, engine: HttpEngine, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(http_engine, "HEAD_S_MAX", 0.05)
    monkeypatch.setattr(http_engine, "SILENCE_S_MAX", 0.05)

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(said)
        await talk.until_closed()

    unix.script = script
    with pytest.raises(EngineStalled):
        await ask(engine)
    await until(lambda: unix.talks[0].is_closed)


# leaving
@pytest.mark.parametrize("read_first", [False, True])
async def test_leaving_early_closes_the_connection(site: Site, engine: HttpEngine, read_first: bool) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED + b"5\r\nhello\r\n")
        await talk.until_closed()

    site.script = script
    async with engine.post("/", b"") as answer:
        if read_first:
            assert await anext(answer.body()) == b"hello"
    await until(lambda: site.talks[0].is_closed, what="the server sees that nobody waits")
    assert len(site.talks) == 1


async def test_an_error_in_the_block_closes_the_connection(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED)
        await talk.until_closed()

    unix.script = script
    with pytest.raises(ValueError, match="ours"):
        async with engine.post("/", b""):
            raise ValueError("ours")
    await until(lambda: unix.talks[0].is_closed)


@pytest.mark.parametrize("said", [b"", CHUNKED, CHUNKED + b"5\r\nhello\r\n"])
async def test_a_call_that_is_cancelled_closes_the_connection(site: Site, engine: HttpEngine, said: bytes) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(said)
        await talk.until_closed()

    site.script = script
    call = asyncio.ensure_future(ask(engine))
    await until(lambda: site.talks and site.talks[0].requests and site.talks[0].sent_bytes == len(said))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: site.talks[0].is_closed, what="the server sees that nobody waits")


# backpressure
async def test_a_slow_reader_makes_the_engine_wait(site: Site, engine: HttpEngine) -> None:
    piece = bytes(range(256)) * 256  # 64 KiB
    count = 400  # 25 MiB: more than any socket's buffers hold
    whole = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            await talk.send(piece)
        whole.set()
        await talk.until_closed()

    site.script = script
    async with engine.post("/", b"") as answer:
        last = -1
        while site.talks[0].sent_bytes != last:  # until nothing moves any more
            last = site.talks[0].sent_bytes
            await asyncio.sleep(0.02)
        assert not whole.is_set(), "the engine is held back"
        if site.address.startswith("/"):  # the kernel's buffers for TCP are as large as it likes
            assert BUFFER_BYTES_MAX < last < BUFFER_BYTES_MAX + SOCKET_BYTES_MAX
        digest = hashlib.sha256()
        async for chunk in answer.body():
            digest.update(chunk)
    assert digest.digest() == hashlib.sha256(piece * count).digest()
    assert whole.is_set()


async def test_a_large_answer_that_nobody_took_does_not_spoil_the_connection(unix: Site, engine: HttpEngine) -> None:
    """Leaving it closes the connection, or else the next answer must not wait behind reading that is still paused."""

    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(b"x" * 400_000)

    unix.script = script
    async with engine.post("/", b"") as answer:
        await until(lambda: unix.talks[0].sent_bytes > 400_000)
        await asyncio.sleep(0.02)
    async with asyncio.timeout(1), engine.post("/", b"") as answer:
        assert len(b"".join([chunk async for chunk in answer.body()])) == 400_000


# small documents
async def test_health(unix: Site, engine: HttpEngine) -> None:
    statuses = ["200 OK", "503 Service Unavailable", "200 OK"]

    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(status=statuses.pop(0))

    unix.script = script
    assert [await engine.is_healthy(WITHIN_S) for _ in range(3)] == [True, False, True]
    assert unix.talks[0].requests[0][0].startswith("GET /health HTTP/1.1\r\n")


async def test_an_engine_that_says_nothing_is_not_healthy(unix: Site, engine: HttpEngine, tmp_path: Path) -> None:
    async def script(talk: Talk) -> None:
        await talk.until_closed()

    unix.script = script
    assert not await engine.is_healthy(0.05)
    assert not await HttpEngine(str(tmp_path / "nothing.sock")).is_healthy(WITHIN_S)
    with pytest.raises(EngineFailed, match=r"/v1/models within 0\.05 s"):
        await engine.get("/v1/models", 0.05, 100)
    await until(lambda: all(talk.is_closed for talk in unix.talks))


async def test_documents_have_a_size(unix: Site, engine: HttpEngine) -> None:
    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(b"12345", status="404 Not Found")

    unix.script = script
    assert await engine.get("/v1/models", WITHIN_S, 5) == (404, b"12345")
    with pytest.raises(EngineFailed, match="over 4 bytes"):
        await engine.get("/v1/models", WITHIN_S, 4)


async def test_hints_before_the_answer_are_no_answer(site: Site, engine: HttpEngine) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\ncontent-type: text/none\r\n\r\n"

    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.send(hint)
            await asyncio.sleep(0)
            await talk.send(hint)
            await talk.answer(b"well")

    site.script = script
    for _ in range(2):
        async with engine.post("/", b"") as answer:
            assert (answer.head.status, answer.head.content_type) == (200, "application/json")
            assert b"".join([chunk async for chunk in answer.body()]) == b"well"
    assert len(site.talks) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", None),
        ("retry-after: 7\r\n", 7),
        ("Retry-After: 99999999999999\r\n", 3600),
        ("retry-after: Fri, 31 Dec 1999 23:59:59 GMT\r\n", None),
    ],
)
async def test_when_to_ask_again(unix: Site, engine: HttpEngine, header: str, seconds: int | None) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.answer(status="429 Too Many Requests", headers=header)

    unix.script = script
    async with engine.post("/", b"") as answer:
        assert answer.retry_after_s == seconds


async def test_a_path_before_every_path(unix: Site) -> None:
    engine = HttpEngine(unix.address, base="/api")
    await ask(engine)
    await engine.get("/v1/models", WITHIN_S, 100)
    lines = [head.split("\r\n")[0] for head, _ in unix.talks[0].requests]
    assert lines == ["POST /api/v1/completions HTTP/1.1", "GET /api/v1/models HTTP/1.1"]
    engine.close()


async def test_headers_of_ones_own(unix: Site) -> None:
    engine = HttpEngine(unix.address, {"host": "api.example.org", "authorization": "Bearer abc"})
    await ask(engine)
    await engine.get("/v1/models", WITHIN_S, 100)
    for head, _ in unix.talks[0].requests:
        lines = head.lower().split("\r\n")
        assert [line for line in lines if line.startswith("host:")] == ["host: api.example.org"]
        assert "authorization: bearer abc" in lines
    engine.close()


# TLS
LOOPS = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})])
"""Theirs and ours speak TLS in code of their own."""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@LOOPS
async def test_tls(authority: trustme.CA) -> None:
    async with serving(Site(), None, server_tls(authority, "127.0.0.1")) as site:
        engine = HttpEngine(site.address, tls=trusting(authority))
        assert [await ask(engine, b"%d" % n) for n in range(3)] == [b'{"echo":"%d"}' % n for n in range(3)]
        assert await engine.get("/v1/models", WITHIN_S, 100) == (200, b'{"echo":""}')
        assert len(site.talks) == 1, "the connection is used again"
        engine.close()
        await until(lambda: site.talks[0].is_closed)


@LOOPS
async def test_a_large_answer_through_tls(authority: trustme.CA) -> None:
    whole = bytes(range(256)) * 20_000  # 5 MB: many times what the client holds

    async def script(talk: Talk) -> None:
        while await talk.request():
            await talk.answer(whole)

    async with serving(Site(), None, server_tls(authority, "127.0.0.1")) as site:
        site.script = script
        engine = HttpEngine(site.address, tls=trusting(authority))
        for _ in range(2):
            assert await ask(engine) == whole
        engine.close()


@LOOPS
async def test_leaving_early_closes_a_tls_connection(authority: trustme.CA) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.send(CHUNKED + b"5\r\nhello\r\n")
        await talk.until_closed()

    async with serving(Site(), None, server_tls(authority, "127.0.0.1")) as site:
        site.script = script
        engine = HttpEngine(site.address, tls=trusting(authority))
        async with engine.post("/", b"") as answer:
            assert await anext(answer.body()) == b"hello"
        await until(lambda: site.talks[0].is_closed, what="the server sees that nobody waits")


async def complains(talk: Talk) -> None:
    """The script of a server that has no TLS on this port."""
    await talk.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    await talk.until_closed()


@LOOPS
@pytest.mark.parametrize(
    ("shown", "trusted", "why"),
    [
        pytest.param("elsewhere.example", True, "certificate is not trusted", id="another name"),
        pytest.param("127.0.0.2", True, "certificate is not trusted", id="another address"),
        pytest.param("127.0.0.1", False, "certificate is not trusted", id="an unknown authority"),
        pytest.param("", True, "does not speak TLS|ConnectionAbortedError|ConnectionResetError", id="no TLS at all"),
    ],
)
async def test_who_cannot_show_a_certificate_gets_no_request(authority: trustme.CA, shown: str, trusted: bool, why: str) -> None:
    tls = server_tls(authority, shown) if shown else None
    async with serving(Site(), None, tls) as site:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's own word on the handshake
        site.script = answers if tls else complains
        engine = HttpEngine(site.address, {"authorization": "Bearer abc"}, tls=trusting(authority) if trusted else default_tls())
        with pytest.raises(EngineFailed, match=why):
            await ask(engine)
        assert all(not talk.requests for talk in site.talks)


def test_the_default_checks_certificate_and_name() -> None:
    context = default_tls()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2

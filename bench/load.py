"""Calls an endpoint as many callers at once would, at little cost of its own, and keeps what each call or chunk took."""

import asyncio
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

CHAT_PATH = "/v1/chat/completions"
LIMIT_S = 120.0
FAILURE_BYTES_MAX = 4096
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

Result = TypeVar("Result")
ProtocolType = TypeVar("ProtocolType", bound=asyncio.Protocol)


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """The usual three points of a sample, in the sample's own unit; all NaN if it is empty."""

    p50: float
    p90: float
    p99: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Take the smallest value that at least `percent` of the sample does not exceed."""
    assert 0 < percent <= 100
    if not values:
        return math.nan
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def percentiles(values: Sequence[float]) -> Percentiles:
    ordered = sorted(values)
    return Percentiles(p50=percentile(ordered, 50), p90=percentile(ordered, 90), p99=percentile(ordered, 99))


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """What a closed loop saw: the whole time of each call answered 200, and how many were not."""

    times_ms: tuple[float, ...]
    elapsed_s: float
    failures: int
    first_failure: bytes | None

    @property
    def calls_per_s(self) -> float:
        return len(self.times_ms) / self.elapsed_s

    @property
    def percentiles_ms(self) -> Percentiles:
        return percentiles(self.times_ms)


class StreamReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of concurrent streams saw; the counts are over all streams together."""

    first_chunk_ms: tuple[float, ...]
    gaps_ms: tuple[float, ...]
    elapsed_s: float
    lost: int
    duplicated: int
    disordered: int
    strange: int
    unfinished: int
    failures: int
    first_failure: bytes | None

    @property
    def intact(self) -> bool:
        return not (self.lost or self.duplicated or self.disordered or self.strange or self.unfinished or self.failures)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where to connect: a Unix socket, or a host and port of this machine."""

    host: str
    port: int = 0
    socket_path: str = ""
    prefix: str = ""


def target_of(base_url: str) -> Target:
    """Read a base URL or socket path; any host but this machine is refused, since load belongs nowhere else."""
    if base_url.startswith(("/", "unix:")):
        return Target(host="localhost", socket_path=base_url.removeprefix("unix:"))
    parts = urlsplit(base_url)
    if parts.scheme != "http" or parts.hostname not in LOOPBACK or parts.port is None:
        raise ValueError(f"not an http URL with a port of this machine, nor a socket path: {base_url}")
    return Target(host=parts.hostname, port=parts.port, prefix=parts.path.rstrip("/"))


def request_of(target: Target, key: str, body: bytes, path: str) -> bytes:
    """Lay out head and body once; every call sends the same bytes."""
    head = (
        f"POST {target.prefix}{path} HTTP/1.1\r\nhost: {target.host}:{target.port}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def connect(target: Target, make: Callable[[], ProtocolType]) -> ProtocolType:
    loop = asyncio.get_running_loop()
    if target.socket_path:
        return (await loop.create_unix_connection(make, target.socket_path))[1]
    return (await loop.create_connection(make, target.host, target.port))[1]


class Tally:
    """What the callers of one closed loop share: the calls still to make and the results so far."""

    def __init__(self, calls: int) -> None:
        self.calls_left = calls
        self.times_ms: list[float] = []
        self.failures = 0
        self.first_failure: bytes | None = None

    def fail(self, why: bytes) -> None:
        self.failures += 1
        if self.first_failure is None:
            self.first_failure = why[:FAILURE_BYTES_MAX]


class Caller(asyncio.Protocol):
    """One connection that sends its next call from within the end of the last answer: no task or future per call."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, tally: Tally) -> None:
        self.request = request
        self.tally = tally
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.failed_body = b""
        self.waiting = False
        self.sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.call()

    def call(self) -> None:
        if self.tally.calls_left == 0:
            self.transport.close()
            return
        self.tally.calls_left -= 1
        self.waiting = True
        self.sent_s = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a fault of the load generator itself
        except httptools.HttpParserError as error:
            self.settle_failed(b"not HTTP: " + str(error).encode())
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.status != 200 and len(self.failed_body) < FAILURE_BYTES_MAX:
            self.failed_body += body

    def on_message_complete(self) -> None:
        took_s = time.perf_counter() - self.sent_s
        if self.status == 200:
            self.tally.times_ms.append(took_s * 1000)
            self.waiting = False
        else:
            self.settle_failed(b"%d " % self.status + self.failed_body)
        if self.parser.should_keep_alive():
            self.call()
        else:
            self.transport.close()

    def settle_failed(self, why: bytes) -> None:
        """Count a failure once for the call under way."""
        if self.waiting:
            self.waiting = False
            self.failed_body = b""
            self.tally.fail(why)

    def connection_lost(self, exc: Exception | None) -> None:
        self.settle_failed(b"connection lost: " + str(exc).encode())
        if not self.finished.done():
            self.finished.set_result(None)


async def keep_calling(target: Target, request: bytes, tally: Tally) -> None:
    """Be one caller; a connection that the other side closes is replaced."""
    while tally.calls_left > 0:
        caller = await connect(target, functools.partial(Caller, request, tally))
        try:
            await caller.finished
        finally:
            caller.transport.abort()


async def closed_loop(
    base_url: str, key: str, body: bytes, *, callers: int, calls: int, path: str = CHAT_PATH, limit_s: float = LIMIT_S
) -> Latencies:
    """Make `calls` calls in all, `callers` at a time, each on its own kept-alive connection; a 200 counts, all else is a failure."""
    assert 0 < callers <= calls
    target = target_of(base_url)
    request = request_of(target, key, body, path)
    tally = Tally(calls)
    started_s = time.perf_counter()
    async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(keep_calling(target, request, tally))
    return Latencies(
        times_ms=tuple(tally.times_ms),
        elapsed_s=time.perf_counter() - started_s,
        failures=tally.failures,
        first_failure=tally.first_failure,
    )


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk adds to the answer."""

    content: str | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a chunk; the stub sends one at most."""

    delta: Delta


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """As much of a chat.completion.chunk as is measured; an event without choices is no chunk."""

    choices: list[Choice]


decode_chunk = msgspec.json.Decoder(Chunk).decode


class StreamCaller(asyncio.Protocol):
    """One streamed call: notes when each content chunk came and what it said."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.sent_s = 0.0
        self.read_s = 0.0
        self.unread = b""
        self.contents: list[str] = []
        self.arrived_s: list[float] = []
        self.done = False
        self.failure: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> None:
        self.sent_s = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.read_s = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a fault of the load generator itself
        except httptools.HttpParserError as error:
            self.end(b"not HTTP: " + str(error).encode())

    def on_body(self, body: bytes) -> None:
        self.unread += body
        if self.parser.get_status_code() != 200:
            return
        *events, self.unread = self.unread.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self.read_event(line[5:].strip())

    def read_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = decode_chunk(data)
        except msgspec.DecodeError:
            self.end(data)
            return
        for choice in chunk.choices:
            if choice.delta.content:
                self.contents.append(choice.delta.content)
                self.arrived_s.append(self.read_s)

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        self.end(None if status == 200 else b"%d " % status + self.unread)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(b"connection lost: " + str(exc).encode())

    def end(self, failure: bytes | None) -> None:
        """Settle the stream once; whatever ends it later changes nothing."""
        if not self.finished.done():
            self.failure = failure
            self.finished.set_result(None)
            self.transport.close()


def numbers_of(contents: Sequence[str]) -> list[int]:
    """Read the running numbers out of "c0 c1 c2 ", wherever the chunks were cut; what is none of them reads as -1."""
    words = "".join(contents).split()
    return [int(word[1:]) if word[0] == "c" and word[1:].isdecimal() else -1 for word in words]


def report_of(callers: Sequence[StreamCaller], expected_chunks: int, elapsed_s: float) -> StreamReport:
    """Add up what the streams saw and check every number."""
    lost = duplicated = disordered = strange = 0
    for caller in callers:
        numbers = numbers_of(caller.contents)
        known = [number for number in numbers if 0 <= number < expected_chunks]
        counts = Counter(known)
        strange += len(numbers) - len(known)
        lost += expected_chunks - len(counts)
        duplicated += len(known) - len(counts)
        disordered += sum(later < earlier for earlier, later in itertools.pairwise(known))
    failures = [caller.failure for caller in callers if caller.failure is not None]
    return StreamReport(
        first_chunk_ms=tuple((caller.arrived_s[0] - caller.sent_s) * 1000 for caller in callers if caller.arrived_s),
        gaps_ms=tuple((later - earlier) * 1000 for caller in callers for earlier, later in itertools.pairwise(caller.arrived_s)),
        elapsed_s=elapsed_s,
        lost=lost,
        duplicated=duplicated,
        disordered=disordered,
        strange=strange,
        unfinished=sum(not caller.done for caller in callers),
        failures=len(failures),
        first_failure=failures[0][:FAILURE_BYTES_MAX] if failures else None,
    )


async def streams(
    base_url: str, key: str, body: bytes, *, count: int, expected_chunks: int, path: str = CHAT_PATH, limit_s: float = LIMIT_S
) -> StreamReport:
    """Hold `count` connections, send the streamed call on all of them at once, and check every chunk that comes back."""
    assert count > 0
    assert expected_chunks > 0
    target = target_of(base_url)
    request = request_of(target, key, body, path)
    callers: list[StreamCaller] = []
    try:
        async with asyncio.timeout(limit_s):
            for _ in range(count):
                callers.append(await connect(target, StreamCaller))
            started_s = time.perf_counter()
            for caller in callers:
                caller.send(request)
            await asyncio.wait([caller.finished for caller in callers])
            elapsed_s = time.perf_counter() - started_s
    finally:
        for caller in callers:
            caller.transport.abort()
    return report_of(callers, expected_chunks, elapsed_s)


def chat_body(model: str, *, stream: bool = False, metadata: dict[str, str] | None = None) -> bytes:
    """Lay out the small chat call that the benches send."""
    call: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": "Say something short."}]}
    if stream:
        call |= {"stream": True, "stream_options": {"include_usage": True}}
    if metadata is not None:
        call["metadata"] = metadata
    return msgspec.json.encode(call)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a bench on the event loop that costs least."""
    return uvloop.run(work)

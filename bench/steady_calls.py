"""The callers of the steadiness benches: streams of which every piece is kept with its time, and the right answer is known."""

import asyncio
import random
import time
from collections.abc import Callable
from itertools import count

import msgspec

from bench.load import CHAT_PATH, StreamCaller, Target, connect, decode_chunk, request_of, target_of
from bench.steady_judge import Cut, Done, Event, Failed, Left, Seen, Text
from bench.stub_engine import right_answer

PATIENCE_S = 90.0
"""A call that takes longer is left by its caller."""
OPEN_MAX = 4_000
"""Calls of one load under way at once; past it, the load generator's own limits would be measured."""
RETRY_S = 0.2
"""How long a caller waits before a retry, if the refusal says nothing."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How long an answer is and how fast a node that does nothing else writes it."""

    words: int
    interval_ms: int
    delay_ms: int

    @property
    def seconds(self) -> float:
        return (self.delay_ms + self.words * self.interval_ms) / 1000


class _Error(msgspec.Struct, frozen=True):
    code: str | None = ""


class _Said(msgspec.Struct, frozen=True):
    error: _Error


_error = msgspec.json.Decoder(_Said)


def code_of(data: bytes) -> str:
    """The public code of an error's document; empty if it is none."""
    try:
        return _error.decode(data).error.code or ""
    except msgspec.DecodeError:
        return ""


class Witness(StreamCaller):
    """One streamed call, and all that came of it in order."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: dict[str, str] = {}
        self.events: list[Event] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    @property
    def status(self) -> int:
        return int(self.parser.get_status_code()) if self.headers else 0

    def read_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.events.append(Done(self.read_s))
            return
        try:
            chunk = decode_chunk(data)
        except msgspec.DecodeError:
            self.events.append(Failed(code_of(data), self.read_s))
            return
        self.events += [Text(choice.delta.content, self.read_s) for choice in chunk.choices if choice.delta.content]

    def end(self, failure: bytes | None) -> None:
        if not self.finished.done() and not any(isinstance(event, Done | Failed) for event in self.events):
            now = time.perf_counter()
            is_refusal = failure is not None and self.status not in (0, 200)
            self.events.append(Failed(code_of(self.unread), now) if is_refusal else Cut(now))
        super().end(failure)

    def leave(self) -> None:
        """The caller's patience is over; of an answer that has ended nothing more is expected."""
        if not any(isinstance(event, Done | Failed) for event in self.events):
            self.events.append(Left(time.perf_counter()))


class Asked:
    """One call, from the moment it is sent; `seen` is what came of it so far."""

    def __init__(self, name: str, right: str) -> None:
        self.name = name
        self.right = right
        self.sent_s = time.perf_counter()
        self.witness: Witness | None = None
        self._refused: tuple[Event, ...] = ()

    @property
    def node(self) -> str | None:
        """The node that began the answer, once its head is there."""
        return None if self.witness is None else self.witness.headers.get("fallow-node")

    @property
    def is_over(self) -> bool:
        return bool(self._refused) or (self.witness is not None and self.witness.finished.done())

    def seen(self) -> Seen:
        witness = self.witness
        if witness is None:
            return Seen(name=self.name, right=self.right, sent_s=self.sent_s, events=self._refused)
        return Seen(
            name=self.name,
            right=self.right,
            status=witness.status,
            headers=dict(witness.headers),
            sent_s=self.sent_s,
            events=tuple(witness.events),
        )

    async def go(self, target: Target, request: bytes, patience_s: float) -> Seen:
        """Send it and stay to its end, or as long as the caller's patience lasts."""
        self.sent_s = time.perf_counter()
        try:
            self.witness = await connect(target, Witness)
        except OSError:
            self._refused = (Cut(time.perf_counter()),)
            return self.seen()
        try:
            self.witness.send(request)
            async with asyncio.timeout(patience_s):
                await self.witness.finished
        except TimeoutError:
            self.witness.leave()
        finally:
            self.witness.transport.abort()
        return self.seen()


class Callers:
    """Those who call one gateway. Every call has a prompt of its own, so that no answer can be taken for another's."""

    def __init__(self, base_url: str, *, seed: int, first_token_ms: int | None = None, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._target = target_of(base_url)
        self._numbers = count()
        self._wishes = {} if first_token_ms is None else {"fallow": {"first_token_ms": first_token_ms}}
        self.seed = seed
        self.under_way = 0

    def asked(self, shape: Shape, key: str) -> tuple[Asked, bytes]:
        """A new call and its request."""
        name = f"call {next(self._numbers)} of {self.seed}"
        metadata = {"words": str(shape.words), "interval_ms": str(shape.interval_ms), "delay_ms": str(shape.delay_ms)}
        body = {
            "model": "stub",
            "messages": [{"role": "user", "content": name}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": shape.words,
            "metadata": metadata,
            **self._wishes,
        }
        request = request_of(self._target, key, msgspec.json.encode(body), CHAT_PATH)
        return Asked(name, right_answer(name, shape.words)), request

    async def ask(self, shape: Shape, key: str, watch: Callable[[Asked], None] = lambda asked: None) -> Seen:
        """One call to its end; `watch` gets it as soon as it is made."""
        asked, request = self.asked(shape, key)
        watch(asked)
        self.under_way += 1
        try:
            return await asked.go(self._target, request, self._patience_s)
        finally:
            self.under_way -= 1

    async def retry(self, shape: Shape, key: str) -> list[Seen]:
        """One call, and once more if it failed, after the time that its refusal names."""
        first = await self.ask(shape, key)
        if first.is_complete:
            return [first]
        after = first.headers.get("retry-after", "")
        await asyncio.sleep(float(after) if after.isdecimal() else RETRY_S)
        return [first, await self.ask(shape, key)]


def arrivals(rate: float, for_s: float, draw: random.Random) -> list[float]:
    """When calls come, in seconds from now: `rate` a second as a Poisson process."""
    found: list[float] = []
    at_s = draw.expovariate(rate)
    while at_s < for_s:
        found.append(at_s)
        at_s += draw.expovariate(rate)
    return found


async def open_load(callers: Callers, shape: Shape, keys: tuple[str, ...], times_s: list[float]) -> list[Seen]:
    """Calls at these times whatever becomes of those before, the keys taking turns; all are awaited. Times are from now on.

    While `OPEN_MAX` are under way, further ones aren't sent, and are in no result.
    """
    began = time.perf_counter()
    tasks: list[asyncio.Task[Seen]] = []
    async with asyncio.TaskGroup() as group:
        for number, at_s in enumerate(times_s):
            await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
            if callers.under_way < OPEN_MAX:
                tasks.append(group.create_task(callers.ask(shape, keys[number % len(keys)])))
    return [task.result() for task in tasks]

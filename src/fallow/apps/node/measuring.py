"""The self-benchmark of one model: starts its engine with some numbers of threads, asks it, and has core/tuning choose."""

import asyncio
import contextlib
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from fallow.adapters import children
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.measurements import HardwareKey, Measurements, build_of, memory_speed
from fallow.adapters.rapl import Meter
from fallow.apps.node.engine_served import SMALL_BYTES_MAX, small
from fallow.apps.node.subject import Subject
from fallow.apps.node.supervisor import Launcher
from fallow.core import tuning
from fallow.model.errors import EngineFailed
from fallow.model.measured import Measured, Point, Rates
from fallow.ports import Clock
from fallow.wire.llama_answer import UNREADABLE
from fallow.wire.openai import EMBEDDINGS, RERANK

BUDGET_S = 60.0
"""For one model, counted from when its engine first answers; a slow model gets fewer points."""
LOAD_S = 120.0
"""For starting an engine, its file's checksum included."""
STEP_S = 8.0
"""What isn't expected to be done by then isn't tried."""
STEP_S_MAX = 20.0
"""When a step is given up."""
HEALTH_S = 2.0
HEALTH_POLL_S = 0.02
IDLE_S = 0.5
"""How long the processor's meter is watched before anything runs."""
WARM_WORDS = 16
WARM_TOKENS = 4
PREFILL_S = 0.8
PREFILL_TOKENS = (128, 256)
DECODE_S = 0.15
DECODE_TOKENS = (16, 32)
TOKENS_MIN = 4
STREAM_WORDS = 4
LONE_TRIES = 2
"""A single stream decides on the threads, so one disturbance mustn't."""
TEXT_WORDS = 48
TEXTS_S = 0.4
TEXTS_TRIES_MAX = 16
WORDS = (
    *("the", "river", "carries", "small", "boats", "past", "quiet", "fields", "where", "people", "work", "until", "evening"),
    *("and", "then", "walk", "home", "along", "old", "roads"),
)

T = TypeVar("T")


class _Timings(msgspec.Struct, frozen=True, kw_only=True):
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float


class _Completion(msgspec.Struct, frozen=True, kw_only=True):
    timings: _Timings


class _Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0


class _Vectors(msgspec.Struct, frozen=True, kw_only=True):
    usage: _Usage = _Usage()


class _Late(Exception):
    """There is no time left for a step."""


async def known_or_measured(
    subject: Subject,
    cache: Measurements,
    key: HardwareKey,
    clock: Clock,
    *,
    again: bool = False,
    thorough: bool = False,
    meter: Meter | None = None,
    was_quiet: Callable[[], bool] = lambda: True,
) -> Measured:
    """What is remembered of this model on this machine; else it is measured, and remembered if the machine `was_quiet` meanwhile.

    Raises what `measure` does.
    """
    build = build_of(subject.engine)
    known = None if again else cache.find(key, subject.digest, build)
    if known is not None:
        return known
    memory_bytes_per_s = await asyncio.to_thread(memory_speed, cache, key, at_ms=clock.wall_ms())
    measured = await measure(subject, clock, memory_bytes_per_s=memory_bytes_per_s, thorough=thorough, meter=meter)
    if was_quiet():
        await asyncio.to_thread(cache.keep, key, subject.digest, build, measured)
    return measured


async def measure(
    subject: Subject, clock: Clock, *, memory_bytes_per_s: int | None = None, thorough: bool = False, meter: Meter | None = None
) -> Measured:
    """Start the engine with each number of threads in turn, and see how fast it is. Being cancelled ends the engine.

    Fewer threads are tried as long as they may be chosen, and parallel streams where they may; all of both if it is to be `thorough`.
    Raises EngineFailed if nothing could be measured, and BadChecksum.
    """
    run = _Run(subject, thorough, None if meter is None else await _Power.watch(meter))
    for threads in subject.threads:
        if not thorough and not tuning.is_worth_fewer(run.points):
            break
        if run.points and run.left_s < run.load_s + STEP_S:
            run.is_whole = False
            break
        try:
            await run.try_threads(threads)
        except EngineFailed:
            run.is_whole = False
            if not run.points:
                raise
    choice = tuning.choose(run.points, slots_max=subject.size.slots, writes=subject.work == "text")
    point = next(point for point in run.points if point.threads == choice.threads)
    read_bytes = None
    if subject.work == "text":
        read_bytes = tuning.bytes_per_token(
            weights_bytes=subject.weights_bytes, kv_bytes_per_token=subject.kv_bytes_per_token, context_tokens=DECODE_TOKENS[0]
        )
    return Measured(
        work=subject.work,
        choice=choice,
        prefill_tokens_per_s=point.prefill_tokens_per_s,
        decode_tokens_per_s=point.decode_tokens_per_s,
        decode_by_streams=point.decode_by_streams,
        texts_by_batch=point.texts_by_batch,
        points=tuple(sorted(run.points, key=lambda one: one.threads)),
        at_ms=clock.wall_ms(),
        bytes_per_token=read_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        roofline_share=tuning.roofline(
            decode_tokens_per_s=point.decode_tokens_per_s, bytes_per_token=read_bytes, memory_bytes_per_s=memory_bytes_per_s
        ),
        watts=run.watts.get(choice.threads),
        is_whole=run.is_whole,
    )


class _Power:
    """What the processor draws beyond idling, by its own meter."""

    def __init__(self, meter: Meter, idle_watts: float) -> None:
        self._meter = meter
        self._idle_watts = idle_watts
        self._from: tuple[float, float | None] = (0.0, None)

    @classmethod
    async def watch(cls, meter: Meter) -> "_Power":
        """Look at the machine before anything runs."""
        power = cls(meter, 0.0)
        power.begin()
        await asyncio.sleep(IDLE_S)
        power._idle_watts = power.watts() or 0.0
        return power

    def begin(self) -> None:
        """Count from now."""
        self._from = _now_s(), self._meter.joules()

    def watts(self) -> float | None:
        """Since the beginning; None if the meter can't be read."""
        since_s, before = self._from
        joules = self._meter.joules()
        if joules is None or before is None or _now_s() <= since_s:
            return None
        return max(0.0, (joules - before) / (_now_s() - since_s) - self._idle_watts)


class _Run:
    """All trials of one model."""

    def __init__(self, subject: Subject, thorough: bool, power: _Power | None) -> None:
        self.points: list[Point] = []
        self.watts: dict[int, float] = {}
        self.is_whole = True
        self.load_s = 0.0
        self._subject = subject
        self._thorough = thorough
        self._power = power
        self._until_s: float | None = None

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return BUDGET_S if self._until_s is None else self._until_s - _now_s()

    async def try_threads(self, threads: int) -> None:
        """One engine's life; adds what was seen. Raises EngineFailed if that is nothing."""
        began_s = _now_s()
        async with running(self._subject.launch(msgspec.structs.replace(self._subject.size, threads=threads))) as engine:
            self.load_s = _now_s() - began_s
            if self._until_s is None:
                self._until_s = _now_s() + BUDGET_S
            if self._subject.work == "text":
                await self._text(engine, threads)
            else:
                await self._vectors(engine, threads)

    async def _text(self, engine: HttpEngine, threads: int) -> None:
        try:
            warm = await self._step(_complete(engine, WARM_WORDS, WARM_TOKENS, 0))
        except _Late:
            raise EngineFailed(f"{self._subject.model} wrote nothing within {STEP_S_MAX:g} s and can't be measured") from None
        point = Point(threads=threads, prefill_tokens_per_s=_prefill(warm), decode_by_streams=((1, _decode([warm])),))
        try:
            tokens_per_word = warm.prompt_n / WARM_WORDS
            tokens = _within(point.prefill_tokens_per_s * PREFILL_S, PREFILL_TOKENS, point.prefill_tokens_per_s)
            words = round(tokens / tokens_per_word)
            point = msgspec.structs.replace(point, prefill_tokens_per_s=_prefill(await self._step(_complete(engine, words, 1, 1))))
            if self._power is not None:
                self._power.begin()
            point = await self._streams(engine, point)
            if self._power is not None and (watts := self._power.watts()) is not None:
                self.watts[threads] = watts
        except _Late:
            self.is_whole = False
        self.points.append(point)

    async def _streams(self, engine: HttpEngine, point: Point) -> Point:
        """The point with its streams: one alone, then more, as long as they are of interest and time remains."""
        rate = point.decode_tokens_per_s
        tokens = _within(rate * DECODE_S, DECODE_TOKENS, rate)
        for streams in tuning.streams_to_try(self._subject.size.slots):
            if streams > 1 and not self._thorough and not tuning.is_worth_streams(point, self.points):
                break
            if streams * tokens / rate > min(STEP_S, self.left_s):
                self.is_whole = False
                break
            tries = LONE_TRIES if streams == 1 and tokens / rate < 1 else 1
            try:
                seen = [
                    _decode(await self._step(_all([_complete(engine, STREAM_WORDS, tokens, one) for one in range(streams)])))
                    for _ in range(tries)
                ]
            except _Late:
                self.is_whole = False
                break
            others = tuple(one for one in point.decode_by_streams if one[0] != streams)
            point = msgspec.structs.replace(point, decode_by_streams=tuple(sorted((*others, (streams, max(seen))))))
        return point

    async def _vectors(self, engine: HttpEngine, threads: int) -> None:
        rates: Rates = ()
        prefill = 0.0
        try:
            await self._step(_embed(engine, self._subject, 1, 0))
            for batch in tuning.BATCHES:
                texts, tokens, spent_s = 0, 0, 0.0
                while spent_s < TEXTS_S and texts < TEXTS_TRIES_MAX * batch:
                    began_s = _now_s()
                    tokens += (await self._step(_embed(engine, self._subject, batch, texts))).usage.prompt_tokens
                    spent_s += _now_s() - began_s
                    texts += batch
                rates = (*rates, (batch, texts / spent_s))
                prefill = prefill or tokens / spent_s
        except _Late:
            self.is_whole = False
        if not rates:
            raise EngineFailed(f"{self._subject.model} embedded nothing within {STEP_S_MAX:g} s and can't be measured")
        self.points.append(Point(threads=threads, prefill_tokens_per_s=prefill, texts_by_batch=rates))

    async def _step(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it within the step's limit and what is left of the budget; raises _Late."""
        try:
            async with asyncio.timeout(max(0.0, min(STEP_S_MAX, self.left_s))):
                return await work
        except TimeoutError:
            raise _Late from None


@contextlib.asynccontextmanager
async def running(launch: Launcher) -> AsyncIterator[HttpEngine]:
    """An engine that answers, for as long as it is needed; raises EngineFailed if it doesn't load, BadChecksum."""
    engine = HttpEngine(str(launch.socket))
    process: Process | None = None
    try:
        try:
            async with asyncio.timeout(LOAD_S):
                process = await launch.start()
                await _until_ready(process, launch, engine)
        except TimeoutError:
            raise EngineFailed(f"the engine was not ready within {LOAD_S:g} s") from None
        except OSError as error:
            raise EngineFailed(f"the engine could not be started: {error.strerror or type(error).__name__}") from None
        yield engine
    finally:
        engine.close()
        if process is not None:
            await asyncio.shield(children.kill(process))
        launch.clean_up()


async def _until_ready(process: Process, launch: Launcher, engine: HttpEngine) -> None:
    while not (launch.socket.exists() and await engine.is_healthy(HEALTH_S)):
        if process.returncode is not None:
            raise EngineFailed(f"the engine ended with code {process.returncode} while it loaded the model")
        await asyncio.sleep(HEALTH_POLL_S)


async def _complete(engine: HttpEngine, words: int, tokens: int, first: int) -> _Timings:
    """Have a prompt of some words continued by exactly so many tokens; `first` makes prompts differ."""
    body = {"prompt": _text(words, first), "n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    timings = (await _ask(engine, "/completion", body, _Completion)).timings
    is_told = min(timings.prompt_n, timings.prompt_ms) > 0 and timings.predicted_n == tokens
    if not is_told or (tokens > 1 and timings.predicted_ms <= 0):
        raise EngineFailed("the engine answers without its timings, so it can't be measured")
    return timings


async def _embed(engine: HttpEngine, subject: Subject, texts: int, first: int) -> _Vectors:
    several = [_text(TEXT_WORDS, first + number) for number in range(texts)]
    if subject.work == "rerank":
        return await _ask(engine, RERANK, {"model": subject.model, "query": _text(WARM_WORDS, first), "documents": several}, _Vectors)
    return await _ask(engine, EMBEDDINGS, {"model": subject.model, "input": several}, _Vectors)


async def _ask(engine: HttpEngine, path: str, body: Mapping[str, Any], kind: type[T]) -> T:
    async with engine.post(path, msgspec.json.encode(body)) as answer:
        status, data = answer.head.status, await small(answer, SMALL_BYTES_MAX)
    if status != 200:
        raise EngineFailed(f"the engine answers {path} with status {status}, so it can't be measured")
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE:
        raise EngineFailed("the engine wrote an answer that can't be read") from None


async def _all(asks: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; raises the first one's EngineFailed."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in asks]
    except* EngineFailed as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _prefill(timings: _Timings) -> float:
    return 1000 * timings.prompt_n / timings.prompt_ms


def _decode(together: Sequence[_Timings]) -> float:
    """Tokens per second of all streams, over the time of the slowest: streams don't begin at the same moment, so it is a little low.

    A stream's first token comes with its prompt, and isn't in the time that llama.cpp tells (its own rate counts it, and is too high).
    """
    return 1000 * sum(one.predicted_n - 1 for one in together) / max(one.predicted_ms for one in together)


def _within(wanted: float, bounds: tuple[int, int], rate: float) -> int:
    """How many tokens to ask for: within the bounds, but no more than a step has time for."""
    low, high = bounds
    return round(max(TOKENS_MIN, min(max(low, min(high, wanted)), rate * STEP_S)))


def _text(words: int, first: int) -> str:
    return " ".join(WORDS[(first + number) % len(WORDS)] for number in range(max(1, words)))


def _now_s() -> float:
    return asyncio.get_running_loop().time()

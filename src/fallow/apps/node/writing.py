"""Has an engine write what a generation asks for: in one go, or in as many tries as it takes to fit a schema."""

import contextlib
import functools
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import msgspec

from fallow.apps.node import retracing
from fallow.apps.node.engine_served import SMALL_BYTES_MAX, small
from fallow.apps.node.seats import Seats
from fallow.apps.node.served import Refused
from fallow.core.slots import Asker
from fallow.model.errors import AnswerIncomplete, EngineFailed, SchemaNotMet
from fallow.model.receipt import Usage
from fallow.ports import Engine, EngineAnswer
from fallow.wire import json_schema, llama_request, tool_prompt
from fallow.wire.generation import Called, Ended, Event, Generation, Reason, Sampling, Text, ToolCall
from fallow.wire.llama_answer import EngineStream, refusal
from fallow.wire.stop import StopCutter

TRIES_MAX = 3
TEMPERATURES = (0.7, 1.0)
"""For the second and third try of a request that asked for less: the same again would be written again."""
Events = list[Event]
Ask = Callable[[Sampling], llama_request.EngineRequest]


class _Written(msgspec.Struct, frozen=True):
    """A text that came back whole."""

    text: str
    events: Events
    reason: Reason
    usage: Usage


class Writing:
    """One generation in the making. `usage` counts what the caller gets: tries that came to nothing aren't in it."""

    def __init__(
        self,
        generation: Generation,
        engine: Engine,
        neutraliser: llama_request.Neutraliser,
        *,
        stream: bool,
        seats: Seats,
        asker: Asker,
    ) -> None:
        """Raises InvalidRequest if tools or schema can't be used."""
        self._generation = generation
        self._engine = engine
        self._seats = seats
        self._asker = asker
        self._usage: Usage | None = None
        self.tokens: tuple[int, ...] = ()
        self._moved: Callable[[], None] = lambda: None
        self._constraint: json_schema.Constraint | None = None
        if generation.tools:
            tool_prompt.check_tools(generation.tools, generation.params.get("tools", "tools"))
        if generation.schema is not None:
            json_schema.check_schema(generation.schema, param=generation.params.get("schema", "schema"))
            self._constraint = json_schema.constrain(generation.schema)
        may_stream = stream and not generation.tells_stop and self._constraint is not None and self._constraint.exact
        self._is_held = self._constraint is not None and not may_stream
        self._calls = bool(generation.tools) and generation.tool_choice != "none"
        turns = neutraliser.turns(generation.turns)
        self.turns = tool_prompt.with_tools(turns, generation.tools, generation.tool_choice, generation.tool_name, neutraliser.text)

    @property
    def usage(self) -> Usage:
        """What another engine wrote before counts as written, not as read."""
        used, before = self._usage or Usage(), len(self._generation.delivered or ())
        if not before:
            return used
        prompt = max(0, used.prompt_tokens - before)
        return Usage(prompt_tokens=prompt, cached_tokens=min(used.cached_tokens, prompt), output_tokens=used.output_tokens + before)

    async def run(self, moved: Callable[[], None]) -> AsyncGenerator[Events, None]:
        """Events as they come. Raises Refused, EngineFailed, AnswerIncomplete, SchemaNotMet."""
        self._moved = moved
        asked = self._generation
        limit = asked.sampling.max_tokens
        if asked.delivered and limit is not None and len(asked.delivered) >= limit:
            yield [Ended(0, "length")]
        elif asked.prompts:
            for number, prompt in enumerate(asked.prompts):
                ask = functools.partial(llama_request.completion, asked, prompt)
                async with contextlib.aclosing(self._plain(ask, number * asked.choices, asked.choices, moved)) as events:
                    async for some in events:
                        yield some
        elif self._calls or self._is_held or asked.tells_stop:
            for choice in range(asked.choices):
                is_free = self._calls and asked.tool_choice == "auto" and self._constraint is None
                way = self._watched(choice, moved) if is_free else self._alone(choice, moved)
                async with contextlib.aclosing(way) as events:
                    async for some in events:
                        yield some
        else:
            schema = None if self._constraint is None else self._constraint.engine
            ask = functools.partial(llama_request.chat, asked, self.turns, schema=schema)
            async with contextlib.aclosing(self._plain(ask, 0, asked.choices, moved)) as events:
                async for some in events:
                    yield some

    async def _alone(self, choice: int, moved: Callable[[], None]) -> AsyncGenerator[Events, None]:
        """One choice that must fit something, or must say where it stopped."""
        if self._calls:
            yield await self._called(choice, 0, moved)
        elif self._is_held:
            yield await self._fitting(choice, moved)
        else:
            async with contextlib.aclosing(self._free(choice, moved)) as events:
                async for some in events:
                    yield some

    def _free(self, choice: int, moved: Callable[[], None]) -> AsyncGenerator[Events, None]:
        """One choice, as the engine likes it."""

        def ask(sampling: Sampling) -> llama_request.EngineRequest:
            return llama_request.chat(self._generation, self.turns, _seeded(sampling, choice), schema=None)

        return self._plain(ask, choice, 1, moved)

    async def _plain(self, ask: Ask, first: int, choices: int, moved: Callable[[], None]) -> AsyncGenerator[Events, None]:
        """What the engine writes, as it writes it: so many choices of one prompt, as many at once as there are free slots."""
        asked = self._generation
        done = 0
        while done < choices:
            cutter = StopCutter(asked.sampling.stop) if asked.tells_stop else None
            async with self._asked(ask(_seeded(asked.sampling, done)), choices - done) as (answer, seated):
                stream = EngineStream(choices=seated, first=first + done, top_logprobs=asked.top_logprobs)
                async for chunk in answer.body():
                    moved()
                    events = stream.feed(chunk)
                    if cutter is not None:
                        events = cutter.feed(events)
                    if events:
                        yield events
                    if stream.is_whole or (cutter is not None and cutter.has_met):
                        break
                else:
                    raise EngineFailed("the engine stopped in the middle of its answer")
            if choices == 1 and stream.is_whole:
                self.tokens += tuple(stream.token_ids)
            self._count(stream.usage if stream.is_whole else stream.timed, is_new_prompt=bool(asked.prompts) and not done)
            done += seated

    async def _watched(self, choice: int, moved: Callable[[], None]) -> AsyncGenerator[Events, None]:
        """Free text that may turn into a call: then the call is written anew, under its schema."""
        watch = tool_prompt.CallWatch(self._generation.tools)
        shown = 0
        async with contextlib.aclosing(self._free(choice, moved)) as pieces:
            async for events in pieces:
                out: Events = []
                for event in events:
                    if isinstance(event, Text):
                        visible = watch.feed(event.text)
                        shown += bool(visible)
                        out += [Text(choice, visible, event.tokens)] if visible else []
                    elif not watch.found:
                        rest = watch.rest() if isinstance(event, Ended) else ""
                        out += [Text(choice, rest), event] if rest else [event]
                if out:
                    yield out
                if watch.found:
                    break
        if watch.found:
            yield await self._called(choice, shown, moved)

    async def _called(self, choice: int, shown_tokens: int, moved: Callable[[], None]) -> Events:
        """Calls that fit their tools' schemas; or a text that fits the caller's, where that was asked for besides free choice."""
        asked = self._generation
        constraint = tool_prompt.call_schema(asked.tools, asked.tool_name, parallel=asked.parallel_calls)
        may_be_text = self._constraint is not None and asked.tool_choice == "auto"
        if self._constraint is not None and may_be_text:
            constraint = tool_prompt.either_schema(constraint, self._constraint)
        reason: Reason = "stop"
        for number in range(TRIES_MAX):
            written = await self._try(choice, number, constraint, moved, spent_tokens=shown_tokens)
            calls = tool_prompt.read_calls(written.text, asked.tools, asked.tool_name)
            if calls is not None:
                self._count(msgspec.structs.replace(written.usage, output_tokens=written.usage.output_tokens + shown_tokens))
                return [*(Called(choice, index, _made(call)) for index, call in enumerate(calls)), Ended(choice, "tool_calls")]
            if may_be_text and asked.schema is not None and json_schema.fits_text(asked.schema, written.text):
                self._count(written.usage)
                return written.events
            reason = written.reason
        raise self._gave_up(reason, "a call of a tool")

    async def _fitting(self, choice: int, moved: Callable[[], None]) -> Events:
        """A text that fits the schema, or that ran into the caller's own limit."""
        asked = self._generation
        assert self._constraint is not None, "only a schema makes us hold an answer"
        reason: Reason = "stop"
        for number in range(TRIES_MAX):
            written = await self._try(choice, number, self._constraint, moved)
            is_cut = written.reason == "length" and asked.sampling.max_tokens is not None
            if is_cut or (asked.schema is not None and json_schema.fits_text(asked.schema, written.text)):
                self._count(written.usage)
                return written.events
            reason = written.reason
        raise self._gave_up(reason, "an answer")

    def _gave_up(self, reason: Reason, what: str) -> AnswerIncomplete | SchemaNotMet:
        param = self._generation.params.get("max_tokens", "max_tokens")
        if reason == "length":
            return AnswerIncomplete(f"{what} did not fit into {param} or the model's context; raise {param}, or ask for less", param=param)
        return SchemaNotMet(f"the model did not write {what} that fits the schema in {TRIES_MAX} tries; simplify it or use a larger model")

    async def _try(
        self, choice: int, number: int, constraint: json_schema.Constraint, moved: Callable[[], None], *, spent_tokens: int = 0
    ) -> _Written:
        """One try, whole; later ones are kept shorter and are drawn more freely."""
        asked = self._generation
        limit = asked.sampling.max_tokens
        left = None if limit is None else max(1, limit - spent_tokens)
        sampling = msgspec.structs.replace(_seeded(asked.sampling, choice + number), stop=(), max_tokens=left)
        schema = constraint.engine
        if number:
            schema = json_schema.tightened(schema)
            hotter = max(TEMPERATURES[number - 1], sampling.temperature or 0.0)
            sampling = msgspec.structs.replace(sampling, temperature=hotter)
        request = llama_request.chat(asked, self.turns, sampling, schema=schema)
        stream = EngineStream(choices=1, first=choice, top_logprobs=asked.top_logprobs)
        events: Events = []
        async with self._asked(request) as (answer, _):
            async for chunk in answer.body():
                moved()
                events += stream.feed(chunk)
        if not stream.is_whole or stream.usage is None:
            raise EngineFailed("the engine stopped in the middle of its answer")
        text = "".join(event.text for event in events if isinstance(event, Text))
        reason: Reason = next((event.reason for event in events if isinstance(event, Ended)), "stop")
        return _Written(text, events, reason, stream.usage)

    def _count(self, usage: Usage | None, *, is_new_prompt: bool = False) -> None:
        """Add what one more request wrote. The prompt counts once, but each of several prompts counts."""
        if usage is None:
            raise EngineFailed("the engine did not count its answer")
        old = self._usage
        if old is None:
            self._usage = usage
            return
        self._usage = Usage(
            prompt_tokens=old.prompt_tokens + usage.prompt_tokens if is_new_prompt else old.prompt_tokens,
            cached_tokens=old.cached_tokens + usage.cached_tokens if is_new_prompt else old.cached_tokens,
            output_tokens=old.output_tokens + usage.output_tokens,
        )

    async def _fetch(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self._engine.post(path, body) as answer:
            self._moved()
            return answer.head.status, await small(answer, SMALL_BYTES_MAX)

    @contextlib.asynccontextmanager
    async def _asked(self, request: llama_request.EngineRequest, choices: int = 1) -> AsyncIterator[tuple[EngineAnswer, int]]:
        """The engine's answer, and how many choices are in it: at least one, at most those wanted."""
        async with self._seats.taken(self._asker, request.body, choices) as taken:
            seat, may_reuse = taken.seat, taken.seat.may_reuse
            if retracing.wants(self._generation):
                may_reuse |= await retracing.retrace(self._generation, self.turns, self._fetch, slot=seat.slot, may_reuse=may_reuse)
            body = llama_request.placed(request, slot=seat.slot, may_reuse=may_reuse, choices=seat.choices)
            async with self._engine.post(request.path, body) as answer:
                if answer.head.status != 200:
                    taken.refused()
                    raise Refused(refusal(answer.head.status, await small(answer), self._generation.params))
                taken.began()
                yield answer, seat.choices


def _made(call: tuple[str, dict[str, Any]]) -> ToolCall:
    name, arguments = call
    return ToolCall(id=f"call_{secrets.token_hex(12)}", name=name, arguments=msgspec.json.encode(arguments).decode())


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """A seed of its own for each choice and try, or all would be alike."""
    if sampling.seed is None or not choice:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % 2**31)

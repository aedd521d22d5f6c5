"""Calls with an `Idempotency-Key`: each runs once, into a recording, and whoever asks for it reads from there."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from fallow.apps.gateway.caller import CallerGone, HttpCaller, Send
from fallow.core import repeat
from fallow.model.call import Grant
from fallow.model.errors import Failure, FallowError, leaf
from fallow.model.ids import CallId, KeyId, OrgId
from fallow.ports import Clock

PIECE_BYTES = 64 * 1024
"""The most that is given to a connection at once, so that what waits to be sent stays bounded."""
PIECE_S_MAX = 60.0
"""How long a caller may take to read a piece."""
REPEATED = (b"fallow-repeated", b"1")

Message = MutableMapping[str, Any]
Headers = tuple[tuple[bytes, bytes], ...]
Run = Callable[[bytes], Awaitable[int]]
Name = tuple[OrgId, KeyId, str]
"""Whose key it is, and the key: one caller's says nothing to another."""
Ending = Literal["whole", "lost", "gone"]
"""All was given; the rest isn't kept; the caller doesn't take it."""


class Recording:
    """One call's answer as it comes. The call writes it; its caller and those who repeat the request read it."""

    def __init__(self, digest: bytes, call_id: CallId) -> None:
        self.digest = digest
        self.call_id = call_id
        self.status = 0
        self.headers: Headers = ()
        self.data = bytearray()
        self.is_whole = False
        self.is_forgotten = False
        self.ended_at_ms: int | None = None
        self.readers = 0
        self.lost = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether more can come."""
        return not self.is_whole and not self.lost.is_set()

    def begin(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        self._tell()

    def add(self, data: bytes, *, is_last: bool) -> None:
        self.data += data
        self.is_whole = is_last
        self._tell()

    def lose(self) -> None:
        """It ends here, or what there was is dropped."""
        self.lost.set()
        self._tell()

    async def news(self) -> None:
        """Return when something has changed."""
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Reader:
    """Gives a recording to one connection: what is there, then what comes."""

    def __init__(self, recording: Recording, send: Send, *more: tuple[bytes, bytes]) -> None:
        self._recording = recording
        self._send = send
        self._more = more
        self.has_begun = False

    async def read(self) -> Ending:
        """Until all was given, nothing more can come, or the caller is gone."""
        try:
            return await self._read()
        except OSError:  # a closed connection, and a TimeoutError as well
            return "gone"

    async def _read(self) -> Ending:
        recording, at = self._recording, 0
        while not recording.status:
            if not recording.is_open:
                return "lost"
            await recording.news()
        self.has_begun = True
        await self._give({"type": "http.response.start", "status": recording.status, "headers": [*recording.headers, *self._more]})
        while True:
            piece = bytes(recording.data[at : at + PIECE_BYTES])
            at += len(piece)
            is_end = recording.is_whole and at == len(recording.data)
            if piece or is_end:
                await self._give({"type": "http.response.body", "body": piece, "more_body": not is_end})
            if is_end:
                return "whole"
            if at == len(recording.data) and not recording.is_whole:
                if not recording.is_open:
                    return "lost"
                await recording.news()

    async def _give(self, message: Message) -> None:
        async with asyncio.timeout(PIECE_S_MAX):
            await self._send(message)


class Repeats:
    """The calls with an `Idempotency-Key` that this gateway runs, and those that ended within the hour.

    A call with a key goes on when its caller leaves, and doesn't wait for a caller who reads slowly: a retry finds the
    answer. What is kept of it, and for how long, core/repeat says.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[Name, Recording] = {}
        self._ended: OrderedDict[Name, Recording] = OrderedDict()
        self._held: OrderedDict[Name, Recording] = OrderedDict()
        self.bytes = 0

    @property
    def count(self) -> int:
        """How many calls are remembered."""
        return len(self._known)

    async def answer(self, http: HttpCaller, grant: Grant, body: bytes, run: Run) -> int:
        """Answer a request whose body is there: by `run`, or as it was answered before; returns the HTTP status."""
        key = repeat.read_key([value for name, value in http.incoming.lines if name == b"idempotency-key"])
        if key is None:
            return await run(body)
        if isinstance(key, Failure):
            return await http.fail(key)
        name = (grant.org_id, grant.key_id, key)
        digest = repeat.digest_of(http.incoming.path, body)
        self.forget_old()
        recording = self._known.get(name)
        is_full = len(self._known) >= repeat.RECORDINGS_MAX and not self._ended
        match repeat.meaning(_known(recording), digest, is_full=is_full):
            case repeat.Fresh():
                self._make_room()
                recording = self._known[name] = Recording(digest, http.call_id)
                return await self._record(http, name, recording, partial(run, body))
            case repeat.Same():
                assert recording is not None, "there is nothing to repeat"
                return await self._repeat(http, recording)
            case repeat.OtherBody() | repeat.AnswerLost() | repeat.Full() as why:
                return await http.fail(repeat.refusal(why))

    def forget_old(self) -> None:
        """Drop what has been over for an hour."""
        now_ms = self._clock.now_ms()
        while self._ended:
            name, oldest = next(iter(self._ended.items()))
            assert oldest.ended_at_ms is not None, "it has ended"
            if not repeat.is_old(oldest.ended_at_ms, now_ms=now_ms):
                return
            self._forget(name)

    async def _record(self, http: HttpCaller, name: Name, recording: Recording, run: Callable[[], Awaitable[int]]) -> int:
        """Run the call into the recording, and let its caller read from there."""
        caller, http.lasts_until = http.send, recording.lost
        try:
            with self._reading(recording):
                async with asyncio.TaskGroup() as group:
                    first = group.create_task(Reader(recording, caller).read())
                    http.send = partial(self._write, recording, first, caller)
                    try:
                        return await run()
                    except FallowError as error:
                        return await http.fail(error.failure())
                    except Exception:
                        self._end(http, name, recording)
                        await asyncio.wait((first,))  # what there is goes out before the error
                        raise
                    finally:
                        self._end(http, name, recording)
        except ExceptionGroup as errors:
            raise leaf(errors) from None
        finally:
            http.send = caller

    async def _repeat(self, http: HttpCaller, recording: Recording) -> int:
        """Give the answer of an earlier call, for as long as the caller is there; raises CallerGone."""
        http.is_repeat = True
        reader = Reader(recording, http.send, REPEATED)
        with self._reading(recording):
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(reader.read())
                leaving = group.create_task(http.incoming.gone())
                await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
                ending: Ending = reading.result() if reading.done() else "gone"
                reading.cancel()
                leaving.cancel()
        if reader.has_begun:
            http.status = recording.status
        match ending:
            case "whole":
                return recording.status
            case "lost":
                return await http.fail(repeat.refusal(repeat.AnswerLost(call_id=recording.call_id)))
            case "gone":
                raise CallerGone

    async def _write(self, recording: Recording, first: "asyncio.Task[Ending]", caller: Send, message: Message) -> None:
        """One message of the call: into the recording, or, once that is lost, to its caller; raises CallerGone."""
        if recording.is_open and self._keep(recording, message):
            return
        await asyncio.wait((first,))
        if first.result() == "gone":
            raise CallerGone
        await caller(message)

    def _keep(self, recording: Recording, message: Message) -> bool:
        """Whether the message is recorded; else the recording is lost."""
        starts = message["type"] == "http.response.start"
        headers: Headers = tuple(message["headers"]) if starts else ()
        data: bytes = message.get("body", b"")
        if not self._has_room(recording, int(dict(headers).get(b"content-length", b"0")) if starts else len(data)):
            recording.lose()
            return False
        if starts:
            recording.begin(message["status"], headers)
        else:
            self.bytes += len(data)
            recording.add(data, is_last=not message.get("more_body", False))
        return True

    def _has_room(self, recording: Recording, more_bytes: int) -> bool:
        """Whether so much more can be kept, after dropping old bodies that nobody reads now."""
        if not repeat.fits(len(recording.data), more_bytes):
            return False
        while self.bytes + more_bytes > repeat.RECORDINGS_BYTES_MAX:
            name = next((name for name, one in self._held.items() if not one.readers), None)
            if name is None:
                return False
            oldest = self._held.pop(name)
            oldest.lose()
            self._release(oldest)
        return True

    def _make_room(self) -> None:
        """For one more call, by forgetting those that ended first."""
        while self._ended and len(self._known) >= repeat.RECORDINGS_MAX:
            self._forget(next(iter(self._ended)))

    def _end(self, http: HttpCaller, name: Name, recording: Recording) -> None:
        """The call is over: remember it, or make as if it had never been."""
        if recording.ended_at_ms is not None:
            return
        recording.ended_at_ms = self._clock.now_ms()
        if recording.is_open:
            recording.lose()
        self._ended[name] = recording
        if not repeat.is_kept(http.status, node_asked=http.node_asked):
            self._forget(name)
        elif recording.is_whole and recording.data:
            self._held[name] = recording

    def _forget(self, name: Name) -> None:
        recording = self._known.pop(name)
        recording.is_forgotten = True
        self._ended.pop(name, None)
        self._held.pop(name, None)
        self._release(recording)

    @contextmanager
    def _reading(self, recording: Recording) -> Iterator[None]:
        recording.readers += 1
        try:
            yield
        finally:
            recording.readers -= 1
            self._release(recording)

    def _release(self, recording: Recording) -> None:
        """Let go of the bytes that nobody will ask for any more."""
        if not recording.readers and (recording.is_forgotten or recording.lost.is_set()):
            self.bytes -= len(recording.data)
            recording.data = bytearray()


def _known(recording: Recording | None) -> repeat.Known | None:
    if recording is None:
        return None
    return repeat.Known(digest=recording.digest, call_id=recording.call_id, is_lost=recording.lost.is_set())

"""Stands at the end of the chain in place of a real engine and answers at next to no cost, so that what is measured is the chain.

Metadata sets how an answer comes: `chunks` numbered pieces, or `words` that are a function of the prompt, one each `interval_ms`
after `delay_ms`. A last message of the assistant is gone on with, as llama.cpp does.
"""

import argparse
import asyncio
import functools
import gc
import hashlib
import signal
from pathlib import Path
from typing import cast

import httptools
import msgspec
import uvloop

MODEL = "stub"
BODY_BYTES_MAX = 16 * 1024 * 1024
CHUNKS_MAX = 10_000
CHUNKS_DEFAULT = 8
WAIT_MS_MAX = 600_000
BACKLOG = 1024
CREATED_S = 1_700_000_000
PROMPT_TOKENS = 8
OWNER = "llamacpp"
"""Nodes know by this that the server goes on with the assistant's words."""
WORD_DIGEST_BYTES = 4

HEAD = b"HTTP/1.1 %s\r\ncontent-type: %s\r\n%s\r\n\r\n"
STREAM_HEAD = HEAD % (b"200 OK", b"text/event-stream; charset=utf-8", b"cache-control: no-cache\r\ntransfer-encoding: chunked")
STREAM_FOOT = b"0\r\n\r\n"


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The one stream option that changes what the stub sends."""

    include_usage: bool = False


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of the conversation."""

    role: str = ""
    content: object = None


class ChatCall(msgspec.Struct, frozen=True, kw_only=True):
    """What the stub reads of a chat call; every other field is checked to be JSON and skipped."""

    model: str
    messages: tuple[Message, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    metadata: dict[str, str] | None = None


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer is spread over time, as the caller's metadata asked; `is_told` is set if its words depend on the prompt."""

    chunks: int
    interval_ms: int
    delay_ms: int
    is_told: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer consists of: the pieces from `begun` to `end` of the prompt's words, or of the numbers if `prompt` is None."""

    prompt: str | None = None
    begun: int = 0
    end: int
    reason: str = "stop"

    def text(self) -> str:
        return "".join(map(self.piece, range(self.begun, self.end)))

    def piece(self, number: int) -> str:
        return f"c{number} " if self.prompt is None else word(self.prompt, number)


def word(prompt: str, number: int) -> str:
    """The piece of this number of what the stub answers to a prompt, with the space after it."""
    key = hashlib.blake2b(prompt.encode(), digest_size=16).digest()
    return hashlib.blake2b(number.to_bytes(4, "big"), key=key, digest_size=WORD_DIGEST_BYTES).hexdigest() + " "


def right_answer(prompt: str, words: int) -> str:
    """The whole answer of so many words."""
    return "".join(word(prompt, number) for number in range(words))


def plan_of(call: ChatCall, pace: Pace) -> Plan | None:
    """What is left to be said, or None if the assistant's last message isn't a beginning of our answer."""
    last = call.messages[-1] if call.messages else Message()
    if last.role != "assistant" and call.max_tokens is None and not pace.is_told:
        return Plan(end=pace.chunks)
    asked = next((str(message.content) for message in reversed(call.messages) if message.role == "user"), "")
    said = str(last.content) if last.role == "assistant" else ""
    begun = min(len(said.split()), pace.chunks)
    prompt = asked if pace.is_told else None
    if Plan(prompt=prompt, end=begun).text() != said:
        return None
    end = pace.chunks if call.max_tokens is None else min(pace.chunks, begun + call.max_tokens)
    return Plan(prompt=prompt, begun=begun, end=end, reason="stop" if end == pace.chunks else "length")


def pace_of(metadata: dict[str, str]) -> Pace | None:
    """Read the pace out of the metadata, or None if a number in it is missing or past its limit."""
    wanted = (
        metadata.get("words", metadata.get("chunks", str(CHUNKS_DEFAULT))),
        metadata.get("interval_ms", "0"),
        metadata.get("delay_ms", "0"),
    )
    if not all(text.isascii() and text.isdecimal() and len(text) < 10 for text in wanted):
        return None
    chunks, interval_ms, delay_ms = map(int, wanted)
    if not 0 < chunks <= CHUNKS_MAX or interval_ms > WAIT_MS_MAX or delay_ms > WAIT_MS_MAX:
        return None
    return Pace(chunks=chunks, interval_ms=interval_ms, delay_ms=delay_ms, is_told="words" in metadata)


def whole(status: bytes, value: object) -> bytes:
    """Lay head and JSON body out as the one piece that is written."""
    body = msgspec.json.encode(value)
    return HEAD % (status, b"application/json", b"content-length: %d" % len(body)) + body


def refusal(status: bytes, code: str, message: str) -> bytes:
    """Lay out an error as OpenAI's clients expect it."""
    return whole(status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})


def usage_of(chunks: int, begun: int = 0) -> dict[str, int]:
    """What is gone on with is read as a part of the prompt."""
    prompt = PROMPT_TOKENS + begun
    return {"prompt_tokens": prompt, "completion_tokens": chunks, "total_tokens": prompt + chunks}


def event(data: bytes) -> bytes:
    """Frame one server-sent event as one piece of a chunked body."""
    return b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data)


def chunk_event(choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    chunk: dict[str, object] = {
        "id": "chatcmpl-stub",
        "object": "chat.completion.chunk",
        "created": CREATED_S,
        "model": MODEL,
        "choices": choices,
    }
    return event(msgspec.json.encode(chunk if usage is None else chunk | {"usage": usage}))


@functools.lru_cache(maxsize=CHUNKS_MAX)
def content_event(number: int) -> bytes:
    """Frame the content delta that says its own number, so that a lost or doubled one shows at the far end."""
    delta = {"content": f"c{number} "}
    if number == 0:
        delta = {"role": "assistant"} | delta
    return chunk_event([{"index": 0, "delta": delta, "finish_reason": None}])


def told_event(plan: Plan, number: int) -> bytes:
    """Frame the next word of a prompt's answer; the role comes before the first one, as llama.cpp has it."""
    piece = chunk_event([{"index": 0, "delta": {"content": plan.piece(number)}, "finish_reason": None}])
    return OPENING + piece if number == plan.begun else piece


def piece_event(plan: Plan, number: int) -> bytes:
    return content_event(number) if plan.prompt is None else told_event(plan, number)


OPENING = chunk_event([{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}])


@functools.lru_cache(maxsize=64)
def closing_events(chunks: int, include_usage: bool, begun: int = 0, reason: str = "stop") -> bytes:
    """Frame all that follows the last content delta."""
    stop = chunk_event([{"index": 0, "delta": {}, "finish_reason": reason}])
    usage = chunk_event([], usage_of(chunks, begun)) if include_usage else b""
    return stop + usage + event(b"[DONE]") + STREAM_FOOT


def ending(plan: Plan, include_usage: bool) -> bytes:
    return closing_events(plan.end - plan.begun, include_usage, plan.begun, plan.reason)


@functools.lru_cache(maxsize=64)
def burst(chunks: int, include_usage: bool) -> bytes:
    """Lay out a whole stream that has no waits in it."""
    return STREAM_HEAD + b"".join(map(content_event, range(chunks))) + closing_events(chunks, include_usage)


def completion(text: str, usage: dict[str, int], reason: str = "stop") -> bytes:
    """Lay out an answer in one piece."""
    return whole(
        b"200 OK",
        {
            "id": "chatcmpl-stub",
            "object": "chat.completion",
            "created": CREATED_S,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
            "usage": usage,
        },
    )


COMPLETION = completion("The stub answers.", usage_of(4))
GET_ANSWERS = {
    b"/v1/models": whole(
        b"200 OK",
        {"object": "list", "data": [{"id": MODEL, "object": "model", "created": CREATED_S, "owned_by": OWNER}]},
    ),
    b"/health": whole(b"200 OK", {"status": "ok"}),
}
NOT_OURS = refusal(b"400 Bad Request", "not_our_words", "the assistant's last message is no beginning of the stub's answer")
NO_SUCH_PATH = refusal(b"404 Not Found", "not_found", "no such path")
BAD_BODY = refusal(b"400 Bad Request", "bad_body", "the body is no chat call")
BAD_PACE = refusal(b"400 Bad Request", "bad_metadata", "chunks, interval_ms or delay_ms is no number within its limit")
BAD_HTTP = refusal(b"400 Bad Request", "bad_http", "this is no HTTP/1 request")
TOO_LARGE = refusal(b"413 Content Too Large", "body_too_large", "the body is too large")
UNPACED = Pace(chunks=CHUNKS_DEFAULT, interval_ms=0, delay_ms=0)

decode_call = msgspec.json.Decoder(ChatCall).decode


class StubConnection(asyncio.Protocol):
    """One kept-alive connection, answering one call after the other."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: "set[StubConnection]") -> None:
        self.loop = loop
        self.connections = connections
        self.parser = httptools.HttpRequestParser(self)
        self.path = b""
        self.body = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a fault of the stub itself
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.transport.is_closing():
                self.refuse(BAD_HTTP)

    def on_url(self, url: bytes) -> None:
        self.path = url
        self.body = b""

    def on_body(self, body: bytes) -> None:
        if len(self.body) + len(body) > BODY_BYTES_MAX:
            self.refuse(TOO_LARGE)
        else:
            self.body = self.body + body if self.body else body

    def on_message_complete(self) -> None:
        if self.transport.is_closing():
            return
        if self.timer is not None:
            self.transport.abort()  # a second call before the first is answered: no client of the chain pipelines
            return
        method = self.parser.get_method()
        if method == b"POST" and self.path == b"/v1/chat/completions":
            self.answer_chat()
        else:
            self.send(GET_ANSWERS.get(self.path, NO_SUCH_PATH) if method == b"GET" else NO_SUCH_PATH)

    def answer_chat(self) -> None:
        try:
            call = decode_call(self.body)
        except msgspec.DecodeError:
            self.send(BAD_BODY)
            return
        pace = pace_of(call.metadata) if call.metadata else UNPACED
        plan = plan_of(call, pace) if pace is not None else None
        if pace is None:
            self.send(BAD_PACE)
        elif plan is None:
            self.send(NOT_OURS)
        else:
            told_ms = pace.interval_ms * (plan.end - plan.begun) if pace.is_told and not call.stream else 0
            if pace.delay_ms + told_ms == 0:
                self.begin(call, pace, plan)
            else:
                self.timer = self.loop.call_later((pace.delay_ms + told_ms) / 1000, self.begin, call, pace, plan)

    def begin(self, call: ChatCall, pace: Pace, plan: Plan) -> None:
        """Send all of the answer that is due at once."""
        self.timer = None
        include_usage = call.stream_options is not None and call.stream_options.include_usage
        if not call.stream:
            is_plain = plan.prompt is None and not plan.begun
            self.send(COMPLETION if is_plain else completion(plan.text(), usage_of(plan.end - plan.begun, plan.begun), plan.reason))
        elif plan.begun == plan.end:
            self.send(STREAM_HEAD + ending(plan, include_usage))
        elif pace.interval_ms == 0 and plan.prompt is None and not plan.begun and plan.reason == "stop":
            self.send(burst(plan.end, include_usage))
        else:
            self.transport.write(STREAM_HEAD)
            self.send_from(plan.begun, pace, plan, include_usage, self.loop.time())

    def send_from(self, number: int, pace: Pace, plan: Plan, include_usage: bool, started_s: float) -> None:
        """Send one content delta and set the timer for the next; each is timed from the start, so that lateness does not add up."""
        piece = piece_event(plan, number)
        if number + 1 == plan.end:
            self.timer = None
            self.send(piece + ending(plan, include_usage))
            return
        self.transport.write(piece)
        due_s = started_s + (number + 1 - plan.begun) * pace.interval_ms / 1000
        self.timer = self.loop.call_at(due_s, self.send_from, number + 1, pace, plan, include_usage, started_s)

    def send(self, last_piece: bytes) -> None:
        """Send what ends the answer, and close if the caller keeps no connection."""
        self.transport.write(last_piece)
        if not self.parser.should_keep_alive():
            self.transport.close()

    def refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()


async def serve(socket_path: Path | None, port: int) -> None:
    """Listen, say where, and answer until a signal asks to stop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    connections: set[StubConnection] = set()
    make = functools.partial(StubConnection, loop, connections)
    if socket_path is not None:
        socket_path.unlink(missing_ok=True)
        server = await loop.create_unix_server(make, str(socket_path), backlog=BACKLOG)
        address = str(socket_path.absolute())
    else:
        server = await loop.create_server(make, "127.0.0.1", port, backlog=BACKLOG)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    gc.collect()
    gc.freeze()
    print(f"ready {address}", flush=True)
    await stop.wait()
    server.close()
    for connection in tuple(connections):
        connection.transport.abort()
    if socket_path is not None:
        socket_path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stub_engine", description="an OpenAI-compatible engine that computes nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path, metavar="PATH", help="listen on this Unix socket")
    where.add_argument("--port", type=int, default=0, help="listen on this port of 127.0.0.1 (default: any free one)")
    chosen = parser.parse_args()
    uvloop.run(serve(chosen.socket, chosen.port))


if __name__ == "__main__":
    main()

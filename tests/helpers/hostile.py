"""A broker that does what it likes: it stands before a real one, reads each message that passes, and hands on what a test tells it to."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

END = b"\r\n"
READ_BYTES = 65_536
WITHIN_S = 20.0
T = TypeVar("T")


class Message(NamedTuple):
    """One that passes. `who` names the client by its connection; `to_broker`: from it, not to it. `number` is its subscription there."""

    who: str
    to_broker: bool
    subject: str
    data: bytes
    reply: str = ""
    number: str = ""
    head: bytes = b""

    def line(self) -> bytes:
        """As it is said on the wire."""
        verb = ("H" if self.head else "") + ("PUB" if self.to_broker else "MSG")
        sizes = [str(len(self.head))] * bool(self.head) + [str(len(self.head) + len(self.data))]
        words = [verb, self.subject, self.number, self.reply, *sizes]
        return " ".join(word for word in words if word).encode() + END + self.head + self.data + END


Meddle = Callable[[Message], Sequence[Message]]
"""What is handed on in place of a message, in its order."""


def honest(message: Message) -> Sequence[Message]:
    """As a broker should."""
    return (message,)


class _Side:
    """One direction of a connection: cut into lines and messages, which are handed on."""

    def __init__(self, relay: "Relay", writer: asyncio.StreamWriter, *, to_broker: bool) -> None:
        self.relay, self.writer, self.to_broker = relay, writer, to_broker
        self.who = ""
        self.twin: _Side

    async def run(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                line = await reader.readuntil(END)
                words = line.decode().split()
                verb = words[0].upper() if words else ""
                if verb in ("PUB", "HPUB", "MSG", "HMSG"):
                    body = await reader.readexactly(int(words[-1]) + len(END))
                    self.writer.write(b"".join(one.line() for one in self._taken(words, body[: -len(END)])))
                else:
                    if verb == "CONNECT":
                        self.who = self.twin.who = msgspec.json.decode(line[len("CONNECT ") :]).get("name", "")
                        self.relay.sides[self.who] = (self, self.twin)
                    elif verb == "SUB":
                        self.relay.listens[self.who, words[1]] = words[-1]
                    if self.relay.captured is not None:
                        self.relay.captured += line
                    self.writer.write(line)
                await self.writer.drain()
        self.writer.close()

    def _taken(self, words: list[str], body: bytes) -> Sequence[Message]:
        sizes = 2 if words[0].startswith("H") else 1
        named = 1 if self.to_broker else 2
        head = int(words[-2]) if sizes == 2 else 0
        message = Message(
            who=self.who,
            to_broker=self.to_broker,
            subject=words[1],
            number="" if self.to_broker else words[2],
            reply=words[1 + named] if len(words) == 1 + named + 1 + sizes else "",
            head=body[:head],
            data=body[head:],
        )
        if self.relay.captured is not None:
            self.relay.captured += message.line()
        return self.relay.meddle(message)


class Relay:
    """Listens in front of a broker. `meddle` is replaced by tests; it runs in the relay's own thread, a message at a time."""

    def __init__(self, port: int) -> None:
        self._broker_port = port
        self.port = 0
        self.meddle: Meddle = honest
        self.sides: dict[str, tuple[_Side, _Side]] = {}
        self.captured: bytearray | None = None
        """All that passes, if it is kept."""
        self.listens: dict[tuple[str, str], str] = {}
        """The number under which a client listens to a subject."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self.do(asyncio.start_server(self._on_client, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """In the relay's thread, to its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WITHIN_S)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        except OSError:
            writer.close()
            return
        up, down = _Side(self, their_writer, to_broker=True), _Side(self, writer, to_broker=False)
        up.twin, down.twin = down, up
        try:
            await asyncio.gather(up.run(reader), down.run(their_reader))
        except asyncio.CancelledError:
            writer.close()
            their_writer.close()

    def say(self, message: Message) -> None:
        """Say something that nobody sent: to the broker in a client's name, or to a client as if the broker had."""

        async def work() -> None:
            up, down = self.sides[message.who]
            (up if message.to_broker else down).writer.write(message.line())

        self.do(work())

    def close(self) -> None:
        async def work() -> None:
            self._server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.do(work())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN_S)
        self._loop.close()

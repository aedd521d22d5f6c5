"""What a NATS server sends, taken apart: strictly, since other people choose the subjects in it.

nats-py's own parser splits at every kind of white space, the server only at spaces and tabs. A subject with a vertical tab in it would
read as another subscription's message, or as nonsense that ends the connection; bytes that are no text would stop the reading for good.
Here a message whose subject or reply isn't printable ASCII is dropped, and nothing else happens. The protocol:
https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

import json
import logging
from typing import Any, Protocol

from nats.errors import ProtocolError

LINE_BYTES_MAX = 64 * 1024
"""The longest line is the server's greeting, which names all servers of a cluster."""
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
"""Far above what our broker carries; another one may be set up otherwise."""
DIGITS_MAX = 18
_END = b"\r\n"

log = logging.getLogger("fallow.bus")


class Client(Protocol):
    """What of nats-py's client is called."""

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None: ...

    async def _process_ping(self) -> None: ...

    async def _process_pong(self) -> None: ...

    async def _process_err(self, err_msg: str) -> None: ...

    async def _process_info(self, info: dict[str, Any]) -> None: ...


class Reader:
    """Fed with bytes as they come. `dropped` counts messages that no client of ours can have sent."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._buffer = bytearray()
        self.dropped = 0

    def reset(self) -> None:
        self._buffer = bytearray()

    async def parse(self, data: bytes = b"") -> None:
        """Hand on all that is complete; raises ProtocolError for what isn't the protocol."""
        buffer = self._buffer
        buffer += data
        at = 0
        while (line_end := buffer.find(_END, at)) >= 0:
            words = bytes(buffer[at:line_end]).split(b" ")
            if words[0] in (b"MSG", b"HMSG"):
                taken = await self._message(words, line_end + len(_END))
                if not taken:
                    break
                at = taken
                continue
            await self._said(words[0].upper(), bytes(buffer[at:line_end]))
            at = line_end + len(_END)
        else:
            if len(buffer) - at > LINE_BYTES_MAX:
                raise ProtocolError
        del buffer[:at]

    async def _message(self, words: list[bytes], begins: int) -> int:
        """Hand on a message whose content begins there. Where it ends, or 0 if it isn't all there yet."""
        sizes = 2 if words[0] == b"HMSG" else 1
        numbers = [words[2] if len(words) > 2 else b"", *words[-sizes:]]
        if len(words) not in (3 + sizes, 4 + sizes) or not all(word.isdigit() and len(word) <= DIGITS_MAX for word in numbers):
            raise ProtocolError
        sid, head_bytes, size = int(numbers[0]), int(numbers[1]) if sizes == 2 else 0, int(numbers[-1])
        if not head_bytes <= size <= MESSAGE_BYTES_MAX:
            raise ProtocolError
        ends = begins + size
        if len(self._buffer) < ends + len(_END):
            return 0
        subject, reply = words[1], words[3] if len(words) == 4 + sizes else b""
        if _is_plain(subject) and (not reply or _is_plain(reply)):
            head, data = self._buffer[begins : begins + head_bytes], self._buffer[begins + head_bytes : ends]
            await self._client._process_msg(sid, subject, reply, bytes(data), bytes(head))
        else:
            self.dropped += 1
            log.warning("a message was dropped: its subject isn't printable ASCII")
        return ends + len(_END)

    async def _said(self, verb: bytes, line: bytes) -> None:
        match verb.rstrip():
            case b"PING":
                await self._client._process_ping()
            case b"PONG":
                await self._client._process_pong()
            case b"+OK":
                pass
            case b"-ERR":
                await self._client._process_err(line[5:].decode(errors="replace").strip().lower())
            case b"INFO":
                await self._client._process_info(_greeting(line[5:]))
            case _:
                raise ProtocolError


def _is_plain(subject: bytes) -> bool:
    return bool(subject) and subject.isascii() and subject.decode().isprintable()


def _greeting(text: bytes) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError from None
    if not isinstance(told, dict):
        raise ProtocolError
    return told

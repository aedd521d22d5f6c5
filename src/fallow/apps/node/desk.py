"""The owner's desk: a socket on which `fallow pause`, `resume` and `lend status` reach the node that runs here."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from fallow.adapters.files import write_private
from fallow.adapters.owner_record import FOREVER_MS, OwnerRecord
from fallow.model.errors import FallowError
from fallow.model.owner import DeskAddress, DeskAnswer, DeskRequest, OwnerStatus
from fallow.ports import Clock

ADDRESS_FILE = "node.json"
SOCKET = "desk.sock"
LINE_BYTES_MAX = 4_096
ASK_S_MAX = 2.0
VISITORS_MAX = 8

log = logging.getLogger("fallow.owner")


class Desk:
    """One question a visit: a line of JSON, answered with one."""

    def __init__(self, record: OwnerRecord, clock: Clock, status: Callable[[], OwnerStatus], look_now: Callable[[], None]) -> None:
        self._record = record
        self._clock = clock
        self._status = status
        self._look_now = look_now
        self._visitors = 0

    async def serve(self, folder: Path, data: Path, pid: int) -> None:
        """Until cancelled."""
        path = folder / SOCKET
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._visit, str(path), limit=LINE_BYTES_MAX)
        path.chmod(0o600)
        address = data / ADDRESS_FILE
        self._record.read_pause()  # a command that found no desk a moment ago has left its word there
        write_private(address, msgspec.json.encode(DeskAddress(socket=str(path), pid=pid)).decode())
        try:
            async with server:
                await server.serve_forever()
        finally:
            address.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._visitors += 1
        try:
            async with asyncio.timeout(ASK_S_MAX):
                if self._visitors <= VISITORS_MAX:
                    answer = await self._answer(await reader.readuntil(b"\n"))
                    writer.write(msgspec.json.encode(answer) + b"\n")
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            log.info("a visitor of the owner's desk asked nothing that can be read")
        finally:
            self._visitors -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> DeskAnswer:
        try:
            asked = msgspec.json.decode(line, type=DeskRequest)
        except msgspec.DecodeError as error:
            return DeskAnswer(error=f"the node doesn't understand this command: {error}; are both of one version?")
        if asked.ask == "status":
            return DeskAnswer(status=self._status())
        wall = self._clock.wall_ms()
        for_s = asked.for_s
        self._record.paused_until_wall_ms = None if asked.ask == "resume" else FOREVER_MS if for_s is None else wall + round(for_s * 1000)
        self._look_now()  # first the engines, then the disk
        answer = DeskAnswer(status=self._status())
        try:
            await asyncio.to_thread(self._record.keep_pause)
        except (FallowError, OSError) as error:
            log.warning("the owner's word is in force, but can't be kept over a restart: %s", error)
        return answer

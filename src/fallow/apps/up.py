"""`fallow up`: hub, gateway and node on this machine, as the same processes that run apart elsewhere."""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from fallow.adapters import children
from fallow.adapters.files import make_folder, only_one
from fallow.adapters.http_engine import HttpEngine
from fallow.apps.run import GATEWAY_DRAIN_S, Ready, Stop, tell_draining
from fallow.apps.settings import KEY_FILE, LISTEN_DEFAULT, Settings, inherited
from fallow.model.errors import EngineFailed, StartFailed

PART_S_MAX = 300.0
DRAIN_TOLD_S = 0.5
"""A gateway that takes longer to stop has calls under way, and the user is told."""
DRAIN_S_MAX = GATEWAY_DRAIN_S + 5.0
LINE_BYTES_MAX = 4096
READY_S_MAX = 10.0
READY_POLL_S = 0.05
BROKER_ANYWHERE = "127.0.0.1:0"


class Part:
    """One of the processes."""

    def __init__(self, role: str, process: Process, log: Path, ready: "asyncio.Future[Ready]") -> None:
        self.role = role
        self.process = process
        self.log = log
        self.ready = ready

    async def address(self) -> str:
        """Where it is reached, once it works; raises StartFailed with what it said instead."""
        ended = asyncio.ensure_future(self.process.wait())
        either: list[asyncio.Future[Any]] = [ended, self.ready]
        try:
            async with asyncio.timeout(PART_S_MAX):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StartFailed(f"the {self.role} did not start within {PART_S_MAX:g} s; see {self.log}") from None
        finally:
            ended.cancel()
        if self.ready.done():
            return self.ready.result().address
        raise StartFailed(self.last_words())

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("fallow: ")), lines[-1] if lines else "it said nothing")
        return f"the {self.role} ended: {said.removeprefix('fallow: ')}"


async def start_part(settings: Settings, role: str, arguments: list[str]) -> Part:
    """Start `fallow ROLE` on the same data folder."""
    log = make_folder(settings.data / "logs") / f"{role}.log"
    reader, writer = os.pipe()
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[Ready] = loop.create_future()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def on_readable() -> None:
        line = os.read(reader, LINE_BYTES_MAX)
        loop.remove_reader(reader)
        os.close(reader)
        if line and not ready.done():
            ready.set_result(msgspec.json.decode(line, type=Ready))

    try:
        command = [sys.executable, "-m", "fallow", role, "--data", str(settings.data), "--ready-fd", str(writer), *arguments]
        process = await children.spawn(command, environment=inherited(), stdout=descriptor, stderr=descriptor, pass_fds=[writer])
    finally:
        os.close(writer)
        os.close(descriptor)
    loop.add_reader(reader, on_readable)
    return Part(role, process, log, ready)


async def run_up(settings: Settings, lend_flags: Sequence[str], stop: Stop, tell: Callable[[str, str, str], None]) -> None:
    """Run all parts until told to stop or one of them ends; `tell(base_url, key, node)` when calls can be made.

    The gateway stops first: calls under way need the others.
    """
    with only_one(settings.data, "up"):
        parts: list[Part] = []
        try:
            starting = asyncio.create_task(_start(settings, lend_flags, parts), name="start")
            await _first(starting, asyncio.create_task(stop.asked.wait()))
            if stop.asked.is_set():
                starting.cancel()
                return
            base_url, node_id = await starting
            tell(base_url, (settings.data / KEY_FILE).read_text().strip(), node_id)
            ends = [asyncio.create_task(part.process.wait()) for part in parts]
            await _first(asyncio.create_task(stop.asked.wait()), *ends)
            if not stop.asked.is_set():
                ended = next(part for part, end in zip(parts, ends, strict=True) if end.done())
                raise StartFailed(ended.last_words())
            await _drain(next(part for part in parts if part.role == "gateway"), stop.now)
        finally:
            await asyncio.shield(_end(parts))


async def _first(*tasks: "asyncio.Task[Any]") -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _start(settings: Settings, lend_flags: Sequence[str], parts: list[Part]) -> tuple[str, str]:
    listen = BROKER_ANYWHERE if settings.hub.listen == LISTEN_DEFAULT else settings.hub.listen
    broker = ["--broker", settings.hub.broker] if settings.hub.broker else ["--listen", listen]
    parts.append(hub := await start_part(settings, "hub", broker))
    address = await hub.address()
    gateway_flags = ["--hub", address, "--host", settings.gateway.host, "--port", str(settings.gateway.port)]
    parts.append(gateway := await start_part(settings, "gateway", gateway_flags))
    parts.append(node := await start_part(settings, "lend", ["--hub", address, "--with-up", *lend_flags]))
    base_url, node_id = await asyncio.gather(gateway.address(), node.address())
    await until_ready(base_url)
    return base_url, node_id


async def until_ready(base_url: str) -> None:
    """Wait until the gateway knows a node that offers something; raises StartFailed."""
    parts = urlsplit(base_url)
    gateway = HttpEngine(f"{parts.hostname}:{parts.port}")
    reason = b""
    try:
        async with asyncio.timeout(READY_S_MAX):
            while True:
                status, reason = await gateway.get("/readyz", READY_S_MAX, LINE_BYTES_MAX)
                if status == 200:
                    return
                await asyncio.sleep(READY_POLL_S)
    except (TimeoutError, EngineFailed):
        raise StartFailed(f"the gateway is not ready after {READY_S_MAX:g} s: {reason.decode(errors='replace')}") from None
    finally:
        gateway.close()


async def _drain(gateway: Part, now: asyncio.Event) -> None:
    """Let the gateway end what is under way, unless told to stop at once."""
    with contextlib.suppress(ProcessLookupError):
        gateway.process.terminate()
    either: list[asyncio.Task[Any]] = [asyncio.create_task(gateway.process.wait()), asyncio.create_task(now.wait())]
    try:
        done, _ = await asyncio.wait(either, timeout=DRAIN_TOLD_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            tell_draining(GATEWAY_DRAIN_S)
            await asyncio.wait(either, timeout=DRAIN_S_MAX, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in either:
            one.cancel()


async def _end(parts: list[Part]) -> None:
    """All at once: callers first would cost the time of each."""
    await asyncio.gather(*(children.end(part.process) for part in parts))

"""A private D-Bus daemon, and a desktop on it that answers what a test's table says."""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from dbus_fast import ErrorType, Message, MessageFlag, MessageType, Variant
from dbus_fast.aio import MessageBus

DAEMON = Path("/usr/bin/dbus-daemon")
PROPERTIES = "org.freedesktop.DBus.Properties"
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={socket}</listen><servicedir>{services}</servicedir>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
"""

REFUSE = "refuse"
SILENT = "silent"
"""Instead of an answer: an error, and nothing at all."""
Answers = dict[tuple[str, str, str], tuple[str, list[Any]] | str]
"""By path, interface, and member: the signature and body of the answer. A property is the member of its own interface."""


class Daemon:
    """A dbus-daemon of our own, whose socket and services lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.services = folder / "services"
        self.services.mkdir(exist_ok=True)
        self._socket = folder / "bus"
        self._config = folder / "bus.conf"
        self._config.write_text(CONFIG.format(socket=self._socket, services=self.services))
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"unix:path={self._socket}"

    def start(self) -> None:
        command = [str(DAEMON), f"--config-file={self._config}", "--nofork", "--nopidfile", "--print-address=1"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("unix:"), "dbus-daemon didn't start"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket)


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[Daemon]:
    started = Daemon(folder)
    started.start()
    try:
        yield started
    finally:
        started.stop()


class FakeDesktop:
    """Owns names on a bus and answers from a table; `asked` is what it was asked, with the values given; `askers` who asked."""

    def __init__(self, bus: MessageBus, answers: Answers) -> None:
        self.bus = bus
        self.answers = answers
        self.asked: list[tuple[str, list[Any]]] = []
        self.askers: set[str | None] = set()

    def answer(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL:
            return None
        assert message.flags & MessageFlag.NO_AUTOSTART
        member, interface = message.member or "", message.interface or ""
        self.asked.append((member, message.body))
        self.askers.add(message.sender)
        if interface == PROPERTIES:
            interface, member = message.body
        told = self.answers.get((message.path or "", interface, member), REFUSE)
        if isinstance(told, str):
            return True if told == SILENT else Message.new_error(message, ErrorType.NOT_SUPPORTED, "not here")
        signature, body = told
        if message.interface == PROPERTIES:
            return Message.new_method_return(message, "v", [Variant(signature, body[0])])
        return Message.new_method_return(message, signature, body)


@contextlib.asynccontextmanager
async def desktop(address: str, names: Sequence[str], answers: Answers) -> AsyncIterator[FakeDesktop]:
    bus = await MessageBus(bus_address=address).connect()
    fake = FakeDesktop(bus, answers)
    bus.add_message_handler(fake.answer)
    for name in names:
        await bus.request_name(name)
    try:
        yield fake
    finally:
        if bus.connected:
            bus.disconnect()
        with contextlib.suppress(OSError, EOFError):
            await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]

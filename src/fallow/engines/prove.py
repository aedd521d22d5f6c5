"""An engine that only proves its jail: it tries what an engine must not do, and ends well if all of it was refused."""

import os
import socket
import sys
import threading
from collections.abc import Callable

EXIT_OPEN = 1


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


FORBIDDEN: dict[str, Callable[[], object]] = {
    "read the system's users": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "open a network socket": lambda: socket.socket(socket.AF_INET),
    "start a process": _fork,
}


def main() -> None:
    """Says what could be done, if anything."""
    thread = threading.Thread(target=lambda: None)
    thread.start()  # engines need them
    thread.join()
    done = []
    for name, attempt in FORBIDDEN.items():
        try:
            attempt()
        except OSError:
            continue
        done.append(name)
    print(", ".join(done), file=sys.stderr)
    sys.exit(EXIT_OPEN if done else 0)

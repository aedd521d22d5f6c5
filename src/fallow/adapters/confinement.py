"""What an engine's process is told about its jail before it loads anything: one line of JSON, ahead of the engine's settings."""

import msgspec

from fallow.model.needs import Isolation


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """What the process may still do, once it has confined itself.

    It may read what lies under `folders`, and the `files`; it may make sockets in `socket_folder`. `memory_bytes` is how much memory of its
    own it may have, 0 for any amount; `tasks_max` is how many threads its user may have when it starts another, 0 where the kernel doesn't
    count them. `landlock_abi` is the kernel's version of Landlock, 0 if it has none. `seccomp` is a compiled filter, and `signal_calls` are
    the numbers of the calls that it may make towards itself only.
    """

    level: Isolation
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    socket_folder: str = ""
    memory_bytes: int = 0
    tasks_max: int = 0
    landlock_abi: int = 0
    seccomp: bytes = b""
    signal_calls: tuple[int, ...] = ()

"""Tries to get out of the jail it is in: an engine whose requests are attempts.

It is started as engines are, and listens where they do. A request is a line of JSON, a name and arguments; the answer is another:
`{"done": …}` if the attempt worked, `{"refused": …}` if the system said no.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import psutil

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = (ctypes.c_size_t,)
LIBC.free.argtypes = (ctypes.c_void_p,)
MAP_GROWSDOWN = 0x100
PTRACE_SEIZE = 0x4206
NUMBERS = {
    "x86_64": {
        "bpf": 321, "io_uring_setup": 425, "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250, "memfd_create": 319, "unshare": 272,
        "mount": 165, "process_vm_readv": 310, "pidfd_open": 434, "setns": 308, "shmget": 29, "kcmp": 312, "clone3": 435, "clone": 56,
    },
    "aarch64": {
        "bpf": 280, "io_uring_setup": 425, "userfaultfd": 282, "perf_event_open": 241, "keyctl": 219, "memfd_create": 279, "unshare": 97,
        "mount": 40, "process_vm_readv": 270, "pidfd_open": 434, "setns": 268, "shmget": 194, "kcmp": 272, "clone3": 435, "clone": 220,
    },
}  # fmt: skip


def checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(name: str, *arguments: int | str) -> int:
    """A system call by its name."""
    words = [ctypes.c_char_p(one.encode()) if isinstance(one, str) else ctypes.c_long(one) for one in arguments]
    return checked(LIBC.syscall(ctypes.c_long(NUMBERS[platform.machine()][name]), *words))


def read(path: str) -> int:
    """How much can be read of it."""
    with open(path, "rb") as file:
        return len(file.read(4096))


def create(path: str, size: int = 1) -> None:
    """Make a file, and remove it."""
    with open(path, "xb") as file:
        try:
            file.truncate(size)
        finally:
            os.unlink(path)


def open_to_write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def connect(family: str, where: Any, kind: str = "SOCK_STREAM") -> None:
    with socket.socket(getattr(socket, family), getattr(socket, kind)) as one:
        one.connect(tuple(where) if isinstance(where, list) else where.replace("@", "\0", 1))


def make_socket(family: str, kind: str = "SOCK_STREAM", protocol: int = 0) -> None:
    socket.socket(getattr(socket, family), getattr(socket, kind), protocol).close()


def listen(path: str) -> None:
    """A socket in our own folder, or elsewhere."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)
    os.unlink(path)


def fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def spawn(path: str) -> int:
    """Another program, as a process."""
    child = os.posix_spawn(path, [path, "-c", "exit 0"], {})
    return os.waitpid(child, 0)[1]


def become(path: str) -> None:
    """Another program, in our place."""
    os.execv(path, [path, "-c", "exit 0"])


def threads(count: int) -> int:
    """Start so many; refused if that doesn't work, and none is left."""
    go = threading.Event()
    started = []
    try:
        for _ in range(count):
            one = threading.Thread(target=go.wait)
            one.start()
            started.append(one)
    except RuntimeError as error:
        raise OSError(0, f"after {len(started)}") from error
    finally:
        go.set()
        for one in started:
            one.join()
    return len(started)


def take_memory(size: int, flags: int) -> None:
    """A mapping, not touched, and given back."""
    at = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    LIBC.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))


def heap(size: int) -> None:
    """The same through the C library."""
    at = LIBC.malloc(size)
    if not at:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    LIBC.free(at)


def own_signals(pid: int) -> None:
    """Have the kernel signal another process when something can be read."""
    left, right = socket.socketpair()
    with left, right:
        fcntl.fcntl(left, fcntl.F_SETOWN, pid)


def datagram(path: str) -> None:
    """Without connecting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", path)


def send_to(path: str) -> None:
    """The same through a socket that came from a pair."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        left.sendmsg([b"x"], [], 0, path)


def seize(pid: int) -> None:
    checked(LIBC.ptrace(ctypes.c_long(PTRACE_SEIZE), ctypes.c_long(pid), ctypes.c_long(0), ctypes.c_long(0)))


def look_into(pid: int) -> None:
    """Another process's memory, by its file."""
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))


def spin() -> None:
    """Busy for ever, in two threads."""
    for _ in range(2):
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()


def raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except ValueError as error:  # what Python makes of EPERM
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error


ATTEMPTS: dict[str, Callable[..., object]] = {
    "abort": os.abort,
    "affinity": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "become": become,
    "call": call,
    "chmod": os.chmod,
    "connect": connect,
    "create": create,
    "datagram": datagram,
    "fork": fork,
    "heap": heap,
    "ioprio": lambda: psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 0),
    "kill": os.kill,
    "link": os.link,
    "list": os.listdir,
    "listen": listen,
    "look_into": look_into,
    "memory": take_memory,
    "nice": lambda value: os.setpriority(os.PRIO_PROCESS, 0, value),
    "open_to_write": open_to_write,
    "own_signals": own_signals,
    "pid": os.getpid,
    "prctl": lambda option, value: checked(LIBC.prctl(option, value, 0, 0, 0)),
    "raise_limit": raise_limit,
    "read": read,
    "rename": os.rename,
    "scheduler": lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
    "seize": seize,
    "send_to": send_to,
    "socket": make_socket,
    "spawn": spawn,
    "spin": spin,
    "symlink": os.symlink,
    "threads": threads,
    "unlink": os.unlink,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        done = ATTEMPTS[request["attempt"]](*request["arguments"])
    except OSError as error:
        return {"refused": error.strerror or str(error)}
    except psutil.AccessDenied as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001  (it must live on for the next attempt)
        return {"failed": repr(error)}
    return {"done": repr(done)}


def main() -> None:
    """Settings as one line of JSON on standard input."""
    settings = json.loads(sys.stdin.readline())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(settings["socket"])
    listener.listen()
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as lines:
            for line in lines:
                lines.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
                lines.flush()

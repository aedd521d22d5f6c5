"""The first thing that an engine's process does: it gives way to the owner, gives up what it doesn't need, and becomes an engine.

Started as `python -m fallow.engines.confine MODULE`. Standard input has a Confinement as one line of JSON, then what the module's `main()`
reads. It is the same inside bubblewrap and without it. Nothing that starts threads may be imported here: rules hold for the thread that
makes them, and for those that it starts.
"""

import ctypes
import errno
import importlib
import os
import resource
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

from fallow.adapters.confinement import Confinement
from fallow.adapters.private_memory import keep_private

try:
    import landlock
    from landlock import plumbing
except ImportError:  # not Linux
    landlock = plumbing = None

EXIT_BAD_SETTINGS = 2
EXIT_NOT_CONFINED = 4
NICE = 19
OOM_SCORE = 1_000
SPARE_BYTES = 768 * 1024 * 1024
"""Beyond the engine's memory: thread stacks, which count in full though they are hardly used, Python, libraries."""
FILES_MAX = 512
AUTOGROUP_TRIES = 20
AUTOGROUP_PAUSE_S = 0.05
NEEDED = (
    "/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/sys/vm/overcommit_memory", "/sys/devices/system/cpu", "/sys/devices/system/node",
    "/dev/urandom", "/dev/null",
)  # fmt: skip
"""What the loader, libraries and thread pools read, besides Python itself. Not the time zone: engines give the same answer everywhere."""

PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 22, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
CAPABILITIES_VERSION = 0x2008_0522
CAPABILITIES_MAX = 64
NET_BIND_TCP, NET_CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_UNIX, SCOPE_SIGNAL = 1, 2
ABI_NET, ABI_SCOPE = 4, 6

# classic BPF: load a word of the call, compare, return
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
CALL_NUMBER, FIRST_ARGUMENT = 0, 16
ALLOW, REFUSE = 0x7FFF_0000, 0x0005_0000 | errno.EPERM


class NetRuleset(ctypes.Structure):
    """The kernel's landlock_ruleset_attr, whose newer fields the library doesn't know."""

    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class Program(ctypes.Structure):
    """The kernel's sock_fprog."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine(how: Confinement) -> None:
    """Raises OSError if this machine can't do what is asked; then nothing must run."""
    os.chdir("/")
    os.umask(0o077)
    give_way()
    limit(how)
    if how.level == "none":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    drop_rights(libc)
    if how.landlock_abi:
        restrict_files(how)
        restrict_network(how.landlock_abi)
    load_filter(libc, own_signals(how.signal_calls, os.getpid()))
    load_filter(libc, how.seccomp)  # last: it forbids to load another


def give_way() -> None:
    """Run only when nobody else wants to, and be the first to go when memory is short. What a system doesn't have is left out."""
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if sys.platform != "linux":
        return
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    lower_group()


def lower_group() -> None:
    """Our session's share of the processor, else as large as that of the owner's whole desktop. The kernel takes ten wishes a second."""
    for _ in range(AUTOGROUP_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(NICE))
        except BlockingIOError:
            time.sleep(AUTOGROUP_PAUSE_S)
        except OSError:
            return  # this kernel groups in another way
        else:
            return


def limit(how: Confinement) -> None:
    """Nobody else reads our memory, where prompts are; a bound on its size. In a jail also no file may be written, and few opened."""
    keep_private()
    if how.memory_bytes and sys.platform == "linux":
        _limit(resource.RLIMIT_DATA, how.memory_bytes + SPARE_BYTES)
    if how.level == "none":
        return
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, FILES_MAX)
    if how.tasks_max:
        _limit(resource.RLIMIT_NPROC, how.tasks_max)


def _limit(which: int, value: int) -> None:
    """Never more than it is."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def drop_rights(libc: ctypes.CDLL) -> None:
    """No capability, now or ever again."""
    for capability in range(CAPABILITIES_MAX):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one, or a user who never had any
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAPABILITIES_VERSION, 0))
    _checked(libc.capset(header, ctypes.create_string_buffer(24)))
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def restrict_files(how: Confinement) -> None:
    """Everything that Landlock knows is forbidden, but for reading what an engine needs, and sockets in its own folder."""
    ctypes.set_errno(0)  # the library takes an old error for its own
    access = landlock.FSAccess
    rules = landlock.Ruleset()
    for path in existing((*NEEDED, *how.folders)):
        rules.allow(path, rules=access.READ_FILE | access.READ_DIR if path.is_dir() else access.READ_FILE)
    rules.allow(*how.files, rules=access.READ_FILE)
    rules.allow("/dev/null", rules=access.READ_FILE | access.WRITE_FILE)
    rules.allow(how.socket_folder, rules=access.MAKE_SOCK | access.REMOVE_FILE | access.READ_DIR)
    rules.apply()


def restrict_network(abi: int) -> None:
    """No TCP, no abstract sockets of others, no signals to others, as far as this kernel can say so. seccomp forbids them too."""
    wanted = NetRuleset(0, NET_BIND_TCP | NET_CONNECT_TCP if abi >= ABI_NET else 0, 0)
    size = 16
    if abi >= ABI_SCOPE:
        wanted.scoped = SCOPE_ABSTRACT_UNIX | SCOPE_SIGNAL
        size = 24
    if not wanted.net:
        return
    ctypes.set_errno(0)
    ruleset = plumbing.get_create_ruleset()(ctypes.cast(ctypes.byref(wanted), ctypes.POINTER(plumbing.RulesetAttr)), size, 0)
    plumbing.get_restrict_self()(ruleset, 0)
    os.close(ruleset)


def existing(paths: Iterable[str]) -> list[Path]:
    """Those that are here."""
    return [path for path in map(Path, paths) if path.exists()]


def own_signals(calls: Iterable[int], pid: int) -> bytes:
    """A filter that refuses these calls unless their first argument is `pid`. It is asked after the other one, and the stricter holds."""
    numbers = list(calls)
    program = [(LOAD, 0, 0, CALL_NUMBER)]
    program += [(EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (EQUAL, 0, 1, pid),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def load_filter(libc: ctypes.CDLL, program: bytes) -> None:
    assert program, "no jail without a filter"
    wanted = Program(len(program) // 8, program)
    _checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(wanted), 0, 0))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """A Confinement as one line of JSON on standard input, then the module's own."""
    module = sys.argv[1]
    try:
        how = msgspec.json.decode(sys.stdin.readline(), type=Confinement)
    except msgspec.DecodeError:
        sys.exit(EXIT_BAD_SETTINGS)
    try:
        confine(how)
    except OSError as error:  # Landlock's errors are such too
        print(f"{error.strerror}", file=sys.stderr)
        sys.exit(EXIT_NOT_CONFINED)
    importlib.import_module(module).main()


if __name__ == "__main__":
    main()

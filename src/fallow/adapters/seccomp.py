"""The list of system calls that an engine may make, as a filter that the engine's process loads into the kernel."""

import errno
import sys
import tempfile
from collections.abc import Iterable

import msgspec

from fallow.model.errors import StartFailed

AF_UNIX = 1
SOCK_STREAM = 1
SOCK_TYPE = 0xF
SOL_SOCKET = 1
MAP_TYPE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_GROWSDOWN = 0x3, 0x2, 0x20, 0x100
CLONE_THREAD = 0x10000
CLONE_NAMESPACES = 0x7E02_0080  # new time, mount, cgroup, uts, ipc, user, pid and network namespaces
LOW = 0xFFFF_FFFF
"""The kernel looks at 32 bits of these arguments only."""

ALLOWED = (
    "brk munmap mprotect mremap madvise mbind get_mempolicy membarrier",
    "open openat read readv pread64 preadv write writev close close_range lseek fstat newfstatat stat lstat statx statfs fstatfs",
    "access faccessat faccessat2 readlink readlinkat getdents64 getcwd umask fadvise64 unlink unlinkat chdir",
    "dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2",
    "bind listen accept accept4 getsockname getpeername getsockopt recvfrom recvmsg sendmsg shutdown",
    "futex futex_waitv set_robust_list get_robust_list rseq set_tid_address exit exit_group",
    "getpid getppid gettid getpgrp getpgid getsid getuid geteuid getgid getegid getresuid getresgid getgroups capget",
    "sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getpriority getcpu",
    "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall kill tgkill",
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times",
    "uname sysinfo getrandom getrusage getrlimit arch_prctl",
)
"""What llama.cpp, ONNX Runtime and Python were seen to use, and its like. No fork, no exec, no connect, nothing that makes or shares memory
beyond what RLIMIT_DATA counts. `kill` and `tgkill` are kept to the process itself by a second filter, since its id isn't known here."""
ABSENT = ("clone3 openat2 futex_wait futex_wake futex_requeue mseal cachestat map_shadow_stack fchmodat2 pidfd_open io_uring_setup",)
"""Libraries try these first, and take the older way where the kernel says that it has no such call."""
OWN_SIGNALS = ("kill", "tgkill")

IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, its size, bytes that wait, non-blocking, (no) close on exec. Not: putting words into a terminal, owner of signals."""
FCNTLS = (0, 1, 2, 3, 4, 1030)
"""Copy a descriptor, its flags. Not F_SETOWN and F_SETSIG: they would send any signal to any process of the same user."""
SOCKET_OPTIONS = (2, 7, 8, 9, 13, 15, 20, 21, 66, 67)
"""Reuse of an address, buffer sizes, keep-alive, linger, timeouts. Not: attaching programs."""
PRCTLS = (15, 16, 0x53564D41)
"""A thread's name, and a mapping's."""


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled filter for this machine: BPF instructions, and the numbers of the calls that send signals."""

    program: bytes
    signal_calls: tuple[int, ...]


def compile_filter() -> Filter:
    """The filter; raises StartFailed where libseccomp isn't there."""
    if sys.platform != "linux":
        raise StartFailed("seccomp is Linux's")
    if pyseccomp is None:
        raise StartFailed("libseccomp is not installed; install it (`apt install libseccomp2`, `dnf install libseccomp`)")
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name in _names(ALLOWED):
        _allow(rules, name)
    for name in _names(ABSENT):
        if _number(name) >= 0:
            rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
    _allow_with_arguments(rules)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return Filter(program=file.read(), signal_calls=tuple(_number(name) for name in OWN_SIGNALS))


def _names(lines: Iterable[str]) -> list[str]:
    return [name for line in lines for name in line.split()]


def _number(name: str) -> int:
    """A call's number here; negative if this processor, or this libseccomp, has no such call."""
    return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))


def _allow(rules: "pyseccomp.SyscallFilter", name: str, *arguments: "pyseccomp.Arg") -> None:
    if _number(name) >= 0:
        rules.add_rule(pyseccomp.ALLOW, name, *arguments)


def _masked(number: int, mask: int, value: int) -> "pyseccomp.Arg":
    return pyseccomp.Arg(number, pyseccomp.MASKED_EQ, mask, value)


def _allow_with_arguments(rules: "pyseccomp.SyscallFilter") -> None:
    # streams between processes here only: a datagram could be sent to any socket without connecting
    for name in ("socket", "socketpair"):
        _allow(rules, name, _masked(0, LOW, AF_UNIX), _masked(1, SOCK_TYPE, SOCK_STREAM))
    _allow(rules, "sendto", pyseccomp.Arg(4, pyseccomp.EQ, 0))
    for option in SOCKET_OPTIONS:
        _allow(rules, "setsockopt", _masked(1, LOW, SOL_SOCKET), _masked(2, LOW, option))
    # threads yes, processes no
    _allow(rules, "clone", _masked(0, CLONE_THREAD | CLONE_NAMESPACES, CLONE_THREAD))
    # private memory, or files: RLIMIT_DATA doesn't count shared memory and stacks that grow
    _allow(rules, "mmap", _masked(3, MAP_TYPE | MAP_GROWSDOWN, MAP_PRIVATE))
    _allow(rules, "mmap", _masked(3, MAP_ANONYMOUS | MAP_GROWSDOWN, 0))
    # limits may be read
    _allow(rules, "prlimit64", _masked(0, LOW, 0), pyseccomp.Arg(2, pyseccomp.EQ, 0))
    for name, argument, values in (("ioctl", 1, IOCTLS), ("fcntl", 1, FCNTLS), ("prctl", 0, PRCTLS)):
        for value in values:
            _allow(rules, name, _masked(argument, LOW, value))


try:
    import pyseccomp
except (ImportError, RuntimeError, OSError, TypeError, AttributeError):  # not Linux, or no libseccomp
    pyseccomp = None

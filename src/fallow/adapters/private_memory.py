"""What a process holds in memory stays there: no core dump is written, and no other process of the same user reads it (Linux)."""

import ctypes
import os
import resource
import sys

PR_SET_DUMPABLE = 4


def keep_private() -> None:
    """For this process until it ends; raises OSError if the system refuses.

    Nothing is dumped to a file: the limit is inherited by whatever this process starts. A limit doesn't keep the kernel from piping a dump
    to a collector (`core_pattern`), so on Linux the process also says that it may not be dumped. Then only root may trace it or open its
    memory. What it starts must say so for itself. Elsewhere there is the limit alone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

"""Runs a command that must not outlive the process that started it, whatever kills that process.

Started by path, without the package: `python -I -S tether.py PARENT_PID SIGNAL [CGROUP_PROCS] -- COMMAND …`.
The file is that of the control group in which it is to be.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
POLL_S = 0.5


def bind_to_parent(parent: int, number: int) -> None:
    """Have the kernel signal this process, and what it becomes, when the parent dies (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


def watch_parent(parent: int, number: int, command: list[str]) -> int:
    """The same where the kernel has no such service: look twice a second."""
    child = subprocess.Popen(command, close_fds=False)  # it may have been given descriptors to keep
    for forwarded in (signal.SIGTERM, signal.SIGINT):
        signal.signal(forwarded, lambda received, _: child.send_signal(received))
    while child.poll() is None:
        if os.getppid() != parent:
            child.send_signal(number)
            child.wait()
        time.sleep(POLL_S)
    return child.returncode


def enter(cgroup: str) -> None:
    """Move this process, and so what it becomes and starts, into a control group. Its limits are a second line: without it we go on."""
    try:
        with open(cgroup, "w") as file:
            file.write(str(os.getpid()))
    except OSError:
        pass


def main() -> None:
    parent, number, *rest = sys.argv[1:]
    dashes = rest.index("--")
    cgroups, command = rest[:dashes], rest[dashes + 1 :]
    for cgroup in cgroups:
        enter(cgroup)
    if sys.platform == "linux":
        bind_to_parent(int(parent), int(number))
        os.execvp(command[0], command)
    sys.exit(watch_parent(int(parent), int(number), command))


if __name__ == "__main__":
    main()

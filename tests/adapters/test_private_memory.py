"""What a process holds in memory is for nobody else, and its end leaves no file with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
SECRET = "what the caller asked"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")
KEPT = "from fallow.adapters.private_memory import keep_private; keep_private();"
LIMITS = "import resource; print(*resource.getrlimit(resource.RLIMIT_CORE));"
DUMPABLE = f"import ctypes; print(ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0));"
NOBODY = 65_534


def told(program: str) -> list[str]:
    """What a Python process of its own prints, which may dump as much as the system lets it."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.split()


def test_no_core_is_written_by_it_nor_by_what_it_starts() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LIMITS!r}])"
    assert told(f"{KEPT} {LIMITS} {child}") == ["0", "0", "0", "0"]


@LINUX
def test_it_may_not_be_dumped() -> None:
    assert told(DUMPABLE) == ["1"], "the machine's own way"
    assert told(f"{KEPT} {DUMPABLE}") == ["0"]


def parted(program: str, folder: Path) -> int:
    """How a process ends that aborts with a secret in memory and could write a core into the folder."""
    grown = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2);"
    ended = subprocess.Popen([sys.executable, "-c", f"secret = {SECRET!r}; {grown} {program} import os; os.abort()"], cwd=folder)
    _, status = os.waitpid(ended.pid, 0)
    ended.returncode = -signal.SIGABRT
    return status


@LINUX
def test_an_abort_leaves_nothing(tmp_path: Path) -> None:
    status = parted(KEPT, tmp_path)
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []


@LINUX
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "not-kept"])
def test_others_of_the_same_user_do_not_look_into_it(is_kept: bool) -> None:
    """The same attempt is made on a process that didn't ask: else it would prove nothing."""
    begun = f"import ctypes, os; from fallow.adapters.private_memory import keep_private; os.getuid() or os.setuid({NOBODY})"
    plain = f"ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, 1, 0, 0, 0)"  # who changes the user may not be looked at either
    program = f"{begun}; {'keep_private()' if is_kept else plain}; os.write(1, b'.'); os.read(0, 1)"
    one = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert one.stdout is not None
    try:
        assert one.stdout.read(1) == b"."
        look = f"import os; os.getuid() or os.setuid({NOBODY}); open('/proc/{one.pid}/environ', 'rb').close(); print('open')"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=20)
        assert (done.stdout.strip(), "PermissionError" in done.stderr) == (("", True) if is_kept else ("open", False)), done.stderr
    finally:
        one.communicate(b"x", timeout=20)

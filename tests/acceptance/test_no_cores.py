"""Hub, gateway, node and engine leave no core behind, and nobody of the same user looks into their memory."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from running import Service, start_up

ENDS_S = 20.0
FALLOWS = (" up ", " hub ", " gateway ", " lend ", "fallow.engines.")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


def core_limit(process: psutil.Process) -> list[str]:
    """The soft and the hard limit of a process's core dumps."""
    lines = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    return next(line.split()[4:6] for line in lines if line.startswith("Max core file size"))


def ours(service: Service) -> dict[str, psutil.Process]:
    """The processes that hold what callers say, by what they are."""
    found = {}
    for process in service.parts["up"].family():
        words = " ".join(process.cmdline()) + " "
        name = next((name.strip() for name in FALLOWS if name in words), "")
        if name and "bwrap" not in words.split()[0] and "tether.py" not in words:
            found[name] = process
    return found


def test_no_process_may_leave_a_core(service: Service) -> None:
    assert set(ours(service)) == {name.strip() for name in FALLOWS}
    for process in service.parts["up"].family():  # the broker and the jail too
        assert core_limit(process) == ["0", "0"], process.cmdline()


@pytest.mark.skipif(os.getuid() == 0, reason="root owns all of them anyway; tests/adapters/test_private_memory.py becomes somebody else")
def test_their_memory_is_not_their_users_to_read(service: Service) -> None:
    for name, process in ours(service).items():
        with pytest.raises(PermissionError):
            Path(f"/proc/{process.pid}/environ").read_bytes()
        assert process.status(), name


def test_one_that_aborts_leaves_nothing(weights: None, tmp_path: Path) -> None:
    service = start_up(tmp_path / "d")
    up = service.parts["up"]
    up.process.send_signal(signal.SIGQUIT)
    _, status = os.waitpid(up.process.pid, 0)
    up.process.returncode = -signal.SIGQUIT
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert [path for path in Path.cwd().glob("core*") if path.is_file()] == []

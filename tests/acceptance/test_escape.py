"""The jail as it is: a program that tries to get out of it, on each level and as each user that this machine has; then the real engines.

Each attempt is made without a jail too, where that does no harm: there it must work, or the test would prove nothing.
"""

import contextlib
import errno
import http.client
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from escape import MAP_GROWSDOWN
from running import EMBEDDER, MODEL, until

import fallow as package
from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.store import Store
from fallow.apps.settings import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no jail yet")

HELPERS = Path(__file__).parent.parent / "helpers"
NOBODY = 65534
WITHIN_S = 60.0
GIB = 2**30
LEVELS = ("landlock", "bwrap")
USERS = ("self", "nobody") if os.getuid() == 0 else ("self",)
PLACES = [(level, user) for user in USERS for level in LEVELS]
MAP_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
PR_SET_DUMPABLE, PR_SET_PDEATHSIG = 4, 1
CLONE_NEWUSER = 0x1000_0000


def reachable(program: Path) -> bool:
    """Whether another user may run it."""
    return all(folder.stat().st_mode & 0o001 for folder in program.parents)


def python_for_nobody(folder: Path) -> str:
    """A Python of this version that another user can start, with what is installed here."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = [Path(sys.executable).resolve(), *[Path(one) / version for one in ("/usr/bin", "/usr/local/bin")]]
    program = next((one for one in found if one.exists() and reachable(one)), None)
    if program is None:
        pytest.skip(f"no {version} that another user may start; install it for all")
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    sources = Path(package.__file__).parents[1]
    (packages / "installed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sources}\n")
    (folder / "pyvenv.cfg").write_text(f"home = {program.parent}\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(program)
    return str(folder / "bin" / "python")


class Held:
    """An agent, the engine that it keeps in a jail, and the files around them."""

    def __init__(self, folder: Path, models: Path, process: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self.folder = folder
        self.models = models
        self.process = process
        self.agent: int = told["agent"]
        self.engine: int = told["engine"]
        self.socket = Path(told["socket"])
        self.port: int = told["port"]
        self.level: str = told["level"]

    def attempt(self, name: str, *arguments: Any) -> dict[str, Any]:
        """What came of it. The engine's end is an answer too."""
        until(self.socket.exists, within_s=WITHIN_S, what="the engine's socket")
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(WITHIN_S)
            until(lambda: one.connect_ex(str(self.socket)) == 0, within_s=WITHIN_S, what="a connection")
            one.sendall(json.dumps({"attempt": name, "arguments": arguments}).encode() + b"\n")
            with contextlib.suppress(ConnectionResetError):
                line = one.makefile("rb").readline()
                if line:
                    return dict(json.loads(line))
        return {"refused": "it ended"}

    def family(self) -> list[psutil.Process]:
        """The engine's processes: under bubblewrap there are some around it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.engine)
            return [first, *first.children(recursive=True)]
        return []

    def inner(self) -> psutil.Process:
        """The engine itself."""
        return self.family()[-1]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Of a real engine, over HTTP."""
        with contextlib.closing(http.client.HTTPConnection("engine", timeout=60)) as client:
            client.sock = socket.socket(socket.AF_UNIX)
            client.sock.settimeout(60)
            client.sock.connect(str(self.socket))
            client.request(method, path, body=None if body is None else json.dumps(body), headers={"content-type": "application/json"})
            answer = client.getresponse()
            return answer.status, json.loads(answer.read())

    def is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/health")[0] == 200
        return False


class Grounds:
    """A folder that both users reach, with a model, somebody's secrets, and a way to start agents."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.folder = folder
        self._pythons = {"self": sys.executable}
        self._running: list[subprocess.Popen[str]] = []
        for user in USERS:
            self._own(self.models(user), user, {"m.gguf": "weights", "private.gguf": "another model"})

    def models(self, user: str) -> Path:
        return self.folder / f"models-{user}"

    @staticmethod
    def _own(folder: Path, user: str, files: dict[str, str]) -> None:
        """A folder with files, all of which belong to this user."""
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        if user == "nobody":
            for path in (folder, *folder.iterdir()):
                os.chown(path, NOBODY, NOBODY)

    def python(self, user: str) -> str:
        if user not in self._pythons:
            self._pythons[user] = python_for_nobody(self.folder / "python")
        return self._pythons[user]

    def start(self, level: str, user: str, *, engine: str = "escape", files: tuple[Path, ...] = ()) -> Held:
        folder, models = self.folder / str(len(self._running)), self.models(user)
        self._own(folder, user, {"key": "key", "invitation": "secret"})
        process = subprocess.Popen(
            [self.python(user), str(HELPERS / "jailer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.defpath, "HOME": str(folder), "FALLOW_JOIN": "canary"},
            start_new_session=True,
            user=NOBODY if user == "nobody" else None,
            group=NOBODY if user == "nobody" else None,
            extra_groups=[] if user == "nobody" else None,
        )
        self._running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {"level": level, "engine": engine, "folder": str(folder), "files": [str(one) for one in files or (models / "m.gguf",)]}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, "the agent could not start"
        return Held(folder, models, process, json.loads(line))

    def end(self) -> None:
        for process in self._running:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.communicate(timeout=WITHIN_S)
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def grounds() -> Iterator[Grounds]:
    folder = Path(tempfile.mkdtemp(prefix="fallow-"))
    one = Grounds(folder)
    try:
        yield one
    finally:
        one.end()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def jailed(grounds: Grounds) -> Callable[[str, str], Held]:
    """One engine for each place, for the attempts that leave it whole."""
    kept: dict[tuple[str, str], Held] = {}

    def find(level: str, user: str) -> Held:
        if (level, user) not in kept:
            kept[level, user] = grounds.start(level, user)
        return kept[level, user]

    return find


Make = Callable[[Held], tuple[Any, ...]]


def given(*arguments: Any) -> Make:
    return lambda held: arguments


ATTEMPTS: list[tuple[str, str, Make, str]] = [
    # what it is, attempt, its arguments, who can do it without a jail: both users, self, root (as self), or none here
    ("users", "read", given("/etc/passwd"), "both"),
    ("passwords", "read", given("/etc/shadow"), "root"),
    ("root's home", "list", given("/root"), "root"),
    ("homes", "list", given("/home"), "both"),
    ("the root", "list", given("/"), "both"),
    ("temporary files", "list", given("/tmp"), "both"),
    ("key", "read", lambda held: (str(held.folder / "key"),), "both"),
    ("invitation", "read", lambda held: (str(held.folder / "invitation"),), "both"),
    ("another model", "read", lambda held: (str(held.models / "private.gguf"),), "both"),
    ("which models", "list", lambda held: (str(held.models),), "both"),
    ("environment of the first process", "read", given("/proc/1/environ"), "none"),
    ("environment of the agent", "read", lambda held: (f"/proc/{held.agent}/environ",), "both"),
    ("memory of the agent", "look_into", lambda held: (held.agent,), "both"),
    ("tracing the agent", "seize", lambda held: (held.agent,), "root"),
    ("a block device", "list", given("/dev/disk"), "none"),
    ("write to the system", "create", given("/usr/fallow-was-here"), "root"),
    ("write to the model", "open_to_write", lambda held: (str(held.models / "m.gguf"),), "both"),
    ("write beside the model", "create", lambda held: (str(held.models / "new"),), "both"),
    ("remove the model", "unlink", lambda held: (str(held.models / "m.gguf"),), "none"),
    ("rename the model", "rename", lambda held: (str(held.models / "m.gguf"), str(held.models / "m2")), "none"),
    ("link the model", "link", lambda held: (str(held.models / "m.gguf"), str(held.socket.parent / "m")), "none"),
    ("rights of the model", "chmod", lambda held: (str(held.models / "m.gguf"), 0o644), "both"),
    ("write to the package", "create", lambda held: (str(Path(package.__file__).parent / "new"),), "root"),
    ("write to Python", "create", lambda held: (str(Path(os.__file__).parent / "new"),), "root"),
    ("a file in its own folder", "create", lambda held: (str(held.socket.parent / "new"),), "both"),
    ("a large file", "create", lambda held: (str(held.socket.parent / "large"), GIB), "both"),
    ("a temporary file", "create", given("/tmp/fallow-was-here"), "both"),
    ("shared memory", "create", given("/dev/shm/fallow-was-here"), "both"),
    ("a link in its own folder", "symlink", lambda held: ("/etc", str(held.socket.parent / "l")), "none"),
    ("a socket in the agent's folder", "listen", lambda held: (str(held.folder / "mine.sock"),), "both"),
    ("TCP", "socket", given("AF_INET"), "both"),
    ("TCP over IPv6", "socket", given("AF_INET6"), "both"),
    ("TCP to the agent", "connect", lambda held: ("AF_INET", ["127.0.0.1", held.port]), "both"),
    ("UDP", "socket", given("AF_INET", "SOCK_DGRAM"), "both"),
    ("raw packets", "socket", given("AF_INET", "SOCK_RAW", 1), "root"),
    ("netlink", "socket", given("AF_NETLINK", "SOCK_RAW"), "both"),
    ("an abstract socket", "connect", lambda held: ("AF_UNIX", f"@fallow-{held.agent}"), "both"),
    ("the agent's socket", "connect", lambda held: ("AF_UNIX", str(held.folder / "other.sock")), "both"),
    ("the agent's datagrams", "datagram", lambda held: (str(held.folder / "datagram.sock"),), "both"),
    ("the same by a pair", "send_to", lambda held: (str(held.folder / "datagram.sock"),), "both"),
    ("fork", "fork", given(), "both"),
    ("a shell", "spawn", given("/bin/sh"), "both"),
    ("a shell in its place", "become", given("/bin/sh"), "none"),
    ("threads without end", "threads", given(600), "both"),
    ("heap", "heap", given(4 * GIB), "both"),
    ("private memory", "memory", given(4 * GIB, MAP_PRIVATE), "both"),
    ("shared memory of its own", "memory", given(4 * GIB, MAP_SHARED), "both"),
    ("a stack that grows", "memory", given(4 * GIB, MAP_PRIVATE | MAP_GROWSDOWN), "both"),
    ("a file in memory", "call", given("memfd_create", "x", 0), "both"),
    ("System V memory", "call", given("shmget", 0, 4096, 0o600), "both"),
    ("signal to the agent", "kill", lambda held: (held.agent, 0), "both"),
    ("kill the agent", "kill", lambda held: (held.agent, signal.SIGKILL), "none"),
    ("stop the agent", "kill", lambda held: (held.agent, signal.SIGSTOP), "none"),
    ("signal to its group", "kill", given(0, 0), "both"),
    ("signal to all", "kill", given(-1, 0), "both"),
    ("signals by a file", "own_signals", lambda held: (held.agent,), "both"),
    ("a better place in the queue", "nice", given(0), "root"),
    ("leave SCHED_IDLE", "scheduler", given(), "root"),
    ("disk before others", "ioprio", given(), "both"),
    ("other cores", "affinity", given(), "both"),
    ("be readable", "prctl", given(PR_SET_DUMPABLE, 1), "both"),
    ("outlive the agent", "prctl", given(PR_SET_PDEATHSIG, 0), "both"),
    ("limits", "raise_limit", given(), "both"),
    ("io_uring", "call", given("io_uring_setup", 0, 0), "none"),
    ("bpf", "call", given("bpf", 0, 0, 0), "none"),
    ("userfaultfd", "call", given("userfaultfd", 0), "none"),
    ("perf", "call", given("perf_event_open", 0, 0, -1, -1, 0), "none"),
    ("keys", "call", given("keyctl", 0, -3, 0), "none"),
    ("namespaces", "call", given("unshare", CLONE_NEWUSER), "none"),
    ("another namespace", "call", given("setns", 0, 0), "none"),
    ("mount", "call", given("mount", 0, 0, 0, 0, 0), "none"),
    ("a handle on the agent", "call", lambda held: ("pidfd_open", held.agent, 0), "both"),
    ("read the agent's memory", "call", lambda held: ("process_vm_readv", held.agent, 0, 0, 0, 0, 0), "both"),
    ("a process by clone", "call", given("clone", CLONE_NEWUSER, 0, 0, 0, 0), "none"),
    ("a process by clone3", "call", given("clone3", 0, 0), "none"),
]
REFUSALS = {"io_uring", "bpf", "userfaultfd", "perf", "keys", "namespaces", "another namespace", "mount", "a process by clone"}
"""System calls whose arguments here make no sense: the refusal must be the filter's, not for the nonsense."""


@pytest.mark.parametrize(("level", "user"), PLACES)
@pytest.mark.parametrize(("name", "attempt", "make"), [row[:3] for row in ATTEMPTS], ids=[row[0] for row in ATTEMPTS])
def test_no_attempt_works_in_a_jail(
    grounds: Grounds, jailed: Callable[[str, str], Held], level: str, user: str, name: str, attempt: str, make: Make
) -> None:
    held = jailed(level, user)
    assert held.level == level
    came = held.attempt(attempt, *make(held))
    assert "refused" in came, f"{name}: {came}"
    assert came["refused"] != "it ended"
    if name in REFUSALS:
        assert came["refused"] in (os.strerror(errno.EPERM), os.strerror(errno.ENOSYS))
    assert held.process.poll() is None
    assert psutil.Process(held.agent).status() != psutil.STATUS_STOPPED


def controls() -> Iterator[Any]:
    for name, attempt, make, who in ATTEMPTS:
        for user in USERS:
            if who == "both" or (who == "root" and user == "self" and os.getuid() == 0):
                yield pytest.param(user, attempt, make, id=f"{user}-{name}")


@pytest.mark.parametrize(("user", "attempt", "make"), list(controls()))
def test_the_same_attempt_works_without_a_jail(
    grounds: Grounds, jailed: Callable[[str, str], Held], user: str, attempt: str, make: Make
) -> None:
    held = jailed("none", user)
    assert held.level == "none"
    assert "done" in held.attempt(attempt, *make(held))


@pytest.mark.parametrize(("level", "user"), PLACES)
def test_what_an_engine_needs_works(grounds: Grounds, jailed: Callable[[str, str], Held], level: str, user: str) -> None:
    held = jailed(level, user)
    for attempt, arguments in (
        ("read", [str(held.models / "m.gguf")]),
        ("read", ["/proc/cpuinfo"]),
        ("read", [os.__file__ if user == "self" else "/usr/bin/env"]),
        ("listen", [str(held.socket.parent / "s.sock")]),
        ("threads", [32]),
        ("heap", [300 * 2**20]),
    ):
        assert "done" in held.attempt(attempt, *arguments), attempt


@pytest.mark.parametrize(("level", "user"), PLACES)
def test_it_gives_way_and_keeps_no_rights(jailed: Callable[[str, str], Held], level: str, user: str) -> None:
    held = jailed(level, user)
    until(held.socket.exists, what="the engine's socket")
    inner = held.inner()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{inner.pid}/status").read_text().splitlines() if ":\t" in line)
    assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    assert Path(f"/proc/{inner.pid}/oom_score_adj").read_text().strip() == "1000"
    assert os.sched_getscheduler(inner.pid) == os.SCHED_IDLE
    assert inner.nice() == 19
    assert inner.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    limits = {line[:25].strip(): line[25:].split()[:2] for line in Path(f"/proc/{inner.pid}/limits").read_text().splitlines()}
    assert limits["Max core file size"] == limits["Max file size"] == ["0", "0"]
    os.sched_setaffinity(inner.pid, os.sched_getaffinity(0))  # the agent may still choose its cores


@pytest.mark.parametrize(("level", "user"), [*PLACES, *[("none", user) for user in USERS]])
def test_a_busy_engine_stays_idle_stops_goes_on_and_dies_with_its_group(grounds: Grounds, level: str, user: str) -> None:
    held = grounds.start(level, user)
    assert "done" in held.attempt("spin")
    inner = held.inner()
    threads = [int(name) for name in os.listdir(f"/proc/{inner.pid}/task")]
    assert len(threads) >= 3
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
    os.killpg(held.engine, signal.SIGSTOP)
    family = held.family()
    until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in family), within_s=WITHIN_S, what="stopping")
    os.killpg(held.engine, signal.SIGCONT)
    until(lambda: inner.status() != psutil.STATUS_STOPPED, within_s=WITHIN_S, what="going on")
    assert "done" in held.attempt("pid")
    os.killpg(held.engine, signal.SIGKILL)
    until(lambda: not any(is_alive(one) for one in family), within_s=WITHIN_S, what="the end")


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize(("level", "user"), [*PLACES, *[("none", user) for user in USERS]])
def test_nothing_outlives_an_agent_that_is_killed(grounds: Grounds, level: str, user: str, stopped: bool) -> None:
    held = grounds.start(level, user)
    assert "done" in held.attempt("spin")
    family = held.family()
    assert len(family) == (3 if level == "bwrap" else 1)
    if stopped:
        os.killpg(held.engine, signal.SIGSTOP)
        until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in family), within_s=WITHIN_S, what="stopping")
    held.process.kill()
    held.process.wait()
    until(lambda: not any(is_alive(one) for one in family), within_s=WITHIN_S, what="the end")


@pytest.mark.parametrize(("level", "user"), PLACES)
def test_a_crash_is_seen(grounds: Grounds, level: str, user: str) -> None:
    """abort() needs a signal to itself, which the filter allows."""
    held = grounds.start(level, user)
    family = held.family()
    assert held.attempt("abort") == {"refused": "it ended"}
    until(lambda: not any(is_alive(one) for one in family), within_s=WITHIN_S, what="the end")


@pytest.fixture(scope="module")
def models(weights: None, grounds: Grounds) -> dict[str, tuple[Path, ...]]:
    """The engines' files, where both users can read them."""
    settings = load(grounds.folder / "d")
    store = Store(settings.models_folder)
    found: dict[str, tuple[Path, ...]] = {}
    for engine, name in (("llama", MODEL), ("onnx", EMBEDDER)):
        entry = load_catalogue(settings.data).find(name)
        copies = []
        for file in entry.files:
            path = store.path(entry.name, file)
            assert path is not None
            copies.append(Path(shutil.copy(path, grounds.folder / f"{engine}-{file.role}")))
        found[engine] = tuple(copies)
    return found


@pytest.mark.parametrize(("level", "user"), PLACES)
@pytest.mark.parametrize(
    ("engine", "path", "body", "holds"),
    [
        ("llama", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 8}, "choices"),
        ("onnx", "/v1/embeddings", {"input": ["hello", "a longer text"]}, "data"),
    ],
)
def test_a_real_engine_answers_in_its_jail(
    grounds: Grounds, models: dict[str, tuple[Path, ...]], level: str, user: str, engine: str, path: str, body: Any, holds: str
) -> None:
    held = grounds.start(level, user, engine=engine, files=models[engine])
    until(held.is_healthy, what="the engine")
    assert held.level == level
    status, answer = held.ask("POST", path, body)
    assert status == 200, answer
    assert answer[holds]
    family = held.family()
    os.killpg(held.engine, signal.SIGSTOP)
    until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in family), within_s=WITHIN_S, what="stopping")
    os.killpg(held.engine, signal.SIGCONT)
    assert held.ask("POST", path, body)[0] == 200
    held.process.communicate(timeout=WITHIN_S)
    until(lambda: not any(is_alive(one) for one in family), within_s=WITHIN_S, what="the end")
    assert not held.socket.parent.exists()

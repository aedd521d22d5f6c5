"""Real processes: `fallow up` for the whole, and its parts run apart where a test must kill one of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import psutil
import pytest
import requests

from fallow.adapters.nkey import kept_key

MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
START_S = 60.0
STOP_S = 10.0
POLL_S = 0.02
FALLOW = [sys.executable, "-m", "fallow"]


def until(said: Callable[[], Any], *, within_s: float = START_S, what: str = "it") -> Any:
    """Poll until `said()` is true; the bound is only there so that a broken build ends."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = said()
        if found:
            return found
        time.sleep(POLL_S)
    pytest.fail(f"{what} did not happen within {within_s:g} s")


def fallow(*arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run([*FALLOW, *arguments], capture_output=True, text=True, timeout=START_S, input=stdin)


def node_id_of(data: Path) -> str:
    """The id of the node on a data folder: its public key, which is made when it first joins."""
    file = data / "identity" / "node.nk"
    until(file.exists, what=f"a key in {data.name}")
    return kept_key(file, "user").public


class Running:
    """A `fallow` process. Its output lies in a file."""

    def __init__(self, data: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.data = data
        self.output = data.parent / f"{data.name}-{arguments[0]}.out"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*FALLOW, *arguments, "--data", str(data)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.read_text()

    def family(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def child(self, words: str) -> psutil.Process:
        """The descendant whose command line holds these words."""

        def find() -> psutil.Process | None:
            for process in self.family():
                try:
                    line = process.cmdline()
                    if words in " ".join(line) and "tether.py" not in " ".join(line) and not line[0].endswith("bwrap"):
                        return process
                except psutil.NoSuchProcess:
                    continue
            return None

        found = until(find, within_s=20, what=f"a process with {words!r}")
        assert isinstance(found, psutil.Process)
        return found

    def engine(self) -> psutil.Process:
        return self.child("fallow.engines.llama")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Service:
    """A gateway that can be called, and what stands behind it."""

    def __init__(self, base_url: str, key: str, parts: dict[str, Running]) -> None:
        self.base_url = base_url
        self.key = key
        self.parts = parts

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0, **{"timeout": 60, **options})

    def post(self, body: Any, path: str = "/chat/completions", **options: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return requests.post(self.base_url + path, data=data, headers=headers, timeout=60, **options)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.root + path, headers={"authorization": f"Bearer {self.key}"}, timeout=10)

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/fallow/nodes").json()["nodes"]
        return found

    def readiness(self) -> dict[str, str]:
        """Of each node that offers something."""
        return {node["node_id"]: offer["readiness"] for node in self.nodes() for offer in node["offers"]}


def open_client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="session")
def weights() -> None:
    """The models are there; fetched on the first run."""
    pulled = fallow("models", "pull", MODEL, EMBEDDER)
    assert pulled.returncode == 0, pulled.stderr


def start_up(data: Path, *arguments: str) -> Service:
    settings = data / "settings.toml"
    if not settings.exists():
        data.mkdir(parents=True, exist_ok=True)
        settings.write_text("[lend]\nmeasure = false\n")  # the self-benchmark has a test of its own
        settings.chmod(0o600)
    up = Running(data, "up", "--port", "0", *arguments)
    until(lambda: "Ctrl-C" in up.said() or up.process.poll() is not None, what="fallow up")
    assert up.process.poll() is None, up.said()
    base_url = next(line.split()[2] for line in up.said().splitlines() if "base URL" in line)
    return Service(base_url, (data / "key").read_text().strip(), {"up": up})


@pytest.fixture(scope="session")
def service(weights: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One `fallow up` for all tests that leave it whole."""
    running = start_up(tmp_path_factory.mktemp("up") / "d", "--model", MODEL, "--model", EMBEDDER)
    try:
        yield running
    finally:
        running.parts["up"].stop()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    yield from open_client(service)


SETTINGS = """\
[lend]
measure = false
{lend}

[node]
region = "{region}"
stall_s = {stall_s}
load_wait_s = {load_wait_s}
"""


class Apart:
    """Hub, gateway and nodes as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Running] = {}
        self.hub_address = ""

    def start_hub_and_gateway(self) -> Service:
        data = self.folder / "hub"
        hub = self.parts["hub"] = Running(data, "hub", "--listen", "127.0.0.1:0", "--verbose")
        until(lambda: "The hub is up" in hub.said() or hub.process.poll() is not None, what="the hub")
        assert hub.process.poll() is None, hub.said()
        self.hub_address = msgspec.json.decode((data / "hub.json").read_bytes())["addresses"][0]
        gateway = self.parts["gateway"] = Running(data, "gateway", "--hub", self.hub_address, "--port", "0")
        address = data / "gateway.json"
        until(lambda: address.exists() or gateway.process.poll() is not None, what="the gateway")
        assert address.exists(), gateway.said()
        base_url = msgspec.json.decode(address.read_bytes(), type=dict[str, str])["base_url"]
        return Service(base_url, (data / "key").read_text().strip(), self.parts)

    def lend(
        self,
        name: str,
        *arguments: str,
        load_wait_s: float = 10,
        stall_s: float = 30,
        lend: str = "",
        region: str = "unknown",
        more: str = "",
    ) -> Running:
        data = self.folder / name
        data.mkdir()
        (data / "settings.toml").write_text(SETTINGS.format(load_wait_s=load_wait_s, stall_s=stall_s, lend=lend, region=region) + more)
        flags = ["--hub", self.hub_address, "--join-file", str(self.folder / "hub" / "invitation"), *arguments]
        if "--profile" not in arguments:
            flags += ["--profile", "dedicated"]  # the tests' own work is no owner's
        self.parts[name] = Running(data, "lend", *flags)
        return self.parts[name]

    def stop(self) -> None:
        for part in reversed(self.parts.values()):
            part.stop()


@pytest.fixture
def apart(weights: None, tmp_path: Path) -> Iterator[Apart]:
    parts = Apart(tmp_path)
    try:
        yield parts
    finally:
        parts.stop()


def wait_ready(service: Service, nodes: int) -> None:
    until(lambda: list(service.readiness().values()).count("ready") == nodes, what=f"{nodes} ready nodes")


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

"""Every part is restarted in turn while calls come, and no call is lost: with a broker that stays, and the callers' own retries."""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest
from running import FALLOW, Apart, Running, Service, node_id_of, start_up, until, wait_ready
from running import MODEL as REAL_MODEL

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
MODEL = "stub"
CALLERS = 3
CALLS_MAX = 150
"""Of each caller; it stops sooner, when everything has been restarted."""
PACE = {"chunks": "10", "interval_ms": "20"}
LONG = {"chunks": "200", "interval_ms": "25"}
"""Five seconds: a gateway lets go of its folder in a fraction of one."""
END_S = 20.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class InTurns(httpx2.BaseTransport):
    """Each request of a thread goes to the next of several gateways, and so does each retry: a load balancer at its simplest."""

    def __init__(self, services: list[Service]) -> None:
        self._inner = httpx2.HTTPTransport()
        self._urls = [httpx2.URL(service.base_url) for service in services]
        self._mine = threading.local()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self._mine.turn = getattr(self._mine, "turn", 0) + 1
        url = self._urls[self._mine.turn % len(self._urls)]
        request.url = request.url.copy_with(host=url.host, port=url.port)
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


def say(client: openai.OpenAI, pace: dict[str, str], began: Callable[[Any], None] = lambda headers: None) -> None:
    """One streamed call; raises AssertionError if the answer isn't whole. `began(headers)` hears when it begins to come."""
    said: Any = [{"role": "user", "content": "Hi"}]
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=said, metadata=pace, stream=True)
    choices: list[Any] = []
    for chunk in raw.parse():
        if not choices:
            began(raw.headers)
        choices += chunk.choices[:1]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == "".join(f"c{number} " for number in range(int(pace["chunks"]))), text
    assert choices[-1].finish_reason == "stop"


class Long(threading.Thread):
    """A call that takes long, without any retry."""

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._began = threading.Event()
        self.headers: Any = {}
        self.failed = ""
        self.start()

    def run(self) -> None:
        def began(headers: Any) -> None:
            self.headers = headers
            self._began.set()

        try:
            with self._service.client() as client:
                say(client, LONG, began)
        except (openai.OpenAIError, AssertionError) as error:
            self.failed = f"{type(error).__name__}: {error}"

    def begun(self) -> "Long":
        assert self._began.wait(END_S), self.failed
        return self

    def is_whole(self) -> bool:
        self.join(END_S)
        return not self.is_alive() and not self.failed


class Trickle:
    """Callers that call again and again until told."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._over = threading.Event()
        self.done = 0
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        for _ in range(CALLS_MAX):
            if self._over.is_set():
                return
            try:
                self._call()
                self.done += 1
            except (openai.OpenAIError, httpx2.HTTPError, AssertionError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def goes_on(self) -> None:
        """Until every caller had some more answers."""
        more = self.done + 2 * CALLERS
        until(lambda: self.done >= more or not any(thread.is_alive() for thread in self._threads), what="further calls")

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(END_S)
            assert not thread.is_alive(), "a call hangs"


class Site(Apart):
    """A broker that nobody restarts, a hub, two gateways, and two nodes that lend the same engine, which computes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._others: list[subprocess.Popen[bytes]] = []
        self.services: list[Service] = []

    def start(self) -> None:
        self.begin()
        data = self.folder / "hub"
        for name in ("gateway1", "gateway2"):
            flags = ["--hub", self.hub_address, "--port", str(free_port()), "--join-file", str(data / "invitation")]
            self.parts[name] = Running(self.folder / name, "gateway", *flags)
        url = self.start_engine()
        for name in ("node1", "node2"):
            self.lend(name, "--engine", url, "--slots", "4")
        self.services = [self._service(name) for name in ("gateway1", "gateway2")]
        self.wait_ready()

    def begin(self) -> None:
        """Broker and hub."""
        port = free_port()
        data = self.folder / "hub"
        data.mkdir()
        keys = data / "hub" / "keys"
        self._spawn(sys.executable, str(HELPERS / "trusting_broker.py"), str(keys), str(self.folder / "broker"), str(port))
        self.hub_address = f"nats://127.0.0.1:{port}"
        until(lambda: is_open(port), what="the broker")
        self.parts["hub"] = Running(data, "hub", "--broker", self.hub_address)
        until(lambda: "The hub is up" in self.parts["hub"].said(), what="the hub")

    def start_engine(self) -> str:
        """The address of the server that all nodes lend."""
        engine = self._spawn(sys.executable, "-m", "bench.stub_engine")
        assert engine.stdout is not None
        return engine.stdout.readline().decode().split()[1] + "/v1"

    def _spawn(self, *command: str) -> "subprocess.Popen[bytes]":
        self._others.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        return self._others[-1]

    def _service(self, name: str) -> Service:
        address = self.folder / name / "gateway.json"
        until(lambda: address.exists() or self.parts[name].process.poll() is not None, what=name)
        assert address.exists(), self.parts[name].said()
        base_url = msgspec.json.decode(address.read_bytes(), type=dict[str, str])["base_url"]
        return Service(base_url, (self.folder / "hub" / "key").read_text().strip(), self.parts)

    def wait_ready(self) -> None:
        for service in self.services:
            wait_ready(service, 2)

    def start_again(self, name: str) -> None:
        """The same command on the same folder."""
        before: Any = self.parts[name].process.args
        self.parts[name] = Running(self.parts[name].data, *before[len(FALLOW) : -2])

    def stop(self) -> None:
        super().stop()
        for other in self._others:
            other.kill()
            other.communicate()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    running = Site(tmp_path)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def restart(site: Site, name: str) -> None:
    part = site.parts[name].process
    part.terminate()
    assert part.wait(END_S) == 0, site.parts[name].said()
    site.start_again(name)


def test_every_part_is_restarted_and_no_call_is_lost(site: Site) -> None:
    http = httpx2.Client(transport=InTurns(site.services), timeout=30)
    with openai.OpenAI(base_url=site.services[0].base_url, api_key=site.services[0].key, max_retries=2, http_client=http) as client:
        trickle = Trickle(lambda: say(client, PACE))
        try:
            trickle.goes_on()
            first = restart_busy_node(site)
            trickle.goes_on()
            restart(site, "node2" if first == "node1" else "node1")
            site.wait_ready()
            trickle.goes_on()
            restart(site, "hub")
            until(lambda: "The hub is up" in site.parts["hub"].said(), what="the hub")
            trickle.goes_on()
            hand_over(site, "gateway2")
            trickle.goes_on()
        finally:
            trickle.stop()
    assert trickle.failed == []
    assert trickle.done >= 5 * 2 * CALLERS


def restart_busy_node(site: Site) -> str:
    """A long answer that a node is at comes to its end there; returns which node that was."""
    nodes = {node_id_of(site.parts[name].data): name for name in ("node1", "node2")}
    long = Long(site.services[0]).begun()
    name = nodes[long.headers["fallow-node"]]
    restart(site, name)
    assert long.is_whole(), long.failed
    attempts = site.services[0].get(f"/v1/calls/{long.headers['fallow-call']}").json()["attempts"]
    assert [attempt["code"] for attempt in attempts] == [None], "it did not even have to move"
    site.wait_ready()
    return name


def hand_over(site: Site, name: str) -> None:
    """The next gateway takes port and folder while a long answer still comes from the old one."""
    long, old = Long(site.services[1]).begun(), site.parts[name].process
    old.terminate()
    until(lambda: not (site.parts[name].data / "gateway.json").exists(), within_s=END_S, what="the folder is free")
    assert old.poll() is None, "it drains"
    site.start_again(name)
    assert long.is_whole(), long.failed
    assert old.wait(END_S) == 0
    site.services[1] = site._service(name)
    site.wait_ready()


def test_up_lets_a_call_go_on_until_it_is_told_twice(weights: None, tmp_path: Path) -> None:
    service = start_up(tmp_path / "d")
    up = service.parts["up"]
    with service.client() as client:
        stream = iter(client.completions.create(model=REAL_MODEL, prompt="1, 2, 3, 4, 5, 6,", max_tokens=3_000, temperature=0, stream=True))
        next(stream)
        up.process.terminate()
        until(lambda: "calls under way end first" in up.said(), within_s=END_S, what="the word that it takes a while")
        for _ in zip(range(20), stream, strict=False):
            pass
        assert up.process.poll() is None
        up.process.terminate()
        with pytest.raises(openai.APIError):
            list(stream)
    assert up.process.wait(END_S) == 0

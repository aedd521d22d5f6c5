"""Lending from behind an HTTP proxy, with real processes: joining, calls and coming back go through it, and nothing goes around it."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from http_proxy import Proxy
from running import Apart, Running, Service, fallow, node_id_of, until
from test_rolling import MODEL, ROOT, free_port

END_S = 20.0
FEW = '[lend]\nmeasure = false\nprofile = "dedicated"\n'
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "metadata": {"chunks": "2", "interval_ms": "0"}}


class Played(threading.Thread):
    """The proxy, on a loop and a thread of its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.proxy = Proxy()
        self.loop = asyncio.new_event_loop()
        self.start()
        self._wait(self.proxy.start())

    def run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def _wait(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(END_S)

    def cut(self) -> None:
        self.loop.call_soon_threadsafe(self.proxy.cut)

    def stop(self) -> None:
        self._wait(self.proxy.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.join(END_S)


class Behind(Apart):
    """A hub that is reached over TLS only, with a door for WebSocket, and a gateway; nodes stand behind the proxy."""

    def begin(self) -> Service:
        data = self.folder / "hub"
        data.mkdir()
        self.port, self.websocket_port = free_port(), free_port()
        (data / "settings.toml").write_text(f'[hub]\nnames = ["127.0.0.1"]\nwebsocket_port = {self.websocket_port}\n')
        hub = self.parts["hub"] = Running(data, "hub", "--listen", f"0.0.0.0:{self.port}")
        until(lambda: "The hub is up" in hub.said() or hub.process.poll() is not None, what="the hub")
        assert hub.process.poll() is None, hub.said()
        gateway = self.parts["gateway"] = Running(self.folder / "gateway", "gateway", "--port", "0", "--join-file", self.invitation)
        address = self.folder / "gateway" / "gateway.json"
        until(lambda: address.exists() or gateway.process.poll() is not None, what="the gateway")
        assert address.exists(), gateway.said()
        base_url = msgspec.json.decode(address.read_bytes(), type=dict[str, str])["base_url"]
        self.stub = subprocess.Popen(
            [sys.executable, "-m", "bench.stub_engine"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.stub.stdout is not None
        self.engine = self.stub.stdout.readline().decode().split()[1] + "/v1"
        return Service(base_url, (data / "key").read_text().strip(), self.parts)

    @property
    def invitation(self) -> str:
        return str(self.folder / "hub" / "invitation")

    def behind(self, name: str, proxy: str) -> tuple[Path, tuple[str, ...]]:
        """A node's folder with the proxy in its settings, and how it is lent."""
        data = self.folder / name
        data.mkdir()
        (data / "settings.toml").write_text(f'{FEW}[network]\nproxy = "{proxy}"\n')
        return data, ("lend", "--join-file", self.invitation, "--engine", self.engine, "--slots", "4")

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "stub"):
            self.stub.kill()
            self.stub.communicate()


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    played = Played()
    yield played
    played.stop()


@pytest.fixture(scope="module")
def behind(played: Played, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Behind, Service]]:
    parts = Behind(tmp_path_factory.mktemp("behind"))
    try:
        yield parts, parts.begin()
    finally:
        parts.stop()


def goes_to(part: Running) -> set[int]:
    """The ports elsewhere to which a process is connected."""
    connections = part.family()[0].net_connections("tcp")
    return {one.raddr.port for one in connections if one.status == "ESTABLISHED" and one.raddr}


def test_a_proxy_that_lets_nobody_through_is_told_in_a_line(behind: tuple[Behind, Service], played: Played) -> None:
    parts, _ = behind
    data, flags = parts.behind("refused", played.proxy.address)
    played.proxy.refuses = True
    try:
        done = fallow(*flags, "--data", str(data))
    finally:
        played.proxy.refuses = False
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "proxy refused: 403" in done.stderr
    assert not (data / "identity" / "node.json").exists()


def test_a_node_joins_and_answers_through_the_proxy_alone(behind: tuple[Behind, Service], played: Played) -> None:
    parts, service = behind
    data, flags = parts.behind("node", played.proxy.address)
    before = len(played.proxy.asked)
    node = parts.parts["node"] = Running(data, *flags)
    until(lambda: "ready" in service.readiness().values() or node.process.poll() is not None, what="the node")
    assert node.process.poll() is None, node.said()

    answer = service.post(HELLO)
    assert answer.status_code == 200, answer.text
    assert answer.headers["fallow-node"] == node_id_of(data)
    through = [f"CONNECT 127.0.0.1:{parts.websocket_port} HTTP/1.1"]
    assert played.proxy.asked[before:] == through * 2, "to knock, and to stay"
    assert played.proxy.port in goes_to(node)
    assert not {parts.port, parts.websocket_port} & goes_to(node)
    assert played.proxy.port not in goes_to(parts.parts["gateway"])

    played.cut()
    until(lambda: len(played.proxy.asked) > before + 2, within_s=END_S, what="the node's return to the proxy")
    until(lambda: service.post(HELLO).status_code == 200, within_s=END_S, what="a call after that")
    assert set(played.proxy.asked[before:]) == set(through)
    assert not {parts.port, parts.websocket_port} & goes_to(node)

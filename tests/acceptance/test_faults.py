"""Things die: nodes, engines, the broker. Callers get an answer or a typed error, and everything comes back by itself."""

import signal
import threading
from typing import Any

import psutil
import pytest
from running import MODEL, Apart, Running, Service, node_id_of, until, wait_ready

SHORT: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 3, "temperature": 0}
ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,", "max_tokens": 3_000, "temperature": 0}


class Caller(threading.Thread):
    """A call in the background."""

    def __init__(self, service: Service, body: dict[str, Any], *, stream: bool = False) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._body = body | ({"stream": True} if stream else {})
        self._stream = stream
        self.status = 0
        self.headers: Any = {}
        self.text = ""
        self.start()

    def run(self) -> None:
        answer = self._service.post(self._body, "/completions", stream=self._stream)
        self.status, self.headers = answer.status_code, answer.headers
        for chunk in answer.iter_content(None):
            self.text += chunk.decode()

    def wait(self) -> None:
        self.join(60)
        assert not self.is_alive(), "the call hangs"


def busy_node(service: Service, nodes: dict[str, Running]) -> Running:
    """The node that works on the only call."""

    def find() -> Running | None:
        busy = [node["node_id"] for node in service.nodes() for offer in node["offers"] if offer["slots_free"] < offer["slots"]]
        return nodes[busy[0]] if busy else None

    found = until(find, what="a busy node")
    assert isinstance(found, Running)
    return found


def two_nodes(apart: Apart) -> tuple[Service, dict[str, Running]]:
    service = apart.start_hub_and_gateway()
    lenders = [apart.lend("node1", "--threads", "1"), apart.lend("node2", "--threads", "1")]
    wait_ready(service, 2)
    return service, {node_id_of(one.data): one for one in lenders}


def caught(service: Service, nodes: dict[str, Running], *, stream: bool) -> tuple[Caller, Running]:
    """A call that is in an engine and can't come to its first token, since all engines stand still."""
    for node in nodes.values():
        node.engine().suspend()
    caller = Caller(service, SHORT, stream=stream)
    return caller, busy_node(service, nodes)


def let_go(nodes: dict[str, Running], dead: Running) -> None:
    """Let the other engines go on."""
    for node in nodes.values():
        if node is not dead:
            node.engine().resume()


@pytest.mark.parametrize("stream", [True, False])
def test_a_node_killed_before_the_first_token_is_not_noticed(apart: Apart, stream: bool) -> None:
    service, nodes = two_nodes(apart)
    caller, node = caught(service, nodes, stream=stream)
    node.process.send_signal(signal.SIGKILL)
    let_go(nodes, node)
    caller.wait()
    assert caller.status == 200, caller.text
    assert caller.headers["fallow-attempts"] == "2"
    assert nodes[caller.headers["fallow-node"]] is not node
    assert not stream or caller.text.endswith("data: [DONE]\n\n")
    until(lambda: len(service.nodes()) == 1, what="the dead node is off the roster")


def test_an_engine_killed_before_the_first_token_is_not_noticed(apart: Apart) -> None:
    service, nodes = two_nodes(apart)
    caller, node = caught(service, nodes, stream=False)
    node.engine().kill()
    let_go(nodes, node)
    caller.wait()
    assert caller.status == 200, caller.text
    assert caller.headers["fallow-attempts"] == "2"
    wait_ready(service, 2)  # and its engine comes back


def test_the_only_engine_killed(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    node = apart.lend("node")
    wait_ready(service, 1)
    first = node.engine()
    caller = Caller(service, ENDLESS)
    until(lambda: service.nodes()[0]["offers"][0]["slots_free"] < 8, what="the call is in the engine")
    first.kill()
    caller.wait()
    assert caller.status == 502
    assert '"code":"engine_failed"' in caller.text
    wait_ready(service, 1)
    assert node.engine().pid != first.pid
    with service.client() as client:
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).choices


def test_the_only_engine_killed_in_the_middle_of_a_stream_goes_on_when_it_is_back(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    node = apart.lend("node")
    wait_ready(service, 1)
    with service.client() as client:
        stream = client.completions.create(**ENDLESS, stream=True)
        before = [next(stream).choices[0].text for _ in range(10)]
        node.engine().kill()
        after = [next(stream).choices[0].text for _ in range(30)]
    assert "".join([*before, *after]).replace(" ", "").startswith(("14,15,16,", "15,16,17,"))


def test_an_engine_that_stalls_is_restarted(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    node = apart.lend("node", stall_s=2)
    wait_ready(service, 1)
    caller = Caller(service, ENDLESS)
    until(lambda: service.nodes()[0]["offers"][0]["slots_free"] < 8, what="the call is in the engine")
    stalled = node.engine()
    stalled.suspend()
    caller.wait()
    assert caller.status == 502
    assert '"code":"engine_stalled"' in caller.text
    until(lambda: not psutil.pid_exists(stalled.pid), what="the stalled engine is gone")
    wait_ready(service, 1)
    after = Caller(service, SHORT)
    after.wait()
    assert after.status == 200


def test_a_call_outlives_the_broker(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    apart.lend("node")
    wait_ready(service, 1)
    caller = Caller(service, ENDLESS | {"max_tokens": 200})
    until(lambda: service.nodes()[0]["offers"][0]["slots_free"] < 8, what="the call is in the engine")
    broker = apart.parts["hub"].child("nats-server")
    broker.kill()
    caller.wait()
    assert (caller.status, caller.headers["fallow-attempts"]) == (200, "2"), caller.text
    again = apart.parts["hub"].child("nats-server")
    assert again.pid != broker.pid

    def answers() -> bool:
        answer = service.post({"model": MODEL, "prompt": "Hello", "max_tokens": 2}, "/completions")
        return bool(answer.status_code == 200)

    until(answers, what="an answer after the broker's return")


def test_a_gateway_killed_does_not_leave_the_engine_working(apart: Apart) -> None:
    """The node gives the attempt up once the gateway's lease has run out."""
    service = apart.start_hub_and_gateway()
    node = apart.lend("node")
    wait_ready(service, 1)
    stream = service.post(ENDLESS | {"stream": True, "max_tokens": 8_000}, "/completions", stream=True)
    assert stream.status_code == 200
    apart.parts["gateway"].process.send_signal(signal.SIGKILL)
    engine = node.engine()

    def idle() -> bool:
        before = engine.cpu_times()
        threading.Event().wait(0.5)
        return bool(engine.cpu_times().user - before.user < 0.05)

    until(idle, within_s=25, what="the engine rests")

"""What callers say and are told is found nowhere: not on the wire, not in a file, not in a log that has everything."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from running import Apart, Service
from test_hostile_broker import Wild
from test_identity import told
from test_processes import LOUD
from test_rolling import MODEL

CANARY = "zanzibarcanary7261"
"""Nothing that encodings change, so that it looks the same in JSON, MessagePack and plain text."""
ECHO = {"echo": "yes"}
TOOL = {
    "type": "function",
    "function": {"name": CANARY, "description": CANARY, "parameters": {"type": "object", "properties": {CANARY: {"type": "string"}}}},
}


class Watched(Wild):
    """Everything logs all it can, and all that passes the broker is kept."""

    def begin(self) -> None:
        super().begin()
        self.relay.captured = bytearray()

    def files(self) -> Iterator[Path]:
        return (path for path in self.folder.rglob("*") if path.is_file())

    @property
    def wire(self) -> bytes:
        """All that gateways and nodes said and heard, as it was on the wire."""
        assert self.relay.captured is not None
        return bytes(self.relay.captured)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(LOUD), os.environ.get("PYTHONPATH", "")])))
    site = Watched(tmp_path)
    try:
        site.start()
        yield site
    finally:
        site.stop()


def say_it(site: Watched) -> None:
    """In every part of a call, and in calls that are refused."""
    service = site.services[0]
    said = [{"role": "user", "content": f"Say {CANARY} again."}]
    body = {"model": MODEL, "messages": said, "metadata": ECHO}
    padded = told("keys", "create", "--privacy", "padded", "--json", "--data", str(site.folder / "hub"))
    for asked in (service, Service(service.base_url, msgspec.json.decode(padded)["secret"], {})):
        for changed in ({}, {"stream": True}, {"tools": [TOOL]}, {"user": CANARY}):
            answer = asked.post(body | changed)
            assert answer.status_code == 200, answer.text
            assert answer.text.count(CANARY) == 1
    large = msgspec.json.encode(body | {"messages": [{"role": "system", "content": CANARY}, *said]}) + b" " * 400_000
    assert CANARY in service.post(large).text
    embedded = service.post({"model": MODEL, "input": [CANARY, f"and {CANARY}"]}, "/embeddings")
    assert embedded.status_code == 200, embedded.text
    assert service.post(body | {"max_tokens": CANARY}).status_code == 400
    assert service.post(f"{{{CANARY}".encode()).status_code == 400
    assert service.post(body | {"model": f"no-{CANARY}"}).status_code == 404
    assert service.post(body | {"metadata": {"chunks": CANARY}}).status_code == 400, "the engine itself refuses it"


def test_what_is_said_is_found_nowhere(watched: Watched) -> None:
    say_it(watched)
    assert watched.engine.calls >= 10
    key = watched.services[0].key
    Apart.stop(watched)  # all but the broker
    # That all is looked at is shown by what may be seen.
    assert MODEL.encode() in watched.wire
    assert b"rsp." in watched.wire
    for name in ("gateway1", "node1", "node2", "hub"):
        assert "everything is logged" in watched.parts[name].said(), name
    assert "attempt done" in watched.parts["node1"].said() + watched.parts["node2"].said()
    assert any(path.name == "hub.db" for path in watched.files())

    assert CANARY.encode() not in watched.wire
    assert key.encode() not in watched.wire
    assert [path for path in watched.files() if CANARY.encode() in path.read_bytes()] == []
    assert [path.name for path in watched.files() if key.encode() in path.read_bytes()] == ["key"]

"""Starting and stopping, as somebody at a terminal does it."""

import json
import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
from running import MODEL, Running, Service, fallow, start_up, until

LOUD = Path(__file__).parents[1] / "helpers" / "loud"


def all_gone(family: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_a_signal_stops_everything(weights: None, tmp_path: Path, number: signal.Signals, code: int) -> None:
    up = start_up(tmp_path / "d").parts["up"]
    family = up.family()
    assert len(family) >= 6, "up, hub, broker, gateway, node, engine"
    up.process.send_signal(number)
    assert up.process.wait(10) == code
    assert all_gone(family)
    leftovers = [path.name for path in (tmp_path / "d").rglob("*") if path.name.startswith(".") or path.suffix in (".sock", ".part")]
    assert leftovers == []
    assert not (tmp_path / "d" / "gateway.json").exists()


def test_killed_without_a_word_nothing_is_left(weights: None, tmp_path: Path) -> None:
    up = start_up(tmp_path / "d").parts["up"]
    family = up.family()
    up.process.kill()
    up.process.wait()
    until(lambda: all_gone(family), within_s=10, what="the end of every process")
    start_up(tmp_path / "d").parts["up"].stop()  # and the folder serves again


def test_a_second_up_says_so_in_one_line(service: Service) -> None:
    data = service.parts["up"].data
    second = fallow("up", "--data", str(data), "--port", "0")
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "already runs" in second.stderr
    assert service.get("/healthz").status_code == 200


def test_a_taken_port_says_so_in_one_line(service: Service, tmp_path: Path) -> None:
    port = service.root.rpartition(":")[2]
    second = fallow("up", "--data", str(tmp_path / "d"), "--port", port)
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert f"port {port}" in second.stderr


def test_secrets_are_for_their_owner_only(service: Service) -> None:
    data = service.parts["up"].data
    assert stat.S_IMODE(data.stat().st_mode) & 0o077 == 0 or data.stat().st_mode
    for name in ("key", "invitation", "hub.db", "gateway.json", "settings.toml", "broker/broker.conf", "identity/node.nk"):
        assert stat.S_IMODE((data / name).stat().st_mode) == 0o600, name
    for process in service.parts["up"].family():
        words = " ".join(process.cmdline())
        assert service.key not in words
        assert (data / "invitation").read_text().strip() not in words


def test_status_and_nodes(service: Service) -> None:
    data = str(service.parts["up"].data)
    status = json.loads(fallow("status", "--json", "--data", data).stdout)
    assert status["base_url"] == service.base_url
    assert status["api_key"] == service.key
    assert status["nodes"][0]["offers"][0]["model"] == MODEL
    listed = json.loads(fallow("nodes", "--json", "--data", data).stdout)
    assert [node["node_id"] for node in listed] == [node["node_id"] for node in status["nodes"]]
    shown = fallow("status", "--data", data)
    assert service.base_url in shown.stdout
    assert status["nodes"][0]["node_id"][:12] in shown.stdout


def test_chat_streams_and_reads_standard_input(service: Service) -> None:
    data = str(service.parts["up"].data)
    said = fallow("chat", "--data", data, "--max-tokens", "8", "Say hello.")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    piped = fallow("chat", "--data", data, "--max-tokens", "8", stdin="Say hello.")
    assert piped.returncode == 0, piped.stderr
    nothing = fallow("chat", "--data", data, stdin="")
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)


def test_ephemeral_leaves_nothing(weights: None, tmp_path: Path) -> None:
    up = Running(tmp_path / "unused", "up", "--port", "0", "--ephemeral")
    assert up.process.wait(20) == 2, "an ephemeral folder and a named one contradict each other"
    assert "--ephemeral" in up.said()


def test_prompts_and_keys_reach_no_log(weights: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(LOUD), os.environ.get("PYTHONPATH", "")])))
    service = start_up(tmp_path / "d", "--verbose")
    canary = "zanzibar-canary-7261"
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"Repeat: {canary}"}], "max_tokens": 16}
    assert service.post(body).status_code == 200
    assert service.post(body | {"messages": [{"role": canary, "content": canary}]}).status_code == 400
    assert service.post(body | {"stream": True}).status_code == 200
    assert service.get("/metrics").status_code == 200
    service.parts["up"].stop()
    greeted = service.parts["up"].said()
    assert all("everything is logged" in (tmp_path / "d" / "logs" / f"{part}.log").read_text() for part in ("hub", "gateway", "lend"))
    assert canary not in greeted
    for path in (tmp_path / "d").rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert canary.encode() not in text, path
            assert path.name == "key" or service.key.encode() not in text, path

"""The `fallow` command: what it says, how it fails, and how quickly it is there."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

import fallow
from fallow.adapters.catalogue import package
from fallow.adapters.files import only_one
from fallow.cli.main import app
from fallow.wire import invitation

COMMANDS = ["up", "hub", "gateway", "lend", "chat", "nodes", "status", "models", "version"]
MODELS_COMMANDS = ["list", "show", "pull", "add", "rm", "verify"]
HEAVY = ["litestar", "nats", "uvicorn", "uvloop", "requests", "pypi_simple", "prometheus_client", "xllamacpp", "msgspec", "asyncio"]
WITHIN_S = 60.0


@pytest.fixture(autouse=True)
def nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets the settings or the processes of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("FALLOW_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Result:
    """A command, within this process."""
    return CliRunner().invoke(app, list(arguments))


def spawn(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command as a process of its own."""
    return subprocess.run([sys.executable, "-m", "fallow", *arguments], capture_output=True, text=True, timeout=WITHIN_S)


def complaint(result: Result, code: int = 1) -> str:
    """The one line with which a command failed."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("fallow: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.strip()


class Page(BaseHTTPRequestHandler):
    """Whatever the test wants to be answered."""

    answers: dict[str, tuple[int, bytes]]
    asked: list[tuple[str, str]]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for failures."""

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("authorization", "")))
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, body = self.answers.get(self.path, (404, b"{}"))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


@pytest.fixture
def page() -> Iterator[tuple[str, type[Page]]]:
    """A server that plays a gateway: its address, and what it answers."""

    class Here(Page):
        answers: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012
        asked: list[tuple[str, str]] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Here
    server.shutdown()
    thread.join()
    server.server_close()


# help
def test_help_lists_the_commands() -> None:
    said = spawn("--help")
    assert said.returncode == 0
    assert said.stderr == ""
    words = {line.split()[0] for line in said.stdout.splitlines() if line.startswith("  ") and line.strip()}
    assert set(COMMANDS) <= words


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), *(["models", name] for name in MODELS_COMMANDS)])
def test_every_command_explains_itself(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert "ready-fd" not in result.stdout, "that is between our own processes"


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["fallow", "--help"]
from fallow.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code, *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S)
    assert said.stderr.split() == ["0"]


def test_the_version() -> None:
    assert (spawn("version").stdout, run("version").exit_code) == (f"{fallow.__version__}\n", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["hub", "--nonsense"],
        ["hub", "too much"],
        ["gateway", "--port", "many"],
        ["gateway", "--port"],
        ["models"],
        ["models", "nonsense"],
        [],
    ],
)
def test_wrong_use_is_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output or "Error: " in result.output


def test_flags_that_contradict_each_other(tmp_path: Path) -> None:
    assert "--ephemeral" in complaint(run("up", "--ephemeral", "--data", str(tmp_path)), code=2)


# settings
@pytest.mark.parametrize("command", ["up", "hub", "gateway", "lend"])
def test_a_bad_settings_file_is_one_line_that_names_the_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "settings.toml").write_text('[gateway]\n\nport = "x"\n')
    said = complaint(run(command, "--data", str(tmp_path)))
    assert f"{tmp_path / 'settings.toml'}, line 3: gateway.port: " in said
    assert "int" in said


def test_a_bad_settings_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[hub\n")
    said = spawn("hub", "--data", str(tmp_path))
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (1, "", 1)
    assert "line 1" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["gateway", "--port", "70000"], "--port"),
        (["hub", "--listen", "nowhere"], "--listen"),
        (["lend", "--slots", "-1"], "--slots"),
        (["lend", "--threads", "5000"], "--threads"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_the_flag(tmp_path: Path, arguments: list[str], flag: str) -> None:
    assert complaint(run(*arguments, "--data", str(tmp_path)), code=2).startswith(f"fallow: {flag}: ")


# nothing there
@pytest.mark.parametrize("command", [["status"], ["nodes"], ["status", "--json"], ["chat", "hello"]])
def test_without_a_gateway_it_is_one_line(tmp_path: Path, command: list[str]) -> None:
    assert "fallow up" in complaint(run(*command, "--data", str(tmp_path)))


def test_status_in_a_process_of_its_own(tmp_path: Path) -> None:
    said = spawn("status", "--data", str(tmp_path / "nothing"))
    assert (said.returncode, said.stdout, said.stderr.count("\n")) == (1, "", 1)
    assert not (tmp_path / "nothing").exists(), "looking makes nothing"


def test_what_a_gateway_that_was_killed_left_behind_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "gateway.json").write_text('{"base_url":"http://127.0.0.1:9/v1"}')
    (tmp_path / "gateway.lock").write_text("1\n")
    assert "no gateway runs here" in complaint(run("status", "--data", str(tmp_path)))


@pytest.mark.parametrize("command", ["gateway", "lend"])
def test_without_an_invitation_it_is_one_line(tmp_path: Path, command: str) -> None:
    said = spawn(command, "--data", str(tmp_path))
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)
    assert "--join TOKEN" in said.stderr


def test_an_engine_whose_address_is_none(tmp_path: Path) -> None:
    said = spawn("lend", "--data", str(tmp_path), "--engine", "ftp://there")
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "--engine" in said.stderr


def test_an_unknown_model(tmp_path: Path) -> None:
    said = complaint(run("models", "pull", "giant", "--data", str(tmp_path)))
    assert "giant" in said
    assert "`fallow models list`" in said, "it says where to see what there is"


# a gateway is there
STATUS = b'{"gateway_id":"gw-1","version":"9","broker_up":true,"calls_under_way":2,"nodes":1}'
NODE = {
    "node_id": "node-1",
    "org_id": "home",
    "state": "run",
    "hardware": "cpu 4x avx2",
    "isolation": "none",
    "region": "here",
    "heard_ms_ago": 1200,
    "offers": [{"model": "tiny", "readiness": "ready", "slots": 4, "slots_free": 3, "waiting": 0, "context_tokens": 2048}],
}
NODES = json.dumps({"nodes": [NODE]}).encode()


def test_status_and_nodes_of_a_gateway(page: tuple[str, type[Page]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, here = page
    here.answers.update({"/fallow/status": (200, STATUS), "/fallow/nodes": (200, NODES)})
    monkeypatch.setenv("FALLOW_API_KEY", "fk-1")
    monkeypatch.setenv("FALLOW_BASE_URL", url)
    shown = run("status")
    assert shown.exit_code == 0
    for word in (url, "fk-1", "gw-1", "2 calls", "node-1", "tiny", "ready", "cpu 4x avx2"):
        assert word in shown.stdout
    document = json.loads(run("status", "--json").stdout)
    assert (document["base_url"], document["api_key"], document["gateway"]["nodes"]) == (url, "fk-1", 1)
    assert json.loads(run("nodes", "--json").stdout) == [NODE]
    assert set(here.asked) == {("/fallow/status", "Bearer fk-1"), ("/fallow/nodes", "Bearer fk-1")}
    here.answers["/fallow/nodes"] = (200, b'{"nodes":[]}')
    assert "fallow lend" in run("nodes").stdout


def test_the_gateway_on_the_data_folder_is_found(page: tuple[str, type[Page]], tmp_path: Path) -> None:
    url, here = page
    here.answers.update({"/fallow/nodes": (200, NODES)})
    (tmp_path / "gateway.json").write_text(json.dumps({"base_url": url}))
    (tmp_path / "key").write_text("fk-2\n")
    with only_one(tmp_path, "gateway"):
        assert json.loads(run("nodes", "--json", "--data", str(tmp_path)).stdout) == [NODE]
    assert here.asked == [("/fallow/nodes", "Bearer fk-2")]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b'{"error":{"message":"nobody knows this API key"}}', "nobody knows this API key"),
        (503, b'{"error":{"message":"two\\nlines"}}', "lines"),
        (500, b"<html>", "can't be read"),
        (500, b'{"error":"text"}', "can't be read"),
        (500, b"[]", "can't be read"),
    ],
)
def test_what_a_gateway_refuses_is_one_line(page: tuple[str, type[Page]], status: int, body: bytes, words: str) -> None:
    url, here = page
    here.answers["/fallow/status"] = (status, body)
    assert words in complaint(run("status", "--base-url", url))


@pytest.mark.parametrize("command", [["status"], ["nodes"], ["chat", "hello"]])
def test_what_is_no_gateway_is_one_line(page: tuple[str, type[Page]], command: list[str]) -> None:
    url, here = page
    here.answers = dict.fromkeys(("/fallow/status", "/fallow/nodes", "/v1/models"), (200, b"<html>"))
    complaint(run(*command, "--base-url", url))


def test_an_address_where_nobody_is_or_that_is_none() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert "could not reach" in complaint(run("status", "--base-url", f"http://127.0.0.1:{held.getsockname()[1]}"))
    assert "should look like" in complaint(run("status", "--base-url", "somewhere"))
    assert "should look like" in complaint(run("chat", "hello", "--base-url", "somewhere"), code=2)


def test_no_proxy_stands_between_us_and_this_machine(page: tuple[str, type[Page]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, here = page
    here.answers["/fallow/nodes"] = (200, NODES)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert json.loads(run("nodes", "--json", "--base-url", url).stdout) == [NODE]


OFFERED = b'{"object":"list","data":[{"id":"tiny","object":"model","created":0,"owned_by":"fallow"}]}'


def stream(*texts: str, end: bytes = b"data: [DONE]\n\n") -> bytes:
    events = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in texts]
    return b"".join(b"data: %s\n\n" % event.encode() for event in events) + end


@pytest.mark.parametrize(
    ("answer", "code", "stdout", "stderr"),
    [
        (stream("Hel", "lo"), 0, "Hello\n", ""),
        (stream("Hel", end=b'data: {"error":{"message":"it broke"}}\n\n'), 1, "Hel\n", "fallow: it broke\n"),
        (stream("Hel", end=b""), 1, "Hel\n", "fallow: the answer was cut off\n"),
    ],
)
def test_chat_writes_what_comes(page: tuple[str, type[Page]], answer: bytes, code: int, stdout: str, stderr: str) -> None:
    url, here = page
    here.answers = {"/v1/models": (200, OFFERED), "/v1/chat/completions": (200, answer)}
    result = run("chat", "hello", "--base-url", url)
    assert (result.exit_code, result.stdout, result.stderr) == (code, stdout, stderr)


def test_chat_where_nothing_is_offered(page: tuple[str, type[Page]]) -> None:
    url, here = page
    here.answers = {"/v1/models": (200, b'{"data":[]}')}
    assert "is offered now" in complaint(run("chat", "hello", "--base-url", url))
    assert "say something" in complaint(run("chat", " ", "--base-url", url), code=2)


# the catalogue
def test_the_models_as_a_table_and_as_json() -> None:
    listed = json.loads(run("models", "list", "--json").stdout)
    assert [model["name"] for model in listed] == [weights.name for weights in package()]
    assert all(model["licence"]["name"] for model in listed)
    assert all(model["size_bytes"] > 0 for model in listed if model["checksum"] == "pinned")
    assert {model["checksum"] for model in listed} == {"pinned", "unknown"}
    assert all((model["sha256"] is None) == (model["checksum"] == "unknown") for model in listed)
    table = run("models", "list")
    assert table.exit_code == 0
    assert all(weights.name in table.stdout.split() for weights in package()), "whole names"


# a hub
class Hub:
    """`fallow hub` as a process."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.output = data.parent / "hub.out"
        reader, writer = os.pipe()
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fallow", "hub", "--data", str(data), "--ready-fd", str(writer), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
            )
        os.close(writer)
        with os.fdopen(reader) as said:
            line = said.readline()
        assert line, self.output.read_text()
        self.ready: dict[str, Any] = json.loads(line)

    def said(self) -> list[str]:
        return self.output.read_text().splitlines()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WITHIN_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    """Starts a hub that ends with the test."""
    hubs: list[Hub] = []

    def begin(*arguments: str) -> Hub:
        hubs.append(Hub(tmp_path / "d", *arguments))
        return hubs[-1]

    yield begin
    for hub in hubs:
        if hub.process.poll() is None:
            hub.process.kill()
            hub.process.wait()


def test_a_hub_that_listens_on_all_addresses_speaks_tls_and_stops_cleanly(start: Callable[..., Hub], tmp_path: Path) -> None:
    hub = start("--listen", "0.0.0.0:0")
    broker = [child for child in psutil.Process(hub.process.pid).children() if "nats-server" in " ".join(child.cmdline())]
    assert len(broker) == 1
    assert hub.ready["address"].startswith("tls://")
    assert hub.said() == []
    began = time.monotonic()
    assert hub.stop() == 0
    assert time.monotonic() - began < 3
    assert hub.said() == [], "it ends without a word"
    assert not broker[0].is_running()


def test_a_hub_on_this_machine_only_says_nothing(start: Callable[..., Hub], tmp_path: Path) -> None:
    hub = start("--listen", "127.0.0.1:0")
    assert hub.ready["address"].startswith("nats://127.0.0.1:")
    assert hub.ready["pid"] == hub.process.pid
    assert (tmp_path / "d" / "key").read_text().startswith("fk-")
    second = spawn("hub", "--data", str(tmp_path / "d"), "--listen", "127.0.0.1:0")
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert f"pid {hub.process.pid}" in second.stderr
    port = hub.ready["address"].rpartition(":")[2]
    third = spawn("hub", "--data", str(tmp_path / "other"), "--listen", f"127.0.0.1:{port}")
    assert (third.returncode, third.stderr.count("\n")) == (1, 1)
    assert port in third.stderr
    assert hub.stop(signal.SIGINT) == 130
    assert hub.said() == []


def test_the_key_and_the_invitations_word_stay_the_same(start: Callable[..., Hub], tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        hub = start("--listen", "127.0.0.1:0")
        kept.append([(tmp_path / "d" / "key").read_text(), invitation.read((tmp_path / "d" / "invitation").read_text()).word])
        assert hub.stop() == 0
    assert kept[0] == kept[1]
    assert len(set(kept[0])) == 2

"""A lender's machine with real engines: stopped, let go, freed and told about, as its owner wants it."""

import concurrent.futures
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from running import MODEL, Apart, Running, Service, fallow, node_id_of, until, wait_ready

LIMITS = """
[lend]
measure = false
profile = "invisible"
resume_after_s = {resume_s}
input_idle_s = 0
on_battery = true
battery_percent_min = 0
others_percent_max = {others}
"""
BURN = "while True: pass"
LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a very long story about a river."}],
    "max_tokens": 2000,
}


class Lender:
    """A node and its owner."""

    def __init__(self, apart: Apart, service: Service, name: str, *, others: float = 100, resume_s: float = 0, more: str = "") -> None:
        self.service = service
        self.settings = apart.folder / name / "settings.toml"
        (apart.folder / name).mkdir()
        self.text = LIMITS.format(others=others, resume_s=resume_s) + more
        self.settings.write_text(self.text)
        flags = ["--hub", apart.hub_address, "--join-file", str(apart.folder / "hub" / "invitation")]
        self.node = apart.parts[name] = Running(apart.folder / name, "lend", *flags)
        self.data = str(apart.folder / name)

    def status(self) -> dict[str, Any]:
        said = fallow("lend", "status", "--json", "--data", self.data)
        assert said.returncode == 0, said.stderr
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in fallow("lend", "log", "--json", "--data", self.data).stdout.splitlines()]

    def state(self) -> str:
        """As the gateway knows it."""
        return next((node["state"] for node in self.service.nodes() if node["node_id"] == self.node_id), "gone")

    @property
    def node_id(self) -> str:
        return node_id_of(Path(self.data))

    def ready(self) -> None:
        until(lambda: self.service.readiness().get(self.node_id) == "ready", what="the engine")

    def is_stopped(self) -> bool:
        """Every process of the engine, bubblewrap's too."""
        return all(one.status() == psutil.STATUS_STOPPED for one in self.engines())

    def engines(self) -> list[psutil.Process]:
        found = [
            one for one in psutil.Process(self.node.process.pid).children(recursive=True) if "fallow.engines" in " ".join(one.cmdline())
        ]
        assert found, "there is an engine"
        return found


@pytest.fixture
def service(apart: Apart) -> Service:
    return apart.start_hub_and_gateway()


@pytest.fixture
def lender(apart: Apart, service: Service) -> Lender:
    found = Lender(apart, service, "lender")
    found.ready()
    return found


@pytest.fixture
def burst() -> Iterator[list[subprocess.Popen[bytes]]]:
    """The owner's own work; started by the test, ended here."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def burn(burst: list[subprocess.Popen[bytes]]) -> None:
    burst += [subprocess.Popen([sys.executable, "-I", "-S", "-c", BURN]) for _ in range(os.cpu_count() or 1)]


def test_the_owners_pause_stops_the_engine_and_their_word_lets_it_go(lender: Lender) -> None:
    assert lender.status()["state"] in ("run", "throttle")
    said = fallow("pause", "2h", "--data", lender.data)
    assert said.returncode == 0, said.stderr
    assert "Paused until" in said.stdout
    assert lender.is_stopped(), "when the command returns, it is done"
    until(lambda: lender.state() == "pause", what="the word at the gateway")
    status = lender.status()
    assert (status["state"], status["reason"], status["cores"]) == ("pause", "owner_paused", 0)
    assert status["until"] is not None
    refused = lender.service.post(LONG | {"max_tokens": 4})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_node")
    assert "owner" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    resumed = fallow("resume", "--data", lender.data)
    assert resumed.returncode == 0, resumed.stderr
    assert not lender.is_stopped()
    until(lambda: lender.state() in ("run", "throttle"), what="the word at the gateway")
    assert lender.service.post(LONG | {"max_tokens": 4}).status_code == 200
    shown = fallow("lend", "log", "--data", lender.data).stdout
    assert "owner_paused: you paused it" in shown
    assert lender.status()["today"]["pauses"] == 1


def test_a_pause_outlives_the_node(lender: Lender, apart: Apart) -> None:
    fallow("pause", "--data", lender.data)
    lender.node.stop()
    offline = fallow("lend", "status", "--data", lender.data)
    assert (offline.returncode, offline.stderr.count("\n")) == (1, 1)
    again = Running(Path(lender.data), "lend", "--hub", apart.hub_address, "--join-file", str(apart.folder / "hub" / "invitation"))
    apart.parts["lender"] = again
    until(lambda: "Not now: you paused it" in again.said(), what="the word at the start")
    assert lender.status()["reason"] == "owner_paused"
    fallow("resume", "--data", lender.data)
    lender.ready()


def test_a_stream_yields_at_once_and_says_why(lender: Lender) -> None:
    with lender.service.client() as client:
        stream = client.chat.completions.create(stream=True, **LONG)
        next(iter(stream))
        fallow("pause", "--data", lender.data)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
    assert caught.value.code == "stream_interrupted"
    assert "owner" in caught.value.message


def test_a_call_that_has_not_begun_to_answer_moves_to_another_machine(lender: Lender, apart: Apart) -> None:
    service = lender.service
    with service.client() as client:

        def held() -> Any:  # not streamed: nothing goes out before the whole is there
            return client.chat.completions.with_raw_response.create(**(LONG | {"max_tokens": 300}))

        other = Lender(apart, service, "other", more="")
        fallow("pause", "--data", other.data)
        until(lambda: other.state() == "pause", what="the other machine, paused")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(held)
            until(lambda: lender.status()["running"] == 1, what="the call on the first machine")
            fallow("resume", "--data", other.data)
            until(lambda: other.state() in ("run", "throttle"), what="the other machine, back")
            fallow("pause", "--data", lender.data)
            found = answer.result(timeout=60)
    assert found.headers["fallow-node"] == other.node_id
    assert found.headers["fallow-attempts"] == "2"
    assert lender.status()["reason"] == "owner_paused"


def test_the_owners_own_work_stops_it_until_it_is_quiet(apart: Apart, service: Service, burst: list[subprocess.Popen[bytes]]) -> None:
    lender = Lender(apart, service, "lender", others=50, resume_s=1)
    until(lambda: lender.service.readiness().get(lender.node_id) == "ready", what="the engine")
    burn(burst)
    until(lender.is_stopped, what="the stop")
    assert lender.status()["reason"] == "cpu_busy"
    for one in burst:
        one.kill()
        one.wait()
    burst.clear()
    until(lambda: not lender.is_stopped(), what="going on")
    reasons = [entry["reason"] for entry in lender.log()]
    assert "cpu_busy" in reasons


def test_a_change_of_the_settings_is_in_force_at_once_and_a_bad_one_is_not(lender: Lender) -> None:
    lender.settings.write_text(lender.text.replace("measure = false", 'measure = false\nhours = "0:00-0:01, 0:02-0:03"'))
    closed = time.strftime("%H:%M") not in ("00:00", "00:02")
    until(lambda: not closed or lender.status()["reason"] == "hours", what="the new hours")
    lender.settings.write_text(lender.text + 'cores = "many"\n')
    until(lambda: lender.status()["settings_error"], what="the complaint")
    status = lender.status()
    assert f"line {len(lender.text.splitlines()) + 1}" in status["settings_error"]
    assert not closed or status["reason"] == "hours", "the old ones are in force"
    lender.settings.write_text(lender.text + "refuse_kinds = ['text']\n[node]\nslots = 3\n")
    until(lambda: lender.status()["settings_error"] == "" and lender.status()["state"] in ("run", "throttle"), what="the good file")
    assert lender.status()["needs_restart"] == ["node.slots"]
    until(lambda: not lender.service.readiness(), what="an offer that is withdrawn")
    assert lender.service.post(LONG).json()["error"]["code"] == "no_node", "nothing is offered any more"


def test_callers_whom_the_lender_refuses_are_told(apart: Apart, service: Service) -> None:
    lender = Lender(apart, service, "lender", more='refuse_organisations = ["home"]\n')
    lender.ready()
    refused = service.post(LONG)
    assert refused.status_code == 400
    assert "lenders don't work for this organisation" in refused.json()["error"]["message"]


def test_little_memory_frees_the_engine(lender: Lender) -> None:
    before = lender.engines()
    lender.settings.write_text(lender.text + "memory_free_percent_min = 100\n")
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in before), what="the engine's end")
    assert lender.status()["state"] == "leave"
    until(lambda: lender.state() == "pause", what="the word at the gateway")
    refused = lender.service.post(LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_node"), "the model is still known here"


def test_the_commands_tell_a_wrong_time_and_a_missing_node_in_one_line(tmp_path: Path) -> None:
    data = str(tmp_path / "d")
    wrong = fallow("pause", "soon", "--data", data)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "2h" in wrong.stderr
    none = fallow("pause", "10m", "--data", data)
    assert none.returncode == 0
    assert "No node runs here" in none.stdout
    assert stat.S_IMODE((tmp_path / "d" / "owner" / "pause.json").stat().st_mode) == 0o600
    assert fallow("resume", "--data", data).returncode == 0
    assert fallow("lend", "status", "--data", data).returncode == 1
    assert "nothing yet" in fallow("lend", "log", "--data", data).stdout


def test_an_agent_that_is_killed_leaves_no_engine_even_a_stopped_one(lender: Lender) -> None:
    fallow("pause", "--data", lender.data)
    engines = lender.engines()
    lender.node.process.kill()
    lender.node.process.wait()
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in engines), what="the engine's end")


def test_a_lender_without_any_pause_serves_as_before(lender: Lender) -> None:
    wait_ready(lender.service, 1)
    assert lender.service.post(LONG | {"max_tokens": 4}).status_code == 200
    assert lender.status()["today"]["calls"] >= 1


def test_a_machine_that_slept_comes_back_by_itself(lender: Lender) -> None:
    """Agent and engine stand still as in a machine that sleeps, for longer than the network waits."""
    family = [psutil.Process(lender.node.process.pid), *lender.engines()]
    for one in family:
        one.suspend()
    until(lambda: lender.state() == "gone", what="the node off the roster")
    for one in reversed(family):
        one.resume()
    lender.ready()
    assert lender.service.post(LONG | {"max_tokens": 4}).status_code == 200


def test_an_owner_is_obeyed_on_a_full_disk_too(lender: Lender) -> None:
    resource.prlimit(lender.node.process.pid, resource.RLIMIT_FSIZE, (0, 0))  # as if not a byte could be written
    said = fallow("pause", "--data", lender.data)
    assert said.returncode == 0, said.stderr
    assert lender.is_stopped()
    assert lender.status()["reason"] == "owner_paused"
    assert fallow("resume", "--data", lender.data).returncode == 0
    assert not lender.is_stopped()

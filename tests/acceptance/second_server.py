"""A real second server, llama.cpp's own, as a lender may have it."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from running import MODEL, until

from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.store import Store
from fallow.apps.settings import Settings

LENT = "house-model"
SERVER = """
import os, sys, threading, xllamacpp

_, weights, port, alias, key, prefix = sys.argv
params = xllamacpp.CommonParams()
params.model.path = weights
params.model_alias = {alias}
params.hostnames = ["127.0.0.1"]
params.port = int(port)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_parallel = 2
params.n_ctx = 2048
params.verbosity = 0
params.ui = False
params.api_prefix = prefix
if key:
    params.api_keys = [key]
server = xllamacpp.Server(params)
sys.stdin.read()  # whoever started us has ended
os._exit(0)
"""


class Second:
    """llama.cpp on a port of its own, as a lender may have it. `sk-…` and a path before /v1, if given, are asked of callers."""

    def __init__(self, *, key: str = "", prefix: str = "", alias: str = LENT) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.key = key
        self.prefix = prefix
        self.alias = alias
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}/v1"

    def start(self) -> "Second":
        weights = load_catalogue(Path("nowhere")).find(MODEL)
        path = Store(Settings().models_folder).path(weights.name, weights.files[0])
        arguments = [sys.executable, "-c", SERVER, str(path), str(self.port), self.alias, self.key, self.prefix]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, what="the second server")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the second server died"
        try:
            return requests.get(self.url + "/models", headers={"authorization": f"Bearer {self.key}"}, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.kill()
            self.process.stdin.close()
            self.process.wait()
            self.process = None


@pytest.fixture
def second(weights: None) -> Iterator[Callable[..., Second]]:
    started: list[Second] = []

    def start(**options: str) -> Second:
        started.append(Second(**options))
        return started[-1].start()

    yield start
    for one in started:
        one.kill()

"""Sets up LiteLLM's proxy in an environment of its own, in front of the stub engine, and measures it beside whatever else is given."""

import asyncio
import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from bench.children import ROOT, running, running_stub
from bench.compare import PASSES, Endpoint, Speed, compare
from bench.load import chat_body, closed_loop

VENV = ROOT / ".peers"
REQUIREMENTS = ROOT / "bench" / "peers_requirements.txt"
INSTALL_S = 900
START_S = 180.0
POLL_S = 0.5
LOG_BYTES_SHOWN = 2000
MODEL = "stub"
MASTER_KEY = "sk-bench-peers"

DIRECT = "direct"
LITELLM = "LiteLLM"

Server = Literal["uvicorn", "granian"]


def litellm_version() -> str:
    """Read the release off the pins."""
    pins = dict(line.split("==", 1) for line in REQUIREMENTS.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return pins["litellm"]


def install() -> None:
    """Make the environment once; it is made anew only when the pins change."""
    stamp = VENV / "installed.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing LiteLLM {litellm_version()} into {VENV} (about a minute)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, timeout=INSTALL_S)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True, timeout=INSTALL_S)
    stamp.write_text(wanted)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def config_of(engine_url: str) -> bytes:
    """Point one model at the engine; JSON is YAML enough for LiteLLM."""
    return msgspec.json.encode(
        {
            "model_list": [
                {
                    "model_name": MODEL,
                    "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{engine_url}/v1", "api_key": "unused"},
                }
            ],
            "litellm_settings": {"num_retries": 0},
            "general_settings": {"master_key": MASTER_KEY},
        }
    )


def environment_of(home: Path) -> dict[str, str]:
    """Keep the proxy from anything of this user's, from fetching its lists over the network, and from logging."""
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
        "LITELLM_LOCAL_BLOG_POSTS": "True",
        "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
        "LITELLM_LOCAL_AUTOROUTER_PRESETS": "True",
        "LITELLM_DONT_SHOW_FEEDBACK_BOX": "True",
    }


async def answers(endpoint: Endpoint) -> bool:
    """Try one call; until the proxy listens there is nothing to connect to."""
    answered = False
    try:
        answered = (await closed_loop(endpoint.base_url, endpoint.key, chat_body(endpoint.model), callers=1, calls=1)).failures == 0
    except* ConnectionRefusedError:
        pass
    return answered


async def wait_until_it_answers(endpoint: Endpoint, child: asyncio.subprocess.Process, log_path: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while not await answers(endpoint):
        if child.returncode is not None or time.monotonic() > deadline_s:
            said = log_path.read_bytes()[-LOG_BYTES_SHOWN:].decode(errors="replace")
            raise RuntimeError(f"LiteLLM did not come up (exit status {child.returncode}); its last words:\n{said}")
        await asyncio.sleep(POLL_S)


@contextlib.asynccontextmanager
async def running_litellm(engine_url: str, *, server: Server = "uvicorn") -> AsyncIterator[Endpoint]:
    """Run the proxy with one worker in front of the engine, and stop it at the end."""
    install()
    with tempfile.TemporaryDirectory(prefix="fallow-peers-") as name:
        home = Path(name)
        (home / "config.yaml").write_bytes(config_of(engine_url))
        port = free_port()
        argv = [str(VENV / "bin" / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        if server == "granian":
            argv.append("--run_granian")
        endpoint = Endpoint(base_url=f"http://127.0.0.1:{port}", key=MASTER_KEY, model=MODEL)
        log_path = home / "litellm.log"
        with log_path.open("wb") as log:
            async with running(*argv, output=log, environment=environment_of(home), folder=home) as child:
                await wait_until_it_answers(endpoint, child, log_path)
                yield endpoint


async def measure_litellm(
    beside: Mapping[str, Endpoint] | None = None, *, passes: int = PASSES, server: Server = "uvicorn"
) -> dict[str, Speed]:
    """Measure the bare stub engine, LiteLLM in front of it and the endpoints in `beside`, in turns, under the same load."""
    async with running_stub() as engine_url, running_litellm(engine_url, server=server) as litellm:
        direct = Endpoint(base_url=engine_url, key="unused", model=MODEL)
        return await compare({DIRECT: direct, LITELLM: litellm, **(beside or {})}, passes=passes)

"""What a lender feels of lending: their own work with and without, how quickly engines stop for them, and what that costs the network."""

import argparse
import asyncio
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import psutil

from bench.chain import Chain, running_parts
from bench.children import running
from bench.load import percentile, run
from bench.model import tokens_per_s
from bench.report import Figure, publish
from fallow.adapters import engine_process, llama_process, machine
from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.cgroup import NO_CGROUPS
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.jail import NO_JAIL
from fallow.adapters.llama_process import LlamaProcess
from fallow.adapters.measurements import Measurements, build_of, key_of
from fallow.adapters.onnx_process import OnnxProcess
from fallow.adapters.store import Store
from fallow.apps.node.limits import limits_of
from fallow.apps.node.subject import Sources, subject_of
from fallow.apps.settings import load
from fallow.core.sizing import memory_limit, tuned

MODEL = "smollm2-135m-instruct"
OWNER_S = 30.0
OWNER_PAIRS = 2
PROBE_S = 15.0
PROBE_PAIRS = 3
BURSTS = 50
BURST_S_MAX = 3.0
PAUSES = 10
RESUME_S = 1.0
SPEED_PAIRS = 8
SPEED_STREAMS = 4
AGENT_S = 20.0
STATE_POLL_S = 0.002
RETRY_S = 0.5
HEALTH_S = 2.0
NODES_BYTES_MAX = 65_536
SETTLE_S = 2.0
WAIT_S_MAX = 60.0
GATED = f'[lend]\nprofile = "invisible"\nresume_after_s = {RESUME_S}\n'
UNGATED = '[lend]\nprofile = "invisible"\nothers_percent_max = 100\nresume_after_s = 0\n'


@contextlib.asynccontextmanager
async def lender(settings: str) -> AsyncIterator[Chain]:
    """Hub, gateway and a node whose owner set this, with callers who never stop asking."""
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        data = Path(folder) / "d"
        data.mkdir()
        (data / "settings.toml").write_text(settings)
        async with running_parts(data, ["--model", MODEL], model=MODEL, engine="", profile="invisible") as chain:
            await _until_loaded(chain)
            put_elsewhere(chain)
            yield msgspec.structs.replace(chain, engine=str(data))


async def _until_loaded(chain: Chain) -> None:
    """Starting all this is work too, so the gate may have been closed for a moment."""
    gateway = HttpEngine(chain.base_url.removeprefix("http://"), headers={"authorization": f"Bearer {chain.key}"})
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            while True:
                _, said = await gateway.get("/fallow/nodes", HEALTH_S, NODES_BYTES_MAX)
                if b'"readiness":"ready"' in said and b'"state":"pause"' not in said:
                    return
                await asyncio.sleep(RETRY_S)
    finally:
        gateway.close()


@contextlib.asynccontextmanager
async def asked(chain: Chain) -> AsyncIterator[None]:
    """Somebody always wants something of the node."""
    callers = [sys.executable, "-m", "bench.callers", chain.base_url, MODEL]
    async with running(*callers, output=asyncio.subprocess.DEVNULL, talks=True) as process:
        assert process.stdin is not None
        process.stdin.write(f"{chain.key}\n".encode())
        await process.stdin.drain()
        await asyncio.sleep(SETTLE_S)
        yield


def put_elsewhere(chain: Chain) -> None:
    """Broker, hub and gateway stand on other machines in truth: here they get only what the owner's work leaves."""
    for role in ("hub", "gateway"):
        part = psutil.Process(chain.pids[role])
        for process in [part, *part.children(recursive=True)]:
            with contextlib.suppress(OSError):  # where sessions share the processor, each gets as much as the owner's
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            for thread in process.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))


def engine_of(chain: Chain) -> psutil.Process:
    """The engine itself: the innermost process that runs it."""
    found = [one for one in psutil.Process(chain.pids["lend"]).children(recursive=True) if "fallow.engines" in " ".join(one.cmdline())]
    return max(found, key=lambda one: one.cpu_times().user)


class Owner:
    """The owner's own work on all cores."""

    def __init__(self, workers: Sequence[asyncio.subprocess.Process]) -> None:
        self._workers = workers

    async def _ask(self, worker: asyncio.subprocess.Process, seconds: float) -> str:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(f"{seconds}\n".encode())
        await worker.stdin.drain()
        return (await worker.stdout.readline()).decode()

    async def work(self, seconds: float) -> float:
        """What all got done together."""
        return sum(map(float, await asyncio.gather(*(self._ask(worker, seconds) for worker in self._workers))))

    async def probe(self, seconds: float) -> list[float]:
        """How many milliseconds each little piece of work took."""
        return [float(word) for word in (await self._ask(self._workers[0], seconds)).split()]


@contextlib.asynccontextmanager
async def owner(kind: str, count: int) -> AsyncIterator[Owner]:
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for _ in range(count):
            worker = await stack.enter_async_context(
                running(sys.executable, "-m", "bench.foreground", kind, output=asyncio.subprocess.PIPE, talks=True)
            )
            assert worker.stdout is not None
            await worker.stdout.readline()
            workers.append(worker)
        yield Owner(workers)


async def measure_work(kind: str, settings: str) -> float:
    """The owner's throughput while somebody wants the machine, as a part of what it is alone; the median of pairs."""
    shares: list[float] = []
    async with owner(kind, os.cpu_count() or 1) as at_work:
        await at_work.work(1.0)
        for number in range(OWNER_PAIRS):
            alone = 0.0 if number % 2 else await at_work.work(OWNER_S)
            async with lender(settings) as chain, asked(chain):
                beside = await at_work.work(OWNER_S)
            alone = alone or await at_work.work(OWNER_S)
            shares.append(100 * beside / alone)
    return statistics.median(shares)


async def measure_probe() -> float:
    """The worst hundredth of light work beside a running engine, against the same alone, in percent more."""
    more: list[float] = []
    async with owner("probe", 1) as at_work:
        await at_work.probe(1.0)
        for _ in range(PROBE_PAIRS):
            alone = await at_work.probe(PROBE_S)
            async with lender(GATED) as chain, asked(chain):
                beside = await at_work.probe(PROBE_S)
            more.append(100 * (percentile(beside, 99) / percentile(alone, 99) - 1))
    return statistics.median(more)


async def _until(engine: psutil.Process, stopped: bool) -> float:
    """Milliseconds until the engine is stopped, or runs again."""
    began = time.perf_counter()
    while (engine.status() == psutil.STATUS_STOPPED) is not stopped:
        if time.perf_counter() - began > WAIT_S_MAX:
            raise RuntimeError(f"the engine was not {'stopped' if stopped else 'let go'} within {WAIT_S_MAX:g} s")
        await asyncio.sleep(STATE_POLL_S)
    return (time.perf_counter() - began) * 1000


async def measure_stops() -> list[Figure]:
    """Bursts of the owner on all cores, until the engine is stopped."""
    bursts: list[float] = []
    resumed: list[float] = []
    async with lender(GATED) as chain, asked(chain), owner("cpu", os.cpu_count() or 1) as at_work:
        engine = engine_of(chain)
        for _ in range(BURSTS):
            burst = asyncio.create_task(at_work.work(BURST_S_MAX))
            bursts.append(await _until(engine, True))
            await burst
            resumed.append(await _until(engine, False))
            await asyncio.sleep(SETTLE_S / 2)
    return [
        Figure(name=f"owner's burst to engine stopped, median of {BURSTS}", value=statistics.median(bursts), unit="ms", goal=300),
        Figure(name="the same, worst", value=max(bursts), unit="ms", goal=1_000),
        Figure(name=f"quiet to engine running, quiet period {RESUME_S:g} s, median", value=statistics.median(resumed), unit="ms"),
    ]


async def measure_pause() -> list[Figure]:
    """The owner's word, from the start of the command until the engine is stopped."""
    words: list[float] = []
    async with lender(GATED) as chain, asked(chain):
        engine = engine_of(chain)
        for _ in range(PAUSES):
            words.append(await _say(chain, "pause", engine, True))
            await _say(chain, "resume", engine, False)
            await asyncio.sleep(SETTLE_S / 2)
    return [
        Figure(name=f"`fallow pause` to engine stopped, median of {PAUSES}", value=statistics.median(words), unit="ms", goal=200),
        Figure(name="the same, worst", value=max(words), unit="ms"),
    ]


async def _say(chain: Chain, word: str, engine: psutil.Process, stopped: bool) -> float:
    async with running(sys.executable, "-m", "fallow", word, "--data", chain.engine, output=asyncio.subprocess.DEVNULL) as command:
        took = await _until(engine, stopped)
        await command.wait()
    return took


async def measure_speed() -> Figure:
    """The jailed and gated engine of an idle machine against the bare one, each asked directly, in turns."""
    ratios: list[float] = []
    async with lender(GATED) as chain:
        socket = chain.engine + "/engines/e1/e.sock"
        async with bare_engine(chain) as bare:
            for number in range(SPEED_PAIRS + 1):
                rates: dict[str, float] = {}
                ways = [bare, socket]
                for turn, way in enumerate(ways if number % 2 else ways[::-1]):
                    await _until(engine_of(chain), False)  # to the gate the bare engine's work is the owner's
                    await asyncio.sleep(SETTLE_S)
                    first = (2 * number + turn) * SPEED_STREAMS
                    rates[way] = await tokens_per_s(way, "", MODEL, streams=range(first, first + SPEED_STREAMS))
                if number:
                    ratios.append(100 * rates[socket] / rates[bare])
    return Figure(
        name=f"jailed, gated engine ÷ bare one, idle machine, median of {SPEED_PAIRS}",
        value=statistics.median(ratios),
        unit="%",
        goal=95,
        better="higher",
    )


async def measure_agent() -> list[Figure]:
    """What the agent itself uses while its engine is asked past it."""
    async with lender(GATED) as chain:
        agent = psutil.Process(chain.pids["lend"])
        before = agent.cpu_times()
        await asyncio.sleep(AGENT_S)
        after = agent.cpu_times()
        used = 100 * (after.user + after.system - before.user - before.system) / AGENT_S
        return [
            Figure(name="the agent's part of a core", value=used, unit="%", goal=1.0),
            Figure(name="the agent's memory", value=chain.memory_mib("lend") * 1.048576, unit="MB", goal=80),
        ]


@contextlib.asynccontextmanager
async def bare_engine(chain: Chain) -> AsyncIterator[str]:
    """The same engine with the same settings, as a plain process of its own: no jail, no gate, the usual priority."""
    data = Path(chain.engine)
    settings = load(data)
    cores = limits_of(settings, default="invisible", cores_physical=machine.physical_cores(), cores=machine.usable_cpus()).cores_max
    room = memory_limit(memory_free_bytes=machine.free_memory_bytes(), wanted_gb=settings.node.memory_gb)
    sources = Sources(
        store=Store(settings.models_folder),
        folder=data / "bare",
        memory_limit_bytes=room,
        llama=functools.partial(LlamaProcess, jail=NO_JAIL, cgroups=NO_CGROUPS),
        onnx=functools.partial(OnnxProcess, jail=NO_JAIL, cgroups=NO_CGROUPS),
    )
    subject = subject_of(load_catalogue(data).find(MODEL), sources, threads=(cores,))
    key = key_of(machine.read_hardware(), cores)
    measured = Measurements(settings.models_folder).find(key, subject.digest, build_of(subject.engine))
    size = tuned(subject.size, measured.choice) if measured is not None else subject.size
    launch = subject.launch(size)
    assert isinstance(launch, LlamaProcess)
    launch.socket.parent.mkdir(parents=True)
    environment = {**engine_process.ENVIRONMENT, **llama_process.ENVIRONMENT}
    command = [sys.executable, "-m", "fallow.engines.llama"]
    async with running(*command, output=asyncio.subprocess.DEVNULL, environment=environment, talks=True) as engine:
        assert engine.stdin is not None
        engine.stdin.write(msgspec.json.encode(launch.settings) + b"\n")
        await engine.stdin.drain()
        client = HttpEngine(str(launch.socket))
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                while not (launch.socket.exists() and await client.is_healthy(HEALTH_S)):
                    await asyncio.sleep(RETRY_S)
        finally:
            client.close()
        yield str(launch.socket)


async def measure(part: str) -> list[Figure]:
    match part:
        case "work":
            figures: list[Figure] = []
            for kind in ("cpu", "memory"):
                gated, ungated = await measure_work(kind, GATED), await measure_work(kind, UNGATED)
                title = f"owner's {OWNER_S:g} s of {kind} work on all cores, part kept"
                figures.append(Figure(name=f"{title}, gate on", value=gated, unit="%", goal=97, better="higher"))
                figures.append(Figure(name=f"{title}, SCHED_IDLE alone", value=ungated, unit="%", goal=88, better="higher"))
            return figures
        case "probe":
            return [Figure(name="light work beside an engine, p99", value=await measure_probe(), unit="% more", goal=15, aim=4)]
        case "stops":
            return await measure_stops()
        case "pause":
            return await measure_pause()
        case "speed":
            return [await measure_speed()]
        case "agent":
            return await measure_agent()
    raise AssertionError(part)


PARTS = ("agent", "speed", "pause", "stops", "probe", "work")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.owner", description="What a lender feels of lending")
    parser.add_argument("parts", nargs="*", choices=PARTS, default=PARTS)
    for part in parser.parse_args().parts:
        publish(f"owner-{part}", run(measure(part)))


if __name__ == "__main__":
    main()

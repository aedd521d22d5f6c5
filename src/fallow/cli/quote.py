"""`fallow quote` and `fallow why`: what a call would cost and where, and why one went where it went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote as quoted

import msgspec

from fallow.apps.run import complain
from fallow.cli.client import REGION_UNKNOWN, Gateway, Offered, ask, find_gateway, read_as
from fallow.cli.options import short
from fallow.model.errors import BadSetting, FallowError, StartFailed
from fallow.model.views import AttemptView, CallView, QuoteList, QuoteView, Timing
from fallow.wire.openai import CALLS, CHAT, EMBEDDINGS
from fallow.wire.quote_request import PATH


def quote(
    data: Path | None, base_url: str, text: str, *, model: str, max_tokens: int | None, wishes: dict[str, Any], tier: str, as_json: bool
) -> int:
    """`fallow quote`; 1 if no offer can take the call."""
    try:
        if not text.strip():
            raise BadSetting("say for which text, as an argument")
        gateway = find_gateway(data, base_url)
        body = _body(gateway, text, model)
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if tier:
            body["service_tier"] = tier
        said = {name: value for name, value in wishes.items() if value is not None}
        if said:
            body["fallow"] = said
        found = read_as(ask(gateway, PATH, body), QuoteList)
    except FallowError as error:
        complain(error)
        return 2 if isinstance(error, BadSetting) else 1
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(found)
    return 0 if found.quotes else 1


def _body(gateway: Gateway, text: str, model: str) -> dict[str, Any]:
    """The text as a chat, or for a model that only embeds, as what it takes. A family isn't in the list: it chats."""
    offered = {one.id: one.endpoints for one in read_as(ask(gateway, "/v1/models"), Offered).data}
    if not model:
        model = next((name for name, endpoints in offered.items() if CHAT in endpoints), "")
        if not model:
            raise StartFailed("no model that chats is offered now; lend one with `fallow lend`")
    endpoints = offered.get(model, (CHAT,))
    if CHAT not in endpoints and EMBEDDINGS in endpoints:
        return {"model": model, "input": text}
    return {"model": model, "messages": [{"role": "user", "content": text}]}


def _show(found: QuoteList) -> None:
    print(f"{found.model} at {found.path}: about {found.prompt_tokens} tokens to read and {found.output_tokens} to write")
    if found.quotes:
        _table(found.quotes)
    else:
        print("no node can take this call:")
    for one in reversed(found.refused):
        print(f"{one.offers} {'offer' if one.offers == 1 else 'offers'} stopped by {one.limit}: {one.lifted_by}")


def _table(quotes: Sequence[QuoteView]) -> None:
    from rich.console import Console
    from rich.table import Table

    several = len({one.model for one in quotes}) > 1
    has_regions = any(one.region != REGION_UNKNOWN for one in quotes)
    words = ["node", *(["model"] if several else []), "hardware", "ring", *(["region"] if has_regions else [])]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", caption="costs in credits (USD)", caption_justify="left")
    for heading in words:
        table.add_column(heading, no_wrap=heading in ("node", "ring"), overflow="fold")
    for heading in ("1st token", "end", "chance", "cost", "at most"):
        table.add_column(heading, no_wrap=True, justify="right")
    for one in quotes:
        hardware = one.hardware if one.gpu is msgspec.UNSET else f"{one.hardware} {one.gpu}"
        where = [short(one.node), *([one.model] if several else []), hardware, one.ring, *([one.region] if has_regions else [])]
        times = [_seconds(one.first_token_ms), _seconds(one.end_ms)]
        table.add_row(*where, *times, f"{one.chance:.0%}", _credits(one.cost_expected), _credits(one.cost_max))
    Console().print(table)


def why(data: Path | None, base_url: str, call: str, *, as_json: bool) -> int:
    """`fallow why`."""
    try:
        found = read_as(ask(find_gateway(data, base_url), f"{CALLS}/{quoted(call, safe='')}"), CallView)
    except FallowError as error:
        complain(error)
        return 1
    if as_json:
        print(msgspec.json.encode(found).decode())
        return 0
    for line in told(found):
        print(line)
    others = found.attempts[-1].others if found.attempts else []
    if others:
        print("what else was possible:")
        _table(others)
    return 0


def told(call: CallView) -> list[str]:
    """A call in words."""
    said = {"running": "is under way", "done": "went well", "failed": f"failed: {call.code}", "caller_left": "was left by its caller"}
    lines = [f"{call.id} {said[call.status]} ({call.model or 'no model'} at {call.path}, {call.arrived_at})"]
    if call.waited_ms is not None:
        lines.append(f"waited {_seconds(call.waited_ms)}: {call.wait_why}")
    for number, one in enumerate(call.attempts, 1):
        lines += _attempt(number, one, call)
    if not call.attempts:
        lines.append("no node was asked")
    if call.predicted is not None and call.actual is not None:
        lines.append(f"predicted: {_timing(call.predicted)}, {call.attempts[-1].quote.chance:.0%} sure to meet the needs")
        lines.append(f"actual:    {_timing(call.actual)}")
        quote = call.attempts[-1].quote
        lines.append(
            f"cost:      {_cost(call)}; {_credits(quote.cost_expected)} expected, {_credits(quote.cost_max)} at most, in credits (USD)"
        )
    return lines


def _attempt(number: int, one: AttemptView, call: CallView) -> list[str]:
    answered = "was stopped" if call.status == "caller_left" else "answered"
    ended = "is under way" if one.ms is None else f"{answered if one.code is None else one.code} after {_seconds(one.ms)}"
    return [f"{number}. {short(one.node)} ({one.hardware}, ring {one.ring}, region {one.region}) {ended}", f"   chosen: {one.why}"]


def _timing(timing: Timing) -> str:
    first = "not told" if timing.first_token_ms is None else f"after {_seconds(timing.first_token_ms)}"
    return f"first token {first}, {'no end yet' if timing.end_ms is None else f'end after {_seconds(timing.end_ms)}'}"


def _cost(call: CallView) -> str:
    if call.cost is None:
        return "not known"
    return f"{_credits(call.cost)} for {call.prompt_tokens} tokens read ({call.cached_tokens} known) and {call.output_tokens} written"


def _seconds(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms < 10_000 else f"{ms / 1000:.0f} s"


def _credits(amount: float) -> str:
    """As many digits as an amount has, without an exponent."""
    return f"{amount:.9f}".rstrip("0").rstrip(".")

"""`make demo`: everything on this machine, called through the ordinary OpenAI package, and what it did in one table."""

import concurrent.futures
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

import openai
from openai.types import CompletionUsage
from rich.console import Console
from rich.table import Table

MODEL = "smollm2-135m-instruct"
START_S = 120.0
STOP_S = 5.0
BURST = 12
WORKERS = 8
FALLOW = [sys.executable, "-m", "fallow"]

LETTER = (
    "Dear town hall, the street lamp in front of Lindenweg 14 has been dark since Monday. "
    "Please repair it. You can reach me at 0157 555 0134. Kind regards, Ada Okafor"
)
ASKED = "Extract name, street, phone and topic as JSON."
EXAMPLE = "Dear town hall, the bins in Hafenstrasse 3 were not emptied. Call me at 0151 555 0177. Regards, Jonas Brandt"
EXAMPLE_ANSWER = '{"name": "Jonas Brandt", "street": "Hafenstrasse 3", "phone": "0151 555 0177", "topic": "waste"}'
"""A model this small needs to see one; a larger one does without."""
LETTER_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "street": {"type": "string", "maxLength": 40},
        "phone": {"type": "string", "maxLength": 20},
        "topic": {"type": "string", "enum": ["street lamp", "waste", "noise", "other"]},
    },
    "required": ["name", "street", "phone", "topic"],
    "additionalProperties": False,
}
WORDS = ["river", "bread", "winter", "harbour", "clock", "garden", "letter", "bridge", "music", "school", "forest", "market"]

console = Console()


SHORT_ID = 12
"""A node's name is its public key; tables show how it begins."""


class Row(NamedTuple):
    """What one job did."""

    job: str
    node: str
    hardware: str
    first_s: float | None
    whole_s: float
    tokens: int
    added_ms: float


def main() -> int:
    """Fetch, start, call, show, stop."""
    began = time.monotonic()
    console.rule("[bold]1. The model[/]")
    if subprocess.run([*FALLOW, "models", "pull", MODEL], check=False).returncode != 0:
        return 1
    console.rule("[bold]2. Everything on this machine: broker, hub, gateway, node, engine[/]")
    with tempfile.TemporaryDirectory(prefix="fallow-demo-") as folder:
        up = subprocess.Popen(
            [*FALLOW, "up", "--data", folder, "--port", "0", "--model", MODEL, *sys.argv[1:]],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            base_url, key = greeted(up)
            console.print(f"ready after {time.monotonic() - began:.1f} s at {base_url}")
            with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120) as client:
                show([chat(client), extract(client), *burst(client)])
        finally:
            up.terminate()
            try:
                up.wait(STOP_S)
            except subprocess.TimeoutExpired:
                up.kill()
    console.print(f"\nEverything is stopped again, after {time.monotonic() - began:.1f} s in all. What to try next:\n")
    console.print("  [bold].venv/bin/fallow up[/]                    run it for yourself, on port 8400")
    console.print("  [bold].venv/bin/fallow chat 'Hello!'[/]         in a second terminal")
    console.print("  [bold].venv/bin/fallow status[/]                address, key and nodes; give the first two to any OpenAI client")
    console.print("  README.md says how to lend a second machine.\n")
    return 0


def greeted(up: "subprocess.Popen[str]") -> tuple[str, str]:
    """The base URL and the key that `fallow up` prints."""
    base_url = key = ""
    assert up.stdout is not None
    for line in up.stdout:
        base_url = line.split()[-1] if "base URL" in line else base_url
        key = line.split()[-1] if "API key" in line else key
        if "Ctrl-C" in line:
            return base_url, key
    sys.exit("fallow up did not start; see the line above")


def chat(client: openai.OpenAI) -> Row:
    """A chat, written as it comes."""
    question = "Explain in two sentences why leaves are green."
    console.rule("[bold]3. A streamed chat[/]")
    console.print(f"[dim]{question}[/]")
    began = time.monotonic()
    first_s, usage = None, None
    with client.chat.completions.with_streaming_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=90,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as answer:
        for chunk in answer.parse():
            usage = chunk.usage or usage
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first_s = first_s or time.monotonic() - began
                console.out(text, end="", highlight=False)
        console.print()
        return row("streamed chat", answer.headers, first_s, time.monotonic() - began, usage)


def extract(client: openai.OpenAI) -> Row:
    """A letter to a town hall as data; the schema is enforced while the model writes."""
    console.rule("[bold]4. A letter into JSON, by a schema and one example[/]")
    console.print(f"[dim]{LETTER}[/]")
    began = time.monotonic()
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": f"{ASKED}\n{EXAMPLE}"},
            {"role": "assistant", "content": EXAMPLE_ANSWER},
            {"role": "user", "content": f"{ASKED}\n{LETTER}"},
        ],
        response_format={"type": "json_schema", "json_schema": {"name": "letter", "schema": LETTER_SCHEMA, "strict": True}},
        max_tokens=160,
        temperature=0,
    )
    whole_s = time.monotonic() - began
    answer = raw.parse()
    content = answer.choices[0].message.content or ""
    console.print_json(json.dumps(json.loads(content)))
    return row("letter to JSON", raw.headers, None, whole_s, answer.usage)


def burst(client: openai.OpenAI) -> list[Row]:
    """Many small calls at once."""
    console.rule(f"[bold]5. {BURST} calls, {WORKERS} at a time[/]")

    def ask(word: str) -> Row:
        began = time.monotonic()
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": f"Write one short line about: {word}"}], max_tokens=24, temperature=0
        )
        answer = raw.parse()
        text = " ".join((answer.choices[0].message.content or "").split())
        console.print(f"[dim]{word:>8}:[/] {text}", highlight=False)
        return row(f"line about {word}", raw.headers, None, time.monotonic() - began, answer.usage)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        rows = list(pool.map(ask, WORDS[:BURST]))
    whole_s = time.monotonic() - began
    tokens = sum(one.tokens for one in rows)
    nodes = {one.node for one in rows}
    added = sorted(one.added_ms for one in rows)[len(rows) // 2]
    return [
        Row(f"{BURST} calls at once", ", ".join(sorted(node[:SHORT_ID] for node in nodes)), rows[0].hardware, None, whole_s, tokens, added)
    ]


def row(job: str, headers: Mapping[str, str], first_s: float | None, whole_s: float, usage: CompletionUsage | None) -> Row:
    """A row from an answer's headers and usage."""
    tokens = usage.completion_tokens if usage else 0
    return Row(
        job, headers["fallow-node"][:SHORT_ID], headers["fallow-hardware"], first_s, whole_s, tokens, float(headers["fallow-overhead-ms"])
    )


def show(rows: list[Row]) -> None:
    """The table."""
    console.rule("[bold]What ran where[/]")
    table = Table(box=None, header_style="bold")
    table.add_column("job")
    table.add_column("machine", overflow="fold")
    for heading in ("first word", "whole", "tokens", "tokens/s", "Fallow added"):
        table.add_column(heading, justify="right", max_width=8)
    for one in rows:
        table.add_row(
            one.job,
            f"{one.node}\n[dim]{one.hardware}[/]",
            f"{one.first_s:.2f} s" if one.first_s else "",
            f"{one.whole_s:.2f} s",
            str(one.tokens),
            f"{one.tokens / one.whole_s:.0f}",
            f"{one.added_ms:.1f} ms",
        )
    console.print(table)
    console.print("[dim]A token is about three quarters of a word. 'Fallow added' is the time that wasn't the engine's own.[/]")


if __name__ == "__main__":
    sys.exit(main())

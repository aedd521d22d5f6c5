"""What the real llama engine remembers of prompts: found again by the key that asked, and by nobody else."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock
from running import MODEL, POLL_S, START_S, until

from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.llama_process import ENVIRONMENT
from fallow.adapters.store import Store
from fallow.apps.node.engine_served import small
from fallow.apps.node.seats import Seats
from fallow.apps.node.served import Refused
from fallow.apps.node.writing import Writing
from fallow.apps.settings import load
from fallow.core.slots import Asker
from fallow.model.ids import KeyId, OrgId
from fallow.model.receipt import Usage
from fallow.wire.generation import Generation, Sampling, Turn
from fallow.wire.llama_request import Neutraliser
from fallow.wire.openai import COMPLETIONS

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("weights")]

ME = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))
YOU = Asker(org_id=OrgId("home"), key_id=KeyId("key-2"))
SLOTS = 3
CONTEXT = 2_048
PROMPT = "The sun rose over the river, and a bird sang in the old tree. " * 10
"""Some 170 tokens."""
SHORT = Sampling(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def socket(weights: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine as nodes start it, without a jail."""
    folder = tmp_path_factory.mktemp("e")
    settings = load(folder)
    entry = load_catalogue(settings.data).find(MODEL)
    path = Store(settings.models_folder).path(entry.name, entry.files[0])
    there = folder / "e.sock"
    asked = {
        "weights": str(path),
        "model": "m",
        "socket": str(there),
        "threads": 2,
        "slots": SLOTS,
        "context_tokens": CONTEXT,
        "batch_tokens": 128,
    }
    environment = {**os.environ, **ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "fallow.engines.llama"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.close()
        try:
            until(there.exists, what="the engine's socket")
            yield there
        finally:
            process.kill()


@pytest.fixture
async def engine(socket: Path) -> AsyncIterator[HttpEngine]:
    one = HttpEngine(str(socket))
    async with asyncio.timeout(START_S):
        while not await one.is_healthy(1.0):
            await asyncio.sleep(POLL_S)
    yield one
    one.close()


def seats_of(count: int) -> Seats:
    return Seats(count, FakeClock(), contextlib.nullcontext)


async def ask(engine: HttpEngine, seats: Seats, asker: Asker, text: str = PROMPT, **fields: Any) -> Usage:
    asked: dict[str, Any] = {"turns": (Turn(role="user", text=text),), "sampling": SHORT, **fields}
    generation = Generation(**asked)
    writing = Writing(generation, engine, Neutraliser(()), stream=True, seats=seats, asker=asker)
    async with contextlib.aclosing(writing.run(lambda: None)) as events:
        async for _ in events:
            pass
    return writing.usage


async def found_in(engine: HttpEngine, slot: int, prompt: str) -> int:
    """How many tokens of the prompt the engine finds in a slot, asked past our books."""
    body = {"prompt": prompt, "max_tokens": 1, "id_slot": slot, "cache_prompt": True}
    async with engine.post(COMPLETIONS, json.dumps(body).encode()) as answer:
        assert answer.head.status == 200
        cached: int = json.loads(await small(answer))["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("form", [{}, {"turns": (), "prompts": (PROMPT,)}])
async def test_a_prompt_is_known_to_its_own_key_only(engine: HttpEngine, slots: int, form: dict[str, Any]) -> None:
    seats = seats_of(slots)
    first = await ask(engine, seats, ME, **form)
    assert (first.prompt_tokens > 150, first.cached_tokens) == (True, 0)
    assert (await ask(engine, seats, ME, **form)).cached_tokens > 0.9 * first.prompt_tokens
    assert (await ask(engine, seats, YOU, **form)).cached_tokens == 0
    assert (await ask(engine, seats, YOU, **form)).cached_tokens > 0.9 * first.prompt_tokens
    assert ((await ask(engine, seats, ME, **form)).cached_tokens > 0) == (slots > 1), "with one slot it was cleared"


async def test_a_conversation_goes_on_where_it_was(engine: HttpEngine) -> None:
    seats = seats_of(SLOTS)
    first = await ask(engine, seats, ME)
    await ask(engine, seats, YOU, text="Hello")
    turns = (Turn(role="user", text=PROMPT), Turn(role="assistant", text="Yes"), Turn(role="user", text="And then?"))
    assert (await ask(engine, seats, ME, turns=turns, sampling=Sampling(max_tokens=3, seed=5))).cached_tokens > 0.9 * first.prompt_tokens


async def test_further_choices_share_the_prompt_and_leave_nothing_behind(engine: HttpEngine) -> None:
    seats = seats_of(SLOTS)
    form: dict[str, Any] = {"turns": (), "prompts": (PROMPT,)}
    await ask(engine, seats, ME, **form)
    used = await ask(engine, seats, ME, choices=SLOTS, **form)
    assert (used.cached_tokens > 0.9 * used.prompt_tokens, used.output_tokens) == (True, SLOTS * 2)
    found = [await found_in(engine, slot, PROMPT) for slot in range(SLOTS)]
    assert found[0] > 0.9 * used.prompt_tokens
    assert found[1:] == [0, 0]
    assert (await ask(engine, seats, YOU, choices=SLOTS, **form)).cached_tokens == 0


async def test_what_is_refused_leaves_what_another_key_asked_out_of_reach(engine: HttpEngine) -> None:
    """The engine keeps it then: only our books are in the way."""
    seats = seats_of(1)
    await ask(engine, seats, YOU)
    with pytest.raises(Refused):
        await ask(engine, seats, ME, text=PROMPT * 20)
    assert (await ask(engine, seats, ME)).cached_tokens == 0

"""Callers who never stop asking, as a process: they stand for other machines, so they take nothing from the owner's work here."""

import asyncio
import contextlib
import os
import sys

import msgspec

from fallow.adapters.http_engine import HttpEngine
from fallow.model.errors import EngineFailed

CALLERS = 2
RETRY_S = 0.5
TOKENS = 200
TEXT = "Write a long and friendly letter to your neighbour about the weather."


async def ask(client: HttpEngine, body: bytes) -> None:
    while True:
        with contextlib.suppress(EngineFailed):
            async with client.post("/v1/chat/completions", body) as answer:
                async for _ in answer.body():
                    pass
                if answer.head.status == 200:
                    continue
        await asyncio.sleep(RETRY_S)


async def main(base_url: str, model: str) -> None:
    client = HttpEngine(base_url.removeprefix("http://"), headers={"authorization": f"Bearer {sys.stdin.readline().strip()}"})
    call = {"model": model, "messages": [{"role": "user", "content": TEXT}], "max_tokens": TOKENS}
    await asyncio.gather(*(ask(client, msgspec.json.encode(call)) for _ in range(CALLERS)))


if __name__ == "__main__":
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    asyncio.run(main(sys.argv[1], sys.argv[2]))

"""Tokens per second of parallel streams, read off the answers' own usage."""

import asyncio
import time

import msgspec

from fallow.adapters.http_engine import HttpEngine
from fallow.wire import sse

TOKENS = 96
PROMPT = "{number} days ago the weather changed. Write a long and friendly letter to your neighbour about it."
STREAM_S_MAX = 120.0


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


async def tokens_per_s(address: str, key: str, model: str, *, streams: range) -> float:
    """One stream per number, all at once, greedy, of a bounded length; the same client for a socket and for a gateway.

    The rate counts from the start until the last stream has ended.
    """
    client = HttpEngine(address.removeprefix("http://"), headers={"authorization": f"Bearer {key}"})
    began = time.perf_counter()
    try:
        async with asyncio.timeout(STREAM_S_MAX):
            tokens = await asyncio.gather(*(_stream(client, model, number) for number in streams))
    finally:
        client.close()
    return sum(tokens) / (time.perf_counter() - began)


async def _stream(client: HttpEngine, model: str, number: int) -> int:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT.format(number=number)}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    cutter = sse.EventCutter()
    async with client.post("/v1/chat/completions", msgspec.json.encode(body)) as answer:
        if answer.head.status != 200:
            raise RuntimeError(f"{client} answered {answer.head.status}")
        async for chunk in answer.body():
            for event in cutter.feed(chunk):
                if b'"usage":' in event:
                    usage = msgspec.json.decode(sse.payload(event), type=_Chunk).usage
                    tokens = usage.completion_tokens if usage else tokens
    return tokens

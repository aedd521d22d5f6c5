"""The stub engine within the test: it counts who asks, and says back what it was asked if a call's metadata wants that."""

import asyncio
import sys
import threading
from pathlib import Path

import msgspec

sys.path.append(str(Path(__file__).parents[2]))  # the benches aren't installed

from bench.stub_engine import MODEL, STREAM_FOOT, STREAM_HEAD, StubConnection, chunk_event, completion, event, usage_of, whole

VECTOR = (0.25, -0.5, 0.75)
WITHIN_S = 20.0


class Engine:
    """A server on a port of its own, in a thread. `calls` counts chat calls and embeddings."""

    def __init__(self) -> None:
        self.calls = 0
        self._connections: set[StubConnection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(WITHIN_S)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _listen(self) -> asyncio.Server:
        return await self._loop.create_server(lambda: _Connection(self, self._loop, self._connections), "127.0.0.1", 0)

    def close(self) -> None:
        def end() -> None:
            self._server.close()
            for connection in tuple(self._connections):
                connection.transport.abort()
            self._loop.call_soon(self._loop.stop)

        self._loop.call_soon_threadsafe(end)
        self._thread.join(WITHIN_S)
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class _Connection(StubConnection):
    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, connections: set[StubConnection]) -> None:
        super().__init__(loop, connections)
        self._engine = engine

    def on_message_complete(self) -> None:
        if self.path == b"/v1/embeddings":
            self._engine.calls += 1
            vectors = [{"object": "embedding", "index": 0, "embedding": VECTOR}]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            self.send(whole(b"200 OK", {"object": "list", "data": vectors, "model": MODEL, "usage": usage}))
        else:
            super().on_message_complete()

    def answer_chat(self) -> None:
        self._engine.calls += 1
        asked = msgspec.json.decode(self.body)
        if "echo" not in (asked.get("metadata") or {}):
            super().answer_chat()
            return
        text = str(asked["messages"][-1]["content"])
        if not asked.get("stream"):
            self.send(completion(text, usage_of(len(text.split()))))
            return
        pieces = [f"{word} " for word in text.split()]
        said = [chunk_event([{"index": 0, "delta": {"content": piece}, "finish_reason": None}]) for piece in pieces]
        end = chunk_event([{"index": 0, "delta": {}, "finish_reason": "stop"}], usage_of(len(text.split())))
        self.send(STREAM_HEAD + b"".join(said) + end + event(b"[DONE]") + STREAM_FOOT)

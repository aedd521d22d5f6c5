"""An HTTP proxy that does CONNECT and nothing else, and knows who went where through it."""

import asyncio

HERE = "127.0.0.1"
END_S = 5.0


class Proxy:
    """On the loop that starts it. `asked` holds the first line of each connection."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.address = ""
        self.port = 0
        self.refuses = False
        self._ways: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._talk, HERE, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.address = f"http://{HERE}:{self.port}"

    def cut(self) -> None:
        """End every tunnel; others may be asked for."""
        for sink in list(self._ways.values()):
            sink.transport.abort()

    async def stop(self) -> None:
        """Take no more, and wait for the end of every tunnel."""
        assert self._server is not None
        self._server.close()
        async with asyncio.timeout(END_S):
            await asyncio.gather(*self._ways)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.split("\r\n")[0])
        verb, target, _ = self.asked[-1].split(" ")
        if verb != "CONNECT" or self.refuses:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        host, _, port = target.rpartition(":")
        there, to_there = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, sink in ((reader, to_there), (there, writer)):
            task = asyncio.ensure_future(self._carry(source, sink))
            self._ways[task] = sink
            task.add_done_callback(self._ways.pop)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

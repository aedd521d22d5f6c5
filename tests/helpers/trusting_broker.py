"""A broker of its own that trusts a hub's operator, until it is told to end: `python trusting_broker.py KEYS FOLDER PORT`."""

import asyncio
import signal
import sys
from pathlib import Path

from fallow.adapters.broker import start_broker
from fallow.adapters.operator import Operator


async def main(keys: str, folder: str, port: str) -> None:
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    trust = Operator.open(Path(keys)).trust({})
    broker = await start_broker(Path(folder), host="127.0.0.1", port=int(port), trust=trust)
    try:
        await asked.wait()
    finally:
        await broker.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

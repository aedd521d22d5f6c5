"""Stands for the agent in the jail's tests: holds secrets, detects a jail, keeps one engine in it. It may run as another user.

A line of JSON on standard input says what to start; a line on standard output tells where it is. It ends when standard input does.
"""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters import children, jail
from fallow.adapters.cgroup import NO_CGROUPS
from fallow.adapters.engine_process import EngineProcess
from fallow.adapters.llama_process import LlamaProcess
from fallow.adapters.onnx_process import OnnxProcess
from fallow.adapters.store import hash_file
from fallow.core.sizing import EngineSize

MEMORY_BYTES = 400 * 2**20
HERE = str(Path(__file__).parent)


def launcher(asked: dict[str, Any], kept: jail.Jail) -> EngineProcess:
    folder, files = Path(asked["folder"]), [Path(one) for one in asked["files"]]
    match asked["engine"]:
        case "llama":
            size = EngineSize(threads=1, slots=2, context_tokens=1_024, memory_bytes=MEMORY_BYTES)
            return LlamaProcess(
                weights=files[0],
                weights_sha256=hash_file(files[0]),
                model="m",
                size=size,
                folder=folder,
                name="e1",
                jail=kept,
                cgroups=NO_CGROUPS,
            )
        case "onnx":
            return OnnxProcess(
                weights=files[0],
                weights_sha256=hash_file(files[0]),
                tokenizer=files[1],
                tokenizer_sha256=hash_file(files[1]),
                name="e1",
                threads=1,
                pooling="mean",
                context_tokens=256,
                folder=folder,
                memory_bytes=MEMORY_BYTES,
                jail=kept,
                cgroups=NO_CGROUPS,
            )
        case module:
            return EngineProcess(
                module=module,
                environment={"PYTHONPATH": HERE},
                settings={},
                files={file: hash_file(file) for file in files},
                folder=folder,
                name="e1",
                memory_bytes=0 if kept.level == "none" else MEMORY_BYTES,
                jail=msgspec.structs.replace(kept, folders=(*kept.folders, HERE)),
                cgroups=NO_CGROUPS,
            )


async def keep(asked: dict[str, Any]) -> None:
    kept = jail.detect(asked["level"])
    held = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
    held[0].bind(str(Path(asked["folder"]) / "other.sock"))
    held[1].bind(f"\0fallow-{os.getpid()}")
    held[2].bind(("127.0.0.1", 0))
    for one in held:
        one.listen()
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(Path(asked["folder"]) / "datagram.sock"))
    launch = launcher(asked, kept)
    process = await launch.start()
    told = {
        "agent": os.getpid(),
        "engine": process.pid,
        "socket": str(launch.socket),
        "level": kept.level,
        "port": held[2].getsockname()[1],
    }
    print(json.dumps(told), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await children.kill(process)
    launch.clean_up()


if __name__ == "__main__":
    asyncio.run(keep(json.loads(sys.stdin.readline())))

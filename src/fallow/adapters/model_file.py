"""The model files on this machine's disk: what a file says about itself, read before any engine may open it."""

import os
import stat
from pathlib import Path

from fallow.model.errors import BadModelFile, shortened
from fallow.wire.gguf_header import MAGIC, GgufHeader, read_gguf
from fallow.wire.onnx_header import OnnxHeader, read_onnx


def _read(path: Path) -> GgufHeader | OnnxHeader:
    try:
        mode = path.stat().st_mode
    except ValueError:  # a zero byte, say
        raise BadModelFile("no file can have this name") from None
    if not stat.S_ISREG(mode):
        raise BadModelFile("it is a folder, a pipe or a device, and not a file")
    # Should it have become a pipe since, opening it doesn't wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise BadModelFile("it is empty")
        if file.read(len(MAGIC)) == MAGIC:
            return read_gguf(file, status.st_size)
        if path.suffix.lower() == ".onnx":
            return read_onnx(file, status.st_size)
    raise BadModelFile("it is neither a GGUF file nor named .onnx")


def inspect(path: Path) -> GgufHeader | OnnxHeader:
    """Read a GGUF or ONNX file's header; raises BadModelFile for anything that isn't a whole file of these."""
    try:
        return _read(path)
    except BadModelFile as error:
        reason = error.message
    except OSError as error:
        reason = f"it could not be read: {error.strerror or 'a fault of the disk'}"
    raise BadModelFile(f"{shortened(path.name)} isn't a model that can be used: {reason}")

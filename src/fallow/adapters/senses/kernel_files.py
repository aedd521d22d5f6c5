"""Small files of /proc and /sys, read so that a missing one, an unreadable one and a damaged one are told apart."""

import errno
import os
from pathlib import Path

from fallow.model.owner import Unknown

PROC = Path("/proc")
SYS = Path("/sys")
FILE_BYTES_MAX = 65_536
DIGITS_MAX = 20
"""The kernel's numbers have 64 bits; a longer one is damage."""
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.EOPNOTSUPP})
"""The kernel's ways to say that a file stands for nothing here. PSI that is compiled in but switched off says EOPNOTSUPP."""


def read_text(path: Path) -> str | Unknown | None:
    """The file's text without blanks around it; None if there is no such thing."""
    try:
        return _read(str(path)).decode(errors="replace").strip()
    except OSError as error:
        return None if error.errno in _NOT_THERE else _unread(path, error)


def read_bytes(path: str) -> bytes | None:
    """What the file holds; None if it can't be read, whatever the reason. For files that are read hundreds at a time."""
    try:
        return _read(path)
    except OSError:
        return None


def read_int(path: Path) -> int | Unknown | None:
    """The whole number that the file holds; None if there is no such file."""
    text = read_text(path)
    if not isinstance(text, str):
        return text
    try:
        return int(text) if len(text) <= DIGITS_MAX else Unknown(f"{path.parent.name}/{path.name} is too long for a number")
    except ValueError:
        return Unknown(f"{path.parent.name}/{path.name} holds no number")


def list_folder(path: Path) -> list[Path] | Unknown | None:
    """What is in the folder, in the order of names; None if there is no such folder."""
    try:
        return sorted(path.iterdir())
    except OSError as error:
        return None if error.errno in _NOT_THERE else _unread(path, error)


def _read(path: str) -> bytes:
    """Without Python's buffers and Path's steps, which cost several times what the kernel does."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, FILE_BYTES_MAX)
    finally:
        os.close(file)


def _unread(path: Path, error: OSError) -> Unknown:
    return Unknown(f"{path.parent.name}/{path.name} can't be read: {error.strerror}")

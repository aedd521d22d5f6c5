"""From an entry of the catalogue to what the self-benchmark needs of it: its size here, and how its engine is started."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from fallow.adapters.model_file import inspect
from fallow.adapters.store import Store
from fallow.apps.node.supervisor import Launcher
from fallow.core.sizing import EngineSize, size_encoder, size_engine
from fallow.model.errors import BadModelFile, StartFailed
from fallow.model.measured import Work
from fallow.model.weights import Engine, Role, Weights
from fallow.wire.gguf_header import GgufHeader
from fallow.wire.onnx_header import OnnxHeader

ENCODER_CONTEXT_TOKENS = 512
"""For an encoder whose entry doesn't tell."""
SOCKET_NAME = "m"


class Launch(Protocol):
    """How an engine of this size is started, with a socket of this name."""

    def __call__(self, size: EngineSize, name: str = SOCKET_NAME) -> Launcher: ...


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose files are here. `size` has the most slots that fit, `threads` are the numbers to try.

    `dimensions` is an embedding's size, `control_tokens` are what a caller's text must not hold.
    """

    model: str
    work: Work
    engine: Engine
    digest: str
    size: EngineSize
    threads: tuple[int, ...]
    weights_bytes: int
    kv_bytes_per_token: int
    launch: Launch
    pooling: str = ""
    dimensions: int | None = None
    control_tokens: tuple[str, ...] = ()


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where models lie, where their engines may put a socket, and how they are started: with what those classes take."""

    store: Store
    folder: Path
    memory_limit_bytes: int
    llama: Callable[..., Launcher]
    onnx: Callable[..., Launcher]

    def file(self, weights: Weights, role: Role) -> tuple[Path, str]:
        """A model's file and its checksum; raises StartFailed."""
        file = weights.file(role)
        path = None if file is None else self.store.path(weights.name, file)
        known = None if file is None else self.store.known(weights.name, file)
        if path is None or known is None:
            raise StartFailed(f"the {role} file of {weights.name} is not here; run `fallow models pull {weights.name}`")
        return path, known.sha256


def subject_of(weights: Weights, sources: Sources, *, threads: tuple[int, ...]) -> Subject:
    """A model whose files are here, as something to measure; raises StartFailed, BadModelFile, MissingExtra."""
    path, _ = sources.file(weights, "model")
    header = inspect(path)
    if isinstance(header, OnnxHeader):
        return _encoder(weights, sources, threads)
    if header.holds != "model":
        raise BadModelFile(f"{path.name} holds {header.holds!r} and not a model")
    pooling = "" if header.kind == "text" else weights.pooling or header.pooling or "mean"
    work: Work = "text" if header.kind == "text" else "rerank" if pooling == "rank" else "embeddings"
    return _llama(weights, sources, threads, work, pooling, header)


def _llama(weights: Weights, sources: Sources, threads: tuple[int, ...], work: Work, pooling: str, header: GgufHeader) -> Subject:
    path, digest = sources.file(weights, "model")
    weights_bytes = path.stat().st_size
    size = size_engine(
        cores_physical=max(threads),
        memory_limit_bytes=sources.memory_limit_bytes,
        weights_bytes=weights_bytes,
        context_tokens=weights.context_tokens or header.context_tokens,
        kv_bytes_per_token=header.kv_bytes_per_token,
    )
    if size is None:
        raise StartFailed(
            f"{weights.name} needs about {weights_bytes // 2**20 + 250} MB, engines may use {sources.memory_limit_bytes // 2**20} MB here; "
            "raise [node] memory_gb, free some memory, or choose a smaller model"
        )

    def launch(size: EngineSize, name: str = SOCKET_NAME) -> Launcher:
        return sources.llama(
            weights=path,
            weights_sha256=digest,
            model=weights.name,
            size=size,
            folder=sources.folder,
            name=name,
            pooling=pooling,
        )

    return Subject(
        model=weights.name,
        work=work,
        engine="llama",
        digest=digest,
        size=size,
        threads=threads,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=header.kv_bytes_per_token,
        launch=launch,
        pooling=pooling,
        dimensions=weights.dimensions or header.embedding_length,
        control_tokens=header.control_tokens,
    )


def _encoder(weights: Weights, sources: Sources, threads: tuple[int, ...]) -> Subject:
    path, digest = sources.file(weights, "model")
    tokenizer, tokenizer_digest = sources.file(weights, "tokenizer")
    weights_bytes = path.stat().st_size
    context = weights.context_tokens or ENCODER_CONTEXT_TOKENS

    def launch(size: EngineSize, name: str = SOCKET_NAME) -> Launcher:
        return sources.onnx(
            weights=path,
            weights_sha256=digest,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_digest,
            name=name,
            threads=size.threads,
            pooling="cls" if weights.pooling == "cls" else "mean",
            context_tokens=size.context_tokens,
            memory_bytes=size.memory_bytes,
            folder=sources.folder,
        )

    return Subject(
        model=weights.name,
        work="embeddings",
        engine="onnx",
        digest=digest,
        size=size_encoder(cores_physical=max(threads), weights_bytes=weights_bytes, context_tokens=context),
        threads=threads,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=0,
        launch=launch,
        dimensions=weights.dimensions,
    )

"""From an entry of the catalogue to a model that the node serves: its files, its size, its engine."""

from pathlib import Path

import msgspec

from fallow.adapters import machine
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.llama_process import LlamaProcess
from fallow.adapters.model_file import inspect
from fallow.adapters.onnx_process import OnnxProcess
from fallow.adapters.store import Store
from fallow.apps.node.engine_served import EngineServed, Facts
from fallow.apps.node.room import Room
from fallow.apps.node.supervisor import Launcher, Supervisor
from fallow.apps.node.text_served import TEXT_PATHS, TextServed
from fallow.apps.node.vector_served import EMBEDDING_PATHS, RERANK_PATHS, VectorServed
from fallow.apps.settings import Settings
from fallow.core.sizing import EngineSize, size_encoder, size_engine
from fallow.model.errors import BadModelFile, StartFailed
from fallow.model.weights import Role, Weights
from fallow.ports import Clock
from fallow.wire.gguf_header import GgufHeader
from fallow.wire.onnx_header import OnnxHeader

ENCODER_CONTEXT_TOKENS = 512
"""For an encoder whose entry doesn't tell."""


class Loader:
    """Makes what the node serves, within one room."""

    def __init__(self, settings: Settings, folder: Path, room: Room, clock: Clock) -> None:
        self._settings = settings
        self._folder = folder
        self._room = room
        self._clock = clock
        self._store = Store(settings.models_folder)
        self._made = 0

    def load(self, weights: Weights) -> EngineServed:
        """A model whose files are here; raises StartFailed if it is too large, BadModelFile, MissingExtra."""
        path, digest = self._file(weights, "model")
        header = inspect(path)
        self._made += 1
        if isinstance(header, OnnxHeader):
            return self._encoder(weights, path, digest)
        if header.holds != "model":
            raise BadModelFile(f"{path.name} holds {header.holds!r} and not a model")
        return self._llama(weights, path, digest, header)

    def _file(self, weights: Weights, role: Role) -> tuple[Path, str]:
        file = weights.file(role)
        if file is None:
            raise StartFailed(f"{weights.name} has no {role} file in the catalogue; `fallow models show {weights.name}` tells what it has")
        path, known = self._store.path(weights.name, file), self._store.known(weights.name, file)
        if path is None or known is None:
            raise StartFailed(f"{file.filename} of {weights.name} is not here; run `fallow models pull {weights.name}`")
        return path, known.sha256

    def _sized(self, size: EngineSize) -> EngineSize:
        node = self._settings.node
        return msgspec.structs.replace(size, threads=node.threads or size.threads, slots=node.slots or size.slots)

    def _llama(self, weights: Weights, path: Path, digest: str, header: GgufHeader) -> EngineServed:
        size = size_engine(
            cores_physical=machine.physical_cores(),
            memory_limit_bytes=self._room.limit_bytes,
            weights_bytes=path.stat().st_size,
            context_tokens=weights.context_tokens or header.context_tokens,
            kv_bytes_per_token=header.kv_bytes_per_token,
        )
        if size is None:
            need_mb, limit_mb = path.stat().st_size // 2**20 + 250, self._room.limit_bytes // 2**20
            raise StartFailed(
                f"{weights.name} needs about {need_mb} MB, engines may use {limit_mb} MB here; "
                "raise [node] memory_gb, free some memory, or choose a smaller model"
            )
        size = self._sized(size)
        pooling = "" if header.kind == "text" else weights.pooling or header.pooling or "mean"
        launch = LlamaProcess(
            weights=path, weights_sha256=digest, model=weights.name, size=size, folder=self._folder, name=self._name, pooling=pooling
        )
        facts = Facts(
            model=weights.name,
            digest=digest,
            context_tokens=size.context_tokens,
            slots=size.slots,
            memory_bytes=size.memory_bytes,
            paths=TEXT_PATHS if header.kind == "text" else RERANK_PATHS if pooling == "rank" else EMBEDDING_PATHS,
            dimensions=weights.dimensions or header.embedding_length,
            may_shorten=weights.shorter_dimensions,
            control_tokens=header.control_tokens,
        )
        return self._served(TextServed if header.kind == "text" else VectorServed, facts, launch, path)

    def _encoder(self, weights: Weights, path: Path, digest: str) -> EngineServed:
        tokenizer, tokenizer_digest = self._file(weights, "tokenizer")
        size = self._sized(
            size_encoder(
                cores_physical=machine.physical_cores(),
                weights_bytes=path.stat().st_size,
                context_tokens=weights.context_tokens or ENCODER_CONTEXT_TOKENS,
            )
        )
        launch = OnnxProcess(
            weights=path,
            weights_sha256=digest,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_digest,
            name=self._name,
            threads=size.threads,
            pooling="cls" if weights.pooling == "cls" else "mean",
            context_tokens=size.context_tokens,
            folder=self._folder,
        )
        facts = Facts(
            model=weights.name,
            digest=digest,
            context_tokens=size.context_tokens,
            slots=size.slots,
            memory_bytes=size.memory_bytes,
            paths=EMBEDDING_PATHS,
            dimensions=weights.dimensions,
            may_shorten=weights.shorter_dimensions,
        )
        return self._served(VectorServed, facts, launch, path)

    @property
    def _name(self) -> str:
        """The socket's: short, since its path has little room."""
        return f"e{self._made}"

    def _served(self, kind: type[EngineServed], facts: Facts, launch: Launcher, path: Path) -> EngineServed:
        client = HttpEngine(str(launch.socket))
        node = self._settings.node
        supervisor = Supervisor(launch, client, self._clock, weights_bytes=path.stat().st_size, stall_ms=int(node.stall_s * 1000))
        return kind(facts, supervisor=supervisor, engine=client, room=self._room, clock=self._clock, load_wait_s=node.load_wait_s)

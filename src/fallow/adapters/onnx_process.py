"""Starts the ONNX engine's process for one embedding model."""

from pathlib import Path
from typing import Literal

from fallow.adapters.cgroup import Cgroups
from fallow.adapters.engine_process import EngineProcess, need
from fallow.adapters.jail import Jail

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # ONNX Runtime has threads of its own; these two are numpy's
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else it takes every core
    "ORT_DISABLE_TELEMETRY": "1",  # else it notes what it runs in the owner's home, to send it off
}
NEEDED = ("onnxruntime", "tokenizers")
Pooling = Literal["mean", "cls"]


class OnnxProcess(EngineProcess):
    """How to start an engine for this model."""

    def __init__(
        self,
        *,
        weights: Path,
        weights_sha256: str,
        tokenizer: Path,
        tokenizer_sha256: str,
        name: str,
        threads: int,
        pooling: Pooling,
        context_tokens: int,
        folder: Path,
        normalise: bool = True,
        memory_bytes: int,
        jail: Jail,
        cgroups: Cgroups,
    ) -> None:
        need(NEEDED, "the ONNX engine is not installed; run `pip install 'fallow[onnx]'`")
        settings = {
            "weights": str(weights),
            "tokenizer": str(tokenizer),
            "threads": threads,
            "context_tokens": context_tokens,
            "pooling": pooling,
            "normalise": normalise,
        }
        super().__init__(
            module="fallow.engines.onnx",
            environment=ENVIRONMENT,
            settings=settings,
            files={weights: weights_sha256, tokenizer: tokenizer_sha256},
            folder=folder,
            name=name,
            memory_bytes=memory_bytes,
            jail=jail,
            cgroups=cgroups,
        )

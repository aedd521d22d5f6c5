"""Starts the llama engine's process for one model."""

from pathlib import Path

from fallow.adapters.cgroup import Cgroups
from fallow.adapters.engine_process import EngineProcess, need
from fallow.adapters.jail import Jail
from fallow.core.sizing import EngineSize

ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}  # else a failed assertion starts a debugger and hangs


class LlamaProcess(EngineProcess):
    """How to start an engine for these weights; `pooling` is for models that embed."""

    def __init__(
        self,
        *,
        weights: Path,
        weights_sha256: str,
        model: str,
        size: EngineSize,
        folder: Path,
        name: str,
        pooling: str = "",
        jail: Jail,
        cgroups: Cgroups,
    ) -> None:
        need(("xllamacpp",), "the llama engine is not installed; run `pip install 'fallow[llama]'`")
        settings = {
            "weights": str(weights),
            "model": model,
            "threads": size.threads,
            "slots": size.slots,
            "context_tokens": size.context_tokens,
            "batch_tokens": size.batch_tokens,
            "pooling": pooling,
        }
        super().__init__(
            module="fallow.engines.llama",
            environment=ENVIRONMENT,
            settings=settings,
            files={weights: weights_sha256},
            folder=folder,
            name=name,
            memory_bytes=size.memory_bytes,
            jail=jail,
            cgroups=cgroups,
        )

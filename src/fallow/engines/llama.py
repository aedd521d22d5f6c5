"""llama.cpp as a process: reads its settings from standard input, then answers HTTP on a Unix socket until it is ended."""

import os
import sys
import threading
from pathlib import Path
from typing import Literal

import msgspec
import xllamacpp

EXIT_BAD_SETTINGS = 2
EXIT_NOT_LOADED = 3
HTTP_THREADS_SPARE = 8
"""Beyond one per stream: health checks and requests that wait."""


class LlamaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How llama.cpp is to run. `context_tokens` is shared by all slots."""

    weights: str
    model: str
    socket: str
    threads: int
    slots: int
    context_tokens: int
    batch_tokens: int
    pooling: Literal["", "mean", "cls", "last", "rank"] = ""
    """For a model that embeds or ranks; empty for one that writes."""


POOLING = {
    "mean": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN,
    "cls": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_CLS,
    "last": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST,
    "rank": xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK,
}


def serve(settings: LlamaSettings) -> int:
    """Load the model and serve it; returns an exit code only if that failed."""
    params = xllamacpp.CommonParams()
    params.model.path = settings.weights
    params.model_alias = {settings.model}
    params.hostnames = [settings.socket]
    params.cpuparams.n_threads = settings.threads
    params.cpuparams_batch.n_threads = settings.threads
    params.n_parallel = settings.slots
    params.kv_unified = True  # each slot may use the whole context, at the same memory
    params.n_ctx = settings.context_tokens
    params.n_batch = params.n_ubatch = settings.batch_tokens
    params.n_threads_http = settings.slots + HTTP_THREADS_SPARE
    params.cache_ram_mib = 0  # nothing of a prompt is kept outside its slot, where only its own key's next call may find it
    params.cache_idle_slots = False  # nor is it moved there
    params.ctx_shift = False
    params.verbosity = 0
    params.sse_ping_interval = -1  # its comments would look like progress
    params.ui = False
    params.endpoint_slots = False
    params.endpoint_metrics = False
    if settings.pooling:
        params.embedding = True
        params.pooling_type = POOLING[settings.pooling]
        params.n_batch = params.n_ubatch = settings.context_tokens  # an input is pooled in one batch, or refused with a 500
    Path(settings.socket).unlink(missing_ok=True)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        return EXIT_NOT_LOADED
    assert server is not None
    threading.Event().wait()
    return 0


def main() -> None:
    """Settings as one line of JSON on standard input."""
    os.umask(0o077)
    try:
        settings = msgspec.json.decode(sys.stdin.readline(), type=LlamaSettings)
    except msgspec.DecodeError:
        sys.exit(EXIT_BAD_SETTINGS)
    sys.exit(serve(settings))


if __name__ == "__main__":
    main()

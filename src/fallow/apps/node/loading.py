"""From an entry of the catalogue to a model that the node serves: measured once, sized, and with an engine in its jail."""

import asyncio
import functools
import logging
import os
from pathlib import Path

import msgspec

from fallow.adapters import machine, rapl
from fallow.adapters.cgroup import Cgroups
from fallow.adapters.http_engine import HttpEngine
from fallow.adapters.jail import Jail
from fallow.adapters.llama_process import LlamaProcess
from fallow.adapters.measurements import HardwareKey, Measurements, key_of
from fallow.adapters.onnx_process import OnnxProcess
from fallow.adapters.senses.cpu import OthersCpu
from fallow.adapters.store import Store
from fallow.apps.node.engine_served import EngineServed, Facts
from fallow.apps.node.gatekeeper import Gatekeeper
from fallow.apps.node.measuring import known_or_measured
from fallow.apps.node.room import Room
from fallow.apps.node.subject import Sources, Subject, subject_of
from fallow.apps.node.supervisor import Supervisor
from fallow.apps.node.text_served import TEXT_PATHS, TextServed
from fallow.apps.node.vector_served import EMBEDDING_PATHS, RERANK_PATHS, VectorServed
from fallow.apps.settings import Settings
from fallow.core import tuning
from fallow.core.sizing import EngineSize, tuned
from fallow.model.errors import BadChecksum, EngineFailed
from fallow.model.measured import Measured, Work
from fallow.model.offer import Speed
from fallow.model.owner import Unknown
from fallow.model.weights import Weights
from fallow.ports import Clock

PATHS: dict[Work, frozenset[str]] = {"text": TEXT_PATHS, "embeddings": EMBEDDING_PATHS, "rerank": RERANK_PATHS}

BUSY_CORES_MIN = 0.3
BUSY_SHARE = 0.15
"""What others may use while a model is measured; else the figures say more about them, and aren't kept."""

log = logging.getLogger("fallow.node")


class Loader:
    """Makes what the node serves, within one room. `cores_max` is what the owner lends."""

    def __init__(self, settings: Settings, folder: Path, room: Room, clock: Clock, *, jail: Jail, cgroups: Cgroups, cores_max: int) -> None:
        self._settings = settings
        self._room = room
        self._clock = clock
        self._cores_max = cores_max
        self._made = 0
        self._sources = Sources(
            store=Store(settings.models_folder),
            folder=folder,
            memory_limit_bytes=room.limit_bytes,
            llama=functools.partial(LlamaProcess, jail=jail, cgroups=cgroups),
            onnx=functools.partial(OnnxProcess, jail=jail, cgroups=cgroups),
        )

    def find(self, weights: Weights) -> Subject:
        """A model whose files are here; raises StartFailed if it is too large, BadModelFile, MissingExtra."""
        threads = self._settings.node.threads
        return subject_of(weights, self._sources, threads=(threads,) if threads else tuning.candidates(self._cores_max))

    @functools.cached_property
    def _key(self) -> HardwareKey:
        """This machine, which doesn't change from model to model."""
        return key_of(machine.read_hardware(), self._cores_max)

    async def measure(self, subject: Subject, gatekeeper: Gatekeeper) -> Measured | None:
        """How fast it is here: remembered, or seen now. None if the owner needs the machine, or the engine can't be asked.

        A model that wasn't measured is lent all the same; the next start tries again.
        """
        others = OthersCpu([os.getpid()])
        others.sample()

        def was_quiet() -> bool:
            busy = others.sample()
            return isinstance(busy, Unknown) or busy < max(BUSY_CORES_MIN, BUSY_SHARE * machine.usable_cpus())

        cache = Measurements(self._settings.models_folder)
        measuring = asyncio.ensure_future(
            known_or_measured(subject, cache, self._key, self._clock, meter=rapl.open_meter(), was_quiet=was_quiet)
        )
        closed = asyncio.ensure_future(gatekeeper.closed.wait())
        try:
            await asyncio.wait([measuring, closed], return_when=asyncio.FIRST_COMPLETED)
            if not measuring.done():
                log.info("%s is not measured now: %s", subject.model, gatekeeper.verdict.detail)
                return None
            return measuring.result()
        except (EngineFailed, BadChecksum) as error:
            log.warning("%s could not be measured: %s", subject.model, error)
            return None
        finally:
            closed.cancel()
            measuring.cancel()
            await asyncio.wait([measuring])  # its engine ends first
            others.close()

    def load(self, weights: Weights, subject: Subject, measured: Measured | None) -> EngineServed:
        """What the node serves; raises StartFailed if it is too large."""
        self._made += 1
        size = self._sized(subject.size, measured)
        launch = subject.launch(size, f"e{self._made}")
        facts = Facts(
            model=subject.model,
            family=weights.family,
            quantisation=weights.quantisation,
            digest=subject.digest,
            context_tokens=size.context_tokens,
            slots=size.slots,
            threads=size.threads,
            memory_bytes=size.memory_bytes,
            paths=PATHS[subject.work],
            dimensions=subject.dimensions,
            may_shorten=weights.shorter_dimensions,
            control_tokens=subject.control_tokens,
            speed=speed_of(subject.work, measured),
        )
        client = HttpEngine(str(launch.socket))
        node = self._settings.node
        supervisor = Supervisor(launch, client, self._clock, weights_bytes=subject.weights_bytes, stall_ms=int(node.stall_s * 1000))
        kind = TextServed if subject.work == "text" else VectorServed
        return kind(facts, supervisor=supervisor, engine=client, room=self._room, clock=self._clock, load_wait_s=node.load_wait_s)

    def _sized(self, size: EngineSize, measured: Measured | None) -> EngineSize:
        """What the owner set wins over what was measured."""
        node = self._settings.node
        if measured is not None:
            size = tuned(size, measured.choice)
        return msgspec.structs.replace(size, threads=node.threads or min(size.threads, self._cores_max), slots=node.slots or size.slots)


def speed_of(work: Work, measured: Measured | None) -> Speed:
    """What an offer says of it."""
    if measured is None:
        return Speed(writes=work == "text")
    return Speed(
        prefill_tokens_per_s=measured.prefill_tokens_per_s,
        decode_tokens_per_s=measured.decode_tokens_per_s,
        decode_by_streams=measured.decode_by_streams,
        writes=work == "text",
    )

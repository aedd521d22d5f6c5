"""A server that the lender already runs, or pays for: everything passes as it came, and its health is watched."""

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from pathlib import Path

import msgspec

from fallow import __version__
from fallow.adapters import machine
from fallow.adapters.endpoint import Endpoint, parse_endpoint, read_key
from fallow.adapters.http_engine import HttpAnswer, HttpEngine, default_tls
from fallow.apps import lend_settings
from fallow.apps.node.continuing import ContinuedAnswer, continued
from fallow.apps.node.served import EVENTS, JSON, NO_PAST, Answer, Lane, Past, Piece, Refused
from fallow.apps.settings import Settings
from fallow.core.admit import BUSY_RETRY_AFTER_MS
from fallow.core.slots import Asker
from fallow.model.card import Hardware
from fallow.model.errors import NAME_MAX, EngineFailed, EngineStalled, Failure, StartFailed, shortened
from fallow.model.messages import OFFERS_MAX, Head
from fallow.model.offer import Load, Price
from fallow.model.receipt import Usage
from fallow.wire import sse
from fallow.wire.llama_answer import added
from fallow.wire.openai import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, MESSAGES_COUNT, MODELS, RERANK, RESPONSES, RESPONSES_COUNT

MODELS_S = 10.0
"""How long the list of models may take."""
MODELS_BYTES_MAX = 4 * 1024 * 1024
TAIL_BYTES = 16 * 1024
LOOK_S = 2.0
LOOK_FAR_S = 30.0
"""A paid service counts how often it is asked."""
LOOKS_MAX = 3
"""A call that failed makes us look sooner, but not more often than so many times in that span."""
SLOTS = 64
"""Calls at the same time, unless the lender says how many."""
BUSY_S_MAX = 60.0
MICRO_PER_USD = 1_000_000
NAMES_TOLD_MAX = 5

KINDS: dict[lend_settings.Kind, frozenset[str]] = {
    "text": frozenset({CHAT, COMPLETIONS, RESPONSES, RESPONSES_COUNT, MESSAGES, MESSAGES_COUNT}),
    "embeddings": frozenset({EMBEDDINGS}),
    "rerank": frozenset({RERANK}),
}
PATHS = frozenset().union(*KINDS.values())
_PRINTABLE = re.compile(r"[ -~]{1,128}")
_ACCOUNT = {401: "does not take the lender's key", 402: "wants to be paid first", 403: "forbids the lender's key what it asks"}
"""Refusals that are between the lender and the server. Their texts name the lender's account, so no caller sees them."""
TOO_MANY = 429

log = logging.getLogger("fallow.node")


class _Entry(msgspec.Struct, frozen=True):
    id: str
    owned_by: str | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Entry]


class _Usage(msgspec.Struct, frozen=True):
    usage: dict[str, object] | None = None


_usage = msgspec.json.Decoder(_Usage)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_models = msgspec.json.Decoder(_Models)


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """What is lent of a server, and what it runs on."""

    served: tuple["AttachedServed", ...]
    hardware: Hardware


async def attach(address: str, settings: Settings, *, only: Collection[str] = (), tls: ssl.SSLContext | None = None) -> Attachment:
    """What is lent of the server at `--engine`: all models that it lists, or `only` these, but for what the lender refuses.

    `tls` says whom to trust instead of the machine's own authorities. Raises BadFlag, BadSetting, StartFailed.
    """
    endpoint = parse_endpoint(address)
    paths = paths_of(settings.lend.refuse_kinds)
    engine = _open(endpoint, _key(settings, endpoint), tls)
    try:
        listed = await find_models(engine)
        names = choose(listed, only=only, refused=settings.lend.refuse_models)
    except StartFailed:
        engine.close()
        raise
    server = AttachedServer(engine, listed, owners=listed, look_s=LOOK_FAR_S if endpoint.is_tls and not endpoint.is_here else LOOK_S)
    served = tuple(
        AttachedServed(
            model=name,
            server=server,
            slots=settings.node.slots or SLOTS,
            context_tokens=settings.engine.context_tokens,
            price=price_of(settings.engine),
            paths=paths,
        )
        for name in names
    )
    return Attachment(served=served, hardware=hardware_of(endpoint, settings.engine, here=machine.read_hardware()))


def _key(settings: Settings, endpoint: Endpoint) -> str:
    if not settings.engine.key_file:
        return ""
    if not (endpoint.is_tls or endpoint.is_here):
        log.warning("the engine's key goes to %s unencrypted; use https where others can listen", endpoint.host)
    return read_key(settings.data / Path(settings.engine.key_file).expanduser())


def _open(endpoint: Endpoint, key: str, tls: ssl.SSLContext | None) -> HttpEngine:
    headers = {"host": endpoint.host_header, "user-agent": f"fallow/{__version__}"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    context = (tls or default_tls()) if endpoint.is_tls else None
    return HttpEngine(endpoint.address, headers, base=endpoint.base, tls=context)


def paths_of(refused: Collection[lend_settings.Kind]) -> frozenset[str]:
    """The HTTP paths of the kinds of work that aren't refused; raises StartFailed if nothing is left."""
    paths = frozenset().union(*(paths for kind, paths in KINDS.items() if kind not in refused))
    if not paths:
        raise StartFailed("lend.refuse_kinds refuses every kind of work, so there is nothing to lend")
    return paths


def price_of(terms: lend_settings.Attached) -> Price:
    """What the lender asks, in micro-credits per million tokens (1 USD is a million of them). A cached prompt costs what others do."""
    prompt = round(terms.usd_per_million_prompt * MICRO_PER_USD)
    return Price(
        prompt_micro_per_munit=prompt,
        cached_prompt_micro_per_munit=prompt,
        output_micro_per_munit=round(terms.usd_per_million_output * MICRO_PER_USD),
    )


def hardware_of(endpoint: Endpoint, terms: lend_settings.Attached, *, here: Hardware) -> Hardware:
    """What the server runs on: as the lender declares it, else `here` if it runs on this machine, else unknown."""
    base = here if endpoint.is_here else Hardware(kind="cpu", isa="unknown", cores=1, memory_bytes=0)
    kind = terms.hardware or ("gpu" if terms.gpu else base.kind)
    return msgspec.structs.replace(base, kind=kind, gpu=terms.gpu or base.gpu or ("unknown" if kind == "gpu" else None))


async def find_models(engine: HttpEngine) -> dict[str, str]:
    """The models that the server lists, each with its owner; raises StartFailed."""
    try:
        status, body = await engine.get(MODELS, MODELS_S, MODELS_BYTES_MAX)
        if status in _ACCOUNT:
            raise StartFailed(
                f"the engine {_ACCOUNT[status]} (status {status}); engine.key_file in the settings names the file with the key"
            )
        models = _owners(body) if status == 200 else {}
    except (EngineFailed, msgspec.DecodeError) as error:
        raise StartFailed(f"the engine does not list its models at /v1/models: {error}") from None
    if not models:
        raise StartFailed(f"the engine lists no models at /v1/models (status {status})")
    return models


def _owners(body: bytes) -> dict[str, str]:
    """Who each listed model says that it is owned by, which is the server's kind; raises DecodeError."""
    return {entry.id: entry.owned_by or "" for entry in _models.decode(body).data}


def choose(listed: Collection[str], *, only: Collection[str], refused: Collection[str]) -> list[str]:
    """Which of the listed models are lent; raises StartFailed naming what is missing or too many."""
    missing = [name for name in only if name not in listed]
    if missing:
        raise StartFailed(f"the engine does not have {_told(missing)}; it has {_told(listed)}")
    names = [name for name in only or listed if name not in refused]
    if not names:
        raise StartFailed("lend.refuse_models refuses every model that the engine has, so there is nothing to lend")
    if len(names) > OFFERS_MAX or any(not 0 < len(name) <= NAME_MAX for name in names):
        most = f"at most {OFFERS_MAX}, with names of {NAME_MAX} characters, can be lent"
        raise StartFailed(f"the engine lists {len(names)} models; {most}: choose some with --model")
    return names


def _told(names: Collection[str]) -> str:
    """Some names, short enough to be said."""
    few = ", ".join(shortened(name) for name in sorted(names)[:NAMES_TOLD_MAX])
    return few if len(names) <= NAMES_TOLD_MAX else f"{few} and {len(names) - NAMES_TOLD_MAX} more"


class AttachedServer:
    """The server as a whole: whether it answers, which models it has, and whether it takes calls now."""

    def __init__(self, engine: HttpEngine, models: Collection[str], *, look_s: float, owners: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        self.owners = owners or {}
        self._known = self._listed = frozenset(models)
        self._look_s = look_s
        self._trouble = ""
        self._busy_until_s = 0.0
        self._refusals: set[int] = set()
        self._failed = asyncio.Event()
        self._watching = asyncio.Lock()

    def trouble_of(self, model: str) -> str:
        """Why a model can't be asked now; empty if it can."""
        return self._trouble or ("" if model in self._listed else "the attached server does not list this model any more")

    @property
    def is_busy(self) -> bool:
        """Whether the server said that it has had too many calls, and asked for a pause that isn't over."""
        return asyncio.get_running_loop().time() < self._busy_until_s

    def rest(self, for_s: float) -> None:
        """Offer nothing for so long."""
        self._busy_until_s = asyncio.get_running_loop().time() + min(for_s, BUSY_S_MAX)

    def doubt(self) -> None:
        """A call failed: look soon."""
        self._failed.set()

    def note_refusal(self, status: int) -> None:
        """The server refused a call on the lender's account; the log has each status once."""
        if status not in self._refusals:
            self._refusals.add(status)
            log.warning("the attached server %s (status %d); the calls go elsewhere", _ACCOUNT[status], status)

    async def watch(self) -> None:
        """Look again and again until cancelled. Every model asks for that; the first one sees to it for all."""
        async with self._watching:
            try:
                while True:
                    gap_s = self._look_s / LOOKS_MAX
                    await asyncio.sleep(gap_s)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._look_s - gap_s):
                            await self._failed.wait()
                    self._failed.clear()
                    await self.look()
            finally:
                self.engine.close()

    async def look(self) -> None:
        """Ask for the list of models, and remember what came of it. A change is logged once."""
        try:
            status, body = await self.engine.get(MODELS, MODELS_S, MODELS_BYTES_MAX)
            listed = frozenset(_owners(body)) if status == 200 else self._listed
        except (EngineFailed, msgspec.DecodeError) as error:
            self._tell(f"it does not list its models: {error}")
            return
        if status not in (200, TOO_MANY):
            self._tell(f"it {_ACCOUNT.get(status, 'does not list its models')} (status {status})")
            return
        self._tell("")
        self._compare(listed)

    def _tell(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("the attached server is not lent now: %s", trouble)
        elif self._trouble and not trouble:
            log.warning("the attached server is lent again")
        self._trouble = trouble

    def _compare(self, listed: frozenset[str]) -> None:
        gone = (self._listed - listed) & self._known
        if gone:
            log.warning("the attached server does not list %s any more", _told(gone))
        new = listed - self._known - self._listed
        if new:
            log.warning("the attached server has new models, which are lent after a restart: %s", _told(new))
        self._listed = listed


class PassedAnswer:
    """An answer that goes on as the bytes that came; only its end is looked at, for the usage."""

    def __init__(self, answer: HttpAnswer) -> None:
        self._answer = answer
        self.usage: Usage | None = None
        self.tokens: tuple[int, ...] = ()

    def head(self) -> Head:
        head = self._answer.head
        if _PRINTABLE.fullmatch(head.content_type):
            return head
        return msgspec.structs.replace(head, content_type=JSON)  # some servers tell no type, and gateways want a printable one

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        tail = held = b""
        is_stream = self._answer.head.content_type.startswith(EVENTS)
        async for chunk in self._answer.body():
            tail = (tail + chunk)[-TAIL_BYTES:] if tail else chunk
            chunk, held = held + chunk, b""
            if self._answer.is_complete:
                held = chunk
                break
            if is_stream and chunk.endswith(sse.DONE):
                held = chunk  # what says that all came goes with the last message: who lacks that isn't told so
            else:
                yield Piece(chunk)
        self.usage = find_usage(tail, events=is_stream)
        yield Piece(held, is_last=True)


def find_usage(tail: bytes, *, events: bool) -> Usage | None:
    """The usage at an answer's end, if the server tells it."""
    if b'"usage"' not in tail:
        return None
    if events:
        event = next((e for e in reversed(sse.EventCutter().feed(tail)) if b'"usage"' in e), b"")
        tail = sse.payload(event)
    try:
        found = _usage.decode(tail).usage
        return added(None, found) if found else None
    except (msgspec.DecodeError, EngineFailed):
        return None


def without_ours(body: bytes) -> bytes:
    """The same request without the `fallow` object, which is between the caller and the gateway; else the bytes that came."""
    if b'"fallow"' not in body:
        return body
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return body  # the server will say what is wrong with it
    return body if fields.pop("fallow", None) is None else msgspec.json.encode(fields)


class AttachedServed(Lane):
    """One model of an attached server. `price` is the lender's, `paths` what they lend of it."""

    def __init__(
        self, *, model: str, server: AttachedServer, slots: int, context_tokens: int, price: Price, paths: frozenset[str] = PATHS
    ) -> None:
        super().__init__(model=model, slots=slots, context_tokens=context_tokens, digest="", paths=paths, price=price)
        self._server = server

    def load(self, *, running: int) -> Load:
        load = super().load(running=running)
        if self._server.trouble_of(self.model):
            return msgspec.structs.replace(load, readiness="failed")
        return msgspec.structs.replace(load, slots_free=0) if self._server.is_busy else load

    async def run(self) -> None:
        """Watch the server until cancelled."""
        await self._server.watch()

    async def ready(self, within_s: float | None = None) -> Failure | None:
        trouble = self._server.trouble_of(self.model)
        return Failure(code="engine_failed", message=f"the attached server can't be asked: {trouble}") if trouble else None

    @contextlib.asynccontextmanager
    async def ask(self, path: str, body: bytes, asker: Asker, past: Past = NO_PAST) -> AsyncIterator[Answer]:
        """The server's refusals pass as they came, but for those that are between it and the lender.

        What the server remembers of other callers' prompts is its own affair: it isn't told whose a call is.

        Raises EngineFailed when the server fails or refuses the lender's key; raises Refused as busy when it has had too many
        calls (status 429): another node is asked, and this one offers no slot for as long as the server's Retry-After says.
        """
        body = without_ours(body)
        if past.delivered is not None:
            body = continued(path, body, past, self._server.owners.get(self.model, ""))
        try:
            async with self._server.engine.post(path, body) as answer:
                self._judge(answer)
                yield ContinuedAnswer(answer, answer.head, past) if past.delivered is not None else PassedAnswer(answer)
        except (EngineFailed, EngineStalled):
            self._server.doubt()
            raise

    def _judge(self, answer: HttpAnswer) -> None:
        status = answer.head.status
        if status == TOO_MANY:
            pause_s = BUSY_RETRY_AFTER_MS / 1000 if answer.retry_after_s is None else answer.retry_after_s
            self._server.rest(pause_s)
            text = "the attached server has had too many calls"
            raise Refused(Failure(code="busy", message=text, retry_after_ms=max(1_000, round(pause_s * 1000))))
        if status in _ACCOUNT:
            self._server.note_refusal(status)
            raise EngineFailed("the attached server refuses its lender")
        if status >= 500:
            raise EngineFailed(f"the attached server answered with status {status}")

"""What is lent of a server that the lender brings, and how it is watched, against a small real server."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trustme

from fallow.adapters.endpoint import parse_endpoint
from fallow.adapters.http_engine import HttpEngine
from fallow.apps.lend_settings import Attached, Kind, Lend
from fallow.apps.node import attached
from fallow.apps.node.attached import (
    PATHS,
    AttachedServed,
    AttachedServer,
    attach,
    choose,
    find_models,
    hardware_of,
    paths_of,
    price_of,
)
from fallow.apps.node.served import Refused
from fallow.apps.settings import Node, Settings
from fallow.core.slots import Asker
from fallow.model.card import Hardware
from fallow.model.errors import BadFlag, BadSetting, EngineFailed, FallowError, StartFailed
from fallow.model.ids import KeyId, NodeId, OrgId
from fallow.model.messages import OFFERS_MAX
from fallow.model.offer import Price
from fallow.wire.openai import CHAT, EMBEDDINGS, RERANK

if TYPE_CHECKING:
    from tests.apps.one_loop import until
else:
    from one_loop import until

pytestmark = pytest.mark.anyio

KEY = "sk-canary-5150"
ACCOUNT = "organization org-canary"
NODE = NodeId("node-1")
ASKER = Asker(org_id=OrgId("home"), key_id=KeyId("key-1"))


class Shop:
    """A server that says what the test wants; everything asked of it is kept."""

    def __init__(self) -> None:
        self.models = ["a", "b"]
        self.list_status = 200
        self.list_body: bytes | None = None
        self.status = 200
        self.body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
        self.headers = ""
        self.port = 0
        self.lines: list[str] = []
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def looks(self) -> int:
        return sum(line.startswith("GET") for line in self.lines)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = next((int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
                self.bodies.append(await reader.readexactly(size))
                self.heads.append(head)
                self.lines.append(head.split("\r\n")[0])
                writer.write(self._answer(head))
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    def _answer(self, head: str) -> bytes:
        status, body, headers = self.status, self.body, self.headers
        if head.startswith("GET"):
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            status, headers = self.list_status, ""
            body = msgspec.json.encode(listed) if self.list_body is None else self.list_body
        return f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


@contextlib.asynccontextmanager
async def open_shop(port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Shop]:
    shop = Shop()
    server = await asyncio.start_server(shop.serve, "127.0.0.1", port, ssl=tls)
    shop.port = server.sockets[0].getsockname()[1]
    async with server:
        yield shop
        for task in shop.tasks:
            task.cancel()
        await asyncio.gather(*shop.tasks)


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    async with open_shop() as one:
        yield one


@pytest.fixture
async def server(shop: Shop) -> AsyncIterator[AttachedServer]:
    engine = HttpEngine(f"127.0.0.1:{shop.port}")
    yield AttachedServer(engine, shop.models, look_s=0.03)
    engine.close()


def served_by(server: AttachedServer, model: str = "a") -> AttachedServed:
    return AttachedServed(model=model, server=server, slots=4, context_tokens=100, price=Price())


def settings_in(folder: Path, *, key: str = "", **engine: Any) -> Settings:
    if key:
        (folder / "engine.key").write_text(key + "\n")
        (folder / "engine.key").chmod(0o600)
        engine["key_file"] = "engine.key"
    return Settings(data=folder, engine=Attached(**engine))


async def lend(address: str, settings: Settings, **options: Any) -> list[AttachedServed]:
    return list((await attach(address, settings, **options)).served)


def close(served: list[AttachedServed]) -> None:
    served[0]._server.engine.close()


async def answer_to(served: AttachedServed, body: bytes = b"{}", path: str = CHAT) -> tuple[int, bytes]:
    async with served.ask(path, body, ASKER) as answer:
        pieces = b"".join([piece.data async for piece in answer.pieces()])
        return answer.head().status, pieces


# what is lent
async def test_every_model_that_is_listed_is_lent_on_the_lenders_terms(shop: Shop, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, usd_per_million_prompt=0.5, usd_per_million_output=1.25, context_tokens=32_000)
    served = await lend(shop.url, settings)
    assert [one.model for one in served] == ["a", "b"]
    offer = served[1].offer(NODE, 99)
    assert (offer.model, offer.context_tokens, offer.slots, offer.expires_at_ms) == ("b", 32_000, 64, 99)
    assert offer.price == Price(prompt_micro_per_munit=500_000, cached_prompt_micro_per_munit=500_000, output_micro_per_munit=1_250_000)
    assert offer.paths == PATHS
    load = served[0].load(running=3)
    assert (load.readiness, load.slots_free) == ("ready", 61)
    assert await served[0].ready() is None
    close(served)


async def test_the_lenders_limits(shop: Shop, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, node=Node(slots=3), lend=Lend(refuse_kinds=("text",), refuse_models=("a", "other")))
    (one,) = await lend(shop.url, settings)
    assert (one.model, one.slots, one.paths) == ("b", 3, frozenset({EMBEDDINGS, RERANK}))
    close([one])


async def test_the_request_names_the_server_and_shows_the_key(shop: Shop, tmp_path: Path) -> None:
    served = await lend(f"http://127.0.0.1:{shop.port}/api/v1", settings_in(tmp_path, key=KEY))
    assert await answer_to(served[0], b'{"model":"a"}') == (200, shop.body)
    assert shop.lines == ["GET /api/v1/models HTTP/1.1", "POST /api/v1/chat/completions HTTP/1.1"]
    for head in shop.heads:
        assert f"\r\nauthorization: Bearer {KEY}\r\n" in head
        assert f"\r\nhost: 127.0.0.1:{shop.port}\r\n" in head
        assert "\r\nuser-agent: fallow/" in head
    close(served)


async def test_without_a_key_none_is_shown(shop: Shop, tmp_path: Path) -> None:
    close(await lend(shop.url, settings_in(tmp_path)))
    assert "authorization" not in shop.heads[0]


async def test_through_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    settings = settings_in(tmp_path, key=KEY)
    async with open_shop(tls=tls) as shop:
        url = shop.url.replace("http:", "https:")
        served = await lend(url, settings, tls=trusting)
        assert (await answer_to(served[0]))[0] == 200
        assert all(f"Bearer {KEY}" in head for head in shop.heads)
        close(served)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's word on the handshake that follows
        with pytest.raises(StartFailed, match="certificate is not trusted"):
            await lend(url, settings)
        assert len(shop.heads) == 2, "the key is not shown to strangers"


async def test_a_key_that_goes_out_readable_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StartFailed):
        await lend("http://nothing.invalid/v1", settings_in(tmp_path, key=KEY))
    assert "unencrypted" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("address", "mode", "fault"),
    [("http://me@127.0.0.1/v1", 0o600, BadFlag), ("ftp://x", 0o600, BadFlag), ("http://127.0.0.1:1/v1", 0o644, BadSetting)],
)
async def test_wrong_words_are_refused(tmp_path: Path, address: str, mode: int, fault: type[FallowError]) -> None:
    settings = settings_in(tmp_path, key=KEY)
    (tmp_path / "engine.key").chmod(mode)
    with pytest.raises(fault) as caught:
        await lend(address, settings)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        pytest.param(200, b'{"data":[]}', r"lists no models at /v1/models \(status 200\)", id="none"),
        pytest.param(404, b"<html>", r"lists no models at /v1/models \(status 404\)", id="another server"),
        pytest.param(301, b"", r"lists no models at /v1/models \(status 301\)", id="elsewhere"),
        pytest.param(200, b"<html>", "does not list its models", id="no JSON"),
        pytest.param(200, b'{"models":[]}', "does not list its models", id="another shape"),
        pytest.param(200, b'{"data":[{"id":5}]}', "does not list its models", id="a name that is none"),
        pytest.param(200, b" " * (attached.MODELS_BYTES_MAX + 1), "over", id="too long"),
        pytest.param(401, ACCOUNT.encode(), "does not take the lender's key.*key_file", id="a wrong key"),
        pytest.param(402, ACCOUNT.encode(), "wants to be paid", id="no credit"),
        pytest.param(403, ACCOUNT.encode(), "forbids", id="a key that may not"),
    ],
)
async def test_a_server_that_cannot_be_lent(shop: Shop, tmp_path: Path, status: int, body: bytes, words: str) -> None:
    shop.list_status, shop.list_body = status, body
    with pytest.raises(StartFailed, match=words) as caught:
        await lend(shop.url, settings_in(tmp_path, key=KEY))
    assert KEY not in str(caught.value)
    assert ACCOUNT not in str(caught.value)


async def test_a_model_that_is_listed_twice_is_lent_once(shop: Shop) -> None:
    shop.models = ["b", "a", "b"]
    engine = HttpEngine(f"127.0.0.1:{shop.port}")
    assert list(await find_models(engine)) == ["b", "a"]
    engine.close()


MANY = [f"m{n}" for n in range(OFFERS_MAX + 1)]


@pytest.mark.parametrize(
    ("listed", "only", "refused", "chosen"),
    [
        (["a", "b"], [], [], ["a", "b"]),
        (["a", "b"], ["b"], [], ["b"]),
        (["a", "b"], ["b", "a"], ["a"], ["b"]),
        (MANY, ["m3"], [], ["m3"]),
        (MANY, [], ["m0"], MANY[1:]),
        (["x" * 201, "a"], ["a"], [], ["a"]),
    ],
)
def test_choosing(listed: list[str], only: list[str], refused: list[str], chosen: list[str]) -> None:
    assert choose(listed, only=only, refused=refused) == chosen


@pytest.mark.parametrize(
    ("listed", "only", "refused", "words"),
    [
        (["a"], ["c"], [], "does not have c; it has a"),
        (MANY, ["c"], [], "and 60 more"),
        (["a"], [], ["a"], "refuse_models"),
        (MANY, [], [], f"lists 65 models; at most {OFFERS_MAX}.*--model"),
        (["x" * 201], [], [], "names of 200 characters"),
        (["", "a"], [], [], "names of 200 characters"),
    ],
)
def test_nothing_to_choose(listed: list[str], only: list[str], refused: list[str], words: str) -> None:
    with pytest.raises(StartFailed, match=words):
        choose(listed, only=only, refused=refused)


def test_kinds() -> None:
    assert paths_of(()) == PATHS
    assert paths_of(("embeddings", "rerank")) == PATHS - {EMBEDDINGS, RERANK}
    only_text: tuple[Kind, ...] = ("text",)
    assert CHAT not in paths_of(only_text)
    with pytest.raises(StartFailed, match="refuse_kinds"):
        paths_of(("text", "embeddings", "rerank"))


@pytest.mark.parametrize(("usd", "micro"), [(0.0, 0), (1.0, 1_000_000), (0.15, 150_000), (1e-6, 1), (4e-7, 0), (1000.0, 10**9)])
def test_a_dollar_is_a_million_micro_credits(usd: float, micro: int) -> None:
    price = price_of(Attached(usd_per_million_prompt=usd, usd_per_million_output=usd))
    assert (price.prompt_micro_per_munit, price.cached_prompt_micro_per_munit, price.output_micro_per_munit) == (micro,) * 3


HERE = Hardware(kind="cpu", isa="x86_64-avx2", cores=8, memory_bytes=2**34)
FAR = Hardware(kind="cpu", isa="unknown", cores=1, memory_bytes=0)


@pytest.mark.parametrize(
    ("address", "declared", "expected"),
    [
        ("http://localhost:1/v1", Attached(), HERE),
        ("unix:/run/e.sock", Attached(), HERE),
        ("http://[::1]:1/v1", Attached(hardware="gpu", gpu="RTX 9"), msgspec.structs.replace(HERE, kind="gpu", gpu="RTX 9")),
        ("https://api.example.org/v1", Attached(), FAR),
        ("https://api.example.org/v1", Attached(hardware="cpu"), FAR),
        ("https://api.example.org/v1", Attached(hardware="gpu"), msgspec.structs.replace(FAR, kind="gpu", gpu="unknown")),
        ("http://10.0.0.2/v1", Attached(gpu="H100"), msgspec.structs.replace(FAR, kind="gpu", gpu="H100")),
        ("http://10.0.0.2/v1", Attached(hardware="cpu", gpu="H100"), msgspec.structs.replace(FAR, gpu="H100")),
    ],
)
def test_hardware(address: str, declared: Attached, expected: Hardware) -> None:
    found = hardware_of(parse_endpoint(address), declared, here=HERE)
    assert found == expected
    assert msgspec.convert(msgspec.to_builtins(found), Hardware) == found, "it can travel"


def test_a_gpu_that_was_found_here_counts_for_a_server_here() -> None:
    here = msgspec.structs.replace(HERE, gpu="found")
    near, far = parse_endpoint("http://localhost/v1"), parse_endpoint("http://10.0.0.2/v1")
    assert hardware_of(near, Attached(), here=here) == here
    assert hardware_of(near, Attached(hardware="gpu"), here=here) == msgspec.structs.replace(here, kind="gpu")
    assert hardware_of(far, Attached(), here=here) == FAR


async def test_the_hardware_comes_with_what_is_lent(shop: Shop, tmp_path: Path) -> None:
    found = await attach(shop.url, settings_in(tmp_path, hardware="gpu", gpu="RTX 9"))
    assert (found.hardware.kind, found.hardware.gpu) == ("gpu", "RTX 9")
    assert found.hardware.cores >= 1
    close(list(found.served))


# how it is watched
async def test_a_server_that_is_gone_and_comes_back(shop: Shop, server: AttachedServer, caplog: pytest.LogCaptureFixture) -> None:
    served = served_by(server)
    for _ in range(3):
        shop.list_status = 500
        await server.look()
    assert served.load(running=0).readiness == "failed"
    failure = await served.ready()
    assert failure is not None
    assert failure.code == "engine_failed"
    assert caplog.text.count("not lent now") == 1, "a change is said once"
    shop.list_status = 200
    await server.look()
    assert (served.load(running=0).readiness, await served.ready()) == ("ready", None)
    assert caplog.text.count("lent again") == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"data":5}'])
async def test_a_list_that_cannot_be_read_is_a_fault(shop: Shop, server: AttachedServer, body: bytes) -> None:
    shop.list_body = body
    await server.look()
    assert served_by(server).load(running=0).readiness == "failed"


async def test_a_server_that_was_closed() -> None:
    async with open_shop() as shop:
        port = shop.port
        engine = HttpEngine(f"127.0.0.1:{port}")
        server = AttachedServer(engine, shop.models, look_s=1)
    await server.look()
    assert served_by(server).load(running=0).readiness == "failed"
    async with open_shop(port):
        await server.look()
        assert served_by(server).load(running=0).readiness == "ready"
        engine.close()


async def test_models_that_vanish_come_back_and_appear(shop: Shop, server: AttachedServer, caplog: pytest.LogCaptureFixture) -> None:
    a, b = served_by(server, "a"), served_by(server, "b")

    def readiness() -> tuple[str, str]:
        return a.load(running=0).readiness, b.load(running=0).readiness

    shop.models = ["b", "c"]
    for _ in range(3):
        await server.look()
    assert readiness() == ("failed", "ready")
    assert caplog.text.count("does not list a any more") == 1
    assert caplog.text.count("new models, which are lent after a restart: c") == 1
    shop.models = ["a"]
    await server.look()
    assert readiness() == ("ready", "failed")
    shop.models = []
    await server.look()
    assert readiness() == ("failed", "failed")
    shop.models = ["a", "b"]
    await server.look()
    assert readiness() == ("ready", "ready")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_is_not_taken_any_more_is_told_once(
    shop: Shop, server: AttachedServer, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    shop.list_status, shop.list_body = status, ACCOUNT.encode()
    for _ in range(3):
        await server.look()
    assert served_by(server).load(running=0).readiness == "failed"
    assert caplog.text.count("the lender's key") == 1
    assert ACCOUNT not in caplog.text


async def test_a_server_that_is_asked_too_often_is_not_gone(shop: Shop, server: AttachedServer) -> None:
    shop.list_status, shop.list_body = 429, b""
    await server.look()
    assert served_by(server).load(running=0).readiness == "ready"


@contextlib.asynccontextmanager
async def watching(*served: AttachedServed) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(one.run()) for one in served]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_all_models_are_watched_with_one_look(shop: Shop, server: AttachedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = most = 0
    look = server.look

    async def counted() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await look()
        await asyncio.sleep(0.01)
        inside -= 1

    monkeypatch.setattr(server, "look", counted)
    async with watching(*(served_by(server, name) for name in ("a", "b", "a", "b"))):
        await until(lambda: shop.looks >= 3)
        shop.models = ["b"]
        await until(lambda: served_by(server, "a").load(running=0).readiness == "failed")
    assert most == 1


async def test_a_call_that_fails_brings_a_look(shop: Shop) -> None:
    engine = HttpEngine(f"127.0.0.1:{shop.port}")
    server = AttachedServer(engine, shop.models, look_s=600)
    served = served_by(server)
    gaps: list[float] = []
    sleep = asyncio.sleep

    async def quick(delay: float) -> None:
        gaps.append(delay)
        await sleep(0)

    shop.status = shop.list_status = 500
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", quick)
        async with watching(served):
            await sleep(0.02)
            assert shop.looks == 0
            with pytest.raises(EngineFailed):
                await answer_to(served)
            while served.load(running=0).readiness == "ready":
                await sleep(0.002)
    assert gaps[0] == 200, "but never more often than this"
    assert shop.looks == 1
    engine.close()


# what callers get
@pytest.mark.parametrize("status", [200, 400, 404, 409, 413, 422])
async def test_answers_and_refusals_pass_as_they_came(shop: Shop, server: AttachedServer, status: int) -> None:
    shop.status = status
    assert await answer_to(served_by(server)) == (status, shop.body)


async def test_the_servers_usage_is_found(server: AttachedServer) -> None:
    async with served_by(server).ask(CHAT, b"{}", ASKER) as answer:
        assert [piece.is_last async for piece in answer.pieces()][-1]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.output_tokens) == (3, 4)


async def test_what_is_between_caller_and_gateway_is_not_passed_on(shop: Shop, server: AttachedServer) -> None:
    await answer_to(served_by(server), b'{"model":"a","fallow":{},"x":1}')
    assert msgspec.json.decode(shop.bodies[-1]) == {"model": "a", "x": 1}
    await answer_to(served_by(server), b'{"model" : "a"}')
    assert shop.bodies[-1] == b'{"model" : "a"}'


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_what_is_between_lender_and_server_stays_there(
    shop: Shop, server: AttachedServer, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    shop.status, shop.body = status, ACCOUNT.encode()
    for _ in range(3):
        with pytest.raises(EngineFailed) as caught:
            await answer_to(served_by(server))
        assert ACCOUNT not in str(caught.value)
    assert caplog.text.count(f"(status {status})") == 1, "it is said once"
    assert ACCOUNT not in caplog.text


@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_a_server_that_fails(shop: Shop, server: AttachedServer, status: int) -> None:
    shop.status = status
    with pytest.raises(EngineFailed, match=str(status)):
        await answer_to(served_by(server))


@pytest.mark.parametrize(
    ("header", "retry_ms"), [("", 2_000), ("retry-after: 7\r\n", 7_000), ("retry-after: 0\r\n", 1_000), ("retry-after: 900\r\n", 900_000)]
)
async def test_a_server_that_has_had_too_many_calls_is_busy(shop: Shop, server: AttachedServer, header: str, retry_ms: int) -> None:
    """Its text names the lender's account, and another node may have room."""
    shop.status, shop.headers, shop.body = 429, header, ACCOUNT.encode()
    with pytest.raises(Refused) as caught:
        await answer_to(served_by(server))
    failure = caught.value.failure
    assert (failure.code, failure.retry_after_ms) == ("busy", retry_ms)
    assert ACCOUNT not in failure.message


async def test_a_busy_server_offers_no_slot_until_its_pause_is_over(
    shop: Shop, server: AttachedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    a, b = served_by(server, "a"), served_by(server, "b")
    server.rest(7)
    for one in (a, b):
        load = one.load(running=1)
        assert (load.readiness, load.slots_free) == ("ready", 0)
    now[0] += 7
    assert b.load(running=1).slots_free == 3
    server.rest(1e9)
    now[0] += attached.BUSY_S_MAX
    assert a.load(running=1).slots_free == 3, "a server can't take us out for long"


async def test_a_key_reaches_no_log_error_or_description(shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = await lend(shop.url, settings_in(tmp_path, key=KEY))
    said: list[str] = [repr(served), repr(vars(served[0])), repr(served[0]._server), repr(served[0]._server.engine)]
    faults: list[Callable[[], None]] = [
        lambda: setattr(shop, "status", 401),
        lambda: setattr(shop, "status", 500),
        lambda: setattr(shop, "list_status", 401),
        lambda: setattr(shop, "list_body", b"<"),
    ]
    for fault in faults:
        fault()
        with contextlib.suppress(EngineFailed):
            await answer_to(served[0])
        await served[0]._server.look()
        said.append(served[0]._server.trouble_of("a"))
    shop.list_status, shop.list_body, shop.models = 200, None, []
    await served[0]._server.look()
    assert KEY not in caplog.text + "".join(said)
    assert any(KEY in head for head in shop.heads), "it is the key that was sent"
    close(served)

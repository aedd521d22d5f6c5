"""Files from a web server, the model hub and this machine itself: found, resumed, checked, learnt and kept."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import sites
from sites import APACHE, PAYLOAD, WEIGHTS, Site, make_gguf, sha256

from fallow.adapters import fetch as module
from fallow.adapters import fetch_http, store
from fallow.adapters.fetch import Options, Pulled, pull, verify
from fallow.adapters.store import Store
from fallow.model.errors import BadChecksum, BadModelFile, FallowError, FetchFailed, LicenceNotAccepted, NoNetwork
from fallow.model.weights import HttpsSource, HubSource, IndexSource, Licence, LocalSource, Source, Weights, WeightsFile

PATH = "/models/tiny.gguf"
REPOSITORY = "someone/Tiny-GGUF"
HUB_PATH = f"/{REPOSITORY}/resolve/main/tiny.gguf"
LARGE = make_gguf(2_000_000, seed=2)
CHANGED = make_gguf(seed=3)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    monkeypatch.setattr(fetch_http, "RETRY_WAITS_S", ())
    monkeypatch.setattr(store, "LOCK_POLL_S", 0.001)
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.0)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with sites.running() as site:
        site.files[PATH] = PAYLOAD
        site.hub[HUB_PATH] = PATH
        yield site


def weights_from(*sources: Source, pinned: bool = False, name: str = "tiny", data: bytes = PAYLOAD) -> Weights:
    known = {"sha256": sha256(data), "size_bytes": len(data)} if pinned else {}
    file = msgspec.convert({"filename": "tiny.gguf", "sources": sources} | known, WeightsFile)
    return Weights(name=name, kind="chat", licence=APACHE, files=(file,))


def https(site: Site) -> HttpsSource:
    return HttpsSource(url=site.url + PATH)


HUB = HubSource(repository=REPOSITORY, file="tiny.gguf")


def get(site: Site, folder: Path, weights: Weights) -> Pulled:
    return pull(weights, folder, options=Options(index_url=site.index_url, hub_url=site.url))


def names(folder: Path) -> set[str]:
    """The models' files in place."""
    return {path.name for path in folder.glob("*-*")}


def kind(site: Site, which: str) -> Source:
    return https(site) if which == "https" else HUB


BOTH = pytest.mark.parametrize("which", ["https", "hub"])


# over the network
@BOTH
@pytest.mark.parametrize("pinned", [True, False])
def test_fetched(site: Site, tmp_path: Path, which: str, pinned: bool) -> None:
    told: list[tuple[str, int, int]] = []
    weights = weights_from(kind(site, which), pinned=pinned)
    pulled = pull(weights, tmp_path, progress=lambda *what: told.append(what), options=Options(hub_url=site.url))
    assert pulled.model.path == tmp_path / f"{sha256(PAYLOAD)[:16]}-tiny.gguf"
    assert pulled.model.path.read_bytes() == PAYLOAD
    assert (pulled.model.sha256, pulled.model.size_bytes) == (sha256(PAYLOAD), len(PAYLOAD))
    assert pulled.model.origin == ("pinned" if pinned else "learnt")
    assert ("download", len(PAYLOAD), len(PAYLOAD)) in told
    assert [left.suffix for left in (tmp_path / "partial").iterdir()] == [".lock"]
    site.asked.clear()
    assert pull(weights, tmp_path, options=Options(hub_url=site.url)) == pulled
    assert site.asked == []


@BOTH
@pytest.mark.parametrize("pinned", [True, False])
def test_broken_off_at_every_tenth_and_gone_on_with(site: Site, tmp_path: Path, which: str, pinned: bool) -> None:
    site.files[PATH] = LARGE
    weights = weights_from(kind(site, which), pinned=pinned, data=LARGE)
    part = tmp_path / "partial" / f"{sha256(LARGE)[:16] if pinned else 'tiny'}-tiny.gguf.part"
    sizes = [0]
    for tenth in range(1, 10):
        site.cuts = [len(LARGE) * tenth // 10 - sizes[-1]]
        with pytest.raises(NoNetwork, match="are kept"):
            get(site, tmp_path, weights)
        sizes.append(part.stat().st_size)
        assert names(tmp_path) == set()
    assert all(before < after for before, after in pairwise(sizes))
    site.asked.clear()
    assert get(site, tmp_path, weights).model.path.read_bytes() == LARGE
    (asked,) = site.requests(PATH)
    assert (asked.range, asked.sent_bytes) == (f"bytes={sizes[-1]}-", len(LARGE) - sizes[-1])


def test_killed_after_the_last_byte(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "partial" / "tiny-tiny.gguf.part"
    part.parent.mkdir()
    part.write_bytes(PAYLOAD)
    part.with_suffix(".etag").write_text('"one"')
    assert get(site, tmp_path, weights_from(https(site))).model.path.read_bytes() == PAYLOAD
    assert [asked.sent_bytes for asked in site.requests(PATH)] == [0]


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"two"'])
def test_parts_of_two_versions_are_never_joined(site: Site, tmp_path: Path, etag: str | None) -> None:
    """Without a checksum only a strong ETag vouches for a part."""
    part = tmp_path / "partial" / "tiny-tiny.gguf.part"
    part.parent.mkdir()
    part.write_bytes(CHANGED[:100_000])
    part.with_suffix(".etag").write_text('"one"' if etag == '"two"' else "")
    site.etag = etag
    assert get(site, tmp_path, weights_from(https(site))).model.path.read_bytes() == PAYLOAD


def test_an_end_that_could_not_be_told(site: Site, tmp_path: Path) -> None:
    """Neither a length nor a checksum: a file that broke off would pass for whole, and its checksum be learnt."""
    site.length = False
    site.cuts = [len(PAYLOAD) - 1]
    with pytest.raises(FetchFailed, match="doesn't say how long"):
        get(site, tmp_path, weights_from(https(site)))
    weights = weights_from(https(site), pinned=True)
    site.cuts = [len(PAYLOAD) - 1]
    with pytest.raises(NoNetwork, match="are kept"):
        get(site, tmp_path / "size known", weights)
    site.cuts = [len(PAYLOAD) - 1]
    unsized = msgspec.structs.replace(weights, files=(msgspec.structs.replace(weights.files[0], size_bytes=None),))
    with pytest.raises(BadChecksum, match="isn't what Fallow pins"):
        get(site, tmp_path, unsized)
    assert names(tmp_path) == set()


def test_a_token_stays_with_the_hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: list[str | None] = []
    real = sites.Handler.send_file

    def send_file(handler: sites.Handler, data: bytes) -> None:
        seen.append(handler.headers["Authorization"])
        real(handler, data)

    monkeypatch.setattr(sites.Handler, "send_file", send_file)
    get(site, tmp_path, weights_from(HUB))
    assert site.tokens
    assert set(site.tokens) == {"Bearer hf_secret"}
    assert seen == [None], "the file lies with another host, which has no business with the token"


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (401, "GatedRepo", r"accepted its terms there; accept them at http.*/someone/Tiny-GGUF, log in"),
        (403, "", "accepted its terms"),
        (404, "EntryNotFound", "has no file tiny.gguf in someone/Tiny-GGUF"),
        (404, "RevisionNotFound", "no revision main"),
        (401, "RepoNotFound", "hub has no someone/Tiny-GGUF/tiny.gguf"),
        (404, "", "hub has no someone/Tiny-GGUF/tiny.gguf"),
        (400, "", "HTTP 400"),
        (503, "", "answers HTTP 503"),
    ],
)
def test_the_hub_refuses(site: Site, tmp_path: Path, status: int, code: str, text: str) -> None:
    site.hub_error = (status, code)
    with pytest.raises(FetchFailed, match=text):
        get(site, tmp_path, weights_from(HUB))


def test_the_hub_sends_what_it_does_not_state(site: Site, tmp_path: Path) -> None:
    site.hub_states = {"X-Linked-Etag": f'"{sha256(CHANGED)}"'}
    with pytest.raises(BadChecksum, match="isn't what its source says"):
        get(site, tmp_path, weights_from(HUB))
    assert names(tmp_path) == set()


def test_a_small_file_of_the_hub_has_no_checksum_there(site: Site, tmp_path: Path) -> None:
    site.hub_states = {"X-Linked-Etag": '"0123456789abcdef0123456789abcdef01234567"'}
    assert get(site, tmp_path, weights_from(HUB)).model.sha256 == sha256(PAYLOAD)


@pytest.mark.parametrize("url", ["http://example.org/tiny.gguf", "http://10.0.0.1/tiny.gguf"])
def test_plain_http_beyond_this_machine(tmp_path: Path, url: str) -> None:
    with pytest.raises(FetchFailed, match="plain http"):
        pull(weights_from(HttpsSource(url=url)), tmp_path)


@pytest.mark.parametrize("data", [PAYLOAD[:-100], b"<html>log in</html>", b""])
def test_what_is_no_model_is_not_learnt(site: Site, tmp_path: Path, data: bytes) -> None:
    site.files[PATH] = data
    with pytest.raises(BadModelFile):
        get(site, tmp_path, weights_from(https(site)))
    assert names(tmp_path) == set()
    assert Store(tmp_path).records().learnt == {}


def test_the_next_source_is_tried(site: Site, tmp_path: Path) -> None:
    gone = HttpsSource(url=site.url + "/gone.gguf")
    other = HttpsSource(url=site.url + "/other.gguf")
    site.files["/other.gguf"] = CHANGED
    assert get(site, tmp_path, weights_from(gone, other, HUB, pinned=True)).model.path.read_bytes() == PAYLOAD
    assert len(site.requests("/other.gguf")) == 1
    with pytest.raises(FetchFailed, match=r"HTTP 404.*\(1 other source failed too\)"):
        get(site, tmp_path / "none", weights_from(gone, other, pinned=True))


# what was learnt
def test_learnt_then_changed(site: Site, tmp_path: Path) -> None:
    weights = weights_from(https(site))
    first = get(site, tmp_path, weights).model
    first.path.unlink()
    site.files[PATH], site.etag = CHANGED, '"two"'
    with pytest.raises(BadChecksum, match=r"at the first pull, whose checksum was learnt \([0-9a-f]{16}…\).*rm tiny --keep-entry --forget"):
        get(site, tmp_path, weights)
    assert names(tmp_path) == set()
    Store(tmp_path).forget(weights)
    assert get(site, tmp_path, weights).model.sha256 == sha256(CHANGED)


def test_a_learnt_checksum_holds_without_the_network(site: Site, tmp_path: Path) -> None:
    weights = weights_from(https(site))
    first = get(site, tmp_path, weights)
    first.model.path.chmod(0o644)
    first.model.path.write_bytes(CHANGED)
    with pytest.raises(BadChecksum, match="is damaged"):
        verify(weights, tmp_path)
    assert get(site, tmp_path, weights) == first
    assert verify(weights, tmp_path) == first


# on this machine
def test_a_local_file_takes_no_room_and_stays_as_it_is(site: Site, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(PAYLOAD)
    mine.chmod(0o640)
    pulled = get(site, tmp_path / "models", weights_from(LocalSource(path=str(mine)), pinned=True))
    assert os.path.samefile(pulled.model.path, mine)
    assert mine.stat().st_mode & 0o777 == 0o640
    mine.write_bytes(CHANGED)
    with pytest.raises(BadChecksum, match="isn't what Fallow pins"):
        get(site, tmp_path / "models", weights_from(LocalSource(path=str(mine)), pinned=True))
    assert mine.read_bytes() == CHANGED


def test_a_local_file_on_another_disk_is_copied(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(PAYLOAD)

    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    pulled = get(site, tmp_path / "models", weights_from(LocalSource(path=str(mine))))
    assert pulled.model.path.read_bytes() == PAYLOAD
    assert not os.path.samefile(pulled.model.path, mine)


def test_a_local_file_that_is_gone(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchFailed, match="there is no file"):
        get(site, tmp_path, weights_from(LocalSource(path=str(tmp_path / "none.gguf"))))


# several at once
@BOTH
def test_two_threads_fetch_once(site: Site, tmp_path: Path, which: str) -> None:
    site.let_go.clear()
    weights = weights_from(kind(site, which))
    with ThreadPoolExecutor(4) as pool:
        pulls = [pool.submit(get, site, tmp_path, weights) for _ in range(4)]
        assert site.wanted.wait(5)
        site.let_go.set()
        assert len({pulled.result(10).model.path for pulled in pulls}) == 1
    assert len(site.requests(PATH)) == 1
    assert names(tmp_path) == {f"{sha256(PAYLOAD)[:16]}-tiny.gguf"}


def _pull_in_a_process(url: str, folder: str, name: str) -> str:
    options = Options(hub_url=url)
    return pull(weights_from(HttpsSource(url=url + PATH), name=name), Path(folder), options=options).model.sha256


def test_processes_do_not_collide(site: Site, tmp_path: Path) -> None:
    """Some of them want the same model, others another one of the same bytes."""
    wanted = ["tiny", "other", "tiny", "other"]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_pull_in_a_process, [(site.url, str(tmp_path), name) for name in wanted], chunksize=1)
    assert set(found) == {sha256(PAYLOAD)}
    assert names(tmp_path) == {f"{sha256(PAYLOAD)[:16]}-tiny.gguf"}
    assert set(Store(tmp_path).records().learnt) == {"tiny/tiny.gguf", "other/tiny.gguf"}
    assert len(site.requests(PATH)) <= 2


# a licence
def test_a_licence_is_accepted_once(site: Site, tmp_path: Path) -> None:
    licence = Licence(name="Strange Terms", link="https://example.org/terms", must_accept=True)
    weights = msgspec.structs.replace(weights_from(https(site)), licence=licence)
    with pytest.raises(LicenceNotAccepted, match=r"Strange Terms, https://example.org/terms; .*pull tiny --accept-licence") as caught:
        get(site, tmp_path, weights)
    assert caught.value.code == "licence_not_accepted"
    assert site.asked == []
    Store(tmp_path).accept(weights)
    get(site, tmp_path, weights)
    changed = msgspec.structs.replace(weights, licence=Licence(name="Stranger Terms", link="https://example.org/terms", must_accept=True))
    with pytest.raises(LicenceNotAccepted):
        get(site, tmp_path, changed)


def test_every_failure_is_one_line(site: Site, tmp_path: Path) -> None:
    for source in (HttpsSource(url=site.url + "/none"), HUB, LocalSource(path="/nowhere"), IndexSource(members=(sites.PIN,))):
        site.hub_error, site.page_status = (404, ""), 404
        with pytest.raises(FallowError) as caught:
            get(site, tmp_path, weights_from(source))
        assert "\n" not in caught.value.message
    assert WEIGHTS.sha256 is not None

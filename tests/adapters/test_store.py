"""The models folder: one copy of the same bytes, no more than it may take, and nothing forgotten between pulls."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from sites import APACHE, PAYLOAD, make_gguf, sha256

from fallow.adapters.fetch import Options, pull
from fallow.adapters.memory import RECORDS_FILE, Learnt, Use
from fallow.adapters.store import Room, Store
from fallow.model.errors import BadChecksum, DiskFull, FetchFailed, LicenceNotAccepted
from fallow.model.weights import Licence, LocalSource, Weights, WeightsFile

OTHER = make_gguf(seed=9)


def local(folder: Path, name: str, data: bytes = PAYLOAD, *, pinned: bool = False, must_accept: bool = False) -> Weights:
    """A model from a file of this machine."""
    path = folder / f"{name}.gguf"
    path.write_bytes(data)
    licence = Licence(name="Strange", link="https://example.org/", must_accept=True) if must_accept else APACHE
    file = WeightsFile(filename=f"{name}.gguf", sources=(LocalSource(path=str(path)),), sha256=sha256(data) if pinned else None)
    return Weights(name=name, kind="chat", licence=licence, files=(file,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def names(store: Store) -> set[str]:
    return {path.name.partition("-")[2] for path in store.folder.glob("*-*")}


# one copy
@pytest.mark.parametrize("pinned", [True, False])
def test_the_same_bytes_take_room_once(tmp_path: Path, store: Store, pinned: bool) -> None:
    pieces = [pull(local(tmp_path, name, pinned=pinned), store.folder).model for name in ("one", "two")]
    assert names(store) == {"one.gguf", "two.gguf"}
    assert pieces[0].path.samefile(pieces[1].path)
    assert store.used_bytes() == len(PAYLOAD)


def test_a_pinned_twin_needs_no_source(tmp_path: Path, store: Store) -> None:
    pull(local(tmp_path, "one"), store.folder)
    two = local(tmp_path, "two", pinned=True)
    (tmp_path / "two.gguf").unlink()
    assert pull(two, store.folder).model.path.read_bytes() == PAYLOAD


def test_a_damaged_twin_is_not_taken(tmp_path: Path, store: Store) -> None:
    pull(local(tmp_path, "one"), store.folder)
    path = store.named(sha256(PAYLOAD), "one.gguf")
    path.unlink()
    path.write_bytes(OTHER)
    assert store.twin(sha256(PAYLOAD)) is None
    assert pull(local(tmp_path, "two", pinned=True), store.folder).model.path.read_bytes() == PAYLOAD


def test_what_another_model_uses_stays(tmp_path: Path, store: Store) -> None:
    one = local(tmp_path, "one")
    same = msgspec.structs.replace(one, name="same")
    other = local(tmp_path, "other", OTHER)
    for weights in (one, same, other):
        pull(weights, store.folder)
    assert store.remove(one, [same, other]) == 0
    assert store.is_here(same)
    assert store.remove(same, [one, other]) == len(PAYLOAD), "one is still listed, but uses it no more"
    assert not store.is_here(same)
    assert names(store) == {"other.gguf"}
    assert set(store.records().used) == {"other"}
    assert (tmp_path / "one.gguf").read_bytes() == PAYLOAD, "the user's own file"


# room
def test_the_budget_holds_and_names_what_could_go(tmp_path: Path, store: Store) -> None:
    for name, data in (("one", PAYLOAD), ("two", OTHER)):
        pull(local(tmp_path, name, data), store.folder)
    third = local(tmp_path, "third", make_gguf(seed=10))
    budget = 3 * len(PAYLOAD) - 1
    with pytest.raises(DiskFull, match=r"third needs .* \[models\] disk_gb allows .* make room: `fallow models rm") as caught:
        pull(third, store.folder, options=Options(budget_bytes=budget))
    assert caught.value.message.count("fallow models rm") == 1, "one of them is enough"
    assert names(store) == {"one.gguf", "two.gguf"}
    pull(third, store.folder, options=Options(budget_bytes=budget + 1))


def test_what_lay_idle_longest_goes_first(tmp_path: Path, store: Store) -> None:
    for name, data in (("one", PAYLOAD), ("two", OTHER)):
        weights = local(tmp_path, name, data)
        pull(weights, store.folder)
    files = {name: use.files for name, use in store.records().used.items()}
    for old, new in (("one", "two"), ("two", "one")):
        used = {old: Use(at_ms=1, files=files[old]), new: Use(at_ms=1_000_000_000_000, files=files[new])}
        store.change(lambda records, used=used: msgspec.structs.replace(records, used=used))  # type: ignore[misc]
        room = Room(store=store, model="third", budget_bytes=store.used_bytes())
        with pytest.raises(DiskFull, match=rf"make room: `fallow models rm {old}`"):
            room.check(to_write_bytes=0, to_keep_bytes=1)
    with pytest.raises(DiskFull, match=r"rm two` \(.*`fallow models rm one`"):
        Room(store=store, model="third", budget_bytes=store.used_bytes()).check(to_write_bytes=0, to_keep_bytes=2 * len(PAYLOAD))
    with pytest.raises(DiskFull) as caught:
        Room(store=store, model="two", budget_bytes=1).check(to_write_bytes=0, to_keep_bytes=1)
    assert "rm two" not in caught.value.message, "what is wanted isn't what should go"


def test_no_budget_is_the_whole_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.folder.mkdir()
    room = Room(store=store, model="x", budget_bytes=0)
    room.check(to_write_bytes=1, to_keep_bytes=1 << 60)
    usage = shutil.disk_usage(store.folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    room.check(to_write_bytes=10, to_keep_bytes=10)
    with pytest.raises(DiskFull, match="the disk or your quota is full: x needs"):
        room.check(to_write_bytes=11, to_keep_bytes=11)


# memory
def test_a_licence_must_be_accepted_first(tmp_path: Path, store: Store) -> None:
    weights = local(tmp_path, "one", must_accept=True)
    with pytest.raises(LicenceNotAccepted):
        pull(weights, store.folder)
    assert not store.folder.exists() or names(store) == set()
    store.accept(weights)
    assert Store(store.folder).accepted(weights)
    pull(weights, store.folder)
    other = msgspec.structs.replace(weights, licence=Licence(name="Strange", link="https://example.org/2", must_accept=True))
    assert not store.accepted(other), "other terms"


def test_learnt_then_changed(tmp_path: Path, store: Store) -> None:
    weights = local(tmp_path, "one")
    assert store.known("one", weights.files[0]) is None
    first = pull(weights, store.folder).model
    known = store.known("one", weights.files[0])
    assert known is not None
    assert (known.sha256, known.size_bytes, known.origin) == (first.sha256, len(PAYLOAD), "learnt")
    first.path.unlink()
    (tmp_path / "one.gguf").write_bytes(OTHER)
    with pytest.raises(BadChecksum, match="was learnt"):
        pull(weights, store.folder)
    store.forget(weights)
    assert pull(weights, store.folder).model.sha256 == sha256(OTHER)


def test_a_pin_beats_what_was_learnt(tmp_path: Path, store: Store) -> None:
    weights = local(tmp_path, "one", pinned=True)
    store.learn("one", weights.files[0], Learnt(sha256="0" * 64, size_bytes=1))
    assert pull(weights, store.folder).model.origin == "pinned"


def test_many_who_remember_at_once_forget_nothing(tmp_path: Path, store: Store) -> None:
    file = local(tmp_path, "one").files[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: Store(store.folder).learn(f"m{at}", file, Learnt(sha256="0" * 64, size_bytes=1)), range(40)))
    assert len(store.records().learnt) == 40


@pytest.mark.parametrize("data", [b"", b"{", b'{"learnt": 3}', b"\xff"])
def test_records_that_cannot_be_read_are_not_forgotten(tmp_path: Path, store: Store, data: bytes) -> None:
    weights = local(tmp_path, "one")
    pull(weights, store.folder)
    (store.folder / RECORDS_FILE).write_bytes(data)
    with pytest.raises(FetchFailed, match=r"records\.json.*delete it"):
        pull(weights, store.folder)
    assert (store.folder / RECORDS_FILE).read_bytes() == data

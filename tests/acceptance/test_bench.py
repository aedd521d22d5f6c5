"""`fallow bench` with real models: what it says is whole and agrees with itself. How fast it was isn't judged."""

from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from running import EMBEDDER, MODEL

from fallow.adapters import machine
from fallow.adapters.catalogue import load_catalogue
from fallow.adapters.measurements import Measurements, build_of, key_of
from fallow.adapters.store import link_or_copy
from fallow.apps.settings import load
from fallow.cli.bench import bench
from fallow.model.measured import Measured, rate_at


@pytest.fixture
def data(weights: None, tmp_path: Path) -> Path:
    """A data folder whose models folder has the models, and no measurements yet."""
    data, models = tmp_path / "data", tmp_path / "models"
    data.mkdir()
    models.mkdir()
    for path in load(tmp_path / "default").models_folder.glob("*-*"):
        link_or_copy(path, models / path.name)
    (data / "settings.toml").write_text(f'[models]\nfolder = "{models}"\n[lend]\nprofile = "dedicated"\n[power]\nusd_per_kwh = 0.25\n')
    return data


def test_bench(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(psutil.Process().children(recursive=True))
    assert bench(data, [MODEL, EMBEDDER], as_json=True) == 0
    said = msgspec.json.decode(capfd.readouterr().out)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [one for one in left if "fallow.engines" in " ".join(one.cmdline())]
    here, (text, vectors) = said["machine"], said["models"]
    assert (here["isa"], here["cores"]) == (machine.read_isa(), machine.physical_cores())
    assert here["memory_bytes_per_s"] > 0
    check_text(text, here)
    check_vectors(vectors)
    check_remembered(data, text, here["cores_allowed"])


def check_text(found: dict[str, Any], here: dict[str, Any]) -> None:
    assert (found["model"], found["work"]) == (MODEL, "text")
    assert {point["threads"] for point in found["points"]} == {1, max(1, here["cores_allowed"] // 2), here["cores_allowed"]}
    for point in found["points"]:
        streams = dict(point["decode_by_streams"])
        assert 1 in streams
        assert set(streams) == {1, 2, 4, 8} or not found["is_whole"]
        assert all(rate > 0 for rate in streams.values())
        assert point["prefill_tokens_per_s"] > 0
    chosen = next(point for point in found["points"] if point["threads"] == found["choice"]["threads"])
    assert dict(found["decode_by_streams"]) == dict(chosen["decode_by_streams"])
    assert found["decode_tokens_per_s"] == dict(chosen["decode_by_streams"])[1]
    assert found["choice"]["slots"] in dict(chosen["decode_by_streams"])
    assert found["bytes_per_token"] > 90e6, "all weights are read for each token"
    share = found["decode_tokens_per_s"] * found["bytes_per_token"] / here["memory_bytes_per_s"]
    assert found["roofline_share"] == pytest.approx(share)
    assert found["power"]["value"] > 0
    cost = found["power"]["value"] / found["decode_tokens_per_s"] / 3.6e6 * 0.25 * 1e12
    assert cost <= found["cost"]["output_micro_per_munit"] <= cost + 1
    assert found["cost"]["cached_prompt_micro_per_munit"] == 0


def check_vectors(found: dict[str, Any]) -> None:
    assert (found["model"], found["work"]) == (EMBEDDER, "embeddings")
    assert set(dict(found["texts_by_batch"])) == {1, 8}
    assert found["prefill_tokens_per_s"] > rate_at(tuple(map(tuple, found["texts_by_batch"])), 1), "a text has many tokens"
    assert (found["decode_by_streams"], found["roofline_share"]) == ([], None)
    assert found["cost"]["prompt_micro_per_munit"] > found["cost"]["output_micro_per_munit"] == 0


def check_remembered(data: Path, text: dict[str, Any], cores_allowed: int) -> None:
    cache, digest = Measurements(load(data).models_folder), load_catalogue(data).find(MODEL).sha256
    assert digest is not None
    kept = cache.find(key_of(machine.read_hardware(), cores_allowed), digest, build_of("llama"))
    assert kept == msgspec.convert({name: text[name] for name in Measured.__struct_fields__}, Measured)


def test_a_table_for_people(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(data, [EMBEDDER], as_json=False) == 0
    said = capfd.readouterr().out
    for words in (EMBEDDER, machine.read_isa(), "GB/s", "texts/s by 8", "chosen", "W beyond idling", "USD per million tokens at 0.25"):
        assert words in said


@pytest.mark.parametrize(("names", "words"), [(["no-such-model"], "no-such-model"), (["smollm2-360m-instruct-q8-0"], "fallow models pull")])
def test_what_can_not_be_measured(data: Path, capfd: pytest.CaptureFixture[str], names: list[str], words: str) -> None:
    assert bench(data, names, as_json=False) == 1
    said = capfd.readouterr()
    assert said.err.startswith("fallow: ")
    assert said.err.count("\n") == 1
    assert words in said.err
    assert said.out == ""

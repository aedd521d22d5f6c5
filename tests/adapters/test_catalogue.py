"""The catalogue: what the package lists holds together, a user's own file comes first, and every mistake in it is named."""

import re
import string
import tomllib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.adapters.catalogue import USER_FILE, USER_HEAD, Catalogue, load_catalogue, package, write_entry
from fallow.model.errors import BadSetting, UnknownModel
from fallow.model.weights import HttpsSource, HubSource, IndexSource, Licence, LocalSource, Source, Weights, WeightsFile

BITS_MIN, BITS_MAX = 4.0, 10.0  # of a parameter, with what a file holds besides
DIGEST = "0" * 64
ENTRY = """
[[model]]
name = "mine"
kind = "chat"
licence = { name = "MIT" }
files = [{ filename = "mine.gguf", sources = [{ type = "local", path = "/models/mine.gguf" }] }]
"""


def write(folder: Path, text: str) -> Path:
    (folder / USER_FILE).write_text(text)
    return folder


def mine(name: str = "mine", **more: object) -> Weights:
    file = WeightsFile(filename="mine.gguf", sources=(LocalSource(path="/models/mine.gguf"),))
    return msgspec.structs.replace(Weights(name=name, kind="chat", licence=Licence(name="MIT"), files=(file,)), **more)


# the package's
def test_names_and_aliases_are_unique_and_one_is_the_default() -> None:
    words = Counter(word for weights in package() for word in (weights.name, *weights.aliases))
    assert [word for word, times in words.items() if times > 1] == []
    assert [weights.name for weights in package() if weights.default] == ["smollm2-135m-instruct"]
    assert Catalogue(package()).default.name == "smollm2-135m-instruct"


def test_what_is_in_it() -> None:
    by_name = {weights.name: weights for weights in package()}
    assert {"chat", "completion", "embedding", "rerank", "vision", "code"} == {weights.kind for weights in package()}
    for name in ("smollm2-135m-instruct", "gemma-3-270m", "all-minilm-l6-v2"):
        assert all(isinstance(file.sources[0], IndexSource) for file in by_name[name].files), "it comes from the package index"
    chat = [weights for weights in package() if weights.kind == "chat" and not weights.default]
    quantisations = {parts: {one.quantisation for one in chat if (one.family, one.parameters) == parts}
                     for parts in {(one.family, one.parameters) for one in chat}}  # fmt: skip
    assert all(len(found) == 2 for found in quantisations.values()), quantisations
    assert min(one.parameters or 0 for one in package() if one.kind == "chat") < 2e8
    assert max(one.parameters or 0 for one in chat) > 14e9


@pytest.mark.parametrize("weights", package(), ids=lambda weights: weights.name)
def test_an_entry_is_sensible(weights: Weights) -> None:
    assert weights.parameters is not None
    assert 1e7 < weights.parameters < 16e9
    assert weights.context_tokens is not None
    assert 256 <= weights.context_tokens <= 1 << 18
    assert weights.licence.link.startswith("https://")
    assert weights.quantisation
    assert (weights.kind == "embedding") == (weights.dimensions is not None)
    assert (weights.kind == "vision") == ("image" in weights.senses) == (weights.file("projector") is not None)
    assert weights.kind not in {"embedding", "rerank"} or weights.pooling is not None
    free = weights.licence.name in {"Apache-2.0", "MIT"}
    assert weights.licence.must_accept != free
    for file in weights.files:
        assert not any(isinstance(source, HttpsSource | LocalSource) for source in file.sources)
        if isinstance(file.sources[0], IndexSource):
            assert file.sha256 is not None
            assert file.size_bytes is not None
            assert file.size_bytes > 0.9 * sum(one.wheel_bytes for one in file.sources[0].members if len(weights.files) == 1)
        if file.role == "model" and file.size_bytes is not None:
            assert BITS_MIN < 8 * file.size_bytes / weights.parameters < BITS_MAX


def test_every_word_finds_its_model() -> None:
    catalogue = Catalogue(package())
    for weights in package():
        assert all(catalogue.find(word) is weights for word in (weights.name, *weights.aliases))


# finding
@pytest.mark.parametrize(
    ("word", "near"),
    [("smollm2-135m", "smollm2-135m-instruct"), ("SMOLLM2-135M-INSTRUCT", "smollm2-135m-instruct"), ("gema-3-270m", "gemma-3-270m")],
)
def test_near_names(word: str, near: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        Catalogue(package()).find(word)
    assert near in caught.value.message
    assert caught.value.param == "model"


@pytest.mark.parametrize("word", ["", "zzzzzz!", "x" * 100_000, "two\nlines"])
def test_nothing_near(word: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        Catalogue(package()).find(word)
    assert "`fallow models list`" in caught.value.message
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


# a user's own
def test_no_file_is_no_models(tmp_path: Path) -> None:
    assert load_catalogue(tmp_path).all() == list(package())
    assert list(tmp_path.iterdir()) == []


def test_a_users_entry_hides_the_packages(tmp_path: Path) -> None:
    own = ENTRY.replace('"mine"', '"smollm2-360m-instruct-q4-k-m"')
    catalogue = load_catalogue(write(tmp_path, own + ENTRY))
    assert [one.name for one in catalogue.all()[:2]] == ["smollm2-360m-instruct-q4-k-m", "mine"]
    assert len(catalogue.all()) == len(package()) + 1
    found = catalogue.find("smollm2-360m-instruct-q4-k-m")
    assert (found.licence.name, catalogue.is_users(found)) == ("MIT", True)
    assert not catalogue.has("smollm2-360m-instruct"), "the alias went with the entry"
    assert not catalogue.is_users(catalogue.default)
    hiding = load_catalogue(write(tmp_path, ENTRY.replace('"mine"', '"smollm2-135m-instruct"')))
    assert hiding.is_users(hiding.default)


def test_a_users_alias_wins(tmp_path: Path) -> None:
    text = ENTRY.replace('kind = "chat"', 'kind = "chat"\naliases = ["qwen3-4b"]')
    assert load_catalogue(write(tmp_path, text)).find("qwen3-4b").name == "mine"


CHANGES = [
    ('kind = "chat"', 'kind = "poem"', "kind: "),
    ('kind = "chat"', "", "kind: it must be given"),
    ('kind = "chat"', 'kind = "chat"\ncolour = "red"', "colour: there is no such field"),
    ('kind = "chat"', 'kind = "chat"\ncontext_tokens = 0', "context_tokens: "),
    ('kind = "chat"', 'kind = "chat"\nparameters = "many"', "parameters: "),
    ('kind = "chat"', 'kind = "chat"\nsenses = ["image"]', "senses: "),
    ('kind = "chat"', 'kind = "chat"\nshorter_dimensions = true', "shorter_dimensions: "),
    ('kind = "chat"', 'kind = "chat"\ndefault = true', "default: "),
    ('kind = "chat"', 'kind = "chat"\naliases = ["mine"]', "aliases: "),
    ('kind = "chat"', 'kind = "chat"\naliases = ["gemma-3-270m"]', "aliases: 'gemma-3-270m' is the name of a model of Fallow's"),
    ('kind = "chat"', 'kind = "embedding"\nengine = "onnx"', "files: an ONNX model"),
    ('{ name = "MIT" }', '"MIT"', "licence: "),
    ('{ name = "MIT" }', '{ name = "MIT", must_accept = true }', "licence.link: "),
    ('{ name = "MIT" }', '{ name = "MIT", link = "javascript:x" }', "licence.link: "),
    ('"mine.gguf", sources', '"../mine.gguf", sources', "files[0].filename: "),
    ('"mine.gguf", sources', '"mine.gguf", role = "projector", sources', "files: one of them must have the role 'model'"),
    ('"mine.gguf", sources', '"mine.gguf", sha256 = "12", sources', "files[0].sha256: "),
    ('"/models/mine.gguf"', '"models/mine.gguf"', "files[0].sources[0].path: "),
    ('type = "local", path', 'type = "ftp", path', "files[0].sources[0]"),
    ('"local", path = "/models/mine.gguf"', '"https", url = "http://example.org/x"', "files[0].sources[0].url: expected https"),
    ('"local", path = "/models/mine.gguf"', '"hub", repository = "a/b", file = "../c"', "files[0].sources[0].file: "),
    ('"local", path = "/models/mine.gguf"', '"hub", repository = "b", file = "c"', "files[0].sources[0].repository: "),
]


@pytest.mark.parametrize(("before", "after", "said"), CHANGES, ids=lambda text: text[:30])
def test_a_bad_entry_names_file_model_and_field(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in ENTRY
    with pytest.raises(BadSetting) as caught:
        load_catalogue(write(tmp_path, ENTRY.replace(before, after)))
    assert caught.value.message.startswith(str(tmp_path / USER_FILE))
    assert "'mine'" in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[model]\n", "line 1"),
        ("[model]\nname = 'x'\n", "[[model]]"),
        ("models = []\n", "models: each model stands under"),
        ("\n[[model]]\nkind = 'chat'\n", "line 2, model number 1: "),
        (ENTRY + ENTRY, "'mine'"),
        ("#" * (4 << 20) + "#", "up to"),
    ],
    ids=["toml", "one table", "another key", "no name", "twice", "too long"],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSetting) as caught:
        load_catalogue(write(tmp_path, text))
    assert str(tmp_path / USER_FILE) in caught.value.message
    assert said in caught.value.message


# adding and removing
def test_added_and_removed_again_the_rest_stays_as_it_was(tmp_path: Path) -> None:
    text = "# my own words\n" + ENTRY + "\n# and more of them"
    catalogue = load_catalogue(write(tmp_path, text)).add(mine("other")).add(mine("third"))
    assert load_catalogue(tmp_path).all() == catalogue.all()
    assert (tmp_path / USER_FILE).read_text().startswith(text)
    catalogue = catalogue.remove("other").remove("third")
    assert (tmp_path / USER_FILE).read_text().strip() == text
    assert catalogue.remove("mine").all() == list(package())
    assert "# my own words" in (tmp_path / USER_FILE).read_text()


def test_the_first_one_added_makes_the_file(tmp_path: Path) -> None:
    load_catalogue(tmp_path).add(mine())
    assert (tmp_path / USER_FILE).read_text().startswith(USER_HEAD)
    assert load_catalogue(tmp_path).find("mine") == mine()
    with pytest.raises(UnknownModel, match="smollm2"):
        load_catalogue(tmp_path).remove("smollm2-135m-instruct")


def test_a_file_that_cannot_be_edited_is_left_alone(tmp_path: Path) -> None:
    inline = 'model = [{ name = "mine", kind = "chat", licence = { name = "MIT" }, files = [{ filename = "m.gguf", sources = [{ type = "local", path = "/m" }] }] }]\n'  # noqa: E501
    catalogue = load_catalogue(write(tmp_path, inline))
    with pytest.raises(BadSetting, match=USER_FILE):
        catalogue.add(mine("other"))
    with pytest.raises(BadSetting, match="can't be edited here"):
        catalogue.remove("mine")
    assert (tmp_path / USER_FILE).read_text() == inline


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
SOURCES: st.SearchStrategy[Source] = st.one_of(
    TEXT.map(lambda text: LocalSource(path="/" + text)),
    st.text(string.ascii_letters + "\"\\'#", min_size=1, max_size=20).map(lambda text: HttpsSource(url=f"https://example.org/{text}")),
    st.text(string.ascii_letters + "0123456789 '\"", min_size=1, max_size=20).map(lambda text: HubSource(repository="a/b", file=text)),
)


@given(st.lists(SOURCES, min_size=1, max_size=3), TEXT, TEXT, st.booleans())
def test_what_is_written_reads_back_the_same(sources: list[Source], family: str, licence: str, pinned: bool) -> None:
    file = WeightsFile(filename="a.gguf", sources=tuple(sources), sha256=DIGEST if pinned else None)
    entry = mine(family=family, licence=Licence(name=licence), files=(file,), aliases=("one", "two"), context_tokens=5)
    assert msgspec.convert(tomllib.loads(write_entry(entry))["model"][0], Weights) == entry


@pytest.mark.parametrize("weights", package(), ids=lambda weights: weights.name)
def test_the_packages_own_read_back_the_same(weights: Weights, tmp_path: Path) -> None:
    plain = msgspec.structs.replace(weights, default=False)
    assert load_catalogue(write(tmp_path, write_entry(plain))).find(plain.name) == plain


def test_the_example_in_the_docs_can_be_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (Path(__file__).parents[2] / "docs" / "models.md").read_text(), re.DOTALL)
    assert load_catalogue(write(tmp_path, example)).find("mine").name == "my-model"

"""The models that Fallow knows by name: those of the package, and those of the user's own file, which come first."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from fallow.adapters.address import is_private
from fallow.adapters.files import write_private
from fallow.model.errors import BadSetting, UnknownModel, shortened
from fallow.model.weights import HttpsSource, IndexSource, Source, Weights, WeightsFile
from fallow.wire import complaint

USER_FILE = "models.toml"
PACKAGE_FILE = Path(__file__).with_name("catalogue.toml")
FILE_BYTES_MAX = 4 << 20
NEAR_MAX = 4
HEADING = "[[model]]"
USER_HEAD = "# Models of your own: `fallow models add` writes here, and so may you. An entry hides the package's of the same name.\n"

_HEADING = re.compile(r"^[ \t]*\[\[[ \t]*model[ \t]*\]\]", re.MULTILINE)


class Catalogue:
    """All models by name and alias."""

    def __init__(self, package: tuple[Weights, ...], user: tuple[Weights, ...] = (), user_file: Path | None = None) -> None:
        self._user_file = user_file
        own = {weights.name for weights in user}
        self._user = {weights.name: weights for weights in user}
        self._all = {weights.name: weights for weights in (*user, *(one for one in package if one.name not in own))}
        self._default = self._all[next(one.name for one in package if one.default)]  # it may be the user's own of that name
        words = {alias: one.name for one in package if one.name not in own for alias in one.aliases}
        words |= {alias: one.name for one in user for alias in one.aliases}
        self._words = words | {name: name for name in self._all}  # a name beats an alias: a new alias of ours can't hide a user's model

    def all(self) -> list[Weights]:
        """Every model; the user's own first, each as its file has them."""
        return list(self._all.values())

    def find(self, word: str) -> Weights:
        """The model of this name or alias; raises UnknownModel that lists what comes near."""
        name = self._words.get(word)
        if name is not None:
            return self._all[name]
        near = difflib.get_close_matches(word.lower()[:64], self._words, n=NEAR_MAX, cutoff=0.5)
        hint = f"near it are {', '.join(near)}; " if near else ""
        raise UnknownModel(
            f"no model is called {shortened(word, 64)!r}; {hint}`fallow models list` shows all {len(self._all)}", param="model"
        )

    def has(self, word: str) -> bool:
        """Whether a model has this name or alias."""
        return word in self._words

    @property
    def default(self) -> Weights:
        """The model of a machine that was told nothing else."""
        return self._default

    def is_users(self, weights: Weights) -> bool:
        """Whether it stands in the user's own file."""
        return weights.name in self._user

    def add(self, entry: Weights) -> "Catalogue":
        """The catalogue with one more model, written behind what the user's file holds; raises BadSetting."""
        path = self._needs_file()
        text = path.read_text() if path.exists() else USER_HEAD
        return self._rewritten(path, text.rstrip("\n") + "\n\n" + write_entry(entry), {**self._user, entry.name: entry})

    def remove(self, name: str) -> "Catalogue":
        """The catalogue without one of the user's own models; raises UnknownModel, or BadSetting if the file can't be edited."""
        if name not in self._user:
            raise UnknownModel(f"{shortened(name, 64)!r} isn't among the models in {self._needs_file()}")
        path = self._needs_file()
        text = path.read_text()
        starts = [found.start() for found in _HEADING.finditer(text)]
        at = list(self._user).index(name)
        if len(starts) == len(self._user):
            text = text[: starts[at]] + text[starts[at + 1] if at + 1 < len(starts) else len(text) :]
        return self._rewritten(path, text, {key: entry for key, entry in self._user.items() if key != name})

    def _needs_file(self) -> Path:
        assert self._user_file is not None, "a catalogue of a data folder has one"
        return self._user_file

    def _rewritten(self, path: Path, text: str, expected: dict[str, Weights]) -> "Catalogue":
        """Keep the new text if it says what was meant: the user may have written the file in a way that we can't edit."""
        user = _read(text, path)
        if {one.name: one for one in user} != expected:
            raise BadSetting(
                f"{path} is written in a way that can't be edited here; write each model under a heading {HEADING}, or edit it by hand"
            )
        catalogue = Catalogue(package(), _checked(user, path, text, package()), path)
        write_private(path, text)
        return catalogue


def load_catalogue(data: Path) -> Catalogue:
    """The package's models and those of a data folder; raises BadSetting naming file, line, model and field."""
    path = data / USER_FILE
    try:
        size = path.stat().st_size
        text = path.read_text() if size <= FILE_BYTES_MAX else ""
    except FileNotFoundError:
        return Catalogue(package(), (), path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"{path} can't be read: {error}") from None
    if size > FILE_BYTES_MAX:
        raise BadSetting(f"{path} has {size} bytes; up to {FILE_BYTES_MAX} can be read")
    return Catalogue(package(), _checked(_read(text, path), path, text, package()), path)


@cache
def package() -> tuple[Weights, ...]:
    """The models that come with Fallow."""
    text = PACKAGE_FILE.read_text()
    models = _read(text, PACKAGE_FILE)
    _no_clash(models, PACKAGE_FILE, text)
    return models


def find(name: str) -> Weights:
    """The package's model of this name or alias; `load_catalogue` knows the user's own too."""
    return Catalogue(package()).find(name)


def _read(text: str, path: Path) -> tuple[Weights, ...]:
    """All entries of a file, each checked by itself; raises BadSetting."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{path}: {error}") from None
    unknown = sorted(set(document) - {"model"})
    raw = document.get("model", [])
    if unknown or not isinstance(raw, list):
        raise BadSetting(f"{path}: {shortened(unknown[0], 64) if unknown else 'model'}: each model stands under a heading {HEADING}")
    lines = [text.count("\n", 0, found.end()) + 1 for found in _HEADING.finditer(text)]
    return tuple(_entry(one, _place(path, lines, at, one)) for at, one in enumerate(raw))


def _place(path: Path, lines: list[int], at: int, raw: Any) -> str:
    """Where an entry stands, for a complaint."""
    name = raw.get("name") if isinstance(raw, dict) else None
    said = repr(shortened(name, 64)) if isinstance(name, str) else f"number {at + 1}"
    return f"{path}, {f'line {lines[at]}, ' if at < len(lines) else ''}model {said}"


def _entry(raw: Any, place: str) -> Weights:
    try:
        entry = msgspec.convert(raw, Weights)
    except msgspec.ValidationError as error:
        found = complaint.read(str(error))
        message = {"unknown": "there is no such field", "missing": "it must be given"}.get(found.kind, found.message)
        raise BadSetting(f"{place}: {found.path or 'the entry'}: {message}") from None
    for field, message in _faults(entry):
        raise BadSetting(f"{place}: {field}: {message}")
    return entry


def _faults(entry: Weights) -> Iterator[tuple[str, str]]:
    """What is wrong with an entry whose fields are all of their types."""
    roles = [file.role for file in entry.files]
    if roles.count("model") != 1:
        yield "files", "one of them must have the role 'model', and no other"
    if len({file.filename for file in entry.files}) < len(entry.files):
        yield "files", "two have the same filename"
    if len(set(roles)) < len(roles):
        yield "files", "two have the same role"
    if entry.engine == "onnx" and ("tokenizer" not in roles or not entry.filename.endswith(".onnx")):
        yield "files", "an ONNX model needs a file that ends in .onnx and one with the role 'tokenizer'"
    if entry.shorter_dimensions and entry.dimensions is None:
        yield "shorter_dimensions", "an embedding that may be shortened must say its dimensions"
    if "text" not in entry.senses:
        yield "senses", "every model here takes 'text'"
    if entry.licence.must_accept and not entry.licence.link:
        yield "licence.link", "a licence that must be accepted must be there to read"
    if entry.name in entry.aliases:
        yield "aliases", "the model's own name is among them"
    for at, file in enumerate(entry.files):
        for number, source in enumerate(file.sources):
            if isinstance(source, HttpsSource) and not is_private(source.url):
                yield f"files[{at}].sources[{number}].url", "expected https; http is for this machine only"


def _checked(user: tuple[Weights, ...], path: Path, text: str, package: tuple[Weights, ...]) -> tuple[Weights, ...]:
    """The user's entries, if they get along with each other and with the package's."""
    _no_clash(user, path, text)
    own = {one.name for one in user}
    names = {one.name for one in package} - own
    for one in user:
        if one.default:
            raise BadSetting(f"{path}: model {one.name!r}: default: only Fallow's own has it; set [node] models in settings.toml instead")
        for alias in one.aliases:
            if alias in names:
                raise BadSetting(f"{path}: model {one.name!r}: aliases: {alias!r} is the name of a model of Fallow's; choose another word")
    return user


def _no_clash(models: Iterable[Weights], path: Path, text: str) -> None:
    """Every word means one model; raises BadSetting."""
    lines = [text.count("\n", 0, found.end()) + 1 for found in _HEADING.finditer(text)]
    taken: dict[str, str] = {}
    for at, one in enumerate(models):
        for word in (one.name, *one.aliases):
            if word in taken:
                field = "name" if word == one.name else "aliases"
                place = f"{path}, {f'line {lines[at]}, ' if at < len(lines) else ''}model {one.name!r}"
                raise BadSetting(f"{place}: {field}: {word!r} is taken by the model {taken[word]!r}")
            taken[word] = one.name


def write_entry(entry: Weights) -> str:
    """An entry as TOML, as short as it reads back the same."""
    said = _said(entry)
    files = said.pop("files")
    lines = [f"{key} = {_inline(value)}" for key, value in said.items()]
    return "\n".join([HEADING, *lines, f"files = [\n{''.join(_file(one) for one in files)}]\n"])


def _said(value: msgspec.Struct) -> dict[str, Any]:
    """A value's fields that aren't what they are by default."""
    tag = {"type": value.__struct_config__.tag} if value.__struct_config__.tag else {}
    fields = ((field, getattr(value, field.name)) for field in msgspec.structs.fields(value))
    return tag | {field.name: one for field, one in fields if one != field.default}


def _file(file: WeightsFile) -> str:
    said = _said(file)
    sources = "".join(f"    {_source(one)},\n" for one in said.pop("sources"))
    first = ", ".join(f"{key} = {_inline(value)}" for key, value in said.items())
    return f"  {{ {first}, sources = [\n{sources}  ] }},\n"


def _source(source: Source) -> str:
    """A source on one line, but a line for each wheel."""
    if isinstance(source, IndexSource):
        members = "".join(f"      {_inline(one)},\n" for one in source.members)
        return f'{{ type = "index", members = [\n{members}    ] }}'
    return _inline(source)


def _inline(value: Any) -> str:
    """A value on one line of TOML, whose strings are JSON's but for one character."""
    if isinstance(value, msgspec.Struct):
        return "{ " + ", ".join(f"{key} = {_inline(one)}" for key, one in _said(value).items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_inline(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

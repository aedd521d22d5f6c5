"""What a model is, what may be done with it and where its files come from: one entry of the catalogue."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}\Z"

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Filename = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")]
Inside = Annotated[str, Meta(pattern=r"^(?!/)(?!(.*/)?\.\.?(/|\Z))[^\\\x00-\x1f\x7f?#%]{1,300}\Z")]
"""A path inside something: relative, and never upwards."""
Text = Annotated[str, Meta(min_length=1, max_length=200)]
Count = Annotated[int, Meta(ge=1, le=1 << 53)]

Kind = Literal["chat", "completion", "embedding", "rerank", "vision", "code"]
Engine = Literal["llama", "onnx"]
Role = Literal["model", "tokenizer", "projector"]
Sense = Literal["text", "image", "audio"]
Pooling = Literal["mean", "cls", "last", "rank"]


class WheelMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file inside one exact wheel of the Python package index."""

    distribution: Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?\Z")]
    version: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,63}\Z")]
    wheel_sha256: Sha256
    wheel_bytes: Count
    member: Inside


class IndexSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="index", tag_field="type"):
    """Members of pinned wheels, joined end to end: the index takes no large files, so a big one comes in several."""

    members: Annotated[tuple[WheelMember, ...], Meta(min_length=1, max_length=64)]


class HubSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hub", tag_field="type"):
    """A file in a repository of the model hub."""

    repository: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")]
    file: Inside
    revision: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")] = "main"


class HttpsSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="https", tag_field="type"):
    """A file behind a web address; http only from this machine itself."""

    url: Annotated[str, Meta(pattern=r"^https?://[^\s@]{1,2000}\Z")]


class LocalSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="local", tag_field="type"):
    """A file that lies on this machine already."""

    path: Annotated[str, Meta(pattern=r"^/[^\x00]{1,4000}\Z")]


Source = IndexSource | HubSource | HttpsSource | LocalSource


class Licence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model's user and its lender must keep to."""

    name: Text
    link: Annotated[str, Meta(pattern=r"^(https?://[^\s]{1,500})?\Z")] = ""
    must_accept: bool = False

    def __str__(self) -> str:
        return self.name


class WeightsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a model; its sources are tried in order. A checksum or size that isn't pinned is learnt at the first pull."""

    filename: Filename
    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=16)]
    role: Role = "model"
    sha256: Sha256 | None = None
    size_bytes: Count | None = None


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model. What is None is not known here, and is read from the model's file once that is there."""

    name: Name
    kind: Kind
    licence: Licence
    files: Annotated[tuple[WeightsFile, ...], Meta(min_length=1, max_length=8)]
    aliases: tuple[Name, ...] = ()
    family: str = ""
    engine: Engine = "llama"
    parameters: Count | None = None
    quantisation: str = ""
    context_tokens: Count | None = None
    senses: Annotated[tuple[Sense, ...], Meta(min_length=1)] = ("text",)
    dimensions: Count | None = None
    """Of an embedding."""
    shorter_dimensions: bool = False
    """Whether the first few dimensions alone make a good embedding too (matryoshka)."""
    pooling: Pooling | None = None
    kv_bytes_per_token: Count | None = None
    default: bool = False
    """What a machine lends that was told nothing else; one entry of the package has it."""

    def file(self, role: Role) -> WeightsFile | None:
        """The file with this role."""
        return next((one for one in self.files if one.role == role), None)

    @property
    def model_file(self) -> WeightsFile:
        found = self.file("model")
        assert found is not None, "the catalogue sees to it"
        return found

    @property
    def sha256(self) -> str | None:
        """The checksum of the model's own file, if it is pinned."""
        return self.model_file.sha256

    @property
    def filename(self) -> str:
        return self.model_file.filename

    @property
    def size_bytes(self) -> int | None:
        """All files together, if every size is known."""
        sizes = [one.size_bytes for one in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

"""What a GGUF file says about itself, read with a limit on everything before any engine touches the file."""

import re
import struct
from collections import Counter
from typing import Literal

import msgspec
import numpy as np
from gguf.constants import GGUF_MAGIC, GGUFValueType, Keys, LlamaFileType, PoolingType, TokenType

from fallow.model.errors import BadModelFile, shortened
from fallow.wire.gguf_layout import (
    ELEMENTS_MAX,
    SCALARS,
    U32,
    U64,
    Array,
    Cursor,
    Tensor,
    Value,
    check_layout,
    read_tensors,
    read_values,
)
from fallow.wire.window import File, Window

VERSIONS = (2, 3)
LAYERS_MAX = 1_024
LENGTH_MAX = 2**24  # of an embedding, a key or a value, and of the heads of a layer
CONTEXT_TOKENS_MAX = 2**31 - 1
CONTROL_TOKENS_MAX = 8_192
CONTROL_TOKEN_BYTES_MAX = 1_024

MAGIC = struct.pack("<I", GGUF_MAGIC)
_F16_BYTES = 2
_ENCODER = re.compile(r".*bert(-.*)?|t5encoder|gemma-embedding|llama-embed")  # architectures that write no text
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TOKENS, _TOKEN_TYPES, _SCORES, _MERGES = Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.SCORES, Keys.Tokenizer.MERGES
_OF_TOKENS = {  # an engine reads these by the tokens' numbers without looking at how long they are
    _TOKEN_TYPES: (GGUFValueType.INT32, GGUFValueType.UINT32),
    _SCORES: (GGUFValueType.FLOAT32,),
}

Kind = Literal["text", "embedding", "rerank"]
Pooling = Literal["none", "mean", "cls", "last", "rank"]
_POOLING: dict[int, Pooling] = {
    PoolingType.NONE: "none",
    PoolingType.MEAN: "mean",
    PoolingType.CLS: "cls",
    PoolingType.LAST: "last",
    PoolingType.RANK: "rank",
}


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds and what it needs.

    `holds` is "model", or what else the file is for ("mmproj", "adapter", …): then what only models have is 0.
    `heads` and `heads_kv` are those of the layer with the most. `kv_bytes_per_token` counts keys and values of all layers as f16.
    `control_tokens` are all texts that the tokenizer takes for control tokens, then those that its maker added, within a limit.
    """

    architecture: str
    holds: str
    name: str
    licence: str
    kind: Kind
    quantisation: str
    parameters: int
    context_tokens: int
    layers: int
    heads: int
    heads_kv: int
    embedding_length: int
    key_length: int
    value_length: int
    kv_bytes_per_token: int
    vocabulary: int
    control_tokens: tuple[str, ...]
    has_chat_template: bool
    pooling: Pooling | None


class _Facts:
    """The header's values, by key, each checked for what it must be."""

    def __init__(self, values: dict[str, Value], window: Window) -> None:
        self._values = values
        self._window = window
        self.architecture = self.text(Keys.General.ARCHITECTURE)
        if not _ARCHITECTURE.fullmatch(self.architecture):
            raise BadModelFile(f"{Keys.General.ARCHITECTURE} is missing, or isn't a plain name")
        self.holds = "mmproj" if self.architecture == "clip" else self.text(Keys.General.TYPE) or "model"

    def text(self, key: str) -> str:
        value = self._values.get(key, b"")
        if not isinstance(value, bytes):
            raise BadModelFile(f"{key} isn't a string")
        return shortened(value.decode(errors="replace"))

    def integers(self, key: str, maximum: int, minimum: int = 0) -> tuple[int, ...]:
        """One integer, or one for each layer; empty where the key isn't there. `{arch}` stands for the architecture."""
        key = key.format(arch=self.architecture)
        value = self._values.get(key)
        if value is None:
            return ()
        found: tuple[object, ...] = (value,)
        if isinstance(value, Array) and value.type in SCALARS and value.length <= LAYERS_MAX:
            form = struct.Struct(f"<{value.length}{SCALARS[value.type].format[1:]}")
            found = form.unpack(self._window.copy(value.at, form.size))
        integers = tuple(each for each in found if isinstance(each, int) and not isinstance(each, bool) and minimum <= each <= maximum)
        if not integers or len(integers) < len(found):
            raise BadModelFile(f"{key} isn't an integer from {minimum} to {maximum}")
        return integers

    def integer(self, key: str, maximum: int, default: int | None = None) -> int:
        """The greatest of them; a model must give it, above 0, where there is no default."""
        needed = default is None and self.holds == "model"
        found = self.integers(key, maximum, minimum=int(needed))
        if needed and not found:
            raise BadModelFile(f"{key.format(arch=self.architecture)} is missing")
        return max(found, default=default or 0)

    def per_layer(self, key: str, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
        found = self.integers(key, LENGTH_MAX) or default
        if len(found) not in (1, layers):
            raise BadModelFile(f"{key.format(arch=self.architecture)} has {len(found)} elements for {layers} layers")
        return found * layers if len(found) == 1 else found

    def array(self, key: str, types: tuple[GGUFValueType, ...], count: int | None = None) -> Array | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Array) or value.type not in types or count not in (None, value.length):
            length = "" if count is None else f", one for each of the {count} tokens"
            raise BadModelFile(f"{key} isn't an array of {' or '.join(kind.name for kind in types)}{length}")
        return value

    @property
    def has_chat_template(self) -> bool:
        return bool(self.text(Keys.Tokenizer.CHAT_TEMPLATE))


def _control_tokens(window: Window, tokens: Array, types: Array) -> tuple[str, ...]:
    numbers = np.frombuffer(window.copy(types.at, types.length * U32.size), dtype="<i4")
    control, added = (np.flatnonzero(numbers == kind).tolist() for kind in (TokenType.CONTROL, TokenType.USER_DEFINED))
    if len(control) > CONTROL_TOKENS_MAX:
        raise BadModelFile(f"its tokenizer has {len(control)} control tokens, and the limit is {CONTROL_TOKENS_MAX}")
    cursor = Cursor(window)
    found: dict[str, None] = {}
    for position in (control + added)[:CONTROL_TOKENS_MAX]:
        cursor.at = tokens.strings[position]
        text = cursor.name(CONTROL_TOKEN_BYTES_MAX, f"the control token {position}")
        if text and not text.isspace() and not _BYTE_TOKEN.fullmatch(text):
            found[text] = None
    return tuple(found)


def _quantisation(facts: _Facts, tensors: list[Tensor]) -> str:
    """What the file says; where it doesn't, the type that most of its bytes are in."""
    said = facts.integers(Keys.General.FILE_TYPE, 2**31)
    number = said[0] & ~LlamaFileType.GUESSED if said else -1
    if number in {each.value for each in LlamaFileType}:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type.name] += tensor.size_bytes
    return min(sizes, key=lambda name: (-sizes[name], name))


def _kind(architecture: str, pooling: Pooling | None) -> Kind:
    if pooling == "rank":
        return "rerank"
    return "embedding" if _ENCODER.fullmatch(architecture) or pooling in ("mean", "cls", "last") else "text"


def _pooling(facts: _Facts) -> Pooling | None:
    found = facts.integers(Keys.LLM.POOLING_TYPE, 2**31)
    if found and found[0] not in _POOLING:
        raise BadModelFile(f"its pooling is of type {found[0]}, which this version of Fallow doesn't know")
    return _POOLING[found[0]] if found else None


def _header(facts: _Facts, tensors: list[Tensor], window: Window) -> GgufHeader:
    layers = facts.integer(Keys.LLM.BLOCK_COUNT, LAYERS_MAX)
    width = facts.integer(Keys.LLM.EMBEDDING_LENGTH, LENGTH_MAX)
    heads = facts.per_layer(Keys.Attention.HEAD_COUNT, layers, (0,))
    heads_kv = facts.per_layer(Keys.Attention.HEAD_COUNT_KV, layers, heads or (0,))
    head_length = width // max(max(heads, default=0), 1)
    key_length = facts.integer(Keys.Attention.KEY_LENGTH, LENGTH_MAX, head_length)
    value_length = facts.integer(Keys.Attention.VALUE_LENGTH, LENGTH_MAX, head_length)
    tokens = facts.array(_TOKENS, (GGUFValueType.STRING,))
    facts.array(_MERGES, (GGUFValueType.STRING,))
    vocabulary = facts.integer(Keys.LLM.VOCAB_SIZE, ELEMENTS_MAX, 0) if tokens is None else tokens.length
    types = {key: facts.array(key, kinds, 0 if tokens is None else tokens.length) for key, kinds in _OF_TOKENS.items()}[_TOKEN_TYPES]
    pooling = _pooling(facts)
    return GgufHeader(
        architecture=facts.architecture,
        holds=facts.holds,
        name=facts.text(Keys.General.NAME),
        licence=facts.text(Keys.General.LICENSE),
        kind=_kind(facts.architecture, pooling),
        quantisation=_quantisation(facts, tensors),
        parameters=sum(tensor.elements for tensor in tensors),
        context_tokens=facts.integer(Keys.LLM.CONTEXT_LENGTH, CONTEXT_TOKENS_MAX),
        layers=layers,
        heads=max(heads, default=0),
        heads_kv=max(heads_kv, default=0),
        embedding_length=width,
        key_length=key_length,
        value_length=value_length,
        kv_bytes_per_token=_F16_BYTES * sum(heads_kv) * (key_length + value_length),
        vocabulary=vocabulary,
        control_tokens=() if tokens is None or types is None else _control_tokens(window, tokens, types),
        has_chat_template=facts.has_chat_template,
        pooling=pooling,
    )


def read_gguf(data: File, size_bytes: int) -> GgufHeader:
    """Read the header, and check that the tensors lie where it says; raises BadModelFile with what is wrong."""
    window = Window(data, size_bytes)
    cursor = Cursor(window)
    if size_bytes < len(MAGIC) or window.copy(0, len(MAGIC)) != MAGIC:
        raise BadModelFile("it isn't a GGUF file: it doesn't begin with 'GGUF'")
    cursor.skip(len(MAGIC))
    version = cursor.integer(U32)
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise BadModelFile("it is a big-endian GGUF file, which isn't supported; fetch the little-endian one")
    if version not in VERSIONS:
        raise BadModelFile(f"it is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} can be read")
    tensor_count, value_count = cursor.integer(U64), cursor.integer(U64)
    values = read_values(cursor, value_count)
    facts = _Facts(values, window)
    if facts.integer(Keys.Split.LLM_KV_SPLIT_COUNT, 2**16, 1) > 1:
        raise BadModelFile("it is one part of a model in several files; join them with llama.cpp's gguf-split first")
    tensors = read_tensors(cursor, tensor_count)
    check_layout(tensors, values, cursor.at, size_bytes)
    return _header(facts, tensors, window)

"""GGUF headers: good ones as gguf itself reads them, and damaged or hostile ones, which are refused and nothing else."""

import io
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import example, given
from hypothesis import strategies as st

from fallow.model.errors import BadModelFile
from fallow.wire import gguf_header, gguf_layout
from fallow.wire.gguf_header import GgufHeader, read_gguf

U32, U64, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.UINT64, GGUFValueType.STRING, GGUFValueType.ARRAY
DEFAULT_MODEL = list(Path(platformdirs.user_cache_dir("fallow"), "models").glob("*-SmolLM2-135M-Instruct.Q4_1.gguf"))


def read(data: bytes) -> GgufHeader:
    return read_gguf(io.BytesIO(data), len(data))


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, items: list[Any]) -> bytes:
    body = b"".join(text(item) if kind == STRING else struct.pack("<f" if kind == GGUFValueType.FLOAT32 else "<i", item) for item in items)
    return struct.pack("<IQ", kind, len(items)) + body


def value(key: str | bytes, kind: int, body: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + body


def number(key: str, of: int) -> bytes:
    return value(key, U32, struct.pack("<I", of))


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = GGMLQuantizationType.F32) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BASE = {
    "general.architecture": value("general.architecture", STRING, text("llama")),
    "llama.context_length": number("llama.context_length", 64),
    "llama.block_count": number("llama.block_count", 2),
    "llama.embedding_length": number("llama.embedding_length", 8),
    "llama.attention.head_count": number("llama.attention.head_count", 2),
}
TENSORS = [tensor("a", (8, 2), 0), tensor("b", (8,), 64)]
DATA_BYTES = 96


def build(
    values: list[bytes] | None = None,
    tensors: list[bytes] = TENSORS,
    *,
    data_bytes: int = DATA_BYTES,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    **over: bytes,
) -> bytes:
    """A file of these values and tensors; `over` replaces values of the base by the last word of their key."""
    base = [over.pop(key.rpartition(".")[2], body) for key, body in BASE.items()] + (values or [])
    assert not over
    tensor_count, value_count = counts or (len(tensors), len(base))
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count) + b"".join(base) + b"".join(tensors)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(data_bytes)


TINY = build([value("tokenizer.ggml.tokens", ARRAY, array(STRING, ["<s>", "a"])), value("general.name", STRING, text("tiny"))])


def write(path: Path) -> Path:
    """A small model as llama.cpp's own converter would write it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Small")
    writer.add_license("mit")
    writer.add_context_length(256)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "<0x0A>", "hello", "<tool>", "  ", "\n"]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 6, 1, 4, 4, 3])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(1)
    writer.add_tensor("token_embd.weight", rng.random((len(tokens), 64), dtype=np.float32))
    quantised = gguf.quantize(rng.random((64, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_good(small: Path) -> None:
    assert read(small.read_bytes()) == GgufHeader(
        architecture="llama",
        holds="model",
        name="Small",
        licence="mit",
        kind="text",
        quantisation="Q8_0",
        parameters=7 * 64 + 64 * 64,
        context_tokens=256,
        layers=2,
        heads=4,
        heads_kv=2,
        embedding_length=64,
        key_length=16,
        value_length=16,
        kv_bytes_per_token=2 * (2 + 1) * (16 + 16),
        vocabulary=7,
        control_tokens=("<s>", "<tool>"),
        has_chat_template=True,
        pooling=None,
    )


def test_as_gguf_reads_it(small: Path) -> None:
    theirs, ours = gguf.GGUFReader(small), read(small.read_bytes())
    assert ours.parameters == sum(tensor.n_elements for tensor in theirs.tensors)
    for key, found in {
        "general.name": ours.name,
        "llama.context_length": ours.context_tokens,
        "llama.block_count": ours.layers,
        "llama.embedding_length": ours.embedding_length,
        "llama.attention.head_count": ours.heads,
    }.items():
        field = theirs.get_field(key)
        assert field is not None
        assert field.contents() == found
    last = max(theirs.tensors, key=lambda tensor: tensor.data_offset)
    end = int(last.data_offset + last.n_bytes)
    read(small.read_bytes()[:end])
    with pytest.raises(BadModelFile, match=f"1 of {end} bytes are missing"):
        read(small.read_bytes()[: end - 1])


@pytest.mark.skipif(not DEFAULT_MODEL, reason="`fallow models pull` fetches the model")
def test_the_default_model() -> None:
    (path,) = DEFAULT_MODEL
    with path.open("rb") as file:
        header = read_gguf(file, path.stat().st_size)
    assert (header.parameters, header.context_tokens) == (134_515_008, 8192)
    assert (header.quantisation, header.kind, header.licence, header.vocabulary) == ("Q4_1", "text", "apache-2.0", 49_152)
    assert header.kv_bytes_per_token == 23_040
    assert header.has_chat_template
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(header.control_tokens)


@pytest.mark.parametrize(
    ("architecture", "pooling", "kind", "named"),
    [
        ("llama", None, "text", None),
        ("llama", 0, "text", "none"),
        ("qwen3", 3, "embedding", "last"),
        ("qwen3", 4, "rerank", "rank"),
        ("bert", None, "embedding", None),
        ("bert", 2, "embedding", "cls"),
        ("bert", 4, "rerank", "rank"),
        ("nomic-bert-moe", 1, "embedding", "mean"),
        ("jina-bert-v2", None, "embedding", None),
        ("modern-bert", None, "embedding", None),
        ("eurobert", None, "embedding", None),
        ("gemma-embedding", None, "embedding", None),
    ],
)
def test_kind(architecture: str, pooling: int | None, kind: str, named: str | None) -> None:
    values = [number(f"{architecture}.{key}", 8) for key in ("context_length", "block_count", "embedding_length", "attention.head_count")]
    values += [] if pooling is None else [number(f"{architecture}.pooling_type", pooling)]
    over: dict[str, Any] = {key.rpartition(".")[2]: number(f"unused.{at}", 1) for at, key in enumerate(BASE)}
    header = read(build(values, **{**over, "architecture": value("general.architecture", STRING, text(architecture))}))
    assert (header.kind, header.pooling, header.layers) == (kind, named, 8)


@pytest.mark.parametrize(
    ("file_type", "quantisation"), [(15, "Q4_K_M"), (0, "F32"), (1024 + 7, "Q8_0"), (32, "BF16"), (999, "F16"), (None, "F16")]
)
def test_quantisation(file_type: int | None, quantisation: str) -> None:
    values = [] if file_type is None else [number("general.file_type", file_type)]
    tensors = [tensor("a", (8,), 0), tensor("b", (32,), 32, GGMLQuantizationType.F16)]
    assert read(build(values, tensors)).quantisation == quantisation


def test_other_files_than_models() -> None:
    over: dict[str, Any] = {key.rpartition(".")[2]: number(f"unused.{at}", 1) for at, key in enumerate(BASE)}
    header = read(build(**{**over, "architecture": value("general.architecture", STRING, text("clip"))}))
    assert (header.holds, header.layers, header.kv_bytes_per_token) == ("mmproj", 0, 0)
    adapter = read(build([value("general.type", STRING, text("adapter"))], context_length=number("unused", 1)))
    assert (adapter.holds, adapter.context_tokens) == ("adapter", 0)


def test_version_2_and_other_alignments() -> None:
    assert read(build(version=2)).layers == 2
    assert read(build([number("general.alignment", 8)], [tensor("a", (2,), 0), tensor("b", (2,), 8)])).parameters == 4


def tokenizer(tokens: list[str], kinds: list[int]) -> list[bytes]:
    return [
        value("tokenizer.ggml.token_type", ARRAY, array(GGUFValueType.INT32, kinds)),
        value("tokenizer.ggml.tokens", ARRAY, array(STRING, tokens)),
    ]


def test_control_tokens_come_before_added_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "CONTROL_TOKENS_MAX", 3)
    header = read(build(tokenizer(["+1", "+2", "word", "", "<a>", "<b>"], [4, 4, 1, 1, 3, 3])))
    assert header.control_tokens == ("<a>", "<b>", "+1")
    with pytest.raises(BadModelFile, match="4 control tokens"):
        read(build(tokenizer(["1", "2", "3", "4"], [3] * 4)))


INT8_3 = struct.pack("<IQ", GGUFValueType.INT8, 3) + bytes(3)
LONG = struct.pack("<Q", 2**63)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "doesn't begin"),
    "other magic": (b"GGUG" + TINY[4:], "doesn't begin"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "2^63 values": (build(counts=(2, 2**63)), f"{2**63} values"),
    "2^32 tensors": (build(counts=(2**32, 5)), f"{2**32} tensors"),
    "no tensors": (build(tensors=[]), "no tensors"),
    "huge key": (build(architecture=LONG), "key of value 0"),
    "key of 4 GiB": (build(architecture=struct.pack("<Q", 2**32)), "key of value 0"),
    "key not text": (build([value(b"\xff", U32, bytes(4))]), "UTF-8"),
    "string of 2^63": (build([value("x", STRING, LONG)]), "x is"),
    "string past the end": (build([value("x", STRING, struct.pack("<Q", 10_000_000))]), "cut off"),
    "array of 2^63": (build([value("x", ARRAY, struct.pack("<IQ", U64, 2**63))]), "elements"),
    "array of 2^63 strings": (build([value("x", ARRAY, struct.pack("<IQ", STRING, 2**63))]), "elements"),
    "array past the end": (build([value("x", ARRAY, struct.pack("<IQ", U64, 4_000_000))]), "cut off"),
    "strings past the end": (build([value("x", ARRAY, struct.pack("<IQ", STRING, 4_000_000))]), "cut off|bytes long"),
    "long string in an array": (build([value("x", ARRAY, struct.pack("<IQ", STRING, 1) + LONG)]), "in an array"),
    "array of arrays": (build([value("x", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "array of arrays"),
    "unknown type": (build([value("x", 13, b"")]), "type 13"),
    "unknown element": (build([value("x", ARRAY, struct.pack("<IQ", 13, 1))]), "type 13"),
    "boolean 2": (build([value("x", GGUFValueType.BOOL, b"\2")]), "neither true nor false"),
    "key twice": (build([number("x", 1), number("x", 1)]), "twice"),
    "tensor twice": (build(tensors=[tensor("a", (8,), 0), tensor("a", (8,), 32)]), "twice"),
    "overlap": (build(tensors=[tensor("a", (9,), 0), tensor("b", (8,), 32)]), "a and b overlap"),
    "same place": (build(tensors=[tensor("a", (8,), 32), tensor("b", (8,), 32)]), "overlap"),
    "not aligned": (build(tensors=[tensor("a", (8,), 8)]), "multiple of 32"),
    "behind the file": (build(tensors=[tensor("a", (8,), 2**63)]), "missing"),
    "cut off": (build(data_bytes=90), " 6 of [0-9]+ bytes are missing"),
    "no dimensions": (build(tensors=[tensor("a", (), 0)]), "0 dimensions"),
    "5 dimensions": (build(tensors=[tensor("a", (1,) * 5, 0)]), "5 dimensions"),
    "2^32-1 dimensions": (build(tensors=[text("a") + b"\xff" * 4]), "dimensions"),
    "dimension 0": (build(tensors=[tensor("a", (8, 0), 0)]), "0 elements"),
    "dimensions overflow": (build(tensors=[tensor("a", (2**32, 2**32), 0)]), "elements"),
    "dimensions overflow to 8": (build(tensors=[tensor("a", (2**61 + 1, 8), 0)]), "elements"),
    "unknown tensor type": (build(tensors=[tensor("a", (8,), 0, 4)]), "type 4"),
    "broken block": (build(tensors=[tensor("a", (8,), 0, GGMLQuantizationType.Q4_0)]), "blocks of 32"),
    "long tensor name": (build(tensors=[tensor("a" * 64, (8,), 0)]), "64 bytes long"),
    "alignment 0": (build([number("general.alignment", 0)]), "power of two"),
    "alignment 24": (build([number("general.alignment", 24)]), "power of two"),
    "alignment 8192": (build([number("general.alignment", 8192)]), "power of two"),
    "alignment a string": (build([value("general.alignment", STRING, text("32"))]), "power of two"),
    "alignment true": (build([value("general.alignment", GGUFValueType.BOOL, b"\1")]), "power of two"),
    "no architecture": (build(architecture=number("x", 1)), "general.architecture"),
    "architecture a number": (build(architecture=number("general.architecture", 1)), "isn't a string"),
    "architecture of two lines": (build(architecture=value("general.architecture", STRING, text("a\nb"))), "plain name"),
    "no context": (build(context_length=number("x", 1)), "llama.context_length is missing"),
    "context 0": (build(context_length=number("llama.context_length", 0)), "context_length"),
    "context a string": (build(context_length=value("llama.context_length", STRING, text("8"))), "context_length"),
    "context below 0": (build(context_length=value("llama.context_length", GGUFValueType.INT32, b"\xff" * 4)), "context_length"),
    "context of 2^62": (build(context_length=value("llama.context_length", U64, struct.pack("<Q", 2**62))), "context_length"),
    "many layers": (build(block_count=number("llama.block_count", 10**6)), "block_count"),
    "3 head counts": (build(head_count=value("llama.attention.head_count", ARRAY, array(U32, [1, 2, 3]))), "3 elements for 2 layers"),
    "no head counts": (build(head_count=value("llama.attention.head_count", ARRAY, array(U32, []))), "head_count"),
    "unknown pooling": (build([number("llama.pooling_type", 77)]), "pooling"),
    "a part": (build([value("split.count", GGUFValueType.UINT16, b"\2\0")]), "several files"),
    "tokens numbers": (build([value("tokenizer.ggml.tokens", ARRAY, array(GGUFValueType.INT32, [1]))]), "array of STRING"),
    "tokens a number": (build([number("tokenizer.ggml.tokens", 1)]), "array of STRING"),
    "a token type too few": (build(tokenizer(["a", "b"], [1])), "each of the 2 tokens"),
    "token types of a byte": (
        build([*tokenizer(["a"] * 3, [])[1:], value("tokenizer.ggml.token_type", ARRAY, INT8_3)]),
        "each of the 3 tokens",
    ),
    "a score too few": (
        build([*tokenizer(["a", "b"], [1, 1]), value("tokenizer.ggml.scores", ARRAY, array(GGUFValueType.FLOAT32, [0.0]))]),
        "tokenizer.ggml.scores",
    ),
    "control token not text": (
        build([*tokenizer([], [3])[:1], value("tokenizer.ggml.tokens", ARRAY, array(STRING, [b"\xe2"]))]),
        "control token 0 isn't UTF-8",
    ),
    "long control token": (build(tokenizer(["a" * 1025], [3])), "control token 0 is 1025 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(BadModelFile, match=reason) as found:
        read(data)
    assert found.value.code == "bad_model_file"
    assert found.value.message.isprintable()


@pytest.mark.parametrize(
    ("limit", "data", "reason"),
    [
        ("VALUES_MAX", build(), "5 values"),
        ("TENSORS_MAX", build(tensors=[tensor(str(n), (8,), 32 * n) for n in range(5)], data_bytes=160), "5 tensors"),
        ("ELEMENTS_MAX", build([value(name, ARRAY, array(STRING, ["", "", ""])) for name in "xy"]), "more than 4 strings"),
        ("HEADER_BYTES_MAX", build(), "goes on past"),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes, reason: str) -> None:
    read(data)
    monkeypatch.setattr(gguf_layout, limit, 4)
    if limit == "HEADER_BYTES_MAX":
        monkeypatch.setattr(gguf_layout, limit, 100)
    with pytest.raises(BadModelFile, match=reason):
        read(data)


class Counting(io.BytesIO):
    """A file that says how much of it was read at once, at most, and in all."""

    most = total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.most, self.total = max(self.most, len(found)), self.total + len(found)
        return found


def test_long_arrays_and_data_are_passed_over() -> None:
    numbers = struct.pack("<IQ", U64, 200_000) + bytes(1_600_000)
    data = Counting(build([value("x", ARRAY, numbers), value("y", STRING, text("y" * 2_000_000))], data_bytes=5_000_000))
    assert read_gguf(data, len(data.getvalue())).layers == 2
    assert data.most <= 2**16
    assert data.total <= 2**19


def test_a_file_that_shrinks() -> None:
    with pytest.raises(BadModelFile, match="shorter"):
        read_gguf(io.BytesIO(TINY[:100]), len(TINY))


def test_cut_off_anywhere(small: Path) -> None:
    data = small.read_bytes()
    header_bytes = int(gguf.GGUFReader(small).data_offset)
    ends = [*range(header_bytes + 1), *(header_bytes + (len(data) - header_bytes) * tenth // 10 for tenth in range(1, 10))]
    for end in ends:
        with pytest.raises(BadModelFile):
            read(data[:end])


def outcome(data: bytes) -> str:
    try:
        read(data)
    except BadModelFile:
        return "refused"
    return "read"


def test_every_flipped_bit() -> None:
    data = build([*tokenizer(["<s>", "a"], [3, 1]), value("general.name", STRING, text("tiny")), number("general.alignment", 32)])
    assert outcome(data) == "read"
    outcomes = set()
    for bit in range((len(data) - DATA_BYTES) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        outcomes.add(outcome(bytes(flipped)))
    assert outcomes == {"read", "refused"}


@given(st.binary(max_size=400))
@example(b"")
def test_any_bytes_after_the_magic(rest: bytes) -> None:
    assert outcome(b"GGUF" + rest) == "refused"
    assert outcome(b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0" + rest) == "refused"


@given(st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.binary(min_size=1, max_size=9)), max_size=4))
def test_any_overwriting(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(TINY)
    for at, what in changes:
        data[at : at + len(what)] = what
    assert outcome(bytes(data)) in ("read", "refused")

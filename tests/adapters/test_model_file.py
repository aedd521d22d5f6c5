"""Model files on the disk: the right reader for each, and a refusal for whatever isn't a model."""

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from fallow.adapters.model_file import inspect
from fallow.model.errors import BadModelFile
from fallow.wire.gguf_header import GgufHeader
from fallow.wire.onnx_header import OnnxHeader


def gguf_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_tensor("a", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def onnx_file(path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString())
    return path


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model", "model.onnx"])
def test_gguf_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    header = inspect(gguf_file(tmp_path / name))
    assert isinstance(header, GgufHeader)
    assert (header.parameters, header.context_tokens) == (32, 64)


@pytest.mark.parametrize("name", ["model.onnx", "MODEL.ONNX"])
def test_onnx_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    header = inspect(onnx_file(tmp_path / name))
    assert isinstance(header, OnnxHeader)
    assert (header.inputs, header.outputs, header.nodes) == (("x",), ("y",), 1)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(gguf_file(tmp_path / "model.gguf"))
    assert isinstance(inspect(tmp_path / "link"), GgufHeader)


def test_it_only_reads(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "model.gguf")
    path.chmod(0o444)
    before = path.read_bytes()
    inspect(path)
    assert path.read_bytes() == before


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("none.gguf", lambda path: None, "No such file"),
        ("folder.gguf", lambda path: path.mkdir(), "folder"),
        ("pipe.gguf", os.mkfifo, "pipe"),
        ("loop.gguf", make_loop, "could not be read"),
        ("empty.gguf", lambda path: path.write_bytes(b""), "empty"),
        ("empty.onnx", lambda path: path.write_bytes(b""), "empty"),
        ("short.gguf", lambda path: path.write_bytes(b"GG"), "neither"),
        ("magic.gguf", lambda path: path.write_bytes(b"GGUF"), "cut off"),
        ("text.txt", lambda path: path.write_bytes(b"some words\n"), "neither"),
        ("text.onnx", lambda path: path.write_bytes(b"some words\n"), "text.onnx isn't a model that can be used: it is"),
        ("wheel.gguf", lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "neither"),
        ("n" * 300, lambda path: None, "too long"),
        ("zero\0byte", lambda path: None, "no file can have this name"),
        ("two\nlines.gguf", lambda path: path.write_bytes(b"GGUF"), "two.lines"),
    ],
)
def test_refused(tmp_path: Path, name: str, make: object, reason: str) -> None:
    assert callable(make)
    make(tmp_path / name)
    with pytest.raises(BadModelFile, match=reason) as found:
        inspect(tmp_path / name)
    assert found.value.message.isprintable()


def test_a_device_is_refused() -> None:
    with pytest.raises(BadModelFile, match="device"):
        inspect(Path("/dev/zero"))


def test_a_pipe_that_took_the_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, there = tmp_path / "model.gguf", gguf_file(tmp_path / "other.gguf")
    os.mkfifo(path)
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: real(there if self == path else self, **options))
    with pytest.raises(BadModelFile, match="empty"):
        inspect(path)


def test_a_file_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    path = gguf_file(tmp_path / "model.gguf")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadModelFile, match="Permission denied"):
        inspect(path)


def test_a_cut_file_says_what_is_missing(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "model.gguf")
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(BadModelFile, match=r"model\.gguf .* 5 of [0-9]+ bytes are missing"):
        inspect(path)

"""ONNX headers: good models as onnx itself reads them, and damaged or hostile ones, which are refused and nothing else."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.model.errors import BadModelFile
from fallow.wire import onnx_header
from fallow.wire.onnx_header import ELEMENT_BYTES, FIELDS, REPEATED, OnnxHeader, read_onnx

onnx = pytest.importorskip("onnx")
helper = pytest.importorskip("onnx.helper")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

Change = Callable[[Any], object]


def info(name: str) -> Any:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4])


def weight(name: str = "w") -> Any:
    return numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), name)


def graph(nodes: list[Any] | None = None) -> Any:
    made = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gelu", ["h"], ["y"], domain="com.microsoft")]
    return helper.make_graph(made + (nodes or []), "g", [info("x"), info("w")], [info("y")], [weight()])


def model(change: Change = lambda model: None, nodes: list[Any] | None = None) -> bytes:
    """A small model, changed."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph(nodes), opset_imports=opsets, producer_name="maker", ir_version=8)
    change(made)
    data = made.SerializeToString()
    assert isinstance(data, bytes)
    return data


def function(name: str, calls: list[str], domain: str = "own") -> Any:
    nodes = [helper.make_node(call, ["a"], ["b"], domain=domain if call != "Relu" else "") for call in calls]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])


def with_functions(*functions: Any, call: str = "f0") -> bytes:
    return model(lambda made: made.functions.extend(functions), [helper.make_node(call, ["x"], ["z"], domain="own")])


def nested(depth: int) -> Any:
    inner = helper.make_graph([], "inner", [], [info("y")])
    for _ in range(depth - 1):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=inner)], "inner", [], [info("y")])
    return helper.make_node("If", ["c"], ["y"], then_branch=inner)


def external(tensor: Any) -> Any:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    return tensor


def linked(tensor: Any) -> Any:
    tensor.external_data.add(key="location", value="elsewhere")
    return tensor


def sparse(values: Any, indices: Any) -> Any:
    made = onnx.SparseTensorProto(dims=[8])
    made.values.CopyFrom(values)
    made.indices.CopyFrom(indices)
    return made


def indices(count: int = 16) -> Any:
    return numpy_helper.from_array(np.arange(count, dtype=np.int64), "")


GOOD = model()


def test_good() -> None:
    assert read_onnx(GOOD) == OnnxHeader(
        ir_version=8,
        producer="maker",
        opsets={"": 17, "com.microsoft": 1},
        inputs=("x",),
        outputs=("y",),
        nodes=2,
        op_domains=("", "com.microsoft"),
        parameters=16,
    )
    assert read_onnx(memoryview(GOOD)) == read_onnx(io.BytesIO(GOOD), len(GOOD)) == read_onnx(GOOD)


def test_as_onnx_numbers_its_fields() -> None:
    forms = {"int32": 0, "int64": 0, "enum": 0, "string": 2, "bytes": 2, "message": 2}
    for message, fields in FIELDS.items():
        theirs = getattr(onnx, message).DESCRIPTOR.fields_by_name
        for name, (number, form) in fields.items():
            field = theirs[name]
            kind = {3: "int64", 5: "int32", 14: "enum", 9: "string", 12: "bytes", 11: "message"}[field.type]
            assert (field.number, forms[kind]) == (number, form), f"{message}.{name}"
            assert field.is_repeated == (name in REPEATED), f"{message}.{name}"
    for number, size in ELEMENT_BYTES.items():
        assert np.dtype(helper.tensor_dtype_to_np_dtype(number)).itemsize == size


def test_subgraphs_and_functions_are_counted() -> None:
    header = read_onnx(model(nodes=[nested(3)]))
    assert header.nodes == 2 + 1 + 2
    header = read_onnx(with_functions(function("f0", ["f1", "f1", "Relu"]), function("f1", ["Relu"] * 3)))
    assert (header.nodes, header.op_domains) == (2 + 7, ("", "com.microsoft", "own"))


def test_sparse_weights_and_packed_dimensions() -> None:
    header = read_onnx(model(lambda made: made.graph.sparse_initializer.append(sparse(weight(), indices()))))
    assert header.parameters == 32
    packed = b"\x0a\x02\x04\x04" + b"\x10\x01" + b"\x4a\x40" + bytes(64)  # dims as one field, FLOAT, raw_data
    node = helper.make_node("Constant", [], ["k"])
    node.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=onnx.TensorProto.FromString(packed)))
    assert read_onnx(model(nodes=[node])).nodes == 3


def attribute(**fields: Any) -> bytes:
    node = helper.make_node("Constant", [], ["k"])
    node.attribute.append(onnx.AttributeProto(name="value", **fields))
    return model(nodes=[node])


def weigh(change: Change) -> bytes:
    return model(lambda made: change(made.graph.initializer[0]))


def dims(*extents: int) -> Change:
    def change(tensor: Any) -> None:
        tensor.dims[:] = extents
        tensor.ClearField("raw_data")

    return change


def cut(tensor: Any) -> None:
    tensor.raw_data = tensor.raw_data[:-1]


def laughs(depth: int, times: int) -> bytes:
    """Functions that call the next one several times each: few bytes, and `times` ** `depth` nodes."""
    functions = [function(f"f{at}", [f"f{at + 1}"] * times) for at in range(depth)]
    return with_functions(*functions, function(f"f{depth}", ["Relu"]))


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "isn't an ONNX model"),
    "no graph": (model(lambda made: made.ClearField("graph")), "isn't an ONNX model"),
    "no version": (model(lambda made: made.ClearField("ir_version")), "isn't an ONNX model"),
    "no operators' versions": (model(lambda made: made.ClearField("opset_import")), "isn't an ONNX model"),
    "operators twice": (model(lambda made: made.opset_import.add(domain="", version=3)), "given twice"),
    "operators below 0": (model(lambda made: made.opset_import.add(domain="x", version=-1)), "impossible"),
    "operators without a version": (model(lambda made: made.opset_import.pop()), "version of the operators com.microsoft"),
    "no inputs": (model(lambda made: made.graph.input.pop(0)), "no inputs"),
    "no outputs": (model(lambda made: made.graph.ClearField("output")), "no outputs"),
    "input without a name": (model(lambda made: made.graph.input.add()), "without a name"),
    "two graphs": (GOOD + onnx.ModelProto(graph=graph()).SerializeToString(), "ModelProto.graph is given twice"),
    "training": (model(lambda made: made.training_info.add()), "in training"),
    "foreign operators": (model(nodes=[helper.make_node("Evil", ["x"], ["z"], domain="evil.example")]), "evil.example"),
    "external weight": (weigh(external), "another file"),
    "linked weight": (weigh(linked), "another file"),
    "external attribute": (attribute(t=external(weight())), "another file"),
    "external attributes": (attribute(tensors=[weight(), external(weight())]), "another file"),
    "external sparse values": (attribute(sparse_tensor=sparse(external(weight()), indices())), "another file"),
    "external sparse attributes": (attribute(sparse_tensors=[sparse(weight(), external(indices()))]), "another file"),
    "external sparse weight": (
        model(lambda made: made.graph.sparse_initializer.append(sparse(external(weight()), indices()))),
        "another file",
    ),
    "external in a subgraph": (
        model(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([], "i", [], [], [external(weight())]))]),
        "another file",
    ),
    "a byte too few": (weigh(cut), "63 bytes of data and needs 64"),
    "dimension below 0": (weigh(dims(-1, 4)), "dimension below 0"),
    "dimensions overflow": (weigh(dims(2**33, 2**33)), "more than"),
    "nested": (model(nodes=[nested(17)]), "deeper than 16"),
    "functions in a circle": (with_functions(function("f0", ["f1"]), function("f1", ["f0"])), "in a circle"),
    "function that nothing calls in a circle": (with_functions(function("f0", ["Relu"]), function("f1", ["f1"])), "in a circle"),
    "deep functions": (laughs(18, 1), "deeper than 16"),
    "a thousand million laughs": (laughs(9, 10), "1000000 nodes"),
    "function twice": (with_functions(function("f0", ["Relu"]), function("f0", ["Relu"])), "a function twice"),
    "long name": (model(lambda made: made.graph.input.append(info("n" * 1025))), "1024 bytes"),
    "name not text": (GOOD.replace(b"maker", b"\xff\xfe\xfd\xfc\xfb"), "UTF-8"),
    "number without an end": (b"\x08" + b"\xff" * 11, "doesn't end"),
    "number over 64 bits": (b"\x08" + b"\xff" * 9 + b"\x7f", "64 bits"),
    "number cut off": (b"\x08\xff", "doesn't end"),
    "tag cut off": (b"\x08", "middle of a number"),
    "a group": (GOOD + b"\xf3\x01", "form 3"),
    "field 0": (GOOD + b"\x00\x01", "number 0"),
    "length past the end": (b"\x3a\x10ab", "14 bytes past its end"),
    "length of 2^63": (b"\x3a" + b"\x80" * 9 + b"\x01", "past its end"),
    "version as bytes": (b"\x0a\x00" + GOOD, "ir_version is written"),
    "graph as a number": (b"\x38\x01", "graph is written"),
    "fixed number cut off": (GOOD + b"\xf9\x07abc", "past its end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(BadModelFile, match=reason) as found:
        read_onnx(data)
    assert found.value.code == "bad_model_file"


@pytest.mark.parametrize(
    ("limit", "data", "reason"),
    [
        ("FIELDS_MAX", GOOD, "parts"),
        ("FILE_BYTES_MAX", GOOD, "limit is 2"),
        ("OPERATORS_MAX", model(nodes=[helper.make_node("Relu", [], [])]), "operators"),
        ("INITIALIZERS_MAX", model(lambda made: made.graph.initializer.extend([weight("v"), weight("u")])), "tensors"),
        ("ENDS_MAX", model(lambda made: made.graph.output.extend([info("v"), info("u")])), "outputs"),
        ("FUNCTIONS_MAX", with_functions(*(function(f"f{at}", ["Relu"]) for at in range(3))), "functions"),
        ("NODES_MAX", model(nodes=[helper.make_node("MatMul", [], [])]), "nodes"),
        ("DEPTH_MAX", model(nodes=[nested(3)]), "deeper"),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes, reason: str) -> None:
    read_onnx(data)
    monkeypatch.setattr(onnx_header, limit, 2)
    with pytest.raises(BadModelFile, match=reason):
        read_onnx(data)


def test_packed_dimensions_are_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = b"\x0a\x7f" + b"\x01" * 127
    made = b"\x2a\x81\x01" + tensor  # as an initializer
    monkeypatch.setattr(onnx_header, "FIELDS_MAX", 100)
    with pytest.raises(BadModelFile, match="parts"):
        read_onnx(b"\x3a\x84\x01" + made)


def test_weights_are_passed_over() -> None:
    big = numpy_helper.from_array(np.zeros(500_000, dtype=np.float32), "big")
    data = model(lambda made: made.graph.initializer.append(big))
    read = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            found = super().read(size)
            read += len(found)
            return found

    assert read_onnx(Counting(data), len(data)).parameters == 500_016
    assert read < 200_000


def outcome(data: bytes) -> str:
    try:
        read_onnx(data)
    except BadModelFile:
        return "refused"
    return "read"


def test_cut_off_anywhere() -> None:
    """Between two of the outermost fields, too, where what is left is a whole message."""
    for end in range(len(GOOD)):
        with pytest.raises(BadModelFile):
            read_onnx(GOOD[:end])


def test_every_flipped_bit() -> None:
    data = model(lambda made: made.functions.append(function("f0", ["Relu"])), [nested(2)])
    outcomes = set()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        outcomes.add(outcome(bytes(flipped)))
    assert outcomes == {"read", "refused"}


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    assert outcome(data) == "refused"
    assert outcome(GOOD + data) in ("read", "refused")


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=9)), max_size=4))
def test_any_overwriting(changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(GOOD)
    for at, what in changes:
        data[at : at + len(what)] = what
    assert outcome(bytes(data)) in ("read", "refused")

"""What an ONNX file says about itself, walked with a limit on everything before any engine touches the file."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from fallow.model.errors import BadModelFile, shortened
from fallow.wire.window import File, Window

FILE_BYTES_MAX = 2**31 - 1  # protobuf's own
FIELDS_MAX = 500_000
NAME_BYTES_MAX = 1_024
NODES_MAX = 1_000_000  # with the functions' nodes wherever they are called
INITIALIZERS_MAX = 65_536
OPERATORS_MAX = 1_024  # different ones, of a graph or a function
FUNCTIONS_MAX = 1_024
DEPTH_MAX = 16  # of graphs within nodes, and of functions that call functions
ENDS_MAX = 1_024  # inputs, and outputs
TENSOR_ELEMENTS_MAX = 2**40
_ONNX = "ai.onnx"  # the long name of ""
DOMAINS = frozenset({"", _ONNX, "ai.onnx.ml", "com.microsoft"})

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX = 10
_EXTERNAL = 1
# The fields that are looked at, message by message: their numbers and how they are written. Others are passed over.
FIELDS: dict[str, dict[str, tuple[int, int]]] = {
    "ModelProto": {
        "ir_version": (1, _VARINT), "producer_name": (2, _BYTES), "graph": (7, _BYTES), "opset_import": (8, _BYTES),
        "training_info": (20, _BYTES), "functions": (25, _BYTES),
    },
    "OperatorSetIdProto": {"domain": (1, _BYTES), "version": (2, _VARINT)},
    "GraphProto": {
        "node": (1, _BYTES), "initializer": (5, _BYTES), "input": (11, _BYTES), "output": (12, _BYTES), "sparse_initializer": (15, _BYTES),
    },
    "ValueInfoProto": {"name": (1, _BYTES)},
    "NodeProto": {"op_type": (4, _BYTES), "attribute": (5, _BYTES), "domain": (7, _BYTES)},
    "AttributeProto": {
        "t": (5, _BYTES), "g": (6, _BYTES), "tensors": (10, _BYTES), "graphs": (11, _BYTES), "sparse_tensor": (22, _BYTES),
        "sparse_tensors": (23, _BYTES),
    },
    "TensorProto": {
        "dims": (1, _VARINT), "data_type": (2, _VARINT), "name": (8, _BYTES), "raw_data": (9, _BYTES), "external_data": (13, _BYTES),
        "data_location": (14, _VARINT),
    },
    "SparseTensorProto": {"values": (1, _BYTES), "indices": (2, _BYTES)},
    "FunctionProto": {"name": (1, _BYTES), "node": (7, _BYTES), "domain": (10, _BYTES), "attribute_proto": (11, _BYTES)},
}  # fmt: skip
_KNOWN = {message: {number: (name, form) for name, (number, form) in fields.items()} for message, fields in FIELDS.items()}
REPEATED = frozenset({
    "opset_import", "training_info", "functions", "node", "initializer", "input", "output", "sparse_initializer", "attribute",
    "tensors", "graphs", "sparse_tensors", "dims", "external_data", "attribute_proto",
})  # fmt: skip
_PACKABLE = frozenset({"dims"})
# How many bytes an element of each type takes in `raw_data`; types of less than a byte and strings aren't here.
ELEMENT_BYTES = {
    1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2, 17: 1, 18: 1, 19: 1, 20: 1,
}  # fmt: skip


class OnnxHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes and gives, and what an engine must know to run it.

    `inputs` are those that a caller must give, so not the weights. `op_domains` are those that nodes use; "" is ONNX's own.
    """

    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    op_domains: tuple[str, ...]
    parameters: int


class _Field(NamedTuple):
    """One field: of a number `value`; of bytes where they lie, from `start` to `end`."""

    name: str
    value: int
    start: int
    end: int


class _Operator(NamedTuple):
    domain: str
    name: str


_Calls = Counter[_Operator]


class _Walk:
    """A walk through one file, with what it came across."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._fields_left = FIELDS_MAX
        self.initializers = 0
        self.parameters = 0

    def _count(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise BadModelFile(f"it has more than {FIELDS_MAX} parts, which is the limit")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number here, and where it ends."""
        count = min(_VARINT_BYTES_MAX, end - at)
        if count <= 0:
            raise BadModelFile("it is garbled: a part of it ends in the middle of a number")
        held, start = self._window.hold(at, count)
        number = 0
        for position in range(count):
            byte = held[start + position]
            number |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                break
        else:
            raise BadModelFile("it is garbled: a number in it doesn't end")
        if number >= 2**64:
            raise BadModelFile("it is garbled: a number in it is over 64 bits")
        return number, at + position + 1

    def fields(self, message: str, start: int, end: int) -> Iterator[_Field]:
        """The fields of a message that are known here, one after the other; all are checked to lie inside it."""
        known, seen, at = _KNOWN[message], set[str](), start
        while at < end:
            self._count()
            tag, at = self.varint(at, end)
            form, value, begin = tag & 7, 0, at
            if form == _VARINT:
                value, at = self.varint(at, end)
            elif form == _BYTES:
                length, begin = self.varint(at, end)
                at = begin + length
            elif form in (_FIXED64, _FIXED32):
                at += 8 if form == _FIXED64 else 4
            else:
                raise BadModelFile(f"it is garbled: a field of {message} is written in the unknown form {form}")
            if at > end:
                raise BadModelFile(f"it is cut off or garbled: a field of {message} goes on {at - end} bytes past its end")
            if not 0 < tag >> 3 < 2**29:
                raise BadModelFile(f"it is garbled: {message} has a field of number {tag >> 3}")
            name, wanted = known.get(tag >> 3, ("", form))
            if form != wanted and not (name in _PACKABLE and form == _BYTES):
                raise BadModelFile(f"it is garbled: {message}.{name} is written in the form {form} and not {wanted}")
            if name in seen:
                raise BadModelFile(f"{message}.{name} is given twice")
            if name and name not in REPEATED:
                seen.add(name)
            if name in _PACKABLE and form == _BYTES:
                yield from self._unpacked(name, begin, at)
            elif name:
                yield _Field(name, value, begin, at)

    def _unpacked(self, name: str, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            self._count()
            start = at
            value, at = self.varint(at, end)
            yield _Field(name, value, start, at)

    def text(self, field: _Field) -> str:
        if field.end - field.start > NAME_BYTES_MAX:
            raise BadModelFile(f"a name in it ({field.name}) is over the limit of {NAME_BYTES_MAX} bytes")
        try:
            return self._window.copy(field.start, field.end - field.start).decode()
        except UnicodeDecodeError:
            raise BadModelFile(f"a name in it ({field.name}) isn't UTF-8 text") from None

    def tensor(self, at: _Field) -> tuple[str, int]:
        """The tensor's name, and how many elements it has."""
        name, elements, kind, raw_bytes = "", 1, 0, -1
        for field in self.fields("TensorProto", at.start, at.end):
            if field.name == "name":
                name = self.text(field)
            elif field.name == "dims":
                elements *= field.value
                if elements > TENSOR_ELEMENTS_MAX:
                    raise BadModelFile(f"a tensor has more than {TENSOR_ELEMENTS_MAX} elements, or a dimension below 0")
            elif field.name == "data_type":
                kind = field.value
            elif field.name == "raw_data":
                raw_bytes = field.end - field.start
            elif field.name == "external_data" or field.value == _EXTERNAL:
                raise BadModelFile("the data of a tensor lies in another file; save the model as one file")
        wanted = elements * ELEMENT_BYTES.get(kind, 0)
        if raw_bytes >= 0 and kind in ELEMENT_BYTES and raw_bytes != wanted:
            raise BadModelFile(f"the tensor {shortened(name)} has {raw_bytes} bytes of data and needs {wanted}")
        return name, elements

    def sparse(self, at: _Field) -> tuple[str, int]:
        """A sparse tensor's name, and how many of its elements are given."""
        parts = {field.name: self.tensor(field) for field in self.fields("SparseTensorProto", at.start, at.end)}
        return parts.get("values", ("", 0))

    def initializer(self, at: _Field) -> str:
        """Count a weight, and say its name."""
        self.initializers += 1
        if self.initializers > INITIALIZERS_MAX:
            raise BadModelFile(f"it has more than {INITIALIZERS_MAX} tensors, which is the limit")
        name, elements = self.sparse(at) if at.name == "sparse_initializer" else self.tensor(at)
        self.parameters += elements
        return name

    def attribute(self, at: _Field, calls: _Calls, depth: int) -> None:
        """Look for tensors and graphs in a node's attribute."""
        looks: dict[str, Callable[[_Field], object]] = {
            "t": self.tensor,
            "tensors": self.tensor,
            "sparse_tensor": self.sparse,
            "sparse_tensors": self.sparse,
            "g": lambda field: self.graph(field, calls, depth + 1),
            "graphs": lambda field: self.graph(field, calls, depth + 1),
        }
        for field in self.fields("AttributeProto", at.start, at.end):
            looks[field.name](field)

    def node(self, at: _Field, calls: _Calls, depth: int) -> None:
        """Count a node into `calls`, and those of the graphs in it."""
        domain = name = ""
        for field in self.fields("NodeProto", at.start, at.end):
            if field.name == "attribute":
                self.attribute(field, calls, depth)
            elif field.name == "domain":
                domain = self.text(field)
            elif field.name == "op_type":
                name = self.text(field)
        calls[_Operator(domain, name)] += 1
        if len(calls) > OPERATORS_MAX:
            raise BadModelFile(f"it needs more than {OPERATORS_MAX} operators, which is the limit")

    def graph(self, at: _Field, calls: _Calls, depth: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The inputs that must be given, and the outputs."""
        if depth > DEPTH_MAX:
            raise BadModelFile(f"graphs in it are nested deeper than {DEPTH_MAX}, which is the limit")
        ends: dict[str, list[str]] = {"input": [], "output": []}
        weights = set()
        for field in self.fields("GraphProto", at.start, at.end):
            if field.name == "node":
                self.node(field, calls, depth)
            elif field.name in ends:
                names = [self.text(each) for each in self.fields("ValueInfoProto", field.start, field.end)]
                ends[field.name] += names or [""]
                if len(ends[field.name]) > ENDS_MAX:
                    raise BadModelFile(f"it has more than {ENDS_MAX} {field.name}s, which is the limit")
            else:
                weights.add(self.initializer(field))
        return tuple(name for name in ends["input"] if name not in weights), tuple(ends["output"])

    def function(self, at: _Field) -> tuple[_Operator, _Calls]:
        """The operator that a model's own function defines, and what it calls."""
        calls: _Calls = Counter()
        domain = name = ""
        for field in self.fields("FunctionProto", at.start, at.end):
            if field.name == "node":
                self.node(field, calls, 1)
            elif field.name == "attribute_proto":
                self.attribute(field, calls, 1)
            elif field.name == "domain":
                domain = self.text(field)
            else:
                name = self.text(field)
        return _Operator(domain, name), calls

    def opset(self, at: _Field) -> tuple[str, int]:
        """A set of operators, and its version."""
        domain, version = "", 0
        for field in self.fields("OperatorSetIdProto", at.start, at.end):
            if field.name == "domain":
                domain = self.text(field)
            else:
                version = field.value
        return domain, version


class _Weight(NamedTuple):
    """How many nodes an engine has once it put each function's nodes in the place of its calls, and how deep the functions go."""

    nodes: int
    depth: int


def _weigh(calls: _Calls, functions: dict[_Operator, _Calls], known: dict[_Operator, _Weight], within: int = 0) -> _Weight:
    """Weigh these calls; those of a function that calls itself never end, so the depth is looked at on the way down, too."""
    nodes = depth = 0
    for operator, times in calls.items():
        weight = _Weight(1, 0)
        if operator in functions and within <= DEPTH_MAX:
            if operator not in known:
                known[operator] = _weigh(functions[operator], functions, known, within + 1)
            weight = known[operator]
            depth = max(depth, weight.depth + 1)
        elif operator not in functions and operator.domain not in DOMAINS:
            raise BadModelFile(f"a node needs operators of {shortened(operator.domain)}, which no engine here has")
        nodes += times * weight.nodes
        if nodes > NODES_MAX:
            raise BadModelFile(f"it has more than {NODES_MAX} nodes, its functions' included, which is the limit")
        if max(depth, within) > DEPTH_MAX:
            raise BadModelFile(f"its functions call each other deeper than {DEPTH_MAX}, which is the limit, or in a circle")
    return _Weight(nodes, depth)


def read_onnx(data: bytes | memoryview | File, size_bytes: int | None = None) -> OnnxHeader:
    """Walk a whole model, given as bytes or as a file of `size_bytes`; raises BadModelFile with what is wrong."""
    if isinstance(data, bytes | memoryview):
        size_bytes = memoryview(data).nbytes
        data = io.BytesIO(data)
    assert size_bytes is not None
    if size_bytes > FILE_BYTES_MAX:
        raise BadModelFile(f"it is {size_bytes} bytes long, and an ONNX file's limit is {FILE_BYTES_MAX}")
    walk = _Walk(Window(data, size_bytes))
    calls: _Calls = Counter()
    functions: dict[_Operator, _Calls] = {}
    ends: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    version, producer, opsets = 0, "", dict[str, int]()
    for field in walk.fields("ModelProto", 0, size_bytes):
        match field.name:
            case "ir_version":
                version = field.value
            case "producer_name":
                producer = shortened(walk.text(field))
            case "opset_import":
                domain, opset = walk.opset(field)
                if domain in opsets or not 0 < opset < 2**31:
                    raise BadModelFile(f"the version of the operators {shortened(domain)} is missing, impossible or given twice")
                opsets[domain] = opset
            case "graph":
                ends = walk.graph(field, calls, 0)
            case "functions":
                operator, called = walk.function(field)
                if operator in functions or len(functions) >= FUNCTIONS_MAX:
                    raise BadModelFile(f"it gives a function twice, or more than {FUNCTIONS_MAX} functions, which is the limit")
                functions[operator] = called
            case _:
                raise BadModelFile("it is a model in training; export it for inference")
    if ends is None or not 0 < version < 2**31 or not opsets:
        raise BadModelFile("it isn't an ONNX model: its graph, its version or its operators' versions are missing")
    if not all(each and "" not in each for each in ends):
        raise BadModelFile("it has no inputs or no outputs, or one without a name")
    missing = {operator.domain or _ONNX for operator in calls if operator not in functions} - {domain or _ONNX for domain in opsets}
    if missing & DOMAINS:
        raise BadModelFile(f"it doesn't say which version of the operators {', '.join(sorted(missing & DOMAINS))} it needs")
    known: dict[_Operator, _Weight] = {}
    nodes = _weigh(calls, functions, known).nodes
    for called in functions.values():  # of functions that nothing calls, too
        _weigh(called, functions, known)
    domains = {operator.domain for source in (calls, *functions.values()) for operator in source}
    return OnnxHeader(
        ir_version=version,
        producer=producer,
        opsets=opsets,
        inputs=ends[0],
        outputs=ends[1],
        nodes=nodes,
        op_domains=tuple(sorted(domains)),
        parameters=walk.parameters,
    )

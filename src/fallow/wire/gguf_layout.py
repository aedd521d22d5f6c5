"""The parts of a GGUF file in the order they come, values, then tensors, each read with a limit; gguf_header says what they mean."""

import struct
from array import array
from typing import NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from fallow.model.errors import BadModelFile, shortened
from fallow.wire.window import Window

HEADER_BYTES_MAX = 256 * 1024**2
VALUES_MAX = 4_096
KEY_BYTES_MAX = 1_024
STRING_BYTES_MAX = 16 * 1024**2
STRING_BYTES_KEPT = 1_024
ELEMENTS_MAX = 4_000_000  # of one array, and of all arrays of strings together: those must be walked one by one
TENSORS_MAX = 65_536
TENSOR_NAME_BYTES_MAX = 63  # ggml's own
DIMENSIONS_MAX = 4
TENSOR_ELEMENTS_MAX = 2**48
ALIGNMENT_MAX = 4_096

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: U32,
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<B"),
    GGUFValueType.UINT64: U64,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}


class Array(NamedTuple):
    """An array that was passed over: where its elements lie, and how many there are."""

    type: GGUFValueType
    at: int
    length: int
    strings: "array[int]" = array("Q")  # where each string begins


Value = bool | int | float | bytes | Array  # of a string, the bytes that it begins with


class Tensor(NamedTuple):
    """One tensor; its offset counts from where the header's padding ends."""

    name: str
    type: GGMLQuantizationType
    elements: int
    offset: int
    size_bytes: int


class Cursor:
    """Reads the header from front to back."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self.at = 0
        self._strings_left = ELEMENTS_MAX

    def skip(self, count: int) -> None:
        """Go on, if there is so much file."""
        self.at += count
        if self.at > self._window.size_bytes:
            self._window.hold(self.at, 0)  # says that the file is cut off
        if self.at > HEADER_BYTES_MAX:
            raise BadModelFile(f"its header goes on past the limit of {HEADER_BYTES_MAX // 1024**2} MiB")

    def number(self, form: struct.Struct) -> int | float:
        """The number here, in one of the `SCALARS`' forms."""
        held, start = self._window.hold(self.at, form.size)
        self.skip(form.size)
        (found,) = form.unpack_from(held, start)
        assert isinstance(found, int | float)
        return found

    def integer(self, form: struct.Struct) -> int:
        """The number here, in an integer's form."""
        return int(self.number(form))

    def string(self, limit: int, what: str, kept: int | None = None) -> bytes:
        """The first `kept` bytes of a string, or all."""
        length = self.integer(U64)
        if length > limit:
            raise BadModelFile(f"{what} is {length} bytes long, and the limit is {limit}")
        at = self.at
        self.skip(length)
        return self._window.copy(at, length if kept is None else min(length, kept))

    def name(self, limit: int, what: str) -> str:
        """A string that must be text."""
        try:
            return self.string(limit, what).decode()
        except UnicodeDecodeError:
            raise BadModelFile(f"{what} isn't UTF-8 text") from None

    def strings(self, count: int) -> "array[int]":
        """Pass over so many strings, and say where each begins."""
        self._strings_left -= count
        if self._strings_left < 0:
            raise BadModelFile(f"its arrays hold more than {ELEMENTS_MAX} strings, which is the limit")
        starts = array("Q")
        while len(starts) < count:
            held, start = self._window.hold(self.at, U64.size)
            first, last = self.at - start, len(held) - U64.size
            for _ in range(count - len(starts)):
                if start > last:
                    break
                (length,) = U64.unpack_from(held, start)
                if length > STRING_BYTES_MAX:
                    raise BadModelFile(f"a string in an array is {length} bytes long, and the limit is {STRING_BYTES_MAX}")
                starts.append(first + start)
                start += U64.size + length
            self.skip(first + start - self.at)
        return starts


def _value_type(number: int, what: str) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise BadModelFile(f"{what} is of type {number}, which GGUF doesn't have") from None


def _boolean(cursor: Cursor, what: str) -> bool:
    number = cursor.number(SCALARS[GGUFValueType.BOOL])
    if number not in (0, 1):
        raise BadModelFile(f"{what} is neither true nor false")
    return number == 1


def _array(cursor: Cursor, what: str) -> Array:
    kind = _value_type(cursor.integer(U32), f"an element of {what}")
    count = cursor.integer(U64)
    at = cursor.at
    if count > ELEMENTS_MAX:
        raise BadModelFile(f"{what} has {count} elements, and the limit is {ELEMENTS_MAX}")
    if kind is GGUFValueType.ARRAY:
        raise BadModelFile(f"{what} is an array of arrays, which engines don't read")
    if kind is GGUFValueType.STRING:
        return Array(kind, at, count, cursor.strings(count))
    cursor.skip(count * SCALARS[kind].size)
    return Array(kind, at, count)


def read_values(cursor: Cursor, count: int) -> dict[str, Value]:
    """Read so many values; raises BadModelFile."""
    if count > VALUES_MAX:
        raise BadModelFile(f"its header announces {count} values, and the limit is {VALUES_MAX}")
    values: dict[str, Value] = {}
    for position in range(count):
        key = cursor.name(KEY_BYTES_MAX, f"the key of value {position}")
        what = shortened(key)
        if key in values:
            raise BadModelFile(f"{what} is given twice")
        kind = _value_type(cursor.integer(U32), what)
        if kind is GGUFValueType.STRING:
            values[key] = cursor.string(STRING_BYTES_MAX, what, STRING_BYTES_KEPT)
        elif kind is GGUFValueType.ARRAY:
            values[key] = _array(cursor, what)
        elif kind is GGUFValueType.BOOL:
            values[key] = _boolean(cursor, what)
        else:
            values[key] = cursor.number(SCALARS[kind])
    return values


def _tensor(cursor: Cursor, position: int) -> Tensor:
    name = cursor.name(TENSOR_NAME_BYTES_MAX, f"the name of tensor {position}")
    what = f"the tensor {shortened(name)}"
    dimensions = cursor.integer(U32)
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise BadModelFile(f"{what} has {dimensions} dimensions, and 1 to {DIMENSIONS_MAX} are possible")
    shape = [cursor.integer(U64) for _ in range(dimensions)]
    elements = 1
    for extent in shape:
        elements *= extent
    if not 1 <= elements <= TENSOR_ELEMENTS_MAX:
        raise BadModelFile(f"{what} has {elements} elements, and 1 to {TENSOR_ELEMENTS_MAX} are possible")
    number = cursor.integer(U32)
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise BadModelFile(f"{what} is of type {number}, which this version of Fallow doesn't know") from None
    if shape[0] % block:
        raise BadModelFile(f"{what} has rows of {shape[0]} elements, which don't divide into {kind.name}'s blocks of {block}")
    return Tensor(name, kind, elements, cursor.integer(U64), elements // block * block_bytes)


def read_tensors(cursor: Cursor, count: int) -> list[Tensor]:
    """Read so many descriptions of tensors; raises BadModelFile."""
    if count > TENSORS_MAX:
        raise BadModelFile(f"its header announces {count} tensors, and the limit is {TENSORS_MAX}")
    if not count:
        raise BadModelFile("it holds no tensors, so there is no model in it")
    tensors: dict[str, Tensor] = {}
    for position in range(count):
        tensor = _tensor(cursor, position)
        if tensor.name in tensors:
            raise BadModelFile(f"the tensor {shortened(tensor.name)} is given twice")
        tensors[tensor.name] = tensor
    return list(tensors.values())


def check_layout(tensors: list[Tensor], values: dict[str, Value], header_bytes: int, size_bytes: int) -> None:
    """The tensors must lie behind the header, aligned, apart from each other, and within the file."""
    alignment = values.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
        raise BadModelFile(f"its alignment must be a power of two up to {ALIGNMENT_MAX}")
    begin = -(-header_bytes // alignment) * alignment
    before, free = "", 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)):
        if tensor.offset % alignment:
            raise BadModelFile(f"the tensor {shortened(tensor.name)} doesn't begin at a multiple of {alignment} bytes")
        if tensor.offset < free:
            raise BadModelFile(f"the tensors {shortened(before)} and {shortened(tensor.name)} overlap")
        before, free = tensor.name, tensor.offset + tensor.size_bytes
    missing = begin + free - size_bytes
    if missing > 0:
        raise BadModelFile(f"it is cut off: {missing} of {begin + free} bytes are missing; fetch it again")

"""Bytes that are almost right, for fuzzing decoders: values of any message type drawn by seed, and changes to their bytes."""

import random
import re
import types
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

import msgspec

TEXTS = ("", "tiny", "de", "U" + "A" * 55, "text/event-stream", "/v1/completions", "sha256:0", "a.b.c", "*", "é\u2028", "x" * 300)
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65_535, 65_536, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1)
BYTES = bytes.fromhex("00017f80819091a0c0c1c4c5c6c7cacbcfd3d7dbdcdddfe0ff") + b'"{}[],:.-=\\\n\r '
"""Those that begin something in MessagePack, protobuf, JSON or text."""
CHANGES_MAX = 4
SPAN_MAX = 40
LIST_MAX = 3


def drawn(kind: Any, chance: random.Random, meta: msgspec.Meta | None = None) -> Any:
    """A value of a type that messages are made of, mostly within its bounds."""
    arguments, origin = get_args(kind), get_origin(kind)
    if isinstance(kind, NewType):
        return drawn(kind.__supertype__, chance, meta)
    if origin is Annotated:
        return drawn(arguments[0], chance, arguments[1])
    if origin is Literal:
        return chance.choice(arguments)
    if origin in (Union, types.UnionType):
        return drawn(chance.choice(arguments), chance)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{name: drawn(hints[name], chance) for name in kind.__struct_fields__})
    if origin is tuple and arguments[-1] is not ...:
        return tuple(drawn(one, chance) for one in arguments)
    if origin in (tuple, frozenset):
        return origin(drawn(arguments[0], chance) for _ in range(chance.randrange(LIST_MAX)))
    return _simple(kind, chance, meta)


def _simple(kind: Any, chance: random.Random, meta: msgspec.Meta | None) -> Any:
    if kind is bytes:
        low, high = (meta.min_length or 0, meta.max_length or SPAN_MAX) if meta is not None else (0, SPAN_MAX)
        return chance.randbytes(chance.choice((low, min(high, low + chance.randrange(SPAN_MAX)))))
    if kind is str:
        return chance.choice([text for text in TEXTS if meta is None or _fits(text, meta)])
    if kind is int:
        least, most = (meta.ge or 0, 2**63 - 1 if meta.le is None else meta.le) if meta is not None else (0, 2**63 - 1)
        return chance.choice([number for number in NUMBERS if least <= number <= most and (meta is None or number < (meta.lt or 2**63))])
    simple: dict[Any, Any] = {float: 0.5, bool: chance.random() < 0.5, type(None): None}
    return simple[kind]


def _fits(text: str, meta: msgspec.Meta) -> bool:
    fits = (meta.min_length or 0) <= len(text) <= (len(text) if meta.max_length is None else meta.max_length)
    return fits and (meta.pattern is None or re.search(meta.pattern, text) is not None)


def mutated(samples: list[bytes], chance: random.Random) -> bytes:
    """One of the samples, changed in a few places; now and then as it is."""
    data = bytearray(chance.choice(samples))
    for _ in range(chance.randrange(CHANGES_MAX + 1)):
        at = chance.randrange(len(data) + 1)
        span = chance.randrange(1, SPAN_MAX)
        match chance.randrange(8):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 2 | 3 if at < len(data):
                data[at] = chance.choice(BYTES)
            case 4:
                del data[at : at + span]
            case 5:
                data[at:at] = data[(begin := chance.randrange(len(data) + 1)) : begin + span]
            case 6:
                data[at:at] = chance.choice((chance.randbytes(span), bytes([chance.choice(BYTES)]) * span))
            case 7:
                other = chance.choice(samples)
                data[at:] = other[chance.randrange(len(other) + 1) :]
            case _:
                del data[at:]
    return bytes(data)

"""How much one side may send before the other has room again. Offsets count bytes from the start."""

BODY_WINDOW_BYTES = 1024 * 1024
ANSWER_WINDOW_BYTES = 256 * 1024


def more(granted: int, taken: int, *, window: int) -> int | None:
    """The offset to grant now that `taken` bytes left our hands, or None while it's not worth a message."""
    return taken + window if taken + window // 2 >= granted else None


def parts(size: int, *, start: int, until: int, part_max: int) -> list[tuple[int, int]]:
    """The (from, to) pairs of a body of `size` that may go out now, having sent `start` bytes, with credit up to `until`."""
    end = min(size, until)
    return [(at, min(at + part_max, end)) for at in range(start, end, part_max)]

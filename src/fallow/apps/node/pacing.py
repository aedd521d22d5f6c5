"""Answers that must not tell by their rhythm what they say: their pieces are gathered, and go out in a steady step or all at the end."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from fallow.apps.node.served import Piece

STEP_S = 0.1
"""Streamed tokens that leave one by one tell topics by their sizes and times ("Whisper Leak", arXiv 2511.03675)."""
AHEAD_MAX = 1_024
"""Pieces that the engine may be ahead of the caller; then it waits."""
WHOLE_BYTES_MAX = 32 * 1024 * 1024
"""An answer that is gathered until its end; what is longer goes out in parts of this size."""


async def stepped(pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    """The same answer, a piece in each step at most."""
    queue: asyncio.Queue[Piece | None] = asyncio.Queue(AHEAD_MAX)
    reading = asyncio.ensure_future(_read(pieces, queue))
    try:
        is_over = False
        while not is_over and (first := await queue.get()) is not None:
            gathered = [first]
            while not queue.empty() and not is_over:
                more = queue.get_nowait()
                if more is None:
                    is_over = True
                else:
                    gathered.append(more)
            is_last = gathered[-1].is_last
            is_over = is_over or is_last
            yield Piece(b"".join(piece.data for piece in gathered), is_last)
            if not is_over:
                await asyncio.sleep(STEP_S)
        await reading  # it may have ended with an error
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reading


async def _read(pieces: AsyncIterator[Piece], queue: "asyncio.Queue[Piece | None]") -> None:
    try:
        async for piece in pieces:
            await queue.put(piece)
    except Exception:
        await queue.put(None)
        raise
    await queue.put(None)


async def gathered(pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    """The same answer in one piece, when it is complete."""
    data = bytearray()
    async for piece in pieces:
        data += piece.data
        if piece.is_last or len(data) > WHOLE_BYTES_MAX:
            yield Piece(bytes(data), piece.is_last)
            data.clear()

"""What a node commits to with an answer's last message: later checks and receipts rest on this digest.

    begun  = SHA-256(lp("fallow/answer/v1", attempt's id, SHA-256(request's body), model's digest))
    digest = SHA-256(lp(begun, SHA-256(all data in their order), usage, tokens))

Usage is three numbers of 8 bytes, big-endian (prompt, cached, output), or nothing where the engine didn't count; tokens are 4 bytes each,
big-endian. `lp` is each part after its length in 4 bytes, as in `wire/seal.py`.
"""

import hashlib
import struct
from collections.abc import Sequence

from fallow.model.ids import AttemptId
from fallow.model.receipt import Usage
from fallow.wire.seal import lp

LABEL = b"fallow/answer/v1"


class Commitment:
    """Follows one answer as it comes or goes. `begun` is bound to the attempt and to what was asked."""

    def __init__(self, attempt_id: AttemptId, body: bytes | bytearray, model_digest: str) -> None:
        asked = hashlib.sha256(body).digest()
        self._begun = hashlib.sha256(lp(LABEL, attempt_id.encode(), asked, model_digest.encode())).digest()
        self._data = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """The next piece of the answer."""
        self._data.update(data)

    def digest(self, usage: Usage | None, tokens: Sequence[int]) -> bytes:
        """The whole answer's, 32 bytes."""
        counted = b"" if usage is None else struct.pack(">3Q", usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)
        return hashlib.sha256(lp(self._begun, self._data.digest(), counted, struct.pack(f">{len(tokens)}I", *tokens))).digest()

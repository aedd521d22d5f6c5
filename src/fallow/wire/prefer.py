"""The `Prefer` header (RFC 7240): of all that it may say, how long the caller is willing to wait."""

import re
from collections.abc import Sequence

from fallow.model.errors import InvalidRequest

WAIT_S_MAX = 600
"""A longer wish is cut to this; the answer's `Preference-Applied` tells."""
HEADER_BYTES_MAX = 4096
_PREFERENCE = re.compile(r'(?:"(?:\\.|[^"\\])*"?|[^",])+')  # a comma inside quotes doesn't end one


def wait_s(lines: Sequence[bytes]) -> int | None:
    """The seconds of the first `wait=` in the header's lines, None without one; raises InvalidRequest if they aren't a number."""
    text = b",".join(lines).decode("latin-1")
    if len(text) > HEADER_BYTES_MAX:
        raise InvalidRequest(f"the header Prefer is over {HEADER_BYTES_MAX} bytes", param="Prefer")
    for preference in _PREFERENCE.findall(text):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            return _seconds(value.strip())
    return None


def _seconds(text: str) -> int:
    digits = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if not (digits.isascii() and digits.isdigit()):
        raise InvalidRequest(f"Prefer: wait takes whole seconds from 0 to {WAIT_S_MAX}, such as wait=60", param="Prefer")
    return min(WAIT_S_MAX, int(digits))

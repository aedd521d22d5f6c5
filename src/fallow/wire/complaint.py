"""What msgspec says of a value that isn't as it should be, taken apart so that it can be said in our words."""

import re
from typing import Literal, NamedTuple

_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)


class Complaint(NamedTuple):
    """What is wrong (`message`), and with which field (`path`, such as `messages[0].role`; empty for the whole)."""

    kind: Literal["missing", "unknown", "wrong"]
    path: str
    message: str


def read(text: str) -> Complaint:
    """Take the text of a ValidationError apart."""
    at = _AT.search(text)
    path = at.group(1) if at else ""
    message = text[: at.start()] if at else text
    if found := _MISSING.match(message):
        return Complaint("missing", f"{path}.{found.group(1)}".lstrip("."), message)
    if found := _UNKNOWN.match(message):
        return Complaint("unknown", f"{path}.{found.group(1)}".lstrip("."), message)
    return Complaint("wrong", path, message)

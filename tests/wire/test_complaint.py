"""msgspec's complaints taken apart; the texts come from msgspec itself, so that a new wording of its shows here."""

from typing import Annotated, Literal

import msgspec
import pytest

from fallow.wire.complaint import Complaint, read


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    """A part of what is decoded below."""

    role: Literal["user", "system"]
    size: Annotated[int, msgspec.Meta(le=4)] = 0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    """What is decoded below."""

    name: str
    items: list[Inner] = []
    words: dict[str, str] = {}


@pytest.mark.parametrize(
    ("data", "kind", "path"),
    [
        ("{}", "missing", "name"),
        ('{"name":"a","items":[{"role":"user"},{}]}', "missing", "items[1].role"),
        ('{"name":"a","color":1}', "unknown", "color"),
        ('{"name":"a","items":[{"role":"user","color":1}]}', "unknown", "items[0].color"),
        ('{"name":5}', "wrong", "name"),
        ('{"name":"a","items":[{"role":"tool"}]}', "wrong", "items[0].role"),
        ('{"name":"a","items":[{"role":"user","size":5}]}', "wrong", "items[0].size"),
        ('{"name":"a","items":{}}', "wrong", "items"),
        ('{"name":"a","words":{"a":1}}', "wrong", "words[...]"),
        ("[]", "wrong", ""),
    ],
)
def test_read(data: str, kind: str, path: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(data, type=Outer)
    found = read(str(caught.value))
    assert (found.kind, found.path) == (kind, path)
    assert "$" not in found.message


def test_a_text_in_no_known_form_is_kept() -> None:
    assert read("Something else entirely") == Complaint("wrong", "", "Something else entirely")

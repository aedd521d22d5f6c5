"""For which endpoint a call's body is meant, when all that is asked is what it would cost."""

from collections.abc import Callable, Collection

import msgspec

from fallow.model.errors import InvalidRequest
from fallow.wire import openai, wishes

PATH = "/v1/quotes"
PATH_HEADER = "Fallow-Path"
"""Names the endpoint, where the body fits several or none."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that tell endpoints apart; what they hold is for the endpoint's own reader."""

    model: str
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    input: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    query: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    documents: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_shape = msgspec.json.Decoder(Shape)


def path_of(body: bytes, lines: wishes.Lines, offered: Callable[[str], Collection[str]]) -> str:
    """The endpoint; raises InvalidRequest. `offered` tells the paths that a model's offers have: `input` may be for two."""
    named = wishes.values_of(PATH_HEADER, lines)
    if named:
        if len(named) > 1 or named[0] not in openai.HEADS:
            text = f"the header {PATH_HEADER} takes one of {', '.join(openai.HEADS)}, once"
            raise InvalidRequest(text, param=PATH_HEADER)
        return named[0]
    shape = openai.decode(_shape, body)
    if shape.messages is not msgspec.UNSET:
        return openai.CHAT
    if shape.prompt is not msgspec.UNSET:
        return openai.COMPLETIONS
    if shape.query is not msgspec.UNSET and shape.documents is not msgspec.UNSET:
        return openai.RERANK
    if shape.input is not msgspec.UNSET:
        return openai.RESPONSES if openai.RESPONSES in offered(shape.model) else openai.EMBEDDINGS
    text = f"the body has no messages, prompt, input, or query and documents; name the endpoint with the header {PATH_HEADER}"
    raise InvalidRequest(text, param=PATH_HEADER)


def without_path(lines: wishes.Lines) -> wishes.Lines:
    """The headers that a call itself would have."""
    ours = PATH_HEADER.lower().encode()
    return [(name, value) for name, value in lines if name.lower() != ours]

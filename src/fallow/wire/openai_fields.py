"""Field types and small pieces that several of OpenAI's endpoints share."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fallow.model.errors import InvalidRequest
from fallow.model.receipt import Usage
from fallow.wire.generation import Alternative, Token
from fallow.wire.openai import TOKENS_MAX, StreamOptions, Tier

Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=4)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=8)]
TopK = Annotated[int, Meta(ge=0, le=1000)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Bias = Annotated[dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}\Z")], Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=300)]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
Word = Annotated[str, Meta(max_length=512)]


class Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that chats and completions have in common. `fallow` is the gateway's business."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: Bias | None = None
    n: Choices | None = None
    user: Word | None = None
    service_tier: Tier | None = None
    fallow: dict[str, Any] | None = None


def check_stream_options(request: Common) -> None:
    """`stream_options` belong to a stream; raises InvalidRequest."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options can only be given with stream: true", param="stream_options")


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop sequences in one form."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's words."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def alternative(one: Alternative) -> dict[str, Any]:
    """A token that might have been chosen."""
    return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes}


def logprobs(tokens: list[Token] | tuple[Token, ...]) -> list[dict[str, Any]]:
    """Log probabilities as chats and responses show them."""
    return [alternative(token) | {"top_logprobs": [alternative(one) for one in token.top]} for token in tokens]

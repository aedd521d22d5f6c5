"""The HTTP API as the gateway reads it: its paths, what it needs of a body, and the shape of OpenAI's errors."""

from typing import Any, ClassVar, Literal, get_args

import msgspec

from fallow.core.needs import Asked
from fallow.model.errors import Failure, InvalidRequest, shortened
from fallow.model.needs import ServiceTier
from fallow.wire import complaint, wishes
from fallow.wire.wishes import Wishes

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
RESPONSES_COUNT = "/v1/responses/input_tokens"
MESSAGES = "/v1/messages"
MESSAGES_COUNT = "/v1/messages/count_tokens"
EMBEDDINGS = "/v1/embeddings"
RERANK = "/v1/rerank"
MODELS = "/v1/models"
CALLS = "/v1/calls"
TOKENS_MAX = 2**31 - 1
BYTES_PER_TOKEN = 4
"""A rough mean for English text; only for choosing a node."""

Tier = Literal["auto", "default", "flex", "scale", "priority"]
MessagesTier = Literal["auto", "standard_only"]
TIERS: dict[Tier | MessagesTier, ServiceTier] = {
    "auto": "default",
    "standard_only": "default",
    "default": "default",
    "scale": "default",
    "flex": "flex",
    "priority": "priority",
}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream is to contain besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CallHead(msgspec.Struct, frozen=True, kw_only=True):
    """The few fields of a call that the gateway must know. All others stay bytes."""

    streams: ClassVar[bool] = False
    """Whether the endpoint can answer piece by piece."""
    model: str
    stream: bool | None = None
    fallow: Wishes | msgspec.UnsetType = msgspec.UNSET

    @property
    def tier(self) -> Tier | MessagesTier | None:
        """How urgent the caller says that it is."""
        return None

    @property
    def limit_name(self) -> str:
        """The field that bounds the answer."""
        return "max_tokens"

    @property
    def output_tokens_max(self) -> int | None:
        return None


class TieredHead(CallHead, frozen=True, kw_only=True):
    """The head of a call with OpenAI's service tiers."""

    streams: ClassVar[bool] = True
    service_tier: Tier | None = None

    @property
    def tier(self) -> Tier | None:
        return self.service_tier


class ChatHead(TieredHead, frozen=True, kw_only=True):
    """The head of a chat, or of a completion."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ResponsesHead(TieredHead, frozen=True, kw_only=True):
    """The head of a response."""

    max_output_tokens: int | None = None

    @property
    def limit_name(self) -> str:
        return "max_output_tokens"

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_output_tokens


class MessagesHead(CallHead, frozen=True, kw_only=True):
    """The head of a message, as Anthropic has it."""

    streams: ClassVar[bool] = True
    max_tokens: int | None = None
    service_tier: MessagesTier | None = None

    @property
    def tier(self) -> MessagesTier | None:
        return self.service_tier

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_tokens


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object. `loading` is ours, and is only there while a model loads."""

    message: str
    type: str
    param: str | None
    code: str
    loading: dict[str, float] | msgspec.UnsetType = msgspec.UNSET


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """How every error of the API looks."""

    error: ErrorBody


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the list. `endpoints` is ours: the paths that it answers."""

    id: str
    created: int
    owned_by: str
    object: Literal["model"] = "model"
    endpoints: list[str] | msgspec.UnsetType = msgspec.UNSET


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that are offered now."""

    data: list[Model]
    object: Literal["list"] = "list"


_chat = msgspec.json.Decoder(ChatHead)
_plain = msgspec.json.Decoder(CallHead)
HEADS: dict[str, "msgspec.json.Decoder[Any]"] = {
    CHAT: _chat,
    COMPLETIONS: _chat,
    RESPONSES: msgspec.json.Decoder(ResponsesHead),
    RESPONSES_COUNT: _plain,
    MESSAGES: msgspec.json.Decoder(MessagesHead),
    MESSAGES_COUNT: _plain,
    EMBEDDINGS: _plain,
    RERANK: _plain,
}
"""What reads the head of a call, for each path that takes calls."""


def read_head(path: str, body: bytes) -> CallHead:
    """The call's head; raises InvalidRequest with `param` named where a field is wrong."""
    head: CallHead = decode(HEADS[path], body)
    limit = head.output_tokens_max
    if limit is not None and not 1 <= limit <= TOKENS_MAX:
        raise InvalidRequest(f"{head.limit_name} must be between 1 and {TOKENS_MAX}", param=head.limit_name)
    if head.stream and not head.streams:
        raise InvalidRequest("stream: this endpoint answers in one piece only; leave it out", param="stream")
    return head


def asked_of(head: CallHead, body_bytes: int, headers: wishes.Lines) -> Asked:
    """All that the caller asked for, in the body's head and in the request's headers; raises InvalidRequest."""
    said = Wishes() if head.fallow is msgspec.UNSET else head.fallow
    return wishes.asked_for(
        wishes.joined(said, wishes.from_headers(headers)),
        model=head.model,
        prompt_tokens=body_bytes // BYTES_PER_TOKEN,
        output_tokens_max=head.output_tokens_max,
        service_tier=_tier(head.tier, headers),
    )


def _tier(said: Tier | MessagesTier | None, headers: wishes.Lines) -> ServiceTier:
    """The tier of body and headers; raises InvalidRequest where they differ. `auto` says nothing."""
    lines = wishes.values_of(wishes.TIER_HEADER, headers)
    try:
        also = msgspec.convert(lines[0] if len(lines) == 1 else lines, Tier) if lines else None
    except msgspec.ValidationError:
        text = f"the header {wishes.TIER_HEADER} takes one of {', '.join(get_args(Tier))}, once"
        raise InvalidRequest(text, param=wishes.TIER_HEADER) from None
    tiers = {TIERS[one] for one in (said, also) if one not in (None, "auto")}
    if len(tiers) > 1:
        text = f"service_tier and the header {wishes.TIER_HEADER} differ; say it in one place"
        raise InvalidRequest(text, param="service_tier")
    return tiers.pop() if tiers else "default"


def decode(decoder: "msgspec.json.Decoder[Any]", body: bytes) -> Any:
    """Decode a client's JSON; raises InvalidRequest in words that help, with the field as `param`."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def invalid(text: str) -> InvalidRequest:
    """A validation error of msgspec, with the field's path as `param`."""
    found = complaint.read(text)
    if found.path.startswith(f"{wishes.OBJECT}."):
        return wishes.wrong(found)
    if found.kind == "missing":
        return InvalidRequest(f"{found.path} is required", param=found.path)
    if found.kind == "unknown":
        return InvalidRequest(f"{shortened(found.path)} is not a parameter that this model's engine takes", param=found.path)
    return InvalidRequest(f"{found.path}: {found.message}" if found.path else found.message, param=found.path or None)


def error_body(failure: Failure, kind: str) -> bytes:
    """The envelope around a failure; `kind` is OpenAI's error type."""
    loading: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    if failure.progress is not None:
        loading = {"progress": failure.progress, "ready_in_s": (failure.retry_after_ms or 0) / 1000}
    body = ErrorBody(message=failure.message, type=kind, param=failure.param, code=failure.code, loading=loading)
    return msgspec.json.encode(ErrorEnvelope(error=body))

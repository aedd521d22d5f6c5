"""The list of models as Anthropic's clients read it; OpenAI's is with the rest of that API."""

from collections.abc import Mapping
from typing import Literal

import msgspec

UNKNOWN_DATE = "1970-01-01T00:00:00Z"
"""What Anthropic's API says where a model's date isn't known."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the list."""

    id: str
    display_name: str
    max_input_tokens: int | None
    created_at: str = UNKNOWN_DATE
    max_tokens: int | None = None
    capabilities: None = None
    type: Literal["model"] = "model"


class ModelInfoList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that are offered now, always all of them."""

    data: list[ModelInfo]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def model_info(name: str, context_tokens: int) -> ModelInfo:
    """One model, with the longest context that anyone offers for it."""
    return ModelInfo(id=name, display_name=name, max_input_tokens=context_tokens)


def model_list(contexts: Mapping[str, int]) -> ModelInfoList:
    """All models, by name."""
    names = sorted(contexts)
    return ModelInfoList(
        data=[model_info(name, contexts[name]) for name in names],
        first_id=names[0] if names else None,
        last_id=names[-1] if names else None,
    )

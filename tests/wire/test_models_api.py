"""The list of models as Anthropic's clients read it."""

import msgspec
import pytest
import vendor

from fallow.wire.models_api import model_info, model_list


@pytest.mark.parametrize(("contexts", "names"), [({}, []), ({"m": 1}, ["m"]), ({"b": 2048, "a": 512, "c": 1}, ["a", "b", "c"])])
def test_the_list(contexts: dict[str, int], names: list[str]) -> None:
    told = msgspec.json.decode(msgspec.json.encode(model_list(contexts)))
    vendor.check("anthropic", "ListResponse_ModelInfo_", told)
    assert [one["id"] for one in told["data"]] == names
    assert [one["max_input_tokens"] for one in told["data"]] == [contexts[name] for name in names]
    assert (told["first_id"], told["last_id"], told["has_more"]) == (names[0] if names else None, names[-1] if names else None, False)


def test_one_model() -> None:
    vendor.check("anthropic", "ModelInfo", msgspec.json.decode(msgspec.json.encode(model_info("m", 5))))

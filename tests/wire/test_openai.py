"""What the gateway reads of a body, and how errors name the field that was wrong."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import json as msgjson

from fallow.model.errors import Failure, InvalidRequest
from fallow.wire.openai import TOKENS_MAX, CallHead, Model, ModelList, StreamOptions, error_body, invalid, read_head

COUNTED = StreamOptions(include_usage=True)
PROMISE = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize(
    ("body", "head", "output_tokens_max"),
    [
        (b'{"model":"m"}', CallHead(model="m"), None),
        (b' \n{"model" : "m", "stream":null, "max_tokens":null}\t', CallHead(model="m"), None),
        (b'{"model":"m","stream":true}', CallHead(model="m", stream=True), None),
        (b'{"model":"m","max_tokens":7}', CallHead(model="m", max_tokens=7), 7),
        (b'{"model":"m","max_completion_tokens":9}', CallHead(model="m", max_completion_tokens=9), 9),
        (b'{"model":"m","max_tokens":7,"max_completion_tokens":9}', CallHead(model="m", max_tokens=7, max_completion_tokens=9), 9),
        (b'{"model":"m","max_tokens":1}', CallHead(model="m", max_tokens=1), 1),
        (b'{"model":"m","max_tokens":2147483647}', CallHead(model="m", max_tokens=TOKENS_MAX), TOKENS_MAX),
        (b'{"model":"m","service_tier":"flex"}', CallHead(model="m", service_tier="flex"), None),
        (
            b'{"model":"m","stream_options":{"include_usage":true}}',
            CallHead(model="m", stream_options=StreamOptions(include_usage=True)),
            None,
        ),
        (b'{"model":"m","stream_options":{"later":1}}', CallHead(model="m", stream_options=StreamOptions()), None),
        (b'{"model":"","tools":[{"x":[1,2.5e9,null]}],"temperature":"hot"}', CallHead(model=""), None),  # not the gateway's business
        (b'{"model":"m","model":"n"}', CallHead(model="n"), None),
        ('{"model":"Größe \\u00e9"}'.encode(), CallHead(model="Größe é"), None),
    ],
)
def test_read_head(body: bytes, head: CallHead, output_tokens_max: int | None) -> None:
    assert read_head(body) == head
    assert read_head(body).output_tokens_max == output_tokens_max


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "scale", "priority"])
def test_every_tier_of_openai_is_understood(tier: str) -> None:
    assert read_head(json.dumps({"model": "m", "service_tier": tier}).encode()).service_tier == tier


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{}", "model", "model is required"),
        (b'{"model":5}', "model", "model: Expected `str`, got `int`"),
        (b'{"model":null}', "model", "got `null`"),
        (b'{"model":"m","stream":"yes"}', "stream", "got `str`"),
        (b'{"model":"m","stream_options":{"include_usage":"yes"}}', "stream_options.include_usage", "got `str`"),
        (b'{"model":"m","stream_options":[]}', "stream_options", "got `array`"),
        (b'{"model":"m","max_tokens":1.5}', "max_tokens", "got `float`"),
        (b'{"model":"m","max_tokens":0}', "max_tokens", "between 1 and 2147483647"),
        (b'{"model":"m","max_tokens":-1}', "max_tokens", "between 1 and"),
        (b'{"model":"m","max_tokens":2147483648}', "max_tokens", "between 1 and"),
        (b'{"model":"m","max_tokens":' + b"9" * 5_000 + b"}", "max_tokens", "out of range"),
        (b'{"model":"m","max_tokens":5,"max_completion_tokens":0}', "max_completion_tokens", "between 1 and"),
        (b'{"model":"m","service_tier":"gold"}', "service_tier", "'gold'"),
        (b"[]", None, "Expected `object`, got `array`"),
        (b"null", None, "got `null`"),
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b'{"model":"m"', None, "not valid JSON"),
        (b'{"model":"m"}}', None, "not valid JSON"),
        (b"{'model':'m'}", None, "not valid JSON"),
        (b'{"model":"\xff"}', None, "not valid JSON"),
        (b'{"model":"\\ud800"}', None, "not valid JSON"),
        (b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
        (b"[" * 100_000, None, "got `array`"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, param: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_head(body)
    assert caught.value.param == param
    assert says in caught.value.message


@PROMISE
@given(st.binary(max_size=80) | st.binary(max_size=20).map(lambda raw: b'{"model":"m","stream":' + raw))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        head = read_head(body)
    except InvalidRequest:
        return
    assert isinstance(json.loads(body)["model"], str)
    assert head.model == json.loads(body)["model"]


some_json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@PROMISE
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "service_tier"), some_json),
    )
)
def test_a_refusal_names_a_field_of_the_request(fields: dict[str, Any]) -> None:
    try:
        head = read_head(json.dumps(fields).encode())
    except InvalidRequest as error:
        named = error.param
    else:
        named = None
        limit = head.output_tokens_max
        assert limit is None or 1 <= limit <= TOKENS_MAX
        assert head.model == fields["model"]
        return
    assert named is not None
    assert named.split(".")[0] in {"model", *fields}


@pytest.mark.parametrize(
    ("text", "param", "message"),
    [
        ("Object missing required field `model`", "model", "model is required"),
        ("Object missing required field `role` - at `$.messages[2]`", "messages[2].role", "messages[2].role is required"),
        ("Object contains unknown field `tools`", "tools", "tools is not a parameter that this model's engine takes"),
        (
            "Object contains unknown field `image` - at `$.messages[0].content[1]`",
            "messages[0].content[1].image",
            "messages[0].content[1].image is not a parameter that this model's engine takes",
        ),
        ("Expected `float` <= 2.0 - at `$.temperature`", "temperature", "temperature: Expected `float` <= 2.0"),
        ("Expected `str`, got `int` - at `$.metadata[...]`", "metadata[...]", "metadata[...]: Expected `str`, got `int`"),
        ("Expected `object`, got `array`", None, "Expected `object`, got `array`"),
        ("Expected `str`, got `int` - at `$[0]`", "[0]", "[0]: Expected `str`, got `int`"),
        ("Something else entirely", None, "Something else entirely"),
    ],
)
def test_invalid(text: str, param: str | None, message: str) -> None:
    error = invalid(text)
    assert (error.param, error.message, error.code) == (param, message, "invalid_request")


@pytest.mark.parametrize(
    ("failure", "kind", "body"),
    [
        (
            Failure(code="invalid_request", message="no", param="messages[0].role"),
            "invalid_request_error",
            {"message": "no", "type": "invalid_request_error", "param": "messages[0].role", "code": "invalid_request"},
        ),
        (
            Failure(code="busy", message='say "when"\n', retry_after_ms=2_000),
            "server_error",
            {"message": 'say "when"\n', "type": "server_error", "param": None, "code": "busy"},
        ),
        (
            Failure(code="model_loading", message="soon", progress=0.25, retry_after_ms=1_500),
            "server_error",
            {
                "message": "soon",
                "type": "server_error",
                "param": None,
                "code": "model_loading",
                "loading": {"progress": 0.25, "ready_in_s": 1.5},
            },
        ),
        (
            Failure(code="model_loading", message="soon", progress=0.0),
            "server_error",
            {
                "message": "soon",
                "type": "server_error",
                "param": None,
                "code": "model_loading",
                "loading": {"progress": 0.0, "ready_in_s": 0.0},
            },
        ),
    ],
)
def test_error_body(failure: Failure, kind: str, body: dict[str, Any]) -> None:
    assert json.loads(error_body(failure, kind)) == {"error": body}


def test_a_list_of_models_has_the_shape_that_clients_expect() -> None:
    told = json.loads(msgjson.encode(ModelList(data=[Model(id="m", created=0, owned_by="fallow")])))
    assert told == {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "fallow"}]}

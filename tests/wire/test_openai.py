"""What the gateway reads of a body, and how errors name the field that was wrong."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import json as msgjson
from msgspec.structs import replace

from fallow.core.needs import Asked
from fallow.model.errors import Failure, InvalidRequest
from fallow.wire.openai import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    HEADS,
    MESSAGES,
    MESSAGES_COUNT,
    RERANK,
    RESPONSES,
    RESPONSES_COUNT,
    TOKENS_MAX,
    CallHead,
    ChatHead,
    MessagesHead,
    Model,
    ModelList,
    ResponsesHead,
    asked_of,
    error_body,
    invalid,
    read_head,
)
from fallow.wire.wishes import TIER_HEADER, Wishes

PROMISE = settings(max_examples=60)


@pytest.mark.parametrize(
    ("body", "head", "output_tokens_max"),
    [
        (b'{"model":"m"}', ChatHead(model="m"), None),
        (b' \n{"model" : "m", "stream":null, "max_tokens":null}\t', ChatHead(model="m"), None),
        (b'{"model":"m","stream":true}', ChatHead(model="m", stream=True), None),
        (b'{"model":"m","max_tokens":7}', ChatHead(model="m", max_tokens=7), 7),
        (b'{"model":"m","max_completion_tokens":9}', ChatHead(model="m", max_completion_tokens=9), 9),
        (b'{"model":"m","max_tokens":7,"max_completion_tokens":9}', ChatHead(model="m", max_tokens=7, max_completion_tokens=9), 9),
        (b'{"model":"m","max_tokens":1}', ChatHead(model="m", max_tokens=1), 1),
        (b'{"model":"m","max_tokens":2147483647}', ChatHead(model="m", max_tokens=TOKENS_MAX), TOKENS_MAX),
        (b'{"model":"m","service_tier":"flex"}', ChatHead(model="m", service_tier="flex"), None),
        (b'{"model":"m","fallow":{}}', ChatHead(model="m", fallow=Wishes()), None),
        (b'{"model":"m","stream_options":[7],"max_output_tokens":"x"}', ChatHead(model="m"), None),
        (b'{"model":"","tools":[{"x":[1,2.5e9,null]}],"temperature":"hot"}', ChatHead(model=""), None),  # not the gateway's business
        (b'{"model":"m","model":"n"}', ChatHead(model="n"), None),
        ('{"model":"Größe \\u00e9"}'.encode(), ChatHead(model="Größe é"), None),
    ],
)
def test_the_head_of_a_chat(body: bytes, head: ChatHead, output_tokens_max: int | None) -> None:
    assert read_head(CHAT, body) == head
    assert read_head(CHAT, body).output_tokens_max == output_tokens_max


ALL = sorted(HEADS)
STREAMED = [CHAT, COMPLETIONS, RESPONSES, MESSAGES]


@pytest.mark.parametrize("path", ALL)
def test_every_path_has_a_head(path: str) -> None:
    head = read_head(path, b'{"model":"m","input":[1],"stream":false}')
    assert (head.model, head.stream, head.output_tokens_max, head.tier) == ("m", False, None, None)
    with pytest.raises(InvalidRequest, match="model is required"):
        read_head(path, b"{}")


@pytest.mark.parametrize("path", ALL)
def test_only_some_endpoints_stream(path: str) -> None:
    body = b'{"model":"m","stream":true}'
    if path in STREAMED:
        assert read_head(path, body).stream is True
        return
    with pytest.raises(InvalidRequest, match="one piece") as caught:
        read_head(path, body)
    assert caught.value.param == "stream"


LIMITS = {
    CHAT: ["max_tokens", "max_completion_tokens"],
    COMPLETIONS: ["max_tokens"],
    RESPONSES: ["max_output_tokens"],
    MESSAGES: ["max_tokens"],
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in LIMITS.items() for name in names])
def test_the_limit_of_an_answer(path: str, name: str) -> None:
    for value in (1, 7, TOKENS_MAX):
        assert read_head(path, json.dumps({"model": "m", name: value}).encode()).output_tokens_max == value
    for wrong in (0, -1, TOKENS_MAX + 1, 2**70, "7", 1.5, [7]):
        with pytest.raises(InvalidRequest) as caught:
            read_head(path, json.dumps({"model": "m", name: wrong}).encode())
        assert caught.value.param == name


@pytest.mark.parametrize("path", [RESPONSES_COUNT, MESSAGES_COUNT, EMBEDDINGS, RERANK])
def test_where_nothing_is_written_there_is_no_limit_and_no_tier(path: str) -> None:
    head = read_head(path, b'{"model":"m","max_tokens":"x","service_tier":5}')
    assert (head.output_tokens_max, head.tier) == (None, None)


@pytest.mark.parametrize(
    ("path", "tier", "known"),
    [
        (CHAT, "flex", True),
        (RESPONSES, "priority", True),
        (MESSAGES, "auto", True),
        (MESSAGES, "standard_only", True),
        (MESSAGES, "flex", False),
        (CHAT, "standard_only", False),
        (RESPONSES, "gold", False),
    ],
)
def test_tiers(path: str, tier: str, known: bool) -> None:
    body = json.dumps({"model": "m", "service_tier": tier}).encode()
    if known:
        assert read_head(path, body).tier == tier
        return
    with pytest.raises(InvalidRequest) as caught:
        read_head(path, body)
    assert caught.value.param == "service_tier"


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("value", "param"), [("null", "fallow"), ("[]", "fallow"), ('"x"', "fallow"), ('{"ring":"own"}', "fallow.ring"), ('{"":1}', "fallow.")]
)
def test_our_own_object_is_read_on_every_path(path: str, value: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_head(path, b'{"model":"m","fallow":%s}' % value.encode())
    assert caught.value.param == param
    assert isinstance(read_head(path, b'{"model":"m","fallow":{}}').fallow, Wishes)


LINE = TIER_HEADER.lower().encode()


@pytest.mark.parametrize(
    ("path", "body", "lines", "asked"),
    [
        (CHAT, {}, [], Asked(model="m")),
        (CHAT, {"service_tier": "flex", "max_tokens": 7}, [], Asked(model="m", output_tokens_max=7, service_tier="flex")),
        (CHAT, {"service_tier": "auto"}, [], Asked(model="m")),
        (CHAT, {"service_tier": "scale"}, [(LINE, b"default")], Asked(model="m")),
        (CHAT, {"service_tier": "auto"}, [(LINE, b"flex")], Asked(model="m", service_tier="flex")),
        (CHAT, {"service_tier": "flex"}, [(LINE, b"auto")], Asked(model="m", service_tier="flex")),
        (MESSAGES, {"service_tier": "auto"}, [(LINE, b" priority ")], Asked(model="m", service_tier="priority")),
        (EMBEDDINGS, {}, [(LINE, b"flex")], Asked(model="m", service_tier="flex")),
        (RERANK, {"fallow": {"hardware": "gpu"}}, [], Asked(model="m", hardware="gpu")),
        (CHAT, {}, [(b"fallow-strict", b"true")], Asked(model="m", strict=True)),
        (
            CHAT,
            {"fallow": {"max_cost": 0.5}},
            [(b"fallow-hardware", b"cpu")],
            Asked(model="m", cost_max_micro=500_000, hardware="cpu"),
        ),
    ],
)
def test_what_is_asked_for(path: str, body: dict[str, Any], lines: list[tuple[bytes, bytes]], asked: Asked) -> None:
    head = read_head(path, msgjson.encode({"model": "m"} | body))
    assert asked_of(head, 403, lines) == replace(asked, prompt_tokens=100)


@pytest.mark.parametrize(
    ("path", "body", "lines", "param"),
    [
        (CHAT, b'{"model":"m","service_tier":"flex"}', [b"priority"], "service_tier"),
        (CHAT, b'{"model":"m","service_tier":"default"}', [b"flex"], "service_tier"),
        (MESSAGES, b'{"model":"m","service_tier":"standard_only"}', [b"flex"], "service_tier"),
        (CHAT, b'{"model":"m"}', [b"gold"], TIER_HEADER),
        (CHAT, b'{"model":"m"}', [b""], TIER_HEADER),
        (CHAT, b'{"model":"m"}', [b"flex", b"flex"], TIER_HEADER),
    ],
)
def test_a_tier_that_is_wrong(path: str, body: bytes, lines: list[bytes], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        asked_of(read_head(path, body), len(body), [(LINE, line) for line in lines])
    assert caught.value.param == param
    assert param in caught.value.message


def test_the_types_of_the_heads() -> None:
    kinds = {path: type(read_head(path, b'{"model":"m"}')) for path in ALL}
    assert kinds[CHAT] is kinds[COMPLETIONS] is ChatHead
    assert (kinds[RESPONSES], kinds[MESSAGES]) == (ResponsesHead, MessagesHead)
    assert {kinds[path] for path in ALL if path not in STREAMED} == {CallHead}


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "scale", "priority"])
def test_every_tier_of_openai_is_understood(tier: str) -> None:
    assert read_head(CHAT, json.dumps({"model": "m", "service_tier": tier}).encode()).tier == tier


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{}", "model", "model is required"),
        (b'{"model":5}', "model", "model: Expected `str`, got `int`"),
        (b'{"model":null}', "model", "got `null`"),
        (b'{"model":"m","stream":"yes"}', "stream", "got `str`"),
        (b'{"model":"m","fallow":{"ring":"own"}}', "fallow.ring", "fallow.ring: there is no such wish; there are: first_token_ms, "),
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
        read_head(CHAT, body)
    assert caught.value.param == param
    assert says in caught.value.message


@PROMISE
@given(st.binary(max_size=80) | st.binary(max_size=20).map(lambda raw: b'{"model":"m","stream":' + raw))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        head = read_head(CHAT, body)
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
        optional=dict.fromkeys(("model", "stream", "fallow", "max_tokens", "max_completion_tokens", "service_tier"), some_json),
    )
)
def test_a_refusal_names_a_field_of_the_request(fields: dict[str, Any]) -> None:
    try:
        head = read_head(CHAT, json.dumps(fields).encode())
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
        (
            "Expected `int` >= 1 - at `$.fallow.per_token_ms`",
            "fallow.per_token_ms",
            "fallow.per_token_ms: Expected `int` >= 1; it takes milliseconds that each further token may take, "
            "as a mean over the answer, from 1 to 600000",
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

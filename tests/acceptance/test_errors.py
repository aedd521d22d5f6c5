"""Every error as a caller meets it: OpenAI's envelope, a stable code, at once, nothing leaked."""

import http.client
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import MODEL, Apart, Service, fallow, until, wait_ready

HI = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}
MIB = 2**20


def code_of(answer: requests.Response) -> str:
    """The error's code; the envelope is checked on the way."""
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return str(error["code"])


@pytest.mark.parametrize("headers", [{"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}, {"authorization": ""}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/fallow/nodes", "/fallow/status"])
def test_no_key_or_a_wrong_one(service: Service, headers: dict[str, str], path: str) -> None:
    ask = requests.post if "chat" in path else requests.get
    answer = ask(service.root + path, headers=headers, timeout=10)
    assert (answer.status_code, code_of(answer)) == (401, "invalid_api_key")


def test_the_openai_package_raises_its_own_errors(service: Service) -> None:
    with openai.OpenAI(base_url=service.base_url, api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with service.client() as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi."}])
    assert MODEL in str(caught.value), "the models that are there are named"


BAD: list[tuple[str, Any, str | None]] = [
    ("no JSON", b"{", None),
    ("not UTF-8", b'{"model": "\xff\xfe"}', None),
    ("an array", [], None),
    ("no model", {"messages": []}, "model"),
    ("model a number", HI | {"model": 3}, "model"),
    ("no messages", {"model": MODEL}, "messages"),
    ("empty messages", HI | {"messages": []}, "messages"),
    ("an unknown role", HI | {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ("no role", HI | {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("null content", HI | {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("an image", HI | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ("max_tokens zero", HI | {"max_tokens": 0}, "max_tokens"),
    ("max_tokens negative", HI | {"max_tokens": -1}, "max_tokens"),
    ("max_tokens a fraction", HI | {"max_tokens": 1.5}, "max_tokens"),
    ("max_tokens true", HI | {"max_tokens": True}, "max_tokens"),
    ("max_tokens huge", HI | {"max_tokens": 2**63}, "max_tokens"),
    ("max_completion_tokens zero", HI | {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("max_tokens a text", HI | {"max_tokens": "5"}, "max_tokens"),
    ("max_tokens 2^31", HI | {"max_tokens": 2**31}, "max_tokens"),
    ("max_tokens 1e12", HI | {"max_tokens": 1e12}, "max_tokens"),
    ("temperature 1e30", HI | {"temperature": 1e30}, "temperature"),
    ("stop of 300", HI | {"stop": ["x"] * 300}, "stop"),
    ("n over all limits", HI | {"n": 9}, "n"),
    ("top_logprobs 100", HI | {"logprobs": True, "top_logprobs": 100}, "top_logprobs"),
    ("top_logprobs without logprobs", HI | {"top_logprobs": 2}, "top_logprobs"),
    ("audio", HI | {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ("malformed tools", HI | {"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
    ("a tool that isn't there", HI | {"tools": [], "tool_choice": "required"}, "tool_choice"),
    ("store", HI | {"store": True}, "store"),
    ("slots", HI | {"id_slot": 0}, "id_slot"),
    ("a LoRA", HI | {"lora": []}, "lora"),
    ("cache control", HI | {"cache_prompt": False}, "cache_prompt"),
    ("a template", HI | {"chat_template": "x"}, "chat_template"),
    ("stream a number", HI | {"stream": 1}, "stream"),
    ("n zero", HI | {"n": 0}, "n"),
    ("temperature negative", HI | {"temperature": -1}, "temperature"),
    ("top_p five", HI | {"top_p": 5}, "top_p"),
    ("stop a number", HI | {"stop": 3}, "stop"),
    ("stop empty", HI | {"stop": ""}, "stop"),
    ("a parameter of llama.cpp's own", HI | {"n_discard": -1}, "n_discard"),
    ("a grammar", HI | {"grammar": "root ::= 'a'"}, "grammar"),
    ("an unknown tier", HI | {"service_tier": "gold"}, "service_tier"),
    ("a schema without one", HI | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
]


@pytest.mark.parametrize(("body", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_requests_name_the_parameter(service: Service, body: Any, param: str | None) -> None:
    answer = service.post(body)
    assert (answer.status_code, code_of(answer)) == (400, "invalid_request")
    assert answer.json()["error"]["param"] == param


def test_a_deeply_nested_body(service: Service) -> None:
    answer = service.post(b'{"model":"' + MODEL.encode() + b'","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert (answer.status_code, code_of(answer)) == (400, "invalid_request")


def test_an_unknown_model_lists_those_there_are(service: Service) -> None:
    answer = service.post(HI | {"model": "nobody"})
    assert (answer.status_code, code_of(answer)) == (404, "model_not_found")
    assert MODEL in answer.json()["error"]["message"]


def test_a_prompt_over_the_context(service: Service) -> None:
    answer = service.post(HI | {"messages": [{"role": "user", "content": "word " * 9_000}]})
    assert (answer.status_code, code_of(answer)) == (400, "context_length_exceeded")
    assert "8192" in answer.json()["error"]["message"]


def test_control_tokens_of_a_caller_are_plain_text(service: Service) -> None:
    """They would end the caller's turn and begin another one; as text they are many tokens more."""
    plain = service.post({"model": MODEL, "messages": [{"role": "user", "content": "x im_end y"}]}, "/messages/count_tokens").json()
    faked = service.post({"model": MODEL, "messages": [{"role": "user", "content": "x <|im_end|> y"}]}, "/messages/count_tokens").json()
    assert faked["input_tokens"] > plain["input_tokens"]


def test_unknown_paths_and_wrong_methods(service: Service) -> None:
    assert code_of(service.get("/v1/nothing")) == "unknown_path"
    assert code_of(service.get("/nothing")) == "unknown_path"
    wrong = service.get("/v1/chat/completions")
    assert (wrong.status_code, code_of(wrong)) == (405, "method_not_allowed")


def test_a_body_of_32_mib_travels_in_parts(service: Service) -> None:
    whole = msgspec.json.encode(HI)
    body = whole + b" " * (32 * MIB - len(whole))
    answer = service.post(body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_a_body_over_32_mib_is_refused_before_it_is_read(service: Service) -> None:
    parts = urlsplit(service.base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("authorization", f"Bearer {service.key}")
    connection.putheader("content-length", str(32 * MIB + 1))
    connection.endheaders()  # and not a byte of the body
    answer = connection.getresponse()
    assert answer.status == 413
    head = answer.read1(4096)
    assert msgspec.json.decode(head)["error"]["code"] == "body_too_large"
    connection.close()


def test_a_body_over_32_mib_that_is_sent_all_the_same(service: Service) -> None:
    def chunks() -> Any:
        for _ in range(33):
            yield b" " * MIB

    declared = service.post(b" " * (33 * MIB))
    assert (declared.status_code, code_of(declared)) == (413, "body_too_large")
    undeclared = service.post(b"", headers={})  # an empty body is bad JSON, not a hang
    assert undeclared.status_code == 400
    chunked = requests.post(
        service.base_url + "/chat/completions", data=chunks(), headers={"authorization": f"Bearer {service.key}"}, timeout=30
    )
    assert (chunked.status_code, code_of(chunked)) == (413, "body_too_large")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["model", "messages", "stream", "max_tokens", "temperature", "stop", "n", "seed", "response_format", "stream_options", "tools", "user"]
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(msgspec.json.encode),
    st.dictionaries(FIELDS, JSON, max_size=6).map(msgspec.json.encode),
    st.dictionaries(FIELDS, JSON, max_size=4).map(lambda fields: msgspec.json.encode(HI | {"messages": []} | fields)),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=st.sampled_from(["/chat/completions", "/completions"]))
def test_malformed_bodies_never_break_anything(service: Service, body: bytes, path: str) -> None:
    answer = service.post(body, path)
    assert answer.status_code in (400, 404), (answer.status_code, answer.text)
    assert code_of(answer) in ("invalid_request", "model_not_found")


def test_no_node(apart: Apart) -> None:
    service = apart.start_hub_and_gateway()
    answer = service.post(HI)
    assert (answer.status_code, code_of(answer)) == (503, "no_node")
    assert int(answer.headers["retry-after"]) >= 1
    assert "fallow lend" in answer.json()["error"]["message"]
    ready = requests.get(service.root + "/readyz", timeout=10)
    assert (ready.status_code, ready.json()["ok"]) == (503, False)
    assert requests.get(service.root + "/healthz", timeout=10).status_code == 200


def test_a_model_that_is_still_loading(apart: Apart) -> None:
    """The engine is stopped while it loads; callers are told how far it is."""
    service = apart.start_hub_and_gateway()
    node = apart.lend("node", load_wait_s=0.2)
    wait_ready(service, 1)
    node.engine().kill()
    until(lambda: "ready" not in service.readiness().values(), what="the loss is seen")
    node.engine().suspend()
    answer = service.post(HI)
    assert (answer.status_code, code_of(answer)) == (503, "model_loading")
    assert int(answer.headers["retry-after"]) >= 1
    assert 0 <= answer.json()["error"]["loading"]["progress"] < 1
    node.engine().resume()
    until(lambda: service.post(HI).status_code == 200, what="an answer once it is loaded")


def test_commands_complain_in_one_line(service: Service) -> None:
    wrong = fallow("chat", "--base-url", "http://127.0.0.1:9/v1", "hi")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert "could not reach" in wrong.stderr
    refused = fallow("chat", "--data", str(service.parts["up"].data), "--model", "nobody", "hi")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert MODEL in refused.stderr

"""Every endpoint, whole and streamed, held against the vendors' published schemas."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from running import EMBEDDER, MODEL, Service
from vendor import check, events

HI = [{"role": "user", "content": "Name one colour."}]
CHAT: dict[str, dict[str, Any]] = {
    "plain": {},
    "length": {"max_tokens": 1},
    "two choices": {"n": 2, "temperature": 1.0, "seed": 7},
    "more choices than slots": {"n": 8, "temperature": 1.0, "max_tokens": 3},
    "log probabilities": {"logprobs": True, "top_logprobs": 3},
    "log probabilities of the chosen only": {"logprobs": True},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"42": -100}, "top_p": 0.9, "top_k": 40},
    "stop": {"stop": ["a", "e", "i", "o"]},
    "said of the caller": {"user": "u", "metadata": {"k": "v"}, "store": False, "safety_identifier": "s", "service_tier": "flex"},
    "reasoning": {"reasoning_effort": "none"},
    "json": {"response_format": {"type": "json_object"}},
    "history": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "colour?"}], "name": "ann"},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": "Another one?"},
        ]
    },
}


def chat_body(more: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0} | more


@pytest.mark.parametrize("more", CHAT.values(), ids=CHAT)
def test_a_chat(service: Service, more: dict[str, Any]) -> None:
    body = chat_body(more)
    whole = service.post(body).json()
    check("openai", "CreateChatCompletionResponse", whole)
    streamed = events(service.post(body | {"stream": True, "stream_options": {"include_usage": True}}).content)
    assert streamed.pop() == ("", "[DONE]")
    for _, event in streamed:
        check("openai", "CreateChatCompletionStreamResponse", event)
    assert streamed[-1][1]["usage"]["completion_tokens"] > 0
    choices = body.get("n", 1)
    assert len(whole["choices"]) == choices
    finished = {event["choices"][0]["index"] for _, event in streamed if event["choices"] and event["choices"][0]["finish_reason"]}
    assert finished == set(range(choices))
    if body["temperature"] == 0:
        text = "".join(e["choices"][0]["delta"].get("content", "") for _, e in streamed if e["choices"])
        assert text == whole["choices"][0]["message"]["content"]


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several prompts": {"prompt": ["Once upon", "The sea"], "n": 2},
    "tokens": {"prompt": [1, 42, 7]},
    "token arrays": {"prompt": [[1, 42, 7], [9, 8]]},
    "log probabilities": {"logprobs": 2},
    "echo": {"echo": True},
    "the default length": {"max_tokens": None},
}


@pytest.mark.parametrize("more", COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_completion(service: Service, more: dict[str, Any]) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0} | more
    whole = service.post(body, "/completions").json()
    check("openai", "CreateCompletionResponse", whole)
    prompts = len(body["prompt"]) if isinstance(body["prompt"], list) and not isinstance(body["prompt"][0], int) else 1
    assert [choice["index"] for choice in whole["choices"]] == list(range(prompts * body.get("n", 1)))
    streamed = events(service.post(body | {"stream": True}, "/completions").content)
    assert streamed.pop() == ("", "[DONE]")
    texts: dict[int, str] = {}
    for _, event in streamed:
        check(
            "openai",
            "CreateCompletionResponse",
            event | {"choices": [c | {"finish_reason": c["finish_reason"] or "stop"} for c in event["choices"]]},
        )
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
    if body.get("echo"):
        assert whole["choices"][0]["text"].startswith("Once upon a time")
    if body.get("logprobs"):
        found = whole["choices"][0]["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"]) > 0
        assert all(len(top) <= 2 for top in found["top_logprobs"])


RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "length": {"max_output_tokens": 16, "input": "Tell me a very long story about a sea."},
    "instructions": {"instructions": "Be brief.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "A colour?"}]}]},
    "log probabilities": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "said of the caller": {"store": False, "metadata": {"k": "v"}, "user": "u", "truncation": "disabled", "parallel_tool_calls": False},
}


@pytest.mark.parametrize("more", RESPONSES.values(), ids=RESPONSES)
def test_a_response(service: Service, more: dict[str, Any]) -> None:
    body = {"model": MODEL, "input": "Name one colour.", "max_output_tokens": 20, "temperature": 0} | more
    whole = service.post(body, "/responses").json()
    check("openai", "Response", whole)
    streamed = events(service.post(body | {"stream": True}, "/responses").content)
    assert [event["sequence_number"] for _, event in streamed] == list(range(len(streamed)))
    for name, event in streamed:
        check("openai", "ResponseStreamEvent", event)
        assert name == event["type"]
    last = streamed[-1][1]["response"]
    assert last["status"] == whole["status"]
    assert [part["text"] for item in last["output"] for part in item["content"]] == [
        p["text"] for item in whole["output"] for p in item["content"]
    ]


MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "length": {"max_tokens": 1},
    "system": {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "top_k": 5, "top_p": 0.9},
    "a beginning": {"messages": [*HI, {"role": "assistant", "content": "One colour is"}]},
    "stop": {"stop_sequences": ["e"]},
    "metadata": {"metadata": {"user_id": "u"}, "service_tier": "auto"},
}


@pytest.mark.parametrize("more", MESSAGES.values(), ids=MESSAGES)
def test_a_message(service: Service, more: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0} | more
    whole = service.post(body, "/messages", headers={"anthropic-version": "2023-06-01"}).json()
    check("anthropic", "Message", whole)
    streamed = events(service.post(body | {"stream": True}, "/messages").content)
    for name, event in streamed:
        if name != "ping":
            check("anthropic", "MessageStreamEvent", event)
        assert name == event["type"]
    text = "".join(e["delta"]["text"] for name, e in streamed if name == "content_block_delta")
    assert text == "".join(block["text"] for block in whole["content"])
    ended = next(e for name, e in streamed if name == "message_delta")
    assert ended["delta"]["stop_reason"] == whole["stop_reason"]
    assert ended["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    if "stop_sequences" in body:
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "e")
        assert "e" not in text


def test_tokens_are_counted_as_the_engine_counts_them(service: Service) -> None:
    counted = service.post({"model": MODEL, "messages": HI}, "/messages/count_tokens").json()
    check("anthropic", "CountMessageTokensResponse", counted)
    said = service.post({"model": MODEL, "messages": HI, "max_tokens": 1}, "/messages").json()["usage"]
    assert counted["input_tokens"] == said["input_tokens"] + said["cache_read_input_tokens"]
    also = service.post({"model": MODEL, "input": HI[0]["content"]}, "/responses/input_tokens").json()
    check("openai", "TokenCountsResource", also)
    assert also["input_tokens"] == counted["input_tokens"]


@pytest.mark.parametrize("inputs", ["a cat", ["a cat", "a dog"], [101, 4937, 102], [[101, 4937, 102], [101, 3899, 102]]])
def test_embeddings(service: Service, inputs: Any) -> None:
    body = {"model": EMBEDDER, "input": inputs}
    plain = service.post(body, "/embeddings").json()
    check("openai", "CreateEmbeddingResponse", plain)
    packed = service.post(body | {"encoding_format": "base64", "dimensions": 384, "user": "u"}, "/embeddings").json()
    count = len(inputs) if isinstance(inputs, list) and not isinstance(inputs[0], int) else 1
    assert len(plain["data"]) == len(packed["data"]) == count
    for one, other in zip(plain["data"], packed["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.allclose(one["embedding"], unpacked, atol=1e-6)
        assert np.linalg.norm(unpacked) == pytest.approx(1, abs=1e-3)


def test_meaning_is_near_meaning(service: Service) -> None:
    body = {"model": EMBEDDER, "query": "a small pet that purrs", "documents": ["interest rates rose", "a kitten", {"text": "a lorry"}]}
    ranked = service.post(body, "/rerank").json()
    assert ranked["results"][0]["index"] == 1
    assert [one["relevance_score"] for one in ranked["results"]] == sorted(
        (one["relevance_score"] for one in ranked["results"]), reverse=True
    )
    best = service.post(body | {"top_n": 1, "return_documents": True}, "/rerank").json()["results"]
    assert [one["document"]["text"] for one in best] == ["a kitten"]


def test_models_are_listed_in_both_forms(service: Service) -> None:
    listed = service.get("/v1/models").json()
    check("openai", "ListModelsResponse", listed)
    assert {one["id"] for one in listed["data"]} == {MODEL, EMBEDDER}
    check("openai", "Model", service.get(f"/v1/models/{MODEL}").json())


ERRORS: list[tuple[str, Any, int]] = [
    ("/chat/completions", {"model": MODEL, "messages": []}, 400),
    ("/chat/completions", {"model": "nobody", "messages": HI}, 404),
    ("/completions", {"model": MODEL}, 400),
    ("/responses", {"model": MODEL, "input": "x", "background": True}, 400),
    ("/responses/input_tokens", {"model": MODEL}, 400),
    ("/embeddings", {"model": EMBEDDER, "input": ""}, 400),
    ("/embeddings", {"model": EMBEDDER, "input": "x", "dimensions": 7}, 400),
    ("/embeddings", {"model": MODEL, "input": "x"}, 400),
    ("/rerank", {"model": EMBEDDER, "query": "x", "documents": []}, 400),
    ("/chat/completions", {"model": EMBEDDER, "messages": HI}, 400),
]


@pytest.mark.parametrize(("path", "body", "status"), ERRORS)
def test_errors_in_openai_s_form(service: Service, path: str, body: Any, status: int) -> None:
    answer = service.post(body, path)
    assert answer.status_code == status, answer.text
    check("openai", "ErrorResponse", answer.json())


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/messages", {"model": MODEL, "messages": HI}, 400),
        ("/messages", {"model": "nobody", "messages": HI, "max_tokens": 1}, 404),
        ("/messages", b"{", 400),
        ("/messages/count_tokens", {"model": MODEL, "messages": []}, 400),
    ],
)
def test_errors_in_anthropic_s_form(service: Service, path: str, body: Any, status: int) -> None:
    answer = service.post(body, path)
    assert answer.status_code == status, answer.text
    check("anthropic", "ErrorResponse", answer.json())
    assert "Traceback" not in answer.text


def test_a_call_is_told_afterwards(service: Service) -> None:
    answer = service.post({"model": MODEL, "messages": HI, "max_tokens": 3})
    told = service.get(f"/v1/calls/{answer.headers['fallow-call']}").json()
    assert (told["status"], told["http_status"], told["model"], told["path"]) == ("done", 200, MODEL, "/v1/chat/completions")
    assert told["output_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert [one["code"] for one in told["attempts"]] == [None]
    assert 0 < told["first_byte_ms"] <= told["total_ms"]
    assert "colour" not in json.dumps(told), "what was said is nobody's business"
    assert service.get("/v1/calls/call_000000000000000000000000").status_code == 404

"""Calls as callers make them: the real openai package, gateway, broker, node, llama.cpp and model."""

import concurrent.futures
import json
import time
from typing import Any

import openai
import psutil
import pytest
from running import EMBEDDER, MODEL, Service, cpu_s, until

HI: Any = [{"role": "user", "content": "Say hello."}]
ENDLESS = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_headers_say_what_ran_where(client: openai.OpenAI, service: Service) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, max_tokens=2)
    assert raw.headers["fallow-call"].startswith("call_")
    assert raw.headers["fallow-node"] == service.nodes()[0]["node_id"]
    assert raw.headers["fallow-hardware"].startswith("cpu ")
    assert raw.headers["fallow-attempts"] == "1"
    assert float(raw.headers["fallow-overhead-ms"]) >= 0


def test_a_streamed_chat_is_the_same_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    roles = [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role]
    assert roles == ["assistant"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert all(c.usage is None for c in chunks), "nobody asked for usage"


def test_a_stream_tells_its_usage_when_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=5, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert [c.usage is not None for c in chunks].count(True) == 1
    last = chunks[-1]
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    assert last.choices == []


def test_two_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 4, "both choices are counted"


def test_a_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0)
    stream = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True)
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Extract: Ada Lovelace was 36 years old."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
        max_tokens=60,
        temperature=0,
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)


def test_many_calls_at_once(client: openai.OpenAI) -> None:
    def ask(number: int) -> int:
        answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"Count to {number}."}], max_tokens=4)
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(0 < tokens <= 4 for tokens in pool.map(ask, range(20)))


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [EMBEDDER, MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_stops_the_engine(service: Service, stream: bool) -> None:
    """Looked at from the engine: half a second after the caller left it uses no more CPU."""
    engine = service.parts["up"].engine()
    beside = service.client(timeout=2.0 if not stream else 60)
    if stream:
        answer = beside.completions.create(model=MODEL, prompt=ENDLESS, max_tokens=3000, temperature=0, stream=True)
        for _ in zip(range(5), answer, strict=False):
            pass
        assert burns(engine, 0.3), "the engine works while somebody reads"
        answer.close()
        beside.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            beside.completions.create(model=MODEL, prompt=ENDLESS, max_tokens=3000, temperature=0)
        beside.close()
    time.sleep(0.5)
    assert not burns(engine, 0.5)
    until(lambda: service.nodes()[0]["offers"][0]["slots_free"] == 8, within_s=5, what="the slot is free again")


def burns(engine: psutil.Process, over_s: float) -> bool:
    """Whether the engine computes: an idle one uses well under a tenth of a core."""
    before = cpu_s(engine)
    time.sleep(over_s)
    return bool(cpu_s(engine) - before > 0.1 * over_s)

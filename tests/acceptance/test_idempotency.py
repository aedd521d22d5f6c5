"""`Idempotency-Key` as clients use it: real gateway, node, engine and model; a call runs once, however often it is asked for."""

import concurrent.futures
import secrets
from typing import Any

import openai
import pytest
import requests
from running import MODEL, Service, until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Invent a name."}], "max_tokens": 24, "temperature": 1.5}
"""Hot enough that two runs would hardly say the same."""
ENDLESS = {"model": MODEL, "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,", "max_tokens": 150, "temperature": 1.0, "stream": True}


@pytest.fixture
def key() -> str:
    return f"test-{secrets.token_hex(8)}"


def post(service: Service, key: str, body: Any = CHAT, path: str = "/chat/completions", **options: Any) -> requests.Response:
    return service.post(body, path, headers={"idempotency-key": key}, **options)


def story(service: Service, answer: requests.Response) -> Any:
    """What is known of the call that gave the answer."""
    found = service.get(f"/v1/calls/{answer.headers['fallow-call']}")
    assert found.status_code == 200, found.text
    return found.json()


def is_same(first: requests.Response, again: requests.Response) -> None:
    assert again.content == first.content
    assert again.status_code == first.status_code
    assert again.headers.get("fallow-repeated") == "1"
    ours = {name: value for name, value in again.headers.items() if name.lower() != "fallow-repeated"}
    assert ours == dict(first.headers)


def test_two_at_once_are_one_call(service: Service, key: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: post(service, key), range(2)))
    assert [answer.status_code for answer in answers] == [200, 200]
    first, again = sorted(answers, key=lambda answer: "fallow-repeated" in answer.headers)
    assert "fallow-repeated" not in first.headers
    is_same(first, again)
    told = story(service, first)
    assert (told["status"], len(told["attempts"])) == ("done", 1)
    assert told["output_tokens"] == first.json()["usage"]["completion_tokens"]


def test_a_repeat_and_another_body(service: Service, client: openai.OpenAI, key: str) -> None:
    first = post(service, key)
    is_same(first, post(service, key))
    is_same(first, post(service, f'"{key}"'))
    other = post(service, key + "-other")
    assert other.headers["fallow-call"] != first.headers["fallow-call"]
    with pytest.raises(openai.ConflictError) as raised:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Something else."}], extra_headers={"Idempotency-Key": key}
        )
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "idempotency_conflict",
        "Idempotency-Key",
        "invalid_request_error",
    )
    elsewhere = post(service, key, path="/quotes")
    assert elsewhere.status_code == 409
    quotes = [post(service, key + "-quote", path="/quotes") for _ in range(2)]
    assert quotes[0].status_code == 200
    is_same(*quotes)


def test_a_key_that_is_none(service: Service) -> None:
    answer = post(service, "a" * 256)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_stream_whose_caller_left_is_whole_for_the_next(service: Service, key: str) -> None:
    left = post(service, key, ENDLESS, "/completions", stream=True)
    assert left.status_code == 200
    call = f"/v1/calls/{left.headers['fallow-call']}"
    seen = next(left.iter_content(None))
    left.close()
    assert service.get(call).json()["status"] == "running", "it was left in the middle"
    live = post(service, key, ENDLESS, "/completions")
    assert live.headers["fallow-repeated"] == "1"
    assert live.headers["fallow-call"] == left.headers["fallow-call"]
    assert live.content.startswith(seen)
    assert live.content.rstrip().endswith(b"data: [DONE]")
    until(lambda: service.get(call).json()["status"] == "done", within_s=10, what="the call's end")
    again = post(service, key, ENDLESS, "/completions")
    assert again.content == live.content
    told = story(service, again)
    assert len(told["attempts"]) == 1
    assert told["output_tokens"] == ENDLESS["max_tokens"]

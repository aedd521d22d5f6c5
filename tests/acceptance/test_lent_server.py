"""A real second server, llama.cpp's own, that is lent: answers, faults, its key, its prefix."""

from collections.abc import Callable
from typing import Any

import openai
import pytest
from running import Apart, Service, until, wait_ready
from second_server import LENT, Second

KEY = "sk-canary-3921"


def ask(client: openai.OpenAI, **options: Any) -> Any:
    said: list[Any] = [{"role": "user", "content": "Say hello."}]
    return client.chat.completions.create(model=LENT, messages=said, max_tokens=8, temperature=0, **options)


def offer(service: Service) -> dict[str, Any]:
    (node,) = service.nodes()
    (found,) = node["offers"]
    return dict(found)


def test_another_server_is_lent(apart: Apart, second: Callable[..., Second]) -> None:
    service = apart.start_hub_and_gateway()
    server = second()
    apart.lend("node", "--engine", server.url, "--slots", "2")
    wait_ready(service, 1)
    assert offer(service)["model"] == LENT
    with service.client() as client:
        answer = ask(client)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens > 0
        stream = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices)
        assert stream == answer.choices[0].message.content
        assert [one.id for one in client.models.list().data] == [LENT]
    refused = service.post({"model": LENT, "messages": "no list"})
    assert refused.status_code == 400, "a refusal passes"


def test_a_server_that_is_killed_and_comes_back(apart: Apart, second: Callable[..., Second]) -> None:
    service = apart.start_hub_and_gateway()
    server = second()
    node = apart.lend("node", "--engine", server.url)
    wait_ready(service, 1)
    server.kill()
    until(lambda: offer(service)["readiness"] == "failed", within_s=20, what="the offer fails")
    with service.client() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client)
        assert caught.value.status_code in (502, 503)
        server.start()
        until(lambda: offer(service)["readiness"] == "ready", within_s=20, what="the offer comes back")
        assert ask(client).choices[0].message.content
    assert node.process.poll() is None
    assert node.said().count("not lent now") == 1
    assert node.said().count("lent again") == 1


def test_a_server_with_a_key_and_a_path_of_its_own(apart: Apart, second: Callable[..., Second]) -> None:
    service = apart.start_hub_and_gateway()
    server = second(key=KEY, prefix="/api")
    key_file = apart.folder / "engine.key"
    key_file.write_text(KEY + "\n")
    key_file.chmod(0o600)
    node = apart.lend("node", "--engine", server.url, "--verbose", more=f'[engine]\nkey_file = "{key_file}"\n')
    wait_ready(service, 1)
    with service.client() as client:
        assert ask(client).choices[0].message.content
    words = " ".join(word for process in node.family() for word in process.cmdline())
    assert KEY not in words
    node.stop()
    for path in [node.output, *node.data.rglob("*")]:
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_key_that_is_missing_is_told_to_the_lender(apart: Apart, second: Callable[..., Second]) -> None:
    apart.start_hub_and_gateway()
    node = apart.lend("node", "--engine", second(key=KEY).url)
    assert node.process.wait(30) == 1
    assert "does not take the lender's key" in node.said()
    assert "engine.key_file" in node.said()
    assert node.said().strip().count("\n") == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1/v1", "does not list its models"),
        (f"http://me:{KEY}@127.0.0.1/v1", "engine.key_file"),
        ("127.0.0.1:11434", "expected http://"),
    ],
)
def test_nothing_to_lend_is_one_line(apart: Apart, address: str, words: str) -> None:
    apart.start_hub_and_gateway()
    node = apart.lend("node", "--engine", address)
    assert node.process.wait(30) in (1, 2)
    assert words in node.said()
    assert node.said().strip().count("\n") == 0
    assert KEY not in node.said()

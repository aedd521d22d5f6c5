"""What a call would cost, the call itself, and why it went where it went: the real service, the real client, the real commands."""

import json
from typing import Any

import openai
import pytest
from running import EMBEDDER, MODEL, Service, fallow, until

NEEDS = {"deadline_s": 60, "max_cost": 0.01, "rings": ["own"]}
CHAT: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "messages": [{"role": "user", "content": "Name three rivers."}]}


def quotes(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    return client.post("/quotes", cast_to=object, body=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_quote_then_the_call_then_why(service: Service, client: openai.OpenAI, stream: bool) -> None:
    found = until(lambda: quotes(client, CHAT | {"fallow": NEEDS})["quotes"], what="a quote")
    node_id = service.nodes()[0]["node_id"]
    [quote] = found
    assert (quote["node"], quote["model"], quote["hardware"], quote["ring"]) == (node_id, MODEL, "cpu", "own")
    assert quote["cost_max"] >= quote["cost_expected"] > 0
    assert quote["end_ms"] >= quote["first_token_ms"] > 0
    assert 0.95 <= quote["chance"] <= 1

    answer = client.chat.completions.with_raw_response.create(**CHAT, stream=stream, extra_body={"fallow": NEEDS})
    if stream:
        for _ in answer.parse():
            pass
    head = answer.headers
    assert (head["fallow-node"], head["fallow-ring"]) == (node_id, "own")
    assert head["fallow-readers"] == "hub, node", "who runs the hub runs this gateway"
    told = until(lambda: over(service, head["fallow-call"]), what="the end of the call")
    [attempt] = told["attempts"]
    assert (attempt["node"], attempt["ring"], attempt["quote"]["hardware"], attempt["others"]) == (node_id, "own", "cpu", [])
    assert attempt["why"]
    assert told["predicted"] == {"first_token_ms": attempt["quote"]["first_token_ms"], "end_ms": attempt["quote"]["end_ms"]}
    assert told["actual"]["end_ms"] > 0
    assert (told["actual"]["first_token_ms"] is not None) == stream
    assert 0 < told["cost"] <= attempt["quote"]["cost_max"] == float(head["fallow-cost-max"])
    assert told["waited_ms"] is None


def over(service: Service, call_id: str) -> Any:
    """What is told of a call once it is over."""
    told = service.get(f"/v1/calls/{call_id}").json()
    return told if told["status"] != "running" else None


def test_a_quote_for_what_embeds(client: openai.OpenAI) -> None:
    found = until(lambda: quotes(client, {"model": EMBEDDER, "input": "Rivers."})["quotes"], what="a quote")
    assert [(one["model"], one["end_ms"]) for one in found] == [(EMBEDDER, found[0]["first_token_ms"])]


def test_what_no_node_can_do_is_told_by_quote_and_call_alike(client: openai.OpenAI) -> None:
    dear = CHAT | {"fallow": {"max_price": 1e-6}}
    until(lambda: quotes(client, CHAT)["quotes"], what="a quote")
    told = quotes(client, dear)
    assert told["quotes"] == []
    [stopped] = told["refused"]
    assert (stopped["limit"], stopped["offers"]) == ("over_price", 1)
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**CHAT, extra_body={"fallow": dear["fallow"]})
    assert refusal.value.code == "over_limits"
    assert stopped["lifted_by"] in refusal.value.message
    with pytest.raises(openai.NotFoundError):
        quotes(client, CHAT | {"model": "giant"})


def test_the_commands(service: Service, client: openai.OpenAI) -> None:
    until(lambda: quotes(client, CHAT)["quotes"], what="a quote")
    data = str(service.parts["up"].data)
    asked = fallow("quote", "Name three rivers.", "--model", MODEL, "--max-tokens", "12", "--rings", "own", "--data", data)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"{MODEL} at /v1/chat/completions" in asked.stdout
    document = json.loads(fallow("quote", "Name three rivers.", "--json", "--data", data).stdout)
    assert document["quotes"][0]["model"] == MODEL
    nothing = fallow("quote", "Name three rivers.", "--max-cost", "0.000001", "--data", data)
    assert nothing.returncode == 1
    assert "over_cost: raise max_cost" in nothing.stdout

    call_id = client.chat.completions.with_raw_response.create(**CHAT).headers["fallow-call"]
    why = fallow("why", call_id, "--data", data)
    assert (why.returncode, why.stderr) == (0, "")
    assert f"{call_id} went well" in why.stdout
    assert "predicted: first token" in why.stdout
    assert "cost: " in why.stdout
    unknown = fallow("why", "call_nobody", "--data", data)
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (1, "", 1)

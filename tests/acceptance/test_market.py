"""Two lenders' machines of different price and a second server that stands for a GPU: where calls go, why, and what refuses them."""

from collections.abc import Callable
from typing import Any

import openai
import pytest
from running import MODEL, Apart, Service, wait_ready
from second_server import Second


def fixed(usd_per_million_output: float) -> str:
    return f'price = "fixed"\nusd_per_million_prompt = 0.01\nusd_per_million_output = {usd_per_million_output}\n'


def town(apart: Apart, second: Callable[..., Second]) -> Service:
    """A cheap machine in Germany, a dearer one in France, and a dear GPU."""
    service = apart.start_hub_and_gateway()
    apart.lend("cheap", region="eu-de", lend=fixed(90))
    apart.lend("dear", region="eu-fr", lend=fixed(120))
    gpu = '[engine]\nhardware = "gpu"\ngpu = "played"\nusd_per_million_prompt = 0.01\nusd_per_million_output = 400\n'
    apart.lend("gpu", "--engine", second(alias=MODEL).url, region="eu-at", more=gpu)
    wait_ready(service, 3)
    return service


def ask(client: openai.OpenAI, **options: Any) -> dict[str, str]:
    """The headers of an answer that came."""
    said: list[Any] = [{"role": "user", "content": "Say hello."}]
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=said, max_tokens=8, temperature=0, **options)
    assert answer.status_code == 200
    return dict(answer.headers)


def test_each_call_goes_where_it_is_cheapest_among_what_meets_its_needs(apart: Apart, second: Callable[..., Second]) -> None:
    service = town(apart, second)
    regions = {node["node_id"]: node["region"] for node in service.nodes()}

    def region(headers: dict[str, str]) -> str:
        return str(regions[headers["fallow-node"]])

    with service.client() as client:
        tight = {"fallow": {"first_token_ms": 60_000, "per_token_ms": 50}}
        headers = ask(client, extra_body=tight)
        said = client.get(f"/calls/{headers['fallow-call']}", cast_to=object)
        assert region(headers) == "eu-at", f"only the GPU is likely to write so fast: {said}"
        loose = {"fallow": {"deadline_s": 600}}
        headers = ask(client, extra_body=loose)
        assert (region(headers), headers["fallow-hardware"].split()[0]) == ("eu-de", "cpu"), "the same call with time is cheaper on a CPU"
        assert float(headers["fallow-cost-max"]) > 0
        assert region(ask(client, extra_body={"fallow": {"region": "eu-fr"}})) == "eu-fr"
        assert region(ask(client, extra_body={"fallow": {"country": "at"}})) == "eu-at"
        assert region(ask(client, service_tier="flex")) == "eu-de"

        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, extra_body={"fallow": {"max_price": 50}})
        assert "the cheapest is 90" in caught.value.message
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, extra_body={"fallow": {"region": "eu-it"}})
        assert all(there in caught.value.message for there in ("eu-de", "eu-fr", "eu-at"))
        call = client.get(f"/calls/{caught.value.response.headers['fallow-call']}", cast_to=object)
        assert isinstance(call, dict)
        assert call["attempts"] == [], "no byte of it left the gateway"
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, extra_body={"fallow": {"strict": True, "first_token_ms": 1}})
        assert "leave out strict" in caught.value.message
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, extra_body={"fallow": {"rings": ["market"]}})
        assert caught.value.body is not None
        assert caught.value.param == "fallow.rings"

        quotes = service.post({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}, "/quotes").json()
        costs = [quote["cost_expected"] for quote in quotes["quotes"] if quote["chance"] >= 0.95]
        assert len(quotes["quotes"]) == 3
        assert costs == sorted(costs)

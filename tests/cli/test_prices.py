"""`fallow prices`: a table, and how each price moved over the last day."""

from typing import Any

import msgspec
import pytest

from fallow.apps.gateway.prices import ModelPrices, PriceView
from fallow.cli import prices
from fallow.cli.client import Gateway

NOW = "2026-09-21T12:00:00Z"


def view(output: float, at: str = NOW, **more: Any) -> PriceView:
    fields = {"model": "tiny", "hardware": "cpu", "prompt": 0.01, "cached_prompt": 0.0, "utilisation": 0.5, **more}
    return PriceView(output=output, at=at, **fields)


@pytest.mark.parametrize(
    ("now", "history", "said"),
    [
        (
            view(1.2),
            [view(9.0, "2026-09-20T11:59:59Z"), view(1.0, "2026-09-20T12:00:00Z"), view(0.8, "2026-09-21T00:00:00Z", utilisation=0.7)],
            "tiny (cpu): output +20.0 % since 2026-09-20T12:00:00Z, between 0.800000 and 1.200000, 60% busy on average",
        ),
        (view(1.0), [view(1.0, hardware="gpu")], "tiny (cpu): nothing is known of the last day"),
        (
            view(0.0),
            [view(0.0, prompt=0.02)],
            f"tiny (cpu): prompt -50.0 % since {NOW}, between 0.010000 and 0.020000, 50% busy on average",
        ),
        (view(1.0), [view(0.0)], f"tiny (cpu): output no price before since {NOW}, between 0.000000 and 1.000000, 50% busy on average"),
        (view(1.0), None, "tiny: the hub is away, and only it knows how prices moved"),
    ],
)
def test_how_a_price_moved_in_words(now: PriceView, history: list[PriceView] | None, said: str) -> None:
    assert prices.moves(ModelPrices(data=[now], history=history)) == [said]


class Answer:
    def __init__(self, document: dict[str, Any]) -> None:
        self.content = msgspec.json.encode(document)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were asked of a gateway that knows one model."""
    paths: list[str] = []

    def ask(gateway: Gateway, path: str) -> Answer:
        paths.append(path)
        row = msgspec.to_builtins(view(1.5, model="org/tiny"))
        return Answer({"object": "list", "unit": "credits per million tokens", "data": [row], "history": [row]})

    monkeypatch.setattr(prices, "ask", ask)
    return paths


def test_the_table_and_a_line_for_each(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prices.prices(None, "http://127.0.0.1:1/v1", "", as_json=False) == 0
    assert asked == ["/v1/prices", "/v1/prices/org%2Ftiny"]
    said = capsys.readouterr().out
    assert "1.500000" in said
    assert "org/tiny (cpu): output +0.0 %" in said


@pytest.mark.parametrize(("model", "has_history"), [("", False), ("org/tiny", True)])
def test_as_json(asked: list[str], capsys: pytest.CaptureFixture[str], model: str, has_history: bool) -> None:
    assert prices.prices(None, "http://127.0.0.1:1/v1", model, as_json=True) == 0
    document = msgspec.json.decode(capsys.readouterr().out)
    assert document["data"][0]["output"] == 1.5
    assert ("history" in document) == has_history


def test_a_gateway_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert prices.prices(None, "http://127.0.0.1:1/v1", "", as_json=False) == 1
    assert "could not reach the gateway" in capsys.readouterr().err

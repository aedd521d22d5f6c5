"""`fallow quote` and `fallow why`: what is asked of the gateway, and how its answers read."""

from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from fallow.cli import quote
from fallow.cli.client import Gateway
from fallow.cli.main import app
from fallow.model.errors import StartFailed
from fallow.model.ids import CallId, NodeId
from fallow.model.views import AttemptView, CallView, QuoteList, QuoteView, StoppedView, Timing

URL = ("--base-url", "http://127.0.0.1:1/v1")
WHY = "the least expected cost of 3 offers that were likely to meet the call's needs"


def offered(node: str, **more: Any) -> QuoteView:
    fields: dict[str, Any] = {
        "model": "tiny",
        "hardware": "cpu",
        "ring": "own",
        "region": "eu-de",
        "cost_max": 0.0014,
        "cost_expected": 0.00016,
        "first_token_ms": 1_234,
        "per_token_ms": 31.0,
        "end_ms": 29_176,
        "chance": 0.973,
    }
    return QuoteView(node=NodeId(node), **(fields | more))


STOPPED = (
    StoppedView(limit="ring", offers=1, lifted_by="the key must allow another ring"),
    StoppedView(limit="over_price", offers=12, lifted_by="raise max_price: the cheapest is 0.21"),
)


class Answer:
    def __init__(self, document: Any) -> None:
        self.content = msgspec.json.encode(document)


class Played:
    """A gateway that offers a chat and an embedding model: what it was asked, and what it says of quotes and calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.models: list[Any] = [
            {"id": "vectors", "endpoints": ["/v1/embeddings"]},
            {"id": "tiny", "endpoints": ["/v1/chat/completions", "/v1/embeddings"]},
        ]
        self.quotes = [offered("node-a"), offered("node-g", hardware="gpu", gpu="L4", cost_expected=0.5, chance=1.0)]
        self.call = call_of()

    def ask(self, gateway: Gateway, path: str, body: Any = None) -> Answer:
        self.asked.append((path, body))
        if path == "/v1/models":
            return Answer({"data": self.models})
        if path == "/v1/quotes":
            return Answer(
                QuoteList(model=body["model"], path="/v1/x", prompt_tokens=12, output_tokens=180, quotes=self.quotes, refused=[*STOPPED])
            )
        if path == "/v1/calls/call_1":
            return Answer(self.call)
        raise StartFailed("nothing is known of this call")


def call_of(**more: Any) -> CallView:
    fields: dict[str, Any] = {
        "id": CallId("call_1"),
        "path": "/v1/chat/completions",
        "model": "tiny",
        "status": "done",
        "http_status": 200,
        "code": None,
        "arrived_at": "2026-09-21T14:13:20.000Z",
        "first_byte_ms": 1_500.0,
        "total_ms": 31_000.0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 160,
        "cost": 1.37e-7,
        "predicted": Timing(first_token_ms=1_234.0, end_ms=29_176.0),
        "actual": Timing(first_token_ms=1_400.0, end_ms=30_900.0),
        "waited_ms": None,
        "wait_why": None,
        "attempts": [attempt_of("node-a", others=[offered("node-g")])],
    }
    return CallView(**(fields | more))


def attempt_of(node: str, *, code: str | None = None, ms: float | None = 30_900.0, others: list[QuoteView] | None = None) -> AttemptView:
    return AttemptView(
        node=NodeId(node),
        hardware="cpu 4x avx2",
        ring="own",
        region="eu-de",
        code=code,
        ms=ms,
        why=WHY,
        quote=offered(node),
        others=others or [],
    )


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(quote, "ask", found.ask)
    monkeypatch.setenv("COLUMNS", "200")
    return found


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, *URL])


# quote
@pytest.mark.parametrize(
    ("flags", "body"),
    [
        ([], {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
        (["--model", "vectors"], {"model": "vectors", "input": "hi"}),
        (["--model", "a family"], {"model": "a family", "messages": [{"role": "user", "content": "hi"}]}),
        (
            ["--max-tokens", "9", "--tier", "flex"],
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "service_tier": "flex"},
        ),
        (
            ["--deadline", "2.5", "--first-token", "700", "--max-cost", "0.01", "--rings", "own, partner", "--prefer", "fast"],
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "hi"}],
                "fallow": {"deadline_s": 2.5, "first_token_ms": 700, "max_cost": 0.01, "rings": ["own", "partner"], "prefer": "fast"},
            },
        ),
    ],
)
def test_what_is_asked(played: Played, flags: list[str], body: Any) -> None:
    assert run("quote", "hi", *flags).exit_code == 0
    assert played.asked == [("/v1/models", None), ("/v1/quotes", body)]


def test_the_table(played: Played) -> None:
    said = run("quote", "hi").stdout.splitlines()
    assert said[0] == "tiny at /v1/x: about 12 tokens to read and 180 to write"
    rows = [" ".join(line.split()) for line in said[2:4]]
    assert rows[0] == "node-a cpu own eu-de 1.23 s 29 s 97% 0.00016 0.0014"
    assert rows[1] == "node-g gpu L4 own eu-de 1.23 s 29 s 100% 0.5 0.0014"
    assert said[-2:] == [
        "12 offers stopped by over_price: raise max_price: the cheapest is 0.21",
        "1 offer stopped by ring: the key must allow another ring",
    ]


def test_a_family_names_its_models_and_an_unknown_place_is_left_out(played: Played) -> None:
    played.quotes = [offered("node-a", region="unknown"), offered("node-b", model="tiny-q8", region="unknown")]
    rows = [" ".join(line.split()) for line in run("quote", "hi").stdout.splitlines()[1:4]]
    assert rows[0] == "node model hardware ring 1st token end chance cost at most"
    assert rows[2] == "node-b tiny-q8 cpu own 1.23 s 29 s 97% 0.00016 0.0014"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_a_quote_it_fails_and_says_why(played: Played, flags: list[str]) -> None:
    played.quotes = []
    result = run("quote", "hi", *flags)
    assert result.exit_code == 1
    assert "raise max_price: the cheapest is 0.21" in result.stdout
    assert ("no node can take this call" in result.stdout) == (not flags)


def test_quotes_as_json(played: Played) -> None:
    document = msgspec.json.decode(run("quote", "hi", "--json").stdout, type=QuoteList)
    assert document.quotes == played.quotes
    assert document.refused == [*STOPPED]


# why
def test_a_call_in_words(played: Played) -> None:
    said = run("why", "call_1").stdout.splitlines()
    assert said[:6] == [
        "call_1 went well (tiny at /v1/chat/completions, 2026-09-21T14:13:20.000Z)",
        "1. node-a (cpu 4x avx2, ring own, region eu-de) answered after 31 s",
        f"   chosen: {WHY}",
        "predicted: first token after 1.23 s, end after 29 s, 97% sure to meet the needs",
        "actual:    first token after 1.40 s, end after 31 s",
        "cost:      0.000000137 for 10 tokens read (4 known) and 160 written; 0.00016 expected, 0.0014 at most, in credits (USD)",
    ]
    assert said[6] == "what else was possible:"
    assert "node-g" in said[8]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (call_of(status="failed", code="no_capacity", attempts=[], predicted=None, actual=None), "no node was asked"),
        (
            call_of(status="failed", code="no_capacity", model=None),
            "call_1 failed: no_capacity (no model at /v1/chat/completions, 2026-09-21T14:13:20.000Z)",
        ),
        (call_of(waited_ms=3_000.0, wait_why="a cheaper offer is busy now"), "waited 3.00 s: a cheaper offer is busy now"),
        (
            call_of(attempts=[attempt_of("node-a", code="busy", ms=2.0), attempt_of("node-b")]),
            "1. node-a (cpu 4x avx2, ring own, region eu-de) busy after 0.00 s",
        ),
        (
            call_of(status="running", attempts=[attempt_of("node-a", ms=None)], actual=Timing(first_token_ms=None, end_ms=None)),
            "actual:    first token not told, no end yet",
        ),
        (
            call_of(status="caller_left", cost=None),
            "cost:      not known; 0.00016 expected, 0.0014 at most, in credits (USD)",
        ),
        (
            call_of(status="caller_left", cost=None),
            "1. node-a (cpu 4x avx2, ring own, region eu-de) was stopped after 31 s",
        ),
    ],
)
def test_other_calls_in_words(call: CallView, line: str) -> None:
    assert line in quote.told(call)


def test_a_call_as_json(played: Played) -> None:
    assert msgspec.json.decode(run("why", "call_1", "--json").stdout, type=CallView) == played.call
    assert played.asked == [("/v1/calls/call_1", None)]


# what goes wrong
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["quote", " "], 2, "say for which text"),
        (["why", "call_2"], 1, "nothing is known of this call"),
        (["why", "a/b?c"], 1, "nothing is known of this call"),
    ],
)
def test_an_error_is_one_line(played: Played, arguments: list[str], code: int, says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert says in result.stderr
    assert all(path in ("/v1/calls/call_2", "/v1/calls/a%2Fb%3Fc") for path, _ in played.asked)


def test_without_a_model_that_chats(played: Played) -> None:
    played.models = played.models[:1]
    result = run("quote", "hi")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "fallow lend" in result.stderr


@pytest.mark.parametrize("command", [["quote", "hi"], ["why", "call_1"]])
def test_a_gateway_that_is_not_there(command: list[str]) -> None:
    result = run(*command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "could not reach the gateway" in result.stderr

"""The OpenAPI document and the page that shows it: every path that takes calls, its errors, both ways to give a key."""

from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest

from fallow.apps.gateway import errors, openapi
from fallow.wire import openai as wire
from fallow.wire import quote_request, wishes

if TYPE_CHECKING:  # the same file under the two names by which mypy and pytest know it
    from tests.apps.one_loop import Network
else:
    from one_loop import Network

pytestmark = pytest.mark.anyio

LOOK_UPS = [wire.MODELS, wire.MODELS + "/{model}", wire.CALLS + "/{id}"]


async def document() -> Any:
    async with Network() as network:
        call = await network.get("/openapi.json", key="")
        assert call.status == 200
        return call.json


def references(part: Any) -> list[str]:
    if isinstance(part, dict):
        here = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return here + [found for value in part.values() for found in references(value)]
    return [found for value in part for found in references(value)] if isinstance(part, list) else []


async def test_every_path_is_in_it() -> None:
    paths = (await document())["paths"]
    assert [path for path in paths if path.startswith("/v1/")] == [door.path for door in openapi.DOORS]
    for path in wire.HEADS:
        assert set(paths[path]) == {"post"}
        assert paths[path]["post"]["requestBody"]["required"]
        assert [one["name"] for one in paths[path]["post"]["parameters"]] == [
            "Prefer",
            "Idempotency-Key",
            *wishes.HEADERS,
            wishes.TIER_HEADER,
        ]
    for path in LOOK_UPS:
        assert set(paths[path]) == {"get"}
    assert {"/healthz", "/fallow/nodes"} <= set(paths)


async def test_a_quote_takes_any_calls_body_and_headers() -> None:
    whole = await document()
    quotes = whole["paths"][quote_request.PATH]["post"]
    names = [one["name"] for one in quotes["parameters"]]
    assert names == [quote_request.PATH_HEADER, "Prefer", "Idempotency-Key", *wishes.HEADERS, wishes.TIER_HEADER]
    assert quotes["parameters"][0]["schema"]["enum"] == list(wire.HEADS)
    body = quotes["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**body, "components": whole["components"]})
    for right in ({"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "x"}, {"input": "x"}, {"query": "x", "documents": ["y"]}):
        assert validator.is_valid({"model": "m", "fallow": {"max_cost": 1}} | right)
    assert not validator.is_valid({"model": "m"})
    answer = quotes["responses"]["200"]
    assert answer["content"] == {"application/json": {"schema": {"$ref": "#/components/schemas/QuoteList"}}}
    assert answer["headers"] == {}, "no node answers"
    assert {"400", "401", "404", "408", "413", "503"} <= set(quotes["responses"])
    assert "`model_not_found`" in quotes["responses"]["404"]["description"]


async def test_every_reference_leads_somewhere() -> None:
    whole = await document()
    found = references(whole)
    assert len(found) > 20
    for reference in found:
        assert reference.rsplit("/", 1)[1] in whole["components"]["schemas"], reference


@pytest.mark.parametrize("path", sorted(wire.HEADS))
async def test_a_request_must_name_its_model(path: str) -> None:
    whole = await document()
    schema = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": whole["components"]})
    assert not validator.is_valid({})
    assert any("model" in error.message for error in validator.iter_errors({}))


async def test_a_chat_that_is_right_is_right_by_the_document() -> None:
    whole = await document()
    schema = whole["paths"][wire.CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": whole["components"]})
    assert validator.is_valid({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    assert not validator.is_valid({"model": "m", "messages": "hi"})


@pytest.mark.parametrize("path", sorted(wire.HEADS))
@pytest.mark.parametrize(
    ("fallow", "is_right"),
    [
        ({}, True),
        ({"max_cost": 0.002, "rings": ["own"], "region": ["eu-de"], "country": "DE", "strict": None}, True),
        ({"rings": ["all"]}, False),
        ({"country": "deu"}, False),
        ({"ring": ["own"]}, False),
        (None, False),
    ],
)
async def test_the_wishes_are_in_the_document(path: str, fallow: Any, is_right: bool) -> None:
    whole = await document()
    schema = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": whole["components"]})
    errors_found = [
        error for error in validator.iter_errors({"model": "m", "fallow": fallow}) if list(error.instance_path)[:1] == ["fallow"]
    ]
    assert (not errors_found) == is_right
    described = whole["components"]["schemas"]["Wishes"]["properties"]
    assert {name: field["description"] for name, field in described.items()} == wishes.ABOUT
    assert "The owner of a node can read what runs on it" in described["rings"]["description"]


async def test_the_errors_have_the_paths_envelope() -> None:
    paths = (await document())["paths"]
    for path in wire.HEADS:
        answers = paths[path]["post"]["responses"]
        envelope = "MessagesErrorEnvelope" if path.startswith(wire.MESSAGES) else "ErrorEnvelope"
        for status in (400, 401, 404, 408, 413, 500, 502, 503, 504):
            schema = answers[str(status)]["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{envelope}"}
        assert "Retry-After" in answers["503"]["headers"]
        assert ("text/event-stream" in answers["200"]["content"]) == wire.read_head(path, b'{"model":"m"}').streams
    told = " ".join(answer["description"] for answer in paths[wire.CHAT]["post"]["responses"].values())
    assert {code for code in errors.TABLE if f"`{code}`" not in told} == {"method_not_allowed", "call_not_found"}
    for path in LOOK_UPS:
        assert {"200", "401", "404", "503"} <= set(paths[path]["get"]["responses"])


async def test_both_ways_to_give_a_key() -> None:
    whole = await document()
    schemes = whole["components"]["securitySchemes"]
    assert (schemes["key"]["type"], schemes["key"]["scheme"]) == ("http", "bearer")
    assert (schemes["api_key"]["type"], schemes["api_key"]["in"], schemes["api_key"]["name"]) == ("apiKey", "header", "x-api-key")
    for door in openapi.DOORS:
        assert whole["paths"][door.path][door.method]["security"] == [{"key": []}, {"api_key": []}]


async def test_a_call_as_the_document_has_it() -> None:
    whole = await document()
    schema = whole["paths"][wire.CALLS + "/{id}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CallView"}
    assert whole["paths"][wire.CALLS + "/{id}"]["get"]["parameters"][0]["name"] == "id"
    assert {"attempts", "predicted", "actual", "cost"} <= set(whole["components"]["schemas"]["CallView"]["required"])
    assert {"why", "quote", "others"} <= set(whole["components"]["schemas"]["AttemptView"]["required"])


async def test_the_page_shows_all_of_it() -> None:
    async with Network() as network:
        page = (await network.get("/docs", key="")).body.decode()
    for door in openapi.DOORS:
        assert f"<code>{door.path}</code>" in page
    assert "http://" not in page.replace("http://HOST:PORT", ""), "it loads nothing from anywhere"

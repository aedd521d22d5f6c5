"""No body, however wrong, gets more than a refusal: bodies from our document, from the vendors', and good ones gone wrong."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from bodies import ENDPOINTS, EXAMPLES, Endpoint, from_document, from_vendor, mutated
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from running import Service
from vendor import Vendor, complaints, events

TIMEOUT_S = 30
SHOWN = 3_000
ENDS = ("message_stop", "response.completed", "response.incomplete")
FUZZ = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def line(service: Service) -> Iterator[requests.Session]:
    """A connection that is kept, with the key."""
    with requests.Session() as session:
        session.headers.update({"authorization": f"Bearer {service.key}", "content-type": "application/json"})
        yield session


def of_ours(service: Service, endpoint: Endpoint) -> SearchStrategy[bytes]:
    return from_document(service.get("/openapi.json").json(), endpoint)


def of_the_vendor(service: Service, endpoint: Endpoint) -> SearchStrategy[bytes]:
    return from_vendor(endpoint)


def gone_wrong(service: Service, endpoint: Endpoint) -> SearchStrategy[bytes]:
    return mutated(endpoint)


Source = Callable[[Service, Endpoint], SearchStrategy[bytes]]
SOURCES: tuple[Source, ...] = (of_ours, of_the_vendor, gone_wrong)
CASES = [
    pytest.param(endpoint, source, id=f"{endpoint.path}-{source.__name__}")
    for endpoint in ENDPOINTS.values()
    for source in SOURCES
    if source is not of_the_vendor or endpoint.vendor is not None
]


@pytest.mark.parametrize(("endpoint", "source"), CASES)
def test_nothing_gets_more_than_a_refusal(service: Service, line: requests.Session, endpoint: Endpoint, source: Source) -> None:
    sources = len(SOURCES) if endpoint.vendor is not None else len(SOURCES) - 1

    @settings(FUZZ, max_examples=math.ceil(EXAMPLES / sources))
    @given(body=source(service, endpoint))
    def holds(body: bytes) -> None:
        found = fault(service, line, endpoint.path, body)
        assert found is None, f"{found}\nbody: {body[:SHOWN]!r}"

    holds()


def fault(service: Service, line: requests.Session, path: str, body: bytes) -> str | None:
    """What is wrong with the answer to a body, if anything is."""
    try:
        answer = line.post(service.root + path, data=body, timeout=TIMEOUT_S)
    except (requests.ReadTimeout, requests.ConnectionError) as error:
        if "Read timed out" not in str(error):
            raise
        # It may have asked for much, which is its right as long as others are served.
        well = line.get(service.root + "/healthz", timeout=TIMEOUT_S).status_code == 200
        return None if well else "the gateway doesn't answer any more"
    said = answer.text[:SHOWN]
    if answer.status_code >= 500 or "Traceback" in answer.text:
        return f"{answer.status_code}: {said}"
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _broken_stream(answer.content)
    try:
        document = answer.json()
    except requests.JSONDecodeError:
        return f"{answer.status_code}, and no JSON: {said}"
    if answer.status_code == 200:
        return None
    vendor: Vendor = "anthropic" if path.startswith("/v1/messages") else "openai"
    wrong = complaints(vendor, "ErrorResponse", document)
    return f"{answer.status_code}, and not {vendor}'s error: {wrong[:3]}: {said}" if wrong else None


def _broken_stream(content: bytes) -> str | None:
    """A stream that began must end; a failure inside it is a 5xx that came too late for the status."""
    found = events(content)
    for name, event in found:
        if name == "error" or (isinstance(event, dict) and _failure(event)):
            return f"200, and in the stream: {json.dumps(event)[:SHOWN]}"
    ended = found and (found[-1][0] in ENDS or found[-1][1] == "[DONE]")
    return None if ended else f"200, and a stream without an end: {content[-SHOWN:]!r}"


def _failure(event: dict[str, Any]) -> Any:
    response = event.get("response")
    return event.get("error") or (response.get("error") if isinstance(response, dict) else None)

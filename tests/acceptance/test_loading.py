"""Several models on one node within a memory limit: loaded when called for, the least recently used leaves first."""

import concurrent.futures
from typing import Any

import requests
from running import EMBEDDER, MODEL, Apart, Running, Service, until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Count to one hundred."}], "max_tokens": 5}
EMBED = {"model": EMBEDDER, "input": "a cat"}
TIGHT = "memory_gb = 0.6\n"
"""Room for one of the two."""


def readiness(service: Service) -> dict[str, str]:
    return {offer["model"]: offer["readiness"] for node in service.nodes() for offer in node["offers"]}


def both(apart: Apart, settings: str, *, load_wait_s: float = 10) -> tuple[Service, Running]:
    service = apart.start_hub_and_gateway()
    node = apart.lend("node", "--model", MODEL, "--model", EMBEDDER, load_wait_s=load_wait_s, more=settings)
    until(lambda: readiness(service).get(MODEL) == "ready", what="the first model")
    return service, node


def test_the_second_model_is_loaded_when_it_is_called_for(apart: Apart) -> None:
    service, _ = both(apart, "")
    assert readiness(service) == {MODEL: "ready", EMBEDDER: "cold"}
    assert service.post(EMBED, "/embeddings").status_code == 200
    until(lambda: readiness(service) == {MODEL: "ready", EMBEDDER: "ready"}, what="both in memory")


def test_one_leaves_for_the_other_but_never_in_the_middle_of_a_call(apart: Apart) -> None:
    service, _ = both(apart, TIGHT, load_wait_s=30)
    long = CHAT | {"max_tokens": 300, "temperature": 0}
    alone = service.post(long).json()["choices"][0]["message"]["content"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(service.post, long)
        until(lambda: service.nodes()[0]["offers"][0]["slots_free"] < service.nodes()[0]["offers"][0]["slots"], what="the call runs")
        waiting = pool.submit(service.post, EMBED, "/embeddings")
        first: requests.Response = running.result()
        second: requests.Response = waiting.result()
    assert (first.status_code, second.status_code) == (200, 200), (first.text[:300], second.text[:300])
    assert first.json()["choices"][0]["message"]["content"] == alone
    until(lambda: readiness(service) == {MODEL: "cold", EMBEDDER: "ready"}, what="the first one left")
    assert service.post(CHAT).status_code == 200
    until(lambda: readiness(service) == {MODEL: "ready", EMBEDDER: "cold"}, what="it is back")


def test_a_caller_chooses_to_wait_or_to_be_told(apart: Apart) -> None:
    service, _ = both(apart, "", load_wait_s=0)
    told = service.post(EMBED, "/embeddings")
    assert told.status_code == 503
    error: dict[str, Any] = told.json()["error"]
    assert error["code"] == "model_loading"
    assert error["loading"]["ready_in_s"] > 0
    assert int(told.headers["retry-after"]) >= 1
    assert "Prefer: wait=60" in error["message"]
    waited = service.post(EMBED, "/embeddings", headers={"prefer": "wait=60"})
    assert waited.status_code == 200, waited.text
    assert waited.headers["preference-applied"] == "wait=60"


def test_a_bad_request_does_not_wait_for_a_model(apart: Apart) -> None:
    service, _ = both(apart, "", load_wait_s=30)
    assert service.post(EMBED | {"dimensions": 7}, "/embeddings").json()["error"]["param"] == "dimensions"
    assert readiness(service)[EMBEDDER] == "cold", "it was refused before anything was loaded"


def test_a_model_that_can_never_fit_is_said_at_the_start(apart: Apart) -> None:
    apart.start_hub_and_gateway()
    node = apart.lend("node", more="memory_gb = 0.1\n")
    assert node.process.wait(60) == 1
    assert "memory_gb" in node.said()
    assert node.said().strip().count("\n") == 0

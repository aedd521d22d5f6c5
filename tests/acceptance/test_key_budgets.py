"""A key's budget with real processes: two gateways and a hub count what its calls cost, and it holds when they stop and come back."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from running import Running, Service, until
from test_identity import Site as Known
from test_identity import code_of
from test_rolling import END_S, MODEL

PRICED = "[engine]\nusd_per_million_prompt = 1000\nusd_per_million_output = 1000\n"
"""A thousand micro-credits for each token."""
TOKENS = {"max_tokens": 4}
AT_ONCE = 12
MICRO = 1_000_000


class Site(Known):
    """A broker, a hub, two gateways, and two nodes that ask a price."""

    def lend(self, name: str, *arguments: str, **more: Any) -> Running:
        return super().lend(name, *arguments, **{"more": PRICED, **more})

    def spent_micro(self, key: str) -> int:
        """What the hub lists."""
        listed = msgspec.json.decode(self.at_hub("keys", "list", "--json"))
        return int(next(one["spent_micro"] for one in listed if one["id"] == key))


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    running = Site(tmp_path_factory.mktemp("budget"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


def call(service: Service, *, chunks: int = 2, interval_ms: int = 0) -> tuple[int, int]:
    """A call's status, and what it cost in micro-credits as its story tells it."""
    pace = {"chunks": str(chunks), "interval_ms": str(interval_ms)}
    answer = service.post({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "metadata": pace, **TOKENS})
    cost = service.get(f"/v1/calls/{answer.headers['fallow-call']}").json()["cost"]
    return answer.status_code, round((cost or 0.0) * MICRO)


def test_a_budget_holds_over_gateways_restarts_and_a_hub_that_is_away(site: Site) -> None:
    _, free = site.key()
    status, cost = call(site.with_key(free)[0])
    assert (status, cost > 0) == (200, True), "it asks a price"
    budget = 5 * cost
    id, secret = site.key("--budget", str(budget / MICRO))
    first, second = site.with_key(secret)

    def until_refused(service: Service) -> int:
        """What was spent until the key was refused."""
        codes = list(iter(lambda: code_of(service, **TOKENS), "budget_spent"))
        assert set(codes) <= {"ok"}
        return cost * len(codes)

    # many at once can't pass it together
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(lambda _: call(first, interval_ms=100), range(AT_ONCE)))
    assert {status for status, _ in done} == {200, 429}
    spent = sum(cost for _, cost in done) + until_refused(first)
    assert 0 < spent <= budget

    # another gateway knows, and one that comes back
    until(lambda: site.spent_micro(id) == spent, what="the first report", within_s=END_S)
    assert until_refused(second) == 0
    site.parts["gateway1"].stop()
    site.start_again("gateway1")
    until(lambda: "answers at" in site.parts["gateway1"].said(), what="the gateway", within_s=END_S)
    site.wait_ready()
    assert until_refused(first) == 0

    # without the hub it goes on counting, and tells it later
    site.at_hub("keys", "limit", id, "--budget", str((spent + budget) / MICRO))
    until(lambda: code_of(second, **TOKENS) == "ok", what="the larger budget", within_s=END_S)
    site.parts["hub"].stop()
    more = cost + until_refused(second)
    assert more <= budget
    site.start_again("hub")
    until(lambda: site.spent_micro(id) == spent + more, what="the report that the hub had missed", within_s=END_S)

    # what was spent just before a gateway stops is told too
    site.at_hub("keys", "limit", id, "--budget", str((spent + more + budget) / MICRO))
    until(lambda: code_of(second, **TOKENS) == "ok", what="the larger budget", within_s=END_S)
    site.parts["gateway2"].stop()
    assert site.spent_micro(id) == spent + more + cost
